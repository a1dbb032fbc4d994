//! `tether policy`: what tenants may do.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use protocol::policy::{PolicySet, ServiceClass, TenantPolicy};
use protocol::quota::{QuotaList, QuotaRefusal, QuotaState, in_words};
use protocol::{Clock as _, ModelName, UnixMillis};
use rpc::SystemClock;
use serde::Serialize;

use super::jobs::client;
use super::{Context, Outcome};
use crate::args::{PolicyExplainArgs, PolicyRule, PolicySetArgs, PolicyShowArgs, ServerArgs};
use crate::operator::AdminClient;
use crate::output;

pub(super) async fn list(context: Context, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let admin = admin(&context, server).await?;
    let listed = admin.policies().await;
    admin.leave().await?;
    let listed = listed?;
    if context.json {
        output::json(&listed)?;
        return Ok(Outcome::Well);
    }
    let summary = |policy: &TenantPolicy| {
        let rules = rules(policy).into_iter().map(|(rule, value)| format!("{rule} {value}"));
        rules.collect::<Vec<_>>().join("; ")
    };
    let rows: Vec<Vec<String>> =
        listed.policies.iter().map(|rules| vec![rules.tenant_id.to_string(), summary(&rules.policy)]).collect();
    if rows.is_empty() {
        output::line("no tenant has a policy; `tether policy set TENANT` sets one");
    } else {
        output::table(&["TENANT", "RULES"], &rows);
    }
    Ok(Outcome::Well)
}

pub(super) async fn show(context: Context, args: &PolicyShowArgs) -> anyhow::Result<Outcome> {
    let admin = admin(&context, &args.server).await?;
    let policy = admin.policy(&args.tenant).await;
    admin.leave().await?;
    let policy = policy?;
    if context.json {
        output::json(&policy)?;
    } else {
        print(&policy);
    }
    Ok(Outcome::Well)
}

pub(super) async fn set(context: Context, args: PolicySetArgs) -> anyhow::Result<Outcome> {
    let written = args.from_file.as_deref().map(read_policy).transpose()?;
    let admin = admin(&context, &args.server).await?;
    let saved = async {
        let before = match written {
            Some(written) => written,
            None => admin.policy(&args.tenant).await?,
        };
        let policy = changed(before, &args);
        admin.set_policy(PolicySet { tenant_id: args.tenant.clone(), policy }).await
    };
    let saved = saved.await;
    admin.leave().await?;
    let saved = saved?;
    if context.json {
        output::json(&saved)?;
    } else {
        print(&saved.policy);
        output::line("It applies within 2 seconds.");
    }
    for warning in &saved.warnings {
        output::note(output::one_line(warning));
    }
    Ok(Outcome::Well)
}

pub(super) async fn explain(context: Context, args: &PolicyExplainArgs) -> anyhow::Result<Outcome> {
    let admin = admin(&context, &args.server).await?;
    let policy = admin.policy(&args.tenant).await;
    admin.leave().await?;
    let policy = policy?;
    let path = format!("/admin/v1/quotas?tenant={}", args.tenant);
    let used: anyhow::Result<QuotaList> = client(&context, &args.server)?.get(&path).await;
    let states = used.as_ref().map(fullest).unwrap_or_default();
    let question = Question { model: args.model.as_ref(), class: args.class, tokens: args.tokens };
    let now = SystemClock.now();
    let verdicts = judge(&policy, &states, &question, now);
    let refused = verdicts.iter().any(|verdict| !verdict.allows);
    if context.json {
        output::json(&verdicts)?;
    } else {
        let rows: Vec<Vec<String>> = verdicts.iter().map(|verdict| verdict.row(now)).collect();
        output::table(&["RULE", "SAYS", "SPENT", "RESERVED", "LEFT", "RESETS IN", "VERDICT"], &rows);
        let first = verdicts.iter().find_map(|verdict| verdict.refusal.as_deref());
        output::line(first.map_or_else(
            || "The request would be admitted.".to_owned(),
            |refusal| format!("The request would be refused: {}", output::one_line(refusal)),
        ));
    }
    match used {
        Err(error) => output::note(format!("what the tenant uses is not known: {error:#}")),
        Ok(list) if list.orchestrators.len() > 1 => {
            output::note("each orchestrator limits the jobs that it runs; the fullest is shown");
        }
        Ok(_) => {}
    }
    Ok(if refused { Outcome::Finding } else { Outcome::Well })
}

/// Returns for each rule the state at the orchestrator where least is left.
fn fullest(list: &QuotaList) -> Vec<QuotaState> {
    let mut fullest: Vec<QuotaState> = vec![];
    let all = list.orchestrators.iter().flat_map(|counted| &counted.tenants).flat_map(|tenant| &tenant.quotas);
    for state in all {
        match fullest.iter_mut().find(|known| known.rule == state.rule) {
            Some(known) if known.spent + known.reserved < state.spent + state.reserved => *known = *state,
            Some(_) => {}
            None => fullest.push(*state),
        }
    }
    fullest
}

/// What is asked of a policy.
struct Question<'a> {
    model: Option<&'a ModelName>,
    class: ServiceClass,
    tokens: u64,
}

/// What a rule says of a request.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Verdict {
    rule: &'static str,
    says: String,
    allows: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<QuotaState>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<String>,
}

impl Verdict {
    fn row(&self, now: UnixMillis) -> Vec<String> {
        let of_state = |cell: fn(&QuotaState) -> String| self.state.as_ref().map(cell).unwrap_or_default();
        let resets = self.state.as_ref().and_then(|state| state.resets_at);
        vec![
            self.rule.to_owned(),
            self.says.clone(),
            of_state(|state| state.spent.to_string()),
            of_state(|state| state.reserved.to_string()),
            of_state(|state| state.left().map(|left| left.to_string()).unwrap_or_default()),
            resets.map(|end| in_words(end.since(now))).unwrap_or_default(),
            if self.allows { "allows" } else { "refuses" }.to_owned(),
        ]
    }
}

/// Returns what each rule says of a request, in the order in which they are checked. Rules that are not set are left
/// out.
fn judge(policy: &TenantPolicy, states: &[QuotaState], question: &Question<'_>, now: UnixMillis) -> Vec<Verdict> {
    let mut verdicts = vec![];
    let mut plain = |rule, says: Option<String>, refusal: Option<String>| {
        if let Some(says) = says {
            verdicts.push(Verdict { rule, says, allows: refusal.is_none(), state: None, refusal });
        }
    };
    let refused = question.model.filter(|model| !policy.allows(model));
    let refused = refused.map(|model| format!("the tenant's policy does not allow the model {model}"));
    plain("allowed_models", policy.allowed_models.as_deref().map(names), refused);
    let refused = (!policy.allows_class(question.class))
        .then(|| format!("the tenant's policy does not allow the class {}", question.class.as_str()));
    let classes = policy.allowed_classes.as_ref().map(|classes| listed(classes.iter().map(|class| class.as_str())));
    plain("allowed_classes", classes, refused);
    let nowhere = policy.allowed_regions.as_ref().is_some_and(Vec::is_empty);
    let refused = nowhere.then(|| "the tenant's policy allows jobs in no region".to_owned());
    plain("allowed_regions", policy.allowed_regions.as_deref().map(names), refused);
    for state in states.iter().filter(|state| state.limit.is_some()) {
        let wanted = if state.rule.is_of_tokens() { question.tokens } else { 1 };
        let refusal = state.left().is_some_and(|left| left < wanted);
        let refusal = refusal.then(|| QuotaRefusal { state: *state, wanted }.error(now).message);
        let says = format!("at most {}", state.limit.unwrap_or_default());
        let (rule, allows) = (state.rule.as_str(), refusal.is_none());
        verdicts.push(Verdict { rule, says, allows, state: Some(*state), refusal });
    }
    verdicts
}

/// Reads a policy from a JSON file, or from stdin for `-`.
fn read_policy(file: &Path) -> anyhow::Result<TenantPolicy> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().lock().read_to_string(&mut text).context("could not read stdin")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| format!("could not read {}", file.display()))?;
    }
    let written = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", file.display()))?;
    match TenantPolicy::parse(written) {
        Ok(policy) => Ok(policy),
        Err(error) => bail!("{}: {error}", file.display()),
    }
}

/// Returns a policy with the changes of a command line.
fn changed(mut policy: TenantPolicy, args: &PolicySetArgs) -> TenantPolicy {
    for rule in &args.clear {
        clear(&mut policy, *rule);
    }
    put(&mut policy.requests_per_minute, args.requests_per_minute.as_ref());
    put(&mut policy.requests_per_day, args.requests_per_day.as_ref());
    put(&mut policy.tokens_per_minute, args.tokens_per_minute.as_ref());
    put(&mut policy.tokens_per_day, args.tokens_per_day.as_ref());
    put(&mut policy.concurrent_jobs, args.concurrent_jobs.as_ref());
    put(&mut policy.allowed_models, args.allow_models.as_ref());
    put(&mut policy.allowed_regions, args.allow_regions.as_ref());
    put(&mut policy.allowed_classes, args.allow_classes.as_ref());
    put(&mut policy.weight, args.weight.as_ref());
    let mut degrade = policy.degrade.take().unwrap_or_default();
    if let Some(models) = &args.degrade_models {
        degrade.models.clone_from(models);
    }
    put(&mut degrade.adapter, args.degrade_adapter.as_ref());
    put(&mut degrade.max_tokens, args.degrade_max_tokens.as_ref());
    policy.degrade = Some(degrade).filter(|degrade| *degrade != protocol::policy::DegradePolicy::default());
    policy
}

fn put<T: Clone>(rule: &mut Option<T>, new: Option<&T>) {
    if let Some(new) = new {
        *rule = Some(new.clone());
    }
}

fn clear(policy: &mut TenantPolicy, rule: PolicyRule) {
    match rule {
        PolicyRule::All => *policy = TenantPolicy::default(),
        PolicyRule::RequestsPerMinute => policy.requests_per_minute = None,
        PolicyRule::RequestsPerDay => policy.requests_per_day = None,
        PolicyRule::TokensPerMinute => policy.tokens_per_minute = None,
        PolicyRule::TokensPerDay => policy.tokens_per_day = None,
        PolicyRule::ConcurrentJobs => policy.concurrent_jobs = None,
        PolicyRule::AllowModel => policy.allowed_models = None,
        PolicyRule::AllowRegion => policy.allowed_regions = None,
        PolicyRule::AllowClass => policy.allowed_classes = None,
        PolicyRule::Weight => policy.weight = None,
        PolicyRule::Degrade => policy.degrade = None,
    }
}

fn print(policy: &TenantPolicy) {
    let rows: Vec<Vec<String>> = rules(policy).into_iter().map(|(rule, value)| vec![rule.to_owned(), value]).collect();
    if rows.is_empty() {
        output::line("no rule is set: everything is allowed");
    } else {
        output::table(&["RULE", "VALUE"], &rows);
    }
}

/// Returns the rules that are set, with their values.
fn rules(policy: &TenantPolicy) -> Vec<(&'static str, String)> {
    let limit = |number: Option<u64>| {
        number.map(|number| if number == 0 { "0 (none allowed)".to_owned() } else { number.to_string() })
    };
    let degrade = policy.degrade.as_ref();
    let classes = policy.allowed_classes.as_ref().map(|classes| listed(classes.iter().map(|class| class.as_str())));
    let all = [
        ("requests_per_minute", limit(policy.requests_per_minute.map(u64::from))),
        ("requests_per_day", limit(policy.requests_per_day)),
        ("tokens_per_minute", limit(policy.tokens_per_minute)),
        ("tokens_per_day", limit(policy.tokens_per_day)),
        ("concurrent_jobs", limit(policy.concurrent_jobs.map(u64::from))),
        ("allowed_models", policy.allowed_models.as_deref().map(names)),
        ("allowed_regions", policy.allowed_regions.as_deref().map(names)),
        ("allowed_classes", classes),
        ("weight", policy.weight.map(|weight| weight.to_string())),
        ("degrade.models", degrade.map(|degrade| names(&degrade.models)).filter(|names| names != NONE)),
        ("degrade.adapter", degrade.and_then(|degrade| Some(degrade.adapter.as_ref()?.to_string()))),
        ("degrade.max_tokens", degrade.and_then(|degrade| Some(degrade.max_tokens?.to_string()))),
    ];
    all.into_iter().filter_map(|(rule, value)| Some((rule, value?))).collect()
}

/// How an empty list is shown.
const NONE: &str = "(none)";

fn names<T: ToString>(entries: &[T]) -> String {
    listed(entries.iter().map(ToString::to_string))
}

fn listed<T: AsRef<str>>(entries: impl Iterator<Item = T>) -> String {
    let entries: Vec<T> = entries.collect();
    let names: Vec<&str> = entries.iter().map(AsRef::as_ref).collect();
    if names.is_empty() { NONE.to_owned() } else { names.join(", ") }
}

async fn admin(context: &Context, server: &ServerArgs) -> anyhow::Result<AdminClient> {
    AdminClient::of_registry(server, &context.settings, &context.data, &context.env).await
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use protocol::quota::{QuotaRule, Window};

    use super::*;
    use crate::args::{Cli, Command, PolicyCommand};

    fn args(line: &str) -> PolicySetArgs {
        let words = ["tether", "policy", "set", "acme"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).expect("a command line").command {
            Command::Policy(PolicyCommand::Set(args)) => *args,
            _ => panic!("another command"),
        }
    }

    #[test]
    fn a_command_changes_the_rules_it_names_and_no_others() {
        let policy =
            changed(TenantPolicy::default(), &args("--tokens-per-day 500 --allow-model a,b --degrade-max-tokens 9"));
        let shown = |policy: &TenantPolicy| {
            rules(policy).into_iter().map(|(rule, value)| format!("{rule}={value}")).collect::<Vec<_>>()
        };
        assert_eq!(shown(&policy), ["tokens_per_day=500", "allowed_models=a, b", "degrade.max_tokens=9"]);
        let policy = changed(policy, &args("--allow-model c --weight 2 --clear tokens-per-day --degrade-model small"));
        let expected = ["allowed_models=c", "weight=2", "degrade.models=small", "degrade.max_tokens=9"];
        assert_eq!(shown(&policy), expected);
        let policy = changed(policy, &args("--clear all --concurrent-jobs 0"));
        assert_eq!(shown(&policy), ["concurrent_jobs=0 (none allowed)"]);
        for wrong in ["--weight 0", "--allow-class urgent", "--tokens-per-day -1", "--clear everything"] {
            let words = ["tether", "policy", "set", "acme"].into_iter().chain(wrong.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_policy_is_explained_rule_by_rule() {
        let now = UnixMillis(1_700_000_000_000);
        let name = |name: &str| name.parse::<ModelName>().expect("a name");
        let policy = TenantPolicy { allowed_models: Some(vec![name("a")]), ..TenantPolicy::default() };
        let state = QuotaState {
            rule: QuotaRule::TokensPerDay,
            limit: Some(1_000),
            spent: 700,
            reserved: 200,
            resets_at: Some(Window::Day.end(now)),
        };
        let unlimited = QuotaState { rule: QuotaRule::RequestsPerDay, limit: None, ..state };
        let ask = |model: &str, tokens| {
            let question = Question { model: Some(&name(model)), class: ServiceClass::Standard, tokens };
            judge(&policy, &[unlimited, state], &question, now)
        };
        assert!(ask("a", 100).iter().all(|verdict| verdict.allows));
        let verdicts = ask("b", 101);
        assert_eq!(verdicts.iter().map(|verdict| verdict.allows).collect::<Vec<_>>(), [false, false]);
        let row = verdicts[1].row(now);
        assert_eq!(row, ["tokens_per_day", "at most 1000", "700", "200", "100", "1h 46m", "refuses"]);
        let refusal = verdicts[1].refusal.as_deref().expect("why");
        assert!(refusal.contains("700 are used") && refusal.contains("up to 101"), "{refusal}");
    }
}

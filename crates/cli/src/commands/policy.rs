//! `tether policy`: what tenants may do.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use protocol::policy::{PolicySet, ServiceClass, TenantPolicy};
use protocol::quota::{QuotaList, QuotaRefusal, QuotaRule, QuotaState, in_words};
use protocol::{Clock as _, ModelName, PublicKey, UnixMillis};
use rpc::SystemClock;
use serde::Serialize;

use super::jobs::{client, note_silent};
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
    let question = Question { model: args.model.as_ref(), class: args.class, tokens: args.tokens.max(1) };
    let now = SystemClock.now();
    let mut explanation = Explanation::of(judge(&policy, &states, &question, now), &question, now);
    match used {
        Ok(list) => {
            if list.orchestrators.len() > 1 {
                output::note("each orchestrator limits the jobs that it runs; the fullest is shown");
            }
            explanation.silent = list.silent;
        }
        Err(error) => output::note(format!("what the tenant uses is not known: {error:#}")),
    }
    if context.json {
        output::json(&explanation)?;
    } else {
        let rows: Vec<Vec<String>> = explanation.rules.iter().map(|verdict| verdict.row(now)).collect();
        if !rows.is_empty() {
            output::table(&["RULE", "SAYS", "SPENT", "RESERVED", "LEFT", "RESETS IN", "VERDICT"], &rows);
        }
        output::line(explanation.text());
    }
    note_silent(&explanation.silent);
    Ok(if explanation.outcome == Prospect::Admitted { Outcome::Well } else { Outcome::Finding })
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

/// What would happen to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Prospect {
    Admitted,
    Refused,
    /// It depends on what the tenant uses, and nobody says how much that is.
    Undecided,
}

/// What would happen to a request, and what each rule says of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Explanation {
    outcome: Prospect,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<String>,
    rules: Vec<Verdict>,
    /// Orchestrators that did not respond.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    silent: Vec<PublicKey>,
}

impl Explanation {
    fn of(rules: Vec<Verdict>, question: &Question<'_>, now: UnixMillis) -> Self {
        let refusal = first_refusal(&rules, question, now);
        let outcome = match refusal {
            Some(_) => Prospect::Refused,
            None if rules.iter().any(|verdict| verdict.allows.is_none()) => Prospect::Undecided,
            None => Prospect::Admitted,
        };
        Self { outcome, refusal, rules, silent: vec![] }
    }

    fn text(&self) -> String {
        match (self.outcome, &self.refusal) {
            (_, Some(refusal)) => format!("The request would be refused: {}", output::one_line(refusal)),
            (Prospect::Undecided, _) => "It cannot be decided whether the request would be admitted: no orchestrator \
                                         says how much the tenant uses."
                .to_owned(),
            _ => "The request would be admitted.".to_owned(),
        }
    }
}

/// Returns the refusal that the client would get, if a rule refuses the request.
fn first_refusal(rules: &[Verdict], question: &Question<'_>, now: UnixMillis) -> Option<String> {
    let is_windowed = |verdict: &&Verdict| verdict.judged.is_some_and(|state| state.rule.window().is_some());
    let first = rules.iter().filter(|verdict| !is_windowed(verdict)).find_map(|verdict| verdict.refusal.clone());
    // An orchestrator first checks whether anything is left at all, and with the reservation whether it is enough.
    let windowed = || rules.iter().filter(is_windowed).filter_map(|verdict| verdict.judged);
    let quota = || QuotaRefusal::among(windowed(), 1).or_else(|| QuotaRefusal::among(windowed(), question.tokens));
    first.or_else(|| Some(quota()?.error(now).message))
}

/// What a rule says of a request.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Verdict {
    rule: &'static str,
    says: String,
    /// Absent if it depends on what the tenant uses, and that is not known.
    allows: Option<bool>,
    /// What the tenant uses, if an orchestrator says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<QuotaState>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<String>,
    /// The state of a limit that was judged: nothing is used if it is not known.
    #[serde(skip)]
    judged: Option<QuotaState>,
}

impl Verdict {
    /// Returns what a limit says of a request.
    fn of_limit(rule: QuotaRule, limit: u64, known: Option<&QuotaState>, tokens: u64, now: UnixMillis) -> Self {
        let unused = QuotaState {
            rule,
            limit: None,
            spent: 0,
            reserved: 0,
            resets_at: rule.window().map(|window| window.end(now)),
        };
        // An orchestrator may not have heard of a new limit yet.
        let judged = QuotaState { limit: Some(limit), ..known.copied().unwrap_or(unused) };
        let refusal = QuotaRefusal::of(judged, tokens).map(|refusal| refusal.error(now).message);
        Self {
            rule: rule.as_str(),
            says: format!("at most {limit}"),
            allows: if refusal.is_some() { Some(false) } else { known.map(|_| true) },
            state: known.map(|_| judged),
            refusal,
            judged: Some(judged),
        }
    }

    fn row(&self, now: UnixMillis) -> Vec<String> {
        let of_state = |cell: fn(&QuotaState) -> String| self.state.as_ref().map(cell).unwrap_or_default();
        let resets = self.state.as_ref().and_then(|state| state.resets_at);
        let verdict = match self.allows {
            Some(true) => "allows",
            Some(false) => "refuses",
            None => "unknown",
        };
        vec![
            self.rule.to_owned(),
            self.says.clone(),
            of_state(|state| state.spent.to_string()),
            of_state(|state| state.reserved.to_string()),
            of_state(|state| state.left().map(|left| left.to_string()).unwrap_or_default()),
            resets.map(|end| in_words(end.since(now))).unwrap_or_default(),
            verdict.to_owned(),
        ]
    }
}

/// Returns what each rule says of a request, in the order in which they are checked: the gateway counts requests, and
/// the orchestrator checks the rest. Rules that are not set are left out.
fn judge(policy: &TenantPolicy, states: &[QuotaState], question: &Question<'_>, now: UnixMillis) -> Vec<Verdict> {
    let limited = |rule, limit: Option<u64>| {
        let known = states.iter().find(|state| state.rule == rule);
        limit.map(|limit| Verdict::of_limit(rule, limit, known, question.tokens, now))
    };
    let limits = [
        limited(QuotaRule::ConcurrentJobs, policy.concurrent_jobs.map(u64::from)),
        limited(QuotaRule::RequestsPerDay, policy.requests_per_day),
        limited(QuotaRule::TokensPerMinute, policy.tokens_per_minute),
        limited(QuotaRule::TokensPerDay, policy.tokens_per_day),
    ];
    let rate = limited(QuotaRule::RequestsPerMinute, policy.requests_per_minute.map(u64::from));
    rate.into_iter().chain(judge_lists(policy, question)).chain(limits.into_iter().flatten()).collect()
}

/// Returns what the lists of a policy say of a request.
fn judge_lists(policy: &TenantPolicy, question: &Question<'_>) -> Vec<Verdict> {
    let plain = |rule, says: Option<String>, refusal: Option<String>| {
        Some(Verdict { rule, says: says?, allows: Some(refusal.is_none()), state: None, refusal, judged: None })
    };
    let model = question.model.filter(|model| !policy.allows(model));
    let model = model.map(|model| format!("the tenant's policy does not allow the model {model}"));
    let class = (!policy.allows_class(question.class))
        .then(|| format!("the tenant's policy does not allow the class {}", question.class.as_str()));
    let classes = policy.allowed_classes.as_ref().map(|classes| listed(classes.iter().map(|class| class.as_str())));
    let nowhere = policy.allowed_regions.as_ref().is_some_and(Vec::is_empty);
    let nowhere = nowhere.then(|| "the tenant's policy allows jobs in no region".to_owned());
    let all = [
        plain("allowed_models", policy.allowed_models.as_deref().map(names), model),
        plain("allowed_classes", classes, class),
        plain("allowed_regions", policy.allowed_regions.as_deref().map(names), nowhere),
    ];
    all.into_iter().flatten().collect()
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

    const RULES: [QuotaRule; 5] = [
        QuotaRule::RequestsPerMinute,
        QuotaRule::RequestsPerDay,
        QuotaRule::TokensPerMinute,
        QuotaRule::TokensPerDay,
        QuotaRule::ConcurrentJobs,
    ];
    const NOW: UnixMillis = UnixMillis(1_700_000_000_000);

    fn used(rule: QuotaRule, spent: u64, reserved: u64) -> QuotaState {
        let resets_at = rule.window().map(|window| window.end(NOW));
        QuotaState { rule, limit: None, spent, reserved, resets_at }
    }

    fn explained(policy: &TenantPolicy, states: &[QuotaState], model: &str, tokens: u64) -> Explanation {
        let model: ModelName = model.parse().expect("a name");
        let question = Question { model: Some(&model), class: ServiceClass::Standard, tokens };
        Explanation::of(judge(policy, states, &question, NOW), &question, NOW)
    }

    #[test]
    fn a_policy_is_explained_rule_by_rule() {
        let policy = TenantPolicy {
            allowed_models: Some(vec!["a".parse().expect("a name")]),
            tokens_per_day: Some(1_000),
            ..TenantPolicy::default()
        };
        let states = [used(QuotaRule::RequestsPerDay, 9, 9), used(QuotaRule::TokensPerDay, 700, 200)];
        let ask = |model, tokens| explained(&policy, &states, model, tokens);
        assert_eq!(ask("a", 100).outcome, Prospect::Admitted);
        let explanation = ask("b", 101);
        assert_eq!(explanation.outcome, Prospect::Refused);
        let [models, tokens] = &explanation.rules[..] else { panic!("{explanation:?}") };
        assert_eq!((models.allows, tokens.allows), (Some(false), Some(false)));
        assert_eq!(explanation.refusal, models.refusal, "the first that refuses");
        let row = tokens.row(NOW);
        assert_eq!(row, ["tokens_per_day", "at most 1000", "700", "200", "100", "1h 46m", "refuses"]);
        let refusal = tokens.refusal.as_deref().expect("why");
        assert!(refusal.contains("700 are used") && refusal.contains("up to 101"), "{refusal}");
    }

    #[test]
    fn without_an_orchestrator_only_what_never_fits_is_decided() {
        let limited = |limit| TenantPolicy { tokens_per_day: Some(limit), ..TenantPolicy::default() };
        let ask = |policy: &TenantPolicy, tokens| explained(policy, &[], "a", tokens);
        let explanation = ask(&limited(100), 100);
        assert_eq!((explanation.outcome, explanation.rules[0].allows), (Prospect::Undecided, None));
        assert!(explanation.text().contains("cannot be decided"), "{}", explanation.text());
        assert_eq!(ask(&limited(100), 101).outcome, Prospect::Refused);
        let none = ask(&limited(0), 1);
        assert_eq!(none.refusal.as_deref(), Some("the tenant's policy allows no tokens per day (UTC)"));
        let none = TenantPolicy { requests_per_minute: Some(0), ..TenantPolicy::default() };
        assert_eq!(ask(&none, 1).outcome, Prospect::Refused);
        assert_eq!(ask(&TenantPolicy::default(), 1).outcome, Prospect::Admitted, "nothing is limited");
    }

    #[test]
    fn the_refusal_is_the_one_that_a_client_would_get() {
        let policy = TenantPolicy {
            requests_per_minute: Some(1),
            requests_per_day: Some(10),
            tokens_per_minute: Some(100),
            tokens_per_day: Some(1_000),
            concurrent_jobs: Some(1),
            allowed_models: Some(vec!["a".parse().expect("a name")]),
            ..TenantPolicy::default()
        };
        let free = RULES.map(|rule| used(rule, 0, 0));
        let full = |rules: &[QuotaRule]| {
            let fill = |state: QuotaState| if rules.contains(&state.rule) { used(state.rule, 1_000, 0) } else { state };
            free.map(fill)
        };
        let refusal = |states: &[QuotaState], model, tokens| {
            explained(&policy, states, model, tokens).refusal.unwrap_or_default()
        };
        let cases = [
            (vec![], "b", 1, "the model b"),
            (vec![QuotaRule::RequestsPerMinute], "b", 1, "1 requests per minute"),
            (vec![QuotaRule::TokensPerDay, QuotaRule::ConcurrentJobs], "a", 1, "1 jobs at the same time"),
            (vec![QuotaRule::TokensPerMinute, QuotaRule::TokensPerDay], "a", 1, "1000 tokens per day"),
            (vec![QuotaRule::TokensPerDay], "a", 101, "1000 tokens per day"),
            (vec![], "a", 101, "100 tokens per minute; set a lower max_tokens"),
        ];
        for (rules, model, tokens, expected) in cases {
            let refusal = refusal(&full(&rules), model, tokens);
            assert!(refusal.contains(expected), "{rules:?} {model} {tokens}: {refusal}");
        }
        assert_eq!(refusal(&free, "a", 100), "");
    }
}

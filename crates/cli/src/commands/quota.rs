//! `tether quota`: what tenants use of their quotas, what is left, and when it resets.

use protocol::quota::{QuotaList, QuotaState, in_words};
use protocol::{Clock as _, PublicKey, TenantId, UnixMillis};
use rpc::SystemClock;

use super::jobs::{client, note_silent};
use super::{Context, Outcome};
use crate::args::QuotaArgs;
use crate::output;

pub(super) async fn show(context: Context, args: &QuotaArgs) -> anyhow::Result<Outcome> {
    let tenant = args.tenant.as_ref().map(|tenant| format!("?tenant={tenant}")).unwrap_or_default();
    let list: QuotaList = client(&context, &args.server)?.get(&format!("/admin/v1/quotas{tenant}")).await?;
    if context.json {
        output::json(&list)?;
        return Ok(Outcome::Well);
    }
    let rows = rows(&list, SystemClock.now());
    if rows.is_empty() {
        output::line("no tenant has used anything today");
    } else {
        output::table(&["TENANT", "RULE", "LIMIT", "SPENT", "RESERVED", "LEFT", "RESETS IN", "COUNTED BY"], &rows);
    }
    if list.orchestrators.iter().any(|counted| counted.incomplete) {
        output::note("tenants are missing from this list; `tether quota TENANT` shows one");
    }
    note_silent(&list.silent);
    Ok(Outcome::Well)
}

/// Returns a row for each rule of each tenant. Orchestrators are named only if there are several.
fn rows(list: &QuotaList, now: UnixMillis) -> Vec<Vec<String>> {
    let is_one = list.orchestrators.len() == 1;
    let by = |orchestrator: PublicKey| if is_one { String::new() } else { orchestrator.short() };
    let of_tenant = |tenant: &TenantId, by: &str, states: &[QuotaState]| -> Vec<Vec<String>> {
        states.iter().map(|state| row(tenant, by, state, now)).collect()
    };
    let counted = list.orchestrators.iter().flat_map(|counted| {
        let by = by(counted.orchestrator);
        counted.tenants.iter().flat_map(move |tenant| of_tenant(&tenant.tenant_id, &by, &tenant.quotas))
    });
    counted.collect()
}

fn row(tenant: &TenantId, by: &str, state: &QuotaState, now: UnixMillis) -> Vec<String> {
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    vec![
        tenant.to_string(),
        state.rule.as_str().to_owned(),
        number(state.limit),
        state.spent.to_string(),
        state.reserved.to_string(),
        number(state.left()),
        state.resets_at.map_or_else(|| "-".to_owned(), |end| in_words(end.since(now))),
        by.to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use protocol::quota::{OrchestratorQuotas, QuotaRule, TenantQuota};

    use super::*;

    fn counted(number: u8) -> OrchestratorQuotas {
        let state = |rule, limit, resets_at| QuotaState { rule, limit, spent: 10, reserved: 5, resets_at };
        let quotas = vec![
            state(QuotaRule::TokensPerDay, Some(100), Some(UnixMillis(61_000))),
            state(QuotaRule::ConcurrentJobs, None, None),
        ];
        let tenants = vec![TenantQuota { tenant_id: "acme".parse().expect("a tenant"), quotas }];
        OrchestratorQuotas { orchestrator: PublicKey([number; 32]), tenants, incomplete: false }
    }

    #[test]
    fn each_rule_shows_what_is_left_and_when_it_resets() {
        let mut list = QuotaList { orchestrators: vec![counted(0xaa)], silent: vec![] };
        let shown = rows(&list, UnixMillis(1_000));
        assert_eq!(shown[0], ["acme", "tokens_per_day", "100", "10", "5", "85", "1m 0s", ""]);
        assert_eq!(shown[1], ["acme", "concurrent_jobs", "-", "10", "5", "-", "-", ""]);
        list.orchestrators.push(counted(0xbb));
        let shown = rows(&list, UnixMillis(1_000));
        assert_eq!((shown[0][7].as_str(), shown[2][7].as_str()), ("aaaaaaaa", "bbbbbbbb"));
    }
}

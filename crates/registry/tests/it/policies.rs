//! Policies that operators set.

use protocol::ErrorCode;
use protocol::control::{OPERATOR_POLICY_GET, OPERATOR_POLICY_SET, PolicyRequest};
use protocol::policy::{DegradePolicy, PolicySaved, PolicySet, TenantPolicy};
use rpc::CallError;
use tether_registry::policies;

use crate::{tenant, test};

#[tokio::test]
async fn a_policy_that_was_set_applies_and_is_listed() {
    let test = test().await;
    let policy = TenantPolicy { tokens_per_day: Some(7), weight: Some(2), ..TenantPolicy::default() };
    let set = PolicySet { tenant_id: tenant(), policy: policy.clone() };
    let saved: PolicySaved = test.operate(OPERATOR_POLICY_SET, &set).await.expect("set");
    assert_eq!((saved.policy, saved.warnings), (policy.clone(), vec![]));
    let request = PolicyRequest { tenant_id: tenant() };
    assert_eq!(test.operate(OPERATOR_POLICY_GET, &request).await, Ok(policy.clone()));
    assert_eq!(policies::list(&*test.store).await.expect("listed").policies[0].policy, policy);

    let none = PolicySet { tenant_id: tenant(), policy: TenantPolicy::default() };
    test.operate::<PolicySaved>(OPERATOR_POLICY_SET, &none).await.expect("set");
    assert!(
        policies::list(&*test.store).await.expect("listed").policies.is_empty(),
        "a policy without rules is not listed"
    );
}

#[tokio::test]
async fn a_policy_that_cannot_apply_is_refused_and_a_doubtful_one_is_warned_of() {
    let test = test().await;
    let set = |policy| PolicySet { tenant_id: tenant(), policy };
    let weightless = TenantPolicy { weight: Some(0), ..TenantPolicy::default() };
    let refused = test.operate::<PolicySaved>(OPERATOR_POLICY_SET, &set(weightless)).await.expect_err("no weight");
    assert!(matches!(&refused, CallError::Remote(error) if error.code == ErrorCode::InvalidValue), "{refused}");

    let name = |name: &str| name.parse().expect("a model's name");
    let degrade = DegradePolicy { models: vec![name("small")], ..DegradePolicy::default() };
    let doubtful = TenantPolicy {
        concurrent_jobs: Some(0),
        allowed_models: Some(vec![name("gone")]),
        degrade: Some(degrade),
        ..TenantPolicy::default()
    };
    let saved: PolicySaved = test.operate(OPERATOR_POLICY_SET, &set(doubtful)).await.expect("set");
    for (warning, part) in saved.warnings.iter().zip(["concurrent_jobs is 0", "called gone", "called small"]) {
        assert!(warning.contains(part), "{warning}");
    }
    assert_eq!(saved.warnings.len(), 3);
}

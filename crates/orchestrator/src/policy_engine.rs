//! Decides for each job what its tenant may do. Policies come from the registry; changes apply within seconds.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use protocol::model::ModelKey;
use protocol::policy::TenantPolicy;
use protocol::quota::QuotaRule;
use protocol::{ErrorCode, TenantId, WireError};
use quick_cache::unsync::Cache;
use rpc::rate_limit::{Quota, RateLimit};
use tokio::time::Instant;

/// Maximum number of tenants whose policies are cached.
const TENANTS_MAX: usize = 10_000;

/// Source of tenants' policies.
#[async_trait]
pub trait PolicySource: Send + Sync {
    async fn policy(&self, tenant_id: &TenantId) -> Result<TenantPolicy, WireError>;

    /// Returns whether the registries are known to be unreachable, so that callers need not wait for one.
    fn is_away(&self) -> bool;
}

/// Decides what tenants may do.
pub struct PolicyEngine {
    source: Arc<dyn PolicySource>,
    fresh: Duration,
    absence_max: Duration,
    tenants: Mutex<Cache<TenantId, Tenant>>,
    requests: RateLimit<TenantId>,
}

struct Tenant {
    policy: Arc<TenantPolicy>,
    read_at: Instant,
}

impl PolicyEngine {
    /// Makes an engine that caches policies for `fresh`, or for up to `absence_max` while no registry responds.
    pub fn new(source: Arc<dyn PolicySource>, fresh: Duration, absence_max: Duration) -> Self {
        Self { source, fresh, absence_max, tenants: Mutex::new(Cache::new(TENANTS_MAX)), requests: RateLimit::new() }
    }

    /// Admits a job if its tenant may use at least one of these models and is within its rate limit; otherwise returns
    /// the rule that forbids it. An admitted job counts towards the limit. Returns the policy that was applied.
    pub async fn admit<'a>(
        &self,
        tenant_id: &TenantId,
        models: impl Iterator<Item = &'a ModelKey> + Clone,
    ) -> Result<Arc<TenantPolicy>, WireError> {
        let policy = self.policy(tenant_id).await?;
        check_models(&policy, models)?;
        if let Some(limit) = policy.requests_per_minute {
            self.count(tenant_id, limit)?;
        }
        Ok(policy)
    }

    /// Returns a tenant's policy, which is as old as the cache allows.
    pub(crate) async fn policy(&self, tenant_id: &TenantId) -> Result<Arc<TenantPolicy>, WireError> {
        self.refresh(tenant_id).await?;
        self.cached(tenant_id)
            .ok_or_else(|| WireError::new(ErrorCode::Unavailable, "the tenant's policy is not available, try again"))
    }

    /// Returns how many requests a tenant may make at once, without counting one.
    pub(crate) fn requests_left(&self, tenant_id: &TenantId, limit: u32) -> u32 {
        let next = self.requests.look(tenant_id, Quota { burst: limit, per_minute: limit });
        next.remaining.saturating_add(next.allowed.into()).min(limit)
    }

    /// Returns a tenant's cached policy, however old.
    fn cached(&self, tenant_id: &TenantId) -> Option<Arc<TenantPolicy>> {
        self.tenants.lock().get(tenant_id).map(|tenant| tenant.policy.clone())
    }

    /// Counts a request. The burst is a whole minute's requests: no gateway allows a larger one, so a client that obeys
    /// its gateway's limit is not refused here.
    fn count(&self, tenant_id: &TenantId, limit: u32) -> Result<(), WireError> {
        let verdict = self.requests.take(tenant_id.clone(), Quota { burst: limit, per_minute: limit });
        if verdict.allowed {
            return Ok(());
        }
        let error = if limit == 0 {
            WireError::new(ErrorCode::InsufficientQuota, "the tenant's policy allows no requests per minute")
        } else {
            let message = format!("the tenant may make {limit} requests a minute");
            WireError::new(ErrorCode::RateLimitExceeded, message).with_retry_after(verdict.retry_after)
        };
        Err(error.with_param(QuotaRule::RequestsPerMinute.as_str()))
    }

    async fn refresh(&self, tenant_id: &TenantId) -> Result<(), WireError> {
        let age = {
            let tenants = self.tenants.lock();
            tenants.get(tenant_id).map(|tenant| tenant.read_at.elapsed())
        };
        let may_stand = age.is_some_and(|age| age < self.absence_max);
        if age.is_some_and(|age| age < self.fresh) || may_stand && self.source.is_away() {
            return Ok(());
        }
        match self.source.policy(tenant_id).await {
            Ok(policy) => {
                self.remember(tenant_id, policy);
                Ok(())
            }
            // A slightly old policy is better than a service that stops with its registry. A refusal comes from a
            // registry that is reachable, so it is passed on.
            Err(error) if may_stand && error.code == ErrorCode::Unavailable => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn remember(&self, tenant_id: &TenantId, policy: TenantPolicy) {
        let mut tenants = self.tenants.lock();
        let known = tenants.get(tenant_id).map(|tenant| &tenant.policy);
        let policy = known.filter(|known| ***known == policy).cloned().unwrap_or_else(|| Arc::new(policy));
        tenants.insert(tenant_id.clone(), Tenant { policy, read_at: Instant::now() });
    }
}

/// Refuses a job if the policy allows none of its models.
fn check_models<'a>(
    policy: &TenantPolicy,
    mut models: impl Iterator<Item = &'a ModelKey> + Clone,
) -> Result<(), WireError> {
    if models.clone().any(|model| policy.allows(&model.model_id)) {
        return Ok(());
    }
    let first = models.next().map(|model| model.model_id.as_str()).unwrap_or_default();
    let message = format!("the tenant's policy does not allow the model {first}");
    Err(WireError::new(ErrorCode::ModelNotAllowed, message).with_param("model"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time;

    struct Fixed(Mutex<Result<TenantPolicy, WireError>>);

    #[async_trait]
    impl PolicySource for Fixed {
        async fn policy(&self, _: &TenantId) -> Result<TenantPolicy, WireError> {
            self.0.lock().clone()
        }

        fn is_away(&self) -> bool {
            false
        }
    }

    fn engine(policy: TenantPolicy) -> (PolicyEngine, Arc<Fixed>) {
        let source = Arc::new(Fixed(Mutex::new(Ok(policy))));
        (PolicyEngine::new(source.clone(), Duration::from_secs(5), Duration::from_mins(10)), source)
    }

    /// Requests one model, or any of several separated by spaces.
    async fn admit(engine: &PolicyEngine, models: &str) -> Result<(), WireError> {
        let version = "1.0".parse().expect("a version");
        let key = |name: &str| ModelKey { model_id: name.parse().expect("a name"), version };
        let models: Vec<ModelKey> = models.split(' ').map(key).collect();
        engine.admit(&"acme".parse().expect("a tenant"), models.iter()).await.map(|_| ())
    }

    fn limit(requests_per_minute: u32) -> TenantPolicy {
        TenantPolicy { requests_per_minute: Some(requests_per_minute), ..TenantPolicy::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn only_allowed_models_pass() {
        let allowed = Some(vec!["tether-tiny".parse().expect("name")]);
        let (engine, _) = engine(TenantPolicy { allowed_models: allowed, ..TenantPolicy::default() });
        assert_eq!(admit(&engine, "tether-tiny").await, Ok(()));
        assert_eq!(admit(&engine, "llama3.1-8b tether-tiny").await, Ok(()), "one of them");
        let refused = admit(&engine, "llama3.1-8b").await.expect_err("not on the list");
        assert_eq!(refused.code, ErrorCode::ModelNotAllowed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_minutes_requests_pass_at_once_and_then_the_pace_holds() {
        let (engine, _) = engine(limit(3));
        let mut passed = vec![];
        for second in 0..120u64 {
            while admit(&engine, "m").await.is_ok() {
                passed.push(second);
            }
            time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(passed, [0, 0, 0, 20, 40, 60, 80, 100]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_model_does_not_count_towards_the_limit() {
        let allowed_models = Some(vec!["tether-tiny".parse().expect("name")]);
        let (engine, _) = engine(TenantPolicy { allowed_models, ..limit(1) });
        assert_eq!(admit(&engine, "llama3.1-8b").await.expect_err("not on the list").code, ErrorCode::ModelNotAllowed);
        admit(&engine, "tether-tiny").await.expect("the first of this minute");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_as_told_is_let_in() {
        let (engine, _) = engine(limit(1));
        admit(&engine, "m").await.expect("the first");
        time::advance(Duration::from_secs(20)).await;
        let refused = admit(&engine, "m").await.expect_err("the second");
        assert_eq!(refused.retry_after_ms, Some(40_000));
        time::advance(Duration::from_secs(40)).await;
        admit(&engine, "m").await.expect("after the wait");
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_rule_applies_when_the_cached_one_is_old() {
        let (engine, source) = engine(TenantPolicy::default());
        admit(&engine, "m").await.expect("all is allowed");
        *source.0.lock() = Ok(TenantPolicy { allowed_models: Some(vec![]), ..TenantPolicy::default() });
        time::advance(Duration::from_secs(5)).await;
        assert!(admit(&engine, "m").await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn rules_outlive_a_silent_registry_for_ten_minutes() {
        let (engine, source) = engine(TenantPolicy::default());
        admit(&engine, "m").await.expect("all is allowed");
        *source.0.lock() = Err(WireError::new(ErrorCode::Unavailable, "gone"));
        time::advance(Duration::from_secs(599)).await;
        admit(&engine, "m").await.expect("known rules go on");
        time::advance(Duration::from_secs(2)).await;
        assert_eq!(admit(&engine, "m").await.expect_err("too old").code, ErrorCode::Unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn a_registry_that_refuses_to_tell_rules_is_not_silent() {
        let (engine, source) = engine(TenantPolicy::default());
        admit(&engine, "m").await.expect("all is allowed");
        *source.0.lock() = Err(WireError::new(ErrorCode::NodeRevoked, "expelled"));
        time::advance(Duration::from_secs(6)).await;
        assert_eq!(admit(&engine, "m").await.expect_err("refused").code, ErrorCode::NodeRevoked);
    }
}

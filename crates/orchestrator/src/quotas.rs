//! Applies tenants' quotas: what a job may use at most, whether that fits, and what is left.
//!
//! The store decides, in the transaction that writes a job's reservation. A job that cannot fit is refused before that,
//! so that it does not wait for a worker first.

use std::collections::HashMap;
use std::future::ready;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use metadata_store::JobStore;
use parking_lot::Mutex;
use protocol::policy::TenantPolicy;
use protocol::quota::{
    QuotaLimits, QuotaPage, QuotaQuery, QuotaRefusal, QuotaRule, QuotaState, QuotaUsage, TENANTS_MAX, TenantQuota,
};
use protocol::{Clock, ErrorCode, TenantId, WireError, WorkerId, codec};
use rpc::Caller;
use tracing::warn;

use crate::bounds::Bounds;
use crate::dispatch::Delivery;
use crate::journey::Journey;
use crate::orchestrator::Orchestrator;
use crate::refusals;

/// How many tenants' quotas are read at the same time for a list.
const QUOTAS_AT_ONCE: usize = 16;

/// What a job takes of its tenant's quotas on a worker.
#[derive(Debug, Clone, Copy, Default)]
pub struct Claim {
    pub limits: QuotaLimits,
    /// The most tokens, of prompt and answers, that it can be billed.
    pub tokens: u64,
    /// The most tokens of each answer, if the request sets none and its tenant's tokens are limited.
    pub answer_tokens: Option<u32>,
}

/// The quotas of tenants.
pub(crate) struct Quotas {
    store: Arc<dyn JobStore>,
    clock: Arc<dyn Clock>,
    jobs: Arc<TenantJobs>,
}

/// Counts each tenant's jobs, from their admission to their end.
#[derive(Default)]
struct TenantJobs(Mutex<HashMap<TenantId, u32>>);

/// A job among those of its tenant, until dropped.
pub struct JobPermit {
    jobs: Arc<TenantJobs>,
    tenant_id: TenantId,
}

impl TenantJobs {
    /// Adds a job, or returns how many there are if `limit` does not allow another.
    fn enter(self: &Arc<Self>, tenant_id: &TenantId, limit: Option<u32>) -> Result<JobPermit, u32> {
        let mut jobs = self.0.lock();
        let count = jobs.get(tenant_id).copied().unwrap_or_default();
        if limit.is_some_and(|limit| count >= limit) {
            return Err(count);
        }
        jobs.insert(tenant_id.clone(), count + 1);
        Ok(JobPermit { jobs: self.clone(), tenant_id: tenant_id.clone() })
    }

    fn count(&self, tenant_id: &TenantId) -> u32 {
        self.0.lock().get(tenant_id).copied().unwrap_or_default()
    }
}

impl Drop for JobPermit {
    fn drop(&mut self) {
        let mut jobs = self.jobs.0.lock();
        if let Some(count) = jobs.get_mut(&self.tenant_id) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                jobs.remove(&self.tenant_id);
            }
        }
    }
}

impl Quotas {
    pub(crate) fn new(store: Arc<dyn JobStore>, clock: Arc<dyn Clock>) -> Self {
        Self { store, clock, jobs: Arc::default() }
    }

    /// Admits a job, unless its tenant has as many jobs as it may have or has used up a quota.
    pub(crate) async fn admit(&self, tenant_id: &TenantId, policy: &TenantPolicy) -> Result<JobPermit, WireError> {
        let limits = QuotaLimits::of(policy);
        let now = self.clock.now();
        let permit = self.jobs.enter(tenant_id, limits.concurrent_jobs).map_err(|count| {
            let usage = QuotaUsage { jobs: count, ..QuotaUsage::default() };
            let [.., state] = usage.states(&limits, now);
            QuotaRefusal { state, wanted: 1 }.error(now)
        })?;
        // The jobs at the same time were counted just now, with those that have no reservation yet.
        let limits = QuotaLimits { concurrent_jobs: None, ..limits };
        if !limits.is_empty() {
            let usage = self.usage(tenant_id).await?;
            usage.check(&limits, 1, now).map_err(|refusal| refusal.error(now))?;
        }
        Ok(permit)
    }

    async fn usage(&self, tenant_id: &TenantId) -> Result<QuotaUsage, WireError> {
        let usage = self.store.quota_usage(tenant_id, self.clock.now()).await.map_err(|error| {
            warn!(%error, "could not read a tenant's quotas");
            WireError::new(ErrorCode::Unavailable, "quotas cannot be read now, try again")
        })?;
        // Those that wait have no reservation yet.
        Ok(QuotaUsage { jobs: usage.jobs.max(self.jobs.count(tenant_id)), ..usage })
    }

    /// Returns the state of each rule that the store counts.
    async fn states(&self, tenant_id: &TenantId, policy: &TenantPolicy) -> Result<[QuotaState; 4], WireError> {
        Ok(self.usage(tenant_id).await?.states(&QuotaLimits::of(policy), self.clock.now()))
    }
}

impl Orchestrator {
    /// Fails if the tenant's jobs may run in none of the regions whose workers this orchestrator uses.
    pub(crate) fn check_residency(&self, policy: &TenantPolicy) -> Result<(), WireError> {
        let Some(allowed) = &policy.allowed_regions else { return Ok(()) };
        let mut used = std::iter::once(&self.region).chain(&self.config.near_regions);
        if used.any(|region| allowed.contains(region)) { Ok(()) } else { Err(refusals::residency(allowed)) }
    }

    /// Returns what a job takes of its tenant's quotas if a worker runs it.
    pub(crate) fn claim(&self, journey: &mut Journey, worker_id: WorkerId) -> Claim {
        let context_length = self.fleet.context_length(worker_id, journey.model());
        // A part of the answer that was delivered makes the request longer, and the prompt stays the same.
        let first = journey
            .request_bytes
            .is_none()
            .then(|| Bytes::from(codec::encode(&*journey.limited_to(self.answer_tokens(journey, context_length)))));
        journey.request_bytes = journey.request_bytes.or(first.as_ref().map(Bytes::len));
        journey.encoded = first.map(|body| (journey.request.attempt, body));
        self.claim_within(journey, context_length)
    }

    /// Returns what a job takes of its tenant's quotas if a worker with such a context runs it.
    fn claim_within(&self, journey: &Journey, context_length: u32) -> Claim {
        let answer_tokens = self.answer_tokens(journey, context_length);
        let (input, request_bytes) = (&journey.request.input, journey.request_bytes.unwrap_or_default());
        let bounds = Bounds::limited(input, answer_tokens.or(input.max_tokens), request_bytes, context_length);
        Claim { limits: QuotaLimits::of(&journey.policy), tokens: bounds.tokens(), answer_tokens }
    }

    /// Returns the most tokens of each answer, if the request sets none and its tenant's tokens are limited.
    fn answer_tokens(&self, journey: &Journey, context_length: u32) -> Option<u32> {
        let input = &journey.request.input;
        let is_open = input.max_tokens.is_none() && input.embed.is_none() && !input.count_only;
        let most = self.config.quota_answer_tokens.max(1);
        let is_long = context_length == 0 || context_length > most;
        (QuotaLimits::of(&journey.policy).limits_tokens() && is_open && is_long).then_some(most)
    }

    /// Returns whether a job could cost as much with such a context as its tenant's quotas did not allow elsewhere.
    pub(crate) fn is_over_quota(&self, journey: &Journey, context_length: u32) -> bool {
        let refused = journey.tokens_refused;
        refused.is_some_and(|refused| self.claim_within(journey, context_length).tokens >= refused)
    }

    /// Rules out the workers on which a job could cost as much as where a quota of tokens did not allow it. Returns
    /// false if the job failed for another reason.
    pub(crate) fn costs_too_much(&self, journey: &mut Journey, refusal: &WireError) -> bool {
        let is_of_tokens = refusal.quota.as_ref().is_some_and(|quota| quota.rule.is_of_tokens());
        let worker = journey.last_worker().filter(|_| is_of_tokens && !journey.is_dispatched);
        let Some(worker) = worker else { return false };
        let context_length = self.fleet.context_length(worker, journey.model());
        let Claim { tokens, .. } = self.claim_within(journey, context_length);
        journey.refuse_tokens(tokens);
        true
    }

    /// Has the caller told what is left of its tenant's tokens, if they are limited.
    pub(crate) async fn tell_quota(&self, journey: &Journey, delivery: &mut Delivery) {
        if !journey.wants_progress || !QuotaLimits::of(&journey.policy).limits_tokens() {
            return;
        }
        let request = &journey.request;
        if let Ok(states) = self.quotas.states(&request.tenant_id, &journey.policy).await
            && let Some(tightest) = QuotaState::tightest_of_tokens(&states)
        {
            delivery.tell_quota(request.correlation_id, tightest);
        }
    }

    /// Lists the quotas of one tenant, or of all that have used something today.
    pub(crate) async fn list_quotas(self: Arc<Self>, _: Caller, query: QuotaQuery) -> Result<QuotaPage, WireError> {
        if let Some(tenant) = query.tenant_id {
            return Ok(QuotaPage { tenants: vec![self.quota(tenant).await?], incomplete: false });
        }
        let listed = self.quotas.store.quota_tenants(self.quotas.clock.now(), TENANTS_MAX + 1).await;
        let mut tenants = listed.map_err(|error| {
            warn!(%error, "could not read the tenants that have used something");
            WireError::new(ErrorCode::Unavailable, "quotas cannot be read now, try again")
        })?;
        let count = tenants.len();
        tenants.truncate(TENANTS_MAX as usize);
        let read = stream::iter(tenants).map(|tenant| self.quota(tenant)).buffered(QUOTAS_AT_ONCE);
        let tenants: Vec<TenantQuota> = read.filter_map(|quota| ready(quota.ok())).collect().await;
        Ok(QuotaPage { incomplete: tenants.len() < count, tenants })
    }

    /// Returns the quotas of one tenant. Fails if its policy or its quotas cannot be read.
    async fn quota(&self, tenant_id: TenantId) -> Result<TenantQuota, WireError> {
        let policy = self.policies.policy(&tenant_id).await?;
        let mut quotas = vec![self.rate(&tenant_id, &policy)];
        quotas.extend(self.quotas.states(&tenant_id, &policy).await?);
        Ok(TenantQuota { tenant_id, quotas })
    }

    /// Returns the state of a tenant's request rate.
    fn rate(&self, tenant_id: &TenantId, policy: &TenantPolicy) -> QuotaState {
        let spent = policy.requests_per_minute.map_or(0, |limit| limit - self.policies.requests_left(tenant_id, limit));
        QuotaState {
            rule: QuotaRule::RequestsPerMinute,
            limit: policy.requests_per_minute.map(u64::from),
            spent: spent.into(),
            reserved: 0,
            resets_at: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenants_jobs_are_counted_until_they_end() {
        let jobs = Arc::new(TenantJobs::default());
        let tenant = |name: &str| name.parse::<TenantId>().expect("a tenant");
        let enter = |name: &str| jobs.enter(&tenant(name), Some(2));
        let first = enter("acme").map_err(|_| ()).expect("none yet");
        let _second = enter("acme").map_err(|_| ()).expect("one");
        assert_eq!(enter("acme").err(), Some(2));
        let _other = enter("other").map_err(|_| ()).expect("tenants do not count for each other");
        drop(first);
        let third = enter("acme").map_err(|_| ()).expect("one has ended");
        drop(third);
        assert_eq!((jobs.count(&tenant("acme")), jobs.enter(&tenant("x"), Some(0)).err()), (1, Some(0)));
        assert_eq!(jobs.0.lock().len(), 2, "nothing is kept of tenants without jobs");
    }
}

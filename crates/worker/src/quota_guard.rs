//! Decides whether a job is admitted: a slot or a position in the queue must be free, and the job must not exceed its
//! tenant's limits. A job takes one permit for each of its answers that may run concurrently, at most as many as
//! slots.
//!
//! Orchestrators decide which tenant's job is next. This guard only keeps the mistake of one of them, or its ignorance
//! of what the others send, from filling the worker with one tenant's jobs. One tenant may have all slots while nobody
//! else wants them, and a share of the queue: the rest of the queue stays free for other tenants.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use protocol::infer::{EmbedInput, Input};
use protocol::{ErrorCode, TenantId, WireError};
use tokio::sync::watch;

use crate::config::Config;

/// How long a refused caller should avoid this worker.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How many jobs a worker takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobLimits {
    /// The most jobs that run.
    pub slots: u32,
    /// The most jobs that wait.
    pub queue_max: u32,
    /// The most jobs of one tenant, running and waiting; `None` for no limit.
    pub tenant_jobs_max: Option<u32>,
    /// The most tokens that the jobs of one tenant may need together; `None` for no limit.
    pub tenant_tokens_max: Option<u64>,
}

impl JobLimits {
    /// Returns the limits that a worker's settings set.
    pub fn of(config: &Config) -> Self {
        let Config { slots, queue_max, tenant_jobs_max, quota, .. } = config;
        let share = u64::from(*queue_max) * u64::from(quota.tenant_queue_percent.min(100));
        let share = slots.saturating_add(share.div_ceil(100) as u32);
        Self {
            slots: *slots,
            queue_max: *queue_max,
            tenant_jobs_max: Some(tenant_jobs_max.map_or(share, |most| most.min(share))),
            tenant_tokens_max: quota.tenant_tokens_max,
        }
    }
}

/// What a job needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Answers that may run concurrently, at most as many as slots.
    pub permits: u32,
    /// Tokens of its prompt and its answers, estimated.
    pub tokens: u64,
}

/// Bytes of text for each token of a prompt, on average.
const BYTES_PER_TOKEN: usize = 4;
/// Tokens of an answer whose request sets no limit, for a model whose context length is unknown.
const ANSWER_TOKENS: u32 = 4_096;

impl Demand {
    /// Estimates what a job needs. `context_length` is the model's, in tokens; 0 if unknown.
    pub fn of(input: &Input, context_length: u32) -> Self {
        let of_embed = |text: &EmbedInput| match text {
            EmbedInput::Text(text) => text.len() / BYTES_PER_TOKEN,
            EmbedInput::Tokens(tokens) => tokens.len(),
        };
        let of_text = |text: &str| text.len() / BYTES_PER_TOKEN;
        let messages = input.messages.iter().flatten().map(|message| of_text(&message.content));
        let texts = input.embed.iter().chain(&input.prompts).flatten().map(of_embed);
        let prompt = input.prompt.as_deref().map(of_text).into_iter();
        let tokens = input.prompt_tokens.as_ref().map(Vec::len).into_iter();
        let query = input.query.as_deref().map_or(0, of_text).saturating_mul(input.embed.as_ref().map_or(0, Vec::len));
        let prompt: usize = messages.chain(texts).chain(prompt).chain(tokens).chain([query]).sum();
        let longest = if context_length == 0 { ANSWER_TOKENS } else { context_length };
        let has_answer = input.embed.is_none() && !input.count_only;
        let answer = if has_answer { input.max_tokens.unwrap_or(longest).min(longest) } else { 0 };
        let answers = input.answers();
        Self { permits: answers, tokens: prompt as u64 + u64::from(answer) * u64::from(answers) }
    }
}

/// The jobs of a worker, without the one to decide on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// All jobs, running and waiting.
    pub jobs: u32,
    /// The jobs of the same tenant.
    pub tenant_jobs: u32,
    /// The tokens that these need.
    pub tenant_tokens: u64,
}

/// Why a job is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// All slots are taken and the queue is full.
    #[error("the worker is full, try another")]
    QueueFull,
    /// The tenant has as many jobs here as one tenant may have.
    #[error("the tenant has its share of this worker, try another")]
    TenantShare,
    /// The tenant's jobs need as many tokens here as those of one tenant may.
    #[error("the tenant's jobs need too many tokens of this worker, try another")]
    TenantTokens,
}

impl From<Refusal> for WireError {
    fn from(refusal: Refusal) -> Self {
        Self::new(ErrorCode::WorkerFull, refusal.to_string()).with_retry_after(RETRY_AFTER)
    }
}

/// Decides whether a job is admitted.
pub fn admit(limits: &JobLimits, occupancy: Occupancy, demand: Demand) -> Result<(), Refusal> {
    let Demand { permits, tokens } = demand;
    if occupancy.jobs.saturating_add(permits) > limits.slots.saturating_add(limits.queue_max) {
        return Err(Refusal::QueueFull);
    }
    if limits.tenant_jobs_max.is_some_and(|most| occupancy.tenant_jobs.saturating_add(permits) > most) {
        return Err(Refusal::TenantShare);
    }
    // A job that alone needs more is admitted if its tenant has no other: there may be no worker that allows more.
    let is_over = |most: u64| occupancy.tenant_jobs > 0 && occupancy.tenant_tokens.saturating_add(tokens) > most;
    if limits.tenant_tokens_max.is_some_and(is_over) {
        return Err(Refusal::TenantTokens);
    }
    Ok(())
}

/// Counts the admitted jobs.
#[derive(Debug)]
pub(crate) struct QuotaGuard {
    limits: JobLimits,
    jobs: Mutex<Jobs>,
    changes: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Jobs {
    count: u32,
    /// The permits and the tokens of each tenant that has a job here.
    by_tenant: HashMap<TenantId, (u32, u64)>,
}

impl QuotaGuard {
    pub(crate) fn new(limits: JobLimits, changes: watch::Sender<()>) -> Arc<Self> {
        Arc::new(Self { limits, jobs: Mutex::default(), changes })
    }

    pub(crate) fn limits(&self) -> JobLimits {
        self.limits
    }

    /// Takes permits for a tenant's job, one for each of its answers that may run concurrently, or returns why it is
    /// refused.
    pub(crate) fn enter(self: &Arc<Self>, tenant: &TenantId, demand: Demand) -> Result<QuotaPermit, Refusal> {
        let demand = Demand { permits: demand.permits.min(self.limits.slots).max(1), ..demand };
        {
            let mut jobs = self.jobs();
            let (tenant_jobs, tenant_tokens) = jobs.by_tenant.get(tenant).copied().unwrap_or_default();
            admit(&self.limits, Occupancy { jobs: jobs.count, tenant_jobs, tenant_tokens }, demand)?;
            jobs.count += demand.permits;
            let held = (tenant_jobs + demand.permits, tenant_tokens.saturating_add(demand.tokens));
            jobs.by_tenant.insert(tenant.clone(), held);
        }
        self.changes.send_replace(());
        Ok(QuotaPermit { guard: self.clone(), tenant: tenant.clone(), demand })
    }

    /// Returns an error if not even the smallest job can be admitted.
    pub(crate) fn check_room(&self) -> Result<(), Refusal> {
        let demand = Demand { permits: 1, tokens: 0 };
        admit(&self.limits, Occupancy { jobs: self.count(), ..Occupancy::default() }, demand)
    }

    /// Returns how many permits are taken.
    pub(crate) fn count(&self) -> u32 {
        self.jobs().count
    }

    /// Waits until no job is left.
    pub(crate) async fn empty(&self) {
        let mut changes = self.changes.subscribe();
        while self.count() > 0 {
            // The sender lives as long as this guard.
            let _ = changes.changed().await;
        }
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock()
    }
}

/// A job's share of the worker's capacity, freed when dropped.
#[derive(Debug)]
pub(crate) struct QuotaPermit {
    guard: Arc<QuotaGuard>,
    tenant: TenantId,
    demand: Demand,
}

impl Drop for QuotaPermit {
    fn drop(&mut self) {
        {
            let mut jobs = self.guard.jobs();
            jobs.count = jobs.count.saturating_sub(self.demand.permits);
            if let Some((permits, tokens)) = jobs.by_tenant.get_mut(&self.tenant) {
                *permits = permits.saturating_sub(self.demand.permits);
                *tokens = tokens.saturating_sub(self.demand.tokens);
                if *permits == 0 {
                    jobs.by_tenant.remove(&self.tenant);
                }
            }
        }
        self.guard.changes.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::QuotaConfig;

    const LIMITS: JobLimits = JobLimits { slots: 2, queue_max: 2, tenant_jobs_max: Some(3), tenant_tokens_max: None };

    fn jobs(count: u32) -> Demand {
        Demand { permits: count, tokens: 10 }
    }

    fn occupied(jobs: u32, tenant_jobs: u32) -> Occupancy {
        Occupancy { jobs, tenant_jobs, tenant_tokens: u64::from(tenant_jobs) * 10 }
    }

    fn guard() -> Arc<QuotaGuard> {
        QuotaGuard::new(LIMITS, watch::channel(()).0)
    }

    fn tenant(name: &str) -> TenantId {
        name.parse().expect("a tenant")
    }

    #[test]
    fn a_job_comes_in_until_slots_and_queue_are_taken() {
        for (jobs, expected) in [(0, Ok(())), (3, Ok(())), (4, Err(Refusal::QueueFull)), (9, Err(Refusal::QueueFull))] {
            assert_eq!(admit(&LIMITS, occupied(jobs, 0), self::jobs(1)), expected, "{jobs} jobs");
        }
    }

    #[test]
    fn a_tenant_gets_no_more_than_its_share() {
        assert_eq!(admit(&LIMITS, occupied(3, 2), jobs(1)), Ok(()));
        assert_eq!(admit(&LIMITS, occupied(3, 3), jobs(1)), Err(Refusal::TenantShare));
        let unlimited = JobLimits { tenant_jobs_max: None, ..LIMITS };
        assert_eq!(admit(&unlimited, occupied(3, 3), jobs(1)), Ok(()));
    }

    #[test]
    fn a_tenant_gets_all_slots_and_a_share_of_the_queue() {
        let with = |slots, queue_max, tenant_jobs_max, tenant_queue_percent| {
            let quota = QuotaConfig { tenant_queue_percent, ..QuotaConfig::default() };
            JobLimits::of(&Config { slots, queue_max, tenant_jobs_max, quota, ..Config::default() }).tenant_jobs_max
        };
        assert_eq!(with(4, 64, None, 75), Some(52));
        assert_eq!(with(4, 2, None, 75), Some(6), "a share is rounded up");
        assert_eq!(with(4, 64, Some(8), 75), Some(8));
        assert_eq!(with(4, 64, Some(60), 75), Some(52));
        assert_eq!((with(4, 64, None, 0), with(4, 64, None, 1_000)), (Some(4), Some(68)));
    }

    #[test]
    fn a_tenants_jobs_need_no_more_tokens_than_they_may() {
        let limits = JobLimits { tenant_tokens_max: Some(25), tenant_jobs_max: None, ..LIMITS };
        assert_eq!(admit(&limits, occupied(1, 1), Demand { permits: 1, tokens: 15 }), Ok(()));
        assert_eq!(admit(&limits, occupied(1, 1), Demand { permits: 1, tokens: 16 }), Err(Refusal::TenantTokens));
        assert_eq!(admit(&limits, occupied(1, 0), Demand { permits: 1, tokens: 99 }), Ok(()), "its only job");
        let guard = QuotaGuard::new(limits, watch::channel(()).0);
        let permits: Vec<_> = (0..2).map(|_| guard.enter(&tenant("a"), jobs(1)).expect("20 of 25")).collect();
        assert_eq!(guard.enter(&tenant("a"), jobs(1)).expect_err("30 of 25"), Refusal::TenantTokens);
        guard.enter(&tenant("b"), jobs(1)).expect("tenants do not count for each other");
        drop(permits);
        guard.enter(&tenant("a"), jobs(1)).expect("the tokens are free again");
    }

    #[test]
    fn what_a_job_needs_is_estimated_from_its_prompt_and_its_limit() {
        let input = |more: Input| Input { prompt: Some("x".repeat(40)), ..more };
        let tokens = |input: &Input, context| Demand::of(input, context).tokens;
        assert_eq!(tokens(&input(Input { max_tokens: Some(5), ..Input::default() }), 100), 15);
        assert_eq!(tokens(&input(Input { max_tokens: Some(500), ..Input::default() }), 100), 110);
        assert_eq!(tokens(&input(Input::default()), 100), 110);
        assert_eq!(tokens(&input(Input::default()), 0), 4_106);
        let embed = Input { embed: Some(vec![EmbedInput::Tokens(vec![1; 7])]), ..Input::default() };
        assert_eq!(tokens(&embed, 100), 7);
    }

    #[test]
    fn a_job_of_several_answers_takes_as_many_places() {
        let unlimited = JobLimits { tenant_jobs_max: None, ..LIMITS };
        let two = occupied(2, 2);
        assert_eq!(admit(&unlimited, two, jobs(2)), Ok(()));
        assert_eq!(admit(&unlimited, two, jobs(3)), Err(Refusal::QueueFull));
        assert_eq!(admit(&LIMITS, two, jobs(2)), Err(Refusal::TenantShare));
        let guard = guard();
        // Of three answers two run concurrently, in two slots.
        let permit = guard.enter(&tenant("a"), jobs(3)).expect("within its share");
        assert_eq!(
            (guard.count(), guard.enter(&tenant("a"), jobs(2)).expect_err("over it")),
            (2, Refusal::TenantShare)
        );
        drop(permit);
        assert_eq!(guard.count(), 0);
    }

    #[test]
    fn a_full_worker_says_so_before_it_speaks_of_shares() {
        assert_eq!(admit(&LIMITS, occupied(4, 4), jobs(1)), Err(Refusal::QueueFull));
    }

    #[test]
    fn a_place_given_back_can_be_taken_by_another() {
        let guard = guard();
        let permits: Vec<_> = (0..3).map(|_| guard.enter(&tenant("a"), jobs(1)).expect("within its share")).collect();
        assert_eq!(guard.enter(&tenant("a"), jobs(1)).expect_err("over its share"), Refusal::TenantShare);
        let other = guard.enter(&tenant("b"), jobs(1)).expect("there is room for others");
        assert_eq!(guard.enter(&tenant("c"), jobs(1)).expect_err("full"), Refusal::QueueFull);
        drop(permits);
        assert_eq!(guard.count(), 1);
        guard.enter(&tenant("a"), jobs(1)).expect("there is room again");
        drop(other);
        assert!(guard.jobs().by_tenant.is_empty());
    }

    #[tokio::test]
    async fn whoever_waits_for_the_last_job_is_woken() {
        let guard = guard();
        let permit = guard.enter(&tenant("a"), jobs(1)).expect("there is room");
        let (waited, ()) = tokio::join!(guard.empty(), async { drop(permit) });
        assert_eq!((waited, guard.count()), ((), 0));
    }
}

//! Decides whether a job is admitted: a slot or a position in the queue must be free, and the job must not exceed its
//! tenant's limit. A job takes one permit for each of its answers that may run concurrently, at most as many as
//! slots.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use protocol::{ErrorCode, TenantId, WireError};
use tokio::sync::watch;

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
}

/// The jobs of a worker, without the one to decide on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// All jobs, running and waiting.
    pub jobs: u32,
    /// The jobs of the same tenant.
    pub tenant_jobs: u32,
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
}

impl From<Refusal> for WireError {
    fn from(refusal: Refusal) -> Self {
        Self::new(ErrorCode::WorkerFull, refusal.to_string()).with_retry_after(RETRY_AFTER)
    }
}

/// Decides whether a job that takes this many permits is admitted.
pub fn admit(limits: &JobLimits, occupancy: Occupancy, permits: u32) -> Result<(), Refusal> {
    if occupancy.jobs.saturating_add(permits) > limits.slots.saturating_add(limits.queue_max) {
        return Err(Refusal::QueueFull);
    }
    if limits.tenant_jobs_max.is_some_and(|most| occupancy.tenant_jobs.saturating_add(permits) > most) {
        return Err(Refusal::TenantShare);
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
    /// Only tenants that have a job here.
    by_tenant: HashMap<TenantId, u32>,
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
    pub(crate) fn enter(self: &Arc<Self>, tenant: &TenantId, answers: u32) -> Result<QuotaPermit, Refusal> {
        let permits = answers.min(self.limits.slots).max(1);
        {
            let mut jobs = self.jobs();
            let tenant_jobs = jobs.by_tenant.get(tenant).copied().unwrap_or_default();
            admit(&self.limits, Occupancy { jobs: jobs.count, tenant_jobs }, permits)?;
            jobs.count += permits;
            jobs.by_tenant.insert(tenant.clone(), tenant_jobs + permits);
        }
        self.changes.send_replace(());
        Ok(QuotaPermit { guard: self.clone(), tenant: tenant.clone(), permits })
    }

    /// Returns an error if not even the smallest job can be admitted.
    pub(crate) fn check_room(&self) -> Result<(), Refusal> {
        admit(&self.limits, Occupancy { jobs: self.count(), tenant_jobs: 0 }, 1)
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
    permits: u32,
}

impl Drop for QuotaPermit {
    fn drop(&mut self) {
        {
            let mut jobs = self.guard.jobs();
            jobs.count = jobs.count.saturating_sub(self.permits);
            if let Some(tenant_jobs) = jobs.by_tenant.get_mut(&self.tenant) {
                *tenant_jobs = tenant_jobs.saturating_sub(self.permits);
                if *tenant_jobs == 0 {
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

    const LIMITS: JobLimits = JobLimits { slots: 2, queue_max: 2, tenant_jobs_max: Some(3) };

    fn guard() -> Arc<QuotaGuard> {
        QuotaGuard::new(LIMITS, watch::channel(()).0)
    }

    fn tenant(name: &str) -> TenantId {
        name.parse().expect("a tenant")
    }

    #[test]
    fn a_job_comes_in_until_slots_and_queue_are_taken() {
        for (jobs, expected) in [(0, Ok(())), (3, Ok(())), (4, Err(Refusal::QueueFull)), (9, Err(Refusal::QueueFull))] {
            assert_eq!(admit(&LIMITS, Occupancy { jobs, tenant_jobs: 0 }, 1), expected, "{jobs} jobs");
        }
    }

    #[test]
    fn a_tenant_gets_no_more_than_its_share() {
        assert_eq!(admit(&LIMITS, Occupancy { jobs: 3, tenant_jobs: 2 }, 1), Ok(()));
        assert_eq!(admit(&LIMITS, Occupancy { jobs: 3, tenant_jobs: 3 }, 1), Err(Refusal::TenantShare));
        let unlimited = JobLimits { tenant_jobs_max: None, ..LIMITS };
        assert_eq!(admit(&unlimited, Occupancy { jobs: 3, tenant_jobs: 3 }, 1), Ok(()));
    }

    #[test]
    fn a_job_of_several_answers_takes_as_many_places() {
        let unlimited = JobLimits { tenant_jobs_max: None, ..LIMITS };
        let two = Occupancy { jobs: 2, tenant_jobs: 2 };
        assert_eq!(admit(&unlimited, two, 2), Ok(()));
        assert_eq!(admit(&unlimited, two, 3), Err(Refusal::QueueFull));
        assert_eq!(admit(&LIMITS, two, 2), Err(Refusal::TenantShare));
        let guard = guard();
        // Of three answers two run concurrently, in two slots.
        let permit = guard.enter(&tenant("a"), 3).expect("within its share");
        assert_eq!((guard.count(), guard.enter(&tenant("a"), 2).expect_err("over it")), (2, Refusal::TenantShare));
        drop(permit);
        assert_eq!(guard.count(), 0);
    }

    #[test]
    fn a_full_worker_says_so_before_it_speaks_of_shares() {
        assert_eq!(admit(&LIMITS, Occupancy { jobs: 4, tenant_jobs: 4 }, 1), Err(Refusal::QueueFull));
    }

    #[test]
    fn a_place_given_back_can_be_taken_by_another() {
        let guard = guard();
        let permits: Vec<_> = (0..3).map(|_| guard.enter(&tenant("a"), 1).expect("within its share")).collect();
        assert_eq!(guard.enter(&tenant("a"), 1).expect_err("over its share"), Refusal::TenantShare);
        let other = guard.enter(&tenant("b"), 1).expect("there is room for others");
        assert_eq!(guard.enter(&tenant("c"), 1).expect_err("full"), Refusal::QueueFull);
        drop(permits);
        assert_eq!(guard.count(), 1);
        guard.enter(&tenant("a"), 1).expect("there is room again");
        drop(other);
        assert!(guard.jobs().by_tenant.is_empty());
    }

    #[tokio::test]
    async fn whoever_waits_for_the_last_job_is_woken() {
        let guard = guard();
        let permit = guard.enter(&tenant("a"), 1).expect("there is room");
        let (waited, ()) = tokio::join!(guard.empty(), async { drop(permit) });
        assert_eq!((waited, guard.count()), ((), 0));
    }
}

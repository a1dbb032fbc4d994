//! The jobs that an operator can cancel: each from its submission to its end, whether it waits or runs.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use metadata_store::JobKey;
use parking_lot::Mutex;
use protocol::{CorrelationId, TenantId};
use tokio_util::sync::CancellationToken;

/// The jobs of one orchestrator.
#[derive(Default)]
pub(crate) struct RunningJobs(Mutex<HashMap<CorrelationId, Vec<Arc<Signals>>>>);

/// What a job and whoever cancels it tell each other.
pub(crate) struct Signals {
    pub(crate) key: JobKey,
    cancelled: CancellationToken,
    ended: CancellationToken,
    has_worker: AtomicBool,
}

/// A job among those that can be cancelled, until dropped.
pub(crate) struct RunningJob {
    jobs: Arc<RunningJobs>,
    signals: Arc<Signals>,
}

impl RunningJobs {
    pub(crate) fn enter(self: &Arc<Self>, key: JobKey) -> RunningJob {
        let (id, has_worker) = (key.correlation_id, AtomicBool::new(false));
        let signals = Signals { key, cancelled: CancellationToken::new(), ended: CancellationToken::new(), has_worker };
        let signals = Arc::new(signals);
        self.0.lock().entry(id).or_default().push(signals.clone());
        RunningJob { jobs: self.clone(), signals }
    }

    /// Cancels the jobs of a request, or those of one tenant, and returns them.
    pub(crate) fn cancel(&self, id: CorrelationId, tenant: Option<&TenantId>) -> Vec<Arc<Signals>> {
        let mut jobs = self.0.lock().get(&id).cloned().unwrap_or_default();
        jobs.retain(|job| tenant.is_none_or(|tenant| *tenant == job.key.tenant_id));
        for job in &jobs {
            job.cancelled.cancel();
        }
        jobs
    }

    /// Cancels the jobs whose keys are as `which` says.
    pub(crate) fn cancel_all(&self, which: impl Fn(&JobKey) -> bool) {
        let jobs: Vec<Arc<Signals>> = self.0.lock().values().flatten().filter(|job| which(&job.key)).cloned().collect();
        for job in jobs {
            job.cancelled.cancel();
        }
    }
}

impl Signals {
    /// Returns whether the job has or had a reservation on a worker.
    pub(crate) fn has_worker(&self) -> bool {
        self.has_worker.load(Ordering::Acquire)
    }

    /// Waits until the job has ended. Cancel safe.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

impl RunningJob {
    /// Returns the token that is cancelled when an operator cancels the job.
    pub(crate) fn cancelled(&self) -> &CancellationToken {
        &self.signals.cancelled
    }

    /// Records that the job has a reservation on a worker.
    pub(crate) fn reserved(&self) {
        self.signals.has_worker.store(true, Ordering::Release);
    }
}

impl Drop for RunningJob {
    fn drop(&mut self) {
        let (id, mut jobs) = (self.signals.key.correlation_id, self.jobs.0.lock());
        if let Some(of_request) = jobs.get_mut(&id) {
            of_request.retain(|job| !Arc::ptr_eq(job, &self.signals));
            if of_request.is_empty() {
                jobs.remove(&id);
            }
        }
        self.signals.ended.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(request: u128, token: &str) -> JobKey {
        let correlation_id = CorrelationId(uuid::Uuid::from_u128(request));
        let (tenant_id, retry_token) = ("acme".parse().expect("a tenant"), token.parse().expect("a token"));
        JobKey { tenant_id, correlation_id, retry_token }
    }

    #[tokio::test]
    async fn the_jobs_of_a_request_can_be_cancelled_until_they_end() {
        let jobs = Arc::new(RunningJobs::default());
        let (one, two, other) = (jobs.enter(key(1, "a")), jobs.enter(key(1, "b")), jobs.enter(key(2, "a")));
        two.reserved();
        drop(one);
        let cancelled = jobs.cancel(CorrelationId(uuid::Uuid::from_u128(1)), None);
        assert_eq!(
            cancelled.iter().map(|job| (job.key.clone(), job.has_worker())).collect::<Vec<_>>(),
            [(key(1, "b"), true)]
        );
        assert!(two.cancelled().is_cancelled() && !other.cancelled().is_cancelled());
        let (of_other, stranger) = (CorrelationId(uuid::Uuid::from_u128(2)), "stranger".parse().expect("a tenant"));
        assert!(jobs.cancel(of_other, Some(&stranger)).is_empty() && !other.cancelled().is_cancelled());
        jobs.cancel_all(|key| key.retry_token.as_str() == "c");
        assert!(!other.cancelled().is_cancelled());
        jobs.cancel_all(|key| key.retry_token.as_str() == "a");
        assert!(other.cancelled().is_cancelled());
        drop(two);
        cancelled[0].ended().await;
        assert!(jobs.cancel(CorrelationId(uuid::Uuid::from_u128(1)), None).is_empty());
        drop(other);
        assert!(jobs.0.lock().is_empty(), "nothing is kept of jobs that have ended");
    }
}

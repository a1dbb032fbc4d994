//! Tracks the workers: accepts their signed reports or counts the rejections, and removes silent workers.
//!
//! Workers find orchestrators and push their reports; [`search`] finds workers that do not.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use metadata_store::JobStore;
use observability::metrics::ReasonLabel;
use parking_lot::Mutex;
use protocol::control::NodeRole;
use protocol::health::HealthReport;
use protocol::presence::{self, Facts, HighWater, Rejection};
use protocol::signature::Signed;
use protocol::{Clock, PublicKey, Region, WorkerId};
use rpc::Membership;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::fleet::{Change, Fleet};
use crate::metrics::Metrics;

pub mod search;

/// How often silent workers are removed and high-water marks are written.
const SWEEP: Duration = Duration::from_secs(1);

/// Tracks the workers of some regions.
pub struct DiscoverySub {
    fleet: Arc<Fleet>,
    regions: Vec<Region>,
    clock: Arc<dyn Clock>,
    store: Arc<dyn JobStore>,
    metrics: Metrics,
    membership: Membership,
    marks: Mutex<Marks>,
}

/// The high-water mark of each worker's last accepted report, and the marks that are not on disk yet.
#[derive(Default)]
struct Marks {
    known: HashMap<WorkerId, HighWater>,
    unsaved: HashMap<WorkerId, HighWater>,
}

impl DiscoverySub {
    /// Starts from the stored marks, so that reports from before a restart are still rejected as replays.
    pub fn new(
        fleet: Arc<Fleet>,
        regions: Vec<Region>,
        clock: Arc<dyn Clock>,
        store: Arc<dyn JobStore>,
        metrics: Metrics,
        membership: Membership,
        known: Vec<(WorkerId, HighWater)>,
    ) -> Self {
        let marks = Marks { known: known.into_iter().collect(), unsaved: HashMap::new() };
        Self { fleet, regions, clock, store, metrics, membership, marks: Mutex::new(marks) }
    }

    /// Checks and applies a report received from `remote_key`. Returns what it changed.
    pub fn take(&self, remote_key: PublicKey, signed: &Signed) -> Result<Change, Rejection> {
        let admitted = {
            let mut marks = self.marks.lock();
            let facts = Facts {
                remote_key,
                regions: &self.regions,
                check_worker: &|region| self.membership.check_role(remote_key, NodeRole::Worker, Some(region)),
                high_water: marks.known.get(&remote_key).copied(),
                now: self.clock.now(),
            };
            presence::verify(signed, &facts).inspect(|report| {
                let mark = HighWater { epoch: report.epoch, seq: report.seq };
                marks.known.insert(report.worker_id, mark);
                marks.unsaved.insert(report.worker_id, mark);
            })
        };
        match admitted {
            Ok(mut report) => {
                self.leave_certified(&mut report);
                let (worker, region) = (report.worker_id, report.region.clone());
                let change = self.fleet.update(report, Instant::now());
                match change {
                    Change::Found => info!(worker = worker.short(), %region, "worker found"),
                    Change::Restarted => info!(worker = worker.short(), %region, "worker started again"),
                    Change::Left => info!(worker = worker.short(), %region, "worker left"),
                    Change::None => {}
                }
                self.count_workers();
                Ok(change)
            }
            Err(rejection) => {
                self.count(rejection);
                if matches!(rejection, Rejection::Skew | Rejection::Expired) {
                    self.fleet.note_skew(remote_key, Instant::now());
                }
                Err(rejection)
            }
        }
    }

    /// Counts a rejected report.
    pub fn count(&self, rejection: Rejection) {
        self.metrics.presence_rejected.get_or_create(&ReasonLabel { reason: rejection.reason() }).inc();
    }

    /// Removes from a report the models that the worker's certificate does not allow, so that it gets no jobs for them.
    fn leave_certified(&self, report: &mut HealthReport) {
        if let Ok(Some(certificate)) = self.membership.standing(report.worker_id) {
            report.supported.retain(|key| certificate.allows_model(&key.model_id));
            report.model_cache.retain(|cached| certificate.allows_model(&cached.key.model_id));
        }
    }

    /// Removes silent workers and writes marks until `stop` is cancelled, then writes the marks once more.
    pub async fn run(&self, stop: CancellationToken) {
        let mut ticks = time::interval(SWEEP);
        let mut revocations = self.membership.changes();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => {
                    self.sweep(Instant::now());
                    self.save_marks().await;
                }
                // Without certificates there are no revocations, and this branch is disabled.
                Ok(()) = revocations.changed() => self.expel(),
            }
        }
        self.save_marks().await;
    }

    /// Removes silent workers. They already get no jobs once they have expired; this frees their memory.
    fn sweep(&self, now: Instant) {
        for worker in self.fleet.expire(now) {
            info!(worker = worker.short(), "worker lost: silent for 15 s");
        }
        self.count_workers();
    }

    fn count_workers(&self) {
        self.metrics.workers_live.set(self.fleet.len() as i64);
        self.metrics.workers_loading.set(self.fleet.loading_count() as i64);
    }

    /// Removes the workers that were expelled.
    fn expel(&self) {
        for worker in self.membership.revoked() {
            if self.fleet.remove(worker) {
                info!(worker = worker.short(), "worker expelled: it was revoked");
            }
        }
        self.count_workers();
    }

    async fn save_marks(&self) {
        let unsaved = std::mem::take(&mut self.marks.lock().unsaved);
        if unsaved.is_empty() {
            return;
        }
        // Lost marks only matter after a crash, and then only for reports younger than the allowed skew.
        if let Err(error) = self.store.raise_high_water(unsaved.into_iter().collect()).await {
            warn!(%error, "could not write presence marks");
        }
    }
}

#[cfg(test)]
mod tests;

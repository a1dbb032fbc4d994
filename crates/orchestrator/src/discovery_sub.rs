//! Follows the workers: believes their signed reports or counts why not, and forgets the silent.
//!
//! Workers look for orchestrators and push their reports; [`search`] looks for those that do not.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use metadata_store::JobStore;
use observability::Metrics;
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

pub mod search;

/// How often the silent are looked for and marks are written.
const SWEEP: Duration = Duration::from_secs(1);

/// Follows the workers of some regions.
pub struct DiscoverySub {
    fleet: Arc<Fleet>,
    regions: Vec<Region>,
    clock: Arc<dyn Clock>,
    store: Arc<dyn JobStore>,
    metrics: Metrics,
    membership: Membership,
    marks: Mutex<Marks>,
}

/// The last report believed of each worker, and which of them are not on disk yet.
#[derive(Default)]
struct Marks {
    known: HashMap<WorkerId, HighWater>,
    unsaved: HashMap<WorkerId, HighWater>,
}

impl DiscoverySub {
    /// Begins with what is known from before, so that reports of an earlier run stay replays.
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

    /// Takes a report that came over a connection of `remote_key`. Says what it changed.
    pub fn take(&self, remote_key: PublicKey, signed: &Signed) -> Result<Change, Rejection> {
        let admitted = {
            let mut marks = self.marks.lock();
            let facts = Facts {
                remote_key,
                regions: &self.regions,
                admitted: &|region| self.membership.admit(remote_key, NodeRole::Worker, Some(region)),
                high_water: marks.known.get(&remote_key).copied(),
                now: self.clock.now(),
            };
            presence::admit(signed, &facts).inspect(|report| {
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
                Err(rejection)
            }
        }
    }

    /// Counts a report that was dropped.
    pub fn count(&self, rejection: Rejection) {
        self.metrics.presence_rejected.get_or_create(&ReasonLabel { reason: rejection.reason() }).inc();
    }

    /// Leaves in a report only the models that its worker may serve, so that it gets no job for others.
    fn leave_certified(&self, report: &mut HealthReport) {
        if let Ok(Some(certificate)) = self.membership.standing(report.worker_id) {
            report.supported.retain(|key| certificate.allows_model(&key.model_id));
            report.model_cache.retain(|cached| certificate.allows_model(&cached.key.model_id));
        }
    }

    /// Forgets the silent and writes marks until `stop`, and once more at the end.
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
                // Without admission nobody is expelled, and nobody tells of it.
                Ok(()) = revocations.changed() => self.expel(),
            }
        }
        self.save_marks().await;
    }

    /// Forgets the silent. They get no job from the moment on that they are silent for too long; this makes room.
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

    /// Forgets the workers that were expelled.
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

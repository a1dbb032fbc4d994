//! Tells the region's orchestrators how this worker is: every five seconds, and soon after each change (W5, T6).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use engine::LoadSnapshot;
use futures_util::future::join_all;
use protocol::control::{Empty, NodeRole, PRESENCE_REPORT};
use protocol::health::{self, Capacity, EXPIRY, HEARTBEAT, HealthReport};
use protocol::model::ModelKey;
use protocol::signature::{NodeKey, Signed};
use protocol::{Clock, PublicKey, Region, codec};
use rpc::{CallError, Client, Directory};
use tokio::sync::watch;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::capabilities::Capabilities;
use crate::model_loader::cache::ModelCache;
use crate::quota_guard::Limits;

/// Changes that come faster are told together.
const CHANGE_GAP: Duration = Duration::from_millis(200);
/// How long an orchestrator may take to receive a report.
const PUSH_WITHIN: Duration = Duration::from_secs(2);
/// How long it may take for the last one.
const LAST_PUSH_WITHIN: Duration = Duration::from_secs(1);

/// What never changes in a worker's reports.
pub(crate) struct Identity {
    pub(crate) key: NodeKey,
    pub(crate) region: Region,
    pub(crate) capabilities: Capabilities,
    pub(crate) supported: Vec<ModelKey>,
    pub(crate) latency_hops: u32,
    pub(crate) limits: Limits,
    /// Grows at each start of the worker.
    pub(crate) epoch: u64,
}

/// How a worker is at one moment.
pub(crate) struct Condition {
    /// Jobs that are here.
    pub(crate) jobs: u32,
    pub(crate) draining: bool,
    pub(crate) snapshots: Vec<LoadSnapshot>,
}

/// Pushes signed reports to every orchestrator it knows.
pub(crate) struct HealthReporter<Look> {
    identity: Identity,
    clock: Arc<dyn Clock>,
    /// Says how the worker is.
    look: Look,
    loader: Arc<crate::model_loader::ModelLoader>,
    client: Client,
    directory: Directory,
    changes: watch::Receiver<()>,
    seq: u64,
    latest: watch::Sender<Option<Arc<Signed>>>,
    pushers: BTreeMap<PublicKey, DropGuard>,
    tasks: TaskTracker,
}

impl<Look: Fn() -> Condition> HealthReporter<Look> {
    pub(crate) fn new(
        identity: Identity,
        clock: Arc<dyn Clock>,
        look: Look,
        loader: Arc<crate::model_loader::ModelLoader>,
        client: Client,
        directory: Directory,
        changes: watch::Receiver<()>,
    ) -> Self {
        let latest = watch::Sender::new(None);
        let (pushers, tasks) = (BTreeMap::new(), TaskTracker::new());
        Self { identity, clock, look, loader, client, directory, changes, seq: 0, latest, pushers, tasks }
    }

    /// Reports until `stop`, then one last time.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut heartbeat = time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut found = self.directory.clone();
        let mut is_searching = true;
        let mut earliest = Instant::now();
        let reporting = async {
            loop {
                tokio::select! {
                    _ = heartbeat.tick() => {}
                    Ok(()) = self.changes.changed() => time::sleep_until(earliest).await,
                    searching = found.changed(), if is_searching => is_searching = searching,
                }
                self.changes.mark_unchanged();
                earliest = Instant::now() + CHANGE_GAP;
                self.report();
            }
        };
        stop.run_until_cancelled(reporting).await;
        self.report_last().await;
    }

    /// Signs a report and hands it to the pushers.
    fn report(&mut self) {
        let signed = Arc::new(self.sign());
        self.latest.send_replace(Some(signed));
        let known = self.directory.find(NodeRole::Orchestrator);
        self.pushers.retain(|peer, _| known.contains(peer));
        for peer in known {
            self.pushers.entry(peer).or_insert_with(|| {
                let stop = CancellationToken::new();
                let push = push(self.client.clone(), peer, self.latest.subscribe());
                let stopped = stop.clone();
                self.tasks.spawn(async move { stopped.run_until_cancelled(push).await });
                stop.drop_guard()
            });
        }
    }

    async fn report_last(mut self) {
        self.pushers.clear();
        self.tasks.close();
        self.tasks.wait().await;
        let signed = self.sign();
        let (client, signed) = (&self.client, &signed);
        join_all(self.directory.find(NodeRole::Orchestrator).into_iter().map(|peer| async move {
            log_refusal(peer, client.call::<_, Empty>(peer, PRESENCE_REPORT, signed, LAST_PUSH_WITHIN).await);
        }))
        .await;
    }

    fn sign(&mut self) -> Signed {
        self.seq += 1;
        let condition = (self.look)();
        let report = build(&self.identity, &condition, self.loader.cache(), self.seq, self.clock.as_ref());
        let body = String::from_utf8(codec::encode(&report)).expect("JSON is UTF-8");
        self.identity.key.sign(health::KIND, body)
    }
}

/// Pushes each report to one orchestrator; those that come while it is slow are skipped for the latest.
async fn push(client: Client, peer: PublicKey, mut latest: watch::Receiver<Option<Arc<Signed>>>) {
    loop {
        let report = latest.borrow_and_update().clone();
        if let Some(report) = report {
            log_refusal(peer, client.call::<_, Empty>(peer, PRESENCE_REPORT, &*report, PUSH_WITHIN).await);
        }
        if latest.changed().await.is_err() {
            return;
        }
    }
}

/// A report that did not arrive is only logged: the next one is seconds away.
fn log_refusal(peer: PublicKey, pushed: Result<Empty, CallError>) {
    match pushed {
        Ok(Empty {}) => {}
        Err(CallError::Remote(error)) => {
            warn!(orchestrator = peer.short(), %error, "an orchestrator refused the report");
        }
        Err(error) => debug!(orchestrator = peer.short(), %error, "the report did not arrive"),
    }
}

/// Says how the worker is, in the words of the contract.
fn build(identity: &Identity, condition: &Condition, cache: &ModelCache, seq: u64, clock: &dyn Clock) -> HealthReport {
    let Limits { slots, queue_max, .. } = identity.limits;
    let (worker_id, issued_at) = (identity.key.public_key(), clock.now());
    let running = condition.jobs.min(slots);
    HealthReport {
        v: 1,
        worker_id,
        pub_key: worker_id,
        region: identity.region.clone(),
        gpu_class: identity.capabilities.gpu_class.clone(),
        vram_gb: identity.capabilities.vram_gb,
        accelerators: identity.capabilities.accelerators.clone(),
        // Counted here and not by the engines: a job that waits for its model is here as well.
        capacity: Capacity { slots, running, waiting: condition.jobs - running, queue_max },
        supported: identity.supported.clone(),
        model_cache: cache.manifest(&condition.snapshots),
        latency_hops: identity.latency_hops,
        draining: condition.draining,
        epoch: identity.epoch,
        seq,
        issued_at,
        not_after: issued_at.after(EXPIRY),
    }
}

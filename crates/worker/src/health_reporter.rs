//! Reports this worker's health to the region's orchestrators: every five seconds, and soon after each change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use engine::LoadSnapshot;
use futures_util::future::join_all;
use protocol::control::{Empty, NodeRole, PRESENCE_REPORT};
use protocol::health::{self, Activity, Capacity, EXPIRY, HEARTBEAT, HealthReport};
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
use crate::config::ServedModel;
use crate::hearing::Hearing;
use crate::model_loader::cache::ModelCache;
use crate::quota_guard::JobLimits;

/// Changes within this time share a report.
const CHANGE_GAP: Duration = Duration::from_millis(200);
/// Timeout for pushing a report to an orchestrator.
const PUSH_WITHIN: Duration = Duration::from_secs(2);
/// The same timeout for the last report.
const LAST_PUSH_WITHIN: Duration = Duration::from_secs(1);

/// Bytes that one model is assumed to take in a report: its name twice, its digest and the rest. A larger one makes
/// [`fit`] drop more models than necessary.
const MODEL_BYTES_MAX: usize = 512;

/// The constant part of a worker's reports.
pub(crate) struct Identity {
    pub(crate) key: NodeKey,
    pub(crate) region: Region,
    pub(crate) capabilities: Capabilities,
    pub(crate) latency_hops: u32,
    pub(crate) limits: JobLimits,
    /// Grows with each start of the worker.
    pub(crate) epoch: u64,
}

/// A worker's load at one moment.
pub(crate) struct Condition {
    /// Permits that running and queued jobs hold.
    pub(crate) jobs: u32,
    pub(crate) draining: bool,
    pub(crate) activity: Activity,
    pub(crate) snapshots: Vec<LoadSnapshot>,
}

/// Writes and signs health reports.
pub(crate) struct ReportWriter<Look> {
    identity: Identity,
    clock: Arc<dyn Clock>,
    /// Returns the worker's condition.
    look: Look,
    loader: Arc<crate::model_loader::ModelLoader>,
    seq: AtomicU64,
    /// Whether a warning was logged that reports are incomplete.
    has_warned: AtomicBool,
}

/// A signed report, and when it was written.
type Written = (Instant, Arc<Signed>);

/// Pushes signed reports to every orchestrator it knows.
pub(crate) struct HealthReporter<Look> {
    writer: Arc<ReportWriter<Look>>,
    client: Client,
    directory: Directory,
    hearing: Arc<Hearing>,
    changes: watch::Receiver<()>,
    latest: watch::Sender<Option<Written>>,
    pushers: BTreeMap<PublicKey, DropGuard>,
    tasks: TaskTracker,
}

impl<Look: Fn() -> Condition> ReportWriter<Look> {
    pub(crate) fn new(
        identity: Identity,
        clock: Arc<dyn Clock>,
        look: Look,
        loader: Arc<crate::model_loader::ModelLoader>,
    ) -> Self {
        Self { identity, clock, look, loader, seq: AtomicU64::new(0), has_warned: AtomicBool::new(false) }
    }

    /// Signs a report of the present state, with a higher sequence number than all before it.
    pub(crate) fn sign(&self) -> Signed {
        let seq = self.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let condition = (self.look)();
        let mut report = build(&self.identity, &condition, self.loader.cache(), seq, self.clock.as_ref());
        let (body, left_out) = fit(&mut report);
        if left_out > 0 && !self.has_warned.swap(true, Ordering::Relaxed) {
            let (told, most) = (report.supported.len(), health::REPORT_BYTES_MAX);
            warn!(told, left_out, most, "more models than a health report can name: jobs for the others will not come");
        }
        self.identity.key.sign(health::KIND, body)
    }
}

/// Encodes a report within the size limit, and returns the number of models left out.
///
/// If the report is too large, drops in this order: prompt prefixes; models that are not in memory, from the end of the
/// configuration; models in memory.
fn fit(report: &mut HealthReport) -> (String, usize) {
    let write = |report: &HealthReport| String::from_utf8(codec::encode(report)).expect("JSON is UTF-8");
    let before = report.supported.len();
    let mut body = write(report);
    if body.len() > health::REPORT_BYTES_MAX {
        report.model_cache.iter_mut().for_each(|model| model.prefixes.clear());
        body = write(report);
        let in_memory: BTreeSet<ModelKey> = report.model_cache.iter().map(|model| model.key.clone()).collect();
        report.supported.sort_by_key(|key| !in_memory.contains(key));
    }
    while body.len() > health::REPORT_BYTES_MAX && !report.supported.is_empty() {
        // Drops no more models than necessary, as long as none takes more than `MODEL_BYTES_MAX`.
        let excess = (body.len() - health::REPORT_BYTES_MAX).div_ceil(MODEL_BYTES_MAX);
        let left = report.supported.split_off(report.supported.len().saturating_sub(excess));
        report.model_cache.retain(|model| !left.contains(&model.key));
        report.to_fetch.retain(|key| !left.contains(key));
        report.adapters.retain(|adapter| !left.contains(&adapter.model));
        report.pinned.retain(|adapter| !left.contains(&adapter.model));
        body = write(report);
    }
    (body, before - report.supported.len())
}

impl<Look: Fn() -> Condition> HealthReporter<Look> {
    pub(crate) fn new(
        writer: Arc<ReportWriter<Look>>,
        client: Client,
        directory: Directory,
        hearing: Arc<Hearing>,
        changes: watch::Receiver<()>,
    ) -> Self {
        let latest = watch::Sender::new(None);
        let (pushers, tasks) = (BTreeMap::new(), TaskTracker::new());
        Self { writer, client, directory, hearing, changes, latest, pushers, tasks }
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
                    _ = heartbeat.tick() => {
                        // A revoked worker was told so, and needs no other reason.
                        if !self.client.membership().is_revoked(self.client.public_key()) {
                            self.hearing.look(&self.directory);
                        }
                    }
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
        let written = Instant::now();
        self.latest.send_replace(Some((written, Arc::new(self.writer.sign()))));
        let known = self.directory.find(NodeRole::Orchestrator);
        self.pushers.retain(|peer, _| known.contains(peer));
        for peer in known {
            self.pushers.entry(peer).or_insert_with(|| {
                let stop = CancellationToken::new();
                let push = push(self.client.clone(), peer, self.latest.subscribe(), self.hearing.clone());
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
        let signed = self.writer.sign();
        let (client, signed) = (&self.client, &signed);
        join_all(self.directory.find(NodeRole::Orchestrator).into_iter().map(|peer| async move {
            log_refusal(peer, &client.call::<_, Empty>(peer, PRESENCE_REPORT, signed, LAST_PUSH_WITHIN).await);
        }))
        .await;
    }
}

/// Pushes each report to one orchestrator. Reports that come while it is slow are skipped for the latest one.
async fn push(client: Client, peer: PublicKey, mut latest: watch::Receiver<Option<Written>>, hearing: Arc<Hearing>) {
    loop {
        let report = latest.borrow_and_update().clone();
        if let Some((written, report)) = report {
            let pushed = client.call::<_, Empty>(peer, PRESENCE_REPORT, &*report, PUSH_WITHIN).await;
            log_refusal(peer, &pushed);
            match pushed {
                Ok(Empty {}) => hearing.heard(written),
                Err(CallError::Remote(error)) => hearing.refused(peer, error.message),
                Err(_) => {}
            }
        }
        if latest.changed().await.is_err() {
            return;
        }
    }
}

/// A report that did not arrive is only logged: the next one is seconds away.
fn log_refusal(peer: PublicKey, pushed: &Result<Empty, CallError>) {
    match pushed {
        Ok(Empty {}) => {}
        Err(CallError::Remote(error)) => {
            warn!(orchestrator = peer.short(), %error, "an orchestrator refused the report");
        }
        Err(error) => debug!(orchestrator = peer.short(), %error, "the report did not arrive"),
    }
}

/// Builds a health report.
fn build(identity: &Identity, condition: &Condition, cache: &ModelCache, seq: u64, clock: &dyn Clock) -> HealthReport {
    let JobLimits { slots, queue_max, .. } = identity.limits;
    let (worker_id, issued_at) = (identity.key.public_key(), clock.now());
    let running = condition.jobs.min(slots);
    let entries = cache.entries();
    let models = || entries.iter().map(|entry| &entry.model);
    HealthReport {
        v: 1,
        worker_id,
        pub_key: worker_id,
        region: identity.region.clone(),
        gpu_class: identity.capabilities.gpu_class.clone(),
        vram_gb: identity.capabilities.vram_gb,
        accelerators: identity.capabilities.accelerators.clone(),
        // Counted here and not by the engines, which do not see a job that waits for its model.
        capacity: Capacity { slots, running, waiting: condition.jobs - running, queue_max },
        supported: models().map(ServedModel::key).collect(),
        to_fetch: entries.iter().filter(|entry| entry.is_to_fetch()).map(|entry| entry.key.clone()).collect(),
        adapters: models().flat_map(ServedModel::adapter_keys).collect(),
        pinned: models().filter_map(ServedModel::pinned_key).collect(),
        model_cache: cache.manifest(&condition.snapshots),
        latency_hops: identity.latency_hops,
        draining: condition.draining,
        activity: condition.activity,
        continues: true,
        epoch: identity.epoch,
        seq,
        issued_at,
        not_after: issued_at.after(EXPIRY),
    }
}

#[cfg(test)]
mod tests {
    use protocol::health::{CachedModel, ModelState};
    use protocol::{Digest, PrefixDigest, PublicKey, UnixMillis};

    use super::*;

    fn report(models: usize, in_memory: usize) -> HealthReport {
        let key = |number: usize| ModelKey {
            model_id: format!("{}-{number}", "a-rather-long-name-of-a-model.with-its-size-70b").parse().expect("name"),
            version: "1.0".parse().expect("version"),
        };
        let cached = |number| CachedModel {
            tokens_per_second: 123.456,
            ..CachedModel::new(key(number), Digest([7; 32]), ModelState::Ready)
        };
        let id = PublicKey([1; 32]);
        HealthReport {
            v: 1,
            worker_id: id,
            pub_key: id,
            region: "local".parse().expect("region"),
            gpu_class: "cpu".into(),
            vram_gb: 0,
            accelerators: vec![],
            capacity: Capacity::default(),
            supported: (0..models).map(key).collect(),
            to_fetch: vec![],
            // The last ones, to check that they are kept.
            adapters: vec![],
            pinned: vec![],
            model_cache: (models - in_memory..models).map(cached).collect(),
            latency_hops: 0,
            draining: false,
            activity: protocol::health::Activity::Accepting,
            continues: true,
            epoch: 1,
            seq: 1,
            issued_at: UnixMillis(0),
            not_after: UnixMillis(0),
        }
    }

    #[test]
    fn a_report_of_hundreds_of_models_is_told_whole() {
        let mut hundreds = report(800, 800);
        let (body, left_out) = fit(&mut hundreds);
        assert_eq!(left_out, 0);
        assert!(body.len() > 64 * 1024 && body.len() <= health::REPORT_BYTES_MAX, "{}", body.len());
    }

    #[test]
    fn no_model_is_left_out_for_the_sake_of_prompts() {
        let mut hundreds = report(800, 800);
        for model in &mut hundreds.model_cache {
            model.prefixes = vec![PrefixDigest([1; 8]); health::PREFIXES_MAX];
        }
        assert_eq!(fit(&mut hundreds).1, 0);
    }

    #[test]
    fn beyond_the_limit_models_that_are_not_in_memory_are_left_out_first() {
        let mut thousands = report(10_000, 200);
        let (body, left_out) = fit(&mut thousands);
        assert!(body.len() <= health::REPORT_BYTES_MAX && body.len() > health::REPORT_BYTES_MAX / 10 * 9);
        assert_eq!(thousands.supported.len() + left_out, 10_000);
        assert_eq!(thousands.model_cache.len(), 200);
        assert!(thousands.model_cache.iter().all(|model| thousands.supported.contains(&model.key)));
        let read: HealthReport = codec::decode(body.as_bytes()).expect("it reads");
        assert_eq!(read, thousands);
        let mut loaded = report(5_000, 5_000);
        assert!(fit(&mut loaded).0.len() <= health::REPORT_BYTES_MAX);
        assert_eq!(loaded.model_cache.len(), loaded.supported.len());
    }
}

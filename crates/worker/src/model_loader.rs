//! Brings models into memory: verified, once each, and again when their engine dies (W2).
//!
//! Each model has one keeper, a task that alone loads and unloads it. So however many jobs want a model, it is
//! loaded once, and they all wait for the same load.

pub(crate) mod adapters;
pub(crate) mod cache;
mod warm_prefixes;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{fmt, io, mem};

use artifact_store::{ArtifactStore, OpenError, VerifiedFile};
use engine::gguf::Header;
use engine::memory_plan::CONTEXT_DEFAULT;
use engine::merge::Merge;
use engine::{
    AdapterId, EngineError, Kernels, LoadOptions, LoadSnapshot, LoadedModel, ModelId, ModelRuntime, ProgressSink,
    VerifiedArtifact,
};
use observability::metrics::{Metrics, ModelLabel};
use protocol::Digest;
use protocol::model::{ModelKey, ModelOffer, OfferedSource};
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use adapters::Lease;
use cache::{Entry, Load, ModelCache, Status};

use crate::config::{self, ServedAdapter};
use crate::offers::OfferError;
use crate::remote_models::{AttachError, RemoteModels};

/// The wait after the first failure; it doubles with each.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// An engine that lived this long ends the row of failures before it.
const STEADY: Duration = Duration::from_mins(1);
/// A model whose engine died and that is loaded again after such a wait counts as loading: jobs wait for it.
const RELOAD_SOON: Duration = Duration::from_secs(1);
/// Failures in a row after which an engine that seems alive is replaced.
const STRIKES_MAX: u32 = 3;
/// How often the progress of a load is reported.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long an unload may take before it is given up.
const UNLOAD_WITHIN: Duration = Duration::from_secs(5);
/// How long a registry may take to be found before a model answers unlisted: what is listed already needs none.
const REGISTRY_WITHIN: Duration = Duration::from_millis(500);
/// How often a model is offered while no registry answers.
const OFFER_EVERY: Duration = Duration::from_secs(5);

/// Loads the models of one worker and keeps them loaded.
pub(crate) struct ModelLoader {
    cache: ModelCache,
    options: LoaderOptions,
    runtime: Arc<dyn ModelRuntime>,
    remote: RemoteModels,
    artifacts: ArtifactStore,
    metrics: Metrics,
    changes: watch::Sender<()>,
    /// Verification blocks; it is waited for here.
    blocking: TaskTracker,
}

/// How models are loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoaderOptions {
    /// Sequences that run side by side.
    pub(crate) slots: u32,
    /// Requests that an engine may let wait.
    pub(crate) queue_max: u32,
    /// Loads at the start, and not at the first job.
    pub(crate) preload: bool,
    /// Where the jitter of retries comes from, so that a run repeats and workers differ.
    pub(crate) seed: u64,
}

/// The model can't be had here for the time being.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the model could not be loaded: {reason}")]
pub(crate) struct LoadFailed {
    /// Why, for this node's log.
    pub(crate) reason: Arc<str>,
}

/// How busy the engines are, at one moment.
pub(crate) struct Observation {
    /// The models that answer.
    pub(crate) ready: Vec<(ModelKey, ModelId)>,
    /// Each engine's state.
    pub(crate) snapshots: Vec<LoadSnapshot>,
}

/// Why a model or an adapter was not loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error(transparent)]
    Artifact(#[from] OpenError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error("no file for a merged model could be made: {0}")]
    Scratch(io::Error),
    #[error("the verification did not end")]
    Interrupted,
}

impl LoadError {
    /// Returns what kind of error an engine's is.
    fn engine(&self) -> Option<mem::Discriminant<EngineError>> {
        if let Self::Engine(error) = self { Some(mem::discriminant(error)) } else { None }
    }
}

impl ModelLoader {
    pub(crate) fn new(
        cache: ModelCache,
        options: LoaderOptions,
        runtime: Arc<dyn ModelRuntime>,
        remote: RemoteModels,
        artifacts: ArtifactStore,
        metrics: Metrics,
        changes: watch::Sender<()>,
    ) -> Self {
        Self { cache, options, runtime, remote, artifacts, metrics, changes, blocking: TaskTracker::new() }
    }

    pub(crate) fn cache(&self) -> &ModelCache {
        &self.cache
    }

    /// Says whether models are loaded before anyone asks for them.
    pub(crate) fn preloads(&self) -> bool {
        self.options.preload
    }

    /// Keeps every model until `stop`, then unloads them.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let keepers = TaskTracker::new();
        for entry in self.cache.entries() {
            let (loader, entry, stop) = (self.clone(), entry.clone(), stop.clone());
            keepers.spawn(async move {
                stop.run_until_cancelled(loader.keep(&entry)).await;
                if let Some(loaded) = entry.loaded() {
                    loader.set(&entry, Status::Absent);
                    loader.unload(&entry, loaded.id).await;
                }
            });
        }
        keepers.close();
        keepers.wait().await;
        self.blocking.close();
        self.blocking.wait().await;
    }

    /// Returns a served model once it answers, loading it if need be.
    pub(crate) async fn resident(&self, entry: &Entry) -> Result<LoadedModel, LoadFailed> {
        if let Some(loaded) = entry.loaded() {
            return Ok(loaded);
        }
        entry.wanted.notify_one();
        Self::settled(entry, |_| true).await
    }

    /// Returns a served model once it answers on another engine than one that is gone.
    pub(crate) async fn resident_after(&self, entry: &Entry, gone: ModelId) -> Result<LoadedModel, LoadFailed> {
        Self::settled(entry, |loaded| loaded.id != gone).await
    }

    async fn settled(entry: &Entry, is_wanted: impl Fn(&LoadedModel) -> bool) -> Result<LoadedModel, LoadFailed> {
        let mut status = entry.status.subscribe();
        let has_settled = |status: &Status| match status {
            Status::Ready(loaded) => is_wanted(loaded),
            Status::Failed(_) => true,
            Status::Absent | Status::Loading(_) => false,
        };
        let settled = status.wait_for(has_settled).await;
        match settled.as_deref() {
            Ok(Status::Ready(loaded)) => Ok(loaded.clone()),
            Ok(Status::Failed(reason)) => Err(LoadFailed { reason: reason.clone() }),
            _ => Err(LoadFailed { reason: "the worker is stopping".into() }),
        }
    }

    /// Looks at the engines, and notices those that are gone.
    pub(crate) fn observe(&self) -> Observation {
        // The list comes first: a model that is loaded meanwhile must not look dead.
        let ready: Vec<_> = self.cache.ready().into_iter().map(|(key, loaded)| (key, loaded.id)).collect();
        let snapshots = self.runtime.load_state();
        for (key, id) in &ready {
            if !is_listed(&snapshots, *id)
                && let Some(entry) = self.cache.find(key)
            {
                entry.bury(*id, "its process is gone");
            }
        }
        Observation { ready, snapshots }
    }

    /// Takes note that a job failed on an engine.
    pub(crate) fn job_failed(&self, entry: &Entry, id: ModelId, error: &EngineError) {
        let dead = match error {
            EngineError::NotLoaded | EngineError::Crashed { .. } => true,
            // One request may fail by itself; an engine that fails them all is as good as dead.
            EngineError::Failed { .. } => !is_listed(&self.runtime.load_state(), id) || entry.strike() >= STRIKES_MAX,
            _ => false,
        };
        if dead {
            entry.bury(id, error.to_string());
        }
    }

    /// Returns whether an engine failed a job because it was gone already, and not because of the job.
    pub(crate) fn is_gone(&self, id: ModelId, error: &EngineError) -> bool {
        match error {
            EngineError::NotLoaded => true,
            EngineError::Failed { .. } => !is_listed(&self.runtime.load_state(), id),
            _ => false,
        }
    }

    /// Returns an adapter of a model that answers, and attaches it first if need be: once, however many jobs want it.
    pub(crate) async fn attach(
        &self,
        entry: &Entry,
        model: ModelId,
        adapter: &ServedAdapter,
    ) -> Result<(AdapterId, Lease), LoadError> {
        let lease = entry.adapters.lease(model, &adapter.name).await.ok_or(EngineError::NotLoaded)?;
        let attaching = lease.id.get_or_try_init(|| async {
            while let Some(evicted) = entry.adapters.evicted(model) {
                // What is left of it does no harm, and goes with the engine.
                if let Err(error) = self.runtime.remove_adapter(model, evicted).await {
                    debug!(model = %entry.key, %error, "an adapter could not be taken off");
                }
                entry.adapters.removed(model, evicted);
            }
            let artifact = self.open(adapter.digest).await?;
            let id = self.runtime.add_adapter(model, artifact).await?;
            info!(model = %entry.key, adapter = %adapter.name, "the adapter is attached");
            Ok::<_, LoadError>(id)
        });
        let id = *attaching.await.inspect_err(|error| self.count(error))?;
        self.changes.send_replace(());
        Ok((id, lease))
    }

    /// Loads one model, waits for its death, and begins again.
    async fn keep(&self, entry: &Arc<Entry>) {
        let mut backoff = Backoff::new(self.options.seed ^ digest_seed(entry));
        // What was said of the failures in a row, so that each is said once.
        let mut complaint = None;
        if !self.options.preload {
            tokio::select! {
                () = entry.wanted.notified() => {}
                () = self.offer_unloaded(entry) => {}
            }
        }
        // How long the last load took.
        let mut took = None;
        self.set(entry, Status::Loading(Load::begin(took)));
        loop {
            let begun = Instant::now();
            let loaded = self.load(entry).await;
            let wait = match loaded {
                Ok((loaded, offer)) => {
                    let since = Instant::now();
                    took = Some(since - begun);
                    let id = loaded.id;
                    let LoadedModel { pid, context_length, kv_tokens, slots, .. } = loaded;
                    info!(model = %entry.key, pid, "the model is ready");
                    if kv_tokens > 0 {
                        info!(
                            model = %entry.key,
                            "a job holds up to {context_length} tokens, and the {slots} slots share {kv_tokens}; \
                             context_length and kv_tokens of the model change that, and with it the memory it takes"
                        );
                    }
                    complaint = None;
                    entry.forgive();
                    entry.set_ready(loaded);
                    self.changes.send_replace(());
                    let (cause, is_reloaded) = tokio::select! {
                        cause = entry.died(id) => {
                            self.metrics.engine_deaths.get_or_create(&label(&entry.key)).inc();
                            warn!(model = %entry.key, %cause, "the engine died");
                            (cause, true)
                        }
                        refusal = self.offer_until_listed(offer) => {
                            warn!(model = %entry.key, %refusal, "the model gets no jobs");
                            (refusal.to_string().into(), false)
                        }
                    };
                    if since.elapsed() >= STEADY {
                        backoff.reset();
                    }
                    let wait = backoff.next();
                    let status = if is_reloaded && wait <= RELOAD_SOON {
                        Status::Loading(Load::begin(took.map(|took| took + wait)))
                    } else {
                        Status::Failed(cause)
                    };
                    self.set(entry, status);
                    // What is left of it may still hold memory, or a job.
                    self.unload(entry, id).await;
                    wait
                }
                Err(error) => {
                    self.count(&error);
                    let kind = (mem::discriminant(&error), error.engine());
                    if complaint.replace(kind) == Some(kind) {
                        debug!(model = %entry.key, %error, "the model could not be loaded again");
                    } else {
                        warn!(model = %entry.key, %error, "the model could not be loaded; it is tried again and again");
                    }
                    self.set(entry, Status::Failed(error.to_string().into()));
                    backoff.next()
                }
            };
            time::sleep(wait).await;
            if !matches!(*entry.status.borrow(), Status::Loading(_)) {
                self.set(entry, Status::Loading(Load::begin(took)));
            }
        }
    }

    /// Offers a model again and again until it is listed; then waits for ever. Returns why it will not be listed.
    async fn offer_until_listed(&self, offer: Option<ModelOffer>) -> OfferError {
        while let Some(offer) = &offer {
            time::sleep(OFFER_EVERY).await;
            match self.remote.offers.make(offer, REGISTRY_WITHIN).await {
                Ok(()) => break,
                Err(refusal @ OfferError::Refused(_)) => return refusal,
                Err(OfferError::NoRegistry) => {}
            }
        }
        std::future::pending().await
    }

    /// Offers a model that is loaded at its first job, which only comes once clients can name it.
    async fn offer_unloaded(&self, entry: &Entry) {
        match self.describe(entry).await {
            Ok(Some(offer)) => {
                if let Err(error) = self.remote.offers.make(&offer, REGISTRY_WITHIN).await {
                    debug!(model = %entry.key, %error, "the model is not listed yet");
                    let refusal = self.offer_until_listed(Some(offer)).await;
                    warn!(model = %entry.key, %refusal, "the model gets no jobs");
                }
            }
            Ok(None) => {}
            Err(error) => warn!(model = %entry.key, %error, "the model cannot be offered"),
        }
        std::future::pending::<()>().await;
    }

    /// Returns the offer of a model's artifact, read from its header. A server's model is offered when it is attached.
    async fn describe(&self, entry: &Entry) -> Result<Option<ModelOffer>, LoadError> {
        if entry.model.remote.is_some() {
            return Ok(None);
        }
        let artifact = self.open(entry.model.digest()).await?;
        let (file, bytes) = (artifact.file, artifact.bytes);
        let header = self.blocking.spawn_blocking(move || Header::read(&file)).await;
        let header = header.map_err(|_| LoadError::Interrupted)?;
        let header = header.map_err(|error| EngineError::InvalidModel { reason: error.to_string() })?;
        let trained = header.context_length().unwrap_or_default();
        let context_length = match entry.model.context_length {
            0 => trained.min(CONTEXT_DEFAULT),
            set => set,
        };
        Ok(Some(offer_of(entry, bytes, context_length)))
    }

    /// Loads a model and offers it. Returns the offer where no registry has listed it yet.
    async fn load(&self, entry: &Arc<Entry>) -> Result<(LoadedModel, Option<ModelOffer>), LoadError> {
        let (loaded, bytes) = self.load_unlisted(entry).await?;
        // A server's model was offered when it was attached.
        let Some(bytes) = bytes else { return Ok((loaded, None)) };
        let offer = offer_of(entry, bytes, loaded.context_length);
        match self.remote.offers.make(&offer, REGISTRY_WITHIN).await {
            Ok(()) => Ok((loaded, None)),
            Err(OfferError::NoRegistry) => Ok((loaded, Some(offer))),
            Err(refusal) => {
                self.unload(entry, loaded.id).await;
                Err(AttachError::from(refusal).into())
            }
        }
    }

    /// Loads a model. Returns the length of its artifact beside it, where it has one.
    async fn load_unlisted(&self, entry: &Arc<Entry>) -> Result<(LoadedModel, Option<u64>), LoadError> {
        let options = LoadOptions {
            context_length: entry.model.context_length,
            slots: self.options.slots,
            queue_max: self.options.queue_max,
            threads: entry.model.threads,
            gpu_layers: entry.model.gpu_layers,
            kv_tokens: entry.model.kv_tokens,
            prompt_cache_bytes: entry.model.prompt_cache_mib.saturating_mul(1 << 20),
            draft_tokens: entry.model.draft_tokens,
            kernels: match entry.model.kernels {
                config::Kernels::Auto => Kernels::Auto,
                config::Kernels::Off => Kernels::Off,
            },
            ..LoadOptions::default()
        };
        if let Some(server) = &entry.model.remote {
            return Ok((self.remote.attach(&entry.key, server, &options).await?, None));
        }
        let artifact = self.open(entry.model.digest()).await?;
        let bytes = artifact.bytes;
        entry.opened(bytes);
        if !entry.model.server_command.is_empty() {
            let loaded = self.remote.start(&entry.model.server_command, artifact.file, &options).await?;
            return Ok((loaded, Some(bytes)));
        }
        let artifact = match entry.model.pinned() {
            Some(adapter) => self.merged(entry, artifact, adapter).await?,
            None => artifact,
        };
        Ok((self.runtime.load(artifact, options, self.progress_of(entry)).await?, Some(bytes)))
    }

    /// Merges the pinned adapter of a model into it, where its weights can hold it.
    async fn merged(
        &self,
        entry: &Entry,
        model: VerifiedArtifact,
        adapter: &ServedAdapter,
    ) -> Result<VerifiedArtifact, LoadError> {
        entry.set_merged(false);
        let opened = self.open(adapter.digest).await?;
        let artifacts = self.artifacts.clone();
        let scratch = self.blocking.spawn_blocking(move || artifacts.scratch()).await;
        let scratch = scratch.map_err(|_| LoadError::Interrupted)?.map_err(LoadError::Scratch)?;
        let merged = match engine::merge::merge(&model, &opened, scratch).await? {
            Merge::Done(merged) => merged,
            Merge::Refused(reason) => {
                info!(model = %entry.key, adapter = %adapter.name, reason, "the adapter stays beside the weights");
                return Ok(model);
            }
        };
        info!(model = %entry.key, adapter = %adapter.name, "the adapter is merged into the weights");
        entry.set_merged(true);
        Ok(merged)
    }

    /// Returns what notes the progress of a load, and has it reported now and then.
    fn progress_of(&self, entry: &Arc<Entry>) -> ProgressSink {
        let (entry, changes, told) = (entry.clone(), self.changes.clone(), Mutex::new(Instant::now()));
        Box::new(move |share| {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            if entry.progressed(share) && told.elapsed() >= PROGRESS_EVERY {
                *told = Instant::now();
                changes.send_replace(());
            }
        })
    }

    async fn open(&self, digest: Digest) -> Result<VerifiedArtifact, LoadError> {
        let artifacts = self.artifacts.clone();
        let opened = self.blocking.spawn_blocking(move || artifacts.open(&digest)).await;
        let VerifiedFile { file, digest, bytes } = opened.map_err(|_| LoadError::Interrupted)??;
        Ok(VerifiedArtifact { file, sha256: digest.to_string(), bytes, parts: Vec::new() })
    }

    fn count(&self, error: &LoadError) {
        if matches!(error, LoadError::Artifact(OpenError::Mismatch { .. })) {
            self.metrics.artifact_verify_failures.inc();
        }
    }

    async fn unload(&self, entry: &Entry, id: ModelId) {
        match time::timeout(UNLOAD_WITHIN, self.runtime.unload(id)).await {
            // An engine that is gone has nothing to unload.
            Ok(Ok(()) | Err(EngineError::NotLoaded)) => {}
            Ok(Err(error)) => warn!(model = %entry.key, %error, "the model could not be unloaded"),
            Err(_) => warn!(model = %entry.key, "the model was not unloaded in time"),
        }
        self.remote.end(id);
    }

    fn set(&self, entry: &Entry, status: Status) {
        entry.status.send_replace(status);
        self.changes.send_replace(());
    }
}

impl fmt::Debug for ModelLoader {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ModelLoader").field("cache", &self.cache).finish_non_exhaustive()
    }
}

fn is_listed(snapshots: &[LoadSnapshot], id: ModelId) -> bool {
    snapshots.iter().any(|snapshot| snapshot.model == id)
}

/// Returns the offer of a model's artifact.
fn offer_of(entry: &Entry, bytes: u64, context_length: u32) -> ModelOffer {
    let source = OfferedSource::Artifact { digest: entry.model.digest(), bytes };
    ModelOffer { key: entry.key.clone(), source, context_length }
}

/// Returns the label under which a model is counted; versions are counted together.
pub(crate) fn label(key: &ModelKey) -> ModelLabel {
    ModelLabel { model: key.model_id.to_string() }
}

fn digest_seed(entry: &Entry) -> u64 {
    entry.model.digest().0.chunks_exact(8).fold(0, |seed, chunk| seed ^ u64_of(chunk))
}

/// Returns eight bytes as a number, and fewer as well.
pub(crate) fn u64_of(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Waits that double, each cut by up to a half, so that workers that failed together do not retry together.
struct Backoff {
    random: u64,
    failures: u32,
}

impl Backoff {
    fn new(seed: u64) -> Self {
        Self { random: seed, failures: 0 }
    }

    fn reset(&mut self) {
        self.failures = 0;
    }

    fn next(&mut self) -> Duration {
        let whole = BACKOFF_FIRST.saturating_mul(1 << self.failures.min(20)).min(BACKOFF_MAX);
        self.failures += 1;
        // SplitMix64, by Steele, Lea and Flood.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let fraction = (mixed >> 11) as f64 / (1_u64 << 53) as f64;
        whole.mul_f64(1.0 - fraction / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_half_a_minute() {
        let mut backoff = Backoff::new(7);
        let mut whole = BACKOFF_FIRST;
        for _ in 0..40 {
            let wait = backoff.next();
            assert!(wait <= whole && wait >= whole / 2, "{wait:?} of {whole:?}");
            whole = (whole * 2).min(BACKOFF_MAX);
        }
        backoff.reset();
        assert!(backoff.next() <= BACKOFF_FIRST);
    }

    #[test]
    fn waits_repeat_from_their_seed_and_differ_between_seeds() {
        let waits = |seed| {
            let mut backoff = Backoff::new(seed);
            (0..8).map(|_| backoff.next()).collect::<Vec<_>>()
        };
        assert_eq!(waits(1), waits(1));
        assert_ne!(waits(1), waits(2));
    }
}

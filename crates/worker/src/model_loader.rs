//! Loads models into memory: verified, once each, and again when their engine dies.
//!
//! Each model has one keeper, the only task that loads and unloads it. However many jobs want a model, it is loaded
//! once, and they all wait for the same load.

pub(crate) mod adapters;
pub(crate) mod cache;
mod residency;
mod warm_prefixes;

use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fmt, io, mem};

use artifact_store::{ArtifactStore, InUse, OpenError, VerifiedFile};
use engine::gguf::Header;
use engine::hardware::{self, Hardware};
use engine::memory_plan::{self, CONTEXT_DEFAULT, VRAM_SPARED_BYTES};
use engine::merge::Merge;
use engine::{
    AdapterId, DevicePlacement, EngineError, Kernels, LoadOptions, LoadSnapshot, LoadedModel, ModelId, ModelRuntime,
    ProgressSink, VerifiedArtifact,
};
use observability::metrics::ModelLabel;
use parking_lot::Mutex;
use protocol::Digest;
use protocol::control::ResidencyState;
use protocol::model::{ModelFacts, ModelKey, ModelOffer, OfferedSource};
use rpc::backoff::Backoff;
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use adapters::AdapterGuard;
use cache::{Entry, Hold, Load, ModelCache, Status};
use residency::{Memory, Order, Residency, ResidencyFacts};

use crate::config::{self, RemoteServer, ServedAdapter, ServedModel};
use crate::device_report;
use crate::disk_calls::DiskCalls;
use crate::fetcher::{FetchError, Fetcher};
use crate::metrics::Metrics;
use crate::model_facts;
use crate::offers::OfferError;
use crate::remote_models::{AttachError, RemoteModels};

/// The wait after the first failure; it doubles with each further one.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// An engine that lived this long resets the backoff.
const STEADY: Duration = Duration::from_mins(1);
/// A dead engine's model that is reloaded within this time counts as loading, so that jobs wait for it.
const RELOAD_SOON: Duration = Duration::from_secs(1);
/// Consecutive failures after which an engine that seems alive is replaced.
const STRIKES_MAX: u32 = 3;
/// How often the progress of a load is reported.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long an unload may take before it is given up.
const UNLOAD_WITHIN: Duration = Duration::from_secs(5);
/// How long a model that an operator asks for may wait for memory.
const OPERATOR_LOAD_TIMEOUT: Duration = Duration::from_mins(10);
/// How long to wait for a registry before a model is served unlisted. A model that is listed already needs none.
const REGISTRY_WITHIN: Duration = Duration::from_millis(500);
/// How often a model is offered while no registry responds.
const OFFER_EVERY: Duration = Duration::from_secs(5);

/// Loads the models of one worker and keeps them loaded.
pub(crate) struct ModelLoader {
    cache: ModelCache,
    options: LoaderOptions,
    /// GPU memory that models may take together, in bytes; not set without a GPU.
    vram: OnceLock<u64>,
    runtime: Arc<dyn ModelRuntime>,
    remote: RemoteModels,
    artifacts: ArtifactStore,
    fetcher: Fetcher,
    metrics: Metrics,
    changes: watch::Sender<()>,
    /// False while the worker is paused.
    may_load: watch::Sender<bool>,
    /// Verification waits for the disk.
    disk: DiskCalls,
    /// One task for each model.
    keepers: TaskTracker,
    life: CancellationToken,
}

/// How models are loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoaderOptions {
    /// Sequences that run concurrently.
    pub(crate) slots: u32,
    /// The most requests that an engine may queue.
    pub(crate) queue_max: u32,
    /// Loads models at the start rather than at the first job.
    pub(crate) preload: bool,
    /// Memory that all models may take together, in bytes; `None` for what the machine has free.
    pub(crate) memory_max: Option<u64>,
    /// GPU memory that all models may take together, in bytes; `None` for what is free at the start.
    pub(crate) vram_max: Option<u64>,
    /// Whether engines close their sandbox.
    pub(crate) sandbox: bool,
    /// Nice value of engines.
    pub(crate) nice: u8,
    /// Seed of the retries' jitter, so that a run is repeatable and workers differ.
    pub(crate) seed: u64,
}

/// The model is unavailable here for the time being.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the model could not be loaded: {reason}")]
pub(crate) struct LoadFailed {
    /// The reason, for this node's log.
    pub(crate) reason: Arc<str>,
}

/// Load of the engines at one moment.
pub(crate) struct Observation {
    /// The models that are ready.
    pub(crate) ready: Vec<(ModelKey, ModelId)>,
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
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("no file for a merged model could be made: {0}")]
    Scratch(io::Error),
    #[error("the verification did not end")]
    Interrupted,
    #[error(
        "gpu_layers asks for {needed_mib} MiB of the GPU, of which {available_mib} MiB can be had; \
         without gpu_layers as many layers are placed there as fit"
    )]
    OutOfVram { needed_mib: u64, available_mib: u64 },
}

/// What a load needs.
struct Prepared {
    source: Source,
    options: LoadOptions,
    /// The memory it takes, in bytes.
    bytes: u64,
    /// The memory it takes with the shortest context that its settings allow, in bytes.
    bytes_min: u64,
    /// The GPU memory that it takes with every layer that may be on a GPU, in bytes.
    vram_bytes: u64,
    /// Protects its file from eviction, if it was fetched.
    in_use: Option<InUse>,
}

/// What serves a model.
enum Source {
    Artifact(VerifiedArtifact),
    Server(RemoteServer),
}

/// Why a loaded model stopped serving.
enum End {
    /// Its engine died, for this reason.
    Died(Arc<str>),
    /// The registry refused to list it.
    Refused(Arc<str>),
    /// It was unloaded, to free memory or because it was idle.
    Left,
}

impl LoadError {
    /// Returns the kind of an engine's error.
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
        fetcher: Fetcher,
        metrics: Metrics,
        changes: watch::Sender<()>,
    ) -> Self {
        let artifacts = fetcher.store().clone();
        let (disk, keepers, life) = (DiskCalls::on_threads(), TaskTracker::new(), CancellationToken::new());
        let (vram, may_load) = (OnceLock::new(), watch::Sender::new(true));
        Self {
            cache,
            options,
            vram,
            runtime,
            remote,
            artifacts,
            fetcher,
            metrics,
            changes,
            may_load,
            disk,
            keepers,
            life,
        }
    }

    pub(crate) fn with_disk_calls(self, disk: DiskCalls) -> Self {
        Self { disk, ..self }
    }

    /// Sets the GPU memory that models may take. Called before any model is loaded.
    pub(crate) fn set_hardware(&self, hardware: &Hardware) {
        if !hardware.gpus().is_empty() {
            let free_bytes = hardware::free_gpu_bytes(&hardware.devices);
            let _ = self.vram.set(self.options.vram_max.map_or(free_bytes, |most| most.min(free_bytes)));
        }
    }

    pub(crate) fn cache(&self) -> &ModelCache {
        &self.cache
    }

    /// Returns whether a model is loaded before any job asks for it.
    pub(crate) fn preloads(&self, entry: &Entry) -> bool {
        entry.model.pin == Some(true) || self.options.preload && !entry.model.is_listed
    }

    /// Keeps every model until `stop`, then unloads them.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        self.look_at_files();
        for entry in self.cache.entries().iter() {
            self.clone().spawn_keeper(entry.clone());
        }
        stop.run_until_cancelled(self.assign_memory()).await;
        self.life.cancel();
        self.keepers.close();
        self.keepers.wait().await;
        self.disk.end().await;
    }

    /// Starts to serve a further model. The registry must list its file.
    pub(crate) fn take_up(self: &Arc<Self>, model: ServedModel) {
        let entry = self.cache.add(model);
        self.look_at_files();
        self.clone().spawn_keeper(entry);
        self.changes.send_replace(());
    }

    /// Stops serving a model.
    pub(crate) fn let_go(&self, key: &ModelKey) {
        self.cache.remove(key);
        self.changes.send_replace(());
    }

    /// Loads a model as a job would, and returns its present state. `keep_alive_secs` is how long it stays without
    /// work; with 0 it is unloaded instead.
    pub(crate) fn bring(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        keep_alive_secs: Option<i64>,
    ) -> (ResidencyState, Option<String>) {
        if let Some(secs) = keep_alive_secs {
            entry.keep_for(secs);
            if secs == 0 {
                return entry.send_out();
            }
        }
        let status = entry.status.borrow().clone();
        match status {
            Status::Ready(_) => (ResidencyState::Loaded, None),
            // It would be loaded and unloaded again and again.
            Status::Absent if entry.leaves_at_once() => {
                let why =
                    "its keep_alive is 0, so that it would leave at once; give it one (--keep-alive 10m), or pin it";
                (ResidencyState::Unloaded, Some(why.into()))
            }
            Status::Failed(reason) => (ResidencyState::Failed, Some(reason.to_string())),
            Status::Loading(_) => (ResidencyState::Loading, None),
            Status::Absent => {
                let (loader, entry) = (self.clone(), entry.clone());
                self.keepers.spawn(async move {
                    let load = time::timeout(OPERATOR_LOAD_TIMEOUT, loader.resident(&entry));
                    // The list of models shows the outcome.
                    let _ = loader.life.run_until_cancelled(load).await;
                });
                (ResidencyState::Loading, None)
            }
        }
    }

    /// From now on loads no model.
    pub(crate) fn hold_loads(&self) {
        self.may_load.send_replace(false);
    }

    /// Unloads the models that no job uses, also pinned ones.
    pub(crate) fn clear_memory(&self) {
        for entry in self.cache.entries().iter().filter(|entry| entry.loaded().is_some()) {
            entry.send_out();
        }
    }

    /// Loads models again, at once those that are in memory without any job asking for them.
    pub(crate) fn restore_memory(self: &Arc<Self>) {
        self.may_load.send_replace(true);
        let is_kept = |entry: &&Arc<Entry>| self.preloads(entry) || entry.facts().is_pinned;
        for entry in self.cache.entries().iter().filter(is_kept) {
            self.bring(entry, None);
        }
    }

    /// Returns whether no job uses a model.
    pub(crate) fn is_unused(&self, key: &ModelKey) -> bool {
        self.cache.find(key).is_none_or(|entry| entry.is_unused())
    }

    /// Returns whether an artifact is here. Its bytes are verified when it is loaded.
    pub(crate) fn has_artifact(&self, digest: &Digest) -> bool {
        self.artifacts.contains(digest)
    }

    /// Returns whether this worker could serve a model whose file is not here: it can fetch the file, and the model
    /// fits in its memory.
    pub(crate) fn could_fetch(&self, digest: &Digest) -> bool {
        let Some(file) = self.fetcher.fetchable(digest) else { return false };
        file.memory_min <= self.most_memory().host && self.fetcher.could_take(digest, file.bytes)
    }

    /// Records which models have no file here and must be fetched.
    pub(crate) fn look_at_files(&self) {
        let mut is_news = false;
        for entry in self.cache.entries().iter().filter(|entry| entry.model.remote.is_none()) {
            let digest = entry.model.digest();
            let is_here = self.artifacts.contains(&digest);
            is_news |= entry.set_to_fetch(!is_here && self.fetcher.fetchable(&digest).is_some());
        }
        if is_news {
            self.changes.send_replace(());
        }
    }

    /// Returns the fetched files, complete or not.
    pub(crate) fn fetched_files(&self) -> Vec<Digest> {
        self.fetcher.kept().unwrap_or_default()
    }

    /// Deletes the fetched files for which `is_over` holds and that no served model needs.
    pub(crate) async fn clear_files(&self, is_over: impl Fn(&Digest) -> bool) {
        let entries = self.cache.entries();
        let is_served = |digest: &Digest| {
            let has = |model: &ServedModel| {
                model.digest() == *digest || model.adapters.iter().any(|adapter| adapter.digest == *digest)
            };
            entries.iter().any(|entry| has(&entry.model))
        };
        match self.fetcher.clear(|digest| is_over(digest) && !is_served(digest)).await {
            Ok(gone) => {
                for digest in gone {
                    info!(%digest, "deleted a fetched file that is no longer listed");
                }
            }
            Err(error) => warn!(%error, "files that were fetched could not be deleted"),
        }
    }

    /// Returns the memory that a model could have if all others that may be unloaded were unloaded.
    fn most_memory(&self) -> Memory {
        let models: Vec<ResidencyFacts> = self.cache.all_entries().iter().map(|entry| entry.facts().clone()).collect();
        residency::most(&models, self.memory(&models))
    }

    fn spawn_keeper(self: Arc<Self>, entry: Arc<Entry>) {
        self.keepers.clone().spawn(async move {
            let ended = async {
                entry.retired.cancelled().await;
                entry.is_free().await;
            };
            tokio::select! {
                () = self.life.cancelled() => {}
                () = ended => {}
                () = self.keep(&entry) => {}
            }
            if let Some(loaded) = entry.loaded() {
                self.set(&entry, Status::Absent);
                self.unload(&entry, loaded.id).await;
            }
            self.cache.forget(&entry);
        });
    }

    /// Repeatedly decides which models stay in memory.
    async fn assign_memory(&self) {
        loop {
            let entries = self.cache.all_entries();
            let models: Vec<ResidencyFacts> = entries.iter().map(|entry| entry.facts().clone()).collect();
            // Memory is measured only if a model asks for it: measuring takes longer than the decision.
            let wants_memory = models.iter().any(|model| model.residency == Residency::WaitingForMemory);
            let room = if wants_memory { self.memory(&models) } else { Memory { host: 0, gpu: 0 } };
            let decision = residency::decide(&models, room, Instant::now());
            for (index, order) in decision.orders {
                entries[index].obey(order);
            }
            tokio::select! {
                () = self.cache.stirred.notified() => {}
                () = sleep_until(decision.look_again) => {}
            }
        }
    }

    /// Returns the memory that a further model can have: what the others leave of the configured limit, and at most
    /// nine tenths of what the machine has.
    fn memory(&self, models: &[ResidencyFacts]) -> Memory {
        let holding =
            || models.iter().filter(|model| matches!(model.residency, Residency::Loaded(_) | Residency::Changing));
        let sum = |bytes: fn(&ResidencyFacts) -> u64| holding().map(bytes).fold(0, u64::saturating_add);
        let left = self.options.memory_max.map(|most| most.saturating_sub(sum(|model| model.bytes)));
        let free = hardware::free_memory_bytes().map(|bytes| bytes - bytes / 10);
        Memory {
            host: left.into_iter().chain(free).min().unwrap_or(u64::MAX),
            gpu: self.vram.get().map_or(u64::MAX, |most| most.saturating_sub(sum(|model| model.vram_bytes))),
        }
    }

    /// Returns a hold on a served model once it is ready, and loads it if need be.
    pub(crate) async fn resident(&self, entry: &Arc<Entry>) -> Result<Hold, LoadFailed> {
        match entry.hold() {
            Some(hold) => Ok(hold),
            None => Self::held(entry, |_| true).await,
        }
    }

    /// Returns a hold on a served model once it is ready on another engine than `gone`.
    pub(crate) async fn resident_after(&self, entry: &Arc<Entry>, gone: ModelId) -> Result<Hold, LoadFailed> {
        Self::held(entry, |loaded| loaded.id != gone).await
    }

    async fn held(entry: &Arc<Entry>, is_wanted: impl Fn(&LoadedModel) -> bool) -> Result<Hold, LoadFailed> {
        let _waiting = entry.wait();
        let mut status = entry.status.subscribe();
        loop {
            if let Status::Failed(reason) = &*status.borrow_and_update() {
                return Err(LoadFailed { reason: reason.clone() });
            }
            if let Some(hold) = entry.hold().filter(|hold| is_wanted(&hold.loaded)) {
                return Ok(hold);
            }
            tokio::select! {
                _ = status.changed() => {}
                () = entry.retired.cancelled() => {
                    return Err(LoadFailed { reason: "the model is no longer served".into() });
                }
            }
        }
    }

    /// Observes the engines, and detects those that are gone.
    pub(crate) fn observe(&self) -> Observation {
        // The list is read first: a model that is loaded meanwhile must not look dead.
        let ready: Vec<_> = self.cache.ready().into_iter().map(|(key, loaded)| (key, loaded.id)).collect();
        let snapshots = self.runtime.load_state();
        for (key, id) in &ready {
            if !is_listed(&snapshots, *id)
                && let Some(entry) = self.cache.find(key)
            {
                entry.declare_dead(*id, "its process is gone");
            }
        }
        Observation { ready, snapshots }
    }

    /// Records that a job failed on an engine.
    pub(crate) fn job_failed(&self, entry: &Entry, id: ModelId, error: &EngineError) {
        let dead = match error {
            EngineError::NotLoaded | EngineError::Killed { .. } | EngineError::Crashed { .. } => true,
            // One request may fail by itself; an engine that fails every request is as good as dead.
            EngineError::Failed { .. } => !is_listed(&self.runtime.load_state(), id) || entry.strike() >= STRIKES_MAX,
            _ => false,
        };
        if dead {
            entry.declare_dead(id, error.to_string());
        }
    }

    /// Returns whether a job failed because the engine was already gone, and not because of the job.
    pub(crate) fn is_gone(&self, id: ModelId, error: &EngineError) -> bool {
        match error {
            EngineError::NotLoaded => true,
            EngineError::Failed { .. } | EngineError::Killed { .. } => !is_listed(&self.runtime.load_state(), id),
            _ => false,
        }
    }

    /// Returns an adapter of a ready model, and attaches it first if need be: once, however many jobs want it.
    pub(crate) async fn attach(
        &self,
        entry: &Entry,
        model: ModelId,
        adapter: &ServedAdapter,
    ) -> Result<(AdapterId, AdapterGuard), LoadError> {
        let guard = entry.adapters.acquire(model, &adapter.name).await.ok_or(EngineError::NotLoaded)?;
        let attaching = guard.id.get_or_try_init(|| async {
            while let Some(evicted) = entry.adapters.evicted(model) {
                // An adapter that could not be removed does no harm, and goes with the engine.
                if let Err(error) = self.runtime.remove_adapter(model, evicted).await {
                    debug!(model = %entry.key, %error, "an adapter could not be taken off");
                }
                entry.adapters.removed(model, evicted);
            }
            let artifact = self.obtain(adapter.digest, &|_, _, _| {}).await?;
            let id = self.runtime.add_adapter(model, artifact).await?;
            info!(model = %entry.key, adapter = %adapter.name, "the adapter is attached");
            Ok::<_, LoadError>(id)
        });
        let id = *attaching.await.inspect_err(|error| self.count(error))?;
        self.changes.send_replace(());
        Ok((id, guard))
    }

    /// Loads one model whenever it is wanted and fits, waits until it dies or is unloaded, and starts over.
    async fn keep(&self, entry: &Arc<Entry>) {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX, self.options.seed ^ digest_seed(entry));
        // The last failure that was logged, so that a repeated one is logged once.
        let mut complaint = None;
        let mut is_wanted = self.preloads(entry);
        let mut is_offered = entry.model.is_listed;
        // How long the last load took.
        let mut took = None;
        loop {
            if !is_wanted && !entry.is_waited_for() {
                tokio::select! {
                    () = entry.wanted() => {}
                    () = self.offer_unloaded(entry), if !is_offered => {}
                }
            }
            // The sender lives as long as this loader.
            let _ = self.may_load.subscribe().wait_for(|may| *may).await;
            if !matches!(*entry.status.borrow(), Status::Loading(_)) {
                self.set(entry, Status::Loading(Load::begin(took)));
            }
            let mut in_use = None;
            let ended = match self.prepare(entry).await {
                Ok(mut prepared) => match self.wait_for_memory(entry, &mut prepared).await {
                    Ok(true) => {
                        in_use = prepared.in_use.take();
                        let begun = Instant::now();
                        let loaded = self.load(entry, prepared).await;
                        took = loaded.is_ok().then(|| begun.elapsed()).or(took);
                        loaded
                    }
                    Ok(false) => {
                        is_wanted = false;
                        entry.stay_out();
                        self.set(entry, Status::Absent);
                        continue;
                    }
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            let wait = match ended {
                Ok((loaded, offer)) => {
                    complaint = None;
                    is_offered |= offer.is_none();
                    let since = Instant::now();
                    let (id, end) = (loaded.id, self.serve(entry, loaded, offer).await);
                    if since.elapsed() >= STEADY {
                        backoff.reset();
                    }
                    let (status, wait) = match end {
                        End::Left => (Status::Absent, Duration::ZERO),
                        End::Died(cause) => {
                            let wait = backoff.next_wait();
                            let reloaded = Status::Loading(Load::begin(took.map(|took| took + wait)));
                            (if wait <= RELOAD_SOON { reloaded } else { Status::Failed(cause) }, wait)
                        }
                        End::Refused(reason) => (Status::Failed(reason), backoff.next_wait()),
                    };
                    is_wanted = status != Status::Absent;
                    if !is_wanted {
                        entry.stay_out();
                    }
                    self.set(entry, status);
                    entry.move_to(Residency::Changing);
                    // A dead engine's remains may still hold memory, or a job.
                    self.unload(entry, id).await;
                    if in_use.take().is_some() {
                        // Marks the file as used until now.
                        drop(self.in_use(entry.model.digest()).await);
                    }
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
                    is_wanted = true;
                    entry.move_to(Residency::Unloaded);
                    if let LoadError::Engine(EngineError::OutOfMemory { .. }) | LoadError::OutOfVram { .. } = error {
                        self.memory_for(entry, &mut backoff).await;
                    }
                    backoff.next_wait()
                }
            };
            entry.move_to(Residency::Unloaded);
            time::sleep(wait).await;
        }
    }

    /// Waits until a model that did not fit could fit: until then its bytes need not be read and verified.
    async fn memory_for(&self, entry: &Entry, backoff: &mut Backoff) {
        loop {
            time::sleep(backoff.next_wait()).await;
            if self.most_memory().holds(entry.facts().memory_min()) {
                return;
            }
        }
    }

    /// Lets a loaded model run jobs until it dies, is refused or is to be unloaded.
    async fn serve(&self, entry: &Arc<Entry>, loaded: LoadedModel, offer: Option<ModelOffer>) -> End {
        let (id, pid) = (loaded.id, loaded.pid);
        let sandbox = loaded.sandbox.as_ref().map(tracing::field::display);
        info!(model = %entry.key, pid, sandbox, "the model is ready");
        if let Some(line) = device_report::layers_line(&loaded.placement, entry.model.gpu_layers) {
            info!(model = %entry.key, "{line}");
        }
        if loaded.kv_tokens > 0 {
            info!(
                model = %entry.key,
                "{}; context_length and kv_tokens of the model change that, and with it the memory it takes",
                device_report::context_line(&loaded, &entry.model)
            );
        }
        entry.forgive();
        let DevicePlacement { gpu_layers, vram_bytes, .. } = loaded.placement;
        entry.plan_vram(if gpu_layers > 0 { vram_bytes.saturating_add(VRAM_SPARED_BYTES) } else { 0 }, None);
        entry.set_ready(loaded);
        entry.move_to(Residency::Loaded(Instant::now()));
        self.changes.send_replace(());
        tokio::select! {
            cause = entry.died(id) => {
                self.metrics.engine_deaths.get_or_create(&label(&entry.key)).inc();
                warn!(model = %entry.key, %cause, "the engine died");
                End::Died(cause)
            }
            refusal = self.offer_until_listed(offer) => {
                warn!(model = %entry.key, %refusal, "the model gets no jobs");
                End::Refused(refusal.to_string().into())
            }
            _ = entry.ordered() => {
                info!(model = %entry.key, "the model is unloaded; it is loaded again when somebody asks for it");
                End::Left
            }
        }
    }

    /// Waits until there is memory for a model. Returns false if it is not loaded because nobody waits for it.
    async fn wait_for_memory(&self, entry: &Entry, prepared: &mut Prepared) -> Result<bool, LoadError> {
        if matches!(prepared.source, Source::Server(_)) {
            return Ok(true);
        }
        entry.plan(prepared.bytes, prepared.bytes_min);
        // A model gets the GPU layers that its settings ask for, or is not loaded.
        let vram_bytes_min = prepared.options.gpu_layers.map_or(0, |_| prepared.vram_bytes);
        entry.plan_vram(prepared.vram_bytes, Some(vram_bytes_min));
        entry.move_to(Residency::WaitingForMemory);
        match entry.ordered().await {
            Order::Load(room) => {
                // A model that does not fit is shrunk to this memory, and takes no more.
                entry.plan(prepared.bytes.min(room.host), prepared.bytes_min);
                entry.plan_vram(prepared.vram_bytes.min(room.gpu), None);
                prepared.options.fit_bytes = Some(room.host);
                prepared.options.vram_fit_bytes = Some(room.gpu);
                Ok(true)
            }
            Order::Refuse(most) if prepared.bytes_min <= most.host => {
                let (needed_mib, available_mib) = (prepared.vram_bytes >> 20, most.gpu >> 20);
                Err(LoadError::OutOfVram { needed_mib, available_mib })
            }
            Order::Refuse(most) => {
                let (needed_bytes, available_bytes) = (prepared.bytes_min, most.host);
                Err(EngineError::OutOfMemory { needed_bytes, available_bytes }.into())
            }
            _ => {
                let needed = prepared.bytes >> 20;
                info!(model = %entry.key, "the model needs {needed} MiB in addition to the others; it is loaded on request");
                Ok(false)
            }
        }
    }

    /// Offers a model until it is listed. Returns only if the registry refuses it.
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

    /// Offers a model that is loaded at its first job. Clients can send one only after it is listed.
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
        let header = self.disk.run(move || Header::read(&file)).await.ok_or(LoadError::Interrupted)?;
        let header = header.map_err(|error| EngineError::InvalidModel { reason: error.to_string() })?;
        let trained = header.context_length().unwrap_or_default();
        let context_length = match entry.model.context_length {
            0 => trained.min(CONTEXT_DEFAULT),
            set => set,
        };
        Ok(Some(offer_of(entry, bytes, context_length, Some(model_facts::of(&header)))))
    }

    /// Collects what a load needs, and plans its memory.
    async fn prepare(&self, entry: &Entry) -> Result<Prepared, LoadError> {
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
            sandbox: self.options.sandbox,
            nice: self.options.nice,
            ..LoadOptions::default()
        };
        if let Some(server) = entry.model.remote.clone() {
            return Ok(Prepared {
                source: Source::Server(server),
                options,
                bytes: 0,
                bytes_min: 0,
                vram_bytes: 0,
                in_use: None,
            });
        }
        let (artifact, in_use) = self.file_of(entry).await?;
        entry.opened(artifact.bytes);
        let bytes = self.runtime.estimate(&artifact, &options).await?.total_bytes();
        let smallest = memory_plan::smallest(&options);
        let bytes_min = self.runtime.estimate(&artifact, &smallest).await?.total_bytes().min(bytes);
        let vram_bytes = self.vram_bytes(&artifact, &options).await?;
        Ok(Prepared { source: Source::Artifact(artifact), options, bytes, bytes_min, vram_bytes, in_use })
    }

    /// Opens a model's file, and fetches it first if it is not here. The file is not evicted while the returned
    /// [`InUse`] lives.
    async fn file_of(&self, entry: &Entry) -> Result<(VerifiedArtifact, Option<InUse>), LoadError> {
        let digest = entry.model.digest();
        if let Some(file) = self.fetcher.fetchable(&digest).filter(|_| !self.artifacts.contains(&digest)) {
            let available_bytes = self.most_memory().host;
            if file.memory_min > available_bytes {
                // The fetch would be in vain.
                entry.plan(file.memory_min, file.memory_min);
                return Err(EngineError::OutOfMemory { needed_bytes: file.memory_min, available_bytes }.into());
            }
        }
        let reported_at = Mutex::new(None);
        let note = |there: u64, of: u64, begun_with: u64| {
            entry.fetching(there, of, begun_with);
            let mut reported_at = reported_at.lock();
            if reported_at.is_none_or(|reported_at: Instant| reported_at.elapsed() >= PROGRESS_EVERY) {
                *reported_at = Some(Instant::now());
                self.changes.send_replace(());
            }
        };
        let obtained = self.obtain(digest, &note).await;
        self.look_at_files();
        let artifact = obtained?;
        if reported_at.lock().is_some() {
            entry.fetched();
            self.changes.send_replace(());
        }
        Ok((artifact, self.in_use(digest).await))
    }

    /// Marks a file as in use, if it was fetched.
    async fn in_use(&self, digest: Digest) -> Option<InUse> {
        let artifacts = self.artifacts.clone();
        let noted = self.disk.run(move || artifacts.in_use(&digest)).await?;
        // An unmarked file may be evicted while it is used. It stays readable for those who have it open, and is
        // fetched again.
        noted.inspect_err(|error| warn!(%digest, %error, "a fetched file could not be marked as used")).ok()?
    }

    /// Returns the GPU memory that a model takes with every layer that may be on a GPU, in bytes.
    async fn vram_bytes(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<u64, LoadError> {
        let on_gpu = options.gpu_layers.unwrap_or(u32::MAX);
        if self.vram.get().is_none() || on_gpu == 0 {
            return Ok(0);
        }
        let options = LoadOptions { gpu_layers: Some(on_gpu), ..options.clone() };
        let bytes = self.runtime.estimate(artifact, &options).await?.vram_bytes;
        Ok(bytes.saturating_add(VRAM_SPARED_BYTES))
    }

    /// Loads a model and offers it. Returns the offer if no registry has listed it yet.
    async fn load(
        &self,
        entry: &Arc<Entry>,
        prepared: Prepared,
    ) -> Result<(LoadedModel, Option<ModelOffer>), LoadError> {
        let (loaded, file) = self.load_unlisted(entry, prepared).await?;
        // A server's model was offered when it was attached.
        let Some((bytes, facts)) = file else { return Ok((loaded, None)) };
        let offer = offer_of(entry, bytes, loaded.context_length, facts);
        match self.remote.offers.make(&offer, REGISTRY_WITHIN).await {
            Ok(()) => Ok((loaded, None)),
            Err(OfferError::NoRegistry) => Ok((loaded, Some(offer))),
            Err(refusal) => {
                self.unload(entry, loaded.id).await;
                Err(AttachError::from(refusal).into())
            }
        }
    }

    /// Loads a model. Returns the length of its artifact and the facts in it, if it has one.
    async fn load_unlisted(
        &self,
        entry: &Arc<Entry>,
        prepared: Prepared,
    ) -> Result<(LoadedModel, Option<(u64, Option<ModelFacts>)>), LoadError> {
        let Prepared { source, options, .. } = prepared;
        let artifact = match source {
            Source::Artifact(artifact) => artifact,
            Source::Server(server) => return Ok((self.remote.attach(&entry.key, &server, &options).await?, None)),
        };
        let bytes = artifact.bytes;
        let facts = self.facts_of(&artifact).await;
        if !entry.model.server_command.is_empty() {
            let loaded = self.remote.start(&entry.model, &artifact.file, &options).await?;
            return Ok((loaded, Some((bytes, facts))));
        }
        let artifact = match entry.model.pinned() {
            Some(adapter) => self.merged(entry, artifact, adapter).await?,
            None => artifact,
        };
        Ok((self.runtime.load(artifact, options, self.progress_of(entry)).await?, Some((bytes, facts))))
    }

    /// Reads a file's facts about its model. Whether it can be loaded is for the engine to decide.
    async fn facts_of(&self, artifact: &VerifiedArtifact) -> Option<ModelFacts> {
        let file = artifact.file.try_clone().ok()?;
        let header = self.disk.run(move || Header::read(&file)).await?;
        Some(model_facts::of(&header.ok()?))
    }

    /// Merges a model's pinned adapter into its weights, if their format allows it.
    async fn merged(
        &self,
        entry: &Entry,
        model: VerifiedArtifact,
        adapter: &ServedAdapter,
    ) -> Result<VerifiedArtifact, LoadError> {
        entry.set_merged(false);
        let opened = self.obtain(adapter.digest, &|_, _, _| {}).await?;
        let artifacts = self.artifacts.clone();
        let scratch = self.disk.run(move || artifacts.scratch()).await.ok_or(LoadError::Interrupted)?;
        let scratch = scratch.map_err(LoadError::Scratch)?;
        let merged = match engine::merge::merge(&model, &opened, scratch).await? {
            Merge::Done(merged) => merged,
            Merge::Refused(reason) => {
                info!(model = %entry.key, adapter = %adapter.name, reason, "the adapter is not merged into the weights");
                return Ok(model);
            }
        };
        info!(model = %entry.key, adapter = %adapter.name, "the adapter is merged into the weights");
        entry.set_merged(true);
        Ok(merged)
    }

    /// Returns a sink that records the progress of a load and has it reported from time to time.
    fn progress_of(&self, entry: &Arc<Entry>) -> ProgressSink {
        let (entry, changes, reported_at) = (entry.clone(), self.changes.clone(), Mutex::new(Instant::now()));
        Box::new(move |share| {
            let mut reported_at = reported_at.lock();
            if entry.progressed(share) && reported_at.elapsed() >= PROGRESS_EVERY {
                *reported_at = Instant::now();
                changes.send_replace(());
            }
        })
    }

    /// Opens an artifact. If it is missing or damaged, fetches it when another node may have it.
    async fn obtain(
        &self,
        digest: Digest,
        note: &(dyn Fn(u64, u64, u64) + Send + Sync),
    ) -> Result<VerifiedArtifact, LoadError> {
        match self.open(digest).await {
            Err(LoadError::Artifact(error))
                if !matches!(error, OpenError::Read { .. }) && self.fetcher.fetchable(&digest).is_some() =>
            {
                info!(%digest, reason = %error, "a model's file is fetched from another node");
                self.count(&error.into());
                self.fetcher.fetch(&digest, note).await?;
                self.open(digest).await
            }
            opened => opened,
        }
    }

    async fn open(&self, digest: Digest) -> Result<VerifiedArtifact, LoadError> {
        let artifacts = self.artifacts.clone();
        let opened = self.disk.run(move || artifacts.open(&digest)).await;
        let VerifiedFile { file, digest, bytes } = opened.ok_or(LoadError::Interrupted)??;
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

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn is_listed(snapshots: &[LoadSnapshot], id: ModelId) -> bool {
    snapshots.iter().any(|snapshot| snapshot.model == id)
}

/// Returns the offer of a model's artifact.
fn offer_of(entry: &Entry, bytes: u64, context_length: u32, facts: Option<ModelFacts>) -> ModelOffer {
    let source = OfferedSource::Artifact { digest: entry.model.digest(), bytes };
    ModelOffer { key: entry.key.clone(), source, context_length, facts }
}

/// Returns the metrics label of a model; its versions are counted together.
pub(crate) fn label(key: &ModelKey) -> ModelLabel {
    ModelLabel { model: key.model_id.to_string() }
}

fn digest_seed(entry: &Entry) -> u64 {
    entry.model.digest().0.chunks_exact(8).fold(0, |seed, chunk| seed ^ u64_of(chunk))
}

/// Returns up to eight bytes as a big-endian number.
pub(crate) fn u64_of(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

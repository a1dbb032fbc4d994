//! Runs each loaded model in a child process.
//!
//! A failed assertion in C++ or the kernel's out-of-memory killer ends one engine process, not the worker, and all
//! memory of a model is certain to be freed when its process ends. The child's standard input is a socket through
//! which it receives verified files as open descriptors, so it loads exactly the bytes that were verified
//! ([`handover`]). Its standard output is a socket that carries [`frame`]s both ways. The child limits its own
//! memory, because a template can ask for any amount. It inherits no secret ([`environment`]) and no descriptor
//! ([`descriptors`]), and closes itself off before it reads a byte of the model ([`sandbox`]). It is killed when its
//! engine hangs.

mod child_server;
mod descriptors;
mod engine_process;
mod environment;
pub mod frame;
pub mod handover;
pub(crate) mod host_memory;
mod memory_limit;
mod pipe;
mod preflight;
mod resource_limits;
pub(crate) mod sandbox;
mod server_process;
mod spawn;
mod stall_watch;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::hardware::{self, Hardware};
use crate::model_runtime::{
    AdapterId, EmbedRequest, Embeddings, EngineError, GenerateRequest, GenerateStream, ListedToken, LoadOptions,
    LoadSnapshot, LoadedModel, MemoryPlan, ModelId, ModelRuntime, ProgressSink, PromptInput, RerankRequest,
    RuntimeInfo, Scores, TokenListing, VerifiedArtifact,
};
use crate::{gguf, memory_plan};
pub use child_server::{ServeError, serve_child};
pub use descriptors::close_in_children;
use engine_process::{EngineProcess, Loading};
pub use server_process::{ServerCommand, start_server};

/// The number of events of one generation that may be unacknowledged.
const CREDIT: usize = 256;
/// The base time limit for loading a model or adapter.
const LOAD_WITHIN: Duration = Duration::from_mins(5);
/// Additional load time per GiB.
const LOAD_WITHIN_PER_GIB: Duration = Duration::from_secs(20);
/// The time limit for a process to start and say hello; GPU drivers take seconds.
const HELLO_WITHIN: Duration = Duration::from_secs(30);
/// The time limit for unloading before the process is killed.
const UNLOAD_WITHIN: Duration = Duration::from_secs(2);

/// The default time after which an engine with outstanding work and no sign of life counts as hung.
///
/// With a large model on two slow cores, a batch of 512 tokens takes minutes. But an engine shows a sign of life
/// between two operations of a batch, and one operation takes no more than a few seconds.
const STALL_TIMEOUT: Duration = Duration::from_secs(20);

/// The command that starts a process which calls [`serve_child`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildCommand {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// Variables to add to its environment.
    pub envs: Vec<(OsString, OsString)>,
}

/// Runs each model in its own process.
pub struct ProcessRuntime {
    command: ChildCommand,
    stall_timeout: Duration,
    info: Mutex<Option<RuntimeInfo>>,
    models: Arc<Mutex<Models>>,
    next_model: AtomicU64,
    tasks: TaskTracker,
    stop: CancellationToken,
    _stop: DropGuard,
}

type Models = BTreeMap<ModelId, Arc<EngineProcess>>;

impl ProcessRuntime {
    /// Returns a runtime without models. Its processes end when it is dropped.
    pub fn new(command: ChildCommand) -> Self {
        let stop = CancellationToken::new();
        Self {
            command,
            stall_timeout: STALL_TIMEOUT,
            info: Mutex::default(),
            models: Arc::default(),
            next_model: AtomicU64::new(1),
            tasks: TaskTracker::new(),
            stop: stop.clone(),
            _stop: stop.drop_guard(),
        }
    }

    /// Sets the time after which a hung process is killed. The default is 20 seconds.
    ///
    /// A process is killed if it owes tokens to a reader that keeps up and shows no sign of life for this long, or if
    /// it is busy and sends nothing at all. Choose several times the duration of the slowest operation within a batch
    /// on this machine.
    #[must_use]
    pub fn with_stall_timeout(mut self, limit: Duration) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// Ends every process, and returns when all are gone.
    pub async fn shut_down(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn model(&self, id: ModelId) -> Result<Arc<EngineProcess>, EngineError> {
        self.models().get(&id).cloned().ok_or(EngineError::NotLoaded)
    }

    fn models(&self) -> parking_lot::MutexGuard<'_, Models> {
        self.models.lock()
    }
}

impl fmt::Debug for ProcessRuntime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ProcessRuntime").field("command", &self.command).finish_non_exhaustive()
    }
}

#[async_trait]
impl ModelRuntime for ProcessRuntime {
    fn describe(&self) -> RuntimeInfo {
        // The first process reports its runtime. Until then only the program is known.
        self.info.lock().clone().unwrap_or_else(|| RuntimeInfo {
            kind: "process".into(),
            detail: format!("a process of {} for each model", self.command.program.display()),
        })
    }

    async fn hardware(&self) -> Hardware {
        match time::timeout(HELLO_WITHIN, spawn::ask_hardware(&self.command)).await {
            Ok(Ok(hardware)) => hardware,
            Ok(Err(error)) => {
                tracing::warn!(%error, "no engine process says what it computes with");
                Hardware::default()
            }
            Err(_) => {
                tracing::warn!("an engine process did not say within {HELLO_WITHIN:?} what it computes with");
                Hardware::default()
            }
        }
    }

    async fn estimate(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<MemoryPlan, EngineError> {
        memory_plan::plan(&gguf::read_model(artifact).await?, options)
    }

    async fn load(
        &self,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError> {
        let (threads, cores) = (options.threads, hardware::cores());
        if threads > cores {
            tracing::warn!("threads is {threads}, and {cores} cores can be had: the engine uses {cores}");
        }
        let id = ModelId(self.next_model.fetch_add(1, Ordering::Relaxed));
        let load_timeout = load_within(&artifact);
        let (loaded, is_loaded) = oneshot::channel();
        let kill = self.stop.child_token();
        // If a load fails, times out or is dropped, its process is killed.
        let abandoned = kill.clone().drop_guard();
        let models = Arc::downgrade(&self.models);
        let gone = move || {
            if let Some(models) = models.upgrade() {
                models.lock().remove(&id);
            }
        };
        let loading = Loading { progress, loaded, stall_timeout: self.stall_timeout };
        let process = EngineProcess::start(&self.command, artifact, options, loading, kill, &self.tasks, gone)
            .map_err(|error| EngineError::Failed { reason: format!("no engine process could be started: {error}") })?;
        let answer = time::timeout(load_timeout, is_loaded).await.map_err(|_| EngineError::Failed {
            reason: format!("the model was not loaded within {} s", load_timeout.as_secs()),
        })?;
        let (model, info) = answer.map_err(|_| EngineError::NotLoaded)??;
        abandoned.disarm();
        *self.info.lock() = Some(info);
        let pid = Some(process.pid);
        process.enlist(|process| drop(self.models().insert(id, process)));
        Ok(LoadedModel { id, pid, ..model })
    }

    async fn add_adapter(&self, model: ModelId, artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        let within = load_within(&artifact);
        self.model(model)?.add_adapter(artifact, within).await
    }

    async fn remove_adapter(&self, model: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        self.model(model)?.remove_adapter(adapter).await
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        let process = self.models().remove(&model).ok_or(EngineError::NotLoaded)?;
        process.unload(UNLOAD_WITHIN).await;
        Ok(())
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        let process = self.model(request.model)?;
        // JSON has no numbers that are not finite.
        request.sampling.check()?;
        process.generate(request).await
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        self.model(request.model)?.embed(&request.inputs).await
    }

    async fn rerank(&self, request: RerankRequest) -> Result<Scores, EngineError> {
        self.model(request.model)?.rerank(&request.query, &request.texts).await
    }

    async fn list_tokens(
        &self,
        model: ModelId,
        input: &PromptInput,
        listing: TokenListing,
    ) -> Result<Vec<ListedToken>, EngineError> {
        self.model(model)?.list_tokens(input, listing).await
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        self.model(model)?.count_tokens(input).await
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        // The list's lock is released before any process is asked, since each has a lock of its own.
        let models = self.models().clone();
        models.iter().filter_map(|(id, process)| process.snapshot(*id)).collect()
    }
}

fn load_within(artifact: &VerifiedArtifact) -> Duration {
    let bytes = artifact.parts.iter().fold(artifact.bytes, |sum, part| sum.saturating_add(part.bytes));
    LOAD_WITHIN + LOAD_WITHIN_PER_GIB.mul_f64(bytes as f64 / f64::from(1 << 30))
}

//! What every model runtime offers: the trait [`ModelRuntime`] and its types.
//!
//! A runtime knows nothing of networks, tenants or jobs. Every type that crosses the pipe to an engine process is
//! serialisable; see [`crate::process`].

mod output;
mod request;
mod server;

use std::fmt;
use std::fs::File;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::hardware::Hardware;
use crate::process::sandbox::Sandbox;
pub use inference::{
    EmbedInput, FinishReason, InvalidInput, LeftToModel, ListedToken, Message, OutputFormat, Progress, Role, Sampling,
    SamplingDefaults, TokenListing, TokenLogprob, TokenUsage, Tool, ToolCall, ToolCallDelta, ToolChoice,
};
pub use output::*;
pub use request::*;
pub use server::*;

/// Loads models and generates text with them.
///
/// Methods are cheap to call and safe to cancel. Dropping a [`GenerateStream`] stops its generation within one
/// decode step.
#[async_trait]
pub trait ModelRuntime: Send + Sync + 'static {
    /// Returns what this runtime is.
    fn describe(&self) -> RuntimeInfo;

    /// Returns the compute devices. The result is empty if the runtime does not know them.
    async fn hardware(&self) -> Hardware;

    /// Returns the memory that `load` would take, read from the header of the artifact.
    async fn estimate(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<MemoryPlan, EngineError>;

    /// Loads a model and returns once it is ready to generate.
    async fn load(
        &self,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError>;

    /// Attaches an adapter to a loaded model, which may be generating. An invalid artifact is
    /// [`EngineError::InvalidModel`]. The caller evicts another adapter first if necessary.
    async fn add_adapter(&self, model: ModelId, artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        let _ = (model, artifact);
        Err(unsupported("adapter", "this runtime has no adapters"))
    }

    /// Detaches an adapter. Running generations that use it end first; new ones are rejected at once.
    async fn remove_adapter(&self, model: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        let _ = (model, adapter);
        Err(unsupported("adapter", "this runtime has no adapters"))
    }

    /// Unloads a model. Running generations end with [`EngineError::NotLoaded`].
    async fn unload(&self, model: ModelId) -> Result<(), EngineError>;

    /// Starts a generation. Errors in the request are returned here, before the first event.
    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError>;

    /// Computes one embedding vector for each text.
    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        let _ = request;
        Err(unsupported("input", "this runtime makes no embeddings"))
    }

    /// Scores each text by its relevance to a query. Requires [`Ranking::Scores`].
    async fn rerank(&self, request: RerankRequest) -> Result<Scores, EngineError> {
        let _ = request;
        Err(unsupported("query", "this runtime scores no texts"))
    }

    /// Returns the tokens of the input, including the chat template; at most [`LISTED_TOKENS_MAX`].
    async fn list_tokens(
        &self,
        model: ModelId,
        input: &PromptInput,
        listing: TokenListing,
    ) -> Result<Vec<ListedToken>, EngineError> {
        let _ = (model, input, listing);
        Err(unsupported("prompt", "this runtime lists no tokens"))
    }

    /// Returns the number of tokens in the input, including the chat template.
    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError>;

    /// Returns the load of each model, which the network schedules on.
    fn load_state(&self) -> Vec<LoadSnapshot>;
}

/// The id of a loaded model within one runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ModelId(pub u64);

/// The id of an adapter of a loaded model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AdapterId(pub u64);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeInfo {
    /// `llama`, `mock` or another short name.
    pub kind: String,
    /// The build and the instruction sets or devices in use, as one line to show to people.
    pub detail: String,
}

/// An open file whose bytes were checked against a digest.
///
/// The runtime reads through this descriptor and never opens a path again, so what was verified is what is loaded.
#[derive(Debug)]
pub struct VerifiedArtifact {
    /// The open file, at any position.
    pub file: File,
    /// SHA-256 of its bytes, lower-case hex.
    pub sha256: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// The other files of a split model, in order, each verified as the first one was.
    pub parts: Vec<VerifiedArtifact>,
}

/// How to load a model. `Default` suits a small model on a shared machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadOptions {
    /// Context length of a sequence in tokens. 0 means the length that the model was trained with, at most 8,192 and
    /// less if memory is short.
    pub context_length: u32,
    /// The number of sequences that generate at the same time.
    pub slots: u32,
    /// The number of requests that may wait for a slot. Further requests are rejected with [`EngineError::Busy`].
    pub queue_max: u32,
    /// Threads for decoding, limited to the number of cores. 0 means all cores, or all but one if there are more than
    /// two.
    pub threads: u32,
    /// Layers to offload to GPUs. 0 keeps all on the CPU, and `None` offloads as many as fit the free memory.
    pub gpu_layers: Option<u32>,
    /// Size of the KV cache in tokens, shared by all sequences. 0 means 8,192, but at least one context and at most
    /// one context per slot.
    pub kv_tokens: u32,
    /// Host memory for the keys and values of evicted sequences, in bytes; 0 disables it.
    pub prompt_cache_bytes: u64,
    /// The maximum number of draft tokens in a step; 0 disables speculative decoding.
    pub draft_tokens: u32,
    /// Which kernels compute on the CPU.
    pub kernels: Kernels,
    /// Memory that the process of this model may take in bytes, including the mapped file. `None` derives the limit
    /// from the plan.
    pub memory_max_bytes: Option<u64>,
    /// Memory that the plan should fit into, in bytes. Context length and KV cache size are reduced for it if they
    /// are not set explicitly.
    pub fit_bytes: Option<u64>,
    /// GPU memory that layers may take if `gpu_layers` is `None`, in bytes; `None` means all free memory.
    pub vram_fit_bytes: Option<u64>,
    /// Whether the process of this model closes itself off from files, the network and other processes.
    pub sandbox: bool,
    /// How far the process of this model stands back for other processes of the machine: its nice value, 0 to 19.
    pub nice: u8,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernels {
    /// Tether's kernels if the CPU has AVX-512 and VNNI and they support the model's format, else ggml's.
    #[default]
    Auto,
    /// ggml's kernels.
    Off,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            context_length: 0,
            slots: 4,
            queue_max: 64,
            threads: 0,
            gpu_layers: Some(0),
            kv_tokens: 0,
            prompt_cache_bytes: 256 << 20,
            draft_tokens: 0,
            kernels: Kernels::Auto,
            memory_max_bytes: None,
            fit_bytes: None,
            vram_fit_bytes: None,
            sandbox: true,
            nice: 0,
        }
    }
}

/// The memory that a model needs, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryPlan {
    /// The weights that are used directly from the mapped file.
    pub weights_bytes: u64,
    /// Copies of weights that are repacked for the CPU.
    pub repacked_bytes: u64,
    /// The KV cache of the layers in host memory.
    pub kv_bytes: u64,
    /// Scratch space of the compute graph, and the logits.
    pub compute_bytes: u64,
    /// The maximum memory for evicted sequences.
    pub cache_bytes: u64,
    /// The process itself, including the vocabulary.
    pub process_bytes: u64,
    /// Memory taken only by models that compute embeddings or run deterministic generations; not part of the total.
    pub later_bytes: u64,
    /// GPU memory, in addition to all of the above.
    pub vram_bytes: u64,
}

impl MemoryPlan {
    /// Returns the total host memory, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.private_bytes())
    }

    /// Returns the memory that is allocated, as opposed to mapped from the file.
    pub fn private_bytes(&self) -> u64 {
        [self.repacked_bytes, self.kv_bytes, self.compute_bytes, self.cache_bytes, self.process_bytes]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// Receives the completed share of a load, from 0.0 to 1.0, in ascending order.
pub type ProgressSink = Box<dyn Fn(f32) + Send + Sync>;

/// Returns a sink that ignores every report.
pub fn no_progress() -> ProgressSink {
    Box::new(|_| {})
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedModel {
    /// Its id within the runtime.
    pub id: ModelId,
    /// Context length of a sequence in tokens.
    pub context_length: u32,
    /// Size of the KV cache in tokens, shared by all sequences; 0 if unknown.
    pub kv_tokens: u32,
    /// The number of sequences that generate at the same time.
    pub slots: u32,
    /// The process that runs it, if it has one of its own.
    pub pid: Option<u32>,
    pub abilities: Abilities,
    /// On which devices its layers are.
    pub placement: DevicePlacement,
    /// The sandbox of its process, if it has one of its own.
    pub sandbox: Option<Sandbox>,
    /// The server that runs it, if this is not an engine of our own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerFacts>,
}

/// Where a loaded model is placed, and how much of the requested placement it got. All fields are 0 if unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DevicePlacement {
    /// The number of layers, counting the output as one.
    pub layers: u32,
    /// The number of layers on GPUs.
    pub gpu_layers: u32,
    /// The devices that compute it, such as `NVIDIA H200 (CUDA0)`: GPUs if layers are on them, else the CPU.
    pub devices: Vec<String>,
    /// GPU memory that was free before the load, in bytes; `None` if there is no GPU.
    pub vram_free_bytes: Option<u64>,
    /// GPU memory that it takes, in bytes.
    pub vram_bytes: u64,
    /// The context length that it was trained with, in tokens.
    pub context_trained: u32,
}

/// What a loaded model can do. Requests for anything else are rejected with [`EngineError::Unsupported`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Abilities {
    pub generate: bool,
    pub chat: bool,
    pub tools: bool,
    /// The length of its embedding vectors; 0 if it computes none.
    pub embedding_length: u32,
    pub ranking: Ranking,
    pub adapters: bool,
}

/// How a model ranks texts by their relevance to a query.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ranking {
    /// It was not made for it.
    #[default]
    None,
    /// It was made for embeddings, so the cosine of its vectors ranks texts.
    Vectors,
    /// It is a reranker: it reads the query with each text and scores the pair.
    Scores,
}

/// The maximum number of tokens that are listed.
pub const LISTED_TOKENS_MAX: usize = 128 * 1024;
/// The maximum length in bytes of the text whose tokens are listed.
pub const LISTED_BYTES_MAX: usize = 1 << 20;

/// Checks the number of listed tokens and the length of their text.
pub(crate) fn check_listed(tokens: usize, bytes: usize) -> Result<(), EngineError> {
    if tokens <= LISTED_TOKENS_MAX && bytes <= LISTED_BYTES_MAX {
        return Ok(());
    }
    Err(unsupported("prompt", "at most 131072 tokens of at most 1 MiB are listed; divide the text"))
}

/// The load of one model, and its counters since it was loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadSnapshot {
    pub model: ModelId,
    /// The maximum number of sequences that generate at the same time.
    pub slots: u32,
    /// The number of generating requests.
    pub running: u32,
    /// The number of requests that wait for a slot.
    pub waiting: u32,
    /// Share of the KV cache in use, 0 to 1.
    pub kv_usage: f32,
    /// Generated tokens per second, smoothed; 0 before the first answer.
    pub tokens_per_second: f32,
    /// Counters, which only grow while the model stays loaded.
    pub counters: Counters,
    /// Grows while the engine is working, even within a batch. An engine that has work and shows no growth hangs.
    pub beats: u64,
}

/// Monotonic counters of one loaded model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub decode_steps: u64,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    /// Generations that ran to their end.
    pub completed: u64,
    /// Generations that their caller cancelled.
    pub cancelled: u64,
    /// Prompt tokens that were looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens that were found in the prefix cache.
    pub prefix_hits: u64,
    /// Draft tokens of speculative decoding.
    pub drafted_tokens: u64,
    /// Draft tokens that were accepted.
    pub accepted_tokens: u64,
}

/// Why the engine could not do something. Variants differ by what the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineError {
    /// The request does not fit the context. Shorten it.
    #[error("the prompt has {prompt_tokens} tokens, and with the answer must fit a context of {context_length}")]
    ContextLength {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens that fit the context.
        context_length: u32,
    },
    /// This model or runtime does not support something in the request. Change the request.
    #[error("{parameter} is not supported: {reason}")]
    Unsupported {
        /// The field of the request.
        parameter: String,
        reason: String,
    },
    /// All slots are taken and the queue is full. Try another worker, or later.
    #[error("all slots are taken and the queue is full")]
    Busy,
    /// The model is not loaded, or no longer. Load it or try another worker.
    #[error("the model is not loaded")]
    NotLoaded,
    /// The artifact is not a model that this runtime can load. Replace it.
    #[error("the artifact is not a usable model: {reason}")]
    InvalidModel { reason: String },
    /// The model needs more memory than is available. Try another worker, or a smaller KV cache.
    #[error(
        "the model needs {} of memory, and {} can be had; a smaller context_length or kv_tokens needs less",
        Size(*.needed_bytes),
        Size(*.available_bytes)
    )]
    OutOfMemory {
        /// The predicted memory of the load.
        needed_bytes: u64,
        /// The memory that the load may take.
        available_bytes: u64,
    },
    /// The engine failed. Try another worker.
    #[error("the engine failed: {reason}")]
    Failed { reason: String },
    /// The engine's process was killed from outside, by an operator or because memory ran out. This says nothing of the
    /// request. Try another worker.
    #[error("the engine was killed: {reason}")]
    Killed { reason: String },
    /// The engine's process crashed while it worked on this request. Try another worker, but only a few times.
    #[error("the engine crashed: {reason}")]
    Crashed {
        reason: String,
        /// The number of requests it was working on, including this one.
        suspects: u32,
    },
}

/// Formats a number of bytes for people.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / f64::from(1 << 20);
        if mib < 1_000.0 { write!(formatter, "{mib:.0} MiB") } else { write!(formatter, "{:.1} GiB", mib / 1_024.0) }
    }
}

impl From<InvalidInput> for EngineError {
    fn from(invalid: InvalidInput) -> Self {
        unsupported(invalid.param, invalid.problem)
    }
}

/// Returns the error for an unsupported field of a request.
pub fn unsupported(parameter: impl Into<String>, reason: impl Into<String>) -> EngineError {
    EngineError::Unsupported { parameter: parameter.into(), reason: reason.into() }
}

/// The events of one generation. Dropping the stream cancels the generation.
pub struct GenerateStream(Events);

enum Events {
    Sent { events: mpsc::Receiver<Result<Event, EngineError>>, _cancel: DropGuard },
    Read(BoxStream<'static, Result<Event, EngineError>>),
}

/// The runtime's side of a [`GenerateStream`].
#[derive(Debug, Clone)]
pub struct GenerateSink {
    /// Receives events. The channel is bounded, and a runtime must not block a whole model on one slow reader.
    pub events: mpsc::Sender<Result<Event, EngineError>>,
    /// Cancelled when the reader is gone.
    pub cancelled: CancellationToken,
}

impl GenerateStream {
    /// Creates a stream that holds `capacity` unread events, and a sink that another task sends them to.
    pub fn channel(capacity: usize) -> (GenerateSink, Self) {
        let (sender, events) = mpsc::channel(capacity);
        let cancelled = CancellationToken::new();
        let sink = GenerateSink { events: sender, cancelled: cancelled.clone() };
        (sink, Self(Events::Sent { events, _cancel: cancelled.drop_guard() }))
    }

    /// Creates a stream of a generation that goes on while its events are waited for, and ends when it is dropped.
    pub fn of(events: impl Stream<Item = Result<Event, EngineError>> + Send + 'static) -> Self {
        Self(Events::Read(events.boxed()))
    }

    /// Returns the next event, or `None` after the last. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Event, EngineError>> {
        StreamExt::next(self).await
    }
}

impl fmt::Debug for GenerateStream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("GenerateStream").finish_non_exhaustive()
    }
}

impl Stream for GenerateStream {
    type Item = Result<Event, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.0 {
            Events::Sent { events, .. } => events.poll_recv(context),
            Events::Read(events) => events.poll_next_unpin(context),
        }
    }
}

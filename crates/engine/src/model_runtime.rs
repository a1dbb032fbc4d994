//! What every model runtime offers: the trait [`ModelRuntime`] and its types.
//!
//! A runtime knows nothing of networks, tenants or jobs. Every type that crosses the pipe to an engine process is
//! serialisable; see [`crate::process`].

mod answer;
mod request;

use std::fmt;
use std::fs::File;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use futures_util::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::hardware::Hardware;
pub use answer::*;
pub use inference::{
    EmbedInput, FinishReason, InvalidInput, LeftToModel, Message, OutputFormat, Progress, Role, Sampling,
    SamplingDefaults, TokenLogprob, TokenUsage, Tool, ToolCall, ToolCallDelta, ToolChoice,
};
pub use request::*;

/// A place where models run.
///
/// Methods are cheap to call and safe to cancel. Dropping a [`GenerateStream`] stops its generation within one
/// decode step.
#[async_trait]
pub trait ModelRuntime: Send + Sync + 'static {
    /// Says what this runtime is and what it can do.
    fn describe(&self) -> RuntimeInfo;

    /// Returns what models can be computed with; nothing where a runtime does not know.
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

    /// Attaches an adapter to a loaded model, while it generates. What is wrong with the artifact is
    /// [`EngineError::InvalidModel`]; room for one more is made by the caller.
    async fn add_adapter(&self, model: ModelId, artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        let _ = (model, artifact);
        Err(unsupported("adapter", "this runtime has no adapters"))
    }

    /// Frees an adapter. Generations under way with it end first; new ones are refused at once.
    async fn remove_adapter(&self, model: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        let _ = (model, adapter);
        Err(unsupported("adapter", "this runtime has no adapters"))
    }

    /// Frees a model. Generations under way end with [`EngineError::NotLoaded`].
    async fn unload(&self, model: ModelId) -> Result<(), EngineError>;

    /// Starts a generation. Errors that concern the request are returned here, before the first event.
    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError>;

    /// Makes a vector of each text.
    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        let _ = request;
        Err(unsupported("input", "this runtime makes no embeddings"))
    }

    /// Returns the number of tokens the input takes, chat template included.
    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError>;

    /// Returns how busy each loaded model is; what the network schedules on.
    fn load_state(&self) -> Vec<LoadSnapshot>;
}

/// A loaded model within one runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ModelId(pub u64);

/// An adapter of a loaded model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AdapterId(pub u64);

/// What a runtime is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeInfo {
    /// `llama`, `mock` or another short name.
    pub kind: String,
    /// The build and the instruction sets or devices in use, as one line for people.
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
    /// The other files of a model that is split, in their order, each checked as the first one was.
    pub parts: Vec<VerifiedArtifact>,
}

/// How to load a model. `Default` suits a small model on a shared machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadOptions {
    /// Tokens of context per sequence; 0 takes what the model was trained with, at most 8,192 and less where memory is
    /// short.
    pub context_length: u32,
    /// Sequences that generate side by side.
    pub slots: u32,
    /// Requests that may wait for a slot; one more is refused with [`EngineError::Busy`].
    pub queue_max: u32,
    /// Threads for decoding, no more than there are cores; 0 takes all cores, or all but one where there are more than
    /// two.
    pub threads: u32,
    /// Layers to place on a GPU; 0 keeps all on the CPU, `None` places as many as its free memory holds.
    pub gpu_layers: Option<u32>,
    /// Tokens that all sequences together can hold; 0 takes 8,192, at least one context and at most one for each slot.
    pub kv_tokens: u32,
    /// Host memory for keys and values of conversations that lost their place, in bytes; 0 keeps none.
    pub prompt_cache_bytes: u64,
    /// Tokens that a repeated passage may suggest at once; 0 does not speculate.
    pub draft_tokens: u32,
    /// Whose kernels compute on the CPU.
    pub kernels: Kernels,
    /// Memory that the process of this model may take, the mapped file included, in bytes; `None` derives it from the
    /// plan.
    pub memory_max_bytes: Option<u64>,
    /// Memory that the plan should fit into, in bytes: what nobody has set of context and room is made smaller for it.
    pub fit_bytes: Option<u64>,
    /// Memory of GPUs that layers may take where `gpu_layers` leaves open how many, in bytes; `None` for what is free.
    pub vram_fit_bytes: Option<u64>,
}

/// Whose kernels compute on the CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernels {
    /// Tether's where the processor has AVX-512 and VNNI and the model's format suits them, else those of ggml.
    #[default]
    Auto,
    /// Those of ggml.
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
        }
    }
}

/// Memory a model needs, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryPlan {
    /// The weights that stay as they lie in the file, which is mapped.
    pub weights_bytes: u64,
    /// Copies of weights in the order that the CPU wants.
    pub repacked_bytes: u64,
    /// Keys and values of all slots at full context.
    pub kv_bytes: u64,
    /// Scratch space of the compute graph, and the logits.
    pub compute_bytes: u64,
    /// Conversations that lost their place, once there are so many.
    pub cache_bytes: u64,
    /// The process that holds it all, vocabulary included.
    pub process_bytes: u64,
    /// What is taken only by models that make vectors or run sequences by themselves; no part of the whole.
    pub later_bytes: u64,
    /// Memory of GPUs, beside all of the above.
    pub vram_bytes: u64,
}

impl MemoryPlan {
    /// Returns the whole need of the machine's own memory, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.private_bytes())
    }

    /// Returns what is allocated, and not mapped from the file.
    pub fn private_bytes(&self) -> u64 {
        [self.repacked_bytes, self.kv_bytes, self.compute_bytes, self.cache_bytes, self.process_bytes]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// Takes the share of a load that is done, 0.0 to 1.0, in rising order.
pub type ProgressSink = Box<dyn Fn(f32) + Send + Sync>;

/// Returns a sink that drops every report.
pub fn no_progress() -> ProgressSink {
    Box::new(|_| {})
}

/// A model that is ready to generate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedModel {
    /// Its name within the runtime.
    pub id: ModelId,
    /// Tokens of context per sequence.
    pub context_length: u32,
    /// Tokens that all sequences together can hold; 0 where it is not known.
    pub kv_tokens: u32,
    /// Sequences that generate side by side.
    pub slots: u32,
    /// The process that holds it, where it has one of its own.
    pub pid: Option<u32>,
    /// What it can do.
    pub abilities: Abilities,
    /// Where its layers lie, and what computes them.
    pub placement: Placement,
}

/// What computes a loaded model, and how much of what was wished for it got. All is 0 where it is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Placement {
    /// Its layers, with the output as one more.
    pub layers: u32,
    /// Those of them that are on GPUs.
    pub gpu_layers: u32,
    /// What computes it, such as `NVIDIA H200 (CUDA0)`: GPUs where layers are on them, and else the processor.
    pub devices: Vec<String>,
    /// Memory that was free on GPUs before it was loaded, in bytes; `None` where there is no GPU.
    pub vram_free_bytes: Option<u64>,
    /// Memory of GPUs that it takes, in bytes.
    pub vram_bytes: u64,
    /// Tokens of context that it was made for.
    pub context_trained: u32,
}

/// What a loaded model can do. What it cannot is refused with [`EngineError::Unsupported`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Abilities {
    /// Continues texts.
    pub generate: bool,
    /// Takes conversations.
    pub chat: bool,
    /// Calls functions.
    pub tools: bool,
    /// Makes vectors of this many numbers; 0 where it makes none.
    pub embedding_length: u32,
    /// Takes adapters.
    pub adapters: bool,
}

/// How busy one model is, and what it has done since it was loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadSnapshot {
    /// The model.
    pub model: ModelId,
    /// Sequences that generate side by side at most.
    pub slots: u32,
    /// Requests that generate.
    pub running: u32,
    /// Requests that wait for a slot.
    pub waiting: u32,
    /// Share of the key-value room in use, 0 to 1.
    pub kv_usage: f32,
    /// Generated tokens a second, smoothed; 0 before the first answer.
    pub tokens_per_second: f32,
    /// What was done, ever growing while the model stays loaded.
    pub counters: Counters,
    /// Grows while the engine is at work, within a batch as well; one that owes tokens and shows no growth hangs.
    pub beats: u64,
}

/// Ever-growing counts of one loaded model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Batches evaluated.
    pub decode_steps: u64,
    /// Prompt tokens evaluated.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Generations that ran to their end.
    pub completed: u64,
    /// Generations that were cancelled by their caller.
    pub cancelled: u64,
    /// Prompt tokens that were looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Those of them that were found.
    pub prefix_hits: u64,
    /// Tokens that speculation suggested.
    pub drafted_tokens: u64,
    /// Those of them that were taken.
    pub accepted_tokens: u64,
}

/// Why the engine could not do something, by what the caller can do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineError {
    /// The request does not fit the context: shorten it.
    #[error("the prompt has {prompt_tokens} tokens, and with the answer must fit a context of {context_length}")]
    ContextLength {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens the model can hold.
        context_length: u32,
    },
    /// The request asks for what this model or runtime does not do: change it.
    #[error("{parameter} is not supported: {reason}")]
    Unsupported {
        /// The field of the request.
        parameter: String,
        /// Why.
        reason: String,
    },
    /// All slots are taken and the queue is full: try elsewhere or later.
    #[error("all slots are taken and the queue is full")]
    Busy,
    /// The model is not loaded (any more): load it or try elsewhere.
    #[error("the model is not loaded")]
    NotLoaded,
    /// The artifact is not a model that this runtime can load: replace it.
    #[error("the artifact is not a usable model: {reason}")]
    InvalidModel {
        /// What is wrong with it.
        reason: String,
    },
    /// The model needs more memory than there is: try elsewhere, or with less room.
    #[error(
        "the model needs {} of memory, and {} can be had; a smaller context_length or kv_tokens needs less",
        Size(*.needed_bytes),
        Size(*.available_bytes)
    )]
    OutOfMemory {
        /// What a load is predicted to take.
        needed_bytes: u64,
        /// What it may take.
        available_bytes: u64,
    },
    /// The engine failed, or its process was ended from outside: try elsewhere.
    #[error("the engine failed: {reason}")]
    Failed { reason: String },
    /// The engine's process crashed while it worked on this request: try elsewhere, but not again and again.
    #[error("the engine crashed: {reason}")]
    Crashed {
        reason: String,
        /// How many requests it was working on, this one included.
        suspects: u32,
    },
}

/// Says a number of bytes as people do.
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

/// Returns the refusal of a field of a request.
pub fn unsupported(parameter: impl Into<String>, reason: impl Into<String>) -> EngineError {
    EngineError::Unsupported { parameter: parameter.into(), reason: reason.into() }
}

/// The events of one generation. Dropping it cancels the generation.
#[derive(Debug)]
pub struct GenerateStream {
    events: mpsc::Receiver<Result<Event, EngineError>>,
    _cancel: DropGuard,
}

/// The runtime's side of a [`GenerateStream`].
#[derive(Debug, Clone)]
pub struct GenerateSink {
    /// Takes events; it is bounded, and a runtime must not block a whole model on one slow reader.
    pub events: mpsc::Sender<Result<Event, EngineError>>,
    /// Cancelled when the reader is gone.
    pub cancelled: CancellationToken,
}

impl GenerateStream {
    /// Makes a stream with room for `capacity` unread events, and its other side.
    pub fn channel(capacity: usize) -> (GenerateSink, Self) {
        let (sender, events) = mpsc::channel(capacity);
        let cancelled = CancellationToken::new();
        let sink = GenerateSink { events: sender, cancelled: cancelled.clone() };
        (sink, Self { events, _cancel: cancelled.drop_guard() })
    }

    /// Returns the next event, or `None` after the last. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Event, EngineError>> {
        self.events.recv().await
    }
}

impl Stream for GenerateStream {
    type Item = Result<Event, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_recv(context)
    }
}

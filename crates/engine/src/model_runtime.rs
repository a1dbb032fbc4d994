//! What every model runtime offers: the trait [`ModelRuntime`] and the words it speaks.
//!
//! A runtime knows nothing of networks, tenants or jobs. Every type that crosses the pipe to an engine process
//! is serialisable; see [`crate::process`].

use std::fs::File;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use futures_util::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A place where models run.
///
/// Methods are cheap to call and safe to cancel. Dropping a [`GenerateStream`] stops its generation within one
/// decode step.
#[async_trait]
pub trait ModelRuntime: Send + Sync + 'static {
    /// Says what this runtime is and what it can do.
    fn describe(&self) -> RuntimeInfo;

    /// Returns the memory that `load` would take, read from the header of the artifact.
    async fn estimate(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<MemoryPlan, EngineError>;

    /// Loads a model and returns once it is ready to generate.
    async fn load(
        &self,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError>;

    /// Frees a model. Generations under way end with [`EngineError::NotLoaded`].
    async fn unload(&self, model: ModelId) -> Result<(), EngineError>;

    /// Starts a generation. Errors that concern the request are returned here, before the first event.
    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError>;

    /// Returns the number of tokens the input takes, chat template included.
    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError>;

    /// Returns how busy each loaded model is; what the network schedules on.
    fn load_state(&self) -> Vec<LoadSnapshot>;
}

/// A loaded model within one runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ModelId(pub u64);

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
}

/// How to load a model. `Default` suits a small model on a shared machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadOptions {
    /// Tokens of context per sequence; 0 takes what the model was trained with.
    pub context_length: u32,
    /// Sequences that generate side by side.
    pub slots: u32,
    /// Requests that may wait for a slot; one more is refused with [`EngineError::Busy`].
    pub queue_max: u32,
    /// Threads for decoding; 0 takes the number of cores.
    pub threads: u32,
    /// Layers to place on a GPU; 0 keeps all on the CPU.
    pub gpu_layers: u32,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { context_length: 0, slots: 4, queue_max: 64, threads: 0, gpu_layers: 0 }
    }
}

/// Memory a model needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// The weights as they lie in the file.
    pub weights_bytes: u64,
    /// Keys and values of all slots at full context.
    pub kv_bytes: u64,
    /// Scratch space of the compute graph, estimated.
    pub compute_bytes: u64,
}

impl MemoryPlan {
    /// Returns the whole need in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.kv_bytes).saturating_add(self.compute_bytes)
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
    /// Sequences that generate side by side.
    pub slots: u32,
    /// The process that holds it, where it has one of its own.
    pub pid: Option<u32>,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Plain text.
    pub content: String,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptInput {
    /// A conversation; the model's own chat template makes a prompt of it.
    ///
    /// What the messages say is never read as control tokens, so nobody forges another's turn.
    Chat(Vec<ChatMessage>),
    /// Text, taken as it is.
    ///
    /// The texts of control tokens in it are read as those tokens, as llama-server does: whoever sends a raw prompt
    /// writes the turns as well. What comes from people belongs in a conversation.
    Text(String),
}

/// How the next token is drawn. `temperature` 0 takes the likeliest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 and above; 1 leaves the distribution as it is.
    pub temperature: f32,
    /// Keeps the smallest set of tokens whose probabilities sum to this, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps tokens at least this share as likely as the likeliest, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// The same seed, model and input give the same draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0 }
    }
}

/// One generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// The model to use.
    pub model: ModelId,
    /// What to continue.
    pub input: PromptInput,
    /// How to draw tokens.
    pub sampling: Sampling,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// The most tokens to generate; `None` goes on to the end of the context.
    pub max_tokens: Option<u32>,
    /// Goes on past the end-of-turn token, for benchmarks.
    pub ignore_eos: bool,
}

/// What a generation tells, in this order: one `Started`, any number of `Piece`, one `Done`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The prompt was accepted and its evaluation begins.
    Started {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Prompt tokens whose keys and values were at hand already.
        cached_tokens: u32,
    },
    /// More of the answer. The text is whole UTF-8 and may be empty while a character or a stop text is incomplete.
    Piece {
        /// Text to append.
        text: String,
        /// The tokens behind it, in order.
        tokens: Vec<u32>,
    },
    /// The end of the answer.
    Done {
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or a stop text came.
    Stop,
    /// The token limit or the end of the context was reached.
    Length,
}

/// What a generation took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
    /// Prompt tokens that were not evaluated again.
    pub cached_tokens: u32,
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
    /// The engine failed or its process died: try elsewhere.
    #[error("the engine failed: {reason}")]
    Failed {
        /// What is known of it.
        reason: String,
    },
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

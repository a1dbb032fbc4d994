//! A runtime without a model, at a fixed pace, for tests and benchmarks of everything around the engine.

mod script;
mod vectors;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::hardware::{Device, DeviceKind, Hardware};
use crate::memory_plan::VRAM_SPARED_BYTES;
use crate::model_runtime::{
    Abilities, AdapterId, Counters, DevicePlacement, EmbedRequest, Embeddings, EngineError, Event, FinishReason,
    GenerateRequest, GenerateSink, GenerateStream, ListedToken, LoadOptions, LoadSnapshot, LoadedModel, MemoryPlan,
    ModelId, ModelRuntime, Piece, Progress, ProgressSink, PromptInput, Ranking, RerankRequest, RuntimeInfo, Scores,
    TokenListing, TokenUsage, VerifiedArtifact, check_listed, unsupported,
};
use script::{Script, word};

/// The number of unread events that a stream holds before its generation waits for the reader.
const EVENTS_MAX: usize = 256;
/// How often the reader of a waiting generation receives progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MockOptions {
    /// Time from the moment a slot is free to the first token. Zero means no sleep.
    pub first_token: Duration,
    /// Time between two tokens. Zero means no sleep.
    pub per_token: Duration,
    /// Length of an answer in tokens if the request sets no limit.
    pub tokens: u32,
    /// Context length in tokens if the load options leave it open.
    pub context_length: u32,
    /// Time that a load takes.
    pub load: Duration,
    /// The number of generations that fail before their first event, counted from the start of the runtime.
    pub fail_first: u32,
    /// The number of generations that die in mid-stream, counted after those that fail at once.
    pub die_first: u32,
    /// The number of tokens that a dying generation sends before it dies.
    pub die_after: u32,
    /// The number of generations that start and then hang until the model is unloaded, counted after those that die.
    pub hang_first: u32,
    /// Memory of a simulated GPU in bytes, on which models are placed unless the options keep them off it; 0 for no
    /// GPU. A model takes as much of it as its file is long.
    pub vram_bytes: u64,
}

impl Default for MockOptions {
    fn default() -> Self {
        Self {
            first_token: Duration::ZERO,
            per_token: Duration::ZERO,
            tokens: 16,
            context_length: 4_096,
            load: Duration::ZERO,
            fail_first: 0,
            die_first: 0,
            die_after: 0,
            hang_first: 0,
            vram_bytes: 0,
        }
    }
}

/// Answers every prompt with `tok0 tok1 tok2 …` at a fixed pace. A prompt takes as many tokens as it has words.
///
/// If JSON is requested, the answer is the simplest value that the schema allows. If a function must be called, the
/// answer calls it with the simplest arguments; a call that the user wrote out, such as `add(2, 3)`, is called so. If
/// the template option `enable_thinking` is set, the answer begins with one word of reasoning. Embeddings have
/// [`MockRuntime::EMBEDDING_LENGTH`] numbers, and equal texts get equal vectors. Adapters change nothing.
///
/// It uses Tokio's clock, so paused time works. Slots, queue, cancellation and counters behave as with a real model.
#[derive(Debug)]
pub struct MockRuntime {
    options: MockOptions,
    models: Mutex<BTreeMap<ModelId, Arc<MockModel>>>,
    next_id: AtomicU64,
    started: AtomicU32,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct MockModel {
    id: ModelId,
    slots: u32,
    context_length: u32,
    /// Permits for running and waiting generations.
    admission: Arc<Semaphore>,
    admission_max: usize,
    slot: Arc<Semaphore>,
    counters: Mutex<Counters>,
    beats: AtomicU64,
    /// Whether a generation hangs, and the whole engine with it.
    hangs: AtomicBool,
    adapters: Mutex<BTreeSet<AdapterId>>,
    unloaded: CancellationToken,
}

struct MockGeneration {
    model: Arc<MockModel>,
    options: MockOptions,
    sink: GenerateSink,
    script: Script,
    prompt_tokens: u32,
    /// Tokens that an earlier attempt already sent.
    continued: u32,
    limit: u32,
    fate: Fate,
    admitted: OwnedSemaphorePermit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Complete,
    FailAtOnce,
    DieAfter(u32),
    Hang,
}

/// How a generation ended without an error.
enum Ended {
    Done(FinishReason, TokenUsage),
    Cancelled,
}

impl MockRuntime {
    pub fn new(options: MockOptions) -> Self {
        Self {
            options,
            models: Mutex::default(),
            next_id: AtomicU64::new(1),
            started: AtomicU32::new(0),
            tasks: TaskTracker::new(),
        }
    }

    /// The length of each vector.
    pub const EMBEDDING_LENGTH: u32 = 8;

    /// Returns the text of an answer of `tokens` tokens.
    pub fn text(tokens: u32) -> String {
        (0..tokens).map(word).collect()
    }

    fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn model(&self, id: ModelId) -> Result<Arc<MockModel>, EngineError> {
        let models = self.models.lock();
        models.get(&id).cloned().ok_or(EngineError::NotLoaded)
    }

    fn fate(&self) -> Fate {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let MockOptions { fail_first, die_first, die_after, hang_first, .. } = self.options;
        if number < fail_first {
            Fate::FailAtOnce
        } else if number - fail_first < die_first {
            Fate::DieAfter(die_after)
        } else if number - fail_first - die_first < hang_first {
            Fate::Hang
        } else {
            Fate::Complete
        }
    }
}

#[async_trait]
impl ModelRuntime for MockRuntime {
    fn describe(&self) -> RuntimeInfo {
        let MockOptions { first_token, per_token, .. } = self.options;
        let detail = format!("first token after {first_token:?}, then one each {per_token:?}");
        RuntimeInfo { kind: "mock".into(), detail }
    }

    async fn hardware(&self) -> Hardware {
        let (free_bytes, total_bytes) = (self.options.vram_bytes, self.options.vram_bytes);
        let (name, description) = ("MOCK0".into(), "a GPU of the mock".into());
        let gpu = Device { name, description, kind: DeviceKind::Gpu, free_bytes, total_bytes };
        Hardware { devices: if total_bytes > 0 { vec![gpu] } else { vec![] }, backends: vec![] }
    }

    async fn estimate(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<MemoryPlan, EngineError> {
        let is_on_gpu = options.gpu_layers.is_some_and(|layers| layers > 0);
        let vram_bytes = if is_on_gpu { artifact.bytes } else { 0 };
        Ok(MemoryPlan { weights_bytes: artifact.bytes, vram_bytes, ..MemoryPlan::default() })
    }

    async fn load(
        &self,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError> {
        progress(0.0);
        pause(self.options.load).await;
        progress(1.0);
        let id = ModelId(self.next_id());
        let slots = options.slots.max(1);
        let context_length = match options.context_length {
            0 => self.options.context_length,
            wanted => wanted,
        };
        let admission_max = slots as usize + options.queue_max as usize;
        let model = MockModel {
            id,
            slots,
            context_length,
            admission: Arc::new(Semaphore::new(admission_max)),
            admission_max,
            slot: Arc::new(Semaphore::new(slots as usize)),
            counters: Mutex::default(),
            beats: AtomicU64::new(0),
            hangs: AtomicBool::new(false),
            adapters: Mutex::default(),
            unloaded: CancellationToken::new(),
        };
        self.models.lock().insert(id, Arc::new(model));
        let abilities = Abilities {
            generate: true,
            chat: true,
            tools: true,
            embedding_length: Self::EMBEDDING_LENGTH,
            ranking: Ranking::Scores,
            adapters: true,
        };
        let fit_bytes = options.vram_fit_bytes.unwrap_or(self.options.vram_bytes).min(self.options.vram_bytes);
        let is_on_gpu = options.gpu_layers != Some(0) && artifact.bytes + VRAM_SPARED_BYTES <= fit_bytes;
        let placement = DevicePlacement {
            layers: 1,
            gpu_layers: u32::from(is_on_gpu),
            devices: vec![if is_on_gpu { "MOCK0".into() } else { "CPU".into() }],
            vram_free_bytes: Some(fit_bytes),
            vram_bytes: if is_on_gpu { artifact.bytes } else { 0 },
            context_trained: context_length,
        };
        let placement = if self.options.vram_bytes > 0 { placement } else { DevicePlacement::default() };
        Ok(LoadedModel {
            id,
            context_length,
            kv_tokens: 0,
            slots,
            pid: None,
            abilities,
            placement,
            sandbox: None,
            server: None,
        })
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        let removed = self.models.lock().remove(&model);
        removed.ok_or(EngineError::NotLoaded)?.unloaded.cancel();
        Ok(())
    }

    async fn add_adapter(&self, model: ModelId, _artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        let model = self.model(model)?;
        pause(self.options.load).await;
        let id = AdapterId(self.next_id());
        model.adapters.lock().insert(id);
        Ok(id)
    }

    async fn remove_adapter(&self, model: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        let model = self.model(model)?;
        let was_there = model.adapters.lock().remove(&adapter);
        if was_there { Ok(()) } else { Err(unsupported("adapter", "it is not loaded")) }
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        let model = self.model(request.model)?;
        let mut embeddings = Embeddings::default();
        for input in &request.inputs {
            let (prompt_tokens, context_length) = (words(input), model.context_length);
            if prompt_tokens > context_length {
                return Err(EngineError::ContextLength { prompt_tokens, context_length });
            }
            embeddings.prompt_tokens += prompt_tokens;
            embeddings.vectors.push(vectors::vector(input)?);
        }
        pause(self.options.first_token).await;
        Ok(embeddings)
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        let model = self.model(request.model)?;
        request.sampling.check()?;
        if let Some(adapter) = request.adapter
            && !model.adapters.lock().contains(&adapter)
        {
            return Err(unsupported("adapter", "it is not loaded"));
        }
        if request.echo || request.suffix.is_some() {
            let parameter = if request.echo { "echo" } else { "suffix" };
            return Err(unsupported(parameter, "the mock goes on with its prompt and no more"));
        }
        let script = Script::of(&request, self.options.tokens)?;
        let admitted = Arc::clone(&model.admission).try_acquire_owned().map_err(|_| EngineError::Busy)?;
        let prompt_tokens = words(&request.input);
        if prompt_tokens >= model.context_length {
            return Err(EngineError::ContextLength { prompt_tokens, context_length: model.context_length });
        }
        let room = model.context_length - prompt_tokens;
        let limit = request.max_tokens.unwrap_or(u32::MAX).min(room);
        let (sink, stream) = GenerateStream::channel(EVENTS_MAX);
        let options = self.options.clone();
        let fate = self.fate();
        let continued = u32::try_from(request.continued.len()).unwrap_or(u32::MAX);
        self.tasks.spawn(
            MockGeneration { model, options, sink, script, prompt_tokens, continued, limit, fate, admitted }.run(),
        );
        Ok(stream)
    }

    async fn rerank(&self, request: RerankRequest) -> Result<Scores, EngineError> {
        let model = self.model(request.model)?;
        let mut scores = Scores::default();
        for text in &request.texts {
            let pair = PromptInput::Text(format!("{} {text}", request.query));
            let (prompt_tokens, context_length) = (words(&pair), model.context_length);
            if prompt_tokens > context_length {
                return Err(EngineError::ContextLength { prompt_tokens, context_length });
            }
            scores.prompt_tokens += prompt_tokens;
            scores.scores.push(vectors::relevance(&request.query, text));
        }
        pause(self.options.first_token).await;
        Ok(scores)
    }

    async fn list_tokens(
        &self,
        model: ModelId,
        input: &PromptInput,
        listing: TokenListing,
    ) -> Result<Vec<ListedToken>, EngineError> {
        let _ = listing;
        self.model(model)?;
        let PromptInput::Text(text) = input else { return Err(unsupported("prompt", "the mock lists words of texts")) };
        check_listed(text.split_whitespace().count(), text.len())?;
        let listed = |(id, word): (u32, &str)| ListedToken { id, bytes: word.as_bytes().to_vec() };
        Ok((0..).zip(text.split_whitespace()).map(listed).collect())
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        self.model(model).map(|_| words(input))
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        let models = self.models.lock();
        models.values().map(|model| model.snapshot(self.options.per_token)).collect()
    }
}

impl MockModel {
    fn snapshot(&self, per_token: Duration) -> LoadSnapshot {
        let running = self.slots - self.slot.available_permits() as u32;
        let admitted = (self.admission_max - self.admission.available_permits()) as u32;
        let counters = *self.counters.lock();
        LoadSnapshot {
            model: self.id,
            slots: self.slots,
            running,
            waiting: admitted.saturating_sub(running),
            kv_usage: running as f32 / self.slots as f32,
            tokens_per_second: if counters.completed == 0 || per_token.is_zero() {
                0.0
            } else {
                self.slots as f32 / per_token.as_secs_f32()
            },
            counters,
            beats: self.beats.load(Ordering::Relaxed),
        }
    }

    fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.counters.lock());
    }
}

impl MockGeneration {
    async fn run(self) {
        let (sink, fate) = (&self.sink, self.fate);
        if fate == Fate::FailAtOnce {
            let failure = EngineError::Failed { reason: "told to fail at once".into() };
            drop(self.admitted);
            let _ = sink.events.send(Err(failure)).await;
            return;
        }
        let model = &self.model;
        let cancelled = sink.cancelled.clone();
        let ended = tokio::select! {
            biased;
            // A hanging engine does not notice either that its reader is gone.
            () = cancelled.cancelled(), if fate != Fate::Hang => Ok(Ended::Cancelled),
            () = model.unloaded.cancelled() => Err(EngineError::NotLoaded),
            ended = self.tell() => ended,
        };
        // Counters and permit are updated first, so that a reader that sees the end also sees them updated.
        drop(self.admitted);
        let last = match ended {
            Ok(Ended::Done(reason, usage)) => {
                model.count(|counters| counters.completed += 1);
                Ok(Event::Done { reason, usage, rest: Piece::default() })
            }
            Ok(Ended::Cancelled) => {
                model.count(|counters| counters.cancelled += 1);
                return;
            }
            Err(error) => Err(error),
        };
        tokio::select! {
            () = cancelled.cancelled() => {}
            _ = sink.events.send(last) => {}
        }
    }

    /// Sends the answer except its end event, which is returned.
    async fn tell(&self) -> Result<Ended, EngineError> {
        let Self { model, options, sink, script, prompt_tokens, continued, limit, fate, .. } = self;
        let (prompt_tokens, limit, fate) = (*prompt_tokens, *limit, *fate);
        let tell = async |event| sink.events.send(Ok(event)).await.is_ok();
        let Ok(_slot) = self.telling_progress(None, model.slot.acquire()).await else {
            return Err(EngineError::NotLoaded);
        };
        if !tell(Event::Started { prompt_tokens, cached_tokens: 0 }).await {
            return Ok(Ended::Cancelled);
        }
        if fate == Fate::Hang {
            model.hangs.store(true, Ordering::Relaxed);
            future::pending::<()>().await;
        }
        self.telling_progress(Some(options.first_token), pause(options.first_token)).await;
        model.count(|counters| counters.prompt_tokens += u64::from(prompt_tokens));
        let count = script.len().min(limit);
        for token in *continued..count {
            if fate == Fate::DieAfter(token) {
                return Err(EngineError::Failed { reason: format!("told to die after {token} tokens") });
            }
            if token > *continued {
                pause(options.per_token).await;
            }
            model.beats.fetch_add(1, Ordering::Relaxed);
            model.count(|counters| {
                counters.decode_steps += 1;
                counters.generated_tokens += 1;
            });
            if !tell(Event::Piece(script.piece(token))).await {
                return Ok(Ended::Cancelled);
            }
        }
        let reason = if limit < script.len() { FinishReason::Length } else { script.reason() };
        Ok(Ended::Done(reason, {
            let reasoning_tokens = script.thoughts().min(count);
            TokenUsage { prompt_tokens, completion_tokens: count, cached_tokens: 0, reasoning_tokens }
        }))
    }

    /// Awaits a future and sends progress to the reader every second. `within` is the duration of the prefill, or
    /// `None` while the request waits for a slot.
    async fn telling_progress<T>(&self, within: Option<Duration>, wait: impl Future<Output = T>) -> T {
        let mut wait = pin!(wait);
        let begun = time::Instant::now();
        loop {
            if let Ok(done) = time::timeout(PROGRESS_EVERY, &mut wait).await {
                return done;
            }
            let share = within.map_or(0.0, |within| begun.elapsed().as_secs_f64() / within.as_secs_f64());
            if within.is_some() {
                self.model.beats.fetch_add(1, Ordering::Relaxed);
            }
            if !self.model.hangs.load(Ordering::Relaxed) {
                let tokens_read = (f64::from(self.prompt_tokens) * share) as u32;
                let progress = Event::Progress(Progress { tokens_read, tokens_total: self.prompt_tokens });
                // If the stream is full, the reader has other events to read.
                let _ = self.sink.events.try_send(Ok(progress));
            }
        }
    }
}

fn words(input: &PromptInput) -> u32 {
    let count = match input {
        PromptInput::Chat(chat) => {
            chat.messages.iter().map(|message| message.content.split_whitespace().count()).sum::<usize>()
        }
        PromptInput::Text(text) => text.split_whitespace().count(),
        PromptInput::Tokens(tokens) => tokens.len(),
    };
    count.try_into().unwrap_or(u32::MAX)
}

async fn pause(length: Duration) {
    // A sleep of zero would still wait for the timer's next millisecond.
    if !length.is_zero() {
        time::sleep(length).await;
    }
}

#[cfg(test)]
mod tests;

//! The embedded runtime: GGUF models on llama.cpp.
//!
//! Each loaded model has one engine thread that does all its work (`engine.rs`). Its generations share a batch
//! scheduler, which owns a llama.cpp context with the KV cache. Prompts are rendered and tokenised on other threads,
//! so that a long prompt does not delay running generations. A malicious model can still abort the process, so run
//! this runtime through [`crate::process::serve_child`].

mod batch_plan;
mod batch_scheduler;
mod cell_ledger;
mod constraints;
mod device_placement;
mod draft;
mod embedder;
mod engine;
mod kv_cache;
pub(crate) mod native;
mod outbox;
mod prompt_logits;
mod prompts;
mod pulse;
mod sequence;
mod snapshots;
mod special_tokens;
mod step_clock;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use async_trait::async_trait;
use futures_util::future::try_join_all;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::gguf::{self, Header};
use crate::hardware::{self, Hardware};
use crate::memory_plan::{self, Shape};
use crate::model_facts;
use crate::model_runtime::{
    Abilities, AdapterId, Counters, DevicePlacement, EmbedRequest, Embeddings, EngineError, FinishReason,
    GenerateRequest, GenerateStream, Kernels, ListedToken, LoadOptions, LoadSnapshot, LoadedModel, MemoryPlan, ModelId,
    ModelRuntime, OutputFormat, Piece, ProgressSink, PromptInput, Ranking, RerankRequest, RuntimeInfo,
    SamplingDefaults, Scores, TokenListing, TokenUsage, ToolChoice, VerifiedArtifact, unsupported,
};
use constraints::Constraints;
use embedder::EmbedJob;
use engine::{Engine, Options, Work};
use native::{Model, ModelOptions, Token};
use outbox::Outbox;
use prompts::Prompts;
use pulse::{Beats, Pulse};
use sequence::Job;

/// The alignment of tensors without which llama.cpp maps no file that it gets open.
const MAPPED_ALIGNMENT: u64 = 32;

/// Runs GGUF models in this process.
#[derive(Debug)]
pub struct LlamaRuntime {
    models: Mutex<BTreeMap<ModelId, Arc<Loaded>>>,
    next_model: AtomicU64,
    next_adapter: AtomicU64,
}

/// A loaded model, as callers see it.
struct Loaded {
    id: ModelId,
    model: Arc<Model>,
    header: Header,
    prompts: Prompts,
    constraints: Constraints,
    sampling_defaults: SamplingDefaults,
    shape: Shape,
    abilities: Abilities,
    placement: DevicePlacement,
    work: mpsc::Sender<Work>,
    /// Permits for running and waiting requests.
    admission: Arc<Semaphore>,
    admission_max: usize,
    adapters: Mutex<BTreeSet<AdapterId>>,
    snapshot: Arc<Mutex<LoadSnapshot>>,
    beats: Arc<Beats>,
    /// Admitted requests whose prompts are still being rendered and tokenised. They do not count as work of the
    /// engine yet.
    preparing: Arc<AtomicU32>,
    stop: CancellationToken,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl LlamaRuntime {
    pub fn new() -> Self {
        Self { models: Mutex::default(), next_model: AtomicU64::new(1), next_adapter: AtomicU64::new(1) }
    }

    fn model(&self, id: ModelId) -> Result<Arc<Loaded>, EngineError> {
        lock(&self.models).get(&id).cloned().ok_or(EngineError::NotLoaded)
    }
}

impl Default for LlamaRuntime {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl ModelRuntime for LlamaRuntime {
    fn describe(&self) -> RuntimeInfo {
        let names: Vec<_> = native::devices().iter().map(ToString::to_string).collect();
        let detail = format!("llama.cpp with {} on {}", native::instruction_sets(), names.join(", "));
        RuntimeInfo { kind: "llama".into(), detail }
    }

    async fn hardware(&self) -> Hardware {
        // Drivers may take long to start. An engine process asks before it has anything else to do, and on its first
        // thread, because its sandbox is best closed while there is no other.
        native::hardware()
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
        let id = ModelId(self.next_model.fetch_add(1, Ordering::Relaxed));
        let loaded = Loaded::load(id, artifact, &options, progress).await?;
        let Shape { context_length, slots, kv_tokens } = loaded.shape;
        let (abilities, placement) = (loaded.abilities, loaded.placement.clone());
        lock(&self.models).insert(id, Arc::new(loaded));
        Ok(LoadedModel {
            id,
            context_length,
            kv_tokens,
            slots,
            pid: None,
            abilities,
            placement,
            sandbox: None,
            server: None,
        })
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        let removed = lock(&self.models).remove(&model);
        let loaded = removed.ok_or(EngineError::NotLoaded)?;
        loaded.stop.cancel();
        // Dropping the last handle waits for the engine thread, which ends after its decode step.
        task::spawn_blocking(move || drop(loaded)).await.map_err(|error| failed(&error))
    }

    async fn add_adapter(&self, model: ModelId, artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        let loaded = self.model(model)?;
        if !loaded.abilities.adapters {
            return Err(unsupported("adapter", "this model takes no adapters"));
        }
        gguf::read_adapter(&artifact, &loaded.header).await?;
        let adapter = AdapterId(self.next_adapter.fetch_add(1, Ordering::Relaxed));
        let (attached, is_attached) = oneshot::channel();
        loaded.send(Work::AddAdapter { adapter, file: artifact.file, attached }).await?;
        is_attached.await.map_err(|_| EngineError::NotLoaded)??;
        lock(&loaded.adapters).insert(adapter);
        Ok(adapter)
    }

    async fn remove_adapter(&self, model: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        let loaded = self.model(model)?;
        if !lock(&loaded.adapters).remove(&adapter) {
            return Err(engine::gone_adapter());
        }
        loaded.send(Work::RemoveAdapter { adapter }).await
    }

    async fn generate(&self, mut request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        let loaded = self.model(request.model)?;
        loaded.sampling_defaults.fill(&mut request.sampling, request.left_to_model);
        loaded.check(&request)?;
        let admitted = loaded.admit()?;
        let preparing = Preparing::new(&loaded);
        let (loaded, prepared) = loaded.prepare(request).await?;
        drop(preparing);
        let Prepared { mut job, stream } = prepared(admitted);
        // An answer that is continued may have held back text, even if it needs no further token.
        let is_continued = job.tokens.len() > job.prompt_tokens;
        if job.limit == 0 && !is_continued && !job.tells_prompt {
            let prompt_tokens = job.prompt_tokens as u32;
            job.outbox.started(prompt_tokens, 0);
            let usage = TokenUsage { prompt_tokens, ..TokenUsage::default() };
            let echo = Piece { text: job.echo.unwrap_or_default(), ..Piece::default() };
            job.outbox.done(echo, FinishReason::Length, usage);
            return Ok(stream);
        }
        // The queue has room for every admitted job, so sending fails only if the engine has ended.
        loaded.work.try_send(Work::Generate(Box::new(job))).map_err(|_| EngineError::NotLoaded)?;
        Ok(stream)
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        let loaded = self.model(request.model)?;
        if loaded.abilities.embedding_length == 0 {
            return Err(unsupported("input", "this model makes no embeddings"));
        }
        let tokens_max = loaded.shape.context_length;
        loaded
            .embed(move |loaded| {
                let tokens = |input| loaded.prompts.embed_tokens(&loaded.model, input, tokens_max);
                request.inputs.iter().map(tokens).collect()
            })
            .await
    }

    async fn rerank(&self, request: RerankRequest) -> Result<Scores, EngineError> {
        let loaded = self.model(request.model)?;
        if loaded.abilities.ranking != Ranking::Scores {
            return Err(unsupported("query", "this model is no reranker"));
        }
        let tokens_max = loaded.shape.context_length;
        let RerankRequest { query, texts, .. } = request;
        let Embeddings { vectors, prompt_tokens } = loaded
            .embed(move |loaded| {
                let tokens = |text: &String| loaded.prompts.pair(&loaded.model, &query, text, tokens_max);
                texts.iter().map(tokens).collect()
            })
            .await?;
        Ok(Scores { scores: vectors.into_iter().flatten().collect(), prompt_tokens })
    }

    async fn list_tokens(
        &self,
        model: ModelId,
        input: &PromptInput,
        listing: TokenListing,
    ) -> Result<Vec<ListedToken>, EngineError> {
        let input = input.clone();
        let listed = move |loaded: &Loaded| loaded.prompts.list(&loaded.model, &input, listing);
        Ok(self.model(model)?.blocking(listed).await?.1)
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        let (_, tokens) = self.model(model)?.tokens(input.clone()).await?;
        Ok(tokens.len() as u32)
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        let models = lock(&self.models);
        models.values().filter(|loaded| !loaded.work.is_closed()).map(|loaded| loaded.snapshot()).collect()
    }
}

/// Counts an admitted request while its prompt is being prepared.
struct Preparing(Arc<AtomicU32>);

impl Preparing {
    fn new(loaded: &Loaded) -> Self {
        loaded.preparing.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&loaded.preparing))
    }
}

impl Drop for Preparing {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A job and its reader's stream, to be completed once the job is admitted.
struct Prepared {
    job: Job,
    stream: GenerateStream,
}

impl Loaded {
    async fn load(
        id: ModelId,
        artifact: VerifiedArtifact,
        options: &LoadOptions,
        progress: ProgressSink,
    ) -> Result<Self, EngineError> {
        let header = gguf::read_model(&artifact).await?;
        let shape = memory_plan::shape(&header, options)?;
        let generates = model_facts::generates(&header);
        let prompts = Prompts::new(&header);
        let admission_max = shape.slots as usize + options.queue_max as usize;
        let (work, incoming) = mpsc::channel(admission_max);
        let snapshot = Arc::new(Mutex::new(idle(id, shape.slots)));
        let stop = CancellationToken::new();
        let abandoned: DropGuard = stop.clone().drop_guard();
        let (ready, is_ready) = oneshot::channel();
        let engine_options = Options {
            shape,
            threads: hardware::threads(options.threads, hardware::cores()).cast_signed(),
            prompt_cache_bytes: options.prompt_cache_bytes,
            draft_tokens: options.draft_tokens.min(memory_plan::DRAFT_TOKENS_MAX),
            row_by_row: memory_plan::is_row_by_row(&header, options.kernels),
        };
        let placement = device_placement::plan(&header, options, &native::devices());
        let without_kernels = options.kernels == Kernels::Off;
        let model_options = ModelOptions {
            gpu_layers: placement.gpu_layers,
            without_mmap: !header.data_offset.is_multiple_of(MAPPED_ALIGNMENT),
            without_kernels,
            ..ModelOptions::default()
        };
        let beats = Arc::new(Beats::default());
        let (published, pulse, stopped) = (Arc::clone(&snapshot), Pulse::new(Arc::clone(&beats)), stop.clone());
        let serve = move || {
            let made = load_model(artifact, model_options, progress, &stopped).and_then(|model| {
                Engine::new(Arc::clone(&model), engine_options, generates, incoming, published, pulse, stopped)
                    .map(|engine| (model, engine))
            });
            match made {
                Ok((model, engine)) => {
                    if ready.send(Ok(model)).is_ok() {
                        engine.serve();
                    }
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        };
        let thread =
            thread::Builder::new().name(format!("engine-{}", id.0)).spawn(serve).map_err(|error| failed(&error))?;
        // If this load is dropped here, it ends at the next progress report, together with its thread.
        let model = is_ready.await.map_err(|_| EngineError::Failed { reason: "the engine thread ended".into() })??;
        let stop = abandoned.disarm();
        let ranking = model_facts::ranking(&header);
        // A reranker's context has scores instead of vectors.
        let has_vectors = !model.has_encoder() && ranking != Ranking::Scores;
        let abilities = Abilities {
            generate: generates,
            chat: generates && prompts.takes_chats(),
            tools: generates && prompts.takes_tools(),
            embedding_length: if has_vectors { model.embedding_length() } else { 0 },
            ranking,
            adapters: generates,
        };
        let constraints = Constraints::new(prompts.spoken(model.vocabulary()));
        let admission = Arc::new(Semaphore::new(admission_max));
        let thread = Mutex::new(Some(thread));
        let adapters = Mutex::default();
        Ok(Self {
            id,
            model,
            sampling_defaults: header.sampling_defaults(),
            header,
            prompts,
            constraints,
            shape,
            abilities,
            placement,
            work,
            admission,
            admission_max,
            adapters,
            snapshot,
            beats,
            preparing: Arc::default(),
            stop,
            thread,
        })
    }

    /// Rejects what this model or this runtime does not support.
    fn check(&self, request: &GenerateRequest) -> Result<(), EngineError> {
        request.sampling.check()?;
        if !self.abilities.generate {
            let parameter = if let PromptInput::Chat(_) = request.input { "messages" } else { "prompt" };
            return Err(unsupported(parameter, "this model makes embeddings and generates no text"));
        }
        if request.adapter.is_some_and(|adapter| !lock(&self.adapters).contains(&adapter)) {
            return Err(engine::gone_adapter());
        }
        let known = self.model.vocabulary().len();
        if request.sampling.logit_bias.iter().any(|(token, _)| *token >= known) {
            return Err(unsupported("logit_bias", format!("the model has {known} tokens")));
        }
        Ok(())
    }

    fn admit(&self) -> Result<OwnedSemaphorePermit, EngineError> {
        Arc::clone(&self.admission).try_acquire_owned().map_err(|_| EngineError::Busy)
    }

    async fn send(&self, work: Work) -> Result<(), EngineError> {
        self.work.send(work).await.map_err(|_| EngineError::NotLoaded)
    }

    /// Turns a request into a job, on a thread that may block.
    async fn prepare(
        self: Arc<Self>,
        request: GenerateRequest,
    ) -> Result<(Arc<Self>, impl FnOnce(OwnedSemaphorePermit) -> Prepared), EngineError> {
        self.blocking(move |loaded| {
            let context_length = loaded.shape.context_length;
            let prompt = match &request.suffix {
                Some(suffix) => loaded.prompts.fill_in(&loaded.model, &request.input, suffix, context_length)?,
                None => loaded.prompts.prompt(&loaded.model, &request.input, context_length)?,
            };
            if prompt.tokens.is_empty() {
                return Err(unsupported("prompt", "there is nothing to continue"));
            }
            let (format, parser) = match &request.input {
                PromptInput::Chat(chat) => {
                    let seed = request.sampling.seed;
                    let (format, parser) = loaded.prompts.answer(chat, &prompt, &request.format, seed)?;
                    (format, Some(parser))
                }
                PromptInput::Text(_) | PromptInput::Tokens(_) => (None, None),
            };
            let format = format.as_ref().unwrap_or(&request.format);
            let constraint = loaded.constraints.constraint(loaded.model.vocabulary(), format);
            let constraint = constraint.map_err(|error| loaded.blame_tools(&request.input, error))?;
            // A constraint decides where an answer ends, so `ignore_eos` has no effect with one, as in vLLM.
            let ignore_eos = request.ignore_eos && constraint.is_none();
            let spoken = if parser.is_some() { loaded.constraints.spoken() } else { Arc::default() };
            let prompt_tokens = prompt.tokens.len();
            let mut tokens = prompt.tokens;
            let continued = PromptInput::Tokens(request.continued);
            tokens.extend(loaded.prompts.prompt(&loaded.model, &continued, context_length)?.tokens);
            if tokens.len() >= context_length as usize {
                return Err(EngineError::ContextLength { prompt_tokens: tokens.len() as u32, context_length });
            }
            let room = context_length - prompt_tokens as u32;
            let limit = request.max_tokens.unwrap_or(u32::MAX).min(room);
            let prediction = match &request.prediction {
                None => Vec::new(),
                Some(predicted) => loaded.prompts.prediction(&loaded.model, predicted, limit)?,
            };
            // A request that continues an answer already has the prompt.
            let is_echoed = request.echo && tokens.len() == prompt_tokens;
            let echo = is_echoed.then(|| loaded.echo(&request.input, &tokens));
            let tells_prompt = is_echoed && request.logprobs.is_some();
            if tells_prompt && request.deterministic {
                return Err(unsupported("echo", "a deterministic answer tells no log-probabilities of its prompt"));
            }
            let (outbox, stream) = Outbox::new(tokens.len() as u32);
            let GenerateRequest { adapter, sampling, stop, logprobs, deterministic, yields, .. } = request;
            Ok(move |admitted| {
                let job = Job {
                    tokens,
                    prompt_tokens,
                    adapter,
                    sampling,
                    stop,
                    limit,
                    ignore_eos,
                    logprobs,
                    echo,
                    tells_prompt,
                    constraint,
                    parser,
                    spoken,
                    prediction,
                    deterministic,
                    yields,
                    outbox,
                    admitted,
                };
                Prepared { job, stream }
            })
        })
        .await
    }

    /// Returns the text of a prompt: as given, or decoded from its tokens.
    fn echo(&self, input: &PromptInput, tokens: &[Token]) -> String {
        match input {
            PromptInput::Text(text) => text.clone(),
            PromptInput::Tokens(_) | PromptInput::Chat(_) => {
                let bytes: Vec<u8> =
                    tokens.iter().flat_map(|token| self.model.vocabulary().piece(*token, true)).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
        }
    }

    /// If a call is required, names the tool whose arguments cannot be constrained to their schema.
    fn blame_tools(&self, input: &PromptInput, error: EngineError) -> EngineError {
        let (PromptInput::Chat(chat), EngineError::Unsupported { reason, .. }) = (input, &error) else { return error };
        if !matches!(chat.tool_choice, ToolChoice::Required | ToolChoice::Function(_)) {
            return error;
        }
        let fault = |format: &OutputFormat| match self.constraints.constraint(self.model.vocabulary(), format) {
            Err(EngineError::Unsupported { reason, .. }) => Some(reason),
            _ => None,
        };
        let mut faults = self.prompts.argument_forms(chat).enumerate();
        match faults.find_map(|(index, format)| Some((index, fault(&format)?))) {
            Some((index, reason)) => unsupported(format!("tools[{index}].function.parameters"), reason),
            None => unsupported("tools", reason.clone()),
        }
    }

    async fn tokens(self: Arc<Self>, input: PromptInput) -> Result<(Arc<Self>, Vec<Token>), EngineError> {
        // Tokens can be counted even if the prompt is too long.
        self.blocking(move |loaded| loaded.prompts.prompt(&loaded.model, &input, u32::MAX).map(|prompt| prompt.tokens))
            .await
    }

    /// Evaluates texts, which `tokenize` returns, in the embedder.
    async fn embed(
        self: Arc<Self>,
        tokenize: impl FnOnce(&Self) -> Result<Vec<Vec<Token>>, EngineError> + Send + 'static,
    ) -> Result<Embeddings, EngineError> {
        let admitted = Arc::new(self.admit()?);
        let preparing = Preparing::new(&self);
        let (loaded, texts) = self.blocking(tokenize).await?;
        drop(preparing);
        let prompt_tokens = texts.iter().map(Vec::len).sum::<usize>() as u32;
        let mut made = Vec::with_capacity(texts.len());
        for tokens in texts {
            let (sender, vector) = oneshot::channel();
            let job = EmbedJob { tokens, made: sender, admitted: Arc::clone(&admitted) };
            loaded.send(Work::Embed(job)).await?;
            made.push(async { vector.await.map_err(|_| EngineError::NotLoaded)? });
        }
        let vectors = try_join_all(made).await?;
        Ok(Embeddings { vectors, prompt_tokens })
    }

    async fn blocking<T: Send + 'static>(
        self: Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<(Arc<Self>, T), EngineError> {
        let work = move || work(&self).map(|done| (self, done));
        task::spawn_blocking(work).await.map_err(|error| failed(&error))?
    }

    fn snapshot(&self) -> LoadSnapshot {
        let admitted = (self.admission_max - self.admission.available_permits()) as u32;
        let mut snapshot = lock(&self.snapshot).clone();
        let preparing = self.preparing.load(Ordering::Relaxed);
        snapshot.waiting = admitted.saturating_sub(snapshot.running).saturating_sub(preparing);
        snapshot.beats = self.beats.count();
        snapshot
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.stop.cancel();
        let thread = lock(&self.thread).take();
        // C++ must not be running when the process destroys its statics.
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(model = self.id.0, "the engine thread panicked");
        }
    }
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Loaded").field("id", &self.id).field("shape", &self.shape).finish_non_exhaustive()
    }
}

fn load_model(
    artifact: VerifiedArtifact,
    options: ModelOptions,
    progress: ProgressSink,
    stop: &CancellationToken,
) -> Result<Arc<Model>, EngineError> {
    let mut reached = 0.0_f32;
    let progress = |share: f32| {
        if share > reached {
            reached = share.min(1.0);
            progress(reached);
        }
        !stop.is_cancelled()
    };
    let files: Vec<&File> = std::iter::once(&artifact).chain(&artifact.parts).map(|part| &part.file).collect();
    let loaded = Model::load(&files, options, progress);
    // Lack of memory is not the model's fault, and llama.cpp distinguishes the two only in its message.
    loaded.map(Arc::new).map_err(|reason| {
        if reason.contains("alloc") { EngineError::Failed { reason } } else { EngineError::InvalidModel { reason } }
    })
}

fn idle(model: ModelId, slots: u32) -> LoadSnapshot {
    LoadSnapshot {
        model,
        slots,
        running: 0,
        waiting: 0,
        kv_usage: 0.0,
        tokens_per_second: 0.0,
        counters: Counters::default(),
        beats: 0,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

fn failed(error: &dyn std::error::Error) -> EngineError {
    EngineError::Failed { reason: error.to_string() }
}

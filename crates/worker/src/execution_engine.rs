//! Runs jobs on a model runtime: translates requests, and streams answers as chunks.

mod choices;
mod chunk_writer;
mod plan;
mod ranking;
mod translation;

use std::fmt;
use std::sync::Arc;

use engine::{
    AdapterId, Embeddings, EngineError, Event, GenerateRequest, ListedToken, LoadedModel, ModelId, ModelRuntime,
    Ranking, Scores, unsupported,
};
use failpoints::failpoint;
use futures_util::FutureExt as _;
use protocol::infer::{EmbedInput, InferChunk, InferRequest, Input};
use protocol::{ErrorCode, WireError};
use rpc::ResponseSink;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::model_loader::adapters::AdapterGuard;
use crate::model_loader::cache::{Entry, Hold};
use crate::model_loader::{LoadError, LoadFailed, ModelLoader};
use choices::Choices;
use chunk_writer::ChunkWriter;
use plan::Plan;
use ranking::{by_cosine, check_count};
use translation::{embed_request, generate_request, prompt, prompts, rerank_request, wire_error};

pub(crate) use chunk_writer::{empty_chunk, finish, pulse, send_progress};

/// The most engines of a model that one job is tried on, one after the other.
const ENGINES_MAX: u32 = 2;

pub(crate) struct ExecutionEngine {
    runtime: Arc<dyn ModelRuntime>,
    loader: Arc<ModelLoader>,
}

/// A running job. Dropping it stops the engine's work on it.
pub(crate) struct Begun {
    entry: Arc<Entry>,
    model: ModelId,
    work: Work,
    /// Keeps the adapter attached.
    _adapter: Option<AdapterGuard>,
    /// Keeps the model in memory.
    _hold: Hold,
}

enum Work {
    Choices(Box<Choices>),
    /// Embedding vectors, which are computed all at once.
    Vectors(Embeddings),
    /// The number of the prompt's tokens.
    Count(u32),
    /// The prompt's tokens.
    Listed(Vec<ListedToken>),
}

/// Why a job has not begun.
enum NotBegun {
    /// The engine failed it or is gone.
    Engine(EngineError),
    /// It cannot run on this worker, and the caller learns why.
    Refused(WireError),
}

impl From<EngineError> for NotBegun {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

/// Why an answer ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The caller cancelled or is gone: nobody needs an answer.
    Interrupted,
    /// It failed, and the caller receives the error.
    Failed(WireError),
}

impl From<WireError> for Broken {
    fn from(error: WireError) -> Self {
        Self::Failed(error)
    }
}

impl From<rpc::Interrupted> for Broken {
    fn from(_: rpc::Interrupted) -> Self {
        Self::Interrupted
    }
}

impl ExecutionEngine {
    pub(crate) fn new(runtime: Arc<dyn ModelRuntime>, loader: Arc<ModelLoader>) -> Self {
        Self { runtime, loader }
    }

    /// Waits until the model is in memory and gives the job to its engine. Errors of the request are returned here.
    ///
    /// If the engine turns out to be gone, nothing has begun and the job waits for the next one. If that one goes too,
    /// the job may be the cause.
    pub(crate) async fn begin(&self, entry: Arc<Entry>, request: Arc<InferRequest>) -> Result<Begun, WireError> {
        let mut hold = self.loader.resident(&entry).await.map_err(|error| load_failed(&error))?;
        let mut engines = 1;
        loop {
            let model = hold.loaded.id;
            let error = match self.begin_on(&hold.loaded, &entry, &request).await {
                Ok((work, guard)) => return Ok(Begun { entry, model, work, _adapter: guard, _hold: hold }),
                Err(NotBegun::Refused(error)) => return Err(error),
                Err(NotBegun::Engine(error)) => error,
            };
            let failure = self.failed(&entry, model, &error, &request);
            if engines == ENGINES_MAX || !self.loader.is_gone(model, &error) {
                return Err(failure);
            }
            engines += 1;
            drop(hold);
            hold = self.loader.resident_after(&entry, model).await.map_err(|error| load_failed(&error))?;
        }
    }

    async fn begin_on(
        &self,
        loaded: &LoadedModel,
        entry: &Entry,
        request: &InferRequest,
    ) -> Result<(Work, Option<AdapterGuard>), NotBegun> {
        let model = loaded.id;
        if request.input.count_only {
            return Ok((self.count(model, &request.input).await?, None));
        }
        let (adapter, guard) = self.attach(entry, model, request).await?.unzip();
        let work = match &request.input.embed {
            Some(_) if request.input.adapter.is_some() => {
                return Err(unsupported("adapter", "vectors are made by the model alone").into());
            }
            Some(texts) if request.input.query.is_some() => {
                Work::Vectors(self.rerank(loaded, &request.input, texts).await?)
            }
            Some(inputs) => Work::Vectors(self.embed(loaded, inputs, request.input.dimensions).await?),
            None => Work::Choices(Box::new(self.generate(loaded, adapter, request).await?)),
        };
        Ok((work, guard))
    }

    /// Returns the attached adapter that a job asks for; `None` if it is merged into the weights.
    async fn attach(
        &self,
        entry: &Entry,
        model: ModelId,
        request: &InferRequest,
    ) -> Result<Option<(AdapterId, AdapterGuard)>, NotBegun> {
        let Some(adapter) = request.input.adapter.as_ref().and_then(|name| entry.model.adapter(name)) else {
            return Ok(None);
        };
        if entry.is_merged() {
            return Ok(None);
        }
        match self.loader.attach(entry, model, adapter).await {
            Ok(attached) => Ok(Some(attached)),
            Err(LoadError::Engine(
                error @ (EngineError::Failed { .. }
                | EngineError::Killed { .. }
                | EngineError::Crashed { .. }
                | EngineError::NotLoaded),
            )) => Err(error.into()),
            Err(error) => {
                warn!(model = %entry.key, adapter = %adapter.name, %error, "the adapter could not be attached");
                // A refusal, not a failure: the model itself works.
                let message = "this worker cannot attach the adapter, try another";
                Err(NotBegun::Refused(WireError::new(ErrorCode::ModelNotHere, message)))
            }
        }
    }

    async fn generate(
        &self,
        loaded: &LoadedModel,
        adapter: Option<AdapterId>,
        request: &InferRequest,
    ) -> Result<Choices, EngineError> {
        let plan = Plan::of(request);
        if plan.has_text() && loaded.server.is_none() {
            return Err(unsupported("delivered", "an engine continues tokens, and not the text of a server"));
        }
        let generate = GenerateRequest { adapter, ..generate_request(loaded.id, request) };
        Choices::begin(self.runtime.clone(), generate, prompts(&request.input), plan, loaded.slots).await
    }

    async fn count(&self, model: ModelId, input: &Input) -> Result<Work, EngineError> {
        let prompt = prompt(input);
        match input.list_tokens {
            Some(listing) => self.runtime.list_tokens(model, &prompt, listing).await.map(Work::Listed),
            None => self.runtime.count_tokens(model, &prompt).await.map(Work::Count),
        }
    }

    /// Scores texts by their relevance to the job's query. Each score is a vector of length 1.
    async fn rerank(
        &self,
        loaded: &LoadedModel,
        input: &Input,
        texts: &[EmbedInput],
    ) -> Result<Embeddings, EngineError> {
        let request = rerank_request(loaded.id, input, texts);
        match loaded.abilities.ranking {
            Ranking::Scores => {
                let Scores { scores, prompt_tokens } = self.runtime.rerank(request).await?;
                check_count(scores.len(), texts.len())?;
                Ok(Embeddings { vectors: scores.into_iter().map(|score| vec![score]).collect(), prompt_tokens })
            }
            Ranking::Vectors => {
                let inputs = [texts, &[EmbedInput::Text(request.query)]].concat();
                Ok(by_cosine(self.embed(loaded, &inputs, None).await?))
            }
            Ranking::None => Err(unsupported("model", "it does not rank texts; use a reranker or an embedding model")),
        }
    }

    async fn embed(
        &self,
        loaded: &LoadedModel,
        inputs: &[EmbedInput],
        dimensions: Option<u32>,
    ) -> Result<Embeddings, EngineError> {
        // 0 means that the runtime does not know the length before it has made a vector.
        let known = (loaded.abilities.embedding_length != 0).then_some(loaded.abilities.embedding_length as usize);
        check_length(dimensions, known)?;
        let embeddings = self.runtime.embed(embed_request(loaded.id, inputs)).await?;
        check_length(dimensions, embeddings.vectors.first().map(Vec::len))?;
        check_count(embeddings.vectors.len(), inputs.len())?;
        Ok(embeddings)
    }

    /// Sends the answer chunk by chunk as it is generated, and returns the last chunk for the caller to send.
    ///
    /// The caller sends the last chunk, so that it can free the job's capacity before the client sees the end.
    /// `has_begun` is cancelled with the first part of the answer.
    pub(crate) async fn answer(
        &self,
        begun: Begun,
        request: &InferRequest,
        reply: &mut ResponseSink,
        has_begun: &CancellationToken,
    ) -> Result<InferChunk, Broken> {
        let Begun { entry, model, work, _adapter, _hold } = begun;
        let mut choices = match work {
            Work::Choices(choices) => choices,
            Work::Vectors(embeddings) => {
                entry.forgive();
                has_begun.cancel();
                return ChunkWriter::new(request, &Plan::of(request)).send_vectors(embeddings, reply).await;
            }
            Work::Listed(tokens) => {
                has_begun.cancel();
                return ChunkWriter::new(request, &Plan::of(request)).send_listed(tokens, reply).await;
            }
            Work::Count(tokens) => return Ok(ChunkWriter::new(request, &Plan::of(request)).count(tokens)),
        };
        let mut writer = ChunkWriter::new(request, choices.plan());
        if writer.is_complete() {
            // Only the last chunk was not delivered.
            return Ok(writer.last().0);
        }
        let mut pulse = pulse();
        loop {
            // An adopted server sends nothing during prefill, and a full engine sends nothing to a request that it has
            // not admitted.
            let is_unheard = choices.is_outside() || entry.model.is_server() && !writer.has_begun();
            let mut next = tokio::select! {
                biased;
                () = reply.cancelled() => return Err(Broken::Interrupted),
                next = choices.next() => next,
                _ = pulse.tick(), if is_unheard => {
                    writer.wait();
                    writer.send(reply).await?;
                    continue;
                }
            };
            // Batch whatever else is ready: under load, few large chunks cost less than many small ones.
            let failure = loop {
                match next {
                    Ok((index, event)) => {
                        if let (0, Event::Started { .. }) = (index, &event) {
                            entry.remember(model, writer.transcript().prompt().marks());
                        }
                        writer.add(index, event);
                    }
                    Err(error) => break Some(error),
                }
                if writer.is_complete() || writer.is_full() {
                    break None;
                }
                match choices.next().now_or_never() {
                    Some(ready) => next = ready,
                    None => break None,
                }
            };
            failpoint!("worker-chunk");
            writer.send(reply).await?;
            failpoint!("worker-chunk-sent");
            if writer.has_begun() {
                has_begun.cancel();
            }
            if let Some(error) = failure {
                return Err(self.failed(&entry, model, &error, request).into());
            }
            if writer.is_complete() {
                entry.forgive();
                let (last, transcript) = writer.last();
                entry.remember(model, transcript.with_answer().marks());
                return Ok(last);
            }
        }
    }

    /// Records an engine's error and translates it to a wire error.
    fn failed(&self, entry: &Entry, model: ModelId, error: &EngineError, request: &InferRequest) -> WireError {
        self.loader.job_failed(entry, model, error);
        if let EngineError::Failed { .. }
        | EngineError::Killed { .. }
        | EngineError::Crashed { .. }
        | EngineError::InvalidModel { .. } = error
        {
            warn!(correlation_id = %request.correlation_id, model = %entry.key, %error, "the engine failed a job");
        }
        wire_error(error, &request.input)
    }
}

impl fmt::Debug for ExecutionEngine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ExecutionEngine").field("loader", &self.loader).finish_non_exhaustive()
    }
}

/// Checks that vectors have the requested length, if their length is known.
fn check_length(wanted: Option<u32>, known: Option<usize>) -> Result<(), EngineError> {
    match (wanted, known) {
        (Some(wanted), Some(known)) if wanted as usize != known => {
            Err(unsupported("dimensions", format!("the vectors of this model have {known} numbers")))
        }
        _ => Ok(()),
    }
}

fn load_failed(_: &LoadFailed) -> WireError {
    WireError::new(ErrorCode::WorkerFailed, "the model could not be loaded on this worker, try again")
}

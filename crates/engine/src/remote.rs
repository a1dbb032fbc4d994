//! OpenAI-compatible servers as a model runtime: vLLM, SGLang, llama-server, Ollama, LM Studio and others.
//!
//! Such a server was started by somebody else, from files that this node has not seen. So a model is attached by its
//! server's address and its name there, and not loaded from an artifact. Input from a server is bounded and never
//! causes a panic. Refusals are passed to clients without addresses or paths.

pub mod answer_reader;
mod attached;
mod body;
pub mod continuation;
pub mod dialect;
mod discovery;
pub mod event_stream;
mod generation;
mod http_client;
pub mod refusal;
pub mod scores;
pub mod tokens;
pub mod vectors;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream;
use parking_lot::RwLock;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::debug;

use self::answer_reader::AnswerReader;
use self::attached::{Attached, RequestPermit};
use self::continuation::Delivered;
use self::dialect::{Dialect, Kind, Listed};
pub use self::discovery::{MODELS_MAX, Survey};
use self::generation::Generation;
pub use self::http_client::{AddressError, ServerAddress};
use self::http_client::{HttpClient, HttpError};
use crate::hardware::Hardware;
use crate::model_facts::ModelFacts;
use crate::model_runtime::{
    Abilities, ContinuedText, DevicePlacement, EmbedRequest, Embeddings, EngineError, Event, FinishReason,
    GenerateRequest, GenerateStream, LISTED_TOKENS_MAX, ListedToken, LoadOptions, LoadSnapshot, LoadedModel,
    MemoryPlan, ModelId, ModelRuntime, Piece, ProgressSink, PromptInput, Ranking, RerankRequest, RuntimeInfo, Scores,
    ServerFacts, TokenListing, TokenUsage, VerifiedArtifact, check_listed, unsupported,
};

/// The first id of attached models, so that their ids differ from those of all other runtimes in the process.
pub const FIRST_ID: u64 = 1 << 63;
/// The assumed context length of a model if neither its server nor the caller specifies one.
const CONTEXT_ASSUMED: u32 = 4_096;
/// The maximum length of an embedding response: 2,048 vectors as decimal numbers.
const VECTOR_BYTES_MAX: usize = 128 << 20;
/// The maximum length of a response with scores, whose texts some servers repeat.
const SCORE_BYTES_MAX: usize = 32 << 20;
/// The maximum length of a list of tokens, and of their text, of which JSON may write each byte as six.
const TOKEN_LIST_BYTES_MAX: usize = 128 * LISTED_TOKENS_MAX;
/// The number of consecutive health checks that a server may miss before its models count as gone.
const MISSES_MAX: u32 = 2;

/// Time limits for servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    pub describe: Duration,
    /// For starting an answer without a sign of life: loading the model and evaluating a long prompt may take this
    /// long. A server that reports prefill progress shows signs of life.
    pub begin: Duration,
    /// Between two pieces of an answer.
    pub idle: Duration,
    /// The interval between checks that a server still lists a model.
    pub health_check_interval: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            describe: Duration::from_secs(5),
            begin: Duration::from_mins(2),
            idle: Duration::from_mins(1),
            health_check_interval: Duration::from_secs(5),
        }
    }
}

/// Runs models on existing servers.
#[derive(Debug)]
pub struct RemoteRuntime {
    http: HttpClient,
    timeouts: Timeouts,
    models: Models,
    next_id: AtomicU64,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// Stops the health checks and the generations when dropped.
    _end: DropGuard,
}

type Models = Arc<RwLock<BTreeMap<ModelId, Arc<Attached>>>>;

impl Default for RemoteRuntime {
    fn default() -> Self {
        Self::new(Timeouts::default())
    }
}

impl RemoteRuntime {
    /// Creates a runtime without models.
    pub fn new(timeouts: Timeouts) -> Self {
        let stop = CancellationToken::new();
        Self {
            http: HttpClient::default(),
            timeouts,
            models: Models::default(),
            next_id: AtomicU64::new(FIRST_ID),
            tasks: TaskTracker::new(),
            _end: stop.clone().drop_guard(),
            stop,
        }
    }

    /// Asks a server for its software and its models. Each of its responses may take `within`.
    pub async fn survey(&self, server: &ServerAddress, within: Duration) -> Result<Survey, EngineError> {
        discovery::survey(&self.http, server, within).await.map_err(|error| failed(&error))
    }

    /// Attaches a model of a server, and returns it with the facts that the server reports about it. Options that
    /// concern memory and processors are ignored, since they are the server's.
    pub async fn attach(
        &self,
        server: ServerAddress,
        name: &str,
        options: &LoadOptions,
    ) -> Result<(LoadedModel, Option<ModelFacts>), EngineError> {
        let Survey { dialect, models } = self.survey(&server, self.timeouts.describe).await?;
        let listed = models.into_iter().find(|listed| listed.name == name);
        let listed =
            listed.ok_or_else(|| EngineError::Failed { reason: format!("the server does not list {name}") })?;
        let context_length = listed.context_length.unwrap_or(CONTEXT_ASSUMED);
        let context_length = match options.context_length {
            0 => context_length,
            wanted => listed.context_length.map_or(wanted, |context_length| context_length.min(wanted)),
        };
        let abilities = self.abilities(&server, dialect, &listed).await?;
        let id = ModelId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let loaded = LoadedModel {
            id,
            context_length,
            kv_tokens: 0,
            slots: options.slots,
            pid: None,
            abilities,
            placement: DevicePlacement::default(),
            sandbox: None,
            server: Some(ServerFacts {
                dialect,
                prefills: abilities.chat && self.prefills(&server, name, dialect).await,
            }),
        };
        let Listed { name, facts, .. } = listed;
        let unloaded = self.stop.child_token();
        let attached = Attached::new(loaded.clone(), server, name, dialect, options.queue_max, unloaded);
        let attached = Arc::new(attached);
        self.models.write().insert(id, attached.clone());
        self.tasks.spawn(health_check(self.http.clone(), self.timeouts, self.models.clone(), attached));
        Ok((loaded, facts))
    }

    /// Determines what a model can do, by requesting an embedding unless its server says that it generates text.
    async fn abilities(
        &self,
        server: &ServerAddress,
        dialect: Dialect,
        listed: &Listed,
    ) -> Result<Abilities, EngineError> {
        let text = Abilities { generate: true, chat: true, tools: true, ..Abilities::default() };
        if listed.kind == Kind::Text {
            return Ok(text);
        }
        let reranker = Abilities { ranking: Ranking::Scores, ..Abilities::default() };
        // A llama-server with a reranker makes vectors too, which mean nothing.
        if dialect == Dialect::LlamaServer && self.reranks(server, &listed.name).await {
            return Ok(reranker);
        }
        let body = json!({"model": listed.name, "input": ["a"]});
        let within = if listed.kind == Kind::Vectors { self.timeouts.begin } else { self.timeouts.describe };
        let vectors = match self.http.ask(server, "/v1/embeddings", &body, within).await {
            Ok(body) => vectors::read_embeddings(&body, 1),
            Err(error) => Err(failed(&error)),
        };
        let embedding_length = vectors.map(|vectors| vectors.vectors[0].len() as u32);
        match (listed.kind, embedding_length) {
            (Kind::Vectors, Err(error)) => Err(error),
            (_, Err(_)) if dialect.may_rerank() && self.reranks(server, &listed.name).await => Ok(reranker),
            (_, Err(_)) => Ok(text),
            // With these servers, a model that computes embeddings does nothing else.
            (Kind::Unknown, Ok(embedding_length)) if !matches!(dialect, Dialect::Vllm | Dialect::Sglang) => {
                Ok(Abilities { embedding_length, ranking: Ranking::Vectors, ..text })
            }
            (_, Ok(embedding_length)) => {
                Ok(Abilities { embedding_length, ranking: Ranking::Vectors, ..Abilities::default() })
            }
        }
    }

    /// Determines whether a model is a reranker, by asking for a score.
    async fn reranks(&self, server: &ServerAddress, name: &str) -> bool {
        let body = scores::request(name, "a", &["a".to_owned()]);
        let answer = self.http.ask(server, scores::PATH, &body, self.timeouts.describe).await;
        answer.is_ok_and(|answer| scores::read_scores(&answer, 1).is_ok())
    }

    /// Sends a prompt to a server's tokenizer. `lists` asks for the text of each token too.
    async fn tokenize(
        &self,
        attached: &Attached,
        input: &PromptInput,
        listing: TokenListing,
        lists: bool,
    ) -> Result<Value, EngineError> {
        let mut body = match (input, attached.dialect) {
            (PromptInput::Text(text), Dialect::LlamaServer) => llama_prompt(text.as_str().into(), listing, lists),
            (PromptInput::Chat(chat), Dialect::LlamaServer) => {
                let prompt = body::prompt(chat, attached.dialect)?.into();
                let mut templated = self.ask_tokenizer(attached, "/apply-template", &prompt).await?;
                llama_prompt(templated["prompt"].take(), listing, lists)
            }
            (PromptInput::Text(text), Dialect::Vllm | Dialect::Sglang) => {
                json!({"prompt": text, "add_special_tokens": listing.add_special})
            }
            (PromptInput::Chat(chat), Dialect::Vllm) => body::prompt(chat, attached.dialect)?.into(),
            (_, dialect) => {
                let problem = format!("{} does not tell how many tokens it takes", dialect.as_str());
                return Err(unsupported("input", problem));
            }
        };
        if attached.dialect != Dialect::LlamaServer {
            body["model"] = attached.name.as_str().into();
            body["return_token_strs"] = lists.into();
        }
        self.ask_tokenizer(attached, "/tokenize", &body).await
    }

    /// Returns the text of tokens as their server writes it.
    async fn text_of(&self, attached: &Attached, tokens: &[u32]) -> Result<String, EngineError> {
        if !matches!(attached.dialect, Dialect::LlamaServer | Dialect::Vllm | Dialect::Sglang) {
            let problem = format!("{} does not tell the text of tokens", attached.dialect.as_str());
            return Err(unsupported("tokens", problem));
        }
        let body = json!({"model": attached.name, "tokens": tokens});
        let answer = self.ask_tokenizer(attached, "/detokenize", &body).await?;
        let text = ["content", "prompt", "text"].into_iter().find_map(|field| answer[field].as_str());
        text.map(str::to_owned).ok_or_else(|| EngineError::Failed { reason: "the server sent no text".into() })
    }

    /// Determines whether a server continues the last message of a conversation. vLLM and SGLang have a field for it;
    /// llama-server is asked to apply its template.
    async fn prefills(&self, server: &ServerAddress, name: &str, dialect: Dialect) -> bool {
        match dialect {
            Dialect::Vllm | Dialect::Sglang => true,
            Dialect::LlamaServer => {
                let begun = [("user", "Is it?"), ("assistant", dialect::BEGUN_WORD)];
                let messages: Value = begun.iter().map(|(role, text)| json!({"role": role, "content": text})).collect();
                let body = json!({"model": name, "messages": messages});
                let templated = self.http.ask(server, "/apply-template", &body, self.timeouts.describe).await;
                templated.is_ok_and(|templated| dialect::read_template(&templated))
            }
            Dialect::Ollama | Dialect::LmStudio | Dialect::Other => false,
        }
    }

    /// Returns the number of a text's tokens as its server counts them, or else the estimate.
    async fn tokens_of(&self, attached: &Attached, continued: &ContinuedText) -> u32 {
        let body = match attached.dialect {
            Dialect::LlamaServer => json!({"model": attached.name, "content": continued.text}),
            Dialect::Vllm | Dialect::Sglang => {
                json!({"model": attached.name, "prompt": continued.text, "add_special_tokens": false})
            }
            Dialect::Ollama | Dialect::LmStudio | Dialect::Other => return continued.tokens,
        };
        let counted = self.ask(attached, "/tokenize", &body).await;
        counted.ok().and_then(|counted| read_count(&counted)).unwrap_or(continued.tokens)
    }

    /// Generates the rest of an answer that another server began.
    async fn continue_text(
        &self,
        attached: Arc<Attached>,
        request: GenerateRequest,
        continued: ContinuedText,
    ) -> Result<GenerateStream, EngineError> {
        let request = continuation::rest_of(request, &continued.text)?;
        let permit = attached.enter()?;
        let tokens = self.tokens_of(&attached, &continued).await;
        let continued = ContinuedText { tokens, ..continued };
        match continuation::within_limit(request, &continued) {
            Some(request) => self.begin(attached, permit, request, Some(Delivered::new(&continued.text, tokens))).await,
            None => Ok(complete(tokens)),
        }
    }

    async fn begin(
        &self,
        attached: Arc<Attached>,
        permit: RequestPermit,
        request: GenerateRequest,
        delivered: Option<Delivered>,
    ) -> Result<GenerateStream, EngineError> {
        let call = body::generation(attached.dialect, &attached.name, attached.loaded.context_length, &request)?;
        let opened = self.http.open(&attached.server, call.path, &call.body, self.timeouts.begin);
        let response = tokio::select! {
            biased;
            () = attached.unloaded.cancelled() => return Err(EngineError::NotLoaded),
            opened = opened => opened.map_err(|error| self.lost(&attached, error))?,
        };
        let reader = AnswerReader::new(guessed_tokens(&request.input)).stopping_at(request.stop.clone());
        let reader = match delivered {
            Some(delivered) => reader.after(delivered),
            None => reader,
        };
        Ok(Generation::new(response, reader, permit, self.timeouts).into_stream())
    }

    fn find(&self, id: ModelId) -> Result<Arc<Attached>, EngineError> {
        let models = self.models.read();
        models.get(&id).cloned().ok_or(EngineError::NotLoaded)
    }

    /// Translates an error. If a server cannot be reached, its model counts as gone.
    fn lost(&self, attached: &Attached, error: HttpError) -> EngineError {
        match error {
            HttpError::Unreachable => {
                forget(&self.models, attached.loaded.id);
                EngineError::NotLoaded
            }
            HttpError::Refused { status, body } => refusal::engine_error(status, &body, attached.loaded.context_length),
            error => failed(&error),
        }
    }

    async fn ask(&self, attached: &Attached, path: &str, body: &Value) -> Result<Value, EngineError> {
        let answer = self.http.ask(&attached.server, path, body, self.timeouts.describe).await;
        read_json(&answer.map_err(|error| self.lost(attached, error))?)
    }

    /// Requests tokens or a whole text, which may be long and take as long as a prompt.
    async fn ask_tokenizer(&self, attached: &Attached, path: &str, body: &Value) -> Result<Value, EngineError> {
        let (bytes_max, within) = (TOKEN_LIST_BYTES_MAX, self.timeouts.begin);
        let answer = self.http.post(&attached.server, path, body, bytes_max, within).await;
        read_json(&answer.map_err(|error| self.lost(attached, error))?)
    }
}

#[async_trait]
impl ModelRuntime for RemoteRuntime {
    fn describe(&self) -> RuntimeInfo {
        RuntimeInfo { kind: "remote".into(), detail: "servers of OpenAI's API".into() }
    }

    async fn hardware(&self) -> Hardware {
        Hardware::default()
    }

    /// The server's memory is its own, so a model takes none here.
    async fn estimate(&self, _: &VerifiedArtifact, _: &LoadOptions) -> Result<MemoryPlan, EngineError> {
        Ok(MemoryPlan::default())
    }

    /// Always fails: a server loads its models itself, see [`RemoteRuntime::attach`].
    async fn load(&self, _: VerifiedArtifact, _: LoadOptions, _: ProgressSink) -> Result<LoadedModel, EngineError> {
        Err(EngineError::InvalidModel { reason: "a remote server loads its models itself; attach them by name".into() })
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        let attached = forget(&self.models, model).ok_or(EngineError::NotLoaded)?;
        attached.unloaded.cancel();
        Ok(())
    }

    async fn generate(&self, mut request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        let attached = self.find(request.model)?;
        if !attached.loaded.abilities.generate {
            return Err(unsupported("model", "it makes vectors only"));
        }
        if let Some(continued) = request.continued_text.take() {
            return self.continue_text(attached, request, continued).await;
        }
        let permit = attached.enter()?;
        self.begin(attached, permit, request, None).await
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        let attached = self.find(request.model)?;
        if attached.loaded.abilities.embedding_length == 0 {
            return Err(unsupported("model", "it makes no vectors"));
        }
        let inputs = request.inputs.iter().map(|input| match input {
            PromptInput::Text(text) => Ok(json!(text)),
            PromptInput::Tokens(tokens) => Ok(json!(tokens)),
            PromptInput::Chat(_) => Err(unsupported("input", "vectors are made of texts, not of conversations")),
        });
        let mut body = json!({"model": attached.name, "input": inputs.collect::<Result<Vec<_>, _>>()?});
        if matches!(attached.dialect, Dialect::Vllm | Dialect::LlamaServer) {
            body["encoding_format"] = "base64".into();
        }
        let _seat = attached.enter()?;
        let path = "/v1/embeddings";
        let answer = self.http.post(&attached.server, path, &body, VECTOR_BYTES_MAX, self.timeouts.begin).await;
        vectors::read_embeddings(&answer.map_err(|error| self.lost(&attached, error))?, request.inputs.len())
    }

    async fn rerank(&self, request: RerankRequest) -> Result<Scores, EngineError> {
        let attached = self.find(request.model)?;
        if attached.loaded.abilities.ranking != Ranking::Scores {
            return Err(unsupported("query", "this model is no reranker"));
        }
        let RerankRequest { query, texts, .. } = request;
        let body = scores::request(&attached.name, &query, &texts);
        let _seat = attached.enter()?;
        let path = scores::PATH;
        let answer = self.http.post(&attached.server, path, &body, SCORE_BYTES_MAX, self.timeouts.begin).await;
        scores::read_scores(&answer.map_err(|error| self.lost(&attached, error))?, texts.len())
    }

    async fn list_tokens(
        &self,
        model: ModelId,
        input: &PromptInput,
        listing: TokenListing,
    ) -> Result<Vec<ListedToken>, EngineError> {
        let attached = self.find(model)?;
        if let PromptInput::Tokens(tokens) = input {
            check_listed(tokens.len(), 0)?;
            let text = self.text_of(&attached, tokens).await?;
            check_listed(0, text.len())?;
            return Ok(tokens::with_text(tokens, text));
        }
        if let PromptInput::Text(text) = input {
            check_listed(0, text.len())?;
        }
        let answer = self.tokenize(&attached, input, listing, true).await?;
        let listed = tokens::read_tokens(&answer);
        let listed = listed.ok_or_else(|| EngineError::Failed { reason: "the server listed no tokens".into() })?;
        check_listed(listed.len(), listed.iter().map(|token| token.bytes.len()).sum())?;
        Ok(listed)
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        let attached = self.find(model)?;
        if let PromptInput::Tokens(tokens) = input {
            return Ok(tokens.len() as u32);
        }
        let listing = TokenListing { add_special: true, parse_special: true };
        let counted = self.tokenize(&attached, input, listing, false).await?;
        read_count(&counted).ok_or_else(|| EngineError::Failed { reason: "the server did not count the tokens".into() })
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        let models = self.models.read();
        models.values().map(|attached| attached.snapshot()).collect()
    }
}

/// Watches a model until its server no longer lists it.
async fn health_check(http: HttpClient, timeouts: Timeouts, models: Models, attached: Arc<Attached>) {
    let watching = async {
        let mut misses = 0;
        while misses < MISSES_MAX {
            sleep(timeouts.health_check_interval).await;
            match discovery::lists(&http, &attached.server, &attached.name, timeouts.describe).await {
                Ok(true) => misses = 0,
                Ok(false) => misses += 1,
                Err(error) => {
                    debug!(model = attached.name, %error, "the server did not list its models");
                    misses += 1;
                }
            }
        }
        forget(&models, attached.loaded.id);
    };
    attached.unloaded.run_until_cancelled(watching).await;
}

fn forget(models: &Models, id: ModelId) -> Option<Arc<Attached>> {
    models.write().remove(&id)
}

fn read_json(answer: &[u8]) -> Result<Value, EngineError> {
    serde_json::from_slice(answer).map_err(|_| EngineError::Failed { reason: "the server sent no JSON".into() })
}

fn failed(error: &HttpError) -> EngineError {
    EngineError::Failed { reason: error.to_string() }
}

/// Returns a prompt for llama-server's tokenizer.
fn llama_prompt(content: Value, listing: TokenListing, with_pieces: bool) -> Value {
    let TokenListing { add_special, parse_special } = listing;
    json!({
        "content": content, "add_special": add_special, "parse_special": parse_special, "with_pieces": with_pieces,
    })
}

/// Parses the response to `POST /tokenize`.
fn read_count(counted: &Value) -> Option<u32> {
    let count = counted["count"].as_u64().or_else(|| Some(counted["tokens"].as_array()?.len() as u64));
    u32::try_from(count?).ok()
}

/// Returns the end of an answer whose limit is reached by what was delivered. No server reads its prompt again.
fn complete(tokens: u32) -> GenerateStream {
    let usage = TokenUsage { completion_tokens: tokens, ..TokenUsage::default() };
    let started = Event::Started { prompt_tokens: 0, cached_tokens: 0 };
    let done = Event::Done { reason: FinishReason::Length, usage, rest: Piece::default() };
    GenerateStream::of(stream::iter([Ok(started), Ok(done)]))
}

/// Returns an estimate of a prompt's length at four bytes per token, which is used until its server reports the
/// length.
fn guessed_tokens(input: &PromptInput) -> u32 {
    let bytes = match input {
        PromptInput::Tokens(tokens) => return tokens.len() as u32,
        PromptInput::Text(text) => text.len(),
        PromptInput::Chat(chat) => chat.messages.iter().map(|message| message.content.len()).sum(),
    };
    bytes.div_ceil(4) as u32
}

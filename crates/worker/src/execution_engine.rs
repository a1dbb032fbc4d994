//! Runs jobs on a model runtime: words of the network in, chunks out (W4).

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use engine::{
    Chat, ChatMessage, EngineError, Event, FinishReason as EngineReason, GenerateRequest, GenerateStream, ModelId,
    ModelRuntime, OutputFormat, Piece, PromptInput, Sampling, TokenLogprob, Tool, ToolCall, ToolCallDelta, ToolChoice,
    Usage,
};
use futures_util::FutureExt as _;
use protocol::infer::{self, FinishReason, InferChunk, InferRequest, Input, Message, Payload};
use protocol::usage::TokenUsage;
use protocol::{ErrorCode, WireError};
use rpc::ReplyStream;
use tokio::time;
use tracing::warn;

use crate::model_loader::cache::Entry;
use crate::model_loader::{LoadFailed, ModelLoader, u64_of};
use crate::transcript::Transcript;

/// Pieces that are ready together become one chunk, up to about this many bytes.
const CHUNK_BYTES_MAX: usize = 4 * 1024;
/// How long a caller may leave a chunk unread before it counts as gone.
const CALLER_STALL: Duration = Duration::from_mins(1);

/// Runs jobs.
pub(crate) struct ExecutionEngine {
    runtime: Arc<dyn ModelRuntime>,
    loader: Arc<ModelLoader>,
}

/// A job that runs. Dropping it stops the engine's work on it.
#[derive(Debug)]
pub(crate) struct Generation {
    entry: Arc<Entry>,
    model: ModelId,
    events: GenerateStream,
}

/// Why an answer ended before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The caller cancelled or is gone: nobody needs an answer.
    Interrupted,
    /// It failed, and the caller is told.
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

    /// Waits until the model is in memory and hands it the job. What is wrong with the request is found here.
    pub(crate) async fn begin(&self, entry: Arc<Entry>, request: Arc<InferRequest>) -> Result<Generation, WireError> {
        let model = self.loader.resident(&entry).await.map_err(|error| load_failed(&error))?.id;
        let generated = self.runtime.generate(generate_request(model, &request)).await;
        let events = generated.map_err(|error| self.failed(&entry, model, &error, &request))?;
        Ok(Generation { entry, model, events })
    }

    /// Sends the answer chunk by chunk as it comes, and returns its last chunk for the caller to send.
    ///
    /// The last chunk is left to the caller, so that the job's place can be free before its end is known.
    pub(crate) async fn answer(
        &self,
        mut generation: Generation,
        request: &InferRequest,
        reply: &mut ReplyStream,
    ) -> Result<InferChunk, Broken> {
        let mut writer = ChunkWriter::new(request);
        loop {
            let mut event = tokio::select! {
                biased;
                () = reply.cancelled() => return Err(Broken::Interrupted),
                event = generation.events.next() => Some(event.unwrap_or_else(|| Err(unfinished()))),
            };
            // What else is ready rides along: under load, few large chunks cost less than many small ones.
            while let Some(Ok(Event::Started { .. } | Event::Piece(_))) = &event {
                match event.take() {
                    Some(Ok(Event::Piece(piece))) => writer.append(piece),
                    Some(Ok(Event::Started { prompt_tokens, cached_tokens })) => {
                        writer.begin(prompt_tokens, cached_tokens);
                        generation.entry.remember(generation.model, writer.transcript.asked().marks());
                    }
                    _ => {}
                }
                if writer.chunk.payload.text.len() >= CHUNK_BYTES_MAX {
                    break;
                }
                match generation.events.next().now_or_never() {
                    Some(next) => event = next.or_else(|| Some(Err(unfinished()))),
                    None => break,
                }
            }
            writer.send(reply).await?;
            match event {
                Some(Ok(Event::Done { reason, usage })) => {
                    generation.entry.forgive();
                    let (last, transcript) = writer.last(reason, usage);
                    generation.entry.remember(generation.model, transcript.answered().marks());
                    return Ok(last);
                }
                Some(Err(error)) => {
                    return Err(self.failed(&generation.entry, generation.model, &error, request).into());
                }
                Some(Ok(_)) | None => {}
            }
        }
    }

    /// Takes note of an engine's error and says it in the network's words.
    fn failed(&self, entry: &Entry, model: ModelId, error: &EngineError, request: &InferRequest) -> WireError {
        self.loader.job_failed(entry, model, error);
        if let EngineError::Failed { .. } | EngineError::InvalidModel { .. } = error {
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

/// Writes the chunks of one answer into buffers that it keeps.
struct ChunkWriter {
    chunk: InferChunk,
    bytes: Vec<u8>,
    transcript: Transcript,
}

impl ChunkWriter {
    fn new(request: &InferRequest) -> Self {
        let chunk = InferChunk {
            correlation_id: request.correlation_id,
            seq: 0,
            payload: Payload::default(),
            done: false,
            attempt: request.attempt,
        };
        Self { chunk, bytes: Vec::with_capacity(256), transcript: Transcript::new(request) }
    }

    /// Lets the first chunk tell what the prompt took, so that a caller who leaves early can be billed for it.
    fn begin(&mut self, prompt_tokens: u32, cached_tokens: u32) {
        self.chunk.payload.usage = Some(TokenUsage { prompt_tokens, completion_tokens: 0, cached_tokens });
    }

    fn append(&mut self, piece: Piece) {
        let Piece { text, reasoning, tool_calls, tokens, logprobs } = piece;
        let payload = &mut self.chunk.payload;
        let join = |whole: &mut String, more: String| {
            if whole.is_empty() { *whole = more } else { whole.push_str(&more) }
        };
        join(&mut payload.text, text);
        join(&mut payload.reasoning, reasoning);
        payload.tool_calls.extend(tool_calls.into_iter().map(tool_call_delta));
        if payload.tokens.is_empty() {
            payload.tokens = tokens;
        } else {
            payload.tokens.extend(tokens);
        }
        payload.logprobs.extend(logprobs.into_iter().map(token_logprob));
    }

    /// Sends what was appended, if anything.
    async fn send(&mut self, reply: &mut ReplyStream) -> Result<(), Broken> {
        let Self { chunk, bytes, transcript } = self;
        let Payload { text, reasoning, tool_calls, tokens, .. } = &chunk.payload;
        if text.is_empty() && reasoning.is_empty() && tool_calls.is_empty() && tokens.is_empty() {
            return Ok(());
        }
        write_chunk(chunk, bytes);
        transcript.append(&chunk.payload);
        send_within(reply, bytes).await?;
        chunk.seq += 1;
        chunk.payload.text.clear();
        chunk.payload.reasoning.clear();
        chunk.payload.tool_calls.clear();
        chunk.payload.tokens.clear();
        chunk.payload.logprobs.clear();
        chunk.payload.usage = None;
        Ok(())
    }

    fn last(self, reason: EngineReason, usage: Usage) -> (InferChunk, Transcript) {
        let finish_reason = Some(match reason {
            EngineReason::Stop => FinishReason::Stop,
            EngineReason::Length => FinishReason::Length,
            EngineReason::ToolCalls => FinishReason::ToolCalls,
        });
        let Usage { prompt_tokens, completion_tokens, cached_tokens } = usage;
        let usage = Some(TokenUsage { prompt_tokens, completion_tokens, cached_tokens });
        let payload = Payload { finish_reason, usage, ..Payload::default() };
        (InferChunk { payload, done: true, ..self.chunk }, self.transcript)
    }
}

/// Sends the last chunk and ends the stream.
pub(crate) async fn finish(mut reply: ReplyStream, chunk: &InferChunk) -> Result<(), Broken> {
    let mut bytes = Vec::with_capacity(256);
    write_chunk(chunk, &mut bytes);
    send_within(&mut reply, &bytes).await?;
    let finished = time::timeout(CALLER_STALL, reply.finish()).await;
    Ok(finished.map_err(|_| Broken::Interrupted)??)
}

async fn send_within(reply: &mut ReplyStream, bytes: &[u8]) -> Result<(), Broken> {
    Ok(time::timeout(CALLER_STALL, reply.send(bytes)).await.map_err(|_| Broken::Interrupted)??)
}

fn write_chunk(chunk: &InferChunk, bytes: &mut Vec<u8>) {
    bytes.clear();
    serde_json::to_writer(bytes, chunk).expect("chunks hold nothing that JSON cannot say");
}

/// Says a job in the engine's words.
fn generate_request(model: ModelId, request: &InferRequest) -> GenerateRequest {
    let input = &request.input;
    let prompt = match input {
        Input { messages: Some(messages), .. } => PromptInput::Chat(Chat {
            messages: messages.iter().map(chat_message).collect(),
            tools: input.tools.iter().map(tool).collect(),
            tool_choice: match &input.tool_choice {
                infer::ToolChoice::Auto => ToolChoice::Auto,
                infer::ToolChoice::None => ToolChoice::None,
                infer::ToolChoice::Required => ToolChoice::Required,
                infer::ToolChoice::Function(name) => ToolChoice::Function(name.clone()),
            },
            template_options: input.template_options.clone(),
        }),
        Input { prompt_tokens: Some(tokens), .. } => PromptInput::Tokens(tokens.clone()),
        Input { prompt, .. } => PromptInput::Text(prompt.clone().unwrap_or_default()),
    };
    let neutral = Sampling::default();
    let sampling = Sampling {
        temperature: input.temperature.unwrap_or(neutral.temperature),
        top_p: input.top_p.unwrap_or(neutral.top_p),
        top_k: input.top_k.unwrap_or(neutral.top_k),
        min_p: input.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: input.repetition_penalty.unwrap_or(neutral.repetition_penalty),
        presence_penalty: input.presence_penalty.unwrap_or(neutral.presence_penalty),
        frequency_penalty: input.frequency_penalty.unwrap_or(neutral.frequency_penalty),
        logit_bias: input.logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
        // The job's own name, so that another attempt on another worker draws the same tokens.
        seed: input.seed.unwrap_or_else(|| {
            let (first, second) = request.correlation_id.0.as_bytes().split_at(8);
            u64_of(first) ^ u64_of(second)
        }),
    };
    GenerateRequest {
        sampling,
        stop: input.stop.clone(),
        max_tokens: input.max_tokens,
        ignore_eos: input.ignore_eos,
        logprobs: input.logprobs,
        format: match &input.format {
            infer::OutputFormat::Text => OutputFormat::Text,
            infer::OutputFormat::Json => OutputFormat::Json,
            infer::OutputFormat::JsonSchema(schema) => OutputFormat::JsonSchema(schema.clone()),
            infer::OutputFormat::Regex(expression) => OutputFormat::Regex(expression.clone()),
            infer::OutputFormat::Lark(grammar) => OutputFormat::Lark(grammar.clone()),
        },
        deterministic: input.deterministic,
        ..GenerateRequest::new(model, prompt)
    }
}

fn chat_message(message: &Message) -> ChatMessage {
    let Message { role, content, reasoning, tool_calls, tool_call_id, name } = message;
    let tool_calls = tool_calls.iter().map(|call| {
        let infer::ToolCall { id, name, arguments } = call.clone();
        ToolCall { id, name, arguments }
    });
    ChatMessage {
        role: role.as_str().to_owned(),
        content: content.clone(),
        reasoning: reasoning.clone(),
        tool_calls: tool_calls.collect(),
        tool_call_id: tool_call_id.clone(),
        name: name.clone(),
    }
}

fn tool(tool: &infer::Tool) -> Tool {
    let infer::Tool { name, description, parameters } = tool.clone();
    Tool { name, description, parameters }
}

fn tool_call_delta(delta: ToolCallDelta) -> infer::ToolCallDelta {
    let ToolCallDelta { index, id, name, arguments } = delta;
    infer::ToolCallDelta { index, id, name, arguments }
}

fn token_logprob(told: TokenLogprob) -> infer::TokenLogprob {
    let TokenLogprob { token, bytes, logprob, top } = told;
    infer::TokenLogprob { token, bytes, logprob, top: top.into_iter().map(token_logprob).collect() }
}

/// Says an engine's error in the network's words. Reasons stay here: they may name paths and processes.
fn wire_error(error: &EngineError, input: &Input) -> WireError {
    match error {
        EngineError::ContextLength { .. } => {
            let param = if input.messages.is_some() { "messages" } else { "prompt" };
            WireError::new(ErrorCode::ContextLengthExceeded, error.to_string()).with_param(param)
        }
        EngineError::Unsupported { parameter, .. } => {
            WireError::new(ErrorCode::UnsupportedParameter, error.to_string()).with_param(parameter.as_str())
        }
        EngineError::Busy => crate::quota_guard::Refusal::QueueFull.into(),
        EngineError::NotLoaded => WireError::new(ErrorCode::WorkerFailed, "the model was unloaded, try again"),
        EngineError::InvalidModel { .. } | EngineError::Failed { .. } => {
            WireError::new(ErrorCode::WorkerFailed, "the engine failed, try again")
        }
    }
}

fn load_failed(_: &LoadFailed) -> WireError {
    WireError::new(ErrorCode::WorkerFailed, "the model could not be loaded on this worker, try again")
}

/// An engine must end its streams with a word.
fn unfinished() -> EngineError {
    EngineError::Failed { reason: "the stream ended without an end".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::infer::Role;

    fn request(input: Input) -> InferRequest {
        InferRequest {
            tenant_id: "acme".parse().expect("tenant"),
            model_id: "tether-tiny".parse().expect("model"),
            version: "1.0".parse().expect("version"),
            input,
            correlation_id: "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("id"),
            retry_token: "r".parse().expect("token"),
            trace_id: protocol::TraceId([1; 16]),
            attempt: 1,
            deadline_ms: None,
        }
    }

    fn prompt() -> Input {
        Input { prompt: Some("once".into()), ..Input::default() }
    }

    #[test]
    fn what_the_caller_leaves_open_is_neutral() {
        let generate = generate_request(ModelId(3), &request(prompt()));
        assert_eq!(generate.input, PromptInput::Text("once".into()));
        assert_eq!(generate.sampling, Sampling { seed: generate.sampling.seed, ..Sampling::default() });
        assert_eq!((generate.model, generate.max_tokens, generate.ignore_eos), (ModelId(3), None, false));
    }

    #[test]
    fn what_the_caller_asks_for_reaches_the_engine() {
        let message = Message::new(Role::User, "hi");
        let input = Input {
            messages: Some(vec![message]),
            max_tokens: Some(5),
            temperature: Some(0.0),
            top_p: Some(0.5),
            top_k: Some(9),
            min_p: Some(0.1),
            seed: Some(42),
            stop: vec!["END".into()],
            ignore_eos: true,
            ..Input::default()
        };
        let generate = generate_request(ModelId(1), &request(input));
        assert_eq!(generate.input, PromptInput::Chat(vec![ChatMessage::new("user", "hi")].into()));
        assert_eq!(
            generate.sampling,
            Sampling { temperature: 0.0, top_p: 0.5, top_k: 9, min_p: 0.1, seed: 42, ..Sampling::default() }
        );
        assert_eq!((generate.stop, generate.max_tokens, generate.ignore_eos), (vec!["END".to_owned()], Some(5), true));
    }

    #[test]
    fn another_attempt_draws_the_same_tokens_and_another_job_does_not() {
        let seed = |request: &InferRequest| generate_request(ModelId(1), request).sampling.seed;
        let first = request(prompt());
        let second = InferRequest { attempt: 2, ..first.clone() };
        assert_eq!(seed(&first), seed(&second));
        let id = "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e10".parse().expect("id");
        assert_ne!(seed(&first), seed(&InferRequest { correlation_id: id, ..first.clone() }));
    }

    #[test]
    fn each_engine_error_has_its_code_and_keeps_its_reasons_to_itself() {
        let secret = || String::from("/srv/secret");
        let chat = Input { messages: Some(vec![]), ..Input::default() };
        let too_long = EngineError::ContextLength { prompt_tokens: 9, context_length: 8 };
        for (error, input, code, param) in [
            (too_long.clone(), prompt(), ErrorCode::ContextLengthExceeded, Some("prompt")),
            (too_long, chat, ErrorCode::ContextLengthExceeded, Some("messages")),
            (
                EngineError::Unsupported { parameter: "top_k".into(), reason: "no".into() },
                prompt(),
                ErrorCode::UnsupportedParameter,
                Some("top_k"),
            ),
            (EngineError::Busy, prompt(), ErrorCode::WorkerFull, None),
            (EngineError::NotLoaded, prompt(), ErrorCode::WorkerFailed, None),
            (EngineError::InvalidModel { reason: secret() }, prompt(), ErrorCode::WorkerFailed, None),
            (EngineError::Failed { reason: secret() }, prompt(), ErrorCode::WorkerFailed, None),
        ] {
            let wire = wire_error(&error, &input);
            assert_eq!((wire.code, wire.param.as_deref()), (code, param), "{error}");
            assert!(!wire.message.contains("secret"), "{wire}");
        }
    }
}

//! Serializes answers as Ollama does: JSON objects, one per line if the answer is streamed.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use jiff::Timestamp;
use protocol::gateway::Choice;
use protocol::infer::{FinishReason, ToolCall, ToolCallDelta};
use protocol::usage::TokenUsage;
use protocol::{UnixMillis, WireError};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::Endpoint;
use crate::answer::{Answer, Content, Piece, StreamFormat, Whole};
use crate::openai::response::logprobs::{ChatLogprobs, ChatToken};

/// What all lines of one answer share.
#[derive(Debug, Clone)]
pub(crate) struct Heading {
    endpoint: Endpoint,
    /// The model as the client named it.
    model: String,
    /// When the answer was created, as RFC 3339.
    created_at: String,
    received: Instant,
    /// How long the first piece of the answer took.
    first_piece: Duration,
}

impl Heading {
    pub(crate) fn new(endpoint: Endpoint, model: String, now: UnixMillis, received: Instant) -> Self {
        Self { endpoint, model, created_at: rfc3339(now), received, first_piece: Duration::ZERO }
    }

    /// Takes note of an answer's beginning.
    pub(crate) fn begin(&mut self, answer: &Answer) {
        self.first_piece = answer.first_piece().unwrap_or_else(|| self.received.elapsed());
        if let Some(origin) = answer.origin() {
            self.created_at = rfc3339(origin.created_at);
        }
        if let Some(other) = answer.degraded().and_then(|degraded| degraded.model.as_ref()) {
            self.model = other.model_id.to_string();
        }
    }

    fn line<'a>(&'a self, part: Part<'a>) -> Line<'a> {
        let Part { text, thinking, tool_calls, logprobs } = part;
        let (message, response, own_thinking) = match self.endpoint {
            Endpoint::Chat => {
                (Some(AssistantMessage { role: "assistant", content: text, thinking, tool_calls }), None, "")
            }
            Endpoint::Generate => (None, Some(text), thinking),
        };
        let (model, created_at) = (&*self.model, &*self.created_at);
        let logprobs = ChatLogprobs::of(logprobs).map(|logprobs| logprobs.content);
        Line { model, created_at, message, response, thinking: own_thinking, logprobs, done: false, end: None }
    }

    fn end(&self, reason: FinishReason, usage: TokenUsage) -> End {
        let reason = if reason == FinishReason::Length { "length" } else { "stop" };
        let total = self.received.elapsed();
        End {
            done_reason: reason,
            total_duration: total.as_nanos() as u64,
            load_duration: 0,
            prompt_eval_count: usage.prompt_tokens,
            prompt_eval_duration: self.first_piece.as_nanos() as u64,
            eval_count: usage.completion_tokens,
            eval_duration: total.saturating_sub(self.first_piece).as_nanos() as u64,
        }
    }
}

/// Formats a time as Ollama does.
pub(super) fn rfc3339(time: UnixMillis) -> String {
    Timestamp::from_millisecond(time.0 as i64).unwrap_or_default().to_string()
}

/// A part of an answer, or the whole of it.
#[derive(Default)]
struct Part<'a> {
    text: &'a str,
    thinking: &'a str,
    tool_calls: Vec<Call<'a>>,
    logprobs: &'a [protocol::infer::TokenLogprob],
}

/// An answer, or a part of one.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaAnswer)]
pub(crate) struct Line<'a> {
    model: &'a str,
    /// When the answer was created, as RFC 3339.
    created_at: &'a str,
    /// In `/api/chat`, the message or a part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<AssistantMessage<'a>>,
    /// In `/api/generate`, the text or a part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    response: Option<&'a str>,
    /// In `/api/generate`, the model's reasoning or a part of it.
    #[serde(skip_serializing_if = "str::is_empty")]
    thinking: &'a str,
    /// One for each token, if requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<ChatToken<'a>>>,
    /// Whether this is the end.
    done: bool,
    #[serde(flatten)]
    end: Option<End>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = OllamaAssistantMessage)]
struct AssistantMessage<'a> {
    /// Author of the message: always `assistant`.
    role: &'static str,
    content: &'a str,
    /// The model's reasoning before the text, or a part of it.
    #[serde(skip_serializing_if = "str::is_empty")]
    thinking: &'a str,
    /// Functions that the model calls, each of them whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call<'a>>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = OllamaAnswerCall)]
struct Call<'a> {
    id: &'a str,
    function: Function<'a>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = OllamaAnswerFunction)]
struct Function<'a> {
    index: u32,
    name: &'a str,
    arguments: Map<String, Value>,
}

/// How an answer ended.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaAnswerEnd)]
struct End {
    /// `stop` or `length`; `load` or `unload` if there was nothing to answer.
    done_reason: &'static str,
    /// Nanoseconds from the request to its end.
    total_duration: u64,
    /// Always 0: a model that had to be loaded counts in `prompt_eval_duration`.
    load_duration: u64,
    prompt_eval_count: u32,
    /// Nanoseconds until the first token.
    prompt_eval_duration: u64,
    eval_count: u32,
    /// Nanoseconds from the first token to the last.
    eval_duration: u64,
}

/// Embedding vectors, normalised to length 1.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaVectors)]
pub(crate) struct Vectors<'a> {
    model: &'a str,
    /// In the order of the texts.
    embeddings: Vec<Vec<f32>>,
    /// Nanoseconds from the request to its end.
    total_duration: u64,
    /// Always 0: a model that had to be loaded counts in `total_duration`.
    load_duration: u64,
    prompt_eval_count: u32,
}

impl<'a> Vectors<'a> {
    /// Returns `None` if a worker sent an invalid vector.
    pub(crate) fn of(model: &'a str, whole: &Whole, received: Instant) -> Option<Self> {
        let embeddings = whole.embeddings.iter().map(protocol::infer::Embedding::vector).collect::<Option<_>>()?;
        let total_duration = received.elapsed().as_nanos() as u64;
        Some(Self { model, embeddings, total_duration, load_duration: 0, prompt_eval_count: whole.usage.prompt_tokens })
    }
}

/// The vector of one text, from `/api/embeddings`.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaVector)]
pub(crate) struct Vector {
    embedding: Vec<f32>,
}

impl Vector {
    /// Returns `None` if a worker sent an invalid vector.
    pub(crate) fn of(whole: &Whole) -> Option<Self> {
        Some(Self { embedding: whole.embeddings.first()?.vector()? })
    }
}

/// Returns a whole answer.
pub(crate) fn whole<'a>(heading: &'a Heading, choice: &'a Choice, usage: TokenUsage) -> Line<'a> {
    let Choice { text, reasoning, tool_calls, logprobs, finish_reason, .. } = choice;
    let tool_calls = (0..).zip(tool_calls).filter_map(|(index, call)| Call::of(index, call)).collect();
    let line = heading.line(Part { text, thinking: reasoning, tool_calls, logprobs });
    Line { done: true, end: Some(heading.end(*finish_reason, usage)), ..line }
}

/// Returns the answer to a request that only loads its model, or unloads it.
pub(crate) fn loaded(heading: &Heading, is_kept: bool) -> Line<'_> {
    let end = heading.end(FinishReason::Stop, TokenUsage::default());
    let done_reason = if is_kept { "load" } else { "unload" };
    Line { done: true, end: Some(End { done_reason, ..end }), ..heading.line(Part::default()) }
}

impl<'a> Call<'a> {
    /// Returns `None` if the arguments are not an object in JSON, as when the answer was cut. Servers may write none
    /// for a function without parameters.
    fn of(index: u32, call: &'a ToolCall) -> Option<Self> {
        let ToolCall { id, name, arguments } = call;
        let arguments = if arguments.trim().is_empty() { "{}" } else { arguments };
        let arguments = serde_json::from_str(arguments).ok()?;
        Some(Self { id, function: Function { index, name, arguments } })
    }
}

/// Writes an answer as lines of JSON.
pub(crate) struct Lines {
    heading: Heading,
    /// The calls whose arguments may still come, by index. Servers may mix the parts of several.
    open: BTreeMap<u32, ToolCall>,
}

impl Lines {
    pub(crate) fn new(heading: Heading) -> Self {
        Self { heading, open: BTreeMap::new() }
    }

    /// Adds deltas of calls. Returns all calls, with their indexes, once the answer has ended.
    fn add_calls(&mut self, content: &Content) -> BTreeMap<u32, ToolCall> {
        for ToolCallDelta { index, id, name, arguments } in &content.tool_calls {
            let new = || ToolCall {
                id: id.clone().unwrap_or_default(),
                name: name.clone().unwrap_or_default(),
                arguments: String::new(),
            };
            self.open.entry(*index).or_insert_with(new).arguments += arguments;
        }
        if content.finish_reason.is_some() { std::mem::take(&mut self.open) } else { BTreeMap::new() }
    }

    fn put(&self, part: Part<'_>, end: Option<End>, out: &mut BytesMut) {
        let line = Line { done: end.is_some(), end, ..self.heading.line(part) };
        let written = serde_json::to_writer((&mut *out).writer(), &line);
        debug_assert!(written.is_ok(), "texts and numbers are always writable");
        out.put_u8(b'\n');
    }
}

impl StreamFormat for Lines {
    fn begin(&mut self, answer: &Answer) {
        self.heading.begin(answer);
    }

    fn piece(&mut self, piece: &Piece, out: &mut BytesMut) {
        let content = &piece.content;
        let calls = self.add_calls(content);
        let tool_calls: Vec<_> = calls.iter().filter_map(|(index, call)| Call::of(*index, call)).collect();
        let Content { text, reasoning, logprobs, .. } = content;
        let says_something = !(text.is_empty() && reasoning.is_empty() && tool_calls.is_empty() && logprobs.is_empty());
        if says_something {
            self.put(Part { text, thinking: reasoning, tool_calls, logprobs }, None, out);
        }
        if let Some(end) = piece.end {
            self.put(Part::default(), Some(self.heading.end(end.reason, end.usage)), out);
        }
    }

    fn failure(&mut self, failure: &WireError, out: &mut BytesMut) {
        write_error(failure, out);
        out.put_u8(b'\n');
    }

    /// Returns a part without text. Ollama's clients parse every line.
    fn keep_alive(&self) -> Bytes {
        let mut line = BytesMut::new();
        self.put(Part::default(), None, &mut line);
        line.freeze()
    }
}

/// The body of every error.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaError)]
pub(crate) struct ErrorBody<'a> {
    /// What went wrong and what to do, for people.
    error: &'a str,
}

/// Writes an error as JSON.
pub(crate) fn write_error(error: &WireError, out: &mut BytesMut) {
    let written = serde_json::to_writer(out.writer(), &ErrorBody { error: &error.message });
    debug_assert!(written.is_ok(), "texts are always writable");
}

#[cfg(test)]
mod tests;

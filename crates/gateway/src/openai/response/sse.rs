//! Answers as server-sent events, the way OpenAI's clients read them.

use std::fmt::Write as _;

use bytes::{BufMut as _, BytesMut};
use protocol::WireError;
use protocol::infer::FinishReason;
use protocol::usage::TokenUsage;
use serde::Serialize;

use super::logprobs::{ChatLogprobs, TextLogprobs, TextPlace};
use super::tool_calls::CallDelta;
use crate::answer::{Answer, Content, Piece};
use crate::http_bridge::answer_body::Format;
use crate::http_bridge::errors;

/// Which of OpenAI's two endpoints an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

impl Endpoint {
    /// Returns what an answer's id begins with.
    pub(crate) fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completion => "cmpl-",
        }
    }

    fn streamed_object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion.chunk",
            Self::Completion => "text_completion",
        }
    }
}

/// What the chunks of one answer have in common.
#[derive(Debug, Clone)]
pub(crate) struct Heading {
    pub(crate) endpoint: Endpoint,
    /// The answer's id.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The model as the client named it.
    pub(crate) model: String,
    /// Characters of the prompt that each answer goes on with.
    pub(crate) prompt_chars: Vec<usize>,
    /// Whether the answers begin with the prompt.
    pub(crate) echo: bool,
    /// Whether a chunk with the usage follows the last.
    pub(crate) include_usage: bool,
}

/// Writes an answer as server-sent events.
pub(crate) struct Sse {
    heading: Heading,
    /// A chunk's JSON up to its choices, the same for each, made once.
    head: Vec<u8>,
    told: Vec<Told>,
}

/// What was told of one of several answers.
#[derive(Clone, Default)]
struct Told {
    /// Whether it has begun.
    role: bool,
    /// Where its next log-probability stands.
    place: TextPlace,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "DeltaText::is_missing")]
    content: DeltaText<'a>,
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning_content: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallDelta<'a>>,
}

/// The text of a delta: there with the role in any case, and then null where something else comes first.
#[derive(Serialize)]
#[serde(untagged)]
enum DeltaText<'a> {
    Missing,
    Null,
    Text(&'a str),
}

impl DeltaText<'_> {
    fn is_missing(&self) -> bool {
        matches!(self, Self::Missing)
    }
}

#[derive(Serialize)]
struct TextChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<TextLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

/// A chunk's JSON up to its choices; serialised, its closing brace is cut off.
#[derive(Serialize)]
struct Head<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
}

/// Usage as OpenAI's clients read it.
#[derive(Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
    /// Missing where the model did not think.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionTokensDetails>,
}

#[derive(Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

#[derive(Serialize)]
struct CompletionTokensDetails {
    reasoning_tokens: u32,
}

impl From<TokenUsage> for Usage {
    fn from(usage: TokenUsage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.total_tokens(),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
            completion_tokens_details: Some(usage.reasoning_tokens)
                .filter(|thought| *thought > 0)
                .map(|reasoning_tokens| CompletionTokensDetails { reasoning_tokens }),
        }
    }
}

/// Returns the fingerprint of the model that answers: the beginning of its digest.
pub(crate) fn fingerprint(answer: &Answer) -> String {
    format!("fp_{}", &answer.model().digest.to_string()[..12])
}

impl Sse {
    pub(crate) fn new(heading: Heading) -> Self {
        let place = |chars: &usize| TextPlace::of(*chars, heading.echo);
        let told = heading.prompt_chars.iter().map(|chars| Told { role: false, place: place(chars) }).collect();
        Self { heading, head: vec![], told }
    }

    fn set_head(&mut self, fingerprint: &str) {
        let Heading { endpoint, id, created, model, .. } = &self.heading;
        let (created, object) = (*created, endpoint.streamed_object());
        let head = Head { id, object, created, model, system_fingerprint: fingerprint };
        self.head = json(&head);
        self.head.pop();
        self.head.extend_from_slice(b",\"choices\":[");
    }

    /// Writes what a piece brings of its answer, unless that is nothing.
    fn content(&mut self, piece: &Piece, out: &mut BytesMut) {
        let content = &piece.content;
        let Content { index, text, logprobs, finish_reason, .. } = content;
        let Some(told) = self.told.get_mut(*index as usize) else { return };
        let is_chat = self.heading.endpoint == Endpoint::Chat;
        // A token may be part of a character and bring no text yet. The first piece brings the role in any case.
        if !content.has_something() && finish_reason.is_none() && (told.role || !is_chat) {
            return;
        }
        out.reserve(64 + self.head.len() + 2 * text.len() + 128);
        let written = write!(out, "id: {}\ndata: ", piece.seq);
        debug_assert!(written.is_ok(), "a buffer grows");
        out.put_slice(&self.head);
        let (index, finish_reason) = (*index, finish_reason.map(FinishReason::as_str));
        if is_chat {
            let is_first = !std::mem::replace(&mut told.role, true);
            let delta = Delta::of(content, is_first);
            put_json(&ChatChoice { index, delta, logprobs: ChatLogprobs::of(logprobs), finish_reason }, out);
        } else {
            let logprobs = TextLogprobs::of(logprobs, &mut told.place);
            put_json(&TextChoice { index, text, logprobs, finish_reason }, out);
        }
        out.put_slice(if self.heading.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" });
    }

    fn usage(&self, usage: TokenUsage, out: &mut BytesMut) {
        out.put_slice(b"data: ");
        out.put_slice(&self.head);
        out.put_slice(b"],\"usage\":");
        put_json(&Usage::from(usage), out);
        out.put_slice(b"}\n\n");
    }
}

impl<'a> Delta<'a> {
    fn of(content: &'a Content, is_first: bool) -> Self {
        let Content { text, reasoning, tool_calls, .. } = content;
        let text = match (text.as_str(), is_first) {
            ("", true) if !reasoning.is_empty() || !tool_calls.is_empty() => DeltaText::Null,
            ("", false) => DeltaText::Missing,
            (text, _) => DeltaText::Text(text),
        };
        Self {
            role: is_first.then_some("assistant"),
            content: text,
            reasoning_content: reasoning,
            tool_calls: tool_calls.iter().map(CallDelta::of).collect(),
        }
    }
}

impl Format for Sse {
    fn begin(&mut self, answer: &Answer) {
        self.set_head(&fingerprint(answer));
    }

    fn piece(&mut self, piece: &Piece, out: &mut BytesMut) {
        self.content(piece, out);
        if let Some(end) = piece.end {
            if self.heading.include_usage {
                self.usage(end.usage, out);
            }
            out.put_slice(b"data: [DONE]\n\n");
        }
    }

    fn failure(&mut self, error: &WireError, out: &mut BytesMut) {
        // No [DONE]: a client must not take what it has for the whole.
        out.put_slice(b"data: ");
        errors::write(error, out);
        out.put_slice(b"\n\n");
    }

    fn keep_alive(&self) -> &'static [u8] {
        // No empty line follows: openai-python dispatches an event without data at one, once it has seen an `id:`, and
        // fails to parse it.
        b": keep-alive\n"
    }
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("texts and numbers are always writable")
}

fn put_json<T: Serialize>(value: &T, out: &mut BytesMut) {
    let written = serde_json::to_writer(out.writer(), value);
    debug_assert!(written.is_ok(), "texts and numbers are always writable");
}

#[cfg(test)]
mod tests;

//! Streams answers as server-sent events in OpenAI's format.

use std::fmt::Write as _;

use bytes::{BufMut as _, Bytes, BytesMut};
use protocol::infer::Degraded;
use protocol::usage::TokenUsage;
use protocol::{UnixMillis, WireError};
use serde::Serialize;

use super::chunk::{ChatChoice, Delta, Head, TextChoice};
use super::logprobs::{ChatLogprobs, TextLogprobs, TextPosition};
use super::{Heading, Usage, error, fingerprint};
use crate::answer::{Answer, Content, EventId, Piece, StreamFormat};
use crate::openai::Endpoint;

/// Writes an answer as server-sent events.
pub(crate) struct Sse {
    heading: Heading,
    /// The JSON that every chunk begins with, up to its choices, serialized once.
    head: Vec<u8>,
    choices: Vec<ChoiceState>,
    /// When the answer began, if it can be resumed.
    began: Option<UnixMillis>,
    /// The last event that the client has.
    after: Option<u64>,
}

/// The state of one of several answers.
#[derive(Clone, Default)]
struct ChoiceState {
    /// Whether the role was sent, which is part of the first chunk.
    role: bool,
    /// The position of its next log-probability.
    position: TextPosition,
}

impl Sse {
    pub(crate) fn new(heading: Heading) -> Self {
        let position = |chars: &usize| TextPosition::of(*chars, heading.echo);
        let choices =
            heading.prompt_chars.iter().map(|chars| ChoiceState { role: false, position: position(chars) }).collect();
        Self { heading, head: vec![], choices, began: None, after: None }
    }

    /// Leaves out the events up to one that the client has.
    pub(crate) fn after(self, event: Option<EventId>) -> Self {
        Self { after: event.map(|event| event.seq), ..self }
    }

    fn set_head(&mut self, created: u64, fingerprint: &str) {
        let Heading { endpoint, id, model, service_tier, .. } = &self.heading;
        let object = endpoint.streamed_object();
        let head = Head { id, object, created, model, system_fingerprint: fingerprint, service_tier: *service_tier };
        self.head = json(&head);
        self.head.pop();
        self.head.extend_from_slice(b",\"choices\":[");
    }

    /// Writes the chunk for a piece's content, if there is any.
    fn content(&mut self, piece: &Piece, out: &mut BytesMut) {
        let content = &piece.content;
        let Content { index, text, logprobs, finish_reason, .. } = content;
        let Some(choice) = self.choices.get_mut(*index as usize) else { return };
        let is_chat = self.heading.endpoint == Endpoint::Chat;
        // A token may be part of a character and bring no text yet. A chat's first chunk is always written, since it
        // brings the role.
        if !content.has_something() && finish_reason.is_none() && (choice.role || !is_chat) {
            return;
        }
        out.reserve(64 + self.head.len() + 2 * text.len() + 128);
        let written = match self.began {
            Some(created_at) => write!(out, "id: {}\ndata: ", EventId { created_at, seq: piece.seq }),
            None => write!(out, "id: {}\ndata: ", piece.seq),
        };
        debug_assert!(written.is_ok(), "a buffer grows");
        out.put_slice(&self.head);
        let (index, finish_reason) = (*index, finish_reason.map(|reason| self.heading.finish_reason(reason)));
        if is_chat {
            let is_first = !std::mem::replace(&mut choice.role, true);
            let delta = Delta::of(content, is_first, self.heading.calls_functions);
            put_json(&ChatChoice { index, delta, logprobs: ChatLogprobs::of(logprobs), finish_reason }, out);
        } else {
            let logprobs = TextLogprobs::of(logprobs, &mut choice.position);
            put_json(&TextChoice { index, text, logprobs, finish_reason }, out);
        }
        out.put_slice(if self.heading.include_usage { b"],\"usage\":null" } else { b"]" });
        put_trailer(content, out);
        out.put_slice(b"}\n\n");
    }

    fn usage(&self, usage: TokenUsage, content: &Content, out: &mut BytesMut) {
        out.put_slice(b"data: ");
        out.put_slice(&self.head);
        out.put_slice(b"],\"usage\":");
        put_json(&Usage::from(usage), out);
        put_trailer(content, out);
        out.put_slice(b"}\n\n");
    }
}

impl StreamFormat for Sse {
    fn begin(&mut self, answer: &Answer) {
        self.began = answer.origin().map(|origin| origin.created_at);
        self.heading.model = self.heading.model(answer);
        self.set_head(self.heading.created(answer), &fingerprint(answer));
    }

    fn piece(&mut self, piece: &Piece, out: &mut BytesMut) {
        let before = out.len();
        self.content(piece, out);
        if self.after.is_some_and(|after| piece.seq <= after) {
            // The client has this event. Writing it has moved on what the later ones depend on.
            out.truncate(before);
        }
        if let Some(end) = piece.end {
            if self.heading.include_usage {
                self.usage(end.usage, &piece.content, out);
            }
            out.put_slice(b"data: [DONE]\n\n");
        }
    }

    fn failure(&mut self, failure: &WireError, out: &mut BytesMut) {
        // Without [DONE], so that a client does not mistake the part it has for the whole answer.
        out.put_slice(b"data: ");
        error::write(failure, out);
        out.put_slice(b"\n\n");
    }

    fn keep_alive(&self) -> Bytes {
        // No empty line follows: openai-python dispatches an event without data at one, once it has seen an `id:`, and
        // fails to parse it.
        Bytes::from_static(b": keep-alive\n")
    }
}

/// How the job was degraded and continued, in the last chunk of the answer.
#[derive(Serialize)]
struct Trailer<'a> {
    /// How often another worker continued it.
    #[serde(skip_serializing_if = "is_zero")]
    continued: u32,
    /// How the job was made cheaper.
    #[serde(skip_serializing_if = "Option::is_none")]
    degraded: Option<&'a Degraded>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Writes the trailer, if there is anything to say.
fn put_trailer(content: &Content, out: &mut BytesMut) {
    let trailer = Trailer { continued: content.continued, degraded: content.degraded.as_deref() };
    if trailer.continued > 0 || trailer.degraded.is_some() {
        out.put_slice(b",\"tether\":");
        put_json(&trailer, out);
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

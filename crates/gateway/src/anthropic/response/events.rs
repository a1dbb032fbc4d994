//! Streams answers as server-sent events in Anthropic's format.

use std::collections::BTreeMap;

use bytes::{BufMut as _, Bytes, BytesMut};
use protocol::WireError;
use protocol::infer::ToolCallDelta;
use protocol::usage::TokenUsage;
use serde::Serialize;

use super::block::{Block, no_input};
use super::error::ErrorBody;
use super::{Heading, Message, Usage, stop};
use crate::answer::{Answer, End, Piece, StreamFormat};

/// Writes an answer as server-sent events.
pub(crate) struct Events {
    heading: Heading,
    has_begun: bool,
    /// The block that is open, which is the last one.
    open: Option<Kind>,
    /// The number of blocks.
    blocks: u32,
    /// The block of each call.
    calls: BTreeMap<u32, u32>,
}

/// What a block consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    Call,
}

/// An event. Its name is its type.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart { message: Message<'a> },
    ContentBlockStart { index: u32, content_block: Block<'a> },
    ContentBlockDelta { index: u32, delta: Delta<'a> },
    ContentBlockStop { index: u32 },
    MessageDelta { delta: Ending<'a>, usage: Usage },
    MessageStop,
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum Delta<'a> {
    #[serde(rename = "text_delta")]
    Text { text: &'a str },
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: &'a str },
    #[serde(rename = "signature_delta")]
    Signature { signature: &'a str },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: &'a str },
}

#[derive(Serialize)]
struct Ending<'a> {
    stop_reason: &'static str,
    stop_sequence: Option<&'a str>,
}

impl Event<'_> {
    fn name(&self) -> &'static [u8] {
        match self {
            Self::MessageStart { .. } => b"message_start",
            Self::ContentBlockStart { .. } => b"content_block_start",
            Self::ContentBlockDelta { .. } => b"content_block_delta",
            Self::ContentBlockStop { .. } => b"content_block_stop",
            Self::MessageDelta { .. } => b"message_delta",
            Self::MessageStop => b"message_stop",
        }
    }

    fn put(&self, out: &mut BytesMut) {
        put(self.name(), self, out);
    }
}

fn put<T: Serialize>(name: &[u8], data: &T, out: &mut BytesMut) {
    out.put_slice(b"event: ");
    out.put_slice(name);
    out.put_slice(b"\ndata: ");
    let written = serde_json::to_writer((&mut *out).writer(), data);
    debug_assert!(written.is_ok(), "texts and numbers are always writable");
    out.put_slice(b"\n\n");
}

impl Events {
    pub(crate) fn new(heading: Heading) -> Self {
        Self { heading, has_begun: false, open: None, blocks: 0, calls: BTreeMap::new() }
    }

    /// Begins the message with the first piece, which has the usage of the prompt.
    fn start(&mut self, piece: &Piece, out: &mut BytesMut) {
        if !std::mem::replace(&mut self.has_begun, true) {
            let usage = piece.content.usage.unwrap_or_default();
            let message = Message::begin(&self.heading, TokenUsage { completion_tokens: 0, ..usage });
            Event::MessageStart { message }.put(out);
        }
    }

    /// Opens a block, unless one of this kind is open.
    fn enter(&mut self, kind: Kind, content_block: Block<'_>, out: &mut BytesMut) {
        if self.open != Some(kind) {
            self.begin_block(kind, content_block, out);
        }
    }

    fn begin_block(&mut self, kind: Kind, content_block: Block<'_>, out: &mut BytesMut) {
        self.close(out);
        Event::ContentBlockStart { index: self.blocks, content_block }.put(out);
        self.open = Some(kind);
        self.blocks += 1;
    }

    /// Ends the block that is open.
    fn close(&mut self, out: &mut BytesMut) {
        let Some(kind) = self.open.take() else { return };
        let index = self.blocks - 1;
        if kind == Kind::Thinking {
            Event::ContentBlockDelta { index, delta: Delta::Signature { signature: &self.heading.id } }.put(out);
        }
        Event::ContentBlockStop { index }.put(out);
    }

    fn text(&mut self, text: &str, out: &mut BytesMut) {
        if !text.is_empty() {
            self.enter(Kind::Text, Block::Text { text: "" }, out);
            Event::ContentBlockDelta { index: self.blocks - 1, delta: Delta::Text { text } }.put(out);
        }
    }

    fn thinking(&mut self, thinking: &str, out: &mut BytesMut) {
        if !thinking.is_empty() {
            self.enter(Kind::Thinking, Block::Thinking { thinking: "", signature: "" }, out);
            Event::ContentBlockDelta { index: self.blocks - 1, delta: Delta::Thinking { thinking } }.put(out);
        }
    }

    /// Writes a part of a call. The first part of each call has its id and name; some servers repeat them.
    fn call(&mut self, delta: &ToolCallDelta, out: &mut BytesMut) {
        if let (Some(id), Some(name), None) = (&delta.id, &delta.name, self.calls.get(&delta.index)) {
            self.begin_block(Kind::Call, Block::ToolUse { id, name, input: no_input() }, out);
            self.calls.insert(delta.index, self.blocks - 1);
        }
        let partial_json = &*delta.arguments;
        if let Some(block) = self.calls.get(&delta.index).filter(|_| !partial_json.is_empty()) {
            Event::ContentBlockDelta { index: *block, delta: Delta::InputJson { partial_json } }.put(out);
        }
    }

    fn end(&mut self, piece: &Piece, end: End, out: &mut BytesMut) {
        self.close(out);
        let (stop_reason, stop_sequence) = stop(end.reason, piece.content.stop_sequence.as_deref());
        let usage = Usage::of(end.usage, self.heading.service_tier);
        Event::MessageDelta { delta: Ending { stop_reason, stop_sequence }, usage }.put(out);
        Event::MessageStop.put(out);
    }
}

impl StreamFormat for Events {
    fn begin(&mut self, answer: &Answer) {
        self.heading.model = answer.model_name(&self.heading.model);
    }

    fn piece(&mut self, piece: &Piece, out: &mut BytesMut) {
        self.start(piece, out);
        self.thinking(&piece.content.reasoning, out);
        self.text(&piece.content.text, out);
        // Servers may mix parts of several calls, and a block that has ended takes no more.
        let mut calls: Vec<_> = piece.content.tool_calls.iter().collect();
        calls.sort_by_key(|call| call.index);
        for call in calls {
            self.call(call, out);
        }
        if let Some(end) = piece.end {
            self.end(piece, end, out);
        }
    }

    fn failure(&mut self, failure: &WireError, out: &mut BytesMut) {
        put(b"error", &ErrorBody::of(failure, None), out);
    }

    fn keep_alive(&self) -> Bytes {
        Bytes::from_static(b"event: ping\ndata: {\"type\":\"ping\"}\n\n")
    }
}

#[cfg(test)]
mod tests;

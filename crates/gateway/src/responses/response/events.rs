//! Streams answers as the events of a response.

use bytes::{BufMut as _, Bytes, BytesMut};
use protocol::WireError;
use protocol::infer::{FinishReason, ToolCallDelta};
use protocol::kept::KeptStatus;
use serde::Serialize;

use super::free_form::{self, FreeForm};
use super::output::{ItemStatus, Logprob, OutputItem, OutputPart};
use super::{Failure, Heading, Response, Status};
use crate::answer::{Answer, Content, End, Piece, StreamFormat};

/// Writes an answer as server-sent events.
pub(crate) struct Events {
    heading: Heading,
    writer: Writer,
    has_begun: bool,
    items: Vec<Open>,
}

/// An item that is being written.
struct Open {
    item: OutputItem,
    /// The text so far: of a message, of reasoning, or of a call's arguments.
    text: String,
    logprobs: Vec<Logprob>,
    /// The index of the call in the answer.
    call: Option<u32>,
    /// Reads the text of a custom tool's call.
    free_form: FreeForm,
    has_ended: bool,
}

impl Open {
    fn new(item: OutputItem, call: Option<u32>) -> Self {
        let (text, free_form) = (String::new(), FreeForm::default());
        Self { item, text, logprobs: vec![], call, free_form, has_ended: false }
    }
}

/// Numbers the events, and leaves out those that the client has.
#[derive(Default)]
struct Writer {
    next: u64,
    /// The last event that the client has.
    after: Option<u64>,
}

/// An event of a response.
#[derive(Serialize)]
struct Event<T> {
    r#type: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    fields: T,
}

#[derive(Serialize)]
struct OfResponse<'a> {
    response: Response<'a>,
}

#[derive(Serialize)]
struct OfItem<'a> {
    output_index: usize,
    item: &'a OutputItem,
}

#[derive(Serialize)]
struct OfPart<'a> {
    item_id: &'a str,
    output_index: usize,
    content_index: u32,
    part: &'a OutputPart,
}

/// A part of a text, or a whole one.
#[derive(Default, Serialize)]
struct OfText<'a> {
    item_id: &'a str,
    output_index: usize,
    /// Index of the part within a message; calls have no parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<&'a str>,
    /// Present in a message's text alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [Logprob]>,
}

#[derive(Serialize)]
struct OfError<'a> {
    code: &'static str,
    message: &'a str,
    param: Option<&'a str>,
}

impl Writer {
    /// Leaves out nothing from here on: the next event has a higher number than those that the client has.
    fn leave_none_out(&mut self) {
        if let Some(after) = self.after.take() {
            self.next = self.next.max(after.saturating_add(1));
        }
    }

    fn write<T: Serialize>(&mut self, kind: &'static str, fields: T, out: &mut BytesMut) {
        let sequence_number = self.next;
        self.next = self.next.saturating_add(1);
        if self.after.is_some_and(|after| sequence_number <= after) {
            return;
        }
        out.put_slice(b"event: ");
        out.put_slice(kind.as_bytes());
        out.put_slice(b"\ndata: ");
        let written = serde_json::to_writer(out.writer(), &Event { r#type: kind, sequence_number, fields });
        debug_assert!(written.is_ok(), "texts and numbers are always writable");
        out.put_slice(b"\n\n");
    }
}

impl Events {
    pub(crate) fn new(heading: Heading) -> Self {
        Self { heading, writer: Writer::default(), has_begun: false, items: vec![] }
    }

    /// Leaves out the events up to one that the client has.
    pub(crate) fn after(mut self, event: Option<u64>) -> Self {
        self.writer.after = event;
        self
    }

    /// Writes the events of a stored response that came to no answer.
    pub(crate) fn unanswered(mut self, status: KeptStatus, error: Option<&WireError>) -> Bytes {
        let mut out = BytesMut::new();
        self.begin_response(&mut out);
        self.writer.leave_none_out();
        let error = error.map(Failure::of);
        let response = Response { error, ..self.heading.response(status.into(), &[]) };
        self.writer.write("response.failed", OfResponse { response }, &mut out);
        out.freeze()
    }

    fn begin_response(&mut self, out: &mut BytesMut) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let opening: &[_] = if self.heading.is_background() {
            &[
                ("response.created", Status::Queued),
                ("response.queued", Status::Queued),
                ("response.in_progress", Status::InProgress),
            ]
        } else {
            &[("response.created", Status::InProgress), ("response.in_progress", Status::InProgress)]
        };
        for (kind, status) in opening {
            let response = self.heading.response(*status, &[]);
            self.writer.write(kind, OfResponse { response }, out);
        }
    }

    fn content(&mut self, content: &Content, out: &mut BytesMut) {
        let Content { text, reasoning, tool_calls, logprobs, .. } = content;
        if !reasoning.is_empty() {
            let index = self.text_item(OutputItem::reasoning, out);
            self.put_reasoning(index, reasoning, out);
        }
        let is_in_message = matches!(self.last_open(), Some(Open { item: OutputItem::Message { .. }, .. }));
        if !text.is_empty() || (is_in_message && !logprobs.is_empty() && reasoning.is_empty()) {
            let index = self.text_item(OutputItem::message, out);
            self.put_text(index, text, Logprob::of(logprobs), out);
        }
        for delta in tool_calls {
            self.put_call(delta, out);
        }
    }

    fn last_open(&self) -> Option<&Open> {
        self.items.last().filter(|open| !open.has_ended)
    }

    /// Returns the index of the message or reasoning that goes on, or begins it.
    fn text_item(&mut self, make: fn(&Heading, usize) -> OutputItem, out: &mut BytesMut) -> usize {
        let item = make(&self.heading, self.items.len());
        let is_same = |open: &Open| std::mem::discriminant(&open.item) == std::mem::discriminant(&item);
        if self.last_open().is_some_and(is_same) {
            return self.items.len() - 1;
        }
        let index = self.begin_item(Open::new(item, None), out);
        let item = &self.items[index].item;
        let part = empty_part(item);
        let fields = OfPart { item_id: item.id(), output_index: index, content_index: 0, part: &part };
        self.writer.write("response.content_part.added", fields, out);
        index
    }

    /// Begins an item, after which no message or reasoning goes on. Calls may, side by side.
    fn begin_item(&mut self, open: Open, out: &mut BytesMut) -> usize {
        for index in 0..self.items.len() {
            if self.items[index].call.is_none() {
                self.end_item(index, ItemStatus::Completed, out);
            }
        }
        let output_index = self.items.len();
        self.writer.write("response.output_item.added", OfItem { output_index, item: &open.item }, out);
        self.items.push(open);
        output_index
    }

    fn put_reasoning(&mut self, index: usize, delta: &str, out: &mut BytesMut) {
        let open = &mut self.items[index];
        open.text += delta;
        let fields = OfText { delta: Some(delta), ..of(open.item.id(), index, Some(0)) };
        self.writer.write("response.reasoning_text.delta", fields, out);
    }

    fn put_text(&mut self, index: usize, delta: &str, logprobs: Vec<Logprob>, out: &mut BytesMut) {
        let open = &mut self.items[index];
        open.text += delta;
        let fields = OfText { delta: Some(delta), logprobs: Some(&logprobs), ..of(open.item.id(), index, Some(0)) };
        self.writer.write("response.output_text.delta", fields, out);
        open.logprobs.extend(logprobs);
    }

    fn put_call(&mut self, delta: &ToolCallDelta, out: &mut BytesMut) {
        let known = self.items.iter().position(|open| open.call == Some(delta.index));
        let index = match (known, &delta.id, &delta.name) {
            (Some(index), ..) => index,
            (None, Some(id), Some(name)) => {
                let item = OutputItem::call(&self.heading, self.items.len(), id.clone(), name);
                self.begin_item(Open::new(item, Some(delta.index)), out)
            }
            // Without a beginning there is no call to add to.
            (None, ..) => return,
        };
        let open = &mut self.items[index];
        open.text += &delta.arguments;
        let (kind, text) = match &open.item {
            OutputItem::CustomToolCall { .. } => {
                ("response.custom_tool_call_input.delta", open.free_form.push(&delta.arguments))
            }
            _ => ("response.function_call_arguments.delta", delta.arguments.clone()),
        };
        if !text.is_empty() {
            let fields = OfText { delta: Some(&text), ..of(open.item.id(), index, None) };
            self.writer.write(kind, fields, out);
        }
    }

    fn end_item(&mut self, index: usize, status: ItemStatus, out: &mut BytesMut) {
        let open = &mut self.items[index];
        if std::mem::replace(&mut open.has_ended, true) {
            return;
        }
        let writer = &mut self.writer;
        if let OutputItem::CustomToolCall { .. } = open.item {
            let text = free_form::text_of(&open.text);
            if !open.free_form.has_begun() && !text.is_empty() {
                let fields = OfText { delta: Some(&text), ..of(open.item.id(), index, None) };
                writer.write("response.custom_tool_call_input.delta", fields, out);
            }
            open.text = text;
        }
        open.item = open.item.clone().with(&open.text, std::mem::take(&mut open.logprobs), status);
        let blank = of(open.item.id(), index, None);
        let in_content = of(open.item.id(), index, Some(0));
        match &open.item {
            OutputItem::Reasoning { content, .. } => {
                let fields = OfText { text: Some(&open.text), ..in_content };
                writer.write("response.reasoning_text.done", fields, out);
                end_part(writer, open.item.id(), index, content, out);
            }
            OutputItem::Message { content, .. } => {
                let logprobs = content.iter().find_map(OutputPart::logprobs);
                let fields = OfText { text: Some(&open.text), logprobs, ..in_content };
                writer.write("response.output_text.done", fields, out);
                end_part(writer, open.item.id(), index, content, out);
            }
            OutputItem::FunctionCall { name, arguments, .. } => {
                let fields = OfText { name: Some(name), arguments: Some(arguments), ..blank };
                writer.write("response.function_call_arguments.done", fields, out);
            }
            OutputItem::CustomToolCall { input, .. } => {
                writer.write("response.custom_tool_call_input.done", OfText { input: Some(input), ..blank }, out);
            }
        }
        writer.write("response.output_item.done", OfItem { output_index: index, item: &open.item }, out);
    }

    fn end(&mut self, end: End, out: &mut BytesMut) {
        if self.items.is_empty() {
            self.text_item(OutputItem::message, out);
        }
        let is_cut = end.reason == FinishReason::Length;
        let last = self.items.len() - 1;
        for index in 0..=last {
            let status = if is_cut && index == last { ItemStatus::Incomplete } else { ItemStatus::Completed };
            self.end_item(index, status, out);
        }
        let output: Vec<OutputItem> = self.items.drain(..).map(|open| open.item).collect();
        let response = self.heading.ended(end.reason, end.usage, &output);
        let kind = if is_cut { "response.incomplete" } else { "response.completed" };
        self.writer.write(kind, OfResponse { response }, out);
    }
}

impl StreamFormat for Events {
    fn begin(&mut self, answer: &Answer) {
        self.heading.begin(answer.degraded(), answer.origin());
    }

    fn piece(&mut self, piece: &Piece, out: &mut BytesMut) {
        self.begin_response(out);
        self.content(&piece.content, out);
        if let Some(end) = piece.end {
            self.end(end, out);
        }
    }

    fn failure(&mut self, failure: &WireError, out: &mut BytesMut) {
        self.writer.leave_none_out();
        if !self.has_begun {
            let param = failure.param.as_deref();
            let fields = OfError { code: failure.code.as_str(), message: &failure.message, param };
            return self.writer.write("error", fields, out);
        }
        let open = self.items.drain(..).filter(|open| open.has_ended);
        let output: Vec<OutputItem> = open.map(|open| open.item).collect();
        let response = self.heading.response(Status::Failed, &output);
        let response = Response { error: Some(Failure::of(failure)), ..response };
        self.writer.write("response.failed", OfResponse { response }, out);
    }

    fn keep_alive(&self) -> Bytes {
        Bytes::from_static(b": keep-alive\n")
    }
}

fn of(item_id: &str, output_index: usize, content_index: Option<u32>) -> OfText<'_> {
    OfText { item_id, output_index, content_index, ..OfText::default() }
}

fn empty_part(item: &OutputItem) -> OutputPart {
    match item {
        OutputItem::Reasoning { .. } => OutputPart::reasoning(String::new()),
        _ => OutputPart::text(String::new(), vec![]),
    }
}

fn end_part(writer: &mut Writer, item_id: &str, output_index: usize, parts: &[OutputPart], out: &mut BytesMut) {
    for part in parts {
        let fields = OfPart { item_id, output_index, content_index: 0, part };
        writer.write("response.content_part.done", fields, out);
    }
}

#[cfg(test)]
mod tests;

//! The items of an answer.

use protocol::gateway::Choice;
use protocol::infer::{FinishReason, TokenLogprob};
use serde::Serialize;
use utoipa::ToSchema;

use super::Heading;
use super::free_form;
use crate::openai::request::{Content, Part};
use crate::responses::item::{Item, ItemRole};
use crate::responses::tool_names::ToolName;

/// An item of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schema(as = ResponseOutputItem)]
pub(crate) enum OutputItem {
    Reasoning {
        id: String,
        status: ItemStatus,
        /// Always empty, since the content is the whole reasoning.
        summary: Vec<String>,
        content: Vec<OutputPart>,
    },
    Message {
        id: String,
        status: ItemStatus,
        role: Assistant,
        content: Vec<OutputPart>,
    },
    FunctionCall {
        id: String,
        status: ItemStatus,
        call_id: String,
        name: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<String>,
        /// Arguments of the function as JSON text. A model may write text that is not valid JSON.
        arguments: String,
    },
    CustomToolCall {
        id: String,
        status: ItemStatus,
        call_id: String,
        name: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<String>,
        input: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ResponseItemStatus)]
pub(crate) enum ItemStatus {
    InProgress,
    Completed,
    Incomplete,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ResponseOutputRole)]
pub(crate) enum Assistant {
    Assistant,
}

/// A part of a message or of reasoning.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schema(as = ResponseOutputPart)]
pub(crate) enum OutputPart {
    OutputText {
        /// Always empty: models here cite nothing.
        annotations: Vec<String>,
        /// One for each token, if requested.
        logprobs: Vec<Logprob>,
        text: String,
    },
    ReasoningText {
        text: String,
    },
}

/// The log-probability of a token.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = ResponseLogprob)]
pub(crate) struct Logprob {
    #[serde(flatten)]
    #[schema(inline)]
    token: TopLogprob,
    top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = ResponseTopLogprob)]
struct TopLogprob {
    /// Text of the token. If the token is part of a character, only `bytes` identifies it.
    token: String,
    logprob: f32,
    #[schema(value_type = Vec<u32>)]
    bytes: Vec<u8>,
}

impl Logprob {
    pub(super) fn of(tokens: &[TokenLogprob]) -> Vec<Self> {
        let each = |token: &TokenLogprob| Self {
            token: TopLogprob::of(token),
            top_logprobs: token.top.iter().map(TopLogprob::of).collect(),
        };
        tokens.iter().map(each).collect()
    }
}

impl TopLogprob {
    fn of(token: &TokenLogprob) -> Self {
        let text = String::from_utf8_lossy(&token.bytes).into_owned();
        Self { token: text, logprob: token.logprob, bytes: token.bytes.clone() }
    }
}

impl OutputItem {
    pub(super) fn reasoning(heading: &Heading, index: usize) -> Self {
        let id = item_id("rs", heading, index);
        Self::Reasoning { id, status: ItemStatus::InProgress, summary: vec![], content: vec![] }
    }

    pub(super) fn message(heading: &Heading, index: usize) -> Self {
        let id = item_id("msg", heading, index);
        Self::Message { id, status: ItemStatus::InProgress, role: Assistant::Assistant, content: vec![] }
    }

    pub(super) fn call(heading: &Heading, index: usize, call_id: String, function: &str) -> Self {
        let ToolName { name, namespace, is_custom } = heading.names.of(function);
        let status = ItemStatus::InProgress;
        if is_custom {
            let id = item_id("ctc", heading, index);
            return Self::CustomToolCall { id, status, call_id, name, namespace, input: String::new() };
        }
        let id = item_id("fc", heading, index);
        Self::FunctionCall { id, status, call_id, name, namespace, arguments: String::new() }
    }

    /// Returns the item with its whole text.
    pub(super) fn with(mut self, text: &str, logprobs: Vec<Logprob>, ended: ItemStatus) -> Self {
        match &mut self {
            Self::Reasoning { content, status, .. } => {
                (*content, *status) = (vec![OutputPart::reasoning(text.to_owned())], ended);
            }
            Self::Message { content, status, .. } => {
                (*content, *status) = (vec![OutputPart::text(text.to_owned(), logprobs)], ended);
            }
            Self::FunctionCall { arguments, status, .. } => (*arguments, *status) = (text.to_owned(), ended),
            Self::CustomToolCall { input, status, .. } => (*input, *status) = (text.to_owned(), ended),
        }
        self
    }

    pub(super) fn id(&self) -> &str {
        match self {
            Self::Reasoning { id, .. }
            | Self::Message { id, .. }
            | Self::FunctionCall { id, .. }
            | Self::CustomToolCall { id, .. } => id,
        }
    }
}

impl From<OutputItem> for Item {
    fn from(item: OutputItem) -> Self {
        let text_of = |parts: Vec<OutputPart>| Some(Content::Parts(parts.into_iter().map(Part::from).collect()));
        let kind = |kind: &str| Some(kind.to_owned());
        let call = |name_of_kind: &str, id, call_id, name, namespace| Self {
            id: Some(id),
            kind: kind(name_of_kind),
            call_id: Some(call_id),
            name: Some(name),
            namespace,
            ..Self::default()
        };
        match item {
            OutputItem::Reasoning { id, content, .. } => {
                Self { id: Some(id), kind: kind("reasoning"), content: text_of(content), ..Self::default() }
            }
            OutputItem::Message { id, content, .. } => Self {
                id: Some(id),
                kind: kind("message"),
                role: Some(ItemRole::Assistant),
                content: text_of(content),
                ..Self::default()
            },
            OutputItem::FunctionCall { id, call_id, name, namespace, arguments, .. } => {
                Self { arguments: Some(arguments), ..call("function_call", id, call_id, name, namespace) }
            }
            OutputItem::CustomToolCall { id, call_id, name, namespace, input, .. } => {
                Self { input: Some(input), ..call("custom_tool_call", id, call_id, name, namespace) }
            }
        }
    }
}

impl From<OutputPart> for Part {
    fn from(part: OutputPart) -> Self {
        let (kind, text) = match part {
            OutputPart::OutputText { text, .. } => ("output_text", text),
            OutputPart::ReasoningText { text } => ("reasoning_text", text),
        };
        Self { kind: kind.to_owned(), text: Some(text), refusal: None }
    }
}

impl OutputPart {
    pub(super) fn text(text: String, logprobs: Vec<Logprob>) -> Self {
        Self::OutputText { annotations: vec![], logprobs, text }
    }

    pub(super) fn reasoning(text: String) -> Self {
        Self::ReasoningText { text }
    }

    pub(super) fn logprobs(&self) -> Option<&[Logprob]> {
        match self {
            Self::OutputText { logprobs, .. } => Some(logprobs),
            Self::ReasoningText { .. } => None,
        }
    }
}

/// Returns the id of an item. It follows from the response's, so that an answer that is read again has the same ids.
fn item_id(prefix: &str, heading: &Heading, index: usize) -> String {
    format!("{prefix}_{}{index:02}", heading.id.trim_start_matches("resp_"))
}

/// Returns the items of a whole answer: reasoning, message, calls. An answer without any has an empty message.
pub(super) fn items(heading: &Heading, choice: &Choice) -> Vec<OutputItem> {
    let Choice { text, reasoning, tool_calls, logprobs, finish_reason, .. } = choice;
    let is_cut = *finish_reason == FinishReason::Length;
    let has_message = !text.is_empty() || (reasoning.is_empty() && tool_calls.is_empty());
    let count = usize::from(!reasoning.is_empty()) + usize::from(has_message) + tool_calls.len();
    let status = |index: usize| {
        if is_cut && index + 1 == count { ItemStatus::Incomplete } else { ItemStatus::Completed }
    };
    let mut items = Vec::with_capacity(count);
    if !reasoning.is_empty() {
        items.push(OutputItem::reasoning(heading, 0).with(reasoning, vec![], status(0)));
    }
    if has_message {
        let index = items.len();
        items.push(OutputItem::message(heading, index).with(text, Logprob::of(logprobs), status(index)));
    }
    for call in tool_calls {
        let index = items.len();
        let item = OutputItem::call(heading, index, call.id.clone(), &call.name);
        let text = match &item {
            OutputItem::CustomToolCall { .. } => free_form::text_of(&call.arguments),
            _ => call.arguments.clone(),
        };
        items.push(item.with(&text, vec![], status(index)));
    }
    items
}

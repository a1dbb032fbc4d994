//! The JSON of a streamed answer's chunks.

use serde::Serialize;

use super::logprobs::{ChatLogprobs, TextLogprobs};
use super::tool_calls::{CallDelta, CalledFunctionDelta};
use crate::answer::Content;

#[derive(Serialize)]
pub(super) struct ChatChoice<'a> {
    pub(super) index: u32,
    pub(super) delta: Delta<'a>,
    pub(super) logprobs: Option<ChatLogprobs<'a>>,
    pub(super) finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
pub(super) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "DeltaText::is_missing")]
    pub(super) content: DeltaText<'a>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(super) reasoning_content: &'a str,
    /// The same text. Clients know one of the two names.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(super) reasoning: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tool_calls: Vec<CallDelta<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) function_call: Option<CalledFunctionDelta<'a>>,
}

/// The text of a delta. The first delta, which carries the role, always includes it, as null if it brings reasoning or
/// tool calls instead.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum DeltaText<'a> {
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
pub(super) struct TextChoice<'a> {
    pub(super) index: u32,
    pub(super) text: &'a str,
    pub(super) logprobs: Option<TextLogprobs<'a>>,
    pub(super) finish_reason: Option<&'static str>,
}

/// A chunk's fields before its choices. The closing brace is cut off after serialization.
#[derive(Serialize)]
pub(super) struct Head<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) system_fingerprint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) service_tier: Option<&'static str>,
}

impl<'a> Delta<'a> {
    pub(super) fn of(content: &'a Content, is_first: bool, calls_functions: bool) -> Self {
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
            reasoning,
            tool_calls: tool_calls.iter().filter(|_| !calls_functions).map(CallDelta::of).collect(),
            function_call: CalledFunctionDelta::of(tool_calls).filter(|_| calls_functions),
        }
    }
}

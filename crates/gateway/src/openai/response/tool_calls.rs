//! Tool calls in OpenAI's format, whole and streamed.

use protocol::infer::{ToolCall, ToolCallDelta};
use serde::Serialize;
use utoipa::ToSchema;

/// A function call.
#[derive(Serialize, ToSchema)]
#[schema(as = ChatToolCall)]
pub(super) struct WholeCall<'a> {
    id: &'a str,
    /// Always `function`.
    r#type: &'static str,
    function: WholeFunction<'a>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = CalledFunction)]
pub(super) struct WholeFunction<'a> {
    name: &'a str,
    /// Arguments of the function as JSON text. A model may write text that is not valid JSON.
    arguments: &'a str,
}

/// A tool call delta of a streamed answer.
#[derive(Serialize)]
pub(super) struct CallDelta<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    /// Present whenever the id is.
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

/// A part of the one call that an answer makes in the older form.
#[derive(Serialize)]
pub(super) struct CalledFunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: String,
}

impl<'a> WholeCall<'a> {
    pub(super) fn of(call: &'a ToolCall) -> Self {
        Self { id: &call.id, r#type: "function", function: WholeFunction::of(call) }
    }
}

impl<'a> WholeFunction<'a> {
    pub(super) fn of(call: &'a ToolCall) -> Self {
        Self { name: &call.name, arguments: &call.arguments }
    }
}

impl<'a> CalledFunctionDelta<'a> {
    /// Joins the parts of the first call. Some servers make further calls despite the request.
    pub(super) fn of(deltas: &'a [ToolCallDelta]) -> Option<Self> {
        let mut parts = deltas.iter().filter(|delta| delta.index == 0).peekable();
        parts.peek()?;
        let start = Self { name: None, arguments: String::new() };
        Some(parts.fold(start, |whole, delta| Self {
            name: whole.name.or(delta.name.as_deref()),
            arguments: whole.arguments + &delta.arguments,
        }))
    }
}

impl<'a> CallDelta<'a> {
    pub(super) fn of(delta: &'a ToolCallDelta) -> Self {
        let ToolCallDelta { index, id, name, arguments } = delta;
        let (id, name) = (id.as_deref(), name.as_deref());
        Self { index: *index, id, r#type: id.map(|_| "function"), function: FunctionDelta { name, arguments } }
    }
}

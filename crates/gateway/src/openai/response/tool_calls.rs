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
struct WholeFunction<'a> {
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

impl<'a> WholeCall<'a> {
    pub(super) fn of(call: &'a ToolCall) -> Self {
        let ToolCall { id, name, arguments } = call;
        Self { id, r#type: "function", function: WholeFunction { name, arguments } }
    }
}

impl<'a> CallDelta<'a> {
    pub(super) fn of(delta: &'a ToolCallDelta) -> Self {
        let ToolCallDelta { index, id, name, arguments } = delta;
        let (id, name) = (id.as_deref(), name.as_deref());
        Self { index: *index, id, r#type: id.map(|_| "function"), function: FunctionDelta { name, arguments } }
    }
}

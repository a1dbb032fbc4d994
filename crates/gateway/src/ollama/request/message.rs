//! Messages of a conversation, as Ollama's clients write them.

use std::collections::VecDeque;

use protocol::infer::{Message, Role, ToolCall};
use protocol::{ErrorCode, WireError};
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::json_body::{invalid, missing};

/// A message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct OllamaMessage {
    role: OllamaRole,
    content: Option<String>,
    /// An assistant's reasoning before the text.
    thinking: Option<String>,
    /// Refused unless it is empty: models here take texts alone.
    images: Option<Vec<String>>,
    /// Functions that an assistant called.
    tool_calls: Option<Vec<Call>>,
    /// Name of the function whose result a tool's message contains.
    tool_name: Option<String>,
    /// Id of the call whose result a tool's message contains, if the call has one.
    tool_call_id: Option<String>,
}

/// Author of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum OllamaRole {
    System,
    User,
    Assistant,
    Tool,
}

/// A function that an assistant called, with its arguments as an object.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = OllamaCall)]
struct Call {
    id: Option<String>,
    function: CalledFunction,
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = OllamaCalledFunction)]
struct CalledFunction {
    name: String,
    /// Arguments of the function.
    #[schema(value_type = Option<Object>)]
    arguments: Option<Value>,
}

/// A call whose result has not come yet.
struct Unanswered {
    id: String,
    name: String,
}

/// Converts a conversation. Calls without ids get some, and the results of their functions refer to them in order.
pub(super) fn convert(messages: Vec<OllamaMessage>) -> Result<Vec<Message>, WireError> {
    let (mut unanswered, mut calls) = (VecDeque::new(), 0);
    let convert = |(index, message): (usize, OllamaMessage)| message.convert(index, &mut calls, &mut unanswered);
    messages.into_iter().enumerate().map(convert).collect()
}

impl OllamaMessage {
    /// Converts one message. `calls` counts the calls before it.
    fn convert(
        self,
        index: usize,
        calls: &mut usize,
        unanswered: &mut VecDeque<Unanswered>,
    ) -> Result<Message, WireError> {
        let path = |field: &str| format!("messages[{index}].{field}");
        if self.images.is_some_and(|images| !images.is_empty()) {
            return Err(no_images(&path("images")));
        }
        let role = match self.role {
            OllamaRole::System => Role::System,
            OllamaRole::User => Role::User,
            OllamaRole::Assistant => Role::Assistant,
            OllamaRole::Tool => Role::Tool,
        };
        let made = self.tool_calls.unwrap_or_default();
        if !made.is_empty() && role != Role::Assistant {
            return Err(invalid(&path("tool_calls"), "are an assistant's"));
        }
        let mut tool_calls = vec![];
        for call in made {
            let call = call.convert(*calls, &path("tool_calls"))?;
            *calls += 1;
            unanswered.push_back(Unanswered { id: call.id.clone(), name: call.name.clone() });
            tool_calls.push(call);
        }
        let content = match self.content {
            Some(content) => content,
            None if !tool_calls.is_empty() => String::new(),
            None => return Err(missing(&path("content"))),
        };
        let tool_call_id = match role {
            Role::Tool => Some(self.tool_call_id.unwrap_or_else(|| answered(unanswered, self.tool_name.as_deref()))),
            _ => None,
        };
        let reasoning = self.thinking.filter(|thought| role == Role::Assistant && !thought.is_empty());
        Ok(Message { role, content, reasoning, tool_calls, tool_call_id, name: self.tool_name })
    }
}

/// Returns the id of the call that a result is of: the first unanswered one of this name, or else the first.
fn answered(unanswered: &mut VecDeque<Unanswered>, name: Option<&str>) -> String {
    let named = name.and_then(|name| unanswered.iter().position(|call| call.name == name));
    unanswered.remove(named.unwrap_or(0)).map_or_else(|| call_id(0), |call| call.id)
}

/// Returns the id of a call whose client gave it none.
fn call_id(index: usize) -> String {
    format!("call_{index}")
}

impl Call {
    fn convert(self, index: usize, path: &str) -> Result<ToolCall, WireError> {
        let CalledFunction { name, arguments } = self.function;
        let arguments = match arguments {
            None | Some(Value::Null) => "{}".to_owned(),
            Some(arguments @ Value::Object(_)) => arguments.to_string(),
            // Some clients send back the text that OpenAI's API has.
            Some(Value::String(text)) => text,
            Some(_) => return Err(invalid(path, "must have an object as the arguments of each call")),
        };
        Ok(ToolCall { id: self.id.unwrap_or_else(|| call_id(index)), name, arguments })
    }
}

/// Returns the error for images.
pub(super) fn no_images(param: &str) -> WireError {
    let message = format!("images are not supported here: leave out {param}");
    WireError::new(ErrorCode::UnsupportedParameter, message).with_param(param)
}

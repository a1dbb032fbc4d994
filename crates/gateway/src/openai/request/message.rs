//! Chat messages, as OpenAI's clients send them.

use protocol::infer::{Message, Role, ToolCall};
use protocol::{ErrorCode, WireError};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::json_body::{TextOr, invalid, is_empty, missing, refuse_unless, text_or};

/// One message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ChatMessage {
    role: ChatRole,
    /// Text of the message. It may be null if an assistant only calls functions.
    content: Option<Content>,
    /// Name of the author. In a function's message, the name of the function.
    name: Option<String>,
    /// Functions that an assistant called.
    tool_calls: Option<Vec<Call>>,
    /// Id of the call whose result a tool's message contains.
    tool_call_id: Option<String>,
    /// An assistant's reasoning, as DeepSeek's and vLLM's clients send it back. Not in OpenAI's API.
    reasoning_content: Option<String>,
    /// The newer name of `reasoning_content`.
    reasoning: Option<String>,
    /// The older form of `tool_calls`: the function that an assistant called. A message of the role `function` has its
    /// result.
    #[schema(value_type = Option<CalledFunction>)]
    function_call: Option<CalledFunction>,
    /// Refused unless it is empty.
    audio: Option<Value>,
}

/// Author of a message. `function` is the older form of `tool`.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ChatRole {
    System,
    Developer,
    User,
    Assistant,
    Tool,
    Function,
}

/// A function that an assistant called.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageToolCall)]
struct Call {
    id: String,
    /// `function`, which may be omitted.
    #[serde(rename = "type")]
    kind: Option<String>,
    #[schema(value_type = CalledFunction)]
    function: Option<CalledFunction>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageFunctionCall)]
struct CalledFunction {
    name: String,
    /// Arguments of the function as JSON text.
    arguments: String,
}

/// Converts a conversation. The result of a function belongs to the last call before it, because calls in the older
/// form have no ids.
pub(super) fn convert(messages: Vec<ChatMessage>) -> Result<Vec<Message>, WireError> {
    let mut last_call = call_id(0);
    let convert = |(index, message): (usize, ChatMessage)| {
        let message = message.convert(index, &last_call)?;
        if let Some(call) = message.tool_calls.last() {
            last_call.clone_from(&call.id);
        }
        Ok(message)
    };
    messages.into_iter().enumerate().map(convert).collect()
}

/// Returns the id of the call that the assistant's message at this index makes in the older form.
fn call_id(index: usize) -> String {
    format!("call_{index}")
}

impl ChatMessage {
    fn convert(self, index: usize, last_call: &str) -> Result<Message, WireError> {
        let path = |field: &str| format!("messages[{index}].{field}");
        let role = match self.role {
            ChatRole::System | ChatRole::Developer => Role::System,
            ChatRole::User => Role::User,
            ChatRole::Assistant => Role::Assistant,
            ChatRole::Tool | ChatRole::Function => Role::Tool,
        };
        let is_function = matches!(self.role, ChatRole::Function);
        refuse_unless(self.audio.as_ref().is_none_or(is_empty), &path("audio"))?;
        let is_assistant = role == Role::Assistant;
        let calls = self.tool_calls.unwrap_or_default();
        refuse_unless(calls.is_empty() || is_assistant, &path("tool_calls"))?;
        let tool_calls =
            calls.into_iter().enumerate().map(|(call, tool_call)| tool_call.convert(&path("tool_calls"), call));
        let mut tool_calls: Vec<_> = tool_calls.collect::<Result<_, _>>()?;
        if let Some(CalledFunction { name, arguments }) = self.function_call {
            refuse_unless(is_assistant, &path("function_call"))?;
            if !tool_calls.is_empty() {
                return Err(invalid(&path("function_call"), "is not allowed together with tool_calls"));
            }
            tool_calls.push(ToolCall { id: call_id(index), name, arguments });
        }
        let content = match self.content {
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => join(parts, &path("content"), is_assistant)?,
            // An assistant's message may consist of tool calls only, and a function may return nothing.
            None if !tool_calls.is_empty() || is_function => String::new(),
            None => return Err(missing(&path("content"))),
        };
        if is_function && self.name.is_none() {
            return Err(missing(&path("name")));
        }
        let tool_call_id = self.tool_call_id.or_else(|| is_function.then(|| last_call.to_owned()));
        if role == Role::Tool && tool_call_id.is_none() {
            return Err(missing(&path("tool_call_id")));
        }
        let reasoning = self.reasoning_content.or(self.reasoning).filter(|_| is_assistant);
        Ok(Message { role, content, reasoning, tool_calls, tool_call_id, name: self.name })
    }
}

/// A predicted answer.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Prediction {
    /// Always `content`.
    #[serde(rename = "type")]
    kind: String,
    #[schema(value_type = Content)]
    content: Option<Content>,
}

impl Prediction {
    pub(super) fn text(self) -> Result<String, WireError> {
        refuse_unless(self.kind == "content", "prediction.type")?;
        match self.content.ok_or_else(|| missing("prediction.content"))? {
            Content::Text(text) => Ok(text),
            Content::Parts(parts) => join(parts, "prediction.content", false),
        }
    }
}

impl Call {
    fn convert(self, path: &str, index: usize) -> Result<ToolCall, WireError> {
        refuse_unless(self.kind.is_none_or(|kind| kind == "function"), &format!("{path}[{index}].type"))?;
        let CalledFunction { name, arguments } =
            self.function.ok_or_else(|| missing(&format!("{path}[{index}].function")))?;
        Ok(ToolCall { id: self.id, name, arguments })
    }
}

/// Joins the text of parts without a separator, as OpenAI's servers do.
pub(crate) fn join(parts: Vec<Part>, path: &str, of_assistant: bool) -> Result<String, WireError> {
    let mut whole = String::new();
    for (index, Part { kind, text, refusal }) in parts.into_iter().enumerate() {
        let (name, said) = match kind.as_str() {
            "text" | "input_text" | "output_text" => ("text", text),
            "refusal" if of_assistant => ("refusal", refusal),
            _ => return Err(no_text(&kind, format!("{path}[{index}]"))),
        };
        whole += &said.ok_or_else(|| missing(&format!("{path}[{index}].{name}")))?;
    }
    Ok(whole)
}

/// Returns the error for a message part that is not text.
fn no_text(kind: &str, path: String) -> WireError {
    let what = match kind {
        "image_url" | "image" | "input_image" => "images are",
        "input_audio" | "audio" | "audio_url" => "audio is",
        "video" | "video_url" => "video is",
        "file" | "input_file" => "files are",
        "refusal" => "refusals of others than assistants are",
        kind => {
            let kind: String = kind.chars().take(40).collect();
            let message = format!("{path} is of the type {kind:?}, and only parts of the type \"text\" are taken");
            return WireError::new(ErrorCode::UnsupportedParameter, message).with_param(path + ".type");
        }
    };
    let message = format!("{what} not supported here: {path} must be a text");
    WireError::new(ErrorCode::UnsupportedParameter, message).with_param(path)
}

/// A text, or parts of one.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = ChatContent)]
#[serde(untagged)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = TextPart)]
pub(crate) struct Part {
    /// `text`, `input_text` or `output_text`; in an assistant's message also `refusal`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<String>,
    /// The text of a refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) refusal: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match text_or(deserializer, "a text or an array of parts")? {
            TextOr::Text(text) => Self::Text(text),
            TextOr::Array(parts) => Self::Parts(parts),
        })
    }
}

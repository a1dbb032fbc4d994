//! The items of a conversation, and how they become messages.

use protocol::infer::{Message, Role, ToolCall};
use protocol::{ErrorCode, WireError};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;
use utoipa::openapi::{OneOfBuilder, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::tool_names::function_name;
use crate::json_body::{TextOr, missing, text_or};
use crate::openai::request::{Content, Part, join};

/// The type of items that do not name theirs.
const MESSAGE: &str = "message";
/// The type of items that stand for an item of a stored response.
const REFERENCE: &str = "item_reference";

/// One item of a conversation, as clients send it and as it is kept. Which fields it has depends on its type.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Item {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<ItemRole>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<Content>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) summary: Option<Vec<Part>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) call_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) arguments: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) input: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) output: Option<Content>,
}

impl Item {
    /// Returns the id of the stored item that this one stands for.
    pub(super) fn referred(&self) -> Option<&str> {
        self.id.as_deref().filter(|_| self.kind.as_deref() == Some(REFERENCE))
    }

    /// Returns the length of the text of an item of an answer.
    pub(crate) fn bytes(&self) -> usize {
        let content = match &self.content {
            Some(Content::Text(text)) => text.len(),
            Some(Content::Parts(parts)) => parts.iter().filter_map(|part| part.text.as_deref()).map(str::len).sum(),
            None => 0,
        };
        content + [&self.arguments, &self.input].into_iter().flatten().map(String::len).sum::<usize>()
    }
}

/// Author of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ItemRole {
    System,
    Developer,
    User,
    Assistant,
}

impl From<ItemRole> for Role {
    fn from(role: ItemRole) -> Self {
        match role {
            ItemRole::System | ItemRole::Developer => Self::System,
            ItemRole::User => Self::User,
            ItemRole::Assistant => Self::Assistant,
        }
    }
}

/// `input`: a text of the user, or items.
#[derive(Debug)]
pub(super) enum ItemsOrText {
    Text(String),
    Items(Vec<Item>),
}

impl ItemsOrText {
    pub(super) fn into_items(self) -> Vec<Item> {
        match self {
            Self::Text(text) => {
                vec![Item { role: Some(ItemRole::User), content: Some(Content::Text(text)), ..Item::default() }]
            }
            Self::Items(items) => items,
        }
    }
}

impl<'de> Deserialize<'de> for ItemsOrText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match text_or(deserializer, "a text or an array of items")? {
            TextOr::Text(text) => Self::Text(text),
            TextOr::Array(items) => Self::Items(items),
        })
    }
}

impl PartialSchema for ItemsOrText {
    fn schema() -> RefOr<Schema> {
        let schema = OneOfBuilder::new().item(String::schema()).item(Vec::<ItemSchema>::schema());
        schema.description(Some("A text of the user, or the items of the conversation.")).into()
    }
}

impl ToSchema for ItemsOrText {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((ItemSchema::name().into_owned(), ItemSchema::schema()));
        ItemSchema::schemas(schemas);
    }
}

/// An item, for the API's description.
#[derive(ToSchema)]
#[schema(as = ResponseItem)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) enum ItemSchema {
    Message(MessageItem),
    Reasoning(ReasoningItem),
    FunctionCall(FunctionCallItem),
    CustomToolCall(CustomToolCallItem),
    CallOutput(CallOutputItem),
    Reference(ReferenceItem),
}

macro_rules! item_type {
    ($name:ident, $($variant:ident),+) => {
        #[derive(ToSchema)]
        #[serde(rename_all = "snake_case")]
        #[expect(dead_code, reason = "only its description is used")]
        enum $name { $($variant),+ }
    };
}
item_type!(MessageType, Message);
item_type!(ReasoningType, Reasoning);
item_type!(FunctionCallType, FunctionCall);
item_type!(CustomToolCallType, CustomToolCall);
item_type!(CallOutputType, FunctionCallOutput, CustomToolCallOutput);
item_type!(ReferenceType, ItemReference);

/// A message of the conversation, by whomever.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct MessageItem {
    /// `message`, or nothing.
    #[schema(inline)]
    r#type: Option<MessageType>,
    id: Option<String>,
    status: Option<String>,
    role: ItemRole,
    content: Content,
}

/// The model's reasoning before a message or a call.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct ReasoningItem {
    #[schema(inline)]
    r#type: ReasoningType,
    id: Option<String>,
    status: Option<String>,
    /// Used if there is no `content`.
    summary: Option<Vec<Part>>,
    content: Option<Content>,
}

/// A function that the model called.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct FunctionCallItem {
    #[schema(inline)]
    r#type: FunctionCallType,
    id: Option<String>,
    status: Option<String>,
    call_id: String,
    name: String,
    namespace: Option<String>,
    /// Arguments of the function as JSON text.
    arguments: String,
}

/// A custom tool that the model called.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct CustomToolCallItem {
    #[schema(inline)]
    r#type: CustomToolCallType,
    id: Option<String>,
    status: Option<String>,
    call_id: String,
    name: String,
    namespace: Option<String>,
    input: String,
}

/// The result of a call.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct CallOutputItem {
    #[schema(inline)]
    r#type: CallOutputType,
    id: Option<String>,
    status: Option<String>,
    call_id: String,
    output: Content,
}

/// Stands for an item of the answer of a stored response.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct ReferenceItem {
    #[schema(inline)]
    r#type: ReferenceType,
    id: String,
}

/// Builds the messages of a conversation. Instructions come first.
pub(super) fn messages(instructions: Option<&str>, items: &[Item]) -> Result<Vec<Message>, WireError> {
    let mut conversation = Conversation::default();
    if let Some(instructions) = instructions {
        conversation.say(Message::new(Role::System, instructions));
    }
    for (index, item) in items.iter().enumerate() {
        conversation.add(item, &format!("input[{index}]"))?;
    }
    Ok(conversation.messages)
}

#[derive(Default)]
struct Conversation {
    messages: Vec<Message>,
    /// Reasoning that belongs to the next message or call.
    reasoning: Option<String>,
}

impl Conversation {
    fn add(&mut self, item: &Item, path: &str) -> Result<(), WireError> {
        match item.kind.as_deref().unwrap_or(MESSAGE) {
            MESSAGE => self.message(item, path),
            "reasoning" => self.reasoning(item, path),
            "function_call" => self.call(item, field(item.arguments.as_ref(), path, "arguments")?.to_owned(), path),
            "custom_tool_call" => {
                let arguments = json!({ FREE_FORM: field(item.input.as_ref(), path, "input")? }).to_string();
                self.call(item, arguments, path)
            }
            "function_call_output" | "custom_tool_call_output" => self.result(item, path),
            // The stored item takes its place before the job is sent.
            REFERENCE => field(item.id.as_ref(), path, "id").map(|_| self.say(Message::new(Role::Assistant, ""))),
            kind => Err(unknown(kind, path)),
        }
    }

    fn message(&mut self, item: &Item, path: &str) -> Result<(), WireError> {
        let role = item.role.ok_or_else(|| missing(&format!("{path}.role")))?;
        let text = text(item.content.as_ref(), path, "content", role == ItemRole::Assistant)?;
        let message = Message::new(role.into(), text);
        let reasoning = self.reasoning.take().filter(|_| role == ItemRole::Assistant);
        self.say(Message { reasoning, ..message });
        Ok(())
    }

    fn reasoning(&mut self, item: &Item, path: &str) -> Result<(), WireError> {
        let summary = item.summary.clone().unwrap_or_default();
        let content = match &item.content {
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) if !parts.is_empty() => thought(parts, &format!("{path}.content"))?,
            _ => thought(&summary, &format!("{path}.summary"))?,
        };
        if !content.is_empty() {
            self.reasoning = Some(content);
        }
        Ok(())
    }

    fn call(&mut self, item: &Item, arguments: String, path: &str) -> Result<(), WireError> {
        let id = field(item.call_id.as_ref(), path, "call_id")?.to_owned();
        let name = function_name(item.namespace.as_deref(), field(item.name.as_ref(), path, "name")?);
        let reasoning = self.reasoning.take();
        match self.messages.last_mut().filter(|last| last.role == Role::Assistant && reasoning.is_none()) {
            Some(last) => last.tool_calls.push(ToolCall { id, name, arguments }),
            None => self.messages.push(Message {
                reasoning,
                tool_calls: vec![ToolCall { id, name, arguments }],
                ..Message::new(Role::Assistant, "")
            }),
        }
        Ok(())
    }

    fn result(&mut self, item: &Item, path: &str) -> Result<(), WireError> {
        let id = field(item.call_id.as_ref(), path, "call_id")?.to_owned();
        let text = text(item.output.as_ref(), path, "output", false)?;
        self.messages.push(Message { tool_call_id: Some(id), ..Message::new(Role::Tool, text) });
        Ok(())
    }

    /// Adds a message. Instructions at the beginning become one message, as many templates take one alone.
    fn say(&mut self, message: Message) {
        match &mut self.messages[..] {
            [first] if first.role == Role::System && message.role == Role::System => {
                first.content += "\n\n";
                first.content += &message.content;
            }
            _ => self.messages.push(message),
        }
    }
}

/// The parameter of the function as which a custom tool is offered.
pub(super) const FREE_FORM: &str = "input";

fn field<'a>(value: Option<&'a String>, path: &str, name: &str) -> Result<&'a str, WireError> {
    value.map(String::as_str).ok_or_else(|| missing(&format!("{path}.{name}")))
}

fn text(content: Option<&Content>, path: &str, name: &str, of_assistant: bool) -> Result<String, WireError> {
    let path = format!("{path}.{name}");
    match content {
        Some(Content::Text(text)) => Ok(text.clone()),
        Some(Content::Parts(parts)) => join(parts.clone(), &path, of_assistant),
        None => Err(missing(&path)),
    }
}

/// Joins the parts of reasoning.
fn thought(parts: &[Part], path: &str) -> Result<String, WireError> {
    let text =
        |(index, part): (usize, &Part)| part.text.clone().ok_or_else(|| missing(&format!("{path}[{index}].text")));
    parts.iter().enumerate().map(text).collect()
}

fn unknown(kind: &str, path: &str) -> WireError {
    let kind: String = kind.chars().take(40).collect();
    let message = format!("{path} is of the type {kind:?}, which is not supported here; leave it out");
    WireError::new(ErrorCode::UnsupportedParameter, message).with_param(format!("{path}.type"))
}

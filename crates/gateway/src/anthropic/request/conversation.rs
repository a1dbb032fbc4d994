//! The conversation of a request: its messages, whose content is text or blocks.

mod described;

use protocol::infer::{Message, Role, ToolCall};
use protocol::{ErrorCode, WireError};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::json_body::{TextOr, invalid, missing, text_or};
use described::{ResultContent, SourceSchema};
pub(super) use described::{Text, TurnSchema};

/// Stands between two texts of one author.
const BETWEEN: &str = "\n";
/// Begins a block in which Claude Code tells Anthropic whom to bill. It is not for the model, and as it differs from
/// session to session, no session could use what another has cached.
const BILLING: &str = "x-anthropic-billing-header:";

#[derive(Debug, Deserialize)]
pub(super) struct Turn {
    role: Author,
    content: Option<Content>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Author {
    System,
    User,
    Assistant,
}

/// The content of a message: a text, or blocks.
#[derive(Debug)]
pub(super) enum Content {
    Text(String),
    Blocks(Vec<Block>),
}

/// A block of content. Those that models here cannot read are kept apart, to be refused by name.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Block {
    Text(TextBlock),
    Thinking(ThinkingBlock),
    ToolUse(ToolUseBlock),
    ToolResult(ToolResultBlock),
    Document(DocumentBlock),
    SearchResult(SearchResultBlock),
    ToolReference(ToolReferenceBlock),
    Image,
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageTextBlock)]
pub(super) struct TextBlock {
    text: String,
}

/// An assistant's reasoning. Its `signature` is not checked.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageThinkingBlock)]
pub(super) struct ThinkingBlock {
    thinking: String,
}

/// A call that an assistant made.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageToolUseBlock)]
pub(super) struct ToolUseBlock {
    id: String,
    name: String,
    #[schema(value_type = Object)]
    input: Map<String, Value>,
}

/// The result of a call.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageToolResultBlock)]
pub(super) struct ToolResultBlock {
    tool_use_id: String,
    #[schema(value_type = Option<ResultContent>)]
    content: Option<Content>,
    /// Whether the call failed.
    is_error: Option<bool>,
}

/// A document of plain text.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageDocumentBlock)]
pub(super) struct DocumentBlock {
    title: Option<String>,
    /// What the document is about.
    context: Option<String>,
    #[schema(value_type = SourceSchema)]
    source: Source,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Source {
    Text(TextSource),
    Content(ContentSource),
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageTextSource)]
pub(super) struct TextSource {
    data: String,
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageContentSource)]
pub(super) struct ContentSource {
    #[schema(value_type = Text)]
    content: Content,
}

/// A result of a search.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageSearchResultBlock)]
pub(super) struct SearchResultBlock {
    title: String,
    /// Where it was found.
    source: String,
    #[schema(value_type = Text)]
    content: Content,
}

/// A tool that a search for tools found.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageToolReferenceBlock)]
pub(super) struct ToolReferenceBlock {
    tool_name: String,
}

/// Converts a conversation. Returns whether the answer continues its last message.
pub(super) fn convert(system: Option<Content>, turns: Vec<Turn>) -> Result<(Vec<Message>, bool), WireError> {
    let mut conversation = Conversation::default();
    if let Some(system) = system {
        conversation.instruct(&instructions(system));
    }
    for (index, Turn { role, content }) in turns.into_iter().enumerate() {
        let path = format!("messages[{index}].content");
        let Some(content) = content else {
            match role {
                // It sets something else, which has no effect.
                Author::System => continue,
                Author::User | Author::Assistant => return Err(missing(&path)),
            }
        };
        match role {
            Author::System => conversation.instruct(&instructions(content)),
            Author::User => conversation.ask(content, &path)?,
            Author::Assistant => conversation.answer(content, &path)?,
        }
    }
    let continue_last = conversation.ends_within_an_answer()?;
    Ok((conversation.messages, continue_last))
}

#[derive(Default)]
struct Conversation {
    messages: Vec<Message>,
}

impl Conversation {
    /// Returns the last message if its author is this one, or a new one. Many chat templates insist on turns.
    fn turn(&mut self, role: Role) -> &mut Message {
        if self.messages.last().is_none_or(|last| last.role != role) {
            self.messages.push(Message::new(role, ""));
        }
        self.messages.last_mut().expect("one was pushed")
    }

    /// Adds a text, in a line of its own.
    fn say(&mut self, role: Role, text: &str) {
        let content = &mut self.turn(role).content;
        if !content.is_empty() {
            content.push_str(BETWEEN);
        }
        content.push_str(text);
    }

    /// Adds instructions. Later ones become part of a user's message, since most chat templates know instructions at
    /// the beginning alone. Claude Code marks its own instructions in a user's message in the same way.
    fn instruct(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        if self.messages.iter().all(|said| said.role == Role::System) {
            self.say(Role::System, text);
        } else {
            self.say(Role::User, &format!("<system-reminder>\n{text}\n</system-reminder>"));
        }
    }

    /// Adds a user's message, in which results of calls are messages of their own.
    fn ask(&mut self, content: Content, path: &str) -> Result<(), WireError> {
        for (index, block) in content.into_blocks().into_iter().enumerate() {
            let path = format!("{path}[{index}]");
            match block {
                Block::ToolResult(result) => self.messages.push(result.convert(&path)?),
                block => self.say(Role::User, &block.text(&path)?),
            }
        }
        Ok(())
    }

    /// Adds an assistant's message. Blocks that servers of others wrote, such as results of their own tools, are left
    /// out: the assistant's text around them stays.
    fn answer(&mut self, content: Content, path: &str) -> Result<(), WireError> {
        for (index, block) in content.into_blocks().into_iter().enumerate() {
            match block {
                Block::Text(TextBlock { text }) if text.is_empty() => {}
                Block::Text(TextBlock { text }) => self.turn(Role::Assistant).content.push_str(&text),
                Block::Thinking(ThinkingBlock { thinking }) => {
                    self.turn(Role::Assistant).reasoning.get_or_insert_default().push_str(&thinking);
                }
                Block::ToolUse(call) => self.turn(Role::Assistant).tool_calls.push(call.convert()),
                Block::ToolResult(_) => {
                    let path = format!("{path}[{index}].type");
                    return Err(invalid(&path, "must not be tool_result, which belongs into a user's message"));
                }
                Block::Document(_) | Block::SearchResult(_) | Block::ToolReference(_) | Block::Image | Block::Other => {
                }
            }
        }
        Ok(())
    }

    /// Returns whether the last message is an assistant's text, which the answer continues.
    fn ends_within_an_answer(&self) -> Result<bool, WireError> {
        let Some(last) = self.messages.last().filter(|last| last.role == Role::Assistant) else { return Ok(false) };
        if !last.tool_calls.is_empty() {
            return Err(invalid("messages", "must have the results (tool_result) of the calls in the last message"));
        }
        if last.content.is_empty() {
            return Err(invalid(
                "messages",
                "must not end with reasoning alone: continue it with a text, or leave it out",
            ));
        }
        Ok(true)
    }
}

impl Content {
    fn into_blocks(self) -> Vec<Block> {
        match self {
            Self::Text(text) => vec![Block::Text(TextBlock { text })],
            Self::Blocks(blocks) => blocks,
        }
    }
}

/// Returns the text of instructions. Blocks that offer and withdraw tools are left out: every tool is offered.
fn instructions(content: Content) -> String {
    let texts = content.into_blocks().into_iter().filter_map(|block| match block {
        Block::Text(TextBlock { text }) => Some(text).filter(|text| !text.starts_with(BILLING)),
        _ => None,
    });
    texts.collect::<Vec<_>>().join(BETWEEN)
}

/// Returns the text of content that has nothing else.
fn text(content: Content, path: &str) -> Result<String, WireError> {
    let blocks = content.into_blocks().into_iter().enumerate();
    let texts = blocks.map(|(index, block)| block.text(&format!("{path}[{index}]")));
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join(BETWEEN))
}

impl Block {
    /// Returns the text of a block in which a user or a tool speaks.
    fn text(self, path: &str) -> Result<String, WireError> {
        match self {
            Self::Text(TextBlock { text }) => Ok(text),
            Self::Document(document) => document.text(path),
            Self::SearchResult(SearchResultBlock { title, source, content }) => {
                Ok([title, source, text(content, &format!("{path}.content"))?].join(BETWEEN))
            }
            Self::ToolReference(ToolReferenceBlock { tool_name }) => Ok(tool_name),
            Self::Image => Err(no_text("images are", path)),
            Self::Thinking(_) | Self::ToolUse(_) | Self::ToolResult(_) => {
                Err(invalid(&format!("{path}.type"), "is not allowed in this place"))
            }
            Self::Other => Err(no_text("blocks of this type are", path)),
        }
    }
}

impl DocumentBlock {
    fn text(self, path: &str) -> Result<String, WireError> {
        let data = match self.source {
            Source::Text(TextSource { data }) => data,
            Source::Content(ContentSource { content }) => text(content, &format!("{path}.source.content"))?,
            Source::Other => return Err(no_text("documents other than plain text are", path)),
        };
        let parts: Vec<String> = self.title.into_iter().chain(self.context).chain([data]).collect();
        Ok(parts.join(BETWEEN))
    }
}

impl ToolUseBlock {
    fn convert(self) -> ToolCall {
        let Self { id, name, input } = self;
        ToolCall { id, name, arguments: Value::Object(input).to_string() }
    }
}

impl ToolResultBlock {
    fn convert(self, path: &str) -> Result<Message, WireError> {
        let text = self.content.map(|content| text(content, &format!("{path}.content"))).transpose()?;
        let text = text.unwrap_or_default();
        // Messages have no field for it.
        let text = if self.is_error == Some(true) { format!("Error: {text}") } else { text };
        Ok(Message { tool_call_id: Some(self.tool_use_id), ..Message::new(Role::Tool, text) })
    }
}

fn no_text(what: &str, path: &str) -> WireError {
    let message = format!("{what} not supported here: {path} must be a text");
    WireError::new(ErrorCode::UnsupportedParameter, message).with_param(path)
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match text_or(deserializer, "a text or an array of blocks")? {
            TextOr::Text(text) => Self::Text(text),
            TextOr::Array(blocks) => Self::Blocks(blocks),
        })
    }
}

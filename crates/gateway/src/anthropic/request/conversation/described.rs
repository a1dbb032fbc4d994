//! The forms of messages, as the API's description names them: who may say what.
#![expect(dead_code, reason = "only the descriptions are used")]

use utoipa::ToSchema;

use super::{
    ContentSource, DocumentBlock, SearchResultBlock, TextBlock, TextSource, ThinkingBlock, ToolReferenceBlock,
    ToolResultBlock, ToolUseBlock,
};

/// A message, as the API's description names its forms.
#[derive(ToSchema)]
#[schema(as = MessageTurn)]
#[serde(tag = "role", rename_all = "lowercase")]
pub(in crate::anthropic::request) enum TurnSchema {
    /// Instructions from the application's developer. Blocks of other types than `text` have no effect.
    System {
        content: Option<Text>,
    },
    User {
        content: UserContent,
    },
    /// Blocks of other types have no effect.
    Assistant {
        content: AssistantContent,
    },
}

/// A text, or blocks of it.
#[derive(ToSchema)]
#[schema(as = MessageText)]
#[serde(untagged)]
pub(in crate::anthropic::request) enum Text {
    Text(String),
    Blocks(Vec<PlainBlock>),
}

#[derive(ToSchema)]
#[schema(as = MessagePlainBlock)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::anthropic::request) enum PlainBlock {
    Text(TextBlock),
}

/// A text, or blocks.
#[derive(ToSchema)]
#[schema(as = MessageUserContent)]
#[serde(untagged)]
pub(in crate::anthropic::request) enum UserContent {
    Text(String),
    Blocks(Vec<UserBlock>),
}

#[derive(ToSchema)]
#[schema(as = MessageUserBlock)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::anthropic::request) enum UserBlock {
    Text(TextBlock),
    ToolResult(ToolResultBlock),
    Document(DocumentBlock),
    SearchResult(SearchResultBlock),
}

/// A text, or blocks.
#[derive(ToSchema)]
#[schema(as = MessageResultContent)]
#[serde(untagged)]
pub(in crate::anthropic::request) enum ResultContent {
    Text(String),
    Blocks(Vec<ResultBlock>),
}

#[derive(ToSchema)]
#[schema(as = MessageResultBlock)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::anthropic::request) enum ResultBlock {
    Text(TextBlock),
    Document(DocumentBlock),
    SearchResult(SearchResultBlock),
    ToolReference(ToolReferenceBlock),
}

/// A text, or blocks.
#[derive(ToSchema)]
#[schema(as = MessageAssistantContent)]
#[serde(untagged)]
pub(in crate::anthropic::request) enum AssistantContent {
    Text(String),
    Blocks(Vec<AssistantBlock>),
}

#[derive(ToSchema)]
#[schema(as = MessageAssistantBlock)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::anthropic::request) enum AssistantBlock {
    Text(TextBlock),
    Thinking(ThinkingBlock),
    ToolUse(ToolUseBlock),
}

#[derive(ToSchema)]
#[schema(as = MessageDocumentSource)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::anthropic::request) enum SourceSchema {
    Text(TextSource),
    Content(ContentSource),
}

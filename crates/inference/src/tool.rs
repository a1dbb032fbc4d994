//! Functions that a model may call, and its calls.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Tool {
    /// Its name, 1 to 64 letters, digits, `_` and `-`.
    pub name: String,
    /// What it does, for the model to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The JSON schema of its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
}

/// Whether the model calls functions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ToolChoice {
    /// As it sees fit.
    #[default]
    Auto,
    /// No calls.
    None,
    /// At least one call.
    Required,
    /// A call of this function.
    Function(String),
}

impl ToolChoice {
    pub(crate) fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// A function that an assistant called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ToolCall {
    /// The call's name within the conversation.
    pub id: String,
    /// Name of the function, as the model calls it.
    pub name: String,
    /// Its arguments as JSON text; a model may write text that is not JSON.
    pub arguments: String,
}

/// More of one call. The first of a call brings its id and name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ToolCallDelta {
    /// Which call of the answer, counted from 0.
    pub index: u32,
    /// The call's name within the conversation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name of the function, in the first part of a call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Text to append to its arguments.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub arguments: String,
}

//! Structured output: what an answer must conform to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What form an answer must have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum OutputFormat {
    /// Free text, without a constraint.
    #[default]
    Text,
    /// Any JSON object.
    Json,
    /// JSON that the schema allows.
    JsonSchema(Value),
    /// Text that the whole regular expression matches.
    Regex(String),
    /// Text of a grammar in llguidance's dialect of Lark.
    Lark(String),
}

impl OutputFormat {
    pub(crate) fn is_text(&self) -> bool {
        *self == Self::Text
    }
}

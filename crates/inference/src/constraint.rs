//! Structured output: what an answer must conform to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Format that an answer must have.
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
    /// Text that matches the regular expression as a whole.
    Regex(String),
    /// Text that the grammar allows. The grammar is in llguidance's dialect of Lark.
    Lark(String),
}

impl OutputFormat {
    pub(crate) fn is_text(&self) -> bool {
        *self == Self::Text
    }
}

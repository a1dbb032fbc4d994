//! The request fields for tool calls: `tools` and `tool_choice`.

use protocol::WireError;
use protocol::infer::{Tool, ToolChoice};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::json_body::missing;

/// A tool: one of the client's, or one that Anthropic defines.
#[derive(Debug, Deserialize)]
pub(super) struct OfferedTool {
    #[serde(rename = "type")]
    kind: Option<String>,
    name: Option<String>,
    description: Option<String>,
    input_schema: Option<Map<String, Value>>,
}

/// A tool, as the API's description names its forms.
#[derive(ToSchema)]
#[schema(as = MessageTool)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) enum OfferedToolSchema {
    Custom(CustomTool),
    Other(OtherTool),
}

/// A tool of the client's. Calls follow the schema whenever the model supports this.
#[derive(ToSchema)]
#[schema(as = MessageCustomTool)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct CustomTool {
    /// `custom`, which may be omitted.
    r#type: Option<CustomKind>,
    #[schema(pattern = "^[a-zA-Z0-9_-]{1,64}$")]
    name: String,
    /// Description of the tool, for the model.
    description: Option<String>,
    /// JSON schema of the tool's input, which is an object.
    #[schema(value_type = Object)]
    input_schema: Value,
}

#[derive(ToSchema)]
#[schema(as = MessageCustomToolType)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its description is used")]
enum CustomKind {
    Custom,
}

/// A tool that Anthropic defines. It has no effect.
#[derive(ToSchema)]
#[schema(as = MessageOtherTool)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct OtherTool {
    /// A type with a date, such as `bash_20250124`.
    #[schema(pattern = "_[0-9]{8}$")]
    r#type: String,
}

/// Converts the client's own tools. No model here knows the others.
pub(super) fn tools(offered: Vec<OfferedTool>) -> Result<Vec<Tool>, WireError> {
    let is_custom = |tool: &OfferedTool| tool.kind.as_deref().is_none_or(|kind| kind == "custom");
    let custom = offered.into_iter().enumerate().filter(|(_, tool)| is_custom(tool));
    custom.map(|(index, tool)| tool.convert(index)).collect()
}

impl OfferedTool {
    fn convert(self, index: usize) -> Result<Tool, WireError> {
        let name = self.name.ok_or_else(|| missing(&format!("tools[{index}].name")))?;
        let schema = self.input_schema.ok_or_else(|| missing(&format!("tools[{index}].input_schema")))?;
        Ok(Tool { name, description: self.description, parameters: Some(Value::Object(schema)) })
    }
}

/// Whether the model calls tools.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageToolChoice)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ToolUse {
    /// The model calls tools or answers, as it decides.
    Auto {
        /// Whether the answer ends after its first call.
        disable_parallel_tool_use: Option<bool>,
    },
    /// The model calls a tool. Unless `disable_parallel_tool_use` is false, the answer ends after its first call.
    Any { disable_parallel_tool_use: Option<bool> },
    /// The model calls this tool.
    Tool { name: String, disable_parallel_tool_use: Option<bool> },
    /// The model calls no tool.
    None,
}

impl ToolUse {
    /// Returns the choice, and whether the answer ends after its first call.
    pub(super) fn convert(self) -> (ToolChoice, bool) {
        match self {
            Self::Auto { disable_parallel_tool_use } => (ToolChoice::Auto, disable_parallel_tool_use.unwrap_or(false)),
            // As in `openai`: a weak model that is forced to call tools may repeat its call endlessly.
            Self::Any { disable_parallel_tool_use } => {
                (ToolChoice::Required, disable_parallel_tool_use.unwrap_or(true))
            }
            Self::Tool { name, disable_parallel_tool_use } => {
                (ToolChoice::Function(name), disable_parallel_tool_use.unwrap_or(true))
            }
            Self::None => (ToolChoice::None, false),
        }
    }
}

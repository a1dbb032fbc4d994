//! The request fields for tool calls: `tools` and `tool_choice`, and the older `functions` and `function_call`.

use protocol::WireError;
use protocol::infer::{Tool, ToolChoice};
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::json_body::{invalid, missing, refuse_unless, unsupported};

/// A function that the model may call. `strict` is ignored: calls follow the schema whenever the model supports this.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct OfferedTool {
    /// Always `function`.
    #[serde(rename = "type")]
    kind: String,
    #[schema(value_type = OfferedFunction)]
    function: Option<OfferedFunction>,
}

/// A function that the model may call.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct OfferedFunction {
    /// 1 to 64 letters, digits, `_` and `-`.
    name: String,
    /// Description of the function, for the model.
    description: Option<String>,
    /// JSON schema of the arguments.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Value>,
}

/// Converts `tools`.
pub(crate) fn tools(offered: Vec<OfferedTool>) -> Result<Vec<Tool>, WireError> {
    let convert = |(index, tool): (usize, OfferedTool)| {
        refuse_unless(tool.kind == "function", &format!("tools[{index}].type"))?;
        let function = tool.function.ok_or_else(|| missing(&format!("tools[{index}].function")))?;
        function.convert(&format!("tools[{index}].function"))
    };
    offered.into_iter().enumerate().map(convert).collect()
}

/// Converts `functions`, the older form of `tools`.
pub(super) fn functions(offered: Vec<OfferedFunction>) -> Result<Vec<Tool>, WireError> {
    let convert = |(index, function): (usize, OfferedFunction)| function.convert(&format!("functions[{index}]"));
    offered.into_iter().enumerate().map(convert).collect()
}

impl OfferedFunction {
    fn convert(self, path: &str) -> Result<Tool, WireError> {
        let Self { name, description, parameters } = self;
        check_parameters(parameters.as_ref(), &format!("{path}.parameters"))?;
        Ok(Tool { name, description, parameters })
    }
}

/// Checks that the schema of a function's arguments is one of an object.
pub(crate) fn check_parameters(parameters: Option<&Value>, path: &str) -> Result<(), WireError> {
    match parameters {
        Some(Value::Object(schema)) if schema.get("type").is_some_and(|kind| !may_be_object(kind)) => {
            Err(invalid(path, "must be the schema of an object, since arguments are one"))
        }
        Some(Value::Object(_)) | None => Ok(()),
        Some(_) => Err(invalid(path, "must be a JSON schema")),
    }
}

/// Returns whether a schema's `type` allows objects.
fn may_be_object(kind: &Value) -> bool {
    kind.is_null() || kind == "object" || kind.as_array().is_some_and(|kinds| kinds.iter().any(|one| one == "object"))
}

/// Parses `tool_choice`.
pub(super) fn tool_choice(value: Option<&Value>) -> Result<ToolChoice, WireError> {
    let named = |value: &Value| Some(value.pointer("/function/name")?.as_str()?.to_owned());
    match value {
        None | Some(Value::Null) => Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" => Ok(ToolChoice::Required),
            _ => Err(invalid("tool_choice", "must be auto, none, required or a function")),
        },
        Some(value) => match value.get("type").and_then(Value::as_str) {
            Some("function") => {
                let name = named(value).ok_or_else(|| missing("tool_choice.function.name"))?;
                Ok(ToolChoice::Function(name))
            }
            Some(_) => Err(unsupported("tool_choice.type")),
            None => Err(invalid("tool_choice", "must be auto, none, required or a function")),
        },
    }
}

/// Parses `function_call`, the older form of `tool_choice`.
pub(super) fn function_call(value: Option<&Value>) -> Result<ToolChoice, WireError> {
    let expected = || invalid("function_call", "must be auto, none or an object with the name of a function");
    match value {
        None | Some(Value::Null) => Ok(ToolChoice::Auto),
        Some(Value::String(word)) if word == "auto" => Ok(ToolChoice::Auto),
        Some(Value::String(word)) if word == "none" => Ok(ToolChoice::None),
        Some(value) => {
            let name = value.get("name").and_then(Value::as_str).ok_or_else(expected)?;
            Ok(ToolChoice::Function(name.to_owned()))
        }
    }
}

//! The request fields for tool calls: `tools` and `tool_choice`.

use std::collections::BTreeSet;

use protocol::WireError;
use protocol::infer::{Tool, ToolChoice};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::json_body::{invalid, missing, unsupported};
use crate::openai::request::check_parameters;
use crate::responses::item::FREE_FORM;
use crate::responses::tool_names::{ToolName, ToolNames, function_name};

/// A tool of a known type.
#[derive(Deserialize)]
struct OfferedTool {
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Value>,
    /// The syntax of a custom tool's input.
    format: Option<CustomFormat>,
    /// The tools of a namespace.
    tools: Option<Vec<Value>>,
}

#[derive(Deserialize)]
struct CustomFormat {
    syntax: Option<String>,
    definition: Option<String>,
}

/// The tools that are offered to the model.
#[derive(Default)]
pub(super) struct Offer {
    pub(super) tools: Vec<Tool>,
    pub(super) names: ToolNames,
    pub(super) choice: ToolChoice,
}

impl Offer {
    pub(super) fn read(offered: &[Value], choice: Option<&Value>) -> Result<Self, WireError> {
        let mut offer = Self::default();
        for (index, tool) in offered.iter().enumerate() {
            offer.add(tool, None, &format!("tools[{index}]"))?;
        }
        offer.choice = offer.choose(choice)?;
        Ok(offer)
    }

    /// Adds a tool. Those that the gateway or OpenAI would have to run are left out.
    fn add(&mut self, offered: &Value, namespace: Option<&str>, path: &str) -> Result<(), WireError> {
        let kind = offered.get("type").and_then(Value::as_str).ok_or_else(|| missing(&format!("{path}.type")))?;
        if !["function", "custom", "namespace"].contains(&kind) {
            return Ok(());
        }
        let tool: OfferedTool =
            Deserialize::deserialize(offered).map_err(|error| invalid(path, &format!("is malformed: {error}")))?;
        let name = tool.name.ok_or_else(|| missing(&format!("{path}.name")))?;
        if kind == "namespace" {
            // A namespace within another has no tools that could be named.
            let nested = tool.tools.unwrap_or_default();
            let nested = nested.iter().enumerate().filter(|_| namespace.is_none());
            return nested
                .into_iter()
                .try_for_each(|(index, nested)| self.add(nested, Some(&name), &format!("{path}.tools[{index}]")));
        }
        let is_custom = kind == "custom";
        let (description, parameters) = if is_custom {
            (Some(of_custom(tool.description, tool.format)), Some(free_form()))
        } else {
            check_parameters(tool.parameters.as_ref(), &format!("{path}.parameters"))?;
            (tool.description, tool.parameters)
        };
        let name = self.names.add(ToolName { name, namespace: namespace.map(str::to_owned), is_custom });
        self.tools.push(Tool { name, description, parameters });
        Ok(())
    }

    /// Reads `tool_choice`, and withdraws the tools that it does not allow.
    fn choose(&mut self, choice: Option<&Value>) -> Result<ToolChoice, WireError> {
        let Some(choice) = choice.filter(|choice| !choice.is_null()) else { return Ok(ToolChoice::Auto) };
        if let Some(mode) = choice.as_str() {
            return of_mode(mode, "tool_choice");
        }
        match choice.get("type").and_then(Value::as_str) {
            Some("function" | "custom") => {
                let name = function_of(choice).ok_or_else(|| missing("tool_choice.name"))?;
                Ok(ToolChoice::Function(name))
            }
            Some("allowed_tools") => {
                let allowed = choice.get("tools").and_then(Value::as_array);
                let allowed = allowed.ok_or_else(|| missing("tool_choice.tools"))?;
                let allowed: BTreeSet<String> = allowed.iter().filter_map(function_of).collect();
                self.tools.retain(|tool| allowed.contains(&tool.name));
                of_mode(choice.get("mode").and_then(Value::as_str).unwrap_or("auto"), "tool_choice.mode")
            }
            Some(_) => Err(unsupported("tool_choice.type")),
            None => Err(invalid("tool_choice", "must be auto, none, required, a tool or allowed_tools")),
        }
    }
}

fn of_mode(mode: &str, param: &str) -> Result<ToolChoice, WireError> {
    match mode {
        "auto" => Ok(ToolChoice::Auto),
        "none" => Ok(ToolChoice::None),
        "required" => Ok(ToolChoice::Required),
        _ => Err(invalid(param, "must be auto, none or required")),
    }
}

/// Returns the function of a tool that `tool_choice` names.
fn function_of(named: &Value) -> Option<String> {
    let text = |field: &str| named.get(field).and_then(Value::as_str);
    Some(function_name(text("namespace"), text("name")?))
}

/// Returns the parameters of the function as which a custom tool is offered: one text.
fn free_form() -> Value {
    json!({
        "type": "object", "properties": { FREE_FORM: {"type": "string"} }, "required": [FREE_FORM],
        "additionalProperties": false
    })
}

/// Describes a custom tool. Its grammar is told to the model, and not enforced.
fn of_custom(description: Option<String>, format: Option<CustomFormat>) -> String {
    let mut text = description.unwrap_or_default();
    if let Some(CustomFormat { syntax: Some(syntax), definition: Some(definition) }) = format {
        text = format!("{text}\nThe input must match this grammar ({syntax}):\n{definition}");
    }
    text
}

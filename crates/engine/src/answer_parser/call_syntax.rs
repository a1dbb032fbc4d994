//! The formats in which model families write tool calls.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::json_form::{close, make_lenient, with_options};
use crate::model_runtime::{Chat, Tool, ToolChoice};

/// The syntax in which a model family writes tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallSyntax {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`, with `<function=…>` for the object in Qwen 3 Coder.
    Hermes,
    /// `{"name": …, "parameters": …}` in place of an answer, optionally after `<|python_tag|>`.
    Llama,
    /// `[TOOL_CALLS][{"name": …, "arguments": …}]`, or `[TOOL_CALLS]name[ARGS]{…}` if `is_named`.
    Mistral { is_named: bool },
    /// `<function=name>{…}</function>`.
    Function,
    /// `<|channel|>commentary to=functions.name <|constrain|>json<|message|>{…}`.
    Harmony,
}

impl CallSyntax {
    /// Detects the syntax from the past calls that a chat template writes, or from its instructions.
    pub(super) fn detect(template: &str) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        if has("<|channel|>") {
            Some(Self::Harmony)
        } else if has("[TOOL_CALLS]") {
            Some(Self::Mistral { is_named: has("[ARGS]") })
        } else if has("<tool_call>") {
            Some(Self::Hermes)
        } else if has("<function=") {
            Some(Self::Function)
        } else if has("<|python_tag|>") || (has("<|start_header_id|>") && has("\"parameters\"")) {
            Some(Self::Llama)
        } else {
            None
        }
    }

    /// Returns the texts that mark calls.
    pub(super) fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["<tool_call>", "</tool_call>"],
            Self::Llama => &["<|python_tag|>"],
            Self::Mistral { .. } => &["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"],
            Self::Function => &[],
            Self::Harmony => {
                &["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>"]
            }
        }
    }

    /// Returns the texts that open a call in the middle of an answer.
    pub(super) fn openers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["<tool_call>", "<function="],
            Self::Llama => &["<|python_tag|>"],
            Self::Mistral { .. } => &["[TOOL_CALLS]"],
            Self::Function => &["<function="],
            Self::Harmony => &[],
        }
    }

    /// Returns the grammar rules of `calls`, in llguidance's dialect of Lark, if the conversation requires a call.
    pub(super) fn required(self, chat: &Chat) -> Option<String> {
        let tools: Vec<&Tool> = match &chat.tool_choice {
            ToolChoice::Auto | ToolChoice::None => return None,
            ToolChoice::Required => chat.tools.iter().collect(),
            ToolChoice::Function(name) => chat.tools.iter().filter(|tool| tool.name == *name).collect(),
        };
        if tools.is_empty() {
            return None;
        }
        let several = chat.tool_choice == ToolChoice::Required && !chat.one_call;
        let mut rules = match self {
            Self::Hermes | Self::Function if several => "calls: call (\"\\n\" call)*\n",
            Self::Mistral { is_named: true } if several => "calls: call+\n",
            Self::Hermes | Self::Function | Self::Llama | Self::Mistral { is_named: true } => "calls: call\n",
            Self::Mistral { is_named: false } if several => "calls: \"[TOOL_CALLS][\" call (\", \" call)* \"]\"\n",
            Self::Mistral { is_named: false } => "calls: \"[TOOL_CALLS][\" call \"]\"\n",
            Self::Harmony => {
                "calls: (\"<|channel|>analysis<|message|>\" analysis \"<|start|>assistant\")? call\n\
                 analysis[suffix=\"<|end|>\"]: /(.|\\n)*/\n"
            }
        }
        .to_owned();
        let alternatives: Vec<String> = (0..tools.len()).map(|index| format!("call_{index}")).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(rules, "call: {}", alternatives.join(" | "));
        for (index, tool) in tools.iter().enumerate() {
            let name = &tool.name;
            let (before, after) = match self {
                Self::Hermes => {
                    let before = format!("<tool_call>\n{{\"name\": {}, \"arguments\": ", json!(name));
                    (before, "}\n</tool_call>")
                }
                Self::Llama => (format!("{{\"name\": {}, \"parameters\": ", json!(name)), "}"),
                Self::Mistral { is_named: false } => (format!("{{\"name\": {}, \"arguments\": ", json!(name)), "}"),
                Self::Mistral { is_named: true } => (format!("[TOOL_CALLS]{name}[ARGS]"), ""),
                Self::Function => (format!("<function={name}>"), "</function>"),
                Self::Harmony => {
                    (format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"), "")
                }
            };
            let after = if after.is_empty() { String::new() } else { json!(after).to_string() };
            let _ = writeln!(rules, "call_{index}: {} arguments_{index} {after}", json!(before));
            let _ = writeln!(rules, "arguments_{index}: %json {}", with_options(&arguments(tool)));
        }
        Some(rules)
    }
}

/// Returns the JSON schema of a tool's arguments. Tool schemas are also written for people, so keywords that a
/// grammar cannot enforce are dropped, not refused.
pub(super) fn arguments(tool: &Tool) -> Value {
    let mut schema = match &tool.parameters {
        Some(Value::Object(schema)) => schema.clone(),
        _ => serde_json::Map::new(),
    };
    schema.entry("type").or_insert_with(|| "object".into());
    let mut schema = schema.into();
    close(&mut schema);
    make_lenient(&mut schema);
    schema
}

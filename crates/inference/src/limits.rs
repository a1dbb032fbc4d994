//! What an [`Input`] must keep to, beside what its types say.

use serde_json::Value;

use crate::constraint::OutputFormat;
use crate::message::Role;
use crate::request::{EmbedInput, Input};
use crate::tool::ToolChoice;

/// The most texts in `stop`.
pub const STOP_MAX: usize = 16;
/// The longest text in `stop`, in bytes.
pub const STOP_BYTES_MAX: usize = 256;
/// The most answers to one request.
pub const N_MAX: u32 = 16;
/// The most answers of one request to several prompts.
pub const ANSWERS_MAX: u32 = 128;
/// The most alternatives told for each token; OpenAI's limit.
pub const LOGPROBS_MAX: u32 = 20;
/// The most functions a model may be offered; OpenAI's limit.
pub const TOOLS_MAX: usize = 128;
/// The most tokens whose logits are biased.
pub const LOGIT_BIAS_MAX: usize = 1_024;
/// The most texts of one request to make vectors of; OpenAI's limit.
pub const EMBED_MAX: usize = 2_048;
/// The most bytes of what a format says, of the schemas of all tools, and of what is told to a chat template: each
/// job's model has to make sense of them before it begins.
pub const SCHEMA_BYTES_MAX: usize = 256 * 1024;
/// The most levels of a schema.
pub const SCHEMA_DEPTH_MAX: usize = 48;

/// A value that an [`Input`] must not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{param} {problem}")]
pub struct InvalidInput {
    /// The field, as clients of OpenAI's API name it.
    pub param: &'static str,
    /// What is wrong with it, such as `must be between 0 and 2`.
    pub problem: &'static str,
}

impl Input {
    /// Checks what types cannot: that exactly one prompt is given, and that numbers lie within their ranges.
    pub fn check(&self) -> Result<(), InvalidInput> {
        let invalid = |param, problem| Err(InvalidInput { param, problem });
        let Self { messages, prompt, prompt_tokens, prompts, embed, .. } = self;
        let given = [messages.is_some(), prompt.is_some(), prompt_tokens.is_some(), prompts.is_some(), embed.is_some()];
        if given.into_iter().filter(|given| *given).count() != 1 {
            return invalid("input", "must have exactly one of messages, prompt, promptTokens, prompts and embed");
        }
        if self.messages.as_ref().is_some_and(Vec::is_empty) {
            return invalid("messages", "must not be empty");
        }
        if self.prompt_tokens.as_ref().is_some_and(Vec::is_empty) {
            return invalid("prompt", "must not be empty");
        }
        if let Some(prompts) = prompts {
            let no_tokens = |prompt: &EmbedInput| matches!(prompt, EmbedInput::Tokens(tokens) if tokens.is_empty());
            if prompts.is_empty() || prompts.iter().any(no_tokens) {
                return invalid("prompt", "must not be empty");
            }
            if prompts.len() > ANSWERS_MAX as usize || self.answers() > ANSWERS_MAX {
                return invalid("prompt", "must have at most 128 texts, and with n at most 128 answers");
            }
            if self.count_only {
                return invalid("countOnly", "is for one prompt at a time");
            }
        }
        if self.suffix.is_some() && (messages.is_some() || embed.is_some()) {
            return invalid("suffix", "is for texts to go on with");
        }
        if self.suffix.is_some() && self.echo {
            return invalid("suffix", "does not go with echo, as the prompt is no longer the text before the answer");
        }
        if self.embed.as_ref().is_some_and(|texts| texts.is_empty() || texts.len() > EMBED_MAX) {
            return invalid("embed", "must have 1 to 2048 texts");
        }
        if self.embed.as_ref().is_some_and(|texts| texts.iter().any(EmbedInput::is_empty)) {
            return invalid("embed", "must not have empty texts");
        }
        if self.embed.is_some() && self.count_only {
            return invalid("countOnly", "is for prompts, and not for texts to make vectors of");
        }
        if self.dimensions == Some(0) {
            return invalid("dimensions", "must be at least 1");
        }
        let last = self.messages.as_ref().and_then(|messages| messages.last());
        if self.continue_last && !last.is_some_and(|last| last.role == Role::Assistant && !last.content.is_empty()) {
            return invalid("continue_final_message", "needs an assistant's text as the last message");
        }
        if self.messages.is_none() && !self.tools.is_empty() {
            return invalid("tools", "are for conversations");
        }
        if self.tools.len() > TOOLS_MAX {
            return invalid("tools", "must be at most 128");
        }
        if !self.tools.iter().all(|tool| is_function_name(&tool.name)) {
            return invalid("tools", "must have names of 1 to 64 letters, digits, _ and -");
        }
        if !self.tools.iter().filter_map(|tool| tool.parameters.as_ref()).all(may_be_object) {
            return invalid("tools", "must have parameters of the type \"object\", as arguments have names");
        }
        let schemas = self.tools.iter().filter_map(|tool| tool.parameters.as_ref());
        let descriptions = self.tools.iter().filter_map(|tool| tool.description.as_ref()).map(String::len).sum();
        if !fit(schemas, descriptions) {
            return invalid("tools", "must be at most 256 KiB and 48 levels deep");
        }
        if !fit(self.template_options.values(), 0) {
            return invalid("chat_template_kwargs", "must be at most 256 KiB and 48 levels deep");
        }
        let format_fits = match &self.format {
            OutputFormat::Text | OutputFormat::Json => true,
            OutputFormat::JsonSchema(schema) => fit([schema], 0),
            OutputFormat::Regex(text) | OutputFormat::Lark(text) => text.len() <= SCHEMA_BYTES_MAX,
        };
        if !format_fits {
            return invalid("response_format", "must be at most 256 KiB and 48 levels deep");
        }
        match &self.tool_choice {
            ToolChoice::Required if self.tools.is_empty() => return invalid("tool_choice", "needs tools"),
            ToolChoice::Function(name) if !self.tools.iter().any(|tool| tool.name == *name) => {
                return invalid("tool_choice", "names a function that is not among the tools");
            }
            _ => {}
        }
        if self.n.is_some_and(|n| !(1..=N_MAX).contains(&n)) {
            return invalid("n", "must be between 1 and 16");
        }
        if self.logprobs.is_some_and(|count| count > LOGPROBS_MAX) {
            return invalid("logprobs", "must be at most 20");
        }
        if self.logit_bias.len() > LOGIT_BIAS_MAX {
            return invalid("logit_bias", "must have at most 1024 tokens");
        }
        if !self.logit_bias.values().all(|bias| (-100.0..=100.0).contains(bias)) {
            return invalid("logit_bias", "must have values between -100 and 100");
        }
        let within = |value: Option<f32>, low: f32, high: f32| value.is_none_or(|value| (low..=high).contains(&value));
        if !within(self.temperature, 0.0, 2.0) {
            return invalid("temperature", "must be between 0 and 2");
        }
        if !within(self.top_p, f32::MIN_POSITIVE, 1.0) {
            return invalid("top_p", "must be above 0 and at most 1");
        }
        if !within(self.min_p, 0.0, 1.0) {
            return invalid("min_p", "must be between 0 and 1");
        }
        if !within(self.repetition_penalty, f32::MIN_POSITIVE, 2.0) {
            return invalid("repetition_penalty", "must be above 0 and at most 2");
        }
        if !within(self.presence_penalty, -2.0, 2.0) {
            return invalid("presence_penalty", "must be between -2 and 2");
        }
        if !within(self.frequency_penalty, -2.0, 2.0) {
            return invalid("frequency_penalty", "must be between -2 and 2");
        }
        if self.max_tokens == Some(0) && !self.echo {
            return invalid("max_tokens", "must be at least 1, unless echo is true");
        }
        if self.echo && (messages.is_some() || embed.is_some() || self.count_only) {
            return invalid("echo", "is for texts to go on with");
        }
        if self.stop.len() > STOP_MAX {
            return invalid("stop", "must have at most 16 texts");
        }
        if self.stop.iter().any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
            return invalid("stop", "must have texts of 1 to 256 bytes");
        }
        Ok(())
    }
}

/// Says whether values are small enough together, beside so many bytes that are counted already.
fn fit<'a>(values: impl IntoIterator<Item = &'a Value>, bytes: usize) -> bool {
    let mut room = SCHEMA_BYTES_MAX.checked_sub(bytes);
    for value in values {
        room = room.and_then(|room| room_beside(value, room, SCHEMA_DEPTH_MAX));
    }
    room.is_some()
}

/// Returns the room that a value of at most so many levels leaves, about as JSON text would take it.
fn room_beside(value: &Value, room: usize, levels: usize) -> Option<usize> {
    /// Quotes, a comma and the like; also what bounds the number of values that have no text.
    const AROUND: usize = 4;
    let levels_below = levels.checked_sub(1)?;
    let room = room.checked_sub(AROUND)?;
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => Some(room),
        Value::String(text) => room.checked_sub(text.len()),
        Value::Array(items) => items.iter().try_fold(room, |room, item| room_beside(item, room, levels_below)),
        Value::Object(fields) => fields
            .iter()
            .try_fold(room, |room, (name, field)| room_beside(field, room.checked_sub(name.len())?, levels_below)),
    }
}

/// Returns whether a schema that says a type allows an object.
fn may_be_object(schema: &Value) -> bool {
    match schema.get("type") {
        Some(Value::String(kind)) => kind == "object",
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "object"),
        _ => true,
    }
}

/// Says whether OpenAI's clients may call a function so.
fn is_function_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    (1..=64).contains(&name.len()) && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::message::Message;
    use crate::tool::Tool;

    #[test]
    fn a_value_out_of_range_names_its_field() {
        let prompt = || Input { prompt: Some("x".into()), ..Input::default() };
        let cases = vec![
            (Input { temperature: Some(2.5), ..prompt() }, "temperature"),
            (Input { temperature: Some(f32::NAN), ..prompt() }, "temperature"),
            (Input { top_p: Some(0.0), ..prompt() }, "top_p"),
            (Input { min_p: Some(-0.1), ..prompt() }, "min_p"),
            (Input { max_tokens: Some(0), ..prompt() }, "max_tokens"),
            (Input { echo: true, ..chat() }, "echo"),
            (Input { suffix: Some("x".into()), ..chat() }, "suffix"),
            (Input { suffix: Some("x".into()), echo: true, ..prompt() }, "suffix"),
            (Input { stop: vec![String::new()], ..prompt() }, "stop"),
            (Input { stop: vec!["x".into(); 17], ..prompt() }, "stop"),
            (Input { messages: Some(vec![]), ..Input::default() }, "messages"),
            (Input { messages: Some(vec![]), ..prompt() }, "input"),
            (Input::default(), "input"),
            (Input { n: Some(0), ..prompt() }, "n"),
            (Input { n: Some(17), ..prompt() }, "n"),
            (Input { logprobs: Some(21), ..prompt() }, "logprobs"),
            (Input { logit_bias: [(7, 100.5)].into(), ..prompt() }, "logit_bias"),
            (Input { presence_penalty: Some(-2.5), ..prompt() }, "presence_penalty"),
            (Input { frequency_penalty: Some(f32::INFINITY), ..prompt() }, "frequency_penalty"),
            (Input { repetition_penalty: Some(0.0), ..prompt() }, "repetition_penalty"),
            (Input { continue_last: true, ..prompt() }, "continue_final_message"),
            (Input { continue_last: true, ..chat() }, "continue_final_message"),
            (Input { tools: vec![tool("f", Value::Null)], ..prompt() }, "tools"),
            (Input { tools: vec![tool("no name", Value::Null)], ..chat() }, "tools"),
            (Input { tools: vec![tool("f", json!({"type": "string"}))], ..chat() }, "tools"),
            (Input { tools: vec![tool("f", json!({"type": ["array", "null"]}))], ..chat() }, "tools"),
            (Input { tool_choice: ToolChoice::Required, ..chat() }, "tool_choice"),
            (Input { tool_choice: ToolChoice::Function("f".into()), ..chat() }, "tool_choice"),
            (Input { embed: Some(vec![]), ..Input::default() }, "embed"),
            (Input { embed: Some(vec![EmbedInput::Text(String::new())]), ..Input::default() }, "embed"),
            (Input { prompt_tokens: Some(vec![]), ..Input::default() }, "prompt"),
            (Input { prompts: Some(vec![]), ..Input::default() }, "prompt"),
            (Input { prompts: Some(vec![EmbedInput::Tokens(vec![])]), ..Input::default() }, "prompt"),
            (Input { prompts: Some(vec![EmbedInput::Text("x".into()); 129]), ..Input::default() }, "prompt"),
            (Input { prompts: Some(vec![EmbedInput::Text("x".into()); 9]), n: Some(15), ..Input::default() }, "prompt"),
            (Input { prompts: Some(vec![EmbedInput::Text("x".into())]), ..prompt() }, "input"),
        ];
        for (input, param) in cases {
            assert_eq!(input.check().expect_err(param).param, param);
        }
    }
    #[test]
    fn schemas_have_bounds_of_size_and_depth_wherever_they_stand() {
        let nested = |levels| (1..levels).fold(Value::Null, |inner, _| json!([inner]));
        let wide = |items: usize| json!(vec![Value::Null; items]);
        for (schema, fits) in [
            (nested(SCHEMA_DEPTH_MAX), true),
            (nested(SCHEMA_DEPTH_MAX + 1), false),
            (wide(SCHEMA_BYTES_MAX / 8), true),
            (wide(SCHEMA_BYTES_MAX), false),
            (json!({ "x".repeat(SCHEMA_BYTES_MAX): 1 }), false),
        ] {
            let options = serde_json::Map::from_iter([("x".to_owned(), schema.clone())]);
            for (input, param) in [
                (Input { tools: vec![tool("f", schema.clone())], ..chat() }, "tools"),
                (Input { format: OutputFormat::JsonSchema(schema.clone()), ..chat() }, "response_format"),
                (Input { template_options: options, ..chat() }, "chat_template_kwargs"),
            ] {
                let refused = input.check().err().map(|error| error.param);
                assert_eq!(refused, (!fits).then_some(param));
            }
        }
        let long = OutputFormat::Regex("x".repeat(SCHEMA_BYTES_MAX + 1));
        assert!(Input { format: long, ..chat() }.check().is_err());
    }

    fn chat() -> Input {
        Input { messages: Some(vec![Message::new(Role::User, "x")]), ..Input::default() }
    }

    fn tool(name: &str, parameters: Value) -> Tool {
        Tool { name: name.into(), description: None, parameters: Some(parameters) }
    }
}

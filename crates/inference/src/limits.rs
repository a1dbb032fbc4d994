//! Limits of an [`Input`] that its types do not express.

use serde_json::Value;

use crate::constraint::OutputFormat;
use crate::message::Role;
use crate::request::{EmbedInput, Input};
use crate::sampling::Sampling;
use crate::tool::ToolChoice;

/// The maximum number of texts in `stop`.
pub const STOP_MAX: usize = 16;
/// The maximum length of a text in `stop`, in bytes.
pub const STOP_BYTES_MAX: usize = 256;
/// The maximum number of answers to one prompt.
pub const N_MAX: u32 = 16;
/// The maximum number of answers to all prompts of a request.
pub const ANSWERS_MAX: u32 = 128;
/// The maximum number of alternatives returned for each token. OpenAI has the same limit.
pub const LOGPROBS_MAX: u32 = 20;
/// The maximum number of functions in a request. OpenAI has the same limit.
pub const TOOLS_MAX: usize = 128;
/// The maximum number of tokens in `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 1_024;
/// The maximum number of texts to embed in a request. OpenAI has the same limit.
pub const EMBED_MAX: usize = 2_048;
/// The maximum length of a query in bytes. It is evaluated once for each text.
pub const QUERY_BYTES_MAX: usize = 64 * 1024;
/// The maximum size in bytes of an output format, of all tools together, and of the chat template's variables. The
/// engine processes them before a job begins.
pub const SCHEMA_BYTES_MAX: usize = 256 * 1024;
/// The maximum nesting depth of a schema.
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

/// Returns an error for a field unless the condition holds.
pub(crate) fn ensure(holds: bool, param: &'static str, problem: &'static str) -> Result<(), InvalidInput> {
    if holds { Ok(()) } else { Err(InvalidInput { param, problem }) }
}

impl Input {
    /// Checks what the types cannot: that the input has exactly one prompt, and that numbers are within their ranges.
    pub fn check(&self) -> Result<(), InvalidInput> {
        self.check_prompt()?;
        self.check_tools()?;
        self.check_schemas()?;
        self.check_tool_choice()?;
        self.check_counts()?;
        Sampling::of(self, 0).check()?;
        self.check_end()
    }

    fn check_prompt(&self) -> Result<(), InvalidInput> {
        let Self { messages, prompt, prompt_tokens, prompts, embed, .. } = self;
        let given = [messages.is_some(), prompt.is_some(), prompt_tokens.is_some(), prompts.is_some(), embed.is_some()];
        let is_one = given.into_iter().filter(|given| *given).count() == 1;
        ensure(is_one, "input", "must have exactly one of messages, prompt, promptTokens, prompts and embed")?;
        ensure(!messages.as_ref().is_some_and(Vec::is_empty), "messages", "must not be empty")?;
        ensure(!prompt_tokens.as_ref().is_some_and(Vec::is_empty), "prompt", "must not be empty")?;
        if let Some(prompts) = prompts {
            let no_tokens = |prompt: &EmbedInput| matches!(prompt, EmbedInput::Tokens(tokens) if tokens.is_empty());
            ensure(!prompts.is_empty() && !prompts.iter().any(no_tokens), "prompt", "must not be empty")?;
            let are_few = prompts.len() <= ANSWERS_MAX as usize && self.answers() <= ANSWERS_MAX;
            ensure(are_few, "prompt", "must have at most 128 texts, and with n at most 128 answers")?;
            ensure(!self.count_only, "countOnly", "is for one prompt at a time")?;
        }
        if self.suffix.is_some() {
            ensure(messages.is_none() && embed.is_none(), "suffix", "is for texts to go on with")?;
            let problem = "does not go with echo, as the prompt is no longer the text before the answer";
            ensure(!self.echo, "suffix", problem)?;
        }
        if let Some(texts) = embed {
            ensure((1..=EMBED_MAX).contains(&texts.len()), "embed", "must have 1 to 2048 texts")?;
            ensure(!texts.iter().any(EmbedInput::is_empty), "embed", "must not have empty texts")?;
            ensure(!self.count_only, "countOnly", "is for prompts, and not for texts to make vectors of")?;
        }
        if let Some(query) = &self.query {
            let are_texts = embed.iter().flatten().all(|text| matches!(text, EmbedInput::Text(_)));
            ensure(embed.is_some() && are_texts, "query", "is for texts of embed")?;
            ensure((1..=QUERY_BYTES_MAX).contains(&query.len()), "query", "must have 1 byte to 64 KiB")?;
            ensure(self.dimensions.is_none(), "dimensions", "is for vectors, and a query asks for scores")?;
        }
        ensure(self.count_only || self.list_tokens.is_none(), "listTokens", "is only allowed with countOnly")?;
        ensure(self.dimensions != Some(0), "dimensions", "must be at least 1")?;
        let last = messages.as_ref().and_then(|messages| messages.last());
        let is_begun = last.is_some_and(|last| last.role == Role::Assistant && !last.content.is_empty());
        let problem = "needs an assistant's text as the last message";
        ensure(!self.continue_last || is_begun, "continue_final_message", problem)
    }

    fn check_tools(&self) -> Result<(), InvalidInput> {
        let tools = &self.tools;
        let schemas = || tools.iter().filter_map(|tool| tool.parameters.as_ref());
        ensure(self.messages.is_some() || tools.is_empty(), "tools", "are for conversations")?;
        ensure(tools.len() <= TOOLS_MAX, "tools", "must be at most 128")?;
        let are_named = tools.iter().all(|tool| is_function_name(&tool.name));
        ensure(are_named, "tools", "must have names of 1 to 64 letters, digits, _ and -")?;
        let problem = "must have parameters of the type \"object\", as arguments have names";
        ensure(schemas().all(may_be_object), "tools", problem)?;
        let descriptions = tools.iter().filter_map(|tool| tool.description.as_ref()).map(String::len).sum();
        ensure(fit(schemas(), descriptions), "tools", "must be at most 256 KiB and 48 levels deep")
    }

    fn check_schemas(&self) -> Result<(), InvalidInput> {
        let problem = "must be at most 256 KiB and 48 levels deep";
        ensure(fit(self.template_options.values(), 0), "chat_template_kwargs", problem)?;
        let format_fits = match &self.format {
            OutputFormat::Text | OutputFormat::Json => true,
            OutputFormat::JsonSchema(schema) => fit([schema], 0),
            OutputFormat::Regex(text) | OutputFormat::Lark(text) => text.len() <= SCHEMA_BYTES_MAX,
        };
        ensure(format_fits, "response_format", problem)
    }

    fn check_tool_choice(&self) -> Result<(), InvalidInput> {
        match &self.tool_choice {
            ToolChoice::Auto | ToolChoice::None => Ok(()),
            ToolChoice::Required => ensure(!self.tools.is_empty(), "tool_choice", "needs tools"),
            ToolChoice::Function(name) => {
                let is_offered = self.tools.iter().any(|tool| tool.name == *name);
                ensure(is_offered, "tool_choice", "names a function that is not among the tools")
            }
        }
    }

    fn check_counts(&self) -> Result<(), InvalidInput> {
        ensure(self.n.is_none_or(|n| (1..=N_MAX).contains(&n)), "n", "must be between 1 and 16")?;
        ensure(self.logprobs.is_none_or(|count| count <= LOGPROBS_MAX), "logprobs", "must be at most 20")?;
        ensure(self.logit_bias.len() <= LOGIT_BIAS_MAX, "logit_bias", "must have at most 1024 tokens")
    }

    fn check_end(&self) -> Result<(), InvalidInput> {
        ensure(self.max_tokens != Some(0) || self.echo, "max_tokens", "must be at least 1, unless echo is true")?;
        let repeats = self.messages.is_none() && self.embed.is_none() && !self.count_only;
        ensure(!self.echo || repeats, "echo", "is for texts to go on with")?;
        ensure(self.stop.len() <= STOP_MAX, "stop", "must have at most 16 texts")?;
        let are_short = self.stop.iter().all(|stop| (1..=STOP_BYTES_MAX).contains(&stop.len()));
        ensure(are_short, "stop", "must have texts of 1 to 256 bytes")
    }
}

/// Returns whether the values are within the limits of depth and, together with `bytes` other bytes, of size.
fn fit<'a>(values: impl IntoIterator<Item = &'a Value>, bytes: usize) -> bool {
    let mut room = SCHEMA_BYTES_MAX.checked_sub(bytes);
    for value in values {
        room = room.and_then(|room| room_beside(value, room, SCHEMA_DEPTH_MAX));
    }
    room.is_some()
}

/// Returns how many of `room` bytes a value leaves, by the approximate length of its JSON text. Returns `None` if the
/// value does not fit or has more than `levels` levels.
fn room_beside(value: &Value, room: usize, levels: usize) -> Option<usize> {
    /// Approximate bytes of punctuation around a value. It also bounds the number of values without text.
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

/// Returns whether a schema's `type` allows an object.
fn may_be_object(schema: &Value) -> bool {
    match schema.get("type") {
        Some(Value::String(kind)) => kind == "object",
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "object"),
        _ => true,
    }
}

/// Returns whether OpenAI's API accepts a function name.
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

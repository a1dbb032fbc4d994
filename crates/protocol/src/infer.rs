//! `Infer.Request` and `Infer.Chunk`: a job on its way to a worker, and its answer on the way back (T5).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::error_code::{ErrorCode, WireError};
use crate::id::{AdapterName, CorrelationId, ModelName, ModelVersion, RetryToken, TenantId, TraceId};
use crate::usage::TokenUsage;

/// The name of the stream that takes a job to an orchestrator, or from a client to a gateway, which also answers it as
/// a unary call.
pub const SUBMIT: &str = "infer.submit";
/// The name of the stream that takes a job to a worker.
pub const START: &str = "infer.start";

/// A job. Unknown fields are ignored, so that older nodes understand newer ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Infer.Request")]
pub struct InferRequest {
    /// Who pays.
    pub tenant_id: TenantId,
    /// The model to run.
    pub model_id: ModelName,
    /// Its version.
    pub version: ModelVersion,
    /// What to answer, and how.
    pub input: Input,
    /// The job's name.
    pub correlation_id: CorrelationId,
    /// The same token never runs a job twice.
    pub retry_token: RetryToken,
    /// The trace this job belongs to.
    pub trace_id: TraceId,
    /// Which try this is, counted from 1; set by the orchestrator and carried by each chunk.
    #[serde(default = "first_attempt")]
    pub attempt: u32,
    /// Milliseconds the caller will still wait. Relative, so that clocks need not agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

fn first_attempt() -> u32 {
    1
}

/// A job as a client of `POST /infer` writes it; the gateway fills in what is missing.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferSubmission {
    /// Must be the token's own tenant where it is given.
    #[serde(default)]
    pub tenant_id: Option<TenantId>,
    /// The model to run.
    pub model_id: ModelName,
    /// Its version; the newest where it is missing.
    #[serde(default)]
    pub version: Option<ModelVersion>,
    /// What to answer, and how.
    pub input: Input,
    /// The job's name; made up where it is missing.
    #[serde(default)]
    pub correlation_id: Option<CorrelationId>,
    /// The same token never runs a job twice; made up where it is missing.
    #[serde(default)]
    pub retry_token: Option<RetryToken>,
    /// The trace this job belongs to; begun where it is missing.
    #[serde(default)]
    pub trace_id: Option<TraceId>,
    /// Milliseconds the caller will wait.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// What to answer, and how. A bare string is a prompt with all else at its default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", remote = "Self")]
pub struct Input {
    /// A conversation to go on with. Exactly one of `messages`, `prompt`, `promptTokens` and `embed` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// Text to go on with, as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Tokens of the model to go on with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<Vec<u32>>,
    /// Texts to make vectors of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embed: Option<Vec<EmbedInput>>,
    /// A LoRA adapter of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterName>,
    /// The functions the model may call; with `messages` only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Tool>,
    /// Whether it calls them.
    #[serde(default, skip_serializing_if = "ToolChoice::is_auto")]
    pub tool_choice: ToolChoice,
    /// Variables for the model's chat template, such as `enable_thinking`; with `messages` only.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub template_options: serde_json::Map<String, Value>,
    /// What form the answer must have.
    #[serde(default, skip_serializing_if = "OutputFormat::is_text")]
    pub format: OutputFormat,
    /// How many answers, 1 to 16; they share the prompt and differ in their seeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// The most tokens to generate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// 0 takes the likeliest token; 1, the default, leaves the distribution as it is. At most 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities sum to this; above 0, at most 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Keeps this many of the likeliest tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Keeps tokens at least this share as likely as the likeliest; 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Makes tokens of prompt and answer less likely by a factor; above 0, at most 2, and 1 changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Makes tokens that the answer has less likely; -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// The same, for each time that the answer has them; -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of tokens by number; -100, which bans a token, to 100.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Tells the log-probability of each token, and of so many of the likeliest in its place, 0 to 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// The same seed draws the same tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Up to 16 texts that end the answer; they are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Goes on past the end-of-turn token, for benchmarks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_eos: bool,
    /// Evaluates the answer by itself, slower, so that the same build of the engine gives it again to the bit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deterministic: bool,
}

/// A text to make a vector of, or its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum EmbedInput {
    /// Text.
    Text(String),
    /// Tokens of the model.
    Tokens(Vec<u32>),
}

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
    /// Never.
    None,
    /// At least one.
    Required,
    /// This one.
    Function(String),
}

impl ToolChoice {
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// What form an answer must have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum OutputFormat {
    /// Any.
    #[default]
    Text,
    /// A JSON object.
    Json,
    /// JSON that the schema allows.
    JsonSchema(Value),
    /// Text that the whole regular expression matches.
    Regex(String),
    /// Text of a grammar in llguidance's dialect of Lark.
    Lark(String),
}

impl OutputFormat {
    fn is_text(&self) -> bool {
        *self == Self::Text
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; may be empty where an assistant only calls functions.
    #[serde(default)]
    pub content: String,
    /// What an assistant thought before it spoke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// The functions an assistant called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool's message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The name of who speaks, or of the tool that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// Returns a message of plain text.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        let content = content.into();
        Self { role, content, reasoning: None, tool_calls: Vec::new(), tool_call_id: None, name: None }
    }
}

/// A function that an assistant called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ToolCall {
    /// The call's name within the conversation.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// Its arguments as JSON text; a model may write text that is not JSON.
    pub arguments: String,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions of whoever built the application.
    System,
    /// A person.
    User,
    /// The model.
    Assistant,
    /// A function that the model called.
    Tool,
}

impl Role {
    /// Returns the word chat templates know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A visitor instead of an untagged enum, which would hide where in the input an error lies.
        struct TextOrMap;

        impl<'de> serde::de::Visitor<'de> for TextOrMap {
            type Value = Input;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a prompt, or an object with `messages` or `prompt`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Input, E> {
                Ok(Input { prompt: Some(text.to_owned()), ..Input::default() })
            }

            fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Input, E> {
                Ok(Input { prompt: Some(text), ..Input::default() })
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Input, A::Error> {
                // The one that the derivation made, which reads objects only.
                Input::deserialize(serde::de::value::MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_any(TextOrMap)
    }
}

impl Serialize for Input {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Input::serialize(self, serializer)
    }
}

/// The most texts in `stop`.
pub const STOP_MAX: usize = 16;
/// The longest text in `stop`, in bytes.
pub const STOP_BYTES_MAX: usize = 256;
/// The most answers to one request.
pub const N_MAX: u32 = 16;
/// The most alternatives told for each token; OpenAI's limit.
pub const LOGPROBS_MAX: u32 = 20;
/// The most functions a model may be offered; OpenAI's limit.
pub const TOOLS_MAX: usize = 128;
/// The most tokens whose logits are biased.
pub const LOGIT_BIAS_MAX: usize = 1_024;
/// The most texts of one request to make vectors of; OpenAI's limit.
pub const EMBED_MAX: usize = 2_048;

impl Input {
    /// Checks what types cannot: that exactly one prompt is given, and that numbers lie within their ranges.
    pub fn check(&self) -> Result<(), WireError> {
        let invalid = |param: &str, message: &str| {
            Err(WireError::new(ErrorCode::InvalidValue, format!("{param} {message}")).with_param(param))
        };
        let given =
            [self.messages.is_some(), self.prompt.is_some(), self.prompt_tokens.is_some(), self.embed.is_some()];
        if given.into_iter().filter(|given| *given).count() != 1 {
            return invalid("input", "must have exactly one of messages, prompt, promptTokens and embed");
        }
        if self.messages.as_ref().is_some_and(Vec::is_empty) {
            return invalid("messages", "must not be empty");
        }
        if self.prompt_tokens.as_ref().is_some_and(Vec::is_empty) {
            return invalid("prompt", "must not be empty");
        }
        if self.embed.as_ref().is_some_and(|texts| texts.is_empty() || texts.len() > EMBED_MAX) {
            return invalid("embed", "must have 1 to 2048 texts");
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
        if self.max_tokens == Some(0) {
            return invalid("max_tokens", "must be at least 1");
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

/// Says whether OpenAI's clients may call a function so.
fn is_function_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    (1..=64).contains(&name.len()) && name.bytes().all(allowed)
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Infer.Chunk")]
pub struct InferChunk {
    /// The job.
    pub correlation_id: CorrelationId,
    /// Its place in the answer, counted from 0 without gaps.
    pub seq: u64,
    /// What it brings.
    pub payload: Payload,
    /// The last chunk of the answer; its payload tells reason and usage.
    pub done: bool,
    /// The try that made it; chunks of a try that was given up on are dropped.
    #[serde(default = "first_attempt")]
    pub attempt: u32,
}

/// What a chunk brings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Payload {
    /// Text to append.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Text to append to what the model thinks before it answers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// More of its calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
    /// The tokens behind the text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<u32>,
    /// One for each token, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// Vectors, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub embeddings: Vec<Embedding>,
    /// Which of several answers this belongs to, counted from 0.
    #[serde(skip_serializing_if = "is_zero")]
    pub index: u32,
    /// Why the answer ended: for each of several answers in the chunk that ends it, and in the last chunk of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// What the answer took, in the last chunk; in the first, what the prompt took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
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
    /// The function's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Text to append to its arguments.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub arguments: String,
}

/// How likely a token was, by the model alone, before any setting of the request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Its bytes, which need not be whole characters.
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens in its place, the likeliest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TokenLogprob>,
}

/// The vector of one text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Embedding {
    /// Which text of the request, counted from 0.
    pub index: u32,
    /// Its numbers as little-endian 32-bit floats, in Base64 with padding, as OpenAI's `encoding_format` has it.
    pub base64: String,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or a stop text came.
    Stop,
    /// The token limit or the end of the context was reached.
    Length,
    /// The model ended its turn and called functions.
    ToolCalls,
}

impl FinishReason {
    /// Returns the word OpenAI's clients know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_string_is_a_prompt() {
        let input: Input = serde_json::from_str("\"hello\"").expect("a string is an input");
        assert_eq!(input.prompt.as_deref(), Some("hello"));
        input.check().expect("a prompt is enough");
    }

    #[test]
    fn an_error_in_the_input_is_located() {
        let text =
            br#"{"modelId":"m","input":{"messages":[{"role":"user","content":"a"},{"role":"wizard","content":"b"}]}}"#;
        let error = crate::codec::decode::<InferSubmission>(text).expect_err("no such role");
        assert!(error.to_string().starts_with("input.messages[1].role"), "{error}");
    }

    #[test]
    fn a_value_out_of_range_names_its_field() {
        let prompt = || Input { prompt: Some("x".into()), ..Input::default() };
        for (input, param) in [
            (Input { temperature: Some(2.5), ..prompt() }, "temperature"),
            (Input { temperature: Some(f32::NAN), ..prompt() }, "temperature"),
            (Input { top_p: Some(0.0), ..prompt() }, "top_p"),
            (Input { min_p: Some(-0.1), ..prompt() }, "min_p"),
            (Input { max_tokens: Some(0), ..prompt() }, "max_tokens"),
            (Input { stop: vec![String::new()], ..prompt() }, "stop"),
            (Input { stop: vec!["x".into(); 17], ..prompt() }, "stop"),
            (Input { messages: Some(vec![]), ..Input::default() }, "messages"),
            (Input { messages: Some(vec![]), ..prompt() }, "input"),
            (Input::default(), "input"),
        ] {
            assert_eq!(input.check().expect_err(param).param.as_deref(), Some(param));
        }
    }
}

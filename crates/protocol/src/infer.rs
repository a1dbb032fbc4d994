//! `Infer.Request` and `Infer.Chunk`: a job on its way to a worker, and its answer on the way back (T5).

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

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
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Input {
    /// A conversation to go on with. Exactly one of `messages` and `prompt` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// Text to go on with, as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// A LoRA adapter of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterName>,
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
    /// The same seed draws the same tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Up to 16 texts that end the answer; they are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Goes on past the end-of-turn token, for benchmarks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_eos: bool,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
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
}

impl Role {
    /// Returns the word chat templates know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
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
                let fields = Fields::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                Ok(fields.into())
            }
        }

        deserializer.deserialize_any(TextOrMap)
    }
}

/// Mirrors [`Input`] for reading.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct Fields {
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    adapter: Option<AdapterName>,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    seed: Option<u64>,
    stop: Vec<String>,
    ignore_eos: bool,
}

impl From<Fields> for Input {
    fn from(fields: Fields) -> Self {
        let Fields { messages, prompt, adapter, max_tokens, temperature, top_p, top_k, min_p, seed, stop, ignore_eos } =
            fields;
        Self { messages, prompt, adapter, max_tokens, temperature, top_p, top_k, min_p, seed, stop, ignore_eos }
    }
}

/// The most texts in `stop`.
pub const STOP_MAX: usize = 16;
/// The longest text in `stop`, in bytes.
pub const STOP_BYTES_MAX: usize = 256;

impl Input {
    /// Checks what types cannot: that exactly one prompt is given, and that numbers lie within their ranges.
    pub fn check(&self) -> Result<(), WireError> {
        let invalid = |param: &str, message: &str| {
            Err(WireError::new(ErrorCode::InvalidValue, format!("{param} {message}")).with_param(param))
        };
        match (&self.messages, &self.prompt) {
            (Some(messages), None) if messages.is_empty() => return invalid("messages", "must not be empty"),
            (Some(_), None) | (None, Some(_)) => {}
            _ => return invalid("input", "must have exactly one of messages and prompt"),
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

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Payload {
    /// Text to append.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// The tokens behind the text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<u32>,
    /// Why the answer ended, in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// What the answer took, in the last chunk; in the first, what the prompt took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or a stop text came.
    Stop,
    /// The token limit or the end of the context was reached.
    Length,
}

impl FinishReason {
    /// Returns the word OpenAI's clients know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
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

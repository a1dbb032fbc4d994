//! Reads the bodies of requests: OpenAI's JSON and our own, as jobs. Pure functions; bytes never make them panic.
//!
//! Fields that are unknown are passed over. Fields that mean something and are not done here are refused, never
//! silently ignored.

mod body;
mod embeddings;
mod format;
mod message;
mod texts;
mod tools;

use std::time::Duration;

use protocol::codec::{DecodeError, decode_within};
use protocol::infer::{InferSubmission, Input};
use protocol::model::ModelRef;
use protocol::{ErrorCode, WireError};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::gateway::Job;
use body::Body;

pub use embeddings::{Encoding, Vectors, parse_embeddings};

/// The tokens of a text completion that names no limit: OpenAI's default.
const COMPLETION_TOKENS: u32 = 16;

/// A request for an answer, as one of OpenAI's two endpoints takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The job to run.
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
    /// Whether the answer comes piece by piece.
    pub stream: bool,
    /// Whether a streamed answer ends with its usage.
    pub include_usage: bool,
}

/// Reads the body of `POST /v1/chat/completions`.
pub fn parse_chat(bytes: &[u8]) -> Result<Generation, WireError> {
    let mut body: Body = read(bytes)?;
    let (model, name) = body.model()?;
    let own = body.chat_input()?;
    refuse_unless(body.prompt.is_none(), "prompt")?;
    body.generation(model, name, own)
}

/// Reads the body of `POST /v1/completions`.
pub fn parse_completion(bytes: &[u8]) -> Result<Generation, WireError> {
    let mut body: Body = read(bytes)?;
    let (model, name) = body.model()?;
    let own = body.text_input()?;
    refuse_unless(body.messages.is_none(), "messages")?;
    body.generation(model, name, own)
}

/// Reads the body of `POST /infer`.
pub fn parse_infer(bytes: &[u8]) -> Result<Job, WireError> {
    let submission: InferSubmission = read(bytes).map_err(native_missing_model)?;
    submission.input.check().map_err(|invalid| native(invalid.into()))?;
    if submission.deadline_ms == Some(0) {
        return Err(invalid("deadlineMs", "must be at least 1"));
    }
    Ok(Job {
        model: ModelRef { name: submission.model_id, version: submission.version, adapter: None },
        input: submission.input,
        tenant_id: submission.tenant_id,
        correlation_id: submission.correlation_id,
        retry_token: submission.retry_token,
        trace_id: submission.trace_id,
        deadline: submission.deadline_ms.map(Duration::from_millis),
    })
}

/// Renames the field at fault from OpenAI's name to ours.
pub(crate) fn native(mut error: WireError) -> WireError {
    error.param = error.param.map(|param| match param.as_str() {
        "model" => "modelId".to_owned(),
        "tenantId" | "input" => param,
        "response_format" => "input.format".to_owned(),
        "chat_template_kwargs" => "input.templateOptions".to_owned(),
        "continue_final_message" => "input.continueLast".to_owned(),
        param if param.starts_with("chat_template_kwargs.") => {
            param.replacen("chat_template_kwargs", "input.templateOptions", 1)
        }
        _ => format!("input.{}", camel_case(&param)),
    });
    error
}

fn camel_case(snake_case: &str) -> String {
    let mut camel_case = String::with_capacity(snake_case.len());
    for word in snake_case.split('_') {
        match word.chars().next() {
            Some(first) if !camel_case.is_empty() => {
                camel_case.push(first.to_ascii_uppercase());
                camel_case.push_str(&word[first.len_utf8()..]);
            }
            _ => camel_case.push_str(word),
        }
    }
    camel_case
}

fn native_missing_model(error: WireError) -> WireError {
    if error.code == ErrorCode::InvalidValue && error.message.contains("missing field `modelId`") {
        return WireError::new(ErrorCode::MissingModel, "modelId is missing").with_param("modelId");
    }
    error
}

/// Reads a JSON object. The limit on its length was kept while it was received.
pub(crate) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    // Fields that are passed over are not looked into, so the whole is checked first.
    if let Err(error) = std::str::from_utf8(bytes) {
        return Err(not_json("invalid UTF-8", &bytes[..error.valid_up_to()]));
    }
    // An array would be taken for the fields of an object, in their order.
    let start = bytes.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(bytes.len());
    if bytes.get(start) != Some(&b'{') {
        return Err(not_json("expected an object", &bytes[..start]));
    }
    decode_within(bytes, usize::MAX).map_err(|error| match error {
        DecodeError::Malformed { path, reason } => {
            if let Some(field) = reason.strip_prefix("duplicate field `").and_then(|rest| rest.strip_suffix('`')) {
                let path = if path == "." { field.to_owned() } else { format!("{path}.{field}") };
                return invalid(&path, "is given more than once");
            }
            let reason = plain_types(&reason);
            // The whole has no path.
            let told = if path == "." { reason } else { format!("{path}: {reason}") };
            WireError { message: told, ..DecodeError::Malformed { path, reason: String::new() }.into() }
        }
        error => error.into(),
    })
}

/// Says in JSON's words what serde says in Rust's.
fn plain_types(reason: &str) -> String {
    const TYPES: [(&str, &str); 12] = [
        ("u8", "a whole number"),
        ("u32", "a whole number"),
        ("u64", "a whole number"),
        ("usize", "a whole number"),
        ("i64", "a whole number"),
        ("f32", "a number"),
        ("f64", "a number"),
        ("a sequence", "an array"),
        ("sequence", "an array"),
        ("a map", "an object"),
        ("map", "an object"),
        ("unit", "null"),
    ];
    let reason = &reason.replace("unknown variant", "unknown value");
    let Some((found, expected)) = reason.rsplit_once("expected ") else { return reason.clone() };
    let found = found.replace("invalid type: map", "invalid type: object");
    let found = found.replace("invalid type: sequence", "invalid type: array").replace("floating point", "number");
    let plain = TYPES.iter().find(|(rust, _)| *rust == expected).map(|(_, plain)| *plain);
    let is_type =
        ["struct ", "enum ", "tuple struct ", "newtype struct "].iter().any(|kind| expected.starts_with(kind));
    let expected = plain.unwrap_or(if is_type { "an object" } else { expected });
    format!("{found}expected {expected}")
}

/// Says what is wrong right after the bytes that were good.
fn not_json(what: &str, good: &[u8]) -> WireError {
    let line = good.split(|byte| *byte == b'\n').count();
    let column = good.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
    WireError::new(ErrorCode::InvalidJson, format!("not valid JSON: {what} at line {line} column {column}"))
}

pub(crate) fn invalid(param: &str, what: &str) -> WireError {
    WireError::new(ErrorCode::InvalidValue, format!("{param} {what}")).with_param(param)
}

fn missing(param: &str) -> WireError {
    invalid(param, "is missing")
}

pub(crate) fn unsupported(param: impl Into<String>) -> WireError {
    let param = param.into();
    let message = format!("{param} is not supported here; leave it out");
    WireError::new(ErrorCode::UnsupportedParameter, message).with_param(param)
}

fn refuse_unless(harmless: bool, param: &str) -> Result<(), WireError> {
    if harmless { Ok(()) } else { Err(unsupported(param)) }
}

/// Says whether a value asks for nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Makes a job of what OpenAI's clients can say.
fn job(model: ModelRef, input: Input) -> Job {
    Job { model, input, tenant_id: None, correlation_id: None, retry_token: None, trace_id: None, deadline: None }
}

#[cfg(test)]
mod tests;

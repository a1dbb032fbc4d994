//! Translates a server's refusal into an error for the caller.

use serde_json::Value;

use super::answer_reader::error_message;
use crate::model_runtime::{EngineError, unsupported};

/// Translates a refusal. Of the server's message, callers see only words that cannot name a location.
pub fn engine_error(status: u16, body: &[u8], context_length: u32) -> EngineError {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    // FastAPI's own errors have a `detail` instead of an `error`, and some servers write the fields at the top level.
    let error = body.get("error").or_else(|| body.get("detail")).unwrap_or(&body);
    let message = error_message(error);
    match status {
        400 | 413 | 422 if speaks_of_context(error, &message) => EngineError::ContextLength {
            prompt_tokens: prompt_tokens(error, &message, context_length),
            context_length: number_field(error, "n_ctx").unwrap_or(context_length),
        },
        400 | 413 | 415 | 422 | 501 => {
            let parameter = error.get("param").and_then(Value::as_str).unwrap_or("request");
            unsupported(redact_addresses(parameter), redact_addresses(&message))
        }
        404 => EngineError::NotLoaded,
        429 | 503 => EngineError::Busy,
        _ => EngineError::Failed { reason: format!("the server answered {status}: {message}") },
    }
}

fn speaks_of_context(error: &Value, message: &str) -> bool {
    let is_kind = |field| {
        let kind = error.get(field).and_then(Value::as_str).unwrap_or_default();
        kind == "exceed_context_size_error" || kind == "context_length_exceeded"
    };
    let message = message.to_lowercase();
    is_kind("type")
        || is_kind("code")
        || ["context length", "context size", "context window", "max_model_len"]
            .iter()
            .any(|words| message.contains(words))
}

fn number_field(error: &Value, field: &str) -> Option<u32> {
    error.get(field)?.as_u64()?.try_into().ok()
}

/// Returns the number of tokens that did not fit: as reported by the server, or else the greatest number in its
/// message other than the context length.
fn prompt_tokens(error: &Value, message: &str, context_length: u32) -> u32 {
    let numbers = || message.split(|letter: char| !letter.is_ascii_digit()).filter_map(|digits| digits.parse().ok());
    number_field(error, "n_prompt_tokens")
        .or_else(|| numbers().filter(|number| *number != context_length).max())
        .unwrap_or_default()
}

/// Removes each word that could be a path or an address, since the server's location must not reach clients.
fn redact_addresses(words: &str) -> String {
    let is_address = |word: &&str| word.contains(['/', '\\', '@']) || word.contains(':') && word.contains('.');
    words.split_whitespace().map(|word| if is_address(&word) { "…" } else { word }).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_does_not_fit_is_told_by_its_numbers() {
        let llama_server = r#"{"error":{"code":400,"message":"request (3013 tokens) exceeds the available context size (512 tokens), try increasing it","type":"exceed_context_size_error","n_prompt_tokens":3013,"n_ctx":512}}"#;
        let vllm = r#"{"error":{"message":"This model's maximum context length is 512 tokens. However, your request has 3013 input tokens.","type":"BadRequestError","param":null,"code":400}}"#;
        let sglang = r#"{"object":"error","message":"The input (3013 tokens) is longer than the model's context length (512 tokens).","type":"BadRequestError","param":null,"code":400}"#;
        for body in [llama_server, vllm, sglang] {
            let error = engine_error(400, body.as_bytes(), 512);
            assert_eq!(error, EngineError::ContextLength { prompt_tokens: 3013, context_length: 512 }, "{body}");
        }
    }

    #[test]
    fn a_refused_parameter_is_named_and_no_place_is() {
        let body = br#"{"error":{"message":"bad grammar, see /srv/models/a.gguf on http://10.0.0.7:8000 or 10.0.0.7:8000","param":"response_format"}}"#;
        let reason = "bad grammar, see … on … or …";
        assert_eq!(engine_error(400, body, 512), unsupported("response_format", reason));
    }

    #[test]
    fn every_other_status_says_what_the_caller_can_do() {
        assert_eq!(engine_error(429, b"", 512), EngineError::Busy);
        assert_eq!(engine_error(503, b"{\"error\":{\"message\":\"Loading model\"}}", 512), EngineError::Busy);
        assert_eq!(engine_error(404, b"{\"detail\":\"Not Found\"}", 512), EngineError::NotLoaded);
        for status in [401, 500, 502, 302] {
            assert!(matches!(engine_error(status, b"<html>", 512), EngineError::Failed { .. }), "{status}");
        }
    }
}

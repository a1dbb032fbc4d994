//! Errors in Anthropic's format: `{"type":"error","error":{"type","message"},"request_id"}`.

use std::borrow::Cow;

use protocol::error_code::ContextLength;
use protocol::{ErrorCode, WireError};
use serde::Serialize;
use utoipa::ToSchema;

use crate::anthropic::THREAD;

/// Anthropic's status for a service that is overloaded.
const OVERLOADED: u16 = 529;
/// Fields that this API names otherwise than the checks, which name them as OpenAI does.
const NAMES: [(&str, &str); 5] = [
    ("stop", "stop_sequences"),
    ("response_format", "output_config.format"),
    ("chat_template_kwargs", "thinking"),
    ("reasoning_effort", "output_config.effort"),
    ("continue_final_message", "messages"),
];

/// The body of every error.
#[derive(Serialize, ToSchema)]
#[schema(as = MessagesErrorBody)]
pub(crate) struct ErrorBody<'a> {
    /// Kind of the object: always `error`.
    r#type: &'static str,
    error: ErrorDetail<'a>,
    /// Id of the request, as in the header `request-id`.
    request_id: Option<&'a str>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = MessagesErrorDetail)]
struct ErrorDetail<'a> {
    /// Anthropic's type of the error.
    r#type: &'static str,
    /// What went wrong and what to do, for people.
    message: Cow<'a, str>,
    /// What the SDKs need to know to do without a thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<ErrorDetails>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = MessagesErrorDetails)]
struct ErrorDetails {
    error_code: &'static str,
    unsupported: [&'static str; 1],
}

impl<'a> ErrorBody<'a> {
    pub(crate) fn of(error: &'a WireError, request_id: Option<&'a str>) -> Self {
        let is_thread = error.code == ErrorCode::UnsupportedParameter && error.param.as_deref() == Some(THREAD);
        let details = ErrorDetails { error_code: "thread_unsupported_request", unsupported: [THREAD] };
        let details = is_thread.then_some(details);
        let detail = ErrorDetail { r#type: error_type(error.code), message: message(error), details };
        Self { r#type: "error", error: detail, request_id }
    }
}

/// Returns the status of an error.
pub(crate) fn status(code: ErrorCode) -> u16 {
    status_here(code.http_status())
}

/// Returns the status of this API for one of OpenAI's.
pub(crate) fn status_here(status: u16) -> u16 {
    if status == 503 { OVERLOADED } else { status }
}

fn error_type(code: ErrorCode) -> &'static str {
    match status(code) {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        OVERLOADED => "overloaded_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// Returns an error's message in the words of this API.
fn message(error: &WireError) -> Cow<'_, str> {
    let message = &error.message;
    if error.code == ErrorCode::ContextLengthExceeded {
        return too_long(message).into();
    }
    let renamed = NAMES.iter().find_map(|(name, here)| {
        let is_at_fault = error.param.as_deref() == Some(*name);
        message.strip_prefix(name).filter(|_| is_at_fault).map(|rest| format!("{here}{rest}"))
    });
    renamed.map_or(Cow::Borrowed(message), Cow::Owned)
}

/// Claude Code shortens the conversation when it reads these words.
fn too_long(message: &str) -> String {
    match message.parse() {
        Ok(ContextLength { context_length, prompt_tokens, .. }) => {
            format!("prompt is too long: {prompt_tokens} tokens > {context_length} maximum")
        }
        Err(_) => format!("prompt is too long: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(error: &WireError) -> serde_json::Value {
        serde_json::to_value(ErrorBody::of(error, Some("id"))).expect("JSON")
    }

    #[test]
    fn each_code_has_the_type_and_status_that_anthropics_sdks_expect() {
        use ErrorCode as E;
        for (code, expected, kind) in [
            (E::InvalidJson, 400, "invalid_request_error"),
            (E::InvalidApiKey, 401, "authentication_error"),
            (E::ModelNotAllowed, 403, "permission_error"),
            (E::ModelNotFound, 404, "not_found_error"),
            (E::MethodNotAllowed, 405, "invalid_request_error"),
            (E::RequestTooLarge, 413, "request_too_large"),
            (E::RateLimitExceeded, 429, "rate_limit_error"),
            (E::InsufficientQuota, 429, "rate_limit_error"),
            (E::InternalError, 500, "api_error"),
            (E::WorkerFailed, 502, "api_error"),
            (E::NoCapacity, 529, "overloaded_error"),
            (E::ModelLoading, 529, "overloaded_error"),
            (E::BreakerOpen, 529, "overloaded_error"),
            (E::DeadlineExceeded, 504, "timeout_error"),
        ] {
            assert_eq!((status(code), error_type(code)), (expected, kind), "{code}");
        }
    }

    #[test]
    fn an_error_has_the_shape_of_anthropics() {
        let expected = serde_json::json!({
            "type": "error", "error": {"type": "not_found_error", "message": "gone"}, "request_id": "id"
        });
        assert_eq!(written(&WireError::new(ErrorCode::ModelNotFound, "gone")), expected);
    }

    #[test]
    fn the_sdks_are_told_to_do_without_a_thread() {
        let error = WireError::new(ErrorCode::UnsupportedParameter, "no").with_param("thread");
        let details = serde_json::json!({"error_code": "thread_unsupported_request", "unsupported": ["thread"]});
        assert_eq!(written(&error)["error"]["details"], details);
    }

    #[test]
    fn a_field_is_named_as_in_this_api() {
        let error = |param: &str, message: &str| WireError::new(ErrorCode::InvalidValue, message).with_param(param);
        for (param, message, expected) in [
            ("stop", "stop must have at most 16 texts", "stop_sequences must have at most 16 texts"),
            ("response_format", "response_format is too deep", "output_config.format is too deep"),
            ("top_p", "top_p must be small", "top_p must be small"),
            ("tools", "stop is a word", "stop is a word"),
        ] {
            assert_eq!(written(&error(param, message))["error"]["message"], expected);
        }
    }

    #[test]
    fn a_full_context_reads_as_claude_code_expects_it() {
        let limit = ContextLength { context_length: 512, part: "messages", prompt_tokens: 600 };
        let message = |error: &WireError| written(error)["error"]["message"].as_str().expect("text").to_owned();
        assert_eq!(message(&limit.into()), "prompt is too long: 600 tokens > 512 maximum");
        let other = WireError::new(ErrorCode::ContextLengthExceeded, "far too long");
        assert_eq!(message(&other), "prompt is too long: far too long");
    }
}

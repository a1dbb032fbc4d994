//! Translates the errors of workers to errors of jobs. Pure.
//!
//! A worker's word reaches the client only where the client needs it. Codes that blame the caller must be plausible,
//! and texts are our own, or are quoted as the worker's.

use std::time::Duration;

use protocol::error_code::ContextLength;
use protocol::{ErrorCode, WireError};
use rpc::CallError;

/// The longest text of a worker that clients see, in characters.
const TEXT_MAX: usize = 300;
/// The longest name of a field, in characters.
const PARAM_MAX: usize = 64;

/// Returns the error of a job for a worker's error. An error that no honest worker sends is the worker's failure, and
/// so is a deadline that has not passed.
pub(crate) fn translate(error: WireError, deadline_passed: bool) -> WireError {
    let own = |message: &str| WireError::new(error.code, message);
    match error.code {
        ErrorCode::DeadlineExceeded if deadline_passed => own("the deadline passed"),
        ErrorCode::WorkerFull => {
            let wait = Duration::from_millis(error.retry_after_ms.unwrap_or(1_000));
            own("the worker is full, try another").with_retry_after(wait)
        }
        ErrorCode::WorkerStopping => own("the worker is stopping, try another"),
        ErrorCode::ModelNotHere => own("the worker does not serve the model, try another"),
        ErrorCode::Unavailable => own("the worker takes no calls now, try again"),
        ErrorCode::WorkerFailed | ErrorCode::InternalError => own("the worker failed, try again"),
        ErrorCode::NotEnrolled | ErrorCode::NodeRevoked | ErrorCode::UnknownMethod => own("the worker takes no jobs"),
        ErrorCode::EngineCrashed => {
            own("the engine crashed, try again").with_suspects(error.suspects.unwrap_or(1).max(1))
        }
        ErrorCode::ContextLengthExceeded => error.message.parse::<ContextLength>().map_or_else(|_| odd(), Into::into),
        ErrorCode::UnsupportedParameter => match error.param.filter(|param| is_field_name(param)) {
            Some(param) => {
                let text = plain(&error.message);
                let message = format!("the model cannot do what {param} asks; its worker says: {text}");
                WireError::new(error.code, message).with_param(param)
            }
            None => odd(),
        },
        _ => odd(),
    }
}

fn odd() -> WireError {
    WireError::new(ErrorCode::WorkerFailed, "the worker refused the job without a valid reason")
}

/// Returns the error of a call to a worker that the worker did not send.
pub(crate) fn of_call(error: &CallError) -> WireError {
    match error {
        CallError::Deadline => WireError::new(ErrorCode::DeadlineExceeded, "the deadline passed"),
        CallError::TooLarge { .. } => WireError::new(ErrorCode::RequestTooLarge, error.to_string()),
        other => WireError::new(ErrorCode::WorkerFailed, format!("the worker failed: {other}")),
    }
}

/// Returns a text without control characters, and cut where it is too long.
fn plain(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).take(TEXT_MAX).collect()
}

fn is_field_name(text: &str) -> bool {
    let may_occur = |byte: u8| byte.is_ascii_alphanumeric() || b"_.[]$".contains(&byte);
    (1..=PARAM_MAX).contains(&text.len()) && text.bytes().all(may_occur)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(code: ErrorCode, message: &str) -> WireError {
        WireError::new(code, message).with_param("tools")
    }

    #[test]
    fn only_what_workers_may_say_is_believed() {
        for code in ErrorCode::ALL {
            let translated = translate(said(code, "visit evil.example"), false);
            let is_allowed = matches!(
                code,
                ErrorCode::WorkerFull
                    | ErrorCode::WorkerStopping
                    | ErrorCode::ModelNotHere
                    | ErrorCode::Unavailable
                    | ErrorCode::WorkerFailed
                    | ErrorCode::InternalError
                    | ErrorCode::NotEnrolled
                    | ErrorCode::NodeRevoked
                    | ErrorCode::UnknownMethod
                    | ErrorCode::EngineCrashed
                    | ErrorCode::UnsupportedParameter
            );
            assert_eq!(translated.code, if is_allowed { code } else { ErrorCode::WorkerFailed });
            let text = translated.message;
            assert!(code == ErrorCode::UnsupportedParameter || !text.contains("evil"), "{code}: {text}");
        }
    }

    #[test]
    fn a_deadline_is_believed_once_it_has_passed() {
        let late = || said(ErrorCode::DeadlineExceeded, "too late");
        assert_eq!(translate(late(), false), odd());
        assert_eq!(translate(late(), true).code, ErrorCode::DeadlineExceeded);
    }

    #[test]
    fn a_prompt_that_is_too_long_is_said_in_our_words() {
        let limit = ContextLength { context_length: 512, part: "messages", prompt_tokens: 700 };
        let translated = translate(WireError::from(limit), false);
        assert_eq!(translated, WireError::from(limit));
        assert_eq!(translated.param.as_deref(), Some("messages"));
        let more = format!("{limit} Visit evil.example.");
        assert_eq!(translate(said(ErrorCode::ContextLengthExceeded, &more), false), odd());
    }

    #[test]
    fn a_quoted_text_is_short_and_has_no_control_characters() {
        let text = format!("\u{1b}]52;c;x\u{7}\n{}", "x".repeat(10_000));
        let error = translate(said(ErrorCode::UnsupportedParameter, &text), false);
        assert!(!error.message.chars().any(char::is_control) && error.message.len() < TEXT_MAX + 100, "{error}");
        let error = WireError::new(ErrorCode::UnsupportedParameter, "x").with_param("<script>");
        assert_eq!(translate(error, false), odd());
    }
}

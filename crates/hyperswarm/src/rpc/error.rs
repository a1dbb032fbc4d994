//! What goes wrong with a request, and how a peer says so.

use std::fmt;

/// The method is not known there.
pub const UNKNOWN_METHOD: &str = "UNKNOWN_METHOD";
/// The request failed; the cause says how.
pub const REQUEST_ERROR: &str = "REQUEST_ERROR";
/// The request's value could not be understood.
pub const DECODE_ERROR: &str = "DECODE_ERROR";
/// The response's value could not be sent.
pub const ENCODE_ERROR: &str = "ENCODE_ERROR";

/// An error as it stands in a response.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemoteError {
    /// What happened, in words.
    pub message: String,
    /// The kind of error: one of this module's constants, or the peer's own. Empty for none.
    pub code: String,
    /// What brought it about.
    pub cause: Option<Cause>,
}

/// What brought an error about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cause {
    /// What happened, in words.
    pub message: String,
    /// The kind of error. Empty for none.
    pub code: String,
    /// Whatever else the peer wants to say. Empty for none.
    pub context: String,
}

impl RemoteError {
    /// Says that a request failed, as a Node peer says it when its handler throws.
    pub fn failed(cause: Cause) -> Self {
        Self { message: "Request failed".to_owned(), code: REQUEST_ERROR.to_owned(), cause: Some(cause) }
    }

    /// Says that there is no such method.
    pub fn unknown_method(method: &str) -> Self {
        let message = format!("Unknown method '{method}'");
        Self { message, code: UNKNOWN_METHOD.to_owned(), cause: None }
    }

    /// Says that a request's value could not be understood.
    pub fn not_decoded(cause: Cause) -> Self {
        Self { message: "Could not decode request".to_owned(), code: DECODE_ERROR.to_owned(), cause: Some(cause) }
    }

    /// Says that a response's value could not be sent.
    pub fn not_encoded(cause: Cause) -> Self {
        Self { message: "Could not encode response".to_owned(), code: ENCODE_ERROR.to_owned(), cause: Some(cause) }
    }
}

impl Cause {
    /// Makes a cause of a message and a code, which may be empty.
    pub fn new(message: impl Into<String>, code: impl Into<String>) -> Self {
        Self { message: message.into(), code: code.into(), context: String::new() }
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.code.is_empty() {
            write!(formatter, "{}: ", self.code)?;
        }
        formatter.write_str(&self.message)?;
        match &self.cause {
            Some(cause) => write!(formatter, " ({})", cause.message),
            None => Ok(()),
        }
    }
}

/// Why a request has no response.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The peer answered with an error.
    #[error("the peer answered: {0}")]
    Remote(Box<RemoteError>),
    /// The request does not fit into a message. Nothing was sent.
    #[error("the request is too long")]
    TooLong,
    /// The channel is closed, or the peer refused it. The request may have been received.
    #[error("the channel is closed")]
    Closed,
}

/// Why a response could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The response does not fit into a message. The peer was told so.
    #[error("the response is too long")]
    TooLong,
    /// The channel is closed.
    #[error("the channel is closed")]
    Closed,
}

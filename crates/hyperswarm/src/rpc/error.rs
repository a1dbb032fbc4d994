//! Errors of a request, and how a peer reports them.

use std::fmt;

/// The peer does not know the method.
pub const UNKNOWN_METHOD: &str = "UNKNOWN_METHOD";
/// The request failed. The cause has the details.
pub const REQUEST_ERROR: &str = "REQUEST_ERROR";
/// The request's value could not be decoded.
pub const DECODE_ERROR: &str = "DECODE_ERROR";
/// The response's value could not be encoded.
pub const ENCODE_ERROR: &str = "ENCODE_ERROR";

/// An error in a response.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemoteError {
    /// The error message.
    pub message: String,
    /// The error code: one of this module's constants, or one of the peer's own. Empty if the error has no code.
    pub code: String,
    /// The cause of the error.
    pub cause: Option<Cause>,
}

/// The cause of an error.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cause {
    /// The error message.
    pub message: String,
    /// The error code. Empty if the cause has no code.
    pub code: String,
    /// Further information from the peer. May be empty.
    pub context: String,
}

impl RemoteError {
    /// Makes the error of a failed request, as a Node peer does when its handler throws.
    pub fn failed(cause: Cause) -> Self {
        Self { message: "Request failed".to_owned(), code: REQUEST_ERROR.to_owned(), cause: Some(cause) }
    }

    /// Makes the error of an unknown method.
    pub fn unknown_method(method: &str) -> Self {
        let message = format!("Unknown method '{method}'");
        Self { message, code: UNKNOWN_METHOD.to_owned(), cause: None }
    }

    /// Makes the error of a request whose value could not be decoded.
    pub fn not_decoded(cause: Cause) -> Self {
        Self { message: "Could not decode request".to_owned(), code: DECODE_ERROR.to_owned(), cause: Some(cause) }
    }

    /// Makes the error of a response whose value could not be encoded.
    pub fn not_encoded(cause: Cause) -> Self {
        Self { message: "Could not encode response".to_owned(), code: ENCODE_ERROR.to_owned(), cause: Some(cause) }
    }
}

impl Cause {
    /// Makes a cause from a message and a code, which may be empty.
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
    /// The peer responded with an error.
    #[error("the peer answered: {0}")]
    Remote(Box<RemoteError>),
    /// The request does not fit in a message. Nothing was sent.
    #[error("the request is too long")]
    TooLong,
    /// The channel is closed, or the peer rejected it. The peer may have received the request.
    #[error("the channel is closed")]
    Closed,
}

/// Why a response could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The response does not fit in a message. The peer got an error instead.
    #[error("the response is too long")]
    TooLong,
    /// The channel is closed.
    #[error("the channel is closed")]
    Closed,
}

//! Parses the bodies of Anthropic's requests into jobs. Pure functions that never panic, whatever the input.
//!
//! As with Anthropic, much is optional: unknown fields have no effect, and neither have tools that only a server of
//! Anthropic's could run. Content that a model here cannot read is refused.

mod body;
mod conversation;
mod tools;

use protocol::WireError;

use crate::job::Job;
use crate::json_body::{missing, read};
pub(crate) use body::{MessageCountRequest, MessagesRequest};

/// A parsed request for a message.
#[derive(Debug, Clone, PartialEq)]
pub struct MessageOrder {
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
    /// Whether to stream the answer.
    pub stream: bool,
}

/// Parses the body of `POST /v1/messages`.
pub fn parse_messages(bytes: &[u8]) -> Result<MessageOrder, WireError> {
    let MessagesRequest(body) = read(bytes)?;
    if body.max_tokens.is_none() {
        return Err(missing("max_tokens"));
    }
    body.order()
}

/// Parses the body of `POST /v1/messages/count_tokens`.
pub fn parse_message_count(bytes: &[u8]) -> Result<Job, WireError> {
    let MessageCountRequest(body) = read(bytes)?;
    let mut job = body.order()?.job;
    job.input.count_only = true;
    Ok(job)
}

#[cfg(test)]
mod tests;

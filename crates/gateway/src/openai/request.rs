//! Reads the bodies of OpenAI's requests as jobs. Pure functions; bytes never make them panic.
//!
//! Fields that are unknown are passed over. Fields that mean something and are not done here are refused, never
//! silently ignored.

mod body;
mod embeddings;
mod format;
mod message;
mod texts;
mod tools;

use protocol::WireError;
use protocol::infer::Input;
use protocol::model::ModelRef;

use crate::job::Job;
use crate::json_body::{read, refuse_unless};
pub(crate) use body::{ChatCompletionRequest, CompletionRequest};
pub(crate) use embeddings::EmbeddingRequest;
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
    let ChatCompletionRequest(mut body) = read(bytes)?;
    let (model, name) = body.model()?;
    let own = body.chat_input()?;
    refuse_unless(body.prompt.is_none(), "prompt")?;
    body.generation(model, name, own)
}

/// Reads the body of `POST /v1/completions`.
pub fn parse_completion(bytes: &[u8]) -> Result<Generation, WireError> {
    let CompletionRequest(mut body) = read(bytes)?;
    let (model, name) = body.model()?;
    let own = body.text_input()?;
    refuse_unless(body.messages.is_none(), "messages")?;
    body.generation(model, name, own)
}

/// Makes a job of what OpenAI's clients can say.
fn job(model: ModelRef, input: Input) -> Job {
    Job { model, input, tenant_id: None, correlation_id: None, retry_token: None, trace_id: None, deadline: None }
}

#[cfg(test)]
mod tests;

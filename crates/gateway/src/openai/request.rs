//! Parses the bodies of OpenAI requests into jobs. Pure functions that never panic, whatever the input.
//!
//! Unknown fields are ignored. Known fields that are not supported are refused, never silently ignored.

mod body;
mod embeddings;
mod format;
mod message;
mod rerank;
mod texts;
mod tokens;
mod tools;

use protocol::WireError;

use crate::job::Job;
use crate::json_body::{read, refuse_unless, renamed};
pub(crate) use body::{ChatCompletionRequest, CompletionRequest, Count, reasoning_options};
pub(crate) use embeddings::EmbeddingRequest;
pub use embeddings::{Encoding, Vectors, parse_embeddings};
pub(crate) use format::of_schema;
pub(crate) use message::{Content, Part, join};
pub(crate) use rerank::{RerankRequest, Reranking, parse_rerank};
pub(crate) use texts::{Stop, Texts};
pub(crate) use tokens::{
    DETOKENIZE_PARAM, DetokenizeRequest, TokenizeRequest, Tokenizing, of_param, parse_detokenize, parse_tokenize,
};
pub(crate) use tools::{OfferedTool, check_parameters, tools};

/// Maximum tokens of a text completion without a limit; OpenAI's default.
const COMPLETION_TOKENS: u32 = 16;

/// A parsed request to either of OpenAI's endpoints for generated text.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
    /// Whether to stream the answer.
    pub stream: bool,
    /// Whether a streamed answer ends with a usage chunk.
    pub include_usage: bool,
    /// Whether the request names a service tier, so that the response names it too.
    pub names_tier: bool,
    /// Whether the answer calls functions in the older form: `function_call` instead of `tool_calls`.
    pub calls_functions: bool,
}

/// Parses the body of `POST /v1/chat/completions`.
pub fn parse_chat(bytes: &[u8]) -> Result<Generation, WireError> {
    let ChatCompletionRequest(mut body) = read(bytes)?;
    let (model, name) = body.model()?;
    let calls_functions = body.offers_functions();
    let own = body.chat_input()?;
    refuse_unless(body.prompt.is_none(), "prompt")?;
    let generation = body.generation(model, name, own);
    let generation = if calls_functions { generation.map_err(in_older_form) } else { generation };
    Ok(Generation { calls_functions, ..generation? })
}

/// Names the fields of an error about tools as clients that offer `functions` know them.
fn in_older_form(error: WireError) -> WireError {
    renamed(renamed(error, "tools", "functions"), "tool_choice", "function_call")
}

/// Parses the body of `POST /v1/completions`.
pub fn parse_completion(bytes: &[u8]) -> Result<Generation, WireError> {
    let CompletionRequest(mut body) = read(bytes)?;
    let (model, name) = body.model()?;
    let own = body.text_input()?;
    refuse_unless(body.messages.is_none(), "messages")?;
    body.generation(model, name, own)
}

#[cfg(test)]
mod tests;

//! `Infer.Request` and `Infer.Chunk`: a job on its way to a worker, and its answer on the way back (T5).

use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{CorrelationId, ModelName, ModelVersion, RetryToken, TenantId, TraceId};
use crate::model::ModelKey;
use crate::usage::TokenUsage;

pub use inference::{
    ANSWERS_MAX, EMBED_MAX, EmbedInput, FinishReason, Input, InvalidInput, LOGIT_BIAS_MAX, LOGPROBS_MAX, Message,
    N_MAX, OutputFormat, Progress, Role, SCHEMA_BYTES_MAX, SCHEMA_DEPTH_MAX, STOP_BYTES_MAX, STOP_MAX, TOOLS_MAX,
    TokenLogprob, Tool, ToolCall, ToolCallDelta, ToolChoice,
};

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
    /// Tenant that is billed.
    pub tenant_id: TenantId,
    /// The model to run.
    pub model_id: ModelName,
    /// Version of the model.
    pub version: ModelVersion,
    /// Models that may run it as well; at most [`crate::model::ALTERNATIVES_MAX`] are considered. A worker is sent
    /// none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<ModelKey>,
    /// What to answer, and how.
    pub input: Input,
    /// Id of the job in logs, traces and stores.
    pub correlation_id: CorrelationId,
    /// The same token never runs a job twice.
    pub retry_token: RetryToken,
    /// The trace this job belongs to.
    pub trace_id: TraceId,
    /// Which try this is, counted from 1; set by the orchestrator and carried by each chunk.
    #[serde(default = "first_attempt")]
    pub attempt: u32,
    /// Milliseconds the caller will still wait for the answer to begin. Relative, so that clocks need not agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Whether the caller reads chunks with `progress`. A node that does not know them would take them for part of the
    /// answer, so none is sent to one that does not say so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub progress: bool,
}

fn first_attempt() -> u32 {
    1
}

impl InferRequest {
    /// Returns the model to run.
    pub fn model(&self) -> ModelKey {
        ModelKey { model_id: self.model_id.clone(), version: self.version }
    }
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
    /// Milliseconds the caller will wait for the answer to begin.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Infer.Chunk")]
pub struct InferChunk {
    /// Id of the job.
    pub correlation_id: CorrelationId,
    /// Its place in the answer, counted from 0 without gaps. A chunk with `progress` has the place of the one that
    /// comes next, and takes none.
    pub seq: u64,
    /// Part of the answer.
    pub payload: Payload,
    /// The model that answers: in the first chunk, and in those with `progress` that come before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelKey>,
    /// The last chunk of the answer; its payload tells reason and usage.
    pub done: bool,
    /// The try that made it; chunks of a try that was given up on are dropped.
    #[serde(default = "first_attempt")]
    pub attempt: u32,
    /// Says that the job is being worked on or waits its turn, and brings nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// A job that is worked on, or that waits its turn, says so at least this often.
pub const PROGRESS_WITHIN: Duration = Duration::from_secs(2);

/// What a chunk brings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Payload {
    /// Text to append to the answer.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Text to append to what the model thinks before it answers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// More of its calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
    /// The tokens behind the text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<u32>,
    /// One for each token, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// Vectors, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub embeddings: Vec<Embedding>,
    /// The tokens of the prompt, where no more was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_tokens: Option<u32>,
    /// Which of several answers this belongs to, counted from 0.
    #[serde(skip_serializing_if = "is_zero")]
    pub index: u32,
    /// Why the answer ended: for each of several answers in the chunk that ends it, and in the last chunk of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// What the answer took, in the last chunk; in the first, what the prompt took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// The vector of one text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Embedding {
    /// Which text of the request, counted from 0.
    pub index: u32,
    /// Its numbers as little-endian 32-bit floats, in Base64 with padding, as OpenAI's `encoding_format` has it.
    pub base64: String,
}

impl Embedding {
    /// Encodes a vector as base64 of little-endian 32-bit floats.
    pub fn new(index: u32, vector: &[f32]) -> Self {
        let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
        Self { index, base64: BASE64_STANDARD.encode(bytes) }
    }

    /// Reads the vector, or returns `None` if the bytes are not one.
    pub fn vector(&self) -> Option<Vec<f32>> {
        let bytes = BASE64_STANDARD.decode(&self.base64).ok()?;
        let (numbers, rest) = bytes.as_chunks();
        let vector = numbers.iter().map(|number| f32::from_le_bytes(*number));
        rest.is_empty().then(|| vector.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_is_written_as_openai_writes_it_and_read_back() {
        let embedding = Embedding::new(3, &[1.0, -0.5]);
        assert_eq!(embedding.base64, "AACAPwAAAL8=");
        assert_eq!(embedding.vector(), Some(vec![1.0, -0.5]));
    }

    #[test]
    fn what_is_no_vector_is_not_read() {
        for text in ["AACAPw", "AACAPwA=", "?", "AACAPw==\n"] {
            assert_eq!(Embedding { index: 0, base64: text.into() }.vector(), None, "{text}");
        }
    }

    #[test]
    fn an_error_in_the_input_is_located() {
        let text =
            br#"{"modelId":"m","input":{"messages":[{"role":"user","content":"a"},{"role":"wizard","content":"b"}]}}"#;
        let error = crate::codec::decode::<InferSubmission>(text).expect_err("no such role");
        assert!(error.to_string().starts_with("input.messages[1].role"), "{error}");
    }
}

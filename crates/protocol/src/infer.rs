//! `Infer.Request` and `Infer.Chunk`: a job, and the parts of its answer.

use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::id::{AdapterName, CorrelationId, Digest, ModelName, ModelVersion, RetryToken, TenantId, TraceId};
use crate::model::ModelKey;
use crate::policy::ServiceClass;
use crate::quota::QuotaState;
use crate::usage::TokenUsage;

pub use inference::{
    ANSWERS_MAX, EMBED_MAX, EmbedInput, FinishReason, Input, InvalidInput, LOGIT_BIAS_MAX, LOGPROBS_MAX, ListedToken,
    Message, N_MAX, OutputFormat, Progress, QUERY_BYTES_MAX, Role, SCHEMA_BYTES_MAX, SCHEMA_DEPTH_MAX, STOP_BYTES_MAX,
    STOP_MAX, TOOLS_MAX, TokenListing, TokenLogprob, Tool, ToolCall, ToolCallDelta, ToolChoice,
};

/// The name of the stream that sends a job to an orchestrator, or from a client to a gateway. A gateway also serves it
/// as a unary call.
pub const SUBMIT: &str = "infer.submit";
/// The name of the stream that sends a job to a worker.
pub const START: &str = "infer.start";

/// A job. Unknown fields are ignored, so that older nodes understand newer ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Infer.Request")]
pub struct InferRequest {
    /// Tenant that is billed.
    pub tenant_id: TenantId,
    /// Name of the model.
    pub model_id: ModelName,
    /// Version of the model.
    pub version: ModelVersion,
    /// Further models that may run the job; at most [`crate::model::ALTERNATIVES_MAX`] are considered. Workers get
    /// none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<ModelKey>,
    /// Digests of the models in the catalogue. A worker that has another file under a model's name gets no job for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub digests: Vec<ModelDigest>,
    /// Input and settings of the job.
    pub input: Input,
    /// Id of the job in logs, traces and stores.
    pub correlation_id: CorrelationId,
    /// The same token never runs a job twice.
    pub retry_token: RetryToken,
    /// Digest of what the client asks for, if the client chose the token: another request under the same token is
    /// refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Digest>,
    /// How urgent the job is.
    #[serde(default, skip_serializing_if = "ServiceClass::is_standard")]
    pub class: ServiceClass,
    /// Trace that the job belongs to.
    pub trace_id: TraceId,
    /// Number of the attempt, from 1. The orchestrator sets it, and each chunk repeats it.
    #[serde(default = "first_attempt")]
    pub attempt: u32,
    /// Milliseconds within which the answer must begin. Relative, so that clocks need not agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Whether the caller understands chunks with `progress`. Others get none, because they would take them for parts
    /// of the answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub progress: bool,
    /// What earlier attempts delivered of the answers, which this attempt continues. The orchestrator sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivered: Option<Delivered>,
    /// Whether the caller acknowledges what it has read (`docs/wire/tether-stream-1.md`). It is then billed for nothing
    /// else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub acknowledges: bool,
    /// Milliseconds for which the job goes on without a reader. If it is present, the client may submit the request
    /// again and get the same answer, also for a minute after its end. Workers get none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linger_ms: Option<u64>,
    /// Whether the answer is stored as well, for repeats much later and after a restart.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keeps_answer: bool,
    /// What the gateway needs to answer for the job later. It is kept with the answer, encrypted. Workers get none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Whether the job runs to its end even if nobody reads its answer. Allowed with `note`; workers get none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detached: bool,
}

impl InferRequest {
    /// Creates the first attempt of a job, for a caller that neither understands progress nor acknowledges what it
    /// reads.
    pub fn new(
        tenant_id: TenantId,
        model: ModelKey,
        input: Input,
        correlation_id: CorrelationId,
        retry_token: RetryToken,
        trace_id: TraceId,
    ) -> Self {
        Self {
            tenant_id,
            model_id: model.model_id,
            version: model.version,
            alternatives: vec![],
            digests: vec![],
            input,
            correlation_id,
            retry_token,
            fingerprint: None,
            class: ServiceClass::default(),
            trace_id,
            attempt: first_attempt(),
            deadline_ms: None,
            progress: false,
            delivered: None,
            acknowledges: false,
            linger_ms: None,
            keeps_answer: false,
            note: None,
            detached: false,
        }
    }
}

/// What a caller already has of a job's answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Delivered {
    /// Sequence number of the next chunk.
    pub seq: u64,
    /// The answers that have begun, ordered by their index.
    pub answers: Vec<DeliveredAnswer>,
}

/// The part of an answer that a caller already has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeliveredAnswer {
    /// Index of the answer, from 0.
    pub index: u32,
    /// Ids of its tokens, in order. They determine its text.
    pub tokens: Vec<u32>,
    /// Its text, if a server wrote it that lists no tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<DeliveredText>,
    /// Why the answer ended, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
}

/// The text of an answer that a caller already has. It has neither reasoning nor calls.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeliveredText {
    /// Text of the answer that the caller has.
    pub text: String,
    /// Number of its tokens, estimated from its length.
    pub tokens: u32,
}

/// A model and the digest of its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelDigest {
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// SHA-256 of its file, or of its name if it is on an adopted server.
    pub digest: Digest,
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

/// The body of `POST /infer`. The gateway fills in what is omitted.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferSubmission {
    /// Tenant that is billed. If given, it must be the token's tenant.
    #[serde(default)]
    pub tenant_id: Option<TenantId>,
    /// Name of the model.
    pub model_id: ModelName,
    /// Version of the model; the newest if omitted.
    #[serde(default)]
    pub version: Option<ModelVersion>,
    /// Input and settings of the job.
    pub input: Input,
    /// Id of the job in logs, traces and stores. If omitted, it is derived from the retry token or generated.
    #[serde(default)]
    pub correlation_id: Option<CorrelationId>,
    /// The same token never runs a job twice, and is refused with another request. Generated if omitted.
    #[serde(default)]
    pub retry_token: Option<RetryToken>,
    /// Trace that the job belongs to; a new one if omitted.
    #[serde(default)]
    pub trace_id: Option<TraceId>,
    /// Milliseconds within which the answer must begin.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    /// How urgent the job is; `standard` if omitted.
    #[serde(default)]
    pub class: Option<ServiceClass>,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Infer.Chunk")]
pub struct InferChunk {
    /// Id of the job.
    pub correlation_id: CorrelationId,
    /// Sequence number in the answer, from 0 without gaps. A chunk with `progress` has the number of the next chunk and
    /// does not use it up.
    pub seq: u64,
    /// Content of the chunk.
    pub payload: Payload,
    /// Model that answers. Present in the first chunk, and in chunks with `progress` before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelKey>,
    /// Whether this is the last chunk. Its payload has the finish reason and the usage.
    pub done: bool,
    /// Number of the attempt, from 1. A chunk with the number of another attempt is refused.
    #[serde(default = "first_attempt")]
    pub attempt: u32,
    /// Progress of a job that is running or queued. A chunk with it has no other content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Where the answer comes from, if its client may submit the request again. It is in a chunk with `progress`,
    /// before the first part of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The token limit of the tenant of which least is left. It is in a chunk with `progress`, before the first part of
    /// the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<QuotaState>,
    /// How the job was made cheaper, if it was. It is in a chunk with `progress`, before the first part of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded: Option<Degraded>,
}

/// How a job was made cheaper, as the policy of its tenant says. One of the three is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Degraded {
    /// Model that runs it instead of the requested one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelKey>,
    /// Adapter that is used instead of the requested one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterName>,
    /// The most tokens of each answer, instead of the requested number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Why: `queue` if it would have waited too long.
    pub reason: String,
}

impl fmt::Display for Degraded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(model) = &self.model {
            write!(formatter, "model={model}; ")?;
        }
        if let Some(adapter) = &self.adapter {
            write!(formatter, "adapter={adapter}; ")?;
        }
        if let Some(tokens) = self.max_tokens {
            write!(formatter, "max_tokens={tokens}; ")?;
        }
        write!(formatter, "reason={}", self.reason)
    }
}

/// Where an answer comes from that a client may ask for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Origin {
    /// When the job began.
    pub created_at: UnixMillis,
    /// Whether the job had ended before this call, so that its kept answer is sent again.
    pub replayed: bool,
    /// Whether an earlier call runs the job, so that this one reads the same answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attached: bool,
}

impl InferChunk {
    /// Creates a chunk that is neither the first nor the last.
    pub fn new(correlation_id: CorrelationId, attempt: u32, seq: u64, payload: Payload) -> Self {
        Self {
            correlation_id,
            seq,
            payload,
            model: None,
            done: false,
            attempt,
            progress: None,
            origin: None,
            quota: None,
            degraded: None,
        }
    }
}

/// The maximum time between two chunks of a running or queued job. If there is no output, it sends `progress`.
pub const PROGRESS_WITHIN: Duration = Duration::from_secs(2);

/// Content of a chunk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Payload {
    /// Text to append to the answer.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Text to append to the reasoning.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// Parts of function calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
    /// Ids of the text's tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<u32>,
    /// Log-probability of each token, if requested.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// Vectors, if they were requested; a score is a vector of length 1.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub embeddings: Vec<Embedding>,
    /// Number of input tokens, if only that was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_tokens: Option<u32>,
    /// Input tokens, if their list was requested.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub listed_tokens: Vec<ListedToken>,
    /// Index of the answer that this belongs to, from 0.
    #[serde(skip_serializing_if = "is_zero")]
    pub index: u32,
    /// Why the answer ended. Present in the last chunk of each answer, and in the last chunk of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// The stop sequence that ended the answer, beside its finish reason. Not every server tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_sequence: Option<String>,
    /// Token usage: that of the prompt in the first chunk, that of the job in the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
    /// How often another worker continued the answer. Only in the last chunk, where the orchestrator sets it.
    #[serde(skip_serializing_if = "is_zero")]
    pub continued: u32,
    /// How the job was made cheaper, if it was. Only in the last chunk, where the orchestrator sets it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degraded: Option<Degraded>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
pub(crate) fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// The vector of one text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Embedding {
    /// Index of the text in the request, from 0.
    pub index: u32,
    /// The vector as little-endian 32-bit floats, in Base64 with padding, as with OpenAI's `encoding_format`.
    pub base64: String,
}

impl Embedding {
    /// Encodes a vector as base64 of little-endian 32-bit floats.
    pub fn new(index: u32, vector: &[f32]) -> Self {
        let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
        Self { index, base64: BASE64_STANDARD.encode(bytes) }
    }

    /// Decodes the vector. Returns `None` if the text is not one.
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

//! Messages between RPC clients and a gateway: `infer.submit` for jobs and `infer.models` for the models. Each request
//! carries the client's API token.
//!
//! A client needs no certificate, so any node key may call. A unary call of `infer.submit` returns the whole answer as
//! one JSON value. A stream of `infer.submit` delivers each `Infer.Chunk` as it is generated.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::id::{CorrelationId, ModelName, ModelVersion};
use crate::infer::{Degraded, Embedding, FinishReason, InferSubmission, TokenLogprob, ToolCall, is_zero};
use crate::usage::TokenUsage;

/// Gateway: lists the models a token may use, as `GET /v1/models` does. [`ModelsRequest`] → OpenAI's list.
pub const MODELS: &str = "infer.models";

/// A job that a client submits to a gateway. Exactly one of `request`, `chat`, `completion` and `embedding` must be
/// given.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Gateway.Submission")]
pub struct GatewaySubmission {
    /// The API token, such as `tth_live_…`.
    pub token: String,
    /// The job in Tether's own format, as `POST /infer` accepts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<InferSubmission>,
    /// The job as `POST /v1/chat/completions` accepts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<Map<String, Value>>,
    /// The job as `POST /v1/completions` accepts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion: Option<Map<String, Value>>,
    /// The job as `POST /v1/embeddings` accepts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<Map<String, Value>>,
    /// W3C trace context that the job continues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

impl GatewaySubmission {
    /// Makes a submission of a job in Tether's own format.
    pub fn of(token: impl Into<String>, request: InferSubmission) -> Self {
        Self {
            token: token.into(),
            request: Some(request),
            chat: None,
            completion: None,
            embedding: None,
            traceparent: None,
        }
    }
}

impl fmt::Debug for GatewaySubmission {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token is left out, because it is a secret.
        formatter.debug_struct("GatewaySubmission").field("request", &self.request).finish_non_exhaustive()
    }
}

/// The whole answer to a `request` that was sent as a unary call. Jobs in OpenAI's format are answered in that format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Gateway.Answer")]
pub struct GatewayAnswer {
    /// Id of the job.
    pub correlation_id: CorrelationId,
    /// The model that answered.
    pub model_id: ModelName,
    /// Version of the model that answered.
    pub version: ModelVersion,
    /// The answer, or the first of several.
    #[serde(flatten)]
    pub choice: Choice,
    /// The other answers, if several were requested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further_choices: Vec<Choice>,
    /// Vectors, if they were requested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub embeddings: Vec<Embedding>,
    /// Tokens that are billed.
    pub usage: TokenUsage,
    /// Number of the attempt that answered, from 1.
    pub attempt: u32,
    /// How often another worker continued the answer.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub continued: u32,
    /// How the job was made cheaper, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded: Option<Box<Degraded>>,
}

/// One of the requested answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Choice {
    /// Text of the answer.
    pub text: String,
    /// The model's reasoning before the text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// Functions that the model calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// Log-probability of each token, if requested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// Why generation ended.
    pub finish_reason: FinishReason,
    /// The stop sequence that ended the answer. Not every server tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_sequence: Option<String>,
}

/// Requests the models that a token may use.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelsRequest {
    /// API token of the caller.
    pub token: String,
}

impl fmt::Debug for ModelsRequest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ModelsRequest").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    #[test]
    fn debug_output_keeps_the_token() {
        let text = br#"{"token":"tth_live_secret","request":{"modelId":"m","input":"hi"}}"#;
        let submission: GatewaySubmission = codec::decode(text).expect("well formed");
        assert_eq!(submission.request.as_ref().map(|request| request.model_id.as_str()), Some("m"));
        assert!(!format!("{submission:?}").contains("secret"));
        assert!(!format!("{:?}", ModelsRequest { token: "tth_live_secret".into() }).contains("secret"));
    }
}

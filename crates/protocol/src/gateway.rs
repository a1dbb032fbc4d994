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
use crate::infer::{Embedding, FinishReason, InferSubmission, TokenLogprob, ToolCall};
use crate::usage::TokenUsage;

/// Gateway: lists the models a token may use, as `GET /v1/models` does. [`ModelsRequest`] → OpenAI's list.
pub const MODELS: &str = "infer.models";

/// A job on its way from a client to a gateway. Exactly one of `request`, `chat`, `completion` and `embedding` is
/// given.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Gateway.Submission")]
pub struct GatewaySubmission {
    /// The API token, such as `tth_live_…`.
    pub token: String,
    /// The job in our own words, as `POST /infer` takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<InferSubmission>,
    /// The job as `POST /v1/chat/completions` takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<Map<String, Value>>,
    /// The job as `POST /v1/completions` takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion: Option<Map<String, Value>>,
    /// The job as `POST /v1/embeddings` takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<Map<String, Value>>,
    /// The W3C trace context that the job goes on with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

impl GatewaySubmission {
    /// Makes a submission of a job in our own words.
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
        // Never the token: it is a secret.
        formatter.debug_struct("GatewaySubmission").field("request", &self.request).finish_non_exhaustive()
    }
}

/// The whole answer to a `request` that was sent as a unary call. What comes in OpenAI's words is answered in them.
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
    /// The others, where several were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further_choices: Vec<Choice>,
    /// Vectors, where they were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub embeddings: Vec<Embedding>,
    /// Tokens that are billed.
    pub usage: TokenUsage,
    /// The try that answered, counted from 1.
    pub attempt: u32,
}

/// One of the answers that were asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Choice {
    /// What the model says.
    pub text: String,
    /// What it thought before.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// The functions it calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// One for each token, where they were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// Why generation ended.
    pub finish_reason: FinishReason,
}

/// Asks which models a token may use.
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

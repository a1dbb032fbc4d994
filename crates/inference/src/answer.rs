//! Parts of an answer other than its text: progress, log-probabilities and finish reasons.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Progress of a job that has no new output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// Prompt tokens that are evaluated or cached; 0 while the job is queued.
    pub tokens_read: u32,
    /// Tokens to evaluate before the answer begins; 0 if unknown.
    pub tokens_total: u32,
}

/// Log-probability of a token, computed by the model before the request's sampling settings apply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenLogprob {
    /// Id of the token in the model's vocabulary.
    pub token: u32,
    /// Bytes of the token, which may end within a character.
    pub bytes: Vec<u8>,
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// The most likely tokens at this position, the most likely first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TokenLogprob>,
}

/// A token of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ListedToken {
    /// Id of the token in the model's vocabulary.
    pub id: u32,
    /// Bytes of the token, which may end within a character. Empty if only the id is known.
    pub bytes: Vec<u8>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or generated a stop sequence.
    Stop,
    /// The token limit or the end of the context was reached.
    Length,
    /// The model ended its turn and called functions.
    ToolCalls,
}

impl FinishReason {
    /// Returns the value of `finish_reason` in OpenAI's API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

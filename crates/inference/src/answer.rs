//! What a model answers, beside its text.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How far a job is whose answer has nothing new yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// Tokens of the prompt that are evaluated or cached; 0 while the job waits its turn.
    pub tokens_read: u32,
    /// Tokens to evaluate before the answer begins; 0 where nobody knows.
    pub tokens_total: u32,
}

/// How likely a token was, by the model alone, before any setting of the request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenLogprob {
    /// Id of the token in the model's vocabulary.
    pub token: u32,
    /// Its bytes, which need not be whole characters.
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens in its place, the likeliest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TokenLogprob>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or a stop text came.
    Stop,
    /// The token limit or the end of the context was reached.
    Length,
    /// The model ended its turn and called functions.
    ToolCalls,
}

impl FinishReason {
    /// Returns the word OpenAI's clients know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

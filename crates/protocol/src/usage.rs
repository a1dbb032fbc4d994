//! What a job took.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Tokens a job took; what a tenant is billed for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenUsage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
    /// Prompt tokens that were at hand and not evaluated again.
    #[serde(default)]
    pub cached_tokens: u32,
}

impl TokenUsage {
    /// Returns the tokens of prompt and answer together.
    pub fn total_tokens(&self) -> u32 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }
}

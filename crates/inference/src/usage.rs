//! Token usage of a job.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Tokens that a job used. The tenant is billed for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenUsage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
    /// Prompt tokens that were in the prefix cache. They were not evaluated again.
    #[serde(default)]
    pub cached_tokens: u32,
    /// Reasoning tokens. `completionTokens` includes them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reasoning_tokens: u32,
}

impl TokenUsage {
    /// Returns the sum of prompt and answer tokens.
    pub fn total_tokens(&self) -> u32 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_zero(tokens: &u32) -> bool {
    *tokens == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thoughts_are_told_where_there_are_some_and_older_nodes_tell_none() {
        let usage = TokenUsage { prompt_tokens: 1, completion_tokens: 2, ..TokenUsage::default() };
        let old = r#"{"promptTokens":1,"completionTokens":2,"cachedTokens":0}"#;
        assert_eq!(serde_json::to_string(&usage).expect("written"), old);
        assert_eq!(serde_json::from_str::<TokenUsage>(old).expect("read"), usage);
        let thought = TokenUsage { reasoning_tokens: 2, ..usage };
        let json = serde_json::to_string(&thought).expect("written");
        assert!(json.ends_with(r#""reasoningTokens":2}"#), "{json}");
        assert_eq!(serde_json::from_str::<TokenUsage>(&json).expect("read"), thought);
    }
}

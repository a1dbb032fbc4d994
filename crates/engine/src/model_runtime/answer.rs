//! The output of a model: the events of a generation, and embedding vectors.

use inference::{FinishReason, Progress, TokenLogprob, TokenUsage, ToolCallDelta};
use serde::{Deserialize, Serialize};

/// What a generation tells, in this order: one `Started`, any number of `Piece`, one `Done`. `Progress` may come
/// anywhere before the `Done`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The prompt was accepted and its evaluation begins.
    Started {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Prompt tokens whose keys and values were at hand already.
        cached_tokens: u32,
    },
    /// The engine is at work although nothing else is ready to be told: at most 2 s pass without an event while the
    /// engine is well and the reader keeps up. Before `Started` the request waits for a slot.
    ///
    /// `tokens_read` never falls. A continued answer goes on once `tokens_total` are evaluated.
    Progress(Progress),
    /// More of the answer.
    Piece(Piece),
    /// The end of the answer.
    Done {
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: TokenUsage,
    },
}

impl Event {
    /// Returns whether no event follows.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Done { .. })
    }
}

/// More of an answer. The text is whole UTF-8 and may be empty while a character, a stop text or a call is incomplete.
///
/// A type of its own: the `Payload` of `protocol` also holds vectors, counts, and the index of one of several answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Piece {
    /// Text to append.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Text to append to what the model thinks before it answers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// More of its calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
    /// The tokens behind it, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<u32>,
    /// One for each token, where they were asked for. Those of a prompt that is repeated come before all others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
}

impl Piece {
    /// Returns whether it brings nothing.
    pub fn is_empty(&self) -> bool {
        let Self { text, reasoning, tool_calls, tokens, logprobs } = self;
        text.is_empty() && reasoning.is_empty() && tool_calls.is_empty() && tokens.is_empty() && logprobs.is_empty()
    }

    /// Appends a later piece.
    pub fn append(&mut self, later: Self) {
        let join = |text: &mut String, more: String| if text.is_empty() { *text = more } else { text.push_str(&more) };
        join(&mut self.text, later.text);
        join(&mut self.reasoning, later.reasoning);
        self.tool_calls.extend(later.tool_calls);
        self.tokens.extend(later.tokens);
        self.logprobs.extend(later.logprobs);
    }
}

/// Vectors of texts, in the order of the request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Embeddings {
    /// One for each text, of length 1 and all of the same dimension.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens of all texts.
    pub prompt_tokens: u32,
}

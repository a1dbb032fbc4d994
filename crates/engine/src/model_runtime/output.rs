//! The output of a model: the events of a generation, and embedding vectors.

use inference::{FinishReason, Progress, TokenLogprob, TokenUsage, ToolCallDelta};
use serde::{Deserialize, Serialize};

/// An event of a generation. The order is: one `Started`, any number of `Piece`, one `Done`. `Progress` may come
/// anywhere before `Done`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The prompt was accepted and prefill begins.
    Started {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Prompt tokens that were in the prefix cache.
        cached_tokens: u32,
    },
    /// A sign of life while there is no other event: at most 2 s pass between events if the engine is healthy and the
    /// reader keeps up. Before `Started`, the request is waiting for a slot.
    ///
    /// `tokens_read` never decreases. A continued answer resumes once `tokens_total` tokens are evaluated.
    Progress(Progress),
    /// A further piece of the answer.
    Piece(Piece),
    /// The end of the answer.
    Done {
        reason: FinishReason,
        /// The token counts of prompt and answer.
        usage: TokenUsage,
        /// Text and calls of tokens that were sent earlier, which the engine had held back. It has no tokens. It comes
        /// with the end, so that the tokens of the pieces before it determine their text.
        #[serde(default, skip_serializing_if = "Piece::is_empty")]
        rest: Piece,
    },
}

impl Event {
    /// Returns whether this is the last event.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Done { .. })
    }
}

/// A further piece of an answer. The text is valid UTF-8. It may be empty while a character, a stop sequence or a
/// call is incomplete.
///
/// This is not the `Payload` of `protocol`, which also holds vectors, counts, and the index of one of several
/// answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Piece {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Text to append to the reasoning.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// Further pieces of the tool calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
    /// The tokens of this piece, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<u32>,
    /// One entry per token, if requested. Those of an echoed prompt come before all others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// The stop sequence that ended the answer, in the `rest` of its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_sequence: Option<String>,
}

impl Piece {
    pub fn is_empty(&self) -> bool {
        let Self { text, reasoning, tool_calls, tokens, logprobs, stop_sequence } = self;
        text.is_empty()
            && reasoning.is_empty()
            && tool_calls.is_empty()
            && tokens.is_empty()
            && logprobs.is_empty()
            && stop_sequence.is_none()
    }

    /// Appends a later piece.
    pub fn append(&mut self, later: Self) {
        let join = |text: &mut String, more: String| if text.is_empty() { *text = more } else { text.push_str(&more) };
        join(&mut self.text, later.text);
        join(&mut self.reasoning, later.reasoning);
        self.tool_calls.extend(later.tool_calls);
        self.tokens.extend(later.tokens);
        self.logprobs.extend(later.logprobs);
        self.stop_sequence = later.stop_sequence.or(self.stop_sequence.take());
    }
}

/// Embedding vectors, in the order of the request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Embeddings {
    /// One vector per text, all of length 1 and of the same dimension.
    pub vectors: Vec<Vec<f32>>,
    /// The number of tokens in all texts.
    pub prompt_tokens: u32,
}

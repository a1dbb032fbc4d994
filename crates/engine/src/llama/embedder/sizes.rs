//! Chooses the size of the embedding context.

use crate::memory_plan::{BATCH_TOKENS, EMBED_LOGITS_BYTES_MAX};

/// The maximum number of texts that are evaluated together.
pub(super) const TEXTS_MAX: u32 = 32;
/// The minimum number of cells, so that the context is not recreated for each slightly longer text.
const CELLS_MIN: u32 = 512;

/// How a model attends to a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// Causally, so a text may be evaluated in chunks.
    Pieces,
    /// As a whole: each token attends to later ones too.
    Whole,
}

/// The size of a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Tokens per batch, all of which are outputs.
    pub(super) batch_tokens: u32,
    /// Tokens of all texts that are being evaluated.
    pub(super) cells: u32,
}

/// Returns sizes that hold a text of `longest` tokens, and other texts likely for a model with this context length.
///
/// llama.cpp plans a batch of as many tokens as fit, spread evenly over [`TEXTS_MAX`] sequences. For that it rounds
/// the tokens, but not the outputs, up to a multiple of the number of sequences. If every token is an output, the two
/// then differ and the process aborts. So the batch size is a multiple of the number of sequences here.
pub(super) fn sizes(reading: Reading, vocabulary: u32, longest: u32, context_length: u32) -> Sizes {
    let cells = longest.max(CELLS_MIN).next_power_of_two().min(context_length.max(longest)).max(TEXTS_MAX);
    let batch_tokens = match reading {
        Reading::Whole => cells.next_multiple_of(TEXTS_MAX),
        Reading::Pieces => {
            // llama.cpp computes and copies the logits of every token, although they are not used.
            let tokens = EMBED_LOGITS_BYTES_MAX / u64::from(vocabulary.max(1)).saturating_mul(8);
            let tokens = tokens.clamp(u64::from(TEXTS_MAX), u64::from(BATCH_TOKENS)) as u32;
            tokens - tokens % TEXTS_MAX
        }
    };
    Sizes { batch_tokens, cells: cells.max(batch_tokens) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The first assertion is llama.cpp's own, in `llama_context::graph_reserve`.
        #[test]
        fn any_model_and_text_have_sizes_that_llama_cpp_can_plan(
            is_whole: bool,
            vocabulary in 0_u32..3_000_000,
            context_length in 1_u32..2_000_000,
            share in 0.0_f64..=1.0,
        ) {
            let reading = if is_whole { Reading::Whole } else { Reading::Pieces };
            let longest = ((f64::from(context_length) * share) as u32).max(1);
            let Sizes { batch_tokens, cells } = sizes(reading, vocabulary, longest, context_length);
            prop_assert!(batch_tokens > 0 && batch_tokens.is_multiple_of(TEXTS_MAX));
            prop_assert!(cells >= batch_tokens, "the batch would be cut to the cells");
            prop_assert!(cells >= longest, "the text would not fit");
            // A context is never much larger than the model's, however short the texts.
            prop_assert!(cells <= context_length.max(BATCH_TOKENS).next_multiple_of(TEXTS_MAX));
            match reading {
                Reading::Whole => prop_assert!(batch_tokens >= longest),
                Reading::Pieces => {
                    let logits_bytes = u64::from(batch_tokens) * u64::from(vocabulary) * 8;
                    prop_assert!(batch_tokens == TEXTS_MAX || logits_bytes <= EMBED_LOGITS_BYTES_MAX);
                }
            }
        }
    }
}

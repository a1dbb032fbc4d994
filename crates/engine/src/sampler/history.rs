//! Counts how often the answer has each token of a sequence, as far as penalties need it.

use crate::model_runtime::Sampling;

/// How often the answer has each token of prompt and answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// In the order of tokens: there are few, and each draw walks them all. A token of the prompt alone counts 0.
    answered: Vec<(u32, u32)>,
}

impl History {
    /// Begins an answer to a prompt.
    pub fn new(prompt: &[u32]) -> Self {
        let mut answered: Vec<_> = prompt.iter().map(|token| (*token, 0)).collect();
        answered.sort_unstable();
        answered.dedup();
        Self { answered }
    }

    /// Returns whether draws by these settings depend on a history; any will do where they do not.
    pub fn is_needed(sampling: &Sampling) -> bool {
        (sampling.repetition_penalty - 1.0).abs() > 0.0
            || sampling.presence_penalty.abs() > 0.0
            || sampling.frequency_penalty.abs() > 0.0
    }

    /// Appends a token of the answer.
    pub fn push(&mut self, token: u32) {
        match self.answered.binary_search_by_key(&token, |(known, _)| *known) {
            Ok(index) => self.answered[index].1 = self.answered[index].1.saturating_add(1),
            Err(index) => self.answered.insert(index, (token, 1)),
        }
    }

    /// Returns each token with how often the answer has it.
    pub(super) fn tokens(&self) -> impl Iterator<Item = (u32, u32)> {
        self.answered.iter().copied()
    }
}

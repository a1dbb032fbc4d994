//! Counts how often the answer has each token of a sequence, as far as penalties need it.

use crate::model_runtime::Sampling;

/// How often each token of prompt and answer occurs in the answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// Ordered by token, since there are few and each draw walks them all. A token of the prompt alone has count 0.
    answered: Vec<(u32, u32)>,
}

impl History {
    /// Starts the history of an answer with its prompt.
    pub fn new(prompt: &[u32]) -> Self {
        let mut answered: Vec<_> = prompt.iter().map(|token| (*token, 0)).collect();
        answered.sort_unstable();
        answered.dedup();
        Self { answered }
    }

    /// Returns whether sampling with these settings depends on the history. If not, any history gives the same
    /// result.
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

    /// Returns each token with its number of occurrences in the answer.
    pub(super) fn tokens(&self) -> impl Iterator<Item = (u32, u32)> {
        self.answered.iter().copied()
    }
}

//! What the caller of a job has of its answers, so that another worker can continue them. Pure.

use std::collections::BTreeMap;

use protocol::infer::{Delivered, DeliveredAnswer, FinishReason, Input};

/// Records the chunks of a job that were sent to its caller, over all attempts.
///
/// The tokens of an answer determine its text, so only they are kept: four bytes for each.
#[derive(Debug, Default)]
pub struct Journal {
    /// Number of the next chunk.
    seq: u64,
    answers: BTreeMap<u32, Answer>,
    /// Whether the caller has something that no tokens determine.
    is_untold: bool,
    /// Whether the job has output other than answers, such as vectors.
    has_other_output: bool,
}

#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    finish_reason: Option<FinishReason>,
    /// Whether part of the echoed prompt was sent, and no token after it.
    is_in_echo: bool,
}

/// The part of a chunk that the journal records.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entry<'a> {
    pub index: u32,
    pub tokens: &'a [u32],
    /// Whether the chunk has text, reasoning, calls or log-probabilities.
    pub has_output: bool,
    pub finish_reason: Option<FinishReason>,
}

impl Journal {
    pub fn new(input: &Input) -> Self {
        Self { has_other_output: input.embed.is_some() || input.count_only, ..Self::default() }
    }

    /// Returns the number of the next chunk.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Returns a number that grows with each token, and with each answer that ends.
    pub fn progress(&self) -> u64 {
        self.answers.values().map(|answer| answer.tokens.len() as u64 + u64::from(answer.finish_reason.is_some())).sum()
    }

    /// Returns how many tokens of an answer were sent.
    pub fn tokens_of(&self, index: u32) -> usize {
        self.answers.get(&index).map_or(0, |answer| answer.tokens.len())
    }

    /// Records a chunk that was sent. `echoes` says whether the request asks for an echo of its prompt.
    pub fn record(&mut self, entry: Entry<'_>, echoes: bool) {
        self.seq += 1;
        let answer = self.answers.entry(entry.index).or_default();
        answer.tokens.extend_from_slice(entry.tokens);
        answer.finish_reason = entry.finish_reason.or(answer.finish_reason);
        // The end of an answer may bring text that waited for it.
        let is_untold = entry.has_output && entry.tokens.is_empty() && entry.finish_reason.is_none();
        answer.is_in_echo = is_untold && echoes && answer.tokens.is_empty();
        self.is_untold |= is_untold && !answer.is_in_echo;
    }

    /// Returns what another worker needs to continue the answers. Returns `None` if none can: servers that list no
    /// tokens wrote part of it, or an echoed prompt was cut.
    pub fn delivered(&self) -> Option<Delivered> {
        let is_cut = self.answers.values().any(|answer| answer.is_in_echo);
        if self.is_untold || is_cut || self.has_other_output {
            return None;
        }
        let answers = self.answers.iter().map(|(index, answer)| DeliveredAnswer {
            index: *index,
            tokens: answer.tokens.clone(),
            finish_reason: answer.finish_reason,
        });
        Some(Delivered { seq: self.seq, answers: answers.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(index: u32, tokens: &[u32]) -> Entry<'_> {
        Entry { index, tokens, has_output: true, finish_reason: None }
    }

    #[test]
    fn tokens_are_kept_by_answer_and_in_order() {
        let mut journal = Journal::new(&Input::default());
        let held_back = Entry { has_output: false, ..told(1, &[5]) };
        let ended = Entry { finish_reason: Some(FinishReason::Stop), ..told(1, &[]) };
        for entry in [told(0, &[1, 2]), held_back, told(0, &[3]), ended] {
            journal.record(entry, false);
        }
        let answer =
            |index, tokens: &[u32], finish_reason| DeliveredAnswer { index, tokens: tokens.to_vec(), finish_reason };
        let answers = vec![answer(0, &[1, 2, 3], None), answer(1, &[5], Some(FinishReason::Stop))];
        assert_eq!(journal.delivered(), Some(Delivered { seq: 4, answers }));
    }

    #[test]
    fn text_without_tokens_cannot_be_continued() {
        let mut journal = Journal::new(&Input::default());
        journal.record(told(0, &[1]), false);
        journal.record(told(0, &[]), false);
        assert_eq!((journal.delivered(), journal.seq()), (None, 2));
        let vectors = Input { embed: Some(vec![]), ..Input::default() };
        assert_eq!(Journal::new(&vectors).delivered(), None);
    }

    #[test]
    fn an_echoed_prompt_can_be_continued_once_it_is_whole() {
        let mut journal = Journal::new(&Input::default());
        journal.record(told(0, &[]), true);
        assert_eq!(journal.delivered(), None);
        journal.record(told(0, &[7]), true);
        assert_eq!(journal.delivered().map(|delivered| delivered.answers[0].tokens.clone()), Some(vec![7]));
    }
}

//! What the caller of a job has acknowledged, and so pays for if its answer breaks off. Pure.

use std::collections::VecDeque;

use protocol::usage::TokenUsage;

/// The most chunks that are remembered until they are acknowledged. A window of 256 KiB holds fewer; with more of them,
/// the newest are acknowledged together.
const CHUNKS_MAX: usize = 4096;

/// The chunks that were sent, and the usage that each completes.
#[derive(Debug, Default)]
pub(crate) struct Receipts {
    /// The bytes sent up to the end of each chunk, and the usage up to there.
    outstanding: VecDeque<(u64, TokenUsage)>,
    acknowledged: TokenUsage,
}

impl Receipts {
    /// Records that a chunk was sent: how many bytes were sent in all, and what is billed if the caller reads them.
    pub(crate) fn sent(&mut self, bytes: u64, usage: TokenUsage) {
        if self.outstanding.len() >= CHUNKS_MAX {
            self.outstanding.pop_back();
        }
        self.outstanding.push_back((bytes, usage));
    }

    /// Records how many bytes the caller has acknowledged in all. Returns the usage of the chunks that it has whole.
    pub(crate) fn acknowledge(&mut self, bytes: u64) -> TokenUsage {
        while let Some((_, usage)) = self.outstanding.pop_front_if(|(end, _)| *end <= bytes) {
            self.acknowledged = usage;
        }
        self.acknowledged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(completion_tokens: u32) -> TokenUsage {
        TokenUsage { prompt_tokens: 3, completion_tokens, ..TokenUsage::default() }
    }

    #[test]
    fn a_chunk_counts_once_it_is_acknowledged_whole() {
        let mut receipts = Receipts::default();
        for number in 1..=3 {
            receipts.sent(u64::from(number) * 10, usage(number));
        }
        let billed = [0, 9, 10, 29, 30, 99].map(|bytes| receipts.acknowledge(bytes));
        let expected = [TokenUsage::default(), TokenUsage::default(), usage(1), usage(2), usage(3), usage(3)];
        assert_eq!(billed, expected);
    }

    #[test]
    fn a_caller_that_grants_much_and_reads_nothing_takes_bounded_memory_and_is_billed_too_late() {
        let mut receipts = Receipts::default();
        let chunks = 3 * CHUNKS_MAX as u32;
        for number in 1..=chunks {
            receipts.sent(number.into(), usage(number));
        }
        assert_eq!(receipts.outstanding.len(), CHUNKS_MAX);
        assert_eq!(receipts.acknowledge(u64::from(chunks) - 1), usage(CHUNKS_MAX as u32 - 1));
        assert_eq!(receipts.acknowledge(chunks.into()), usage(chunks));
    }
}

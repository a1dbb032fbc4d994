//! The prompt prefixes that an engine likely still has in its prefix cache.
//!
//! Engines do not report what they keep and what they evict, but all of them keep the latest prompts and evict the
//! oldest. If the guess is wrong, the worker evaluates the whole prompt, as a worker without the prefix would.

use protocol::PrefixDigest;
use protocol::health::PREFIXES_MAX;

/// The latest prefixes without duplicates, latest first.
#[derive(Debug, Default)]
pub(crate) struct WarmPrefixes {
    latest: Vec<PrefixDigest>,
}

impl WarmPrefixes {
    /// Records the prefixes of a prompt that was just evaluated, the longest first.
    pub(crate) fn remember(&mut self, marks: impl Iterator<Item = PrefixDigest>) {
        let mut latest: Vec<PrefixDigest> = marks.take(PREFIXES_MAX).collect();
        let before = std::mem::take(&mut self.latest);
        let kept = before.into_iter().filter(|digest| !latest.contains(digest)).take(PREFIXES_MAX - latest.len());
        let kept: Vec<PrefixDigest> = kept.collect();
        latest.extend(kept);
        self.latest = latest;
    }

    /// Returns the remembered prefixes, latest first.
    pub(crate) fn list(&self) -> Vec<PrefixDigest> {
        self.latest.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(numbers: impl IntoIterator<Item = u64>) -> impl Iterator<Item = PrefixDigest> {
        numbers.into_iter().map(|number| PrefixDigest(number.to_be_bytes()))
    }

    #[test]
    fn the_latest_come_first_and_each_once() {
        let mut warm = WarmPrefixes::default();
        warm.remember(numbered([3, 2, 1]));
        warm.remember(numbered([5, 1]));
        assert_eq!(warm.list(), numbered([5, 1, 3, 2]).collect::<Vec<_>>());
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let mut warm = WarmPrefixes::default();
        for number in 0..1000 {
            warm.remember(numbered([number]));
        }
        let newest: Vec<_> = numbered((1000 - PREFIXES_MAX as u64..1000).rev()).collect();
        assert_eq!(warm.list(), newest);
    }
}

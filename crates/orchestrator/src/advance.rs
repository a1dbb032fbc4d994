//! Detects a worker that reports progress with a job and makes none. Pure.

use std::time::Duration;

use protocol::infer::Progress;
use tokio::time::Instant;

/// When an attempt last evaluated more of its prompt or delivered a part of its answer.
#[derive(Debug)]
pub(crate) struct Advance {
    /// The longest time without either; `None` for no limit.
    stall: Option<Duration>,
    at: Instant,
    /// The longest time without either so far.
    longest: Duration,
    /// Tokens of the prompt that were evaluated.
    tokens_read: u32,
}

impl Advance {
    pub(crate) fn begin(stall: Option<Duration>, now: Instant) -> Self {
        Self { stall, at: now, longest: Duration::ZERO, tokens_read: 0 }
    }

    /// Records that a part of the answer came.
    pub(crate) fn token(&mut self, now: Instant) {
        self.advanced(now);
    }

    /// Returns when there was the last of either, or when the attempt began.
    pub(crate) fn at(&self) -> Instant {
        self.at
    }

    /// Returns the longest time without either, until `now`.
    pub(crate) fn longest(&self, now: Instant) -> Duration {
        self.longest.max(now - self.at)
    }

    fn advanced(&mut self, now: Instant) {
        (self.longest, self.at) = (self.longest(now), now);
    }

    /// Records a report of progress. Returns whether there was no real progress for too long.
    pub(crate) fn has_stalled(&mut self, progress: Progress, now: Instant) -> bool {
        if progress.tokens_read > self.tokens_read {
            self.tokens_read = progress.tokens_read;
            self.advanced(now);
        }
        self.stall.is_some_and(|stall| now - self.at >= stall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(10);

    fn read(tokens_read: u32) -> Progress {
        Progress { tokens_read, tokens_total: 9 }
    }

    #[test]
    fn whoever_reads_on_may_take_for_ever_and_whoever_repeats_itself_may_not() {
        let begun = Instant::now();
        let mut advance = Advance::begin(Some(STALL), begun);
        for round in 1..100 {
            assert!(!advance.has_stalled(read(round), begun + STALL * round));
        }
        let last = begun + STALL * 99;
        assert!(!advance.has_stalled(read(99), last + STALL / 2));
        assert!(!advance.has_stalled(read(5), last + STALL / 2), "what it had read before");
        assert!(advance.has_stalled(read(99), last + STALL));
        advance.token(last + STALL);
        assert!(!advance.has_stalled(read(99), last + STALL * 3 / 2));
        assert!(advance.has_stalled(read(99), last + STALL * 2));
    }

    #[test]
    fn the_longest_time_without_an_advance_is_known() {
        let begun = Instant::now();
        let mut advance = Advance::begin(None, begun);
        assert!(!advance.has_stalled(read(1), begun + STALL));
        assert!(!advance.has_stalled(read(1), begun + STALL * 2), "it says the same again");
        assert_eq!((advance.at(), advance.longest(begun + STALL * 2)), (begun + STALL, STALL));
        advance.token(begun + STALL * 3);
        assert_eq!(advance.longest(begun + STALL * 4), STALL * 2);
    }

    #[test]
    fn without_a_limit_nothing_stalls() {
        let begun = Instant::now();
        assert!(!Advance::begin(None, begun).has_stalled(read(0), begun + STALL * 1000));
    }
}

//! How long a model's first token usually takes. Pure: times are arguments.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How many waits are remembered.
const WAITS_MAX: usize = 256;
/// How many must be known to speak of the usual one.
const WAITS_MIN: usize = 20;
/// The least time between two of them, so that together they span some minutes at any load: a model that becomes slow
/// does not make that the usual thing at once.
const EVERY: Duration = Duration::from_secs(2);

/// The last waits for a model's first token.
#[derive(Debug, Default)]
pub(crate) struct UsualWait {
    /// The last waits, oldest first.
    waits: VecDeque<Duration>,
    recorded_at: Option<Instant>,
}

impl UsualWait {
    /// Records a wait, unless another one was recorded just before.
    pub(crate) fn record(&mut self, wait: Duration, now: Instant) {
        if self.recorded_at.is_some_and(|recorded_at| now.duration_since(recorded_at) < EVERY) {
            return;
        }
        self.recorded_at = Some(now);
        if self.waits.len() == WAITS_MAX {
            self.waits.pop_front();
        }
        self.waits.push_back(wait);
    }

    /// Returns the median, or `None` if too few waits are known.
    pub(crate) fn median(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.waits.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().filter(|_| sorted.len() >= WAITS_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_median_of_few_waits_is_unknown_and_that_of_many_follows_slowly() {
        let (mut usual, mut now) = (UsualWait::default(), Instant::now());
        let mut record = |wait: Duration, times: usize| {
            for _ in 0..times {
                now += EVERY;
                usual.record(wait, now);
            }
            usual.median()
        };
        assert_eq!(record(SECOND, WAITS_MIN - 1), None);
        assert_eq!(record(SECOND, WAITS_MAX), Some(SECOND));
        assert_eq!(record(SECOND * 9, WAITS_MAX / 2 - 1), Some(SECOND));
        assert_eq!(record(SECOND * 9, 1), Some(SECOND * 9));
    }

    #[test]
    fn many_waits_at_once_count_as_one() {
        let (mut usual, now) = (UsualWait::default(), Instant::now());
        for _ in 0..10_000 {
            usual.record(SECOND, now);
        }
        assert_eq!((usual.waits.len(), usual.median()), (1, None));
    }
}

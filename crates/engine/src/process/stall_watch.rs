//! Decides when an engine that owes something has done nothing for too long.
//!
//! A pure function of what is seen and when; `EngineProcess` looks and acts.

use std::time::Duration;

use tokio::time::Instant;

/// Watches one count that grows while work is done.
#[derive(Debug, Default)]
pub(super) struct StallWatch {
    count: u64,
    since: Option<Instant>,
}

impl StallWatch {
    /// Returns whether work was owed, and the count the same, at every look for so long.
    pub(super) fn is_stalled(&mut self, owes: bool, count: u64, limit: Duration, now: Instant) -> bool {
        if !owes || count != self.count {
            self.since = None;
        }
        self.count = count;
        owes && now.duration_since(*self.since.get_or_insert(now)) >= limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn looks(looks: &[(bool, u64)]) -> Vec<bool> {
        let mut watch = StallWatch::default();
        let begin = Instant::now();
        let at = |number: usize| begin + SECOND * number as u32;
        looks
            .iter()
            .enumerate()
            .map(|(number, (owes, count))| watch.is_stalled(*owes, *count, SECOND * 2, at(number)))
            .collect()
    }

    #[test]
    fn nothing_done_for_the_whole_time_is_a_stall() {
        assert_eq!(looks(&[(true, 7), (true, 7), (true, 7), (true, 7)]), [false, false, true, true]);
    }

    #[test]
    fn a_step_or_a_moment_without_work_begins_the_time_anew() {
        assert_eq!(looks(&[(true, 0), (true, 0), (true, 1), (true, 1), (true, 1)]), [false, false, false, false, true]);
        assert_eq!(looks(&[(true, 0), (true, 0), (false, 0), (true, 0), (true, 0)]), [false; 5]);
    }

    #[test]
    fn whoever_owes_nothing_never_stalls() {
        assert_eq!(looks(&[(false, 0); 5]), [false; 5]);
    }
}

//! Decides when an engine with outstanding work has made no progress for too long.
//!
//! A pure function of observations made at a fixed interval; `EngineProcess` observes and acts. It counts
//! observations instead of measuring time, because a machine that was suspended, or too busy to observe, held up the
//! engine as well.

/// The number of consecutive observations without progress after which an engine counts as stalled.
pub(super) const LOOKS: u32 = 8;

/// Watches a counter that grows while work is done.
#[derive(Debug, Default)]
pub(super) struct StallWatch {
    count: u64,
    silent_looks: u32,
}

impl StallWatch {
    /// Records an observation. Returns whether work was outstanding and the counter unchanged for the last [`LOOKS`]
    /// observations.
    pub(super) fn is_stalled(&mut self, owes: bool, count: u64) -> bool {
        self.silent_looks = if owes && count == self.count { self.silent_looks + 1 } else { 0 };
        self.count = count;
        self.silent_looks >= LOOKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the observations at which an engine counts as stalled. Each entry of `shown` is repeated as often as its
    /// last number says.
    fn stalled(shown: &[(bool, u64, u32)]) -> Vec<usize> {
        let mut watch = StallWatch::default();
        let looks = shown.iter().flat_map(|&(owes, count, looks)| (0..looks).map(move |_| (owes, count)));
        let stalled: Vec<bool> = looks.map(|(owes, count)| watch.is_stalled(owes, count)).collect();
        (0..stalled.len()).filter(|look| stalled[*look]).collect()
    }

    #[test]
    fn nothing_done_for_the_whole_time_is_a_stall() {
        assert_eq!(stalled(&[(true, 7, LOOKS + 2)]), [8, 9]);
    }

    #[test]
    fn a_sign_of_life_or_a_moment_without_work_begins_the_time_anew() {
        assert_eq!(stalled(&[(true, 1, LOOKS), (true, 2, LOOKS), (true, 3, LOOKS)]), [0; 0]);
        assert_eq!(stalled(&[(true, 1, LOOKS), (false, 1, 1), (true, 1, LOOKS - 1)]), [0; 0]);
    }

    #[test]
    fn whoever_owes_nothing_never_stalls() {
        assert_eq!(stalled(&[(false, 0, LOOKS * 3)]), [0; 0]);
    }
}

//! Keeps a node from flooding the network: so many requests per slot of time.

use std::time::Duration;

/// How long a slot lasts.
pub(super) const SLOT: Duration = Duration::from_millis(750);

/// Counts the requests of the last four slots that have no answer.
#[derive(Debug)]
pub(super) struct Congestion {
    slots: [usize; 4],
    current: usize,
    total: usize,
    slot_max: usize,
}

impl Congestion {
    /// Allows `slot_max` requests in a slot, and twice that in all.
    pub(super) fn new(slot_max: usize) -> Self {
        Self { slots: [0; 4], current: 0, total: 0, slot_max }
    }

    /// Returns whether the next request has to wait.
    pub(super) fn is_full(&self) -> bool {
        self.total >= 2 * self.slot_max || self.slots[self.current] >= self.slot_max
    }

    /// Counts a datagram that goes out.
    pub(super) fn sent(&mut self) {
        self.slots[self.current] += 1;
        self.total += 1;
    }

    /// Counts a request that is settled.
    pub(super) fn settled(&mut self) {
        if self.slots[self.current] > 0 {
            self.slots[self.current] -= 1;
            self.total -= 1;
        }
    }

    /// Begins the next slot; what was sent four slots ago is forgotten.
    pub(super) fn next_slot(&mut self) {
        self.current = (self.current + 1) % 4;
        self.total -= std::mem::take(&mut self.slots[self.current]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unanswered_requests_fill_the_window_until_they_are_forgotten() {
        let mut congestion = Congestion::new(2);
        congestion.sent();
        congestion.sent();
        assert!(congestion.is_full());
        congestion.settled();
        assert!(!congestion.is_full());
        congestion.sent();
        congestion.next_slot();
        assert!(!congestion.is_full());
        congestion.sent();
        congestion.sent();
        assert!(congestion.is_full());
        for _ in 0..4 {
            congestion.next_slot();
        }
        assert!(!congestion.is_full());
        assert_eq!(congestion.total, 0);
    }
}

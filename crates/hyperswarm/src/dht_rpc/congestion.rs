//! Limits the requests per time slot, so that a node does not flood the network.

use std::time::Duration;

/// The length of a slot.
pub(super) const SLOT: Duration = Duration::from_millis(750);

/// Counts the requests of the last four slots that have no response.
#[derive(Debug)]
pub(super) struct Congestion {
    slots: [usize; 4],
    current: usize,
    total: usize,
    slot_max: usize,
}

impl Congestion {
    /// Allows `slot_max` requests per slot, and twice as many in total.
    pub(super) fn new(slot_max: usize) -> Self {
        Self { slots: [0; 4], current: 0, total: 0, slot_max }
    }

    /// Returns whether the next request must wait.
    pub(super) fn is_full(&self) -> bool {
        self.total >= 2 * self.slot_max || self.slots[self.current] >= self.slot_max
    }

    /// Counts a sent datagram.
    pub(super) fn sent(&mut self) {
        self.slots[self.current] += 1;
        self.total += 1;
    }

    /// Counts a request that got its response or was given up.
    pub(super) fn settled(&mut self) {
        if self.slots[self.current] > 0 {
            self.slots[self.current] -= 1;
            self.total -= 1;
        }
    }

    /// Starts the next slot, and forgets what was sent four slots ago.
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

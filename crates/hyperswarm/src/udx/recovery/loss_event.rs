//! The loss event under way: the losses of one flight, for which the congestion window is reduced once.

/// The loss event, and how many of its losses were spurious.
#[derive(Debug, Default)]
pub(crate) struct LossEvent {
    /// Losses before this sequence number belong to the event, which ends when everything before it is acknowledged
    /// (RecoveryPoint in RFC 6675).
    recovery_point: Option<u64>,
    after_rto: bool,
    lost: u32,
    /// The number of packets that were declared lost but had arrived.
    spurious: u32,
}

impl LossEvent {
    pub(crate) fn in_recovery(&self) -> bool {
        self.recovery_point.is_some()
    }

    /// Returns whether the event began without a retransmission timeout, so that the window must not grow.
    pub(crate) fn in_fast_recovery(&self) -> bool {
        self.in_recovery() && !self.after_rto
    }

    pub(crate) fn after_rto(&self) -> bool {
        self.after_rto
    }

    pub(crate) fn enter_recovery(&mut self, recovery_point: u64) {
        self.recovery_point = Some(recovery_point);
    }

    pub(crate) fn on_rto(&mut self, recovery_point: u64) {
        self.recovery_point = Some(recovery_point);
        self.after_rto = true;
    }

    pub(crate) fn count_lost(&mut self) {
        self.lost += 1;
    }

    /// Counts a spurious loss. Returns whether no other loss is left, so that the whole event was spurious.
    pub(crate) fn count_spurious(&mut self) -> bool {
        self.spurious += 1;
        self.in_recovery() && self.spurious == self.lost
    }

    /// Returns whether everything that was sent before the event began is acknowledged.
    pub(crate) fn is_over(&self, first_unacked: u64) -> bool {
        self.recovery_point.is_some_and(|recovery_point| first_unacked >= recovery_point)
    }

    /// Ends the event. Returns whether none of its losses was spurious.
    pub(crate) fn leave_recovery(&mut self) -> bool {
        std::mem::take(self).spurious == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_whose_every_loss_was_spurious_is_noticed() {
        let mut event = LossEvent::default();
        event.count_lost();
        event.count_lost();
        event.enter_recovery(9);
        assert!(!event.count_spurious() && event.count_spurious());
        assert!(!event.leave_recovery());
        assert!(!event.in_recovery() && event.leave_recovery());
    }

    #[test]
    fn an_event_is_over_once_its_flight_is_acknowledged() {
        let mut event = LossEvent::default();
        event.enter_recovery(9);
        assert!(event.in_fast_recovery() && !event.is_over(8) && event.is_over(9));
        event.on_rto(12);
        assert!(event.in_recovery() && !event.in_fast_recovery() && !event.is_over(9));
    }
}

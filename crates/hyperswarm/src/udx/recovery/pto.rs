//! The tail loss probe (RFC 8985, section 7): a packet whose acknowledgement reveals that the end of a flight was lost.

use std::time::Duration;

use tokio::time::Instant;

/// The probe timeout (PTO) and the probe that it causes.
#[derive(Debug)]
pub(crate) struct Pto {
    at: Option<Instant>,
    /// Whether the timeout expired, and the next transmission is the probe.
    probe_due: bool,
    /// Whether a round trip was measured since the last probe. Without one there is no other probe (section 7.3).
    probe_allowed: bool,
}

impl Default for Pto {
    fn default() -> Self {
        Self { at: None, probe_due: false, probe_allowed: true }
    }
}

impl Pto {
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.at
    }

    /// Starts the timeout again, unless the retransmission timer expires first.
    ///
    /// It runs during recovery too, as in QUIC: the packets sent last may be lost as well, and nothing else would
    /// reveal it soon.
    pub(crate) fn arm(&mut self, now: Instant, pto: Duration, rto_deadline: Option<Instant>) {
        let at = self.probe_allowed.then(|| now + pto);
        self.at = at.filter(|at| rto_deadline.is_none_or(|rto| *at < rto));
    }

    pub(crate) fn cancel(&mut self) {
        self.at = None;
    }

    /// Forgets a due probe as well.
    pub(crate) fn clear(&mut self) {
        self.at = None;
        self.probe_due = false;
    }

    pub(crate) fn on_round_trip(&mut self) {
        self.probe_allowed = true;
    }

    /// Returns whether the timeout has expired, which makes a probe due.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        if self.at.is_none_or(|at| at > now) {
            return false;
        }
        *self = Self { at: None, probe_due: true, probe_allowed: false };
        true
    }

    /// Returns whether the next transmission is the probe, once.
    pub(crate) fn take_probe(&mut self) -> bool {
        std::mem::take(&mut self.probe_due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTO: Duration = Duration::from_millis(200);

    #[test]
    fn one_probe_is_sent_for_each_measured_round_trip() {
        let now = Instant::now();
        let mut pto = Pto::default();
        pto.arm(now, PTO, None);
        assert!(!pto.expire(now + PTO / 2) && pto.expire(now + PTO));
        assert!(pto.take_probe() && !pto.take_probe());
        pto.arm(now, PTO, None);
        assert_eq!(pto.deadline(), None, "nothing was measured since");
        pto.on_round_trip();
        pto.arm(now, PTO, None);
        assert_eq!(pto.deadline(), Some(now + PTO));
    }

    #[test]
    fn a_retransmission_timer_that_expires_first_makes_a_probe_needless() {
        let now = Instant::now();
        let mut pto = Pto::default();
        pto.arm(now, PTO, Some(now + PTO));
        assert_eq!(pto.deadline(), None);
        pto.arm(now, PTO, Some(now + PTO * 2));
        assert_eq!(pto.deadline(), Some(now + PTO));
    }
}

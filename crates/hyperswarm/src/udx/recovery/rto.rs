//! The retransmission timer (RFC 6298, section 5).

use std::time::Duration;

use tokio::time::Instant;

/// The upper limit of the doubled timeout, so that a peer that returns is noticed soon.
const RTO_BACKED_OFF_MAX: Duration = Duration::from_secs(4);
/// The timeout is doubled this often at most.
const BACKOFF_MAX: u32 = 8;

/// The timer for the first unacknowledged packet. `rto` is the timeout that the measured round trips ask for.
#[derive(Debug, Default)]
pub(crate) struct Rto {
    at: Option<Instant>,
    /// How often the timer expired since the last progress.
    backoff: u32,
}

impl Rto {
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.at
    }

    /// Starts the timer if it does not run (5.1).
    pub(crate) fn start(&mut self, now: Instant, rto: Duration) {
        let backed_off = self.backed_off(rto);
        self.at.get_or_insert(now + backed_off);
    }

    /// Stops the timer (5.2).
    pub(crate) fn stop(&mut self) {
        self.at = None;
    }

    /// Starts the timer anew (5.3).
    pub(crate) fn restart(&mut self, now: Instant, rto: Duration) {
        self.at = Some(now + self.backed_off(rto));
    }

    /// Ends the backoff, because the first unacknowledged packet was acknowledged.
    pub(crate) fn on_progress(&mut self) {
        self.backoff = 0;
    }

    /// Doubles the timeout (5.5) and starts the timer anew (5.6).
    pub(crate) fn back_off(&mut self, now: Instant, rto: Duration) {
        self.backoff += 1;
        self.restart(now, rto);
    }

    fn backed_off(&self, rto: Duration) -> Duration {
        (rto * 2u32.pow(self.backoff.min(BACKOFF_MAX))).min(RTO_BACKED_OFF_MAX.max(rto * 2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeout_doubles_up_to_its_limit_until_there_is_progress() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut rto = Rto::default();
        rto.start(now, second);
        rto.start(now + second / 2, second);
        assert_eq!(rto.deadline(), Some(now + second), "a running timer is left alone");
        let mut waits = Vec::new();
        for _ in 0..3 {
            rto.back_off(now, second);
            waits.push(rto.deadline().unwrap() - now);
        }
        assert_eq!(waits, [second * 2, second * 4, second * 4]);
        rto.on_progress();
        rto.restart(now, second);
        assert_eq!(rto.deadline(), Some(now + second));
        // A path with long round trips gets twice its timeout all the same.
        rto.back_off(now, second * 9);
        assert_eq!(rto.deadline(), Some(now + second * 18));
    }
}

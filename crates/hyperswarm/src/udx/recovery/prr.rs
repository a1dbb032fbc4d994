//! Proportional rate reduction (RFC 6937).
//!
//! During recovery, more bytes may be in flight than the reduced congestion window allows. PRR then lets the sender
//! send in proportion to what is delivered, rather than stop.

use crate::udx::congestion::CUBIC_BETA;

/// ssthresh / RecoverFS: the window after a loss as a share of what was in flight at the loss. CUBIC reduces the window
/// by this factor, and the window was full. A fraction rather than [`CUBIC_BETA`], because integer arithmetic has no
/// rounding error: 10 packets delivered allow exactly 7.
const SSTHRESH_PER_RECOVER_FS: (u64, u64) = (7, 10);
const _: () = assert!(SSTHRESH_PER_RECOVER_FS.0 as f64 / SSTHRESH_PER_RECOVER_FS.1 as f64 == CUBIC_BETA);

/// The number of full packets that may be sent at the start of recovery, so that the first lost packet is resent at
/// once.
const FAST_RETRANSMIT: u64 = 2;

/// The state of one recovery.
#[derive(Debug, Default)]
pub(crate) struct Prr {
    /// Bytes that were delivered during recovery.
    prr_delivered: u64,
    /// Bytes sent during recovery and charged to PRR. Any excess over `sndcnt` was allowed by the congestion window.
    prr_out: u64,
    /// Bytes that may be sent before anything is delivered.
    fast_retransmit: u64,
}

impl Prr {
    pub(crate) fn enter_recovery(&mut self, packet_bytes: u64) {
        *self = Self { fast_retransmit: FAST_RETRANSMIT * packet_bytes, ..Self::default() };
    }

    /// Ends recovery. Only the congestion window counts from here on.
    pub(crate) fn leave_recovery(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn on_delivered(&mut self, bytes: u64) {
        self.prr_delivered += bytes;
    }

    pub(crate) fn on_sent(&mut self, bytes: u64) {
        self.prr_out += bytes.min(self.sndcnt());
    }

    /// Returns how many bytes may be sent now: `fast_retransmit + prr_delivered * ssthresh / RecoverFS - prr_out`,
    /// rounded down. The RFC rounds up and does not add `fast_retransmit`.
    ///
    /// The RFC's slow start part (PRR-SSRB) is not needed: while fewer bytes than ssthresh are in flight, the
    /// congestion window allows sending.
    pub(crate) fn sndcnt(&self) -> u64 {
        let (ssthresh, recover_fs) = SSTHRESH_PER_RECOVER_FS;
        self.fast_retransmit + self.prr_delivered * ssthresh / recover_fs - self.prr_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_packets_delivered_allow_seven_besides_the_fast_retransmit() {
        let mut prr = Prr::default();
        assert_eq!(prr.sndcnt(), 0);
        prr.enter_recovery(1_000);
        assert_eq!(prr.sndcnt(), 2_000);
        prr.on_sent(2_000);
        (0..10).for_each(|_| prr.on_delivered(1_000));
        assert_eq!(prr.sndcnt(), 7_000);
        prr.leave_recovery();
        assert_eq!(prr.sndcnt(), 0);
    }

    #[test]
    fn what_the_congestion_window_lets_through_is_not_owed_later() {
        let mut prr = Prr::default();
        prr.enter_recovery(1_000);
        prr.on_sent(9_000);
        assert_eq!(prr.sndcnt(), 0);
        prr.on_delivered(1_000);
        assert_eq!(prr.sndcnt(), 700);
    }
}

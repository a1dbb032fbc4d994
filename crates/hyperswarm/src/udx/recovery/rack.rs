//! RACK loss detection (RFC 8985, section 6): a packet is lost if one that was sent well after it has arrived.

use std::time::Duration;

use tokio::time::Instant;

use super::sent_packets::{SentPacket, SentPackets, State};
use crate::udx::rtt::RoundTrip;

/// The number of packets acknowledged out of order that make the reordering window zero, as long as no reordering was
/// seen (DupThresh; section 6.2, step 4).
const DUP_THRESH: usize = 3;
/// The reordering window is this part of the minimum round trip at first (section 6.2, step 4).
const REO_WND_PER_MIN_RTT: u32 = 4;
/// The reordering window exceeds the largest delay of a reordered packet by this part of it.
const REO_WND_MARGIN: u32 = 4;
/// A recovery without spurious losses makes the observed reordering smaller by this part, because routes change. The
/// RFC keeps the window for sixteen recoveries (RACK.reo_wnd_persist).
const REORDERING_DECAY: u32 = 8;
/// A spurious resend widens the window to this many times its size (RACK.reo_wnd_mult grows likewise, by one).
const REO_WND_GROWTH: u32 = 2;
/// An acknowledgement of a resent packet after less than this share of the minimum round trip belongs to an earlier
/// copy (section 6.2, step 2, which compares with the whole of it).
const SPURIOUS_RTT: (u32, u32) = (3, 4);

/// The most recently sent packet that was delivered (RACK.segment).
#[derive(Clone, Copy, Debug)]
struct Segment {
    xmit_ts: Instant,
    sequence: u64,
    rtt: Duration,
}

/// The state of loss detection.
#[derive(Debug)]
pub(crate) struct Rack {
    segment: Option<Segment>,
    /// One past the highest sequence number that was acknowledged (RACK.fack).
    fack: u64,
    /// The largest delay of a reordered packet; `None` until reordering was seen (RACK.reordering_seen).
    reordering: Option<Duration>,
    /// Where the last list of acknowledged ranges ended, if it was full. What the peer has beyond it is unknown.
    horizon: Option<u64>,
    /// When the next packet will count as lost (the RACK reordering timer).
    reo_timer: Option<Instant>,
}

impl Rack {
    pub(crate) fn new(first: u64) -> Self {
        Self { segment: None, fack: first, reordering: None, horizon: None, reo_timer: None }
    }

    pub(crate) fn reo_timer(&self) -> Option<Instant> {
        self.reo_timer
    }

    pub(crate) fn cancel_reo_timer(&mut self) {
        self.reo_timer = None;
    }

    /// Sets or clears the number beyond which nothing counts as lost.
    pub(crate) fn set_horizon(&mut self, horizon: Option<u64>) {
        self.horizon = horizon;
    }

    /// Clears the horizon once everything before it is acknowledged.
    pub(crate) fn advance(&mut self, first_unacked: u64) {
        self.horizon = self.horizon.filter(|horizon| *horizon > first_unacked);
    }

    /// Returns whether an acknowledgement shows that a packet was declared lost although it had arrived.
    pub(crate) fn is_spurious(packet: &SentPacket, rtt: Duration, min_rtt: Duration) -> bool {
        let (share, whole) = SPURIOUS_RTT;
        packet.state == State::Lost || (packet.retransmitted && rtt < min_rtt * share / whole)
    }

    /// Handles the acknowledgement of a packet (steps 2 and 3 of section 6.2). `packet` is as it was before.
    pub(crate) fn on_acked(&mut self, sequence: u64, packet: &SentPacket, rtt: Duration, spurious: bool) {
        if !packet.retransmitted && sequence + 1 < self.fack {
            self.saw_reordering(self.delay(rtt));
        }
        self.fack = self.fack.max(sequence + 1);
        // The acknowledgement of an earlier copy says nothing about when the last one was sent.
        if packet.retransmitted && spurious {
            return;
        }
        let (xmit_ts, newest) = (packet.xmit_ts, self.segment);
        if newest.is_none_or(|newest| (xmit_ts, sequence) > (newest.xmit_ts, newest.sequence)) {
            self.segment = Some(Segment { xmit_ts, sequence, rtt });
        }
    }

    /// Widens the reordering window after a spurious loss.
    pub(crate) fn on_spurious(&mut self, packet: &SentPacket, rtt: Duration, reo_wnd: Duration) {
        self.saw_reordering(if packet.retransmitted { reo_wnd * REO_WND_GROWTH } else { self.delay(rtt) });
    }

    /// Narrows the reordering window after a recovery without spurious losses.
    pub(crate) fn decay_reordering(&mut self) {
        self.reordering = self.reordering.map(|late| late * (REORDERING_DECAY - 1) / REORDERING_DECAY);
    }

    fn saw_reordering(&mut self, late: Duration) {
        self.reordering = Some(self.reordering.unwrap_or_default().max(late));
    }

    /// Returns by how much a packet with this round trip was later than the newest one.
    fn delay(&self, rtt: Duration) -> Duration {
        rtt.saturating_sub(self.segment.map_or(rtt, |newest| newest.rtt))
    }

    /// Returns the reordering window (RACK.reo_wnd, step 4): how much later than a packet sent after it a packet may
    /// arrive before it counts as lost.
    pub(crate) fn reo_wnd(&self, round_trip: &RoundTrip, segs_sacked: usize, in_recovery: bool) -> Duration {
        let Some(srtt) = round_trip.smoothed() else { return Duration::ZERO };
        let least = round_trip.minimum().unwrap_or_default() / REO_WND_PER_MIN_RTT;
        match self.reordering {
            Some(late) => least.max(late + late / REO_WND_MARGIN).min(srtt),
            None if in_recovery || segs_sacked >= DUP_THRESH => Duration::ZERO,
            None => least.min(srtt),
        }
    }

    /// Returns the packets that are lost by now, and sets the reordering timer for those that will be (step 5,
    /// `RACK_detect_loss`).
    pub(crate) fn detect_loss(&mut self, now: Instant, reo_wnd: Duration, sent: &SentPackets) -> Vec<u64> {
        self.reo_timer = None;
        let Some(newest) = self.segment else { return Vec::new() };
        let mut lost = Vec::new();
        for (sequence, packet) in sent.in_flight() {
            if self.horizon.is_some_and(|horizon| sequence >= horizon) {
                break;
            }
            if (packet.xmit_ts, sequence) > (newest.xmit_ts, newest.sequence) {
                if sent.is_in_order() {
                    break;
                }
                continue;
            }
            let lost_at = packet.xmit_ts + newest.rtt + reo_wnd;
            if lost_at <= now {
                lost.push(sequence);
            } else {
                self.reo_timer = Some(self.reo_timer.map_or(lost_at, |at| at.min(lost_at)));
            }
        }
        lost
    }

    /// Returns the packets that are lost when the retransmission timer expires: the first one, and those that were sent
    /// long enough ago (section 6.3, `RACK_mark_losses_on_RTO`).
    pub(crate) fn losses_on_rto(&self, now: Instant, reo_wnd: Duration, sent: &SentPackets) -> Vec<u64> {
        let rtt = self.segment.map_or(Duration::ZERO, |newest| newest.rtt);
        let is_lost =
            |sequence, packet: &SentPacket| sequence == sent.first_unacked() || packet.xmit_ts + rtt + reo_wnd <= now;
        sent.in_flight().filter(|(sequence, packet)| is_lost(*sequence, packet)).map(|(sequence, _)| sequence).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(100);

    /// Four packets, ten milliseconds apart.
    fn four(start: Instant) -> SentPackets {
        let mut sent = SentPackets::new(0);
        for at in 0..4 {
            sent.push(SentPacket::new(start + Duration::from_millis(at * 10), at * 80, 80, 1, 0));
        }
        sent
    }

    fn acknowledge(rack: &mut Rack, sent: &mut SentPackets, sequence: u64, rtt: Duration) {
        let packet = sent.acknowledge(sequence).expect("it is new");
        rack.on_acked(sequence, &packet, rtt, false);
    }

    #[test]
    fn packets_sent_before_one_that_arrived_are_lost_after_the_reordering_window() {
        let start = Instant::now();
        let (mut rack, mut sent) = (Rack::new(0), four(start));
        acknowledge(&mut rack, &mut sent, 2, RTT);
        let reo_wnd = Duration::from_millis(25);
        let now = start + Duration::from_millis(120);
        assert!(rack.detect_loss(now, reo_wnd, &sent).is_empty());
        assert_eq!(rack.reo_timer(), Some(start + RTT + reo_wnd), "the first packet is the next to be lost");
        assert_eq!(rack.detect_loss(now, Duration::ZERO, &sent), [0, 1], "the last one was sent later");
        assert_eq!(rack.reo_timer(), None);
    }

    #[test]
    fn nothing_beyond_a_full_list_of_ranges_is_lost() {
        let start = Instant::now();
        let (mut rack, mut sent) = (Rack::new(0), four(start));
        acknowledge(&mut rack, &mut sent, 3, RTT);
        rack.set_horizon(Some(1));
        assert_eq!(rack.detect_loss(start + RTT * 2, Duration::ZERO, &sent), [0]);
        rack.advance(1);
        assert_eq!(rack.detect_loss(start + RTT * 2, Duration::ZERO, &sent), [0, 1, 2]);
    }

    #[test]
    fn the_window_follows_the_reordering_that_was_seen() {
        let start = Instant::now();
        let (mut rack, mut sent) = (Rack::new(0), four(start));
        let mut round_trip = RoundTrip::default();
        assert_eq!(rack.reo_wnd(&round_trip, 0, false), Duration::ZERO, "nothing was measured");
        round_trip.sample(RTT, start);
        assert_eq!(rack.reo_wnd(&round_trip, DUP_THRESH - 1, false), RTT / 4);
        assert_eq!(rack.reo_wnd(&round_trip, DUP_THRESH, false), Duration::ZERO);
        assert_eq!(rack.reo_wnd(&round_trip, 0, true), Duration::ZERO);
        acknowledge(&mut rack, &mut sent, 2, RTT);
        acknowledge(&mut rack, &mut sent, 0, RTT + Duration::from_millis(40));
        assert_eq!(rack.reo_wnd(&round_trip, DUP_THRESH, true), Duration::from_millis(50));
        rack.decay_reordering();
        assert_eq!(rack.reo_wnd(&round_trip, 0, false), Duration::from_micros(43_750));
    }

    #[test]
    fn a_timeout_loses_the_first_packet_and_the_old_ones() {
        let start = Instant::now();
        let (rack, sent) = (Rack::new(0), four(start));
        assert_eq!(rack.losses_on_rto(start, RTT, &sent), [0], "whatever its age");
        assert_eq!(rack.losses_on_rto(start + Duration::from_millis(20), Duration::ZERO, &sent), [0, 1, 2]);
    }
}

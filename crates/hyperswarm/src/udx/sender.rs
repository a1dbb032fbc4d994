//! The sending half of a stream: what is sent when, within the windows of the peer and of congestion control.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::congestion::Cubic;
use super::mtu::MtuSearch;
use super::packet::{DATA, END, HEADER_BYTES, Header, LIBUDX_RANGES_MAX, RANGES_MAX, unwrap_sequence};
use super::recovery::loss_event::LossEvent;
use super::recovery::prr::Prr;
use super::recovery::pto::Pto;
use super::recovery::rack::Rack;
use super::recovery::rto::Rto;
use super::recovery::sent_packets::{SentPacket, SentPackets, State};
use super::rtt::RoundTrip;
use super::send_queue::SendQueue;

/// The maximum number of unacknowledged sequence numbers. libudx accepts four times as many.
const SPAN_MAX: usize = 16_384;
/// The number of timeouts of one packet after which the connection times out.
const TIMEOUTS_MAX: u8 = 6;
/// The peer's receive window before the first packet from it. libudx assumes the same.
const PEER_WINDOW_FIRST: u32 = 4 * 1024 * 1024;

/// The other side stopped acknowledging.
#[derive(Debug)]
pub(crate) struct TimedOut;

/// The sending half of a stream.
pub(crate) struct Sender {
    queue: SendQueue,
    sent: SentPackets,
    last_sent_at: Option<Instant>,

    peer_window: u32,
    /// Sequence number and ack of the packet that last advertised the window.
    window_told_by: (u64, u64),
    congestion: Cubic,
    /// Whether the congestion window, and not the user, ended the last transmission.
    window_limited: bool,
    mtu: MtuSearch,

    round_trip: RoundTrip,
    rack: Rack,
    loss_event: LossEvent,
    prr: Prr,
    pto: Pto,
    rto: Rto,

    ending: bool,
    end_sent: bool,
    pub(crate) resends: u64,
    pub(crate) timeouts: u64,
}

impl Sender {
    pub(crate) fn new(first: u64, peer_first: u64) -> Self {
        let mtu = MtuSearch::new();
        Self {
            queue: SendQueue::default(),
            sent: SentPackets::new(first),
            last_sent_at: None,
            peer_window: PEER_WINDOW_FIRST,
            window_told_by: (peer_first, first),
            congestion: Cubic::new(packet_bytes(&mtu)),
            window_limited: false,
            mtu,
            round_trip: RoundTrip::default(),
            rack: Rack::new(first),
            loss_event: LossEvent::default(),
            prr: Prr::default(),
            pto: Pto::default(),
            rto: Rto::default(),
            ending: false,
            end_sent: false,
            resends: 0,
            timeouts: 0,
        }
    }

    /// Returns the sequence number of the next new packet.
    pub(crate) fn next(&self) -> u64 {
        self.sent.next()
    }

    pub(crate) fn first_unacked(&self) -> u64 {
        self.sent.first_unacked()
    }

    pub(crate) fn write(&mut self, bytes: Bytes) {
        self.queue.push(bytes);
    }

    pub(crate) fn end(&mut self) {
        self.ending = true;
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending
    }

    /// Returns whether the other side has acknowledged everything, including the end.
    pub(crate) fn is_ended(&self) -> bool {
        self.end_sent && self.sent.is_empty()
    }

    /// Returns how often the end timed out, if nothing else is unacknowledged.
    pub(crate) fn end_timeouts(&self) -> u8 {
        match self.sent.first() {
            Some(end) if self.end_sent && self.sent.len() == 1 && end.length == 0 => end.timeouts,
            _ => 0,
        }
    }

    /// Returns how many written bytes were never sent.
    pub(crate) fn unsent(&self) -> usize {
        self.queue.unsent()
    }

    /// Returns how many written bytes the other side has not acknowledged, in whole chunks.
    pub(crate) fn unacknowledged(&self) -> usize {
        self.queue.held()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.sent.is_empty()
    }

    /// Returns whether only the other side's window prevents sending.
    pub(crate) fn is_stalled(&self) -> bool {
        self.sent.is_empty() && self.queue.unsent() > 0 && self.peer_window == 0
    }

    pub(crate) fn round_trip(&self) -> &RoundTrip {
        &self.round_trip
    }

    pub(crate) fn window_bytes(&self) -> u64 {
        self.congestion.window_bytes()
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.sent.bytes_in_flight()
    }

    pub(crate) fn mtu(&self) -> usize {
        self.mtu.mtu()
    }

    /// Returns when `on_deadline` must be called next.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        [self.rto.deadline(), self.rack.reo_timer(), self.pto.deadline()].into_iter().flatten().min()
    }

    /// Drops everything unsent and unacknowledged. Sequence numbers continue, so that a last packet counts as new.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.sent.clear();
        self.rto.stop();
        self.rack.cancel_reo_timer();
        self.pto.clear();
    }

    /// Appends the next packet that may be sent to `out`, or returns `false`. `header` has the fields of the receiving
    /// half.
    pub(crate) fn transmit(&mut self, now: Instant, header: Header, out: &mut Vec<u8>) -> bool {
        let is_probe = self.pto.take_probe();
        if self.resend_lost(now, header, is_probe, out) {
            return true;
        }
        self.transmit_new(now, header, is_probe, out) || (is_probe && self.resend_last(now, header, out))
    }

    /// Returns whether the congestion window or PRR allows a packet, and counts it.
    fn may_send(&mut self, size: u64) -> bool {
        let in_flight = self.sent.bytes_in_flight();
        let fits = in_flight == 0 || in_flight + size <= self.congestion.window_bytes();
        self.window_limited = !fits;
        if !fits && self.prr.sndcnt() < size {
            return false;
        }
        self.prr.on_sent(size);
        true
    }

    /// Resends the next lost packet. The windows do not delay a tail loss probe.
    fn resend_lost(&mut self, now: Instant, header: Header, is_probe: bool, out: &mut Vec<u8>) -> bool {
        let Some((sequence, size)) = self.sent.next_lost() else { return false };
        // The receiver's window is ignored, because it may have shrunk while this packet was in flight.
        if !is_probe && !self.may_send(size) {
            return false;
        }
        self.resend(now, sequence, header, out);
        true
    }

    fn resend(&mut self, now: Instant, sequence: u64, header: Header, out: &mut Vec<u8>) {
        let packet = self.sent.retransmit(now, sequence);
        // A lost MTU probe was counted when it was declared lost.
        if packet.state == State::InFlight && packet.is_mtu_probe() {
            self.mtu.on_probe_lost();
        }
        self.resends += 1;
        Header { kind: packet.kind, sequence: sequence as u32, ..header }.encode(0, out);
        self.queue.send_again(packet.offset, usize::from(packet.length), out);
        self.last_sent_at = Some(now);
        self.rto.start(now, self.round_trip.timeout());
    }

    /// Sends new data or the end. The congestion window does not delay a tail loss probe.
    fn transmit_new(&mut self, now: Instant, header: Header, is_probe: bool, out: &mut Vec<u8>) -> bool {
        let unsent = self.queue.unsent();
        let ends = self.ending && !self.end_sent;
        if (unsent == 0 && !ends) || self.sent.len() >= SPAN_MAX {
            self.window_limited = false;
            return false;
        }
        if self.sent.is_empty() {
            self.restart_after_idle(now);
        }
        let length = unsent.min(self.mtu.payload_max());
        let size = (HEADER_BYTES + length) as u64;
        let (window, in_flight) = (u64::from(self.peer_window), self.sent.bytes_in_flight());
        if length > 0 && (window == 0 || (in_flight > 0 && in_flight + size > window)) {
            self.window_limited = false;
            return false;
        }
        if !is_probe && !self.may_send(size) {
            return false;
        }
        let padding = if length == self.mtu.payload_max() && !is_probe { self.mtu.padding() } else { None };
        let sequence = self.next();
        let ends = ends && length == unsent;
        let kind = if length > 0 { DATA } else { 0 } | if ends { END } else { 0 };
        self.end_sent |= ends;
        let offset = self.queue.next_offset();
        Header { kind, sequence: sequence as u32, ..header }.encode(padding.unwrap_or(0), out);
        if let Some(padding) = padding {
            out.resize(out.len() + usize::from(padding), 0);
            self.mtu.on_probe_sent();
        }
        self.queue.send(length, out);
        self.sent.push(SentPacket::new(now, offset, length, kind, padding.unwrap_or(0)));
        self.last_sent_at = Some(now);
        self.rto.start(now, self.round_trip.timeout());
        if !is_probe {
            self.arm_pto(now);
        }
        true
    }

    /// Resends the last packet in flight as the tail loss probe.
    fn resend_last(&mut self, now: Instant, header: Header, out: &mut Vec<u8>) -> bool {
        let Some(sequence) = self.sent.in_flight().next_back().map(|(sequence, _)| sequence) else { return false };
        self.resend(now, sequence, header, out);
        true
    }

    fn restart_after_idle(&mut self, now: Instant) {
        let timeout = self.round_trip.timeout();
        if let Some(idle) = self.last_sent_at.map(|at| now - at).filter(|idle| *idle > timeout) {
            self.congestion.on_idle((idle.as_nanos() / timeout.as_nanos()) as u32);
        }
    }

    fn arm_pto(&mut self, now: Instant) {
        self.pto.arm(now, self.round_trip.probe_timeout(), self.rto.deadline());
    }

    /// Applies the window that a packet advertises, unless a newer packet advertised one.
    pub(crate) fn on_window(&mut self, sequence: u64, ack: u64, window_bytes: u32) {
        if ack >= self.first_unacked() && (sequence, ack) >= self.window_told_by {
            self.window_told_by = (sequence, ack);
            self.peer_window = window_bytes;
        }
    }

    /// Handles an acknowledgement of everything before `ack`, and of `ranges` beyond it.
    pub(crate) fn on_ack(&mut self, now: Instant, ack: u64, ranges: impl Iterator<Item = (u32, u32)>) {
        let next = self.next();
        if self.sent.is_empty() || ack > next {
            return;
        }
        let mut delivery = Delivery::default();
        for sequence in self.first_unacked()..ack {
            if !self.on_packet_acked(sequence, now, &mut delivery) {
                self.sent.uncount_sacked();
            }
        }
        let advanced = ack > self.first_unacked();
        if advanced {
            self.advance(ack);
        }
        // Ranges that are not in ascending order are dropped, so that a packet costs no more than the length of the
        // flight.
        let first_unacked = self.first_unacked();
        let mut from = first_unacked;
        let mut count = 0;
        for (start, end) in ranges {
            count += 1;
            let start = unwrap_sequence(start, first_unacked);
            let end = unwrap_sequence(end, first_unacked);
            if start < from || end <= start || end > next {
                continue;
            }
            for sequence in start..end {
                if self.on_packet_acked(sequence, now, &mut delivery) {
                    self.sent.count_sacked();
                }
            }
            from = end;
        }
        if count > 0 {
            self.rack.set_horizon((count == LIBUDX_RANGES_MAX || count >= RANGES_MAX).then_some(from));
        }
        self.rack.advance(first_unacked);
        if let Some(round_trip) = delivery.round_trip {
            self.round_trip.sample(round_trip, now);
            self.pto.on_round_trip();
        }
        if delivery.bytes > 0 {
            self.on_delivery(now, delivery, advanced);
        }
    }

    fn on_delivery(&mut self, now: Instant, Delivery { bytes, round_trip }: Delivery, advanced: bool) {
        if self.loss_event.is_over(self.first_unacked()) {
            self.leave_recovery();
        }
        if advanced {
            self.rto.on_progress();
        }
        if self.sent.is_empty() {
            self.rto.stop();
            self.pto.cancel();
            self.rack.cancel_reo_timer();
        } else {
            self.rto.restart(now, self.round_trip.timeout());
        }
        if self.loss_event.in_fast_recovery() {
            self.prr.on_delivered(bytes);
        } else if self.window_limited {
            self.congestion.on_acked(now, bytes, round_trip.or(self.round_trip.smoothed()).unwrap_or_default());
        }
        self.detect_losses(now);
        if advanced && !self.sent.is_empty() {
            self.arm_pto(now);
        }
    }

    /// Returns whether the packet was not acknowledged before.
    fn on_packet_acked(&mut self, sequence: u64, now: Instant, delivery: &mut Delivery) -> bool {
        let Some(packet) = self.sent.acknowledge(sequence) else { return false };
        delivery.bytes += packet.size();
        let before = self.mtu.payload_max();
        self.mtu.on_acked(packet.padding);
        if self.mtu.payload_max() != before {
            self.congestion.on_packet_bytes(packet_bytes(&self.mtu));
        }
        let rtt = now - packet.xmit_ts;
        let spurious = Rack::is_spurious(&packet, rtt, self.round_trip.minimum().unwrap_or_default());
        if spurious {
            self.on_spurious_loss(&packet, rtt);
        }
        if !packet.retransmitted {
            delivery.round_trip = Some(delivery.round_trip.map_or(rtt, |other| other.min(rtt)));
        }
        self.rack.on_acked(sequence, &packet, rtt, spurious);
        true
    }

    fn on_spurious_loss(&mut self, packet: &SentPacket, rtt: Duration) {
        self.rack.on_spurious(packet, rtt, self.reo_wnd());
        if self.loss_event.count_spurious() {
            self.congestion.on_spurious_loss();
            self.leave_recovery();
        }
    }

    fn leave_recovery(&mut self) {
        if self.loss_event.leave_recovery() {
            self.rack.decay_reordering();
        }
        self.prr.leave_recovery();
    }

    fn advance(&mut self, ack: u64) {
        self.sent.advance(ack);
        self.queue.release(self.sent.first().map_or(self.queue.next_offset(), |packet| packet.offset));
    }

    fn reo_wnd(&self) -> Duration {
        self.rack.reo_wnd(&self.round_trip, self.sent.segs_sacked(), self.loss_event.in_recovery())
    }

    fn detect_losses(&mut self, now: Instant) {
        let mut congested = false;
        for sequence in self.rack.detect_loss(now, self.reo_wnd(), &self.sent) {
            congested |= self.mark_lost(sequence);
        }
        if congested && !self.loss_event.in_recovery() {
            self.loss_event.enter_recovery(self.next());
            self.congestion.on_loss();
            self.prr.enter_recovery(packet_bytes(&self.mtu));
        }
    }

    /// Marks a packet as lost. Returns whether the loss signals congestion; the loss of an MTU probe does not.
    fn mark_lost(&mut self, sequence: u64) -> bool {
        let was_mtu_probe = self.sent.mark_lost(sequence).is_mtu_probe();
        if was_mtu_probe {
            self.mtu.on_probe_lost();
        } else {
            self.loss_event.count_lost();
        }
        !was_mtu_probe
    }

    /// Handles the deadlines that have passed.
    pub(crate) fn on_deadline(&mut self, now: Instant) -> Result<(), TimedOut> {
        if self.rack.reo_timer().is_some_and(|at| at <= now) {
            self.detect_losses(now);
        }
        if self.pto.expire(now) {
            self.rto.restart(now, self.round_trip.timeout());
        }
        if self.rto.deadline().is_some_and(|at| at <= now) {
            self.on_timeout(now)?;
        }
        Ok(())
    }

    fn on_timeout(&mut self, now: Instant) -> Result<(), TimedOut> {
        let Some(first) = self.sent.first_mut() else {
            self.rto.stop();
            return Ok(());
        };
        if first.timeouts >= TIMEOUTS_MAX {
            return Err(TimedOut);
        }
        first.timeouts += 1;
        self.timeouts += 1;
        for sequence in self.rack.losses_on_rto(now, self.reo_wnd(), &self.sent) {
            self.mark_lost(sequence);
        }
        self.sent.sort_lost();
        if !self.loss_event.after_rto() {
            self.congestion.on_timeout();
        }
        self.loss_event.on_rto(self.next());
        self.prr.leave_recovery();
        self.pto.cancel();
        self.rack.cancel_reo_timer();
        self.rto.back_off(now, self.round_trip.timeout());
        Ok(())
    }
}

/// Returns the size of a full packet as the congestion window counts it.
fn packet_bytes(mtu: &MtuSearch) -> u64 {
    (HEADER_BYTES + mtu.payload_max()) as u64
}

/// What one acknowledgement delivered.
#[derive(Default)]
struct Delivery {
    bytes: u64,
    round_trip: Option<Duration>,
}

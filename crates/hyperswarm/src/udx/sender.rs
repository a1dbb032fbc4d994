//! The sending half of a stream: which packets are in flight, which are lost, and when to send (RACK-TLP, RFC 8985).

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::congestion::Cubic;
use super::mtu::MtuSearch;
use super::packet::{DATA, END, HEADER_BYTES, Header, LIBUDX_RANGES_MAX, OVERHEAD_BYTES, RANGES_MAX, unwrap_sequence};
use super::rtt::RoundTrip;
use super::send_queue::SendQueue;

/// The maximum number of unacknowledged sequence numbers. libudx accepts four times as many.
const SPAN_MAX: usize = 16_384;
/// The number of timeouts of one packet after which the connection times out.
const TIMEOUTS_MAX: u8 = 6;
/// The upper limit of the doubled timeout, so that a peer that returns is noticed soon.
const BACKED_OFF_MAX: Duration = Duration::from_secs(4);
/// The peer's receive window before the first packet from it. libudx assumes the same.
const PEER_WINDOW_FIRST: u32 = 4 * 1024 * 1024;
/// The number of acknowledged packets beyond a gap that make it a loss, as long as no reordering was seen (the
/// duplicate acknowledgement threshold).
const REORDERING_MAX: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    InFlight,
    Lost,
    Acked,
}

#[derive(Debug)]
struct Sent {
    offset: u64,
    sent_at: Instant,
    length: u16,
    kind: u8,
    padding: u8,
    state: State,
    resent: bool,
    timeouts: u8,
}

impl Sent {
    fn size(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.length)
    }
}

/// The other side stopped acknowledging.
#[derive(Debug)]
pub(crate) struct TimedOut;

/// The most recently sent packet that was delivered. Packets sent well before it that are still missing are lost
/// (RACK).
#[derive(Clone, Copy, Debug)]
struct Newest {
    sent_at: Instant,
    sequence: u64,
    round_trip: Duration,
}

/// The sending half of a stream.
pub(crate) struct Sender {
    queue: SendQueue,
    /// The packets `[first_unacked, first_unacked + packets.len())`.
    packets: VecDeque<Sent>,
    first_unacked: u64,
    lost: VecDeque<u64>,
    in_flight: u64,
    /// The number of packets acknowledged out of order.
    sacked: usize,
    resent_in_flight: usize,
    last_sent_at: Option<Instant>,

    peer_window: u32,
    /// Sequence number and ack of the packet that last advertised the window.
    window_told_by: (u64, u64),

    round_trip: RoundTrip,
    congestion: Cubic,
    /// Whether the congestion window, and not the user, ended the last transmission.
    window_limited: bool,
    mtu: MtuSearch,

    newest: Option<Newest>,
    /// One past the highest sequence number that was acknowledged.
    highest_acked: u64,
    /// The largest delay of a reordered packet; `None` until reordering was seen.
    reordering: Option<Duration>,
    /// Where the list of acknowledged ranges was full. What the other side has beyond this number is unknown.
    horizon: Option<u64>,
    /// Losses before this sequence number belong to the same loss event.
    recovery_until: Option<u64>,
    after_timeout: bool,
    /// PRR credit: bytes that may be sent during recovery although the window is full, because others were delivered
    /// (RFC 6937).
    credit: u64,
    declared_lost: u32,
    falsely_lost: u32,

    backoff: u32,
    timeout_at: Option<Instant>,
    reorder_at: Option<Instant>,
    probe_at: Option<Instant>,
    probe_due: bool,
    /// Whether a round trip was measured since the last probe.
    probe_allowed: bool,

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
            packets: VecDeque::new(),
            first_unacked: first,
            lost: VecDeque::new(),
            in_flight: 0,
            sacked: 0,
            resent_in_flight: 0,
            last_sent_at: None,
            peer_window: PEER_WINDOW_FIRST,
            window_told_by: (peer_first, first),
            round_trip: RoundTrip::default(),
            congestion: Cubic::new((mtu.mtu() - OVERHEAD_BYTES + HEADER_BYTES) as u64),
            window_limited: false,
            mtu,
            newest: None,
            highest_acked: first,
            reordering: None,
            horizon: None,
            recovery_until: None,
            after_timeout: false,
            credit: 0,
            declared_lost: 0,
            falsely_lost: 0,
            backoff: 0,
            timeout_at: None,
            reorder_at: None,
            probe_at: None,
            probe_due: false,
            probe_allowed: true,
            ending: false,
            end_sent: false,
            resends: 0,
            timeouts: 0,
        }
    }

    /// Returns the sequence number of the next new packet.
    pub(crate) fn next(&self) -> u64 {
        self.first_unacked + self.packets.len() as u64
    }

    pub(crate) fn first_unacked(&self) -> u64 {
        self.first_unacked
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
        self.end_sent && self.packets.is_empty()
    }

    /// Returns how often the end timed out, if nothing else is unacknowledged.
    pub(crate) fn end_timeouts(&self) -> u8 {
        match self.packets.front() {
            Some(end) if self.end_sent && self.packets.len() == 1 && end.length == 0 => end.timeouts,
            _ => 0,
        }
    }

    /// Returns how many written bytes were never sent.
    pub(crate) fn unsent(&self) -> usize {
        self.queue.unsent()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.packets.is_empty()
    }

    /// Returns whether only the other side's window prevents sending.
    pub(crate) fn is_stalled(&self) -> bool {
        self.packets.is_empty() && self.queue.unsent() > 0 && self.peer_window == 0
    }

    pub(crate) fn round_trip(&self) -> &RoundTrip {
        &self.round_trip
    }

    pub(crate) fn window_bytes(&self) -> u64 {
        self.congestion.window_bytes()
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    pub(crate) fn mtu(&self) -> usize {
        self.mtu.mtu()
    }

    /// Returns when `on_deadline` must be called next.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        [self.timeout_at, self.reorder_at, self.probe_at].into_iter().flatten().min()
    }

    /// Drops everything unsent and unacknowledged. Sequence numbers continue, so that a last packet counts as new.
    pub(crate) fn clear(&mut self) {
        self.first_unacked = self.next();
        self.queue.clear();
        self.packets = VecDeque::new();
        self.lost = VecDeque::new();
        self.in_flight = 0;
        self.sacked = 0;
        self.timeout_at = None;
        self.reorder_at = None;
        self.probe_at = None;
        self.probe_due = false;
    }

    /// Appends the next packet that may be sent to `out`, or returns `false`. `header` has the fields of the receiving
    /// half.
    pub(crate) fn transmit(&mut self, now: Instant, header: Header, out: &mut Vec<u8>) -> bool {
        let probing = std::mem::take(&mut self.probe_due);
        if self.resend_lost(now, header, probing, out) {
            return true;
        }
        self.transmit_new(now, header, probing, out) || (probing && self.resend_last(now, header, out))
    }

    /// Returns whether the congestion window or the PRR credit allows a packet, and spends the credit.
    fn may_send(&mut self, size: u64) -> bool {
        let room = self.in_flight == 0 || self.in_flight + size <= self.congestion.window_bytes();
        self.window_limited = !room;
        if !room && self.credit < size {
            return false;
        }
        self.credit = self.credit.saturating_sub(size);
        true
    }

    fn resend_lost(&mut self, now: Instant, header: Header, probing: bool, out: &mut Vec<u8>) -> bool {
        while let Some(&sequence) = self.lost.front() {
            let packet = sequence.checked_sub(self.first_unacked).and_then(|at| self.packets.get(at as usize));
            let Some(size) = packet.filter(|packet| packet.state == State::Lost).map(Sent::size) else {
                self.lost.pop_front();
                continue;
            };
            // The receiver's window is ignored, because it may have shrunk while this packet was in flight.
            if !probing && !self.may_send(size) {
                return false;
            }
            self.lost.pop_front();
            self.resend(now, sequence, header, out);
            return true;
        }
        false
    }

    fn resend(&mut self, now: Instant, sequence: u64, header: Header, out: &mut Vec<u8>) {
        let packet = &mut self.packets[(sequence - self.first_unacked) as usize];
        if packet.state == State::Lost {
            self.in_flight += packet.size();
        } else if packet.resent {
            self.resent_in_flight -= 1;
        } else if packet.padding > 0 {
            self.mtu.on_probe_lost();
        }
        // The resent packet has no padding.
        packet.padding = 0;
        packet.state = State::InFlight;
        packet.resent = true;
        packet.sent_at = now;
        self.resent_in_flight += 1;
        self.resends += 1;
        Header { kind: packet.kind, sequence: sequence as u32, ..header }.encode(0, out);
        self.queue.send_again(packet.offset, usize::from(packet.length), out);
        self.last_sent_at = Some(now);
        self.timeout_at.get_or_insert(now + self.timeout());
    }

    fn transmit_new(&mut self, now: Instant, header: Header, probing: bool, out: &mut Vec<u8>) -> bool {
        let unsent = self.queue.unsent();
        let ends = self.ending && !self.end_sent;
        if (unsent == 0 && !ends) || self.packets.len() >= SPAN_MAX {
            self.window_limited = false;
            return false;
        }
        if self.packets.is_empty() {
            self.restart_after_idle(now);
        }
        let length = unsent.min(self.mtu.payload_max());
        let size = (HEADER_BYTES + length) as u64;
        let window = u64::from(self.peer_window);
        if length > 0 && (window == 0 || (self.in_flight > 0 && self.in_flight + size > window)) {
            self.window_limited = false;
            return false;
        }
        if !probing && !self.may_send(size) {
            return false;
        }
        let padding = if length == self.mtu.payload_max() && !probing { self.mtu.padding() } else { None };
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
        self.packets.push_back(Sent {
            offset,
            sent_at: now,
            length: length as u16,
            kind,
            padding: padding.unwrap_or(0),
            state: State::InFlight,
            resent: false,
            timeouts: 0,
        });
        self.in_flight += size;
        self.last_sent_at = Some(now);
        self.timeout_at.get_or_insert(now + self.timeout());
        if !probing {
            self.arm_probe(now);
        }
        true
    }

    /// Resends the last packet in flight. Its acknowledgement reveals what else is missing (tail loss probe).
    fn resend_last(&mut self, now: Instant, header: Header, out: &mut Vec<u8>) -> bool {
        let Some(at) = self.packets.iter().rposition(|packet| packet.state == State::InFlight) else { return false };
        self.resend(now, self.first_unacked + at as u64, header, out);
        true
    }

    fn restart_after_idle(&mut self, now: Instant) {
        let timeout = self.round_trip.timeout();
        if let Some(idle) = self.last_sent_at.map(|at| now - at).filter(|idle| *idle > timeout) {
            self.congestion.on_idle((idle.as_nanos() / timeout.as_nanos()) as u32);
        }
    }

    fn timeout(&self) -> Duration {
        let timeout = self.round_trip.timeout();
        (timeout * 2u32.pow(self.backoff.min(8))).min(BACKED_OFF_MAX.max(timeout * 2))
    }

    fn arm_probe(&mut self, now: Instant) {
        // Also during recovery, as in QUIC: the packets sent last may be lost as well, and nothing else would reveal it
        // soon.
        self.probe_at = (self.probe_allowed && !self.packets.is_empty())
            .then(|| now + self.round_trip.probe_timeout())
            .filter(|at| self.timeout_at.is_none_or(|timeout| *at < timeout));
    }

    /// Applies the window that a packet advertises, unless a newer packet advertised one.
    pub(crate) fn on_window(&mut self, sequence: u64, ack: u64, window_bytes: u32) {
        if ack >= self.first_unacked && (sequence, ack) >= self.window_told_by {
            self.window_told_by = (sequence, ack);
            self.peer_window = window_bytes;
        }
    }

    /// Handles an acknowledgement of everything before `ack`, and of `ranges` beyond it.
    pub(crate) fn on_ack(&mut self, now: Instant, ack: u64, ranges: impl Iterator<Item = (u32, u32)>) {
        let next = self.next();
        if self.packets.is_empty() || ack > next {
            return;
        }
        let mut delivery = Delivery::default();
        for sequence in self.first_unacked..ack {
            if !self.on_packet_acked(sequence, now, &mut delivery) {
                self.sacked -= 1;
            }
        }
        let advanced = ack > self.first_unacked;
        if advanced {
            self.advance(ack);
        }
        // Ranges that are not in ascending order are dropped, so that a packet costs no more than the length of the
        // flight.
        let mut from = self.first_unacked;
        let mut count = 0;
        for (start, end) in ranges {
            count += 1;
            let start = unwrap_sequence(start, self.first_unacked);
            let end = unwrap_sequence(end, self.first_unacked);
            if start < from || end <= start || end > next {
                continue;
            }
            for sequence in start..end {
                if self.on_packet_acked(sequence, now, &mut delivery) {
                    self.sacked += 1;
                }
            }
            from = end;
        }
        if count > 0 {
            self.horizon = (count == LIBUDX_RANGES_MAX || count >= RANGES_MAX).then_some(from);
        }
        self.horizon = self.horizon.filter(|horizon| *horizon > self.first_unacked);
        if let Some(round_trip) = delivery.round_trip {
            self.round_trip.sample(round_trip, now);
            self.probe_allowed = true;
        }
        if delivery.bytes > 0 {
            self.on_delivery(now, delivery, advanced);
        }
    }

    fn on_delivery(&mut self, now: Instant, Delivery { bytes, round_trip }: Delivery, advanced: bool) {
        if self.recovery_until.is_some_and(|until| self.first_unacked >= until) {
            self.leave_recovery();
        }
        if advanced {
            self.backoff = 0;
        }
        if self.packets.is_empty() {
            self.timeout_at = None;
            self.probe_at = None;
            self.reorder_at = None;
        } else {
            self.timeout_at = Some(now + self.timeout());
        }
        let growing = self.recovery_until.is_none() || self.after_timeout;
        if !growing {
            self.credit += bytes * 7 / 10;
        } else if self.window_limited {
            self.congestion.on_acked(now, bytes, round_trip.or(self.round_trip.smoothed()).unwrap_or_default());
        }
        self.detect_losses(now);
        if advanced {
            self.arm_probe(now);
        }
    }

    /// Returns whether the packet was not acknowledged before.
    fn on_packet_acked(&mut self, sequence: u64, now: Instant, delivery: &mut Delivery) -> bool {
        let packet = &mut self.packets[(sequence - self.first_unacked) as usize];
        let before = std::mem::replace(&mut packet.state, State::Acked);
        if before == State::Acked {
            return false;
        }
        let (resent, sent_at, size, padding) = (packet.resent, packet.sent_at, packet.size(), packet.padding);
        let round_trip = now - sent_at;
        if before == State::InFlight {
            self.in_flight -= size;
            self.resent_in_flight -= usize::from(resent);
        }
        delivery.bytes += size;
        let mtu = self.mtu.payload_max();
        self.mtu.on_acked(padding);
        if self.mtu.payload_max() != mtu {
            self.congestion.on_packet_bytes((HEADER_BYTES + self.mtu.payload_max()) as u64);
        }
        let fastest = self.round_trip.minimum().unwrap_or_default();
        // An acknowledgement well below the minimum round trip belongs to the first copy of the packet.
        let false_alarm = before == State::Lost || (resent && round_trip < fastest * 3 / 4);
        if false_alarm {
            self.on_false_alarm(round_trip, resent);
        }
        if !resent {
            delivery.round_trip = Some(delivery.round_trip.map_or(round_trip, |other| other.min(round_trip)));
            if sequence + 1 < self.highest_acked {
                let late = round_trip.saturating_sub(self.newest.map_or(round_trip, |newest| newest.round_trip));
                self.reordering = Some(self.reordering.unwrap_or_default().max(late));
            }
        }
        self.highest_acked = self.highest_acked.max(sequence + 1);
        if !resent || !false_alarm {
            let newer = self.newest.is_none_or(|newest| (sent_at, sequence) > (newest.sent_at, newest.sequence));
            if newer {
                self.newest = Some(Newest { sent_at, sequence, round_trip });
            }
        }
        true
    }

    fn on_false_alarm(&mut self, round_trip: Duration, resent: bool) {
        self.falsely_lost += 1;
        let known = self.reordering.unwrap_or_default();
        let newest = self.newest.map_or(round_trip, |newest| newest.round_trip);
        let late = if resent { self.reorder_window() * 2 } else { round_trip.saturating_sub(newest) };
        self.reordering = Some(known.max(late));
        if self.recovery_until.is_some() && self.falsely_lost == self.declared_lost {
            self.congestion.on_spurious_loss();
            self.leave_recovery();
        }
    }

    fn leave_recovery(&mut self) {
        if self.falsely_lost == 0 {
            // The observed reordering decays slowly, because routes change.
            self.reordering = self.reordering.map(|late| late * 7 / 8);
        }
        self.recovery_until = None;
        self.credit = 0;
        self.after_timeout = false;
        self.declared_lost = 0;
        self.falsely_lost = 0;
    }

    fn advance(&mut self, ack: u64) {
        while self.first_unacked < ack {
            self.packets.pop_front();
            self.first_unacked += 1;
        }
        let released = self.packets.front().map_or(self.queue.next_offset(), |packet| packet.offset);
        self.queue.release(released);
        if self.packets.is_empty() && self.packets.capacity() > 256 {
            self.packets.shrink_to(16);
        }
    }

    /// Returns the reordering window: how much later than a packet sent after it a packet may arrive before it counts
    /// as lost.
    fn reorder_window(&self) -> Duration {
        let Some(smoothed) = self.round_trip.smoothed() else { return Duration::ZERO };
        let quarter = self.round_trip.minimum().unwrap_or_default() / 4;
        match self.reordering {
            Some(late) => quarter.max(late + late / 4).min(smoothed),
            None if self.recovery_until.is_some() || self.sacked >= REORDERING_MAX => Duration::ZERO,
            None => quarter.min(smoothed),
        }
    }

    fn detect_losses(&mut self, now: Instant) {
        self.reorder_at = None;
        let Some(newest) = self.newest else { return };
        let patience = newest.round_trip + self.reorder_window();
        let in_order = self.resent_in_flight == 0;
        let mut congested = false;
        for at in 0..self.packets.len() {
            let packet = &self.packets[at];
            if packet.state != State::InFlight {
                continue;
            }
            let sequence = self.first_unacked + at as u64;
            if self.horizon.is_some_and(|horizon| sequence >= horizon) {
                break;
            }
            if (packet.sent_at, sequence) > (newest.sent_at, newest.sequence) {
                if in_order {
                    break;
                }
                continue;
            }
            let lost_at = packet.sent_at + patience;
            if lost_at <= now {
                congested |= self.mark_lost_at(at);
            } else {
                self.reorder_at = Some(self.reorder_at.map_or(lost_at, |at| at.min(lost_at)));
            }
        }
        if congested && self.recovery_until.is_none() {
            self.recovery_until = Some(self.next());
            self.congestion.on_loss();
            // The first lost packet is resent at once, whatever the window.
            self.credit = 2 * (HEADER_BYTES + self.mtu.payload_max()) as u64;
        }
    }

    /// Marks a packet as lost. Returns whether the loss signals congestion; the loss of an MTU probe does not.
    fn mark_lost_at(&mut self, at: usize) -> bool {
        let packet = &mut self.packets[at];
        packet.state = State::Lost;
        self.in_flight -= packet.size();
        self.resent_in_flight -= usize::from(packet.resent);
        self.lost.push_back(self.first_unacked + at as u64);
        let was_probe = packet.padding > 0;
        if was_probe {
            self.mtu.on_probe_lost();
        } else {
            self.declared_lost += 1;
        }
        !was_probe
    }

    /// Handles the deadlines that have passed.
    pub(crate) fn on_deadline(&mut self, now: Instant) -> Result<(), TimedOut> {
        if self.reorder_at.is_some_and(|at| at <= now) {
            self.detect_losses(now);
        }
        if self.probe_at.is_some_and(|at| at <= now) {
            self.probe_at = None;
            self.probe_due = true;
            self.probe_allowed = false;
            self.timeout_at = Some(now + self.timeout());
        }
        if self.timeout_at.is_some_and(|at| at <= now) {
            self.on_timeout(now)?;
        }
        Ok(())
    }

    fn on_timeout(&mut self, now: Instant) -> Result<(), TimedOut> {
        let Some(first) = self.packets.front_mut() else {
            self.timeout_at = None;
            return Ok(());
        };
        if first.timeouts >= TIMEOUTS_MAX {
            return Err(TimedOut);
        }
        first.timeouts += 1;
        self.timeouts += 1;
        let patience = self.newest.map_or(Duration::ZERO, |newest| newest.round_trip) + self.reorder_window();
        for at in 0..self.packets.len() {
            let packet = &self.packets[at];
            if packet.state == State::InFlight && (at == 0 || packet.sent_at + patience <= now) {
                self.mark_lost_at(at);
            }
        }
        self.lost = (self.first_unacked..)
            .zip(&self.packets)
            .filter(|(_, packet)| packet.state == State::Lost)
            .map(|(sequence, _)| sequence)
            .collect();
        if !self.after_timeout {
            self.congestion.on_timeout();
        }
        self.after_timeout = true;
        self.credit = 0;
        self.recovery_until = Some(self.next());
        self.backoff += 1;
        self.probe_at = None;
        self.reorder_at = None;
        self.timeout_at = Some(now + self.timeout());
        Ok(())
    }
}

/// What one acknowledgement delivered.
#[derive(Default)]
struct Delivery {
    bytes: u64,
    round_trip: Option<Duration>,
}

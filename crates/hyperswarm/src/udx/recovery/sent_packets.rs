//! The packets from the first unacknowledged one (SND.UNA) to the next new one (SND.NXT), and what became of each.

use std::collections::VecDeque;

use tokio::time::Instant;

use crate::udx::packet::HEADER_BYTES;

/// What became of the last copy of a packet (Segment.acked and Segment.lost in RFC 8985).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    InFlight,
    Lost,
    Acked,
}

/// A packet that was sent and is kept until everything before it is acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SentPacket {
    /// Where its payload starts in the stream.
    pub(crate) offset: u64,
    /// When its last copy was sent (Segment.xmit_ts).
    pub(crate) xmit_ts: Instant,
    pub(crate) length: u16,
    pub(crate) kind: u8,
    /// The padding that makes it an MTU probe, or 0.
    pub(crate) padding: u8,
    pub(crate) state: State,
    /// Whether it was sent more than once (Segment.retransmitted).
    pub(crate) retransmitted: bool,
    /// How often it was the first unacknowledged packet when the retransmission timer expired.
    pub(crate) timeouts: u8,
}

impl SentPacket {
    pub(crate) fn new(now: Instant, offset: u64, length: usize, kind: u8, padding: u8) -> Self {
        Self {
            offset,
            xmit_ts: now,
            length: length as u16,
            kind,
            padding,
            state: State::InFlight,
            retransmitted: false,
            timeouts: 0,
        }
    }

    /// Returns the bytes that count towards the congestion window. Padding does not.
    pub(crate) fn size(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.length)
    }

    pub(crate) fn is_mtu_probe(&self) -> bool {
        self.padding > 0
    }
}

/// The sent packets by sequence number.
#[derive(Debug)]
pub(crate) struct SentPackets {
    /// The packets `[first_unacked, first_unacked + packets.len())`.
    packets: VecDeque<SentPacket>,
    first_unacked: u64,
    /// Sequence numbers of lost packets in the order in which they are resent. Some may have been acknowledged since.
    lost: VecDeque<u64>,
    bytes_in_flight: u64,
    /// The number of packets acknowledged out of order (RACK.segs_sacked).
    segs_sacked: usize,
    retransmitted_in_flight: usize,
}

impl SentPackets {
    pub(crate) fn new(first: u64) -> Self {
        Self {
            packets: VecDeque::new(),
            first_unacked: first,
            lost: VecDeque::new(),
            bytes_in_flight: 0,
            segs_sacked: 0,
            retransmitted_in_flight: 0,
        }
    }

    /// Returns the sequence number of the next new packet.
    pub(crate) fn next(&self) -> u64 {
        self.first_unacked + self.packets.len() as u64
    }

    pub(crate) fn first_unacked(&self) -> u64 {
        self.first_unacked
    }

    pub(crate) fn len(&self) -> usize {
        self.packets.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Returns the bytes of the packets that are neither acknowledged nor lost (pipe in RFC 6937).
    pub(crate) fn bytes_in_flight(&self) -> u64 {
        self.bytes_in_flight
    }

    pub(crate) fn segs_sacked(&self) -> usize {
        self.segs_sacked
    }

    /// Returns whether the packets in flight were sent in the order of their sequence numbers.
    pub(crate) fn is_in_order(&self) -> bool {
        self.retransmitted_in_flight == 0
    }

    pub(crate) fn first(&self) -> Option<&SentPacket> {
        self.packets.front()
    }

    pub(crate) fn first_mut(&mut self) -> Option<&mut SentPacket> {
        self.packets.front_mut()
    }

    /// Returns the packets that are neither acknowledged nor lost, with their sequence numbers.
    pub(crate) fn in_flight(&self) -> impl DoubleEndedIterator<Item = (u64, &SentPacket)> {
        let numbered = (0..self.packets.len()).map(|at| (self.first_unacked + at as u64, &self.packets[at]));
        numbered.filter(|(_, packet)| packet.state == State::InFlight)
    }

    /// Adds the next new packet.
    pub(crate) fn push(&mut self, packet: SentPacket) {
        self.bytes_in_flight += packet.size();
        self.packets.push_back(packet);
    }

    /// Returns the lost packet to resend next, and its size.
    pub(crate) fn next_lost(&mut self) -> Option<(u64, u64)> {
        while let Some(&sequence) = self.lost.front() {
            let packet = sequence.checked_sub(self.first_unacked).and_then(|at| self.packets.get(at as usize));
            if let Some(packet) = packet.filter(|packet| packet.state == State::Lost) {
                return Some((sequence, packet.size()));
            }
            self.lost.pop_front();
        }
        None
    }

    /// Records that a packet was sent again, without padding. Returns the packet as it was before.
    pub(crate) fn retransmit(&mut self, now: Instant, sequence: u64) -> SentPacket {
        if self.lost.front() == Some(&sequence) {
            self.lost.pop_front();
        }
        let packet = &mut self.packets[(sequence - self.first_unacked) as usize];
        let before = *packet;
        if before.state == State::Lost {
            self.bytes_in_flight += before.size();
        } else if before.retransmitted {
            self.retransmitted_in_flight -= 1;
        }
        packet.padding = 0;
        packet.state = State::InFlight;
        packet.retransmitted = true;
        packet.xmit_ts = now;
        self.retransmitted_in_flight += 1;
        before
    }

    /// Marks a packet as acknowledged. Returns the packet as it was before, unless it was acknowledged already.
    pub(crate) fn acknowledge(&mut self, sequence: u64) -> Option<SentPacket> {
        let packet = &mut self.packets[(sequence - self.first_unacked) as usize];
        let before = *packet;
        packet.state = State::Acked;
        if before.state == State::InFlight {
            self.bytes_in_flight -= before.size();
            self.retransmitted_in_flight -= usize::from(before.retransmitted);
        }
        (before.state != State::Acked).then_some(before)
    }

    /// Counts a packet that was acknowledged out of order.
    pub(crate) fn count_sacked(&mut self) {
        self.segs_sacked += 1;
    }

    /// Uncounts a packet that was acknowledged out of order, and now in order as well.
    pub(crate) fn uncount_sacked(&mut self) {
        self.segs_sacked -= 1;
    }

    /// Drops the packets before `ack`.
    pub(crate) fn advance(&mut self, ack: u64) {
        while self.first_unacked < ack {
            self.packets.pop_front();
            self.first_unacked += 1;
        }
        if self.packets.is_empty() && self.packets.capacity() > 256 {
            self.packets.shrink_to(16);
        }
    }

    /// Marks a packet in flight as lost, and returns it.
    pub(crate) fn mark_lost(&mut self, sequence: u64) -> SentPacket {
        let packet = &mut self.packets[(sequence - self.first_unacked) as usize];
        packet.state = State::Lost;
        self.bytes_in_flight -= packet.size();
        self.retransmitted_in_flight -= usize::from(packet.retransmitted);
        self.lost.push_back(sequence);
        *packet
    }

    /// Arranges the lost packets in the order of their sequence numbers.
    pub(crate) fn sort_lost(&mut self) {
        self.lost = (self.first_unacked..)
            .zip(&self.packets)
            .filter(|(_, packet)| packet.state == State::Lost)
            .map(|(sequence, _)| sequence)
            .collect();
    }

    /// Forgets all packets. Sequence numbers continue.
    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.next());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three(now: Instant) -> SentPackets {
        let mut sent = SentPackets::new(10);
        (0..3).for_each(|at| sent.push(SentPacket::new(now, at * 80, 80, 1, 0)));
        sent
    }

    #[test]
    fn only_packets_that_are_neither_acknowledged_nor_lost_count_as_in_flight() {
        let now = Instant::now();
        let mut sent = three(now);
        assert_eq!((sent.next(), sent.bytes_in_flight()), (13, 300));
        sent.mark_lost(11);
        assert!(sent.acknowledge(12).is_some());
        assert_eq!((sent.bytes_in_flight(), sent.in_flight().map(|(sequence, _)| sequence).collect()), (100, vec![10]));
        assert!(sent.acknowledge(12).is_none(), "it was acknowledged before");
        sent.retransmit(now, 11);
        assert_eq!((sent.bytes_in_flight(), sent.is_in_order()), (200, false));
        sent.acknowledge(10);
        sent.acknowledge(11);
        sent.advance(13);
        assert_eq!((sent.bytes_in_flight(), sent.is_in_order(), sent.first_unacked()), (0, true, 13));
    }

    #[test]
    fn a_lost_packet_that_arrives_late_is_not_resent() {
        let mut sent = three(Instant::now());
        sent.mark_lost(11);
        sent.mark_lost(10);
        sent.acknowledge(11);
        assert_eq!(sent.next_lost(), Some((10, 100)));
        sent.mark_lost(12);
        sent.sort_lost();
        assert_eq!(sent.next_lost(), Some((10, 100)));
        sent.acknowledge(10);
        sent.advance(11);
        assert_eq!(sent.next_lost(), Some((12, 100)));
    }
}

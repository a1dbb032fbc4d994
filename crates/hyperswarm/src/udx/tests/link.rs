//! Two connections and a simulated link that loses, duplicates, delays and reorders packets, all driven by one seed.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::udx::StreamOptions;
use crate::udx::connection::Connection;
use crate::udx::packet::{OVERHEAD_BYTES, Packet};

/// A small seeded random number generator, so that a failing seed can be repeated.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn happens(&mut self, percent: f64) -> bool {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64 * 100.0 < percent
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Weather {
    pub(crate) loss_percent: f64,
    pub(crate) double_percent: f64,
    pub(crate) late_percent: f64,
    /// The extra delay of late packets.
    pub(crate) late_by: Duration,
    pub(crate) delay: Duration,
    pub(crate) mtu: usize,
    pub(crate) bytes_per_second: u64,
    /// How many bytes the bottleneck queues before it drops packets.
    pub(crate) queue_bytes: u64,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            loss_percent: 0.0,
            double_percent: 0.0,
            late_percent: 0.0,
            late_by: Duration::ZERO,
            delay: Duration::from_millis(10),
            mtu: 1500,
            bytes_per_second: 12_500_000,
            queue_bytes: 256 * 1024,
        }
    }
}

pub(crate) struct Side {
    pub(crate) connection: Connection,
    pub(crate) received: Vec<u8>,
    /// Bytes that are not written yet.
    pub(crate) to_write: Bytes,
    pub(crate) reads: bool,
    pub(crate) ends: bool,
    link_free_at: Instant,
    written_at: usize,
}

impl Side {
    fn new(connection: Connection, now: Instant) -> Self {
        Self {
            connection,
            received: Vec::new(),
            to_write: Bytes::new(),
            reads: true,
            ends: false,
            link_free_at: now,
            written_at: 0,
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.connection.closed().is_some()
    }
}

/// Arrival time, number, receiving side and bytes of a packet in flight.
type UnderWay = (Instant, u64, usize, Vec<u8>);

/// Two connections and the link between them.
pub(crate) struct Link {
    pub(crate) sides: [Side; 2],
    pub(crate) weather: Weather,
    pub(crate) now: Instant,
    pub(crate) chance: Chance,
    under_way: BinaryHeap<Reverse<UnderWay>>,
    count: u64,
    pub(crate) dropped: u64,
    /// Kinds of packets that are always dropped.
    pub(crate) drops: BTreeSet<u8>,
    pub(crate) sent: Vec<(usize, Vec<u8>)>,
}

impl Link {
    pub(crate) fn new(weather: Weather, seed: u64) -> Self {
        Self::starting_at(weather, seed, &StreamOptions::default(), [0, 0])
    }

    pub(crate) fn starting_at(weather: Weather, seed: u64, options: &StreamOptions, first: [u32; 2]) -> Self {
        let now = Instant::now();
        let mut here = Connection::starting_at(options, first[0], first[1]);
        let mut there = Connection::starting_at(options, first[1], first[0]);
        here.connect(2, now);
        there.connect(1, now);
        Self {
            sides: [Side::new(here, now), Side::new(there, now)],
            weather,
            now,
            chance: Chance::new(seed),
            under_way: BinaryHeap::new(),
            count: 0,
            dropped: 0,
            drops: BTreeSet::new(),
            sent: Vec::new(),
        }
    }

    /// Runs until `done`, or until `limit` has passed. Returns how long it took, or `None`.
    pub(crate) fn run_until(&mut self, limit: Duration, done: impl Fn(&[Side; 2]) -> bool) -> Option<Duration> {
        let begun = self.now;
        loop {
            self.act();
            if done(&self.sides) {
                return Some(self.now - begun);
            }
            let next = [
                self.under_way.peek().map(|Reverse((at, ..))| *at),
                self.sides[0].connection.deadline(),
                self.sides[1].connection.deadline(),
            ];
            let next = next.into_iter().flatten().min()?;
            self.now = self.now.max(next);
            if self.now - begun > limit {
                self.now = begun + limit;
                return None;
            }
            self.deliver();
            for side in &mut self.sides {
                if side.connection.deadline().is_some_and(|at| at <= self.now) {
                    side.connection.on_deadline(self.now);
                }
            }
        }
    }

    /// Lets both sides write, read and send what they can.
    fn act(&mut self) {
        for at in 0..2 {
            let side = &mut self.sides[at];
            while side.connection.is_writable()
                && side.written_at < side.to_write.len()
                && side.connection.sender().unsent() < 64 * 1024
            {
                let end = (side.written_at + 9_001).min(side.to_write.len());
                side.connection.write(side.to_write.slice(side.written_at..end));
                side.written_at = end;
            }
            if side.ends && side.written_at == side.to_write.len() {
                side.connection.end();
            }
            while side.reads
                && let Some(bytes) = side.connection.read()
            {
                side.received.extend_from_slice(&bytes);
            }
            let mut packet = Vec::new();
            while self.sides[at].connection.transmit(self.now, &mut packet) {
                self.send(at, std::mem::take(&mut packet));
            }
        }
    }

    fn send(&mut self, from: usize, packet: Vec<u8>) {
        let size = (packet.len() + OVERHEAD_BYTES - 20) as u64;
        self.sent.push((from, packet.clone()));
        let side = &mut self.sides[from];
        let free_at = side.link_free_at.max(self.now);
        let queued = (free_at - self.now).as_secs_f64() * self.weather.bytes_per_second as f64;
        let too_large = size > self.weather.mtu as u64;
        let unwanted = self.drops.contains(&packet[2]);
        if too_large
            || unwanted
            || queued > self.weather.queue_bytes as f64
            || self.chance.happens(self.weather.loss_percent)
        {
            self.dropped += 1;
            return;
        }
        side.link_free_at = free_at + Duration::from_secs_f64(size as f64 / self.weather.bytes_per_second as f64);
        let mut at = side.link_free_at + self.weather.delay;
        if self.chance.happens(self.weather.late_percent) {
            at += self.weather.late_by;
        }
        if self.chance.happens(self.weather.double_percent) {
            self.count += 1;
            self.under_way.push(Reverse((at + self.weather.delay, self.count, 1 - from, packet.clone())));
        }
        self.count += 1;
        self.under_way.push(Reverse((at, self.count, 1 - from, packet)));
    }

    fn deliver(&mut self) {
        while let Some(Reverse((at, ..))) = self.under_way.peek() {
            if *at > self.now {
                break;
            }
            if let Some(Reverse((_, _, to, bytes))) = self.under_way.pop() {
                let packet = Packet::decode(&bytes).expect("our own packets are whole");
                self.sides[to].connection.receive(&packet, self.now, packet.payload.len());
            }
        }
    }

    /// Runs until the second side has received all of `sent`.
    pub(crate) fn exchange_rest(&mut self, sent: &[u8], limit: Duration) -> Option<Duration> {
        self.run_until(limit, |sides| sides[1].received == sent)
    }

    /// Lets both sides write their bytes, end, and close. Returns how long that took.
    pub(crate) fn exchange(&mut self, here: &[u8], there: &[u8], limit: Duration) -> Option<Duration> {
        for (side, bytes) in self.sides.iter_mut().zip([here, there]) {
            side.to_write = Bytes::copy_from_slice(bytes);
            side.ends = true;
        }
        self.run_until(limit, |sides| sides.iter().all(Side::is_complete))
    }
}

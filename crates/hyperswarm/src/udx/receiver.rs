//! The receiving half of a stream: delivers data in order, and buffers out-of-order packets until the gap before
//! them is filled.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};

use super::budget::Share;
use super::packet::{DATA, END, RANGES_MAX};

/// What an early packet counts in addition to its payload, so that many empty ones are also bounded.
const EARLY_COST: usize = 64;
/// A packet further ahead than this is not the peer's.
const AHEAD_MAX: u64 = 65_536;
/// A window below two packets is advertised as zero, so that the other side does not send tiny packets (silly window
/// syndrome).
const WINDOW_MIN: usize = 3_000;
const CHUNK_MAX: usize = 64 * 1024;

/// The receiving half of a stream.
#[derive(Debug)]
pub(crate) struct Receiver {
    next: u64,
    chunks: VecDeque<BytesMut>,
    unread: usize,
    early: BTreeMap<u64, (u8, Bytes)>,
    early_cost: usize,
    /// The sequence numbers of `early`, as ranges.
    ranges: Vec<(u64, u64)>,
    end: Option<u64>,
    window_max: usize,
    /// Whether received bytes are discarded, because no reader is left.
    discarding: bool,
    /// What this stream holds of the budget that limits it, if one does.
    share: Option<Share>,
}

impl Receiver {
    pub(crate) fn new(first: u64, window_max: usize, share: Option<Share>) -> Self {
        Self {
            next: first,
            chunks: VecDeque::new(),
            unread: 0,
            early: BTreeMap::new(),
            early_cost: 0,
            ranges: Vec::new(),
            end: None,
            window_max,
            discarding: false,
            share,
        }
    }

    /// Returns the sequence number expected next.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Returns whether everything up to the other side's end has arrived.
    pub(crate) fn is_ended(&self) -> bool {
        self.end.is_some_and(|end| self.next > end)
    }

    pub(crate) fn has_gaps(&self) -> bool {
        !self.early.is_empty()
    }

    pub(crate) fn is_readable(&self) -> bool {
        !self.chunks.is_empty()
    }

    /// Returns the ranges that arrived early, in order, at most as many as fit in a packet.
    pub(crate) fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges[..self.ranges.len().min(RANGES_MAX)]
    }

    /// Returns the receive window: how many bytes the other side may send.
    pub(crate) fn window_bytes(&self) -> u32 {
        let free = self.window_max.saturating_sub(self.unread + self.early_cost);
        if free < WINDOW_MIN.min(self.window_max) { 0 } else { u32::try_from(free).unwrap_or(u32::MAX) }
    }

    pub(crate) fn set_window_max(&mut self, bytes: usize) {
        self.window_max = bytes;
    }

    /// From here on, only the window limits what is held.
    pub(crate) fn lift_limits(&mut self) {
        self.share = None;
    }

    /// Returns whether the budget allows this many more bytes.
    fn may_hold(&mut self, more: usize) -> bool {
        let held = self.unread + self.early_cost + more;
        self.share.as_mut().is_none_or(|share| share.try_set(held))
    }

    /// Returns released bytes to the budget.
    fn release(&mut self) {
        if let Some(share) = &mut self.share {
            share.set(self.unread + self.early_cost);
        }
    }

    /// Handles a packet with data or an end. `expected` hints at how many bytes come with it and right after it.
    pub(crate) fn receive(&mut self, sequence: u64, kind: u8, payload: &[u8], expected: usize) {
        let payload = if kind & DATA == 0 { &[] } else { payload };
        if sequence < self.next || sequence - self.next > AHEAD_MAX || self.end.is_some_and(|end| sequence > end) {
            return;
        }
        if sequence == self.next {
            // The packet that closes the gap is accepted even if early packets fill the window. An end takes no space.
            let fits = self.unread < self.window_max
                && (Share::is_free(self.unread + payload.len()) || self.may_hold(payload.len()));
            if fits || payload.is_empty() {
                self.deliver(sequence, kind, payload, expected);
                self.deliver_early();
            }
        } else if self.unread + self.early_cost + payload.len() + EARLY_COST <= self.window_max
            && self.may_hold(payload.len() + EARLY_COST)
        {
            self.keep(sequence, kind, payload);
        }
    }

    fn deliver(&mut self, sequence: u64, kind: u8, payload: &[u8], expected: usize) {
        self.next = sequence + 1;
        if kind & END != 0 {
            self.end = Some(sequence);
        }
        if payload.is_empty() || self.discarding {
            return;
        }
        self.unread += payload.len();
        match self.chunks.back_mut() {
            Some(chunk) if chunk.capacity() - chunk.len() >= payload.len() => chunk.extend_from_slice(payload),
            last => {
                let grown = last.map_or(0, |chunk| chunk.capacity() * 2);
                // What a budget limits may be refused, however much of it is announced.
                let expected = if self.share.is_some() { 0 } else { expected };
                let mut chunk = BytesMut::with_capacity(grown.max(expected).min(CHUNK_MAX).max(payload.len()));
                chunk.extend_from_slice(payload);
                self.chunks.push_back(chunk);
            }
        }
    }

    fn deliver_early(&mut self) {
        while let Some(entry) = self.early.first_entry() {
            if *entry.key() > self.next {
                break;
            }
            let (sequence, (kind, payload)) = entry.remove_entry();
            self.early_cost -= payload.len() + EARLY_COST;
            if !self.is_ended() {
                self.deliver(sequence, kind, &payload, payload.len());
            }
        }
        let next = self.next;
        let gone = self.ranges.partition_point(|(_, end)| *end <= next);
        self.ranges.drain(..gone);
    }

    fn keep(&mut self, sequence: u64, kind: u8, payload: &[u8]) {
        let at = self.ranges.partition_point(|(_, end)| *end < sequence);
        match self.ranges.get_mut(at) {
            Some((start, end)) if *start <= sequence && sequence < *end => return,
            Some((_, end)) if *end == sequence => {
                *end += 1;
                if self.ranges.get(at + 1).is_some_and(|(start, _)| *start == sequence + 1) {
                    self.ranges[at].1 = self.ranges.remove(at + 1).1;
                }
            }
            Some((start, _)) if *start == sequence + 1 => *start = sequence,
            _ => self.ranges.insert(at, (sequence, sequence + 1)),
        }
        self.early_cost += payload.len() + EARLY_COST;
        self.early.insert(sequence, (kind, Bytes::copy_from_slice(payload)));
    }

    /// Returns the next chunk for the reader.
    pub(crate) fn read(&mut self) -> Option<Bytes> {
        let chunk = self.chunks.pop_front()?;
        self.unread -= chunk.len();
        self.release();
        Some(chunk.freeze())
    }

    /// Accepts packets from now on without storing their bytes.
    pub(crate) fn discard(&mut self) {
        self.discarding = true;
        self.chunks = VecDeque::new();
        self.unread = 0;
        self.release();
    }

    /// Drops the early packets, whose gap will never be closed.
    pub(crate) fn drop_early(&mut self) {
        self.early.clear();
        self.ranges = Vec::new();
        self.early_cost = 0;
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Budget;
    use super::*;

    #[test]
    fn a_limited_stream_takes_memory_for_what_has_arrived_only() {
        let held = |share| {
            let mut receiver = Receiver::new(0, 65_536, share);
            receiver.receive(0, DATA, &[1; 1000], 60_000);
            receiver.chunks[0].capacity()
        };
        assert!(held(None) >= 60_000, "the rest of the batch follows");
        assert!(held(Some(Share::of(&Budget::new(100_000)))) < 2_000, "the budget may refuse the rest");
    }
}

//! Holds the bytes that the user wrote until the other side acknowledges them.

use std::collections::VecDeque;

use bytes::Bytes;

/// A queue of byte chunks. Offsets count from the start of the stream.
#[derive(Debug, Default)]
pub(crate) struct SendQueue {
    pieces: VecDeque<(u64, Bytes)>,
    /// The index of the chunk with the first unsent byte.
    next_piece: usize,
    next: u64,
    end: u64,
}

impl SendQueue {
    pub(crate) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            let start = self.end;
            self.end += bytes.len() as u64;
            self.pieces.push_back((start, bytes));
        }
    }

    /// Returns how many bytes were never sent.
    pub(crate) fn unsent(&self) -> usize {
        (self.end - self.next) as usize
    }

    /// Returns how many bytes are kept: those of all chunks that are not released.
    pub(crate) fn held(&self) -> usize {
        self.pieces.front().map_or(0, |(start, _)| (self.end - start) as usize)
    }

    /// Returns the offset of the first byte that was never sent.
    pub(crate) fn next_offset(&self) -> u64 {
        self.next
    }

    /// Appends the next `length` unsent bytes to `out`. At least that many must be queued.
    pub(crate) fn send(&mut self, length: usize, out: &mut Vec<u8>) {
        let mut left = length;
        while left > 0 {
            let (start, piece) = &self.pieces[self.next_piece];
            let from = (self.next - start) as usize;
            let taken = left.min(piece.len() - from);
            out.extend_from_slice(&piece[from..from + taken]);
            left -= taken;
            self.next += taken as u64;
            if from + taken == piece.len() {
                self.next_piece += 1;
            }
        }
    }

    /// Appends `length` bytes from `offset` on, which were sent before and not released.
    pub(crate) fn send_again(&self, offset: u64, length: usize, out: &mut Vec<u8>) {
        let first = self.pieces.partition_point(|(start, piece)| start + piece.len() as u64 <= offset);
        let mut offset = offset;
        let mut left = length;
        for (start, piece) in self.pieces.range(first..) {
            if left == 0 {
                break;
            }
            let from = (offset - start) as usize;
            let taken = left.min(piece.len() - from);
            out.extend_from_slice(&piece[from..from + taken]);
            left -= taken;
            offset += taken as u64;
        }
    }

    /// Releases the chunks that lie before `offset`.
    pub(crate) fn release(&mut self, offset: u64) {
        while let Some((start, piece)) = self.pieces.front() {
            if start + piece.len() as u64 > offset {
                break;
            }
            self.pieces.pop_front();
            self.next_piece -= 1;
        }
        if self.pieces.is_empty() && self.pieces.capacity() > 64 {
            self.pieces.shrink_to(16);
        }
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        *self = Self { next: self.end, end: self.end, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_cut_anywhere_sent_again_and_released() {
        let mut queue = SendQueue::default();
        for piece in ["one", "", "twothree", "4"] {
            queue.push(Bytes::from_static(piece.as_bytes()));
        }
        let mut out = Vec::new();
        queue.send(5, &mut out);
        queue.send(7, &mut out);
        assert_eq!((out.as_slice(), queue.unsent()), (&b"onetwothree4"[..], 0));
        out.clear();
        queue.send_again(2, 6, &mut out);
        assert_eq!(out, b"etwoth");
        queue.release(5);
        out.clear();
        queue.send_again(5, 7, &mut out);
        assert_eq!(out, b"othree4");
        queue.push(Bytes::from_static(b"five"));
        queue.release(12);
        out.clear();
        queue.send(4, &mut out);
        assert_eq!(out, b"five");
    }
}

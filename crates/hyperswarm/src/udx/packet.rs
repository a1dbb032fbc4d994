//! Wire format of UDX packets: a header of twenty bytes, then padding or acknowledged ranges, then the payload.

use crate::compact_encoding::{DecodeError, Decoder};

/// The length of a header.
pub(crate) const HEADER_BYTES: usize = 20;
/// The length of the IPv4, UDP and UDX headers, which count towards the MTU.
pub(crate) const OVERHEAD_BYTES: usize = 20 + 8 + HEADER_BYTES;
/// The maximum number of ranges that one packet acknowledges, so that it fits in the smallest MTU.
pub(crate) const RANGES_MAX: usize = 140;
/// The maximum number of ranges that libudx sends. It accepts any number.
pub(crate) const LIBUDX_RANGES_MAX: usize = 50;

pub(crate) const DATA: u8 = 1;
pub(crate) const END: u8 = 2;
pub(crate) const SACK: u8 = 4;
pub(crate) const DESTROY: u8 = 16;
pub(crate) const HEARTBEAT: u8 = 32;

const MAGIC: [u8; 2] = [0xff, 0x01];

/// Returns whether a datagram is a UDX packet.
pub(crate) fn is_udx(datagram: &[u8]) -> bool {
    datagram.starts_with(&MAGIC) && datagram.len() >= HEADER_BYTES
}

/// Returns the id of the stream that a UDX packet is for.
pub(crate) fn stream_id(datagram: &[u8]) -> Option<u32> {
    datagram.get(4..8)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// The fields of a header. `stream_id` is the receiver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: u8,
    pub(crate) stream_id: u32,
    pub(crate) window_bytes: u32,
    pub(crate) sequence: u32,
    pub(crate) ack: u32,
}

impl Header {
    pub(crate) fn encode(&self, data_offset: u8, out: &mut Vec<u8>) {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&[MAGIC[0], MAGIC[1], self.kind, data_offset]);
        bytes[4..8].copy_from_slice(&self.stream_id.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.window_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.ack.to_le_bytes());
        out.extend_from_slice(&bytes);
    }
}

/// A decoded packet.
#[derive(Debug)]
pub(crate) struct Packet<'a> {
    pub(crate) header: Header,
    pub(crate) payload: &'a [u8],
    ranges: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Decodes a datagram; `None` if it is not a UDX packet.
    pub(crate) fn decode(datagram: &'a [u8]) -> Option<Self> {
        is_udx(datagram).then(|| Self::decode_fields(datagram).ok()).flatten()
    }

    fn decode_fields(datagram: &'a [u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(datagram);
        decoder.bytes(MAGIC.len())?;
        let kind = decoder.u8()?;
        let data_offset = usize::from(decoder.u8()?);
        let header = Header {
            kind,
            stream_id: decoder.u32()?,
            window_bytes: decoder.u32()?,
            sequence: decoder.u32()?,
            ack: decoder.u32()?,
        };
        let rest = decoder.rest();
        let skipped = decoder.bytes(data_offset)?;
        // Without a data offset, the ranges fill the rest of the packet.
        let ranges = match kind & SACK {
            0 => &[][..],
            _ if data_offset > 0 => skipped,
            _ => rest,
        };
        Ok(Self { header, payload: decoder.raw(), ranges })
    }

    /// Returns the acknowledged ranges, each `[start, end)`.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u32, u32)> {
        self.ranges.as_chunks::<8>().0.iter().map(|[a, b, c, d, e, f, g, h]| {
            (u32::from_le_bytes([*a, *b, *c, *d]), u32::from_le_bytes([*e, *f, *g, *h]))
        })
    }
}

/// Returns the number nearest to `near` whose low 32 bits are `wire`. Sequence numbers wrap on the wire but not in this
/// crate.
pub(crate) fn unwrap_sequence(wire: u32, near: u64) -> u64 {
    near.wrapping_add_signed(i64::from(wire.wrapping_sub(near as u32) as i32))
}

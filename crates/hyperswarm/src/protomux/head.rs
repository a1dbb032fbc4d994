//! The integers that precede the content of a message, encoded on the stack.

use crate::compact_encoding::Encoder;

/// Enough for three integers of the largest size.
const HEAD_BYTES_MAX: usize = 27;

/// The start of a message. Writing more than three integers is a programming error.
#[derive(Default)]
pub(crate) struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    length: usize,
}

impl Head {
    /// Writes the integers one after the other.
    pub(crate) fn of<const N: usize>(values: [u64; N]) -> Self {
        let mut head = Self::default();
        for value in values {
            head.write_uint(value);
        }
        head
    }
}

impl AsRef<[u8]> for Head {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Encoder for Head {
    fn write_raw(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }
}

//! Encodes values as bytes in the format of the Node package `compact-encoding`.
//!
//! Integers are little-endian. A `uint` up to `0xfc` takes one byte. A larger one takes a marker byte and 2, 4 or 8
//! bytes.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};

use bytes::{BufMut, BytesMut};

/// The largest integer that JavaScript represents exactly. Decoding rejects larger ones, and callers must not encode
/// them.
pub const UINT_MAX: u64 = (1 << 53) - 1;

/// Why bytes could not be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The value is longer than the remaining bytes.
    #[error("the value ends too early")]
    Truncated,
    /// The bytes violate the format.
    #[error("{0}")]
    Invalid(&'static str),
}

/// Decodes values from the front of a slice. After a failed read the position is unspecified, so the decoder must not
/// be used further.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Starts at the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Returns the remaining bytes without reading them.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Returns whether all bytes were read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Reads all remaining bytes (`raw`).
    pub fn raw(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Reads exactly `length` bytes.
    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// Reads an array of `N` bytes, such as a key (`fixed32`, `fixed64`).
    pub fn fixed<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// Reads one byte.
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.fixed::<1>()?[0])
    }

    /// Reads two bytes.
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.fixed()?))
    }

    /// Reads four bytes.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.fixed()?))
    }

    /// Reads eight bytes.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.fixed()?))
    }

    /// Reads an integer of one to nine bytes.
    pub fn uint(&mut self) -> Result<u64, DecodeError> {
        let value = match self.u8()? {
            0xfd => self.u16()?.into(),
            0xfe => self.u32()?.into(),
            0xff => self.u64()?,
            small => small.into(),
        };
        if value > UINT_MAX {
            return Err(DecodeError::Invalid("the integer is above 2^53 - 1"));
        }
        Ok(value)
    }

    /// Reads a length and that many bytes.
    pub fn buffer(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = usize::try_from(self.uint()?).map_err(|_| DecodeError::Truncated)?;
        self.bytes(length)
    }

    /// Reads a buffer; an empty one means no value (the package's `buffer`, which decodes an empty buffer as `null`).
    pub fn optional_buffer(&mut self) -> Result<Option<&'a [u8]>, DecodeError> {
        Ok(Some(self.buffer()?).filter(|bytes| !bytes.is_empty()))
    }

    /// Reads a length and that many bytes of UTF-8.
    pub fn string(&mut self) -> Result<&'a str, DecodeError> {
        std::str::from_utf8(self.buffer()?).map_err(|_| DecodeError::Invalid("the string is not UTF-8"))
    }

    /// Reads four octets and a port.
    pub fn ipv4(&mut self) -> Result<SocketAddrV4, DecodeError> {
        let octets: [u8; 4] = self.fixed()?;
        Ok(SocketAddrV4::new(Ipv4Addr::from(octets), self.u16()?))
    }

    /// Reads sixteen octets and a port.
    pub fn ipv6(&mut self) -> Result<SocketAddrV6, DecodeError> {
        let octets: [u8; 16] = self.fixed()?;
        Ok(SocketAddrV6::new(Ipv6Addr::from(octets), self.u16()?, 0, 0))
    }

    /// Reads a count and that many items. More than `items_max` items are an error.
    pub fn array<T>(
        &mut self,
        items_max: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let count = usize::try_from(self.uint()?).map_err(|_| DecodeError::Truncated)?;
        if count > items_max {
            return Err(DecodeError::Invalid("the array has too many items"));
        }
        (0..count).map(|_| item(self)).collect()
    }
}

/// Appends encoded values. Implemented for the buffers that messages are written to.
pub trait Encoder {
    /// Appends bytes as they are (`raw`, `fixed32`, `fixed64`).
    fn write_raw(&mut self, bytes: &[u8]);

    /// Appends one byte.
    fn write_byte(&mut self, value: u8) {
        self.write_raw(&[value]);
    }

    /// Appends two bytes.
    fn write_uint16(&mut self, value: u16) {
        self.write_raw(&value.to_le_bytes());
    }

    /// Appends four bytes.
    fn write_uint32(&mut self, value: u32) {
        self.write_raw(&value.to_le_bytes());
    }

    /// Appends an integer in one to nine bytes. It must not exceed [`UINT_MAX`].
    fn write_uint(&mut self, value: u64) {
        debug_assert!(value <= UINT_MAX, "JavaScript cannot hold {value}");
        if value <= 0xfc {
            self.write_byte(value as u8);
        } else if let Ok(short) = u16::try_from(value) {
            self.write_byte(0xfd);
            self.write_uint16(short);
        } else if let Ok(word) = u32::try_from(value) {
            self.write_byte(0xfe);
            self.write_uint32(word);
        } else {
            self.write_byte(0xff);
            self.write_raw(&value.to_le_bytes());
        }
    }

    /// Appends a length and the bytes. An empty buffer also encodes the absence of a value.
    fn write_buffer(&mut self, bytes: &[u8]) {
        self.write_uint(bytes.len() as u64);
        self.write_raw(bytes);
    }

    /// Appends a length and the string's UTF-8.
    fn write_string(&mut self, text: &str) {
        self.write_buffer(text.as_bytes());
    }

    /// Appends four octets and a port.
    fn write_ipv4(&mut self, address: SocketAddrV4) {
        self.write_raw(&address.ip().octets());
        self.write_uint16(address.port());
    }

    /// Appends sixteen octets and a port.
    fn write_ipv6(&mut self, address: SocketAddrV6) {
        self.write_raw(&address.ip().octets());
        self.write_uint16(address.port());
    }

    /// Appends a count and the items.
    fn write_array<T>(&mut self, items: &[T], mut item: impl FnMut(&mut Self, &T))
    where
        Self: Sized,
    {
        self.write_uint(items.len() as u64);
        for one in items {
            item(self, one);
        }
    }
}

impl Encoder for Vec<u8> {
    fn write_raw(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

impl Encoder for BytesMut {
    fn write_raw(&mut self, bytes: &[u8]) {
        self.put_slice(bytes);
    }
}

/// Returns how many bytes [`Encoder::write_uint`] writes for a value.
pub fn uint_size(value: u64) -> usize {
    match value {
        0..=0xfc => 1,
        0xfd..=0xffff => 3,
        0x1_0000..=0xffff_ffff => 5,
        _ => 9,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn integers_take_the_fewest_bytes() {
        let encoded = |value| {
            let mut bytes = Vec::new();
            bytes.write_uint(value);
            assert_eq!(bytes.len(), uint_size(value));
            hex::encode(bytes)
        };
        assert_eq!(encoded(0xfc), "fc");
        assert_eq!(encoded(0xfd), "fdfd00");
        assert_eq!(encoded(0x1_0000), "fe00000100");
        assert_eq!(encoded(0x1_0000_0000), "ff0000000001000000");
    }

    #[test]
    fn an_address_is_its_octets_and_a_little_endian_port() {
        let mut bytes = Vec::new();
        bytes.write_ipv4("127.0.0.1:49737".parse().unwrap());
        assert_eq!(hex::encode(&bytes), "7f00000149c2");
        assert_eq!(Decoder::new(&bytes).ipv4().unwrap().to_string(), "127.0.0.1:49737");
    }

    #[test]
    fn an_integer_beyond_javascript_is_refused() {
        let bytes = hex::decode("ff0000000000002000").unwrap();
        assert_eq!(Decoder::new(&bytes).uint(), Err(DecodeError::Invalid("the integer is above 2^53 - 1")));
    }

    #[test]
    fn a_count_beyond_the_limit_allocates_nothing() {
        let bytes = hex::decode("ffffffffffffff0f00").unwrap();
        assert!(Decoder::new(&bytes).array(16, Decoder::u8).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(value in 0..=UINT_MAX, text: String, tail: Vec<u8>) {
            let mut bytes = BytesMut::new();
            bytes.write_uint(value);
            bytes.write_string(&text);
            bytes.write_raw(&tail);
            let mut decoder = Decoder::new(&bytes);
            prop_assert_eq!(decoder.uint(), Ok(value));
            prop_assert_eq!(decoder.string(), Ok(text.as_str()));
            prop_assert_eq!(decoder.raw(), &tail[..]);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>) {
            let mut decoder = Decoder::new(&bytes);
            let _ = decoder.array(64, |item| item.string().map(str::len));
            let _ = decoder.optional_buffer();
            let _ = decoder.ipv4();
        }
    }
}

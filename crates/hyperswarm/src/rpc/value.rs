//! Encodings of the values inside requests and responses. Both sides must use the same one.

use bytes::Bytes;

use crate::compact_encoding::{DecodeError, Decoder, Encoder};

/// Encodes a buffer as `protomux-rpc` does by default. An empty buffer means no value.
pub fn encode_buffer(bytes: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(bytes.len() + 9);
    value.write_buffer(bytes);
    value
}

/// Decodes the output of [`encode_buffer`] without copying.
pub fn decode_buffer(value: &Bytes) -> Result<Bytes, DecodeError> {
    Ok(value.slice_ref(Decoder::new(value).buffer()?))
}

/// Encodes text, such as JSON with Node's `json` encoding.
pub fn encode_string(text: &str) -> Vec<u8> {
    encode_buffer(text.as_bytes())
}

/// Decodes the output of [`encode_string`].
pub fn decode_string(value: &Bytes) -> Result<&str, DecodeError> {
    Decoder::new(value).string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_its_length_and_its_bytes() {
        assert_eq!(encode_buffer(b"hello"), b"\x05hello");
        assert_eq!(encode_buffer(b""), b"\0");
        assert_eq!(decode_buffer(&Bytes::from_static(b"\x05hello")).unwrap(), "hello");
        assert_eq!(decode_buffer(&Bytes::from_static(b"\0")).unwrap(), "");
        assert_eq!(decode_buffer(&Bytes::from_static(b"\x09short")), Err(DecodeError::Truncated));
    }

    #[test]
    fn a_text_is_its_length_and_its_utf_8() {
        let json = Bytes::from(encode_string(r#"{"a":"ü"}"#));
        assert_eq!(json[0], 10);
        assert_eq!(decode_string(&json).unwrap(), r#"{"a":"ü"}"#);
    }
}

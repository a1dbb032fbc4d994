//! Encodes and decodes JSON. Decoding is bounded, and its errors name the invalid part.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error_code::{ErrorCode, WireError};

/// The maximum size of a message in bytes: 16 MiB, as in Protomux.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Why bytes could not be read as a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message is larger than allowed.
    #[error("the message has {bytes} bytes, more than {max}")]
    TooLarge {
        /// Length of the message in bytes.
        bytes: usize,
        /// Maximum length in bytes.
        max: usize,
    },
    /// The bytes are not JSON. [`decode_borrowed`] also returns this for valid JSON of the wrong shape.
    #[error("not valid JSON: {reason}")]
    NotJson {
        /// Error of the parser, with line and column.
        reason: String,
    },
    /// A part is missing, unknown or malformed.
    #[error("{path}: {reason}")]
    Malformed {
        /// Path of the part, such as `input.messages[2].role`.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl From<DecodeError> for WireError {
    fn from(error: DecodeError) -> Self {
        match &error {
            DecodeError::TooLarge { .. } => Self::new(ErrorCode::RequestTooLarge, error.to_string()),
            DecodeError::NotJson { .. } => Self::new(ErrorCode::InvalidJson, error.to_string()),
            DecodeError::Malformed { path, .. } => {
                let param = path.clone();
                let error = Self::new(ErrorCode::InvalidValue, error.to_string());
                if param == "." { error } else { error.with_param(param) }
            }
        }
    }
}

/// Reads a message of at most [`MESSAGE_BYTES_MAX`] bytes. Nesting is limited to 128 levels.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    decode_within(bytes, MESSAGE_BYTES_MAX)
}

/// Reads a message of at most `max` bytes.
pub fn decode_within<T: DeserializeOwned>(bytes: &[u8], max: usize) -> Result<T, DecodeError> {
    if bytes.len() > max {
        return Err(DecodeError::TooLarge { bytes: bytes.len(), max });
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    // The fast path comes first. The path of an error is computed only for invalid messages.
    if let Ok(value) = T::deserialize(&mut deserializer)
        && deserializer.end().is_ok()
    {
        return Ok(value);
    }
    Err(explain::<T>(bytes))
}

/// Decodes a message that borrows from its bytes, for the hot path between nodes. Every error except
/// [`DecodeError::TooLarge`] is [`DecodeError::NotJson`].
pub fn decode_borrowed<'de, T: serde::Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, DecodeError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(DecodeError::TooLarge { bytes: bytes.len(), max: MESSAGE_BYTES_MAX });
    }
    serde_json::from_slice(bytes).map_err(|error| DecodeError::NotJson { reason: error.to_string() })
}

#[cold]
fn explain<T: DeserializeOwned>(bytes: &[u8]) -> DecodeError {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    match serde_path_to_error::deserialize::<_, T>(&mut deserializer) {
        Ok(_) => DecodeError::NotJson {
            reason: deserializer.end().err().map_or_else(|| "unreadable".to_owned(), |error| error.to_string()),
        },
        Err(error) if error.inner().is_data() => {
            DecodeError::Malformed { path: error.path().to_string(), reason: plain_reason(error.inner()) }
        }
        Err(error) => DecodeError::NotJson { reason: error.inner().to_string() },
    }
}

/// Removes the position, which means little in JSON that a program wrote.
fn plain_reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Encodes a message as JSON.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    serde_json::to_vec(message).expect("messages hold nothing that JSON cannot say")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::HealthReport;
    use crate::infer::InferRequest;

    #[test]
    fn a_malformed_message_names_the_part_that_offends() {
        let text = r#"{"tenantId":"t","modelId":"m","version":"one","input":"hi",
            "correlationId":"018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f","retryToken":"r","traceId":"00000000000000000000000000000001"}"#;
        let error = decode::<InferRequest>(text.as_bytes()).expect_err("version is malformed");
        assert!(matches!(&error, DecodeError::Malformed { path, .. } if path == "version"), "{error}");
        assert!(error.to_string().contains("MAJOR.MINOR"), "{error}");
    }

    #[test]
    fn what_is_not_json_is_told_apart_from_what_is_malformed() {
        for bytes in [&b"{"[..], b"", b"{}x", b"\xff\xfe", b"{\"a\":}"] {
            let error = decode::<serde_json::Value>(bytes).expect_err("not JSON");
            assert!(matches!(error, DecodeError::NotJson { .. }), "{error}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        let bytes = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
        assert!(decode::<serde_json::Value>(&bytes).is_err());
    }

    #[test]
    fn a_message_over_the_limit_is_refused_unread() {
        assert_eq!(
            decode_within::<HealthReport>(&[b' '; 11], 10).expect_err("too large"),
            DecodeError::TooLarge { bytes: 11, max: 10 }
        );
    }
}

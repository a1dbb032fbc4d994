//! Encodes and decodes requests and responses in the format of the Node package `protomux-rpc`.

use bytes::Bytes;

use super::error::{Cause, RemoteError};
use crate::compact_encoding::{DecodeError, Decoder, Encoder};

/// The kinds of message on a channel.
pub(super) const REQUEST: u64 = 0;
pub(super) const RESPONSE: u64 = 1;
/// The id of a request that expects no response.
pub(super) const EVENT: u64 = 0;

const HAS_ERROR: u8 = 1;
const HAS_CODE: u8 = 2;
const HAS_CAUSE: u8 = 4;
const HAS_CONTEXT: u8 = 8;

/// A received request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) id: u64,
    /// UTF-8.
    pub(super) method: Bytes,
    pub(super) value: Bytes,
}

impl Request {
    pub(super) fn decode(message: &Bytes) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(message);
        let id = decoder.uint()?;
        let method = message.slice_ref(decoder.string()?.as_bytes());
        Ok(Self { id, method, value: message.slice_ref(decoder.raw()) })
    }
}

/// A received response.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) id: u64,
    pub(super) result: Result<Bytes, Box<RemoteError>>,
}

impl Response {
    pub(super) fn decode(message: &Bytes) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(message);
        // The flags are in the lowest byte of an integer.
        let flags = decoder.uint()? as u8;
        let id = decoder.uint()?;
        if flags & HAS_ERROR == 0 {
            return Ok(Self { id, result: Ok(message.slice_ref(decoder.raw())) });
        }
        let mut error = RemoteError { message: decoder.string()?.to_owned(), ..RemoteError::default() };
        if flags & HAS_CODE != 0 {
            decoder.string()?.clone_into(&mut error.code);
        }
        if flags & HAS_CAUSE != 0 {
            let mut cause = Cause::new(decoder.string()?, decoder.string()?);
            if flags & HAS_CONTEXT != 0 {
                decoder.string()?.clone_into(&mut cause.context);
            }
            error.cause = Some(cause);
        }
        Ok(Self { id, result: Err(Box::new(error)) })
    }
}

/// Returns an encoded error response.
pub(super) fn encode_error(id: u64, error: &RemoteError) -> Vec<u8> {
    let mut flags = HAS_ERROR;
    if !error.code.is_empty() {
        flags |= HAS_CODE;
    }
    if let Some(cause) = &error.cause {
        flags |= HAS_CAUSE;
        if !cause.context.is_empty() {
            flags |= HAS_CONTEXT;
        }
    }
    let mut message = vec![flags];
    message.write_uint(id);
    message.write_string(&error.message);
    if flags & HAS_CODE != 0 {
        message.write_string(&error.code);
    }
    if let Some(cause) = &error.cause {
        message.write_string(&cause.message);
        message.write_string(&cause.code);
        if flags & HAS_CONTEXT != 0 {
            message.write_string(&cause.context);
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(hex: &str) -> Bytes {
        hex::decode(hex).unwrap().into()
    }

    // protomux-rpc 1.10 sent the following bytes, here without the channel's id and the kind.

    #[test]
    fn requests_are_those_of_the_node_package() {
        let request = Request::decode(&bytes("01046563686f0568656c6c6f")).unwrap();
        assert_eq!(request, Request { id: 1, method: "echo".into(), value: "\u{5}hello".into() });
        let event = Request::decode(&bytes("00046e6f746500")).unwrap();
        assert_eq!(event, Request { id: EVENT, method: "note".into(), value: "\0".into() });
    }

    #[test]
    fn responses_are_those_of_the_node_package() {
        let response = Response::decode(&bytes("00010568656c6c6f")).unwrap();
        assert_eq!(response, Response { id: 1, result: Ok("\u{5}hello".into()) });
    }

    #[test]
    fn errors_are_those_of_the_node_package() {
        let mut thrown = Cause::new("it broke", "E_BROKE");
        thrown.context = "ctx".to_owned();
        let errors = [
            (
                "0f020e52657175657374206661696c65640d524551554553545f4552524f520869742062726f6b6507455f42524f4b4503637478",
                2,
                RemoteError::failed(thrown),
            ),
            (
                "07030e52657175657374206661696c65640d524551554553545f4552524f52076e6f20636f646500",
                3,
                RemoteError::failed(Cause::new("no code", "")),
            ),
            (
                "03fd2c0115556e6b6e6f776e206d6574686f6420276e6f6e65270e554e4b4e4f574e5f4d4554484f44",
                300,
                RemoteError::unknown_method("none"),
            ),
            (
                "070518436f756c64206e6f74206465636f646520726571756573740c4445434f44455f4552524f520d4f7574206f6620626f756e647300",
                5,
                RemoteError::not_decoded(Cause::new("Out of bounds", "")),
            ),
        ];
        for (sent, id, error) in errors {
            assert_eq!(hex::encode(encode_error(id, &error)), sent);
            assert_eq!(Response::decode(&bytes(sent)).unwrap(), Response { id, result: Err(Box::new(error)) });
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(message: Vec<u8>) {
            let message = Bytes::from(message);
            let _ = Request::decode(&message);
            let _ = Response::decode(&message);
        }

        #[test]
        fn errors_survive_the_way(
            id in 1_u64..1 << 53, message: String, code: String, cause: Option<(String, String, String)>,
        ) {
            let cause = cause.map(|(message, code, context)| Cause { message, code, context });
            let error = RemoteError { message, code, cause };
            let decoded = Response::decode(&encode_error(id, &error).into()).unwrap();
            prop_assert_eq!(decoded, Response { id, result: Err(Box::new(error)) });
        }
    }
}

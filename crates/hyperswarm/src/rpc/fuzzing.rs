//! Fuzzing entry point: the decoders of requests and responses.

use bytes::Bytes;

use super::codec::{Request, Response, encode_error};
use super::{decode_buffer, decode_string};

/// Decodes a message as either kind. A decoded error is encoded and decoded again.
pub fn read(message: &[u8]) {
    let message = Bytes::copy_from_slice(message);
    if let Ok(request) = Request::decode(&message) {
        assert!(std::str::from_utf8(&request.method).is_ok());
        let _ = (decode_buffer(&request.value), decode_string(&request.value));
    }
    if let Ok(Response { id, result: Err(error) }) = Response::decode(&message) {
        let again = Response::decode(&encode_error(id, &error).into());
        assert_eq!(again, Ok(Response { id, result: Err(error) }));
    }
}

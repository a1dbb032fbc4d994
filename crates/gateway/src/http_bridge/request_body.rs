//! Reads request bodies, with limits on their length and time.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use protocol::{ErrorCode, WireError};
use tokio::time;

/// How much of a refused request's body is read, so that its sender gets to see the response.
const UNWANTED_BYTES: usize = 32 * 1024 * 1024;
/// How long the body of a refused request is read.
const UNWANTED_TIME: Duration = Duration::from_millis(500);
/// The time limit for a whole body, however steadily it arrives.
const WHOLE: Duration = Duration::from_mins(5);

/// Checks the body's type, encoding and length as the headers state them.
pub(super) fn check_head(headers: &HeaderMap, bytes_max: usize) -> Result<(), WireError> {
    let refuse = |message: &str| Err(WireError::new(ErrorCode::UnsupportedMediaType, message));
    // A body without a type counts as JSON, as in llama-server and Ollama. So does one with the type that curl sends by
    // default.
    if let Some(kind) = headers.get(header::CONTENT_TYPE) {
        let essence = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
        let accepted = ["application/json", "application/x-www-form-urlencoded"];
        if !accepted.iter().any(|accepted| essence.eq_ignore_ascii_case(accepted)) {
            return refuse("the body must be JSON: send the header `Content-Type: application/json`");
        }
    }
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING)
        && !encoding.to_str().is_ok_and(|encoding| encoding.trim().eq_ignore_ascii_case("identity"))
    {
        return refuse("compressed bodies are not taken: send the body as it is, without `Content-Encoding`");
    }
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > bytes_max as u64) {
        return Err(too_large(bytes_max));
    }
    Ok(())
}

/// Reads a body of at most `bytes_max` bytes whose sender never pauses longer than `idle`.
pub(crate) async fn read(body: &mut Body, bytes_max: usize, idle: Duration) -> Result<Bytes, WireError> {
    match time::timeout(WHOLE, read_frames(body, bytes_max, idle)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(too_slow()),
    }
}

async fn read_frames(body: &mut Body, bytes_max: usize, idle: Duration) -> Result<Bytes, WireError> {
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    loop {
        let frame = match time::timeout(idle, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(_))) => return Err(WireError::new(ErrorCode::InvalidJson, "the body broke off")),
            Ok(None) => return Ok(if whole.is_empty() { first } else { whole.freeze() }),
            Err(_) => return Err(too_slow()),
        };
        let Ok(data) = frame.into_data() else { continue };
        if first.len().max(whole.len()) + data.len() > bytes_max {
            return Err(too_large(bytes_max));
        }
        // Most bodies arrive in one frame and need no copy.
        if first.is_empty() {
            first = data;
        } else {
            if whole.is_empty() {
                whole.extend_from_slice(&first);
            }
            whole.extend_from_slice(&data);
        }
    }
}

/// Reads and discards the rest of a refused request's body, because closing a connection with unread bytes can lose the
/// response. Does nothing if the client sent `Expect`, since it waits before it sends the body.
pub(super) async fn discard(mut body: Body, headers: &HeaderMap) {
    if headers.contains_key(header::EXPECT) {
        return;
    }
    let rest = async {
        let mut bytes = 0;
        while let Some(Ok(frame)) = body.frame().await {
            bytes += frame.data_ref().map_or(0, Bytes::len);
            if bytes > UNWANTED_BYTES {
                break;
            }
        }
    };
    let _ = time::timeout(UNWANTED_TIME, rest).await;
}

fn too_large(bytes_max: usize) -> WireError {
    WireError::new(ErrorCode::RequestTooLarge, format!("the body is longer than {bytes_max} bytes"))
}

fn too_slow() -> WireError {
    WireError::new(ErrorCode::RequestTimeout, "the body came too slowly")
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_body_of_no_type_is_json_and_other_types_and_encodings_are_refused() {
        for (headers, accepted) in [
            (vec![], true),
            (vec![("content-type", "application/json")], true),
            (vec![("content-type", "Application/JSON; charset=utf-8"), ("content-encoding", "identity")], true),
            (vec![("content-type", "application/x-www-form-urlencoded")], true),
            (vec![("content-type", "text/plain")], false),
            (vec![("content-type", "")], false),
            (vec![("content-encoding", "gzip")], false),
            (vec![("content-type", "application/json"), ("content-encoding", "br")], false),
        ] {
            let sent = headers.iter().map(|(name, value)| {
                (name.parse::<http::HeaderName>().expect("a name"), HeaderValue::from_static(value))
            });
            let outcome = check_head(&sent.collect(), 10);
            assert_eq!(
                outcome.err().map(|error| error.code),
                (!accepted).then_some(ErrorCode::UnsupportedMediaType),
                "{headers:?}"
            );
        }
    }
}

//! Reads the headers by which a client repeats a request or resumes a stream.

use http::{Extensions, HeaderMap, HeaderName, HeaderValue};
use protocol::{Digest, ErrorCode, RetryToken, WireError};
use utoipa::IntoParams;

use crate::answer::EventId;
use crate::repeats::{ConnectionEnd, Repeat, SdkCall};

pub(super) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const SDK_RETRY_COUNT: &str = "x-stainless-retry-count";
/// The longest idempotency key, in bytes.
const KEY_BYTES_MAX: usize = 255;

/// The headers of a request that runs a job, for the API's description.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct RepeatHeaders {
    /// A key of the client's choice for this request, 1 to 255 visible ASCII characters. A repeat with the same key and
    /// body, within 24 hours by default, gets the same answer; the request runs once. A finished answer comes with
    /// `Idempotency-Replayed: true`. Another body under the key gets status 422.
    #[param(rename = "Idempotency-Key", min_length = 1, max_length = 255, pattern = "^[!-~]+$")]
    idempotency_key: Option<String>,
    /// With an `Idempotency-Key`: the `id` of the last event of the stream that the client has. The stream continues
    /// after it.
    #[param(rename = "Last-Event-ID")]
    last_event_id: Option<String>,
    /// How urgent the request is: `interactive`, `standard` or `batch`. Under load, urgent requests run first.
    #[param(rename = "x-tether-class")]
    class: Option<String>,
}

/// Reads what a request says of repeats.
pub(super) fn read(headers: &HeaderMap, extensions: &Extensions) -> Result<Repeat, WireError> {
    let key = only(headers, &IDEMPOTENCY_KEY)?.map(|value| retry_token(value.as_bytes())).transpose()?;
    let count = headers.get(SDK_RETRY_COUNT).and_then(|count| count.to_str().ok()?.trim().parse::<u32>().ok());
    let sdk = count.zip(extensions.get::<ConnectionEnd>()).map(|(count, end)| {
        let connection = end.clone();
        SdkCall { is_retry: count > 0, connection }
    });
    Ok(Repeat { key, sdk })
}

/// Returns the value of a header that may be there once.
pub(super) fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a HeaderValue>, WireError> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    if values.next().is_some() {
        return Err(WireError::new(ErrorCode::InvalidValue, format!("{name} is given more than once")));
    }
    Ok(first)
}

/// Returns the retry token that stands for an idempotency key. Only the digest of the key goes further.
fn retry_token(key: &[u8]) -> Result<RetryToken, WireError> {
    // The draft of the header has a string in quotes, and most clients send none.
    let key = key.trim_ascii();
    let key = key.strip_prefix(b"\"").and_then(|key| key.strip_suffix(b"\"")).unwrap_or(key);
    let token = format!("idempotency-key:{}", Digest::of(key)).parse();
    let is_good = (1..=KEY_BYTES_MAX).contains(&key.len()) && key.iter().all(|byte| matches!(byte, b' '..=b'~'));
    token.ok().filter(|_| is_good).ok_or_else(|| {
        let message = format!("Idempotency-Key must be 1 to {KEY_BYTES_MAX} visible ASCII characters");
        WireError::new(ErrorCode::InvalidValue, message).with_param("Idempotency-Key")
    })
}

/// Reads the id of the last event that the client has of a stream.
pub(super) fn last_event_id(headers: &HeaderMap) -> Result<Option<EventId>, WireError> {
    let Some(value) = only(headers, &LAST_EVENT_ID)? else { return Ok(None) };
    let invalid = |message| Err(WireError::new(ErrorCode::InvalidValue, message).with_param("Last-Event-ID"));
    if !headers.contains_key(IDEMPOTENCY_KEY) {
        return invalid("Last-Event-ID resumes a stream that was begun with an Idempotency-Key; send both");
    }
    match value.to_str().ok().and_then(|value| EventId::parse(value.trim())) {
        Some(id) => Ok(Some(id)),
        None => invalid("Last-Event-ID must be the id of an event of this stream, as 1700000000000-17"),
    }
}

#[cfg(test)]
mod tests {
    use protocol::UnixMillis;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn a_key_becomes_a_token_that_does_not_tell_it() {
        let token = |key| read(&headers(&[("idempotency-key", key)]), &Extensions::new()).map(|repeat| repeat.key);
        let plain = token("order 17").expect("good").expect("there is one");
        assert_eq!(token("\"order 17\"").expect("good"), Some(plain.clone()));
        assert_ne!(token("order 18").expect("good"), Some(plain.clone()));
        assert!(!plain.as_str().contains("order"));
        assert!(read(&HeaderMap::new(), &Extensions::new()).expect("good").key.is_none());
        let long: &'static str = "x".repeat(KEY_BYTES_MAX + 1).leak();
        for bad in ["", "\"\"", "tab\tbed", long] {
            let error = token(bad).expect_err("malformed");
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidValue, Some("Idempotency-Key")));
        }
    }

    #[test]
    fn a_header_that_is_there_twice_is_refused() {
        let mut twice = headers(&[("idempotency-key", "a")]);
        twice.append(IDEMPOTENCY_KEY, HeaderValue::from_static("b"));
        assert_eq!(read(&twice, &Extensions::new()).expect_err("refused").code, ErrorCode::InvalidValue);
    }

    #[test]
    fn only_a_stream_with_a_key_is_resumed() {
        let key = ("idempotency-key", "k");
        assert_eq!(last_event_id(&headers(&[key])), Ok(None));
        assert_eq!(
            last_event_id(&headers(&[key, ("last-event-id", "5-7")])),
            Ok(Some(EventId { created_at: UnixMillis(5), seq: 7 }))
        );
        for bad in [&[("last-event-id", "5-7")][..], &[key, ("last-event-id", "7")], &[key, ("last-event-id", "5-")]] {
            assert_eq!(last_event_id(&headers(bad)).expect_err("refused").param.as_deref(), Some("Last-Event-ID"));
        }
    }

    #[test]
    fn a_request_of_an_sdk_is_known_by_its_retry_count() {
        let mut extensions = Extensions::new();
        extensions.insert(ConnectionEnd::default());
        let retry = |count: &'static str| {
            let sdk = read(&headers(&[("x-stainless-retry-count", count)]), &extensions).expect("good").sdk;
            sdk.map(|sdk| sdk.is_retry)
        };
        assert_eq!(["0", "1", "2", "x"].map(retry), [Some(false), Some(true), Some(true), None]);
    }
}

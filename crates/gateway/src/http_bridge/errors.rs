//! Builds JSON and error responses with their headers.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::response::IntoResponse;
use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use protocol::quota::QuotaState;
use protocol::{CorrelationId, ErrorCode, UnixMillis, WireError};
use rpc::rate_limit::{Quota, Verdict};
use serde::Serialize;
use utoipa::openapi::{self, ContentBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{IntoResponses, ToSchema};

use crate::anthropic::response::error as anthropic;
use crate::ollama::response as ollama;
use crate::openai::response::error::{self, ErrorBody};
use crate::request_context::RequestContext;

/// Carries the id of the request, or of its job.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// `Retry-After` of retryable errors that specify no wait.
const DEFAULT_WAIT_MS: u64 = 1000;

/// Builds the response for an error. It contains the error as well, for [`super::dialect`].
pub(super) fn failure(error: &WireError) -> Response<Body> {
    let mut body = BytesMut::new();
    error::write(error, &mut body);
    let mut response = Response::new(Body::from(body.freeze()));
    *response.status_mut() =
        StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    match error.code.http_status() {
        401 => {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        408 => {
            // The rest of a slow body is not read.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        _ => {}
    }
    // Official SDKs may retry any error unless the response forbids it.
    if error.code.http_status() == 403 || !error.should_retry() {
        headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
    }
    if let Some(wait) = wait_ms(error) {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.div_ceil(1000)));
        headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(wait));
    }
    response.extensions_mut().insert(error.clone());
    response
}

/// The error of a request that is not a job.
pub(super) struct ApiError(WireError);

impl From<WireError> for ApiError {
    fn from(error: WireError) -> Self {
        Self(error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        failure(&self.0)
    }
}

/// The meaning of each status, for endpoints that need an API key.
const STATUSES: [(u16, &str); 14] = [
    (400, "The request is invalid or asks for something unsupported; `param` names the field."),
    (401, "The API key is missing, wrong, revoked or expired."),
    (403, "The API key does not allow this operation."),
    (404, "The model or job does not exist."),
    (408, "The client sent the body too slowly."),
    (409, "The job of this idempotency key is running, and its answer cannot be read from the beginning."),
    (413, "The body is larger than allowed."),
    (415, "The body is not JSON."),
    (422, "The idempotency key belongs to another request, or the answer of its job is not kept."),
    (429, "A limit is reached: `param` names it, and `Retry-After` says when to try again, if that is soon."),
    (500, "Tether has a defect."),
    (502, "The workers that tried the job failed."),
    (503, "No worker has capacity, or a part of the network does not respond; `Retry-After` says when to try again."),
    (504, "The deadline passed before the answer began."),
];

impl IntoResponses for ApiError {
    fn responses() -> BTreeMap<String, RefOr<openapi::Response>> {
        describe(STATUSES, &ErrorBody::name())
    }
}

/// The errors of Anthropic's API, for its description.
pub(super) struct MessageError;

impl IntoResponses for MessageError {
    fn responses() -> BTreeMap<String, RefOr<openapi::Response>> {
        describe(
            STATUSES.map(|(status, meaning)| (anthropic::status_here(status), meaning)),
            &anthropic::ErrorBody::name(),
        )
    }
}

/// The errors of Ollama's API, for its description.
pub(super) struct OllamaError;

impl IntoResponses for OllamaError {
    fn responses() -> BTreeMap<String, RefOr<openapi::Response>> {
        describe(STATUSES, &ollama::ErrorBody::name())
    }
}

/// The errors of endpoints that both APIs have, for their description.
pub(super) struct EitherError;

/// The body of an error, in the format of the client's API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) enum EitherBody {
    OpenAi(ErrorBody<'static>),
    Anthropic(anthropic::ErrorBody<'static>),
}

impl IntoResponses for EitherError {
    fn responses() -> BTreeMap<String, RefOr<openapi::Response>> {
        let overloaded = STATUSES.into_iter().filter(|(status, _)| *status == 503);
        let overloaded = overloaded.map(|(status, meaning)| (anthropic::status_here(status), meaning));
        describe(STATUSES.into_iter().chain(overloaded), &EitherBody::name())
    }
}

/// Describes errors with a body of this name.
fn describe(
    statuses: impl IntoIterator<Item = (u16, &'static str)>,
    body: &str,
) -> BTreeMap<String, RefOr<openapi::Response>> {
    let body = || ContentBuilder::new().schema(Some(Ref::from_schema_name(body))).build();
    let response = |meaning| ResponseBuilder::new().description(meaning).content("application/json", body()).into();
    statuses.into_iter().map(|(status, meaning)| (status.to_string(), response(meaning))).collect()
}

/// Builds the response for an error, with the request's id.
pub(super) fn refuse(context: RequestContext, error: &WireError) -> Response<Body> {
    with_request(failure(error), context.correlation_id)
}

/// Returns how long a client should wait before it retries, if it should retry.
fn wait_ms(error: &WireError) -> Option<u64> {
    let retryable = matches!(error.code.http_status(), 409 | 429 | 503) && error.should_retry();
    error.retry_after_ms.or(retryable.then_some(DEFAULT_WAIT_MS)).map(|wait| wait.clamp(1, 120_000))
}

/// Adds the request's id.
pub(super) fn with_request(mut response: Response<Body>, request: CorrelationId) -> Response<Body> {
    response.headers_mut().insert(REQUEST_ID, text(&request.to_string()));
    response
}

/// Adds the state of the tenant's rate limit.
pub(super) fn add_rate(headers: &mut HeaderMap, rate: &Verdict) {
    if rate.limit == Quota::UNLIMITED.per_minute {
        return;
    }
    let mut set = |name: &'static str, value: HeaderValue| headers.insert(HeaderName::from_static(name), value);
    set("x-ratelimit-limit-requests", HeaderValue::from(rate.limit));
    set("x-ratelimit-remaining-requests", HeaderValue::from(rate.remaining));
    set("x-ratelimit-reset-requests", text(&openai_duration(rate.reset.as_millis() as u64)));
}

/// Adds the state of the tenant's token limit, if the rule limits tokens.
pub(super) fn add_token_quota(headers: &mut HeaderMap, quota: &QuotaState, now: UnixMillis) {
    let (Some(limit), Some(left)) = (quota.limit.filter(|_| quota.rule.is_of_tokens()), quota.left()) else { return };
    let reset = quota.resets_at.map(|end| end.since(now)).unwrap_or_default();
    let mut set = |name: &'static str, value: HeaderValue| headers.insert(HeaderName::from_static(name), value);
    set("x-ratelimit-limit-tokens", HeaderValue::from(limit));
    set("x-ratelimit-remaining-tokens", HeaderValue::from(left));
    set("x-ratelimit-reset-tokens", text(&openai_duration(reset.as_millis() as u64)));
}

/// Formats a duration as OpenAI does: `12ms`, `1s`, `6m0s`.
fn openai_duration(millis: u64) -> String {
    let (minutes, seconds) = (millis / 60_000, millis % 60_000 / 1000);
    match millis {
        0..1000 => format!("{millis}ms"),
        1000..60_000 if millis.is_multiple_of(1000) => format!("{seconds}s"),
        1000..60_000 => format!("{seconds}.{:03}s", millis % 1000),
        _ => format!("{minutes}m{seconds}s"),
    }
}

/// Converts text to a header value. The text must be our own or checked to be visible ASCII.
pub(super) fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Builds a JSON response.
pub(super) fn json<T: Serialize>(value: &T) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(body) => {
            let mut response = Response::new(Body::from(body));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(_) => failure(&WireError::new(ErrorCode::InternalError, "the answer could not be written")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_code_brings_the_headers_of_its_row() {
        let headers = |code| failure(&WireError::new(code, "x")).headers().clone();
        assert_eq!(headers(ErrorCode::InvalidApiKey)["www-authenticate"], "Bearer");
        for code in [ErrorCode::ModelNotAllowed, ErrorCode::RequestCrashesEngine, ErrorCode::InsufficientQuota] {
            assert_eq!(headers(code)["x-should-retry"], "false");
            assert!(!headers(code).contains_key("retry-after"), "{code}");
        }
        for code in [ErrorCode::NoCapacity, ErrorCode::RateLimitExceeded, ErrorCode::IdempotencyInProgress] {
            assert_eq!(headers(code)["retry-after"], "1");
            assert_eq!(headers(code)["retry-after-ms"], "1000");
        }
        assert!(!headers(ErrorCode::InvalidJson).contains_key("retry-after"));
    }

    #[test]
    fn waits_are_rounded_up_to_seconds_and_bounded() {
        let retry_after = |wait| {
            let error = WireError::new(ErrorCode::NoCapacity, "full").with_retry_after(wait);
            failure(&error).headers()["retry-after"].clone()
        };
        assert_eq!(retry_after(Duration::from_millis(1001)), "2");
        assert_eq!(retry_after(Duration::from_hours(1)), "120");
        assert_eq!(retry_after(Duration::ZERO), "1");
    }

    #[test]
    fn durations_read_as_openai_writes_them() {
        let written: Vec<_> = [12, 1000, 1500, 360_000, 61_000].map(openai_duration).to_vec();
        assert_eq!(written, ["12ms", "1s", "1.500s", "6m0s", "1m1s"]);
    }
}

//! Axum extractors for what handlers need besides the body: context, API token and path segment.

use std::convert::Infallible;
use std::fmt::Display;
use std::net::SocketAddr;
use std::str::FromStr;

use axum::extract::{FromRequestParts, Path};
use http::request::Parts;
use http::{Extensions, HeaderMap, header};
use protocol::{CorrelationId, ErrorCode, TraceId, WireError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::errors::ApiError;
use crate::gateway::Gateway;
use crate::request_context::RequestContext;

/// State that all routes share.
#[derive(Clone)]
pub(super) struct Bridge {
    pub(super) gateway: Gateway,
    /// Cancelled once the gateway is asked to stop.
    pub(super) stop: CancellationToken,
}

/// Returns the context of a request.
pub(super) fn context(extensions: &Extensions) -> RequestContext {
    // Every request gets a context when it arrives. If it is missing, a blank one is better than a panic.
    extensions.get().copied().unwrap_or_else(|| RequestContext {
        correlation_id: CorrelationId(uuid::Uuid::nil()),
        trace_id: TraceId([0; 16]),
        origin: None,
        received: Instant::now(),
    })
}

/// The context and token of a request whose body is not read.
pub(super) struct Inquiry {
    pub(super) context: RequestContext,
    pub(super) token: Option<String>,
}

/// The address at which a request arrived.
#[derive(Debug, Clone, Copy)]
pub(super) struct ArrivedAt(pub(super) SocketAddr);

/// A path parameter.
pub(super) struct Segment(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let segment = Path::<String>::from_request_parts(parts, state).await;
        segment.map(|Path(text)| Self(text)).map_err(|_| {
            let message = "the path is not UTF-8 once its percent signs are decoded";
            WireError::new(ErrorCode::NotFound, message).into()
        })
    }
}

impl<S: Sync> FromRequestParts<S> for Inquiry {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let token = token(&parts.headers).map(str::to_owned);
        Ok(Self { context: context(&parts.extensions), token })
    }
}

/// The query of a request. Values are compared as they are: those that lists take need no percent signs.
pub(super) struct Query(pub(super) String);

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(parts.uri.query().unwrap_or_default().to_owned()))
    }
}

impl Query {
    /// Returns a parameter, or `None` if it is not given.
    pub(super) fn get<T: FromStr<Err: Display>>(&self, name: &'static str) -> Result<Option<T>, WireError> {
        let given = self.0.split('&').filter_map(|part| part.split_once('=')).find(|(found, _)| *found == name);
        let Some((_, value)) = given else { return Ok(None) };
        value.parse().map(Some).map_err(|error| {
            WireError::new(ErrorCode::InvalidValue, format!("{name} has an invalid value: {error}")).with_param(name)
        })
    }
}

/// Returns the API token from `Authorization: Bearer`, or else from `X-Api-Key`; `None` if neither header is present.
/// Another scheme, or a value that is not text, gives an empty token, which counts as a failed authentication attempt.
pub(super) fn token(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).map(|value| {
        let value = value.to_str().unwrap_or_default();
        match value.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => "",
        }
    });
    bearer.or_else(|| headers.get("x-api-key").map(|value| value.to_str().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn token_of(name: &'static str, value: &'static str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_static(value));
        token(&headers).map(str::to_owned)
    }

    #[test]
    fn a_token_comes_in_either_of_two_headers() {
        assert_eq!(token_of("authorization", "Bearer abc").as_deref(), Some("abc"));
        assert_eq!(token_of("authorization", "bearer  abc ").as_deref(), Some("abc"));
        assert_eq!(token_of("x-api-key", "abc").as_deref(), Some("abc"));
        assert_eq!(token_of("authorization", "Basic abc").as_deref(), Some(""));
        assert_eq!(token_of("x-other", "abc"), None);
    }
}

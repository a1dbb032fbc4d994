//! The dialect of a request: the API whose clients send it. It determines the shape of error responses.
//!
//! Handlers build errors in OpenAI's format and leave the error itself in the response. Here it is written again in
//! the format of another dialect, so that also unknown paths and refused connections come out right.

use axum::body::Body;
use axum::extract::FromRequestParts;
use bytes::BytesMut;
use http::request::Parts;
use http::{HeaderMap, HeaderName, Response, StatusCode, header};
use protocol::WireError;
use std::convert::Infallible;

use super::errors::{self, REQUEST_ID};
use crate::anthropic::response::error::{self as anthropic, ErrorBody};
use crate::ollama::response as ollama;

/// Every client of Anthropic's API sends this header.
pub(super) const ANTHROPIC_VERSION: &str = "anthropic-version";
/// Anthropic's name of [`REQUEST_ID`].
pub(super) const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// An API that clients speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// OpenAI's, and Tether's own, which has the same errors.
    OpenAi,
    Anthropic,
    Ollama,
}

impl Dialect {
    pub(super) fn of(path: &str, headers: &HeaderMap) -> Self {
        let is_messages =
            path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if path.starts_with("/api/") {
            Self::Ollama
        } else if is_messages || headers.contains_key(ANTHROPIC_VERSION) {
            Self::Anthropic
        } else {
            Self::OpenAi
        }
    }

    /// Gives a response the shape that clients of this dialect expect.
    pub(super) fn shape(self, response: Response<Body>) -> Response<Body> {
        match self {
            Self::OpenAi => response,
            Self::Anthropic => shape_anthropic(response),
            Self::Ollama => shape_ollama(response),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Dialect {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::of(parts.uri.path(), &parts.headers))
    }
}

fn shape_anthropic(mut response: Response<Body>) -> Response<Body> {
    if let Some(id) = response.headers().get(REQUEST_ID).cloned() {
        response.headers_mut().insert(ANTHROPIC_REQUEST_ID, id);
    }
    let Some(error) = response.extensions_mut().remove::<WireError>() else { return response };
    let (mut parts, _) = response.into_parts();
    let id = parts.headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let body = errors::json(&ErrorBody::of(&error, id)).into_body();
    parts.status = StatusCode::from_u16(anthropic::status(error.code)).unwrap_or(parts.status);
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, body)
}

fn shape_ollama(mut response: Response<Body>) -> Response<Body> {
    let Some(error) = response.extensions_mut().remove::<WireError>() else { return response };
    let mut body = BytesMut::new();
    ollama::write_error(&error, &mut body);
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response.map(|_| Body::from(body.freeze()))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use http_body_util::BodyExt as _;
    use protocol::ErrorCode;

    use super::*;

    #[test]
    fn a_dialect_is_known_by_its_path_or_its_header() {
        let none = HeaderMap::new();
        let mut versioned = HeaderMap::new();
        versioned.insert(ANTHROPIC_VERSION, HeaderValue::from_static("2023-06-01"));
        for (path, headers, expected) in [
            ("/v1/messages", &none, Dialect::Anthropic),
            ("/v1/messages/count_tokens", &none, Dialect::Anthropic),
            ("/v1/messages2", &none, Dialect::OpenAi),
            ("/v1/models", &none, Dialect::OpenAi),
            ("/v1/models", &versioned, Dialect::Anthropic),
            ("/v1/chat/completions", &none, Dialect::OpenAi),
            ("/api/chat", &none, Dialect::Ollama),
            ("/api/nothing", &versioned, Dialect::Ollama),
            ("/apiary", &none, Dialect::OpenAi),
        ] {
            assert_eq!(Dialect::of(path, headers), expected, "{path}");
        }
    }

    #[tokio::test]
    async fn an_error_is_written_again_and_its_headers_stay() {
        let mut response = errors::failure(&WireError::new(ErrorCode::NoCapacity, "full"));
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("9"));
        response.headers_mut().insert(REQUEST_ID, HeaderValue::from_static("abc"));
        let (parts, body) = Dialect::Anthropic.shape(response).into_parts();
        assert_eq!((parts.status.as_u16(), &parts.headers["retry-after"]), (529, &HeaderValue::from_static("1")));
        assert_eq!(parts.headers["request-id"], "abc");
        assert!(!parts.headers.contains_key(header::CONTENT_LENGTH));
        let body = body.collect().await.expect("infallible").to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!((&body["error"]["type"], &body["request_id"]), (&"overloaded_error".into(), &"abc".into()));
    }

    #[test]
    fn other_responses_keep_their_status_and_body() {
        let response = Dialect::Anthropic.shape(errors::json(&1));
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/json");
        assert_eq!(
            Dialect::OpenAi.shape(errors::failure(&WireError::new(ErrorCode::NoCapacity, "full"))).status(),
            503
        );
    }
}

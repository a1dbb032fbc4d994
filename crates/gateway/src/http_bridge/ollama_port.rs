//! The address for clients of Ollama, which have no API key.

use std::net::{IpAddr, SocketAddr};

use axum::body::Body;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use tokio::net::TcpListener;

use super::{GatewayError, listen};
use crate::config::Config;
use crate::gateway::Gateway;

/// Binds the address. Without keys it must be one that only this machine reaches.
pub(super) async fn bind(address: SocketAddr, config: &Config) -> Result<TcpListener, GatewayError> {
    if !config.ollama_needs_key && !address.ip().is_loopback() {
        return Err(GatewayError::OpenToOthers { address });
    }
    let (listener, address) = listen(address).await?;
    tracing::info!(%address, "serving clients of Ollama");
    Ok(listener)
}

/// Returns whether a client looks whether Ollama is there.
pub(super) fn is_greeting<B>(request: &Request<B>) -> bool {
    [Method::GET, Method::HEAD].contains(request.method()) && request.uri().path() == "/"
}

/// Says what Ollama's clients look for.
pub(super) fn greet() -> Response<Body> {
    let mut response = Response::new(Body::from("Ollama is running"));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Gives a request without a key this machine's own, unless keys are needed. Requests of web pages get none.
pub(super) async fn add_key<B>(request: &mut Request<B>, gateway: &Gateway) {
    let config = gateway.config();
    if config.ollama_needs_key || !may_go_without(request.headers(), request.uri().path(), &config.cors_origins) {
        return;
    }
    let Some(file) = gateway.api_key_file() else { return };
    let key = tokio::fs::read_to_string(file).await.unwrap_or_default();
    if let Ok(bearer) = HeaderValue::from_str(&format!("Bearer {}", key.trim())) {
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
    }
}

/// Returns whether a request may go without a key. It must be for a model, and from a program on this machine: a page
/// of the web names its origin, and one whose name was changed to mean this machine names a foreign host.
fn may_go_without(headers: &HeaderMap, path: &str, origins: &[String]) -> bool {
    let has_key = headers.contains_key(header::AUTHORIZATION) || headers.contains_key("x-api-key");
    let is_for_models = path.starts_with("/api/") || path.starts_with("/v1/");
    !has_key && is_for_models && is_local(headers) && comes_from(headers, origins)
}

fn is_local(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    host.is_none_or(|host| {
        let name = host.host().trim_matches(['[', ']']);
        name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    })
}

fn comes_from(headers: &HeaderMap, origins: &[String]) -> bool {
    let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    origin.is_none_or(|origin| origins.iter().any(|known| known == origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may(headers: &[(&'static str, &'static str)], path: &str) -> bool {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.parse::<http::HeaderName>().expect("a name"), HeaderValue::from_static(value)));
        may_go_without(&headers.collect(), path, &["https://app.example.com".to_owned(), "*".to_owned()])
    }

    #[test]
    fn only_programs_of_this_machine_go_without_a_key() {
        for host in ["127.0.0.1:11434", "localhost:11434", "LOCALHOST", "[::1]:11434"] {
            assert!(may(&[("host", host)], "/api/chat"), "{host}");
        }
        for host in ["evil.example.com", "127.0.0.1.example.com", "192.168.1.7", "a b", ""] {
            assert!(!may(&[("host", host)], "/api/chat"), "{host}");
        }
        assert!(may(&[("host", "localhost"), ("origin", "https://app.example.com")], "/v1/models"));
        assert!(!may(&[("host", "localhost"), ("origin", "https://evil.example.com")], "/api/chat"));
        assert!(!may(&[("host", "localhost"), ("origin", "null")], "/api/chat"));
    }

    #[test]
    fn a_key_that_is_given_counts_and_operators_need_one() {
        assert!(!may(&[("authorization", "Bearer x")], "/api/chat"));
        assert!(!may(&[("x-api-key", "x")], "/api/chat"));
        for path in ["/admin/v1/models", "/infer", "/metrics", "/apix"] {
            assert!(!may(&[], path), "{path}");
        }
    }
}

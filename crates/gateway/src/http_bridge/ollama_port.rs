//! The address for clients of Ollama, which have no API key.

use std::net::{IpAddr, SocketAddr};

use axum::body::Body;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use protocol::token::ApiToken;
use tokio::net::TcpListener;
use tracing::{info, warn};

use super::client_address::{is_direct, is_proxy};
use super::extract::token;
use super::{GatewayError, listen};
use crate::config::Config;
use crate::gateway::Gateway;

/// Binds the address. Without keys it must be one that only this machine reaches.
pub(super) async fn bind(address: SocketAddr, config: &Config) -> Result<TcpListener, GatewayError> {
    if !config.ollama_needs_key && !address.ip().is_loopback() {
        return Err(GatewayError::OpenToOthers { address });
    }
    let (listener, address) = listen(address).await?;
    info!(%address, "serving clients of Ollama");
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

/// Gives a request without a key this machine's own, unless keys are needed. Requests of web pages and of proxies get
/// none.
pub(super) async fn add_key<B>(request: &mut Request<B>, peer: IpAddr, gateway: &Gateway) {
    let config = gateway.config();
    if config.ollama_needs_key || is_proxy(peer, &config.trusted_proxies) || !may_go_without(request, config) {
        return;
    }
    let Some(file) = gateway.api_key_file() else { return };
    match tokio::fs::read_to_string(file).await {
        Ok(key) => set_key(request.headers_mut(), key.trim()),
        Err(error) => warn!(file = %file.display(), %error, "could not read the key for clients without one"),
    }
}

fn set_key(headers: &mut HeaderMap, key: &str) {
    let bearer = HeaderValue::from_str(&format!("Bearer {key}")).ok().filter(|_| !key.is_empty());
    if let Some(bearer) = bearer {
        headers.remove("x-api-key");
        headers.insert(header::AUTHORIZATION, bearer);
    }
}

/// Returns whether a request may go without a key. It must be for a model, and from a program on this machine: a page
/// of the web names its origin, and one whose name was changed to mean this machine names a foreign host.
fn may_go_without<B>(request: &Request<B>, config: &Config) -> bool {
    let (headers, uri) = (request.headers(), request.uri());
    let is_for_models = ["/api/", "/v1/"].iter().any(|prefix| uri.path().starts_with(prefix));
    let is_direct = is_direct(headers, uri.authority(), |address| address.is_loopback());
    !has_key(headers) && is_for_models && is_direct && comes_from(headers, &config.cors_origins)
}

/// Returns whether a request shows a key. Programs that cannot do without one send some word, such as `ollama`.
fn has_key(headers: &HeaderMap) -> bool {
    token(headers).is_some_and(|token| token.parse::<ApiToken>().is_ok())
}

fn comes_from(headers: &HeaderMap, origins: &[String]) -> bool {
    let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    origin.is_none_or(|origin| origins.iter().any(|known| known == origin))
}

#[cfg(test)]
mod tests {
    use protocol::token::{RANDOM_BYTES, TokenKind};

    use super::*;

    fn may(headers: &[(&'static str, &'static str)], path: &str) -> bool {
        let mut request = Request::builder().uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let origins = vec!["https://app.example.com".to_owned(), "*".to_owned()];
        let config = Config { cors_origins: origins, ..Config::default() };
        may_go_without(&request.body(()).expect("a request"), &config)
    }

    #[test]
    fn only_programs_of_this_machine_go_without_a_key() {
        for host in ["127.0.0.1:11434", "localhost:11434", "LOCALHOST", "[::1]:11434"] {
            assert!(may(&[("host", host)], "/api/chat"), "{host}");
        }
        for host in ["evil.example.com", "127.0.0.1.example.com", "192.168.1.7", "a{b.example.com", "a b", ""] {
            assert!(!may(&[("host", host)], "/api/chat"), "{host}");
        }
        assert!(!may(&[], "http://evil.example.com/api/chat"), "HTTP/2 names the host here");
        assert!(may(&[("host", "localhost"), ("origin", "https://app.example.com")], "/v1/models"));
        assert!(!may(&[("host", "localhost"), ("origin", "https://evil.example.com")], "/api/chat"));
        assert!(!may(&[("host", "localhost"), ("origin", "null")], "/api/chat"));
        for header in ["x-forwarded-for", "forwarded", "via", "x-real-ip"] {
            assert!(!may(&[("host", "localhost"), (header, "203.0.113.9")], "/api/chat"), "a proxy passed it on");
        }
    }

    #[test]
    fn a_key_that_is_given_counts_and_operators_need_one() {
        let key = ApiToken::generate(TokenKind::Live, &[7; RANDOM_BYTES]).to_string();
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", HeaderValue::from_str(&key).expect("a header"));
        assert!(has_key(&headers));
        set_key(&mut headers, "tth_own");
        assert_eq!(
            (headers.get("x-api-key"), &headers["authorization"]),
            (None, &"Bearer tth_own".parse().expect("it"))
        );
        for word in ["Bearer ollama", "Bearer ", "Basic eDp5"] {
            assert!(may(&[("authorization", word)], "/api/chat"), "{word} is no key");
        }
        for path in ["/admin/v1/models", "/infer", "/metrics", "/apix"] {
            assert!(!may(&[], path), "{path}");
        }
    }
}

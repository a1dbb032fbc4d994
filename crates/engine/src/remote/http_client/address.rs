//! Where a server is.

use std::fmt;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Uri, header};
use http_body_util::Full;

use super::HttpError;

/// The address of a server, and its API key if it needs one.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerAddress {
    root: String,
    /// Host and port, as they are connected to.
    pub(super) socket: String,
    /// The same as a client names them in its requests.
    host: HeaderValue,
    /// What precedes the path of each request.
    folder: String,
    api_key: Option<String>,
}

/// Why an address is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The address is not a URL.
    #[error("it is no URL; write it as http://host:port")]
    Malformed,
    /// The address requires TLS.
    #[error("only http:// is spoken; reach a distant server through a tunnel or a proxy of your own that adds TLS")]
    Scheme,
    /// The address contains a user name or a password.
    #[error("it must hold no password; give an API key in its own file")]
    Password,
}

impl ServerAddress {
    /// Parses an address, with or without the `/v1` that OpenAI's clients expect.
    pub fn new(base_url: &str, api_key: Option<String>) -> Result<Self, AddressError> {
        let url: Uri = base_url.trim().parse().map_err(|_| AddressError::Malformed)?;
        let authority = url.authority().ok_or(AddressError::Malformed)?;
        match url.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(AddressError::Scheme),
            _ => return Err(AddressError::Malformed),
        }
        // A fragment is not part of a parsed address.
        if url.query().is_some() || base_url.contains('#') {
            return Err(AddressError::Malformed);
        }
        if authority.as_str().contains('@') {
            return Err(AddressError::Password);
        }
        let name = authority.as_str().to_ascii_lowercase();
        let host = HeaderValue::try_from(&name).map_err(|_| AddressError::Malformed)?;
        let folder = url.path().trim_end_matches('/');
        let folder = folder.strip_suffix("/v1").unwrap_or(folder).to_owned();
        let socket = if authority.port().is_some() { name.clone() } else { format!("{name}:80") };
        Ok(Self { root: format!("http://{name}{folder}"), socket, host, folder, api_key })
    }

    /// Returns the address without its key.
    pub fn as_str(&self) -> &str {
        &self.root
    }

    /// Returns a request to this server. A body is JSON.
    pub(super) fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, HttpError> {
        let target = format!("{}{path}", self.folder).parse::<Uri>().expect("paths are ours, and the rest was parsed");
        let is_json = !body.is_empty();
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = target;
        let headers = request.headers_mut();
        headers.insert(header::HOST, self.host.clone());
        headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
        if is_json {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        if let Some(key) = &self.api_key {
            let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| HttpError::BadKey)?;
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        Ok(request)
    }
}

impl fmt::Debug for ServerAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let api_key = self.api_key.as_ref().map(|_| "…");
        formatter
            .debug_struct("ServerAddress")
            .field("root", &self.root)
            .field("api_key", &api_key)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_end_as_openais_clients_write_it() {
        for text in
            ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1/"]
        {
            assert_eq!(ServerAddress::new(text, None).expect(text).as_str(), "http://127.0.0.1:8000");
        }
        assert_eq!(ServerAddress::new("http://box/llm/v1", None).expect("a path").as_str(), "http://box/llm");
    }

    #[test]
    fn a_request_names_its_host_and_goes_into_the_servers_folder() {
        for (text, socket, target, host) in [
            ("http://box/llm/v1", "box:80", "/llm/v1/models", "box"),
            ("http://Box:8000", "box:8000", "/v1/models", "box:8000"),
            ("http://[::1]/", "[::1]:80", "/v1/models", "[::1]"),
        ] {
            let address = ServerAddress::new(text, Some("sesame".into())).expect(text);
            assert_eq!(address.socket, socket);
            let request = address.request(Method::GET, "/v1/models", Bytes::new()).expect("it can be written");
            assert_eq!(request.uri().to_string(), target);
            assert_eq!(request.headers()["host"], host);
            assert_eq!(request.headers()["authorization"], "Bearer sesame");
        }
    }

    #[test]
    fn what_is_no_address_is_refused_and_keys_are_not_shown() {
        for (text, error) in [
            ("localhost:8000", AddressError::Malformed),
            ("ftp://host", AddressError::Malformed),
            ("http://host/?key=1", AddressError::Malformed),
            ("http://host/#v1", AddressError::Malformed),
            ("/v1", AddressError::Malformed),
            ("", AddressError::Malformed),
            ("https://host", AddressError::Scheme),
            ("http://me:secret@host", AddressError::Password),
        ] {
            assert_eq!(ServerAddress::new(text, None), Err(error), "{text}");
        }
        let address = ServerAddress::new("http://host", Some("sesame".into())).expect("an address");
        assert!(!format!("{address:?}").contains("sesame"));
        let broken = ServerAddress::new("http://host", Some("se\nsame".into())).expect("an address");
        assert!(matches!(broken.request(Method::GET, "/", Bytes::new()), Err(HttpError::BadKey)));
    }
}

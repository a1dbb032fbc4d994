//! An HTTP/1.1 client for servers. Every wait has a deadline, and every read has a limit.

use std::fmt;
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder, Response, Url};
use serde_json::Value;
use tokio::time::timeout;

/// The time limit for connecting to a server.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// The maximum length of a response that describes something.
const DESCRIPTION_BYTES_MAX: usize = 4 << 20;

/// The address of a server, and its API key if it needs one.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerAddress {
    root: String,
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

/// Why a request to a server failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    #[error("the server cannot be reached")]
    Unreachable,
    #[error("the server took too long")]
    TooSlow,
    #[error("the connection to the server broke: {0}")]
    Broken(reqwest::Error),
    #[error("the server's answer is too long")]
    TooLong,
    #[error("the server does not list models as OpenAI's API does")]
    NoModels,
    #[error("the server answered {status}")]
    Refused { status: u16, body: Vec<u8> },
}

/// A client for any number of servers.
#[derive(Debug, Clone)]
pub(super) struct HttpClient(Client);

impl ServerAddress {
    /// Parses an address, with or without the `/v1` that OpenAI's clients expect.
    pub fn new(base_url: &str, api_key: Option<String>) -> Result<Self, AddressError> {
        let url = Url::parse(base_url).map_err(|_| AddressError::Malformed)?;
        if url.scheme() == "https" {
            return Err(AddressError::Scheme);
        }
        if url.scheme() != "http" || url.query().is_some() || url.fragment().is_some() {
            return Err(AddressError::Malformed);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(AddressError::Password);
        }
        let root = url.as_str().trim_end_matches('/');
        Ok(Self { root: root.strip_suffix("/v1").unwrap_or(root).to_owned(), api_key })
    }

    /// Returns the address without its key.
    pub fn as_str(&self) -> &str {
        &self.root
    }
}

impl fmt::Debug for ServerAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let api_key = self.api_key.as_ref().map(|_| "…");
        formatter.debug_struct("ServerAddress").field("root", &self.root).field("api_key", &api_key).finish()
    }
}

impl HttpClient {
    pub(super) fn new() -> Self {
        // A redirect would send prompts and API key to another server, and so would a proxy from the environment.
        let client = Client::builder().connect_timeout(CONNECT_WITHIN).redirect(Policy::none()).no_proxy();
        Self(client.tcp_nodelay(true).build().expect("nothing of this depends on the machine"))
    }

    /// Requests a description with GET.
    pub(super) async fn get(&self, server: &ServerAddress, path: &str, within: Duration) -> Result<Vec<u8>, HttpError> {
        let request = self.0.get(format!("{}{path}", server.root));
        whole(signed(request, server), DESCRIPTION_BYTES_MAX, within).await
    }

    /// Sends a request and reads its response, up to `bytes_max`.
    pub(super) async fn post(
        &self,
        server: &ServerAddress,
        path: &str,
        body: &Value,
        bytes_max: usize,
        within: Duration,
    ) -> Result<Vec<u8>, HttpError> {
        let request = self.0.post(format!("{}{path}", server.root)).json(body);
        whole(signed(request, server), bytes_max, within).await
    }

    /// Requests a description with POST and a body.
    pub(super) async fn ask(
        &self,
        server: &ServerAddress,
        path: &str,
        body: &Value,
        within: Duration,
    ) -> Result<Vec<u8>, HttpError> {
        self.post(server, path, body, DESCRIPTION_BYTES_MAX, within).await
    }

    /// Sends a request and returns its response with the body unread. Dropping the future or the response closes the
    /// connection.
    pub(super) async fn open(
        &self,
        server: &ServerAddress,
        path: &str,
        body: &Value,
        within: Duration,
    ) -> Result<Response, HttpError> {
        let request = self.0.post(format!("{}{path}", server.root)).json(body);
        timeout(within, begin(signed(request, server))).await.map_err(|_| HttpError::TooSlow)?
    }
}

fn signed(request: RequestBuilder, server: &ServerAddress) -> RequestBuilder {
    match &server.api_key {
        Some(key) => request.bearer_auth(key),
        None => request,
    }
}

async fn begin(request: RequestBuilder) -> Result<Response, HttpError> {
    let response = request.send().await?;
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status().as_u16();
    // The body explains the refusal. If it cannot be read, the status alone is returned.
    let body = read(response, DESCRIPTION_BYTES_MAX).await.unwrap_or_default();
    Err(HttpError::Refused { status, body })
}

async fn whole(request: RequestBuilder, bytes_max: usize, within: Duration) -> Result<Vec<u8>, HttpError> {
    let answer = async { read(begin(request).await?, bytes_max).await };
    timeout(within, answer).await.map_err(|_| HttpError::TooSlow)?
}

async fn read(mut response: Response, bytes_max: usize) -> Result<Vec<u8>, HttpError> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await? {
        if body.len() + piece.len() > bytes_max {
            return Err(HttpError::TooLong);
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

impl From<reqwest::Error> for HttpError {
    fn from(error: reqwest::Error) -> Self {
        if error.is_connect() { Self::Unreachable } else { Self::Broken(error.without_url()) }
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
    fn what_is_no_address_is_refused_and_keys_are_not_shown() {
        for (text, error) in [
            ("localhost:8000", AddressError::Malformed),
            ("ftp://host", AddressError::Malformed),
            ("http://host/?key=1", AddressError::Malformed),
            ("https://host", AddressError::Scheme),
            ("http://me:secret@host", AddressError::Password),
        ] {
            assert_eq!(ServerAddress::new(text, None), Err(error), "{text}");
        }
        let address = ServerAddress::new("http://host", Some("sesame".into())).expect("an address");
        assert!(!format!("{address:?}").contains("sesame"));
    }
}

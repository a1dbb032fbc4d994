//! GET requests, each over a connection of its own, with redirects.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{anyhow, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::client::Trust;

/// Timeout for connecting, including name resolution and TLS.
const CONNECT: Duration = Duration::from_secs(15);
/// Timeout for the response, and for each further part of it.
const RESPONSE_TIMEOUT: Duration = Duration::from_mins(1);
/// The most redirects that are followed.
const REDIRECTS_MAX: usize = 10;
/// The longest document that is read into memory.
const DOCUMENT_BYTES_MAX: usize = 16 << 20;

/// HTTP client for downloads.
#[derive(Debug, Clone)]
pub struct Web {
    trust: Trust,
    /// Allows plain HTTP to other machines.
    is_insecure: bool,
}

/// A secret, and the server that may receive it.
#[derive(Debug, Clone)]
pub struct Credential {
    /// Scheme, host and port of the only server that receives it.
    origin: String,
    secret: String,
}

/// A response whose body has not been read.
#[derive(Debug)]
pub struct Response {
    /// Its URL, after all redirects.
    pub url: Uri,
    /// The status of the final response, which is not a redirect.
    pub status: StatusCode,
    /// The headers of the final response.
    pub headers: HeaderMap,
    body: Incoming,
    /// Drives the connection, and is dropped with the response.
    _connection: JoinSet<hyper::Result<()>>,
}

/// Why there was no response.
#[derive(Debug)]
pub enum Failure {
    /// A retry may succeed.
    Passing(anyhow::Error),
    /// The server cannot be reached.
    Unreachable(anyhow::Error),
    /// A retry would fail as well; the error says what to do.
    Lasting(anyhow::Error),
}

impl Failure {
    /// Returns the underlying error.
    pub fn into_error(self) -> anyhow::Error {
        match self {
            Self::Passing(error) | Self::Unreachable(error) | Self::Lasting(error) => error,
        }
    }
}

impl Credential {
    /// Creates a credential for one server.
    pub fn new(url: &Uri, secret: impl Into<String>) -> Self {
        Self { origin: origin(url), secret: secret.into() }
    }
}

impl Response {
    /// Returns the next bytes of the body, or `None` at its end.
    pub async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let frame = timeout(RESPONSE_TIMEOUT, self.body.frame()).await;
            let frame =
                frame.map_err(|_| io::Error::other(format!("nothing came for {} s", RESPONSE_TIMEOUT.as_secs())))?;
            match frame.transpose().map_err(io::Error::other)? {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// Reads the body to its end.
    pub async fn document(&mut self) -> io::Result<Vec<u8>> {
        let mut whole = vec![];
        while let Some(bytes) = self.chunk().await? {
            if whole.len() + bytes.len() > DOCUMENT_BYTES_MAX {
                return Err(io::Error::other("the answer has no end"));
            }
            whole.extend_from_slice(&bytes);
        }
        Ok(whole)
    }

    /// Returns a header's text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl Web {
    /// Trusts the system's CAs. Plain HTTP to other machines is refused unless it is allowed here.
    pub fn new(is_insecure: bool) -> Self {
        Self { trust: Trust::default(), is_insecure }
    }

    /// Requests a URL, and follows redirects. A credential is sent to its own server only.
    pub async fn get(
        &self,
        url: &Uri,
        credential: Option<&Credential>,
        more: &[(&'static str, String)],
    ) -> Result<Response, Failure> {
        let (first, mut url) = (url.clone(), url.clone());
        let mut seen = vec![];
        loop {
            self.check(&url).map_err(Failure::Lasting)?;
            let response = self.get_once(&url, credential, more).await?;
            let code = response.status.as_u16();
            let location = response.header("location").filter(|_| matches!(code, 301 | 302 | 303 | 307 | 308));
            let Some(location) = location else { return Ok(response) };
            let next = follow(&url, location).map_err(Failure::Lasting)?;
            seen.push(url.to_string());
            let error = if seen.contains(&next.to_string()) {
                let (from, to) = (shown(&url), shown(&next));
                anyhow!("{} sends in a circle: {from} redirects to {to}, which was asked before", host(&url))
            } else if seen.len() > REDIRECTS_MAX {
                anyhow!("{} redirects more than {REDIRECTS_MAX} times, last to {}", shown(&first), shown(&next))
            } else {
                url = next;
                continue;
            };
            return Err(Failure::Lasting(error));
        }
    }

    /// Refuses plain HTTP, which can be read and changed on the way.
    fn check(&self, url: &Uri) -> anyhow::Result<()> {
        let is_plain = url.scheme_str() == Some("http");
        ensure!(
            !is_plain || self.is_insecure || is_loopback(url),
            "{} is plain HTTP, which anybody on the way can change; use https, or allow it with --insecure",
            shown(url)
        );
        Ok(())
    }

    async fn get_once(
        &self,
        url: &Uri,
        credential: Option<&Credential>,
        more: &[(&'static str, String)],
    ) -> Result<Response, Failure> {
        let target = url.path_and_query().map_or("/", |target| target.as_str());
        let authority = url.authority().map_or("", |authority| authority.as_str());
        let mut request = Request::get(target)
            .header(header::HOST, authority)
            .header(header::USER_AGENT, concat!("tether/", env!("CARGO_PKG_VERSION")));
        for (name, value) in more {
            request = request.header(*name, value);
        }
        if let Some(credential) = credential.filter(|credential| credential.origin == origin(url)) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", credential.secret));
        }
        let request = request.body(Empty::<Bytes>::new());
        let request = request.map_err(|_| Failure::Lasting(anyhow!("the token has letters that no token has")))?;
        let stream = connect(url).await?;
        let response = if url.scheme_str() == Some("https") {
            let connector = self.trust.connector().map_err(Failure::Lasting)?;
            let name = ServerName::try_from(bare_host(url).to_owned()).map_err(|_| {
                Failure::Lasting(anyhow!("{} is not a host name that a certificate can be issued for", host(url)))
            })?;
            let secured = timeout(CONNECT, connector.connect(name, stream)).await;
            let secured = secured.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            exchange(secured.map_err(|error| insecure(url, &error))?, request).await
        } else {
            exchange(stream, request).await
        };
        let (head, body, connection) = response
            .map_err(|error| Failure::Passing(anyhow!("{} does not answer: {}", host(url), innermost(&error))))?;
        Ok(Response { url: url.clone(), status: head.status, headers: head.headers, body, _connection: connection })
    }
}

type ResponseParts = (http::response::Parts, Incoming, JoinSet<hyper::Result<()>>);

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> anyhow::Result<ResponseParts> {
    let exchanged = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let (head, body) = sender.send_request(request).await?.into_parts();
        Ok((head, body, driver))
    };
    timeout(RESPONSE_TIMEOUT, exchanged)
        .await
        .unwrap_or_else(|_| bail!("nothing came for {} s", RESPONSE_TIMEOUT.as_secs()))
}

async fn connect(url: &Uri) -> Result<TcpStream, Failure> {
    let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 });
    let found = timeout(CONNECT, lookup_host((bare_host(url), port))).await;
    let found = found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(|error| {
        Failure::Unreachable(anyhow!(
            "no address is known of {} ({error}); see that the name is right and this machine on the network",
            host(url)
        ))
    })?;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in found {
        last = match timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error,
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
    }
    Err(Failure::Unreachable(anyhow!("{} takes no connection ({last}); is this machine on the network?", host(url))))
}

fn insecure(url: &Uri, error: &io::Error) -> Failure {
    let is_certificate = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match is_certificate {
        Some(why @ rustls::Error::InvalidCertificate(_)) => {
            Failure::Lasting(anyhow!("the certificate of {} is not trusted here: {why}", host(url)))
        }
        _ => Failure::Passing(anyhow!("TLS with {} failed: {error}", host(url))),
    }
}

fn innermost(error: &anyhow::Error) -> String {
    error.root_cause().to_string()
}

/// Returns the target of a redirect.
fn follow(from: &Uri, location: &str) -> anyhow::Result<Uri> {
    let scheme = from.scheme_str().unwrap_or("https");
    let authority = from.authority().map_or("", |authority| authority.as_str());
    let location = location.split('#').next().unwrap_or_default();
    let whole = if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let next = parse(&whole).map_err(|_| anyhow!("{} redirects to {location:?}, which is not a URL", shown(from)))?;
    ensure!(
        scheme == "http" || next.scheme_str() == Some("https"),
        "{} redirects from https to plain HTTP; that is not followed",
        shown(from)
    );
    Ok(next)
}

/// Parses an HTTP or HTTPS URL.
pub fn parse(text: &str) -> anyhow::Result<Uri> {
    match text.parse::<Uri>() {
        Ok(url)
            if matches!(url.scheme_str(), Some("http" | "https"))
                && url.host().is_some_and(|host| !host.is_empty())
                && !url.authority().is_some_and(|authority| authority.as_str().contains('@')) =>
        {
            Ok(url)
        }
        _ => bail!("{text:?} is no URL; write it as https://HOST/PATH"),
    }
}

/// Returns a URL without its parts that may be secret.
pub fn shown(url: &Uri) -> String {
    format!("{}{}", origin(url), url.path())
}

/// Returns scheme, host and port.
fn origin(url: &Uri) -> String {
    let authority = url.authority().map_or("", |authority| authority.as_str()).to_lowercase();
    format!("{}://{authority}", url.scheme_str().unwrap_or_default())
}

/// Returns the host of a URL, for display.
pub fn host(url: &Uri) -> &str {
    url.authority().map_or("", |authority| authority.as_str())
}

fn bare_host(url: &Uri) -> &str {
    url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
}

fn is_loopback(url: &Uri) -> bool {
    let host = bare_host(url);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_say_and_never_out_of_tls() {
        let from = parse("https://hub.example/a/b?c=d").expect("a URL");
        for (location, to) in [
            ("https://cdn.example/x?sig=1#part", "https://cdn.example/x?sig=1"),
            ("//cdn.example/x", "https://cdn.example/x"),
            ("/x", "https://hub.example/x"),
            ("x", "https://hub.example/a/x"),
        ] {
            assert_eq!(follow(&from, location).expect(location).to_string(), to);
        }
        assert!(follow(&from, "http://hub.example/x").expect_err("plain").to_string().contains("plain HTTP"));
        assert!(follow(&from, "ftp://hub.example/x").is_err());
    }

    #[test]
    fn plain_http_stays_on_this_machine() {
        for (url, is_fine) in [
            ("http://127.0.0.1:1/x", true),
            ("http://localhost/x", true),
            ("http://[::1]:1/x", true),
            ("https://hub.example/x", true),
            ("http://hub.example/x", false),
            ("http://127.0.0.1.hub.example/x", false),
        ] {
            assert_eq!(Web::new(false).check(&parse(url).expect(url)).is_ok(), is_fine, "{url}");
            assert!(Web::new(true).check(&parse(url).expect(url)).is_ok());
        }
        for text in ["hub.example/x", "file:///x", "https://", "https://user:word@hub.example/x"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_secret_of_a_url_is_not_shown() {
        let url = parse("https://cdn.example/x.gguf?X-Amz-Signature=secret").expect("a URL");
        assert_eq!(shown(&url), "https://cdn.example/x.gguf");
    }
}

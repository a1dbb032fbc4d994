//! One request and its response, over a connection of its own.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{anyhow, bail};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, CertificateError};
use rustls_pki_types::ServerName;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::proof::FolderProof;
use super::trust::{Trust, believing_nobody};

/// Timeout for connecting, including name resolution.
const CONNECT: Duration = Duration::from_secs(5);

/// The longest answer to a challenge, in bytes.
const PROOF_ANSWER_MAX: usize = 4096;

/// The longest document that is read, in bytes. The server may be another program.
const DOCUMENT_MAX: usize = 64 << 20;

/// Why there was no response.
#[derive(Debug)]
pub(super) enum Failure {
    Refused,
    /// The same error would stop every request; it says what to do.
    Closed(anyhow::Error),
    /// The server did not prove that it is the gateway of the data folder.
    Foreign(anyhow::Error),
    /// Something accepted the request, but sent no valid HTTP.
    Broken(anyhow::Error),
}

/// A response whose body has not been read.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    body: Incoming,
    /// Drives the connection, and is dropped with the response.
    _connection: JoinSet<hyper::Result<()>>,
}

impl Response {
    /// Returns the next bytes of the body, or `None` at its end. Cancel safe.
    pub(super) async fn chunk(&mut self) -> hyper::Result<Option<Bytes>> {
        while let Some(frame) = self.body.frame().await.transpose()? {
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// Reads the body to its end, as JSON.
    pub(super) async fn json<T: DeserializeOwned>(mut self) -> anyhow::Result<T> {
        let mut whole = vec![];
        while let Some(bytes) = self.chunk().await? {
            whole.extend_from_slice(&bytes);
            if whole.len() > DOCUMENT_MAX {
                bail!("it has more than {} MiB", DOCUMENT_MAX >> 20);
            }
        }
        Ok(serde_json::from_slice(&whole)?)
    }
}

/// The key that a gateway is shown, and what it proves before.
#[derive(Clone, Copy)]
pub(super) struct Credentials<'a> {
    pub(super) key: Option<&'a str>,
    pub(super) proof: Option<&'a FolderProof>,
}

/// Sends a request to a gateway: its URL, a method and path, a JSON document if there is one, and a key.
pub(super) async fn send(
    base: &Uri,
    trust: &Trust,
    (method, path): (Method, &str),
    body: Option<Bytes>,
    Credentials { key, proof }: Credentials<'_>,
) -> Result<Response, Failure> {
    let target = format!("{}{path}", base.path().trim_end_matches('/'));
    let host = base.authority().map_or("", |authority| authority.as_str());
    let mut request = Request::builder().method(method).uri(target).header(header::HOST, host);
    if let Some(key) = key {
        request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    if body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(body.unwrap_or_default()));
    let request = request.map_err(|_| Failure::Closed(anyhow!("the API key has letters that no key has")))?;
    let stream = connect(base).await?;
    let address = stream.peer_addr().map_err(|error| Failure::Broken(error.into()))?;
    let proof = proof.map(|proof| (proof, address));
    if !is_tls(base) {
        return match exchange(base, stream, proof, request).await {
            Err(Failure::Broken(error) | Failure::Foreign(error)) if speaks_tls(base).await => {
                Err(Failure::Closed(anyhow!(
                    "{base} was asked in plain HTTP and speaks TLS; write https://{host} ({error})",
                    base = shown(base)
                )))
            }
            answered => answered,
        };
    }
    let connector = trust.connector().map_err(Failure::Closed)?;
    let name = ServerName::try_from(bare_host(base).to_owned()).map_err(|_| {
        Failure::Closed(anyhow!("{} is not a host name that a certificate can be issued for", bare_host(base)))
    })?;
    let handshake = timeout(CONNECT, connector.connect(name, stream)).await;
    let stream = handshake
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|error| Failure::Closed(untrusted(base, &error)))?;
    exchange(base, stream, proof, request).await
}

fn is_tls(base: &Uri) -> bool {
    base.scheme_str() == Some("https")
}

/// Returns the URL as people write it.
fn shown(base: &Uri) -> String {
    base.to_string().trim_end_matches('/').to_owned()
}

/// Returns the host without the brackets of an IPv6 address.
fn bare_host(base: &Uri) -> &str {
    base.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
}

async fn connect(base: &Uri) -> Result<TcpStream, Failure> {
    let host = bare_host(base);
    let port = base.port_u16().unwrap_or(if is_tls(base) { 443 } else { 80 });
    let url = shown(base);
    let found = match timeout(CONNECT, lookup_host((host, port))).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            return Err(Failure::Closed(anyhow!(
                "{url}: no address is known of the name {host} ({error}); see that it is written right"
            )));
        }
        Err(_) => {
            return Err(Failure::Closed(anyhow!(
                "{url}: the name {host} was not found within {} s",
                CONNECT.as_secs()
            )));
        }
    };
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in found {
        last = match timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // A request is a single write, so waiting for more data gains nothing.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => error,
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
    }
    Err(match last.kind() {
        io::ErrorKind::ConnectionRefused => Failure::Refused,
        io::ErrorKind::TimedOut => Failure::Closed(anyhow!(
            "{url} takes no connection within {} s; see that the machine runs, and that no firewall is in the way",
            CONNECT.as_secs()
        )),
        _ => Failure::Closed(anyhow!("{url} cannot be reached: {last}")),
    })
}

/// Sends a request over a connection, once the server has proven on the same connection that it runs on the folder.
async fn exchange(
    base: &Uri,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    proof: Option<(&FolderProof, SocketAddr)>,
    request: Request<Full<Bytes>>,
) -> Result<Response, Failure> {
    let failed = |error: hyper::Error| broken(base, &error);
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    if let Some((proof, address)) = proof {
        prove(base, &mut sender, proof, address).await?;
    }
    let (head, body) = sender.send_request(request).await.map_err(failed)?.into_parts();
    Ok(Response { status: head.status, headers: head.headers, body, _connection: driver })
}

/// Asks the server to prove that it is the gateway of the data folder.
async fn prove(
    base: &Uri,
    sender: &mut SendRequest<Full<Bytes>>,
    proof: &FolderProof,
    address: SocketAddr,
) -> Result<(), Failure> {
    let challenge = proof.challenge().map_err(Failure::Closed)?;
    let host = base.authority().map_or("", |authority| authority.as_str());
    let request = Request::get(challenge.path()).header(header::HOST, host).body(Full::default());
    let request = request.map_err(|error| Failure::Closed(error.into()))?;
    let answer = timeout(CONNECT, async {
        let response = sender.send_request(request).await.map_err(|error| broken(base, &error))?;
        let body = Limited::new(response.into_body(), PROOF_ANSWER_MAX).collect().await;
        let answer = body.ok().and_then(|body| serde_json::from_slice(&body.to_bytes()).ok());
        sender.ready().await.map_err(|error| broken(base, &error))?;
        Ok::<_, Failure>(answer.unwrap_or(Value::Null))
    });
    match answer.await {
        Ok(Ok(answer)) if challenge.is_met(address, &answer) => Ok(()),
        // A server that closes the connection after the question has not proven anything either.
        Ok(_) | Err(_) => Err(Failure::Foreign(proof.refusal(&shown(base)))),
    }
}

/// Returns whether the server speaks TLS, after plain HTTP failed.
async fn speaks_tls(base: &Uri) -> bool {
    let Ok(connector) = believing_nobody() else { return false };
    let Ok(stream) = connect(base).await else { return false };
    let any = ServerName::try_from("gateway").expect("a well-formed name");
    match timeout(CONNECT, connector.connect(any, stream)).await {
        Ok(Err(error)) => matches!(tls_error(&error), Some(rustls::Error::InvalidCertificate(_))),
        Ok(Ok(_)) => true,
        Err(_) => false,
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Returns an error that explains why TLS failed, and what to do.
fn untrusted(base: &Uri, error: &io::Error) -> anyhow::Error {
    let (url, host) = (shown(base), bare_host(base));
    let plain = || {
        let authority = base.authority().map_or("", |authority| authority.as_str());
        anyhow!("{url} was asked by TLS and speaks something else; if that is plain HTTP, write http://{authority}")
    };
    let Some(error) = tls_error(error) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => plain(),
            _ => anyhow!("TLS with {url} failed: {error}"),
        };
    };
    let why = match error {
        rustls::Error::InvalidMessage(_) => return plain(),
        // Other defects of a self-signed certificate, such as being a CA certificate, end the same way.
        rustls::Error::InvalidCertificate(why) => why,
        rustls::Error::AlertReceived(AlertDescription::HandshakeFailure | AlertDescription::ProtocolVersion) => {
            return anyhow!("{url} speaks no version of TLS that is safe: 1.2 and 1.3 are");
        }
        error => return anyhow!("TLS with {url} failed: {error}"),
    };
    match why {
        CertificateError::NotValidForName => anyhow!("the certificate of {url} is not for {host}; {ANOTHER_NAME}"),
        CertificateError::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
            let names: Vec<&str> = presented.iter().map(|name| plain_name(name)).collect();
            anyhow!("the certificate of {url} is for {} and not for {host}; {ANOTHER_NAME}", names.join(", "))
        }
        CertificateError::NotValidForNameContext { .. } => {
            anyhow!("the certificate of {url} names no host; give the certificate itself with --ca FILE")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            anyhow!("the certificate of {url} has ended; renew it, or see that this machine's clock is right")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            anyhow!("the certificate of {url} is not good yet; see that this machine's clock is right")
        }
        CertificateError::Revoked => anyhow!("the certificate of {url} was revoked; the gateway needs another"),
        CertificateError::BadEncoding | CertificateError::BadSignature => {
            anyhow!("the certificate of {url} is damaged ({why}); the gateway needs another")
        }
        _ => anyhow!(
            "the certificate of {url} is not trusted here; give the file of the certificate, or of the authority that \
             issued it, with --ca FILE or TETHER_CA"
        ),
    }
}

const ANOTHER_NAME: &str = "use a name that it is for, or give the certificate itself with --ca FILE";

/// Returns the name in a certificate's entry, without its kind: `DnsName("a")` is `a`.
fn plain_name(issuer: &str) -> &str {
    issuer.split_once('(').map_or(issuer, |(_, rest)| rest.trim_end_matches(')')).trim_matches('"')
}

fn broken(base: &Uri, error: &hyper::Error) -> Failure {
    Failure::Broken(if error.is_parse() || error.is_incomplete_message() {
        anyhow!("{} does not answer as a gateway does; is this another program's port?", shown(base))
    } else {
        anyhow!("{} does not answer: {error}", shown(base))
    })
}

/// Parses a gateway's address as people write it: without a scheme, or as the base URL that OpenAI's clients want.
pub(super) fn base(given: &str) -> anyhow::Result<Uri> {
    let trimmed = given.trim();
    // Without its slashes, a bare scheme would not be recognised as one.
    let trimmed = if trimmed.ends_with("://") { trimmed } else { trimmed.trim_end_matches('/') };
    let trimmed = trimmed.strip_suffix("/v1").unwrap_or(trimmed);
    let whole = if trimmed.contains("://") { trimmed.to_owned() } else { format!("http://{trimmed}") };
    match whole.parse::<Uri>() {
        Ok(url)
            if matches!(url.scheme_str(), Some("http" | "https"))
                && url.host().is_some_and(|host| !host.is_empty()) =>
        {
            Ok(url)
        }
        _ => bail!("{given:?} is not the address of a gateway; write it as http://HOST:PORT"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_as_people_write_it() {
        for given in ["http://127.0.0.1:7070", "http://127.0.0.1:7070/", "127.0.0.1:7070", " 127.0.0.1:7070/v1/ "] {
            assert_eq!(shown(&base(given).expect(given)), "http://127.0.0.1:7070");
        }
        assert_eq!(shown(&base("https://gpu.example/v1").expect("good")), "https://gpu.example");
        assert_eq!(bare_host(&base("[::1]:7070").expect("good")), "::1");
        for given in ["", "ftp://host", "http://", "http://a b", "http://:7070"] {
            let error = base(given).expect_err(given).to_string();
            assert!(error.contains("http://HOST:PORT"), "{error}");
        }
    }

    #[test]
    fn the_names_of_a_certificate_are_told_as_they_are() {
        assert_eq!(plain_name("DnsName(\"gpu.example\")"), "gpu.example");
        assert_eq!(plain_name("IpAddress(192.0.2.1)"), "192.0.2.1");
        assert_eq!(plain_name("odd"), "odd");
    }
}

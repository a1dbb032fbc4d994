use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http_body_util::BodyExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use protocol::signature::NodeKey;
use rpc::{Membership, MemoryNetwork, SystemClock};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tether_gateway::{Config, Gateway, GatewayError, GatewayParts};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::{Network, config, metrics};

/// Writes a fresh self-signed certificate and its key into a folder, and returns the certificate.
fn certify(folder: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).expect("written");
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).expect("written");
    CertificateDer::from_pem_slice(made.cert.pem().as_bytes()).expect("a certificate")
}

fn tls_config(folder: &Path) -> Config {
    Config {
        tls_cert: Some(folder.join("cert.pem")),
        tls_key: Some(folder.join("key.pem")),
        tls_reload_secs: 1,
        ..config()
    }
}

async fn connect(
    network: &Network,
    trusted: &CertificateDer<'static>,
    protocol: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(network.address).await?;
    TlsConnector::from(Arc::new(client)).connect(ServerName::try_from("localhost").expect("a name"), stream).await
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_and_http1_are_served_over_tls() {
    let folder = tempfile::tempdir().expect("a folder");
    let certificate = certify(folder.path());
    let network = Network::start_with(tls_config(folder.path())).await;
    let request = || http::Request::get("https://localhost/healthz").body(Body::empty()).expect("a request");
    let stream = connect(&network, &certificate, b"h2").await.expect("trusted");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    network.tasks.spawn(async move { drop(connection.await) });
    let response = sender.send_request(request()).await.expect("answered");
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["strict-transport-security"], "max-age=31536000");
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    assert_eq!(body, r#"{"status":"ok"}"#);
    drop(sender);
    let stream = connect(&network, &certificate, b"http/1.1").await.expect("trusted");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP/1.1");
    network.tasks.spawn(async move { drop(connection.await) });
    assert_eq!(sender.send_request(request()).await.expect("answered").status(), 200);
    drop(sender);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_taken_and_a_broken_one_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let old = certify(folder.path());
    let network = Network::start_with(tls_config(folder.path())).await;
    connect(&network, &old, b"h2").await.expect("trusted");
    std::fs::write(folder.path().join("cert.pem"), "nonsense").expect("written");
    tokio::time::sleep(Duration::from_millis(1300)).await;
    connect(&network, &old, b"h2").await.expect("the old one stays");
    let new = certify(folder.path());
    tokio::time::sleep(Duration::from_millis(1300)).await;
    connect(&network, &new, b"h2").await.expect("the new one is taken");
    connect(&network, &old, b"h2").await.expect_err("the old one is gone");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_taken_at_once_where_that_is_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let old = certify(folder.path());
    let network = Network::start_with(Config { tls_reload_secs: 3600, ..tls_config(folder.path()) }).await;
    connect(&network, &old, b"h2").await.expect("trusted");
    let new = certify(folder.path());
    network.gateway.reload();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while connect(&network, &new, b"h2").await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the new one is not taken");
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_does_not_come_is_not_waited_for() {
    let folder = tempfile::tempdir().expect("a folder");
    certify(folder.path());
    let network = Network::start_with(tls_config(folder.path())).await;
    let mut stream = TcpStream::connect(network.address).await.expect("connected");
    let mut buffer = [0; 1];
    let closed = tokio::io::AsyncReadExt::read(&mut stream, &mut buffer);
    let read = tokio::time::timeout(Duration::from_secs(3), closed).await.expect("closed in time");
    assert_eq!(read.unwrap_or_default(), 0);
    network.end().await;
}

#[tokio::test]
async fn a_configuration_that_cannot_work_is_refused_at_start() {
    let folder = tempfile::tempdir().expect("a folder");
    certify(folder.path());
    let start = |config: Config| {
        let (metrics, exposition) = metrics();
        let parts = GatewayParts {
            transport: MemoryNetwork::new().node(&NodeKey::from_seed(&[9; 32])),
            clock: Arc::new(SystemClock),
            membership: Membership::unchecked(),
            metrics,
            exposition,
            folder_secret: None,
            api_key_file: None,
            version: "0".into(),
        };
        async { Gateway::new(config, parts).bind().await.err().expect("refused") }
    };
    let half = start(Config { tls_key: None, ..tls_config(folder.path()) }).await;
    assert!(matches!(half, GatewayError::TlsIncomplete), "{half}");
    let missing = start(Config { tls_key: Some("/nowhere/key.pem".into()), ..tls_config(folder.path()) }).await;
    assert!(matches!(missing, GatewayError::Tls { .. }), "{missing}");
    certify(folder.path());
    let other = tempfile::tempdir().expect("a folder");
    certify(other.path());
    let mismatched = Config { tls_key: Some(other.path().join("key.pem")), ..tls_config(folder.path()) };
    let mismatched = start(mismatched).await;
    assert!(matches!(mismatched, GatewayError::Tls { .. }), "{mismatched}");
    let origin = start(Config { cors_origins: vec!["example.com".into()], ..config() }).await;
    assert!(matches!(origin, GatewayError::Origin { .. }), "{origin}");
}

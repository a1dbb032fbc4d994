//! Commands and a gateway that speaks TLS with a certificate of its own.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustix::process::Signal;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;
use tether_cli::client::{GatewayClient, Presence, Trust};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::program::{Home, signal, wait_for};

/// Writes a fresh certificate and its key, of the kind that `openssl req -x509` makes, for a name that nobody calls.
fn certify(folder: &Path) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec!["elsewhere.example".to_owned()]).expect("a name");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let made = params.self_signed(&key).expect("a certificate");
    fs::write(folder.join("cert.pem"), made.pem()).expect("written");
    fs::write(folder.join("key.pem"), key.serialize_pem()).expect("written");
}

fn errors(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr.clone()).expect("text")
}

#[cfg(feature = "llama")]
#[test]
fn a_gateways_own_certificate_is_trusted_where_it_runs_and_named_elsewhere() {
    let (home, elsewhere) = (Home::new(), Home::new());
    certify(home.path());
    // Named as a person would, from the folder where the gateway starts.
    let settings = [("TETHER_GATEWAY__TLS_CERT", "cert.pem"), ("TETHER_GATEWAY__TLS_KEY", "key.pem")];
    let up = home.up(&settings);
    assert!(up.url.starts_with("https://127.0.0.1:"), "{}", up.url);
    let answer = home.well(&["run", "tether-tiny", "What is 3 + 4?", "--temperature", "0"]);
    assert!(answer.contains("3 + 4 = 7"), "{answer}");
    let key = home.well(&["token", "create", "--admin"]);
    home.well(&["token", "list"]);
    home.well(&["list"]);
    let output = home.well(&["doctor"]);
    assert!(output.contains(&format!("answers at {}", up.url)), "{output}");

    fs::write(elsewhere.path().join("key"), key).expect("written");
    fs::copy(home.path().join("cert.pem"), elsewhere.path().join("ca.pem")).expect("copied");
    let asked = |more: &[&str]| elsewhere.run(&[&["nodes", "--url", &up.url, "--api-key-file", "key"], more].concat());
    let output = errors(&asked(&[]));
    assert!(output.contains("not trusted here") && output.contains("--ca FILE"), "{output}");
    assert!(asked(&["--ca", "ca.pem"]).status.success());
    let mut by_variable = elsewhere.command(&["run", "tether-tiny", "What is 3 + 4?", "--api-key-file", "key"]);
    let by_variable = by_variable.envs([("TETHER_URL", up.url.as_str()), ("TETHER_CA", "ca.pem")]).output();
    let by_variable = by_variable.expect("the program runs");
    assert!(by_variable.status.success(), "{}", String::from_utf8_lossy(&by_variable.stderr));
    for (file, text, word) in [("none.pem", "", "holds no certificate"), ("away.pem", "-", "could not read away.pem")] {
        if text.is_empty() {
            fs::write(elsewhere.path().join(file), text).expect("written");
        }
        let error = errors(&asked(&["--ca", file]));
        assert!(error.contains(word), "{error}");
    }

    certify(home.path());
    signal(up.pid(), Signal::HUP);
    wait_for("the new certificate", || home.run(&["nodes"]).status.success());
    let error = errors(&asked(&["--ca", "ca.pem"]));
    assert!(error.contains("not trusted here"), "{error}");
    assert_eq!(up.end(), Some(0));
    assert!(!home.data().join("certificate").exists());
}

/// An authority of one's own.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    file: PathBuf,
}

impl Authority {
    fn new(folder: &Path) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let file = folder.join("authority.pem");
        fs::write(&file, params.self_signed(&key).expect("a certificate").pem()).expect("written");
        Self { issuer: Issuer::new(params, key), file }
    }

    fn certificate(&self, name: &str, years: [i32; 2]) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        [params.not_before, params.not_after] = years.map(|year| date_time_ymd(year, 1, 1));
        let made = params.signed_by(&key, &self.issuer).expect("a certificate");
        (made.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).expect("a key"))
    }
}

/// Servers of a test; they end with it.
#[derive(Default)]
struct Servers(JoinSet<()>);

impl Servers {
    async fn listener() -> (tokio::net::TcpListener, SocketAddr) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        (listener, address)
    }

    /// Answers everything over TLS with an empty document.
    async fn tls(&mut self, (certificate, key): (CertificateDer<'static>, PrivateKeyDer<'static>)) -> SocketAddr {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("a certificate and its key");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let (listener, address) = Self::listener().await;
        self.0.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Whoever does not trust it leaves.
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
            }
        });
        address
    }

    /// Says the same to everybody.
    async fn saying(&mut self, words: &'static [u8]) -> SocketAddr {
        let (listener, address) = Self::listener().await;
        self.0.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(words).await;
                let _ = stream.shutdown().await;
            }
        });
        address
    }
}

#[tokio::test]
async fn each_cause_of_a_failed_connection_has_its_own_sentence() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new(folder.path());
    let mut servers = Servers::default();
    let good = servers.tls(authority.certificate("127.0.0.1", [2000, 3000])).await;
    let wrong_name = servers.tls(authority.certificate("elsewhere.example", [2000, 3000])).await;
    let ended = servers.tls(authority.certificate("127.0.0.1", [2000, 2001])).await;
    let to_come = servers.tls(authority.certificate("127.0.0.1", [2999, 3000])).await;
    let plain = servers.saying(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await;
    let silent = servers.saying(b"").await;
    let other = servers.saying(b"SSH-2.0-OpenSSH_9.6\r\n").await;
    let refused = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let ask = async |url: String, ca: bool| {
        let trust = Trust::new(ca.then(|| authority.file.clone()), None);
        let client = GatewayClient::new(url, None).expect("an address").trusting(trust);
        client.get::<Value>("/v1/models").await.map_err(|error| format!("{error:#}"))
    };
    ask(format!("https://{good}"), true).await.expect("trusted");
    for (url, ca, words) in [
        (format!("https://{good}"), false, &["not trusted here", "--ca FILE"][..]),
        (format!("https://{wrong_name}"), true, &["is for elsewhere.example and not for 127.0.0.1"]),
        (format!("https://{ended}"), true, &["has ended", "clock"]),
        (format!("https://{to_come}"), true, &["not good yet", "clock"]),
        (format!("https://{plain}"), true, &["speaks something else", &format!("write http://{plain}")]),
        (format!("https://{silent}"), true, &["speaks something else"]),
        (format!("http://{good}"), true, &["speaks TLS", &format!("write https://{good}")]),
        (format!("http://{other}"), true, &["another program's port"]),
        (format!("http://{plain}"), true, &["400 Bad Request", "another program's port"]),
        ("https://nowhere.invalid:1".to_owned(), true, &["nowhere.invalid", "no address is known"]),
        (format!("https://{refused}"), true, &["nothing answers", "tether up"]),
    ] {
        let error = ask(url.clone(), ca).await.expect_err(&url);
        for word in words {
            assert!(error.contains(word), "{url}: {error}");
        }
    }
}

#[tokio::test]
async fn another_program_is_no_gateway_and_one_that_is_not_trusted_is_not_absent() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new(folder.path());
    let mut servers = Servers::default();
    let tls = servers.tls(authority.certificate("127.0.0.1", [2000, 3000])).await;
    let other = servers.saying(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
    let presence = async |url: String| GatewayClient::new(url, None).expect("an address").presence().await;
    assert!(matches!(presence(format!("https://{tls}")).await, Presence::Closed(_)));
    assert!(matches!(presence(format!("http://{tls}")).await, Presence::Closed(_)));
    assert!(matches!(presence(format!("http://{other}")).await, Presence::Absent(_)));
}

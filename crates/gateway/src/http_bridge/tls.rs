//! TLS, with a certificate that is reloaded when its files change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio::time;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::GatewayError;
use crate::config::{Config, seconds};
use crate::gateway::Gateway;

/// Accepts TLS connections with the current certificate.
#[derive(Clone)]
pub(super) struct Tls {
    acceptor: TlsAcceptor,
    current: Arc<Current>,
    files: Files,
    every: Duration,
}

/// The certificate in use.
#[derive(Debug)]
struct Current {
    key: RwLock<Arc<CertifiedKey>>,
    /// The contents of the files that it was read from.
    contents: RwLock<Contents>,
}

#[derive(Debug, Clone)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

/// The contents of both files.
#[derive(Debug, PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key.read().clone())
    }
}

impl Tls {
    /// Reads the configured files. Returns `None` if TLS is not configured.
    pub(super) fn load(config: &Config) -> Result<Option<Self>, GatewayError> {
        let files = match (&config.tls_cert, &config.tls_key) {
            (None, None) => return Ok(None),
            (Some(certificate), Some(key)) => Files { certificate: certificate.clone(), key: key.clone() },
            _ => return Err(GatewayError::TlsIncomplete),
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let contents = files.read()?;
        let key = files.parse(&contents, &provider)?;
        let current = Arc::new(Current { key: RwLock::new(Arc::new(key)), contents: RwLock::new(contents) });
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(&files.certificate, &error))?
            .with_no_client_auth()
            .with_cert_resolver(current.clone());
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let every = seconds(config.tls_reload_secs.max(1));
        Ok(Some(Self { acceptor: TlsAcceptor::from(Arc::new(server)), current, files, every }))
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(stream).await
    }

    /// Checks the files for changes until `stop`, periodically and on request. Keeps the old certificate if the new
    /// files cannot be used.
    pub(super) async fn watch(self, gateway: Gateway, stop: CancellationToken) {
        let due = async || {
            // The timeout and the notification mean the same: check now.
            let _ = time::timeout(self.every, gateway.reload_wanted()).await;
        };
        while stop.run_until_cancelled(due()).await.is_some() {
            let reloader = self.clone();
            match tokio::task::spawn_blocking(move || reloader.reload()).await {
                Ok(Ok(true)) => info!("took a new TLS certificate"),
                Ok(Ok(false)) => {}
                Ok(Err(error)) => warn!(%error, "kept the old TLS certificate"),
                Err(_) => warn!("looking at the TLS files failed"),
            }
        }
    }

    /// Reloads the certificate if the files changed, and returns whether they did.
    fn reload(&self) -> Result<bool, GatewayError> {
        let contents = self.files.read()?;
        if *self.current.contents.read() == contents {
            return Ok(false);
        }
        let provider = rustls::crypto::ring::default_provider();
        let key = self.files.parse(&contents, &provider)?;
        *self.current.key.write() = Arc::new(key);
        *self.current.contents.write() = contents;
        Ok(true)
    }
}

impl Files {
    fn read(&self) -> Result<Contents, GatewayError> {
        let read = |path: &Path| std::fs::read(path).map_err(|error| failed(path, &error));
        Ok(Contents { certificate: read(&self.certificate)?, key: read(&self.key)? })
    }

    fn parse(&self, contents: &Contents, provider: &CryptoProvider) -> Result<CertifiedKey, GatewayError> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&contents.certificate)
            .collect::<Result<_, _>>()
            .map_err(|error| failed(&self.certificate, &error))?;
        if chain.is_empty() {
            return Err(failed(&self.certificate, &"it holds no certificate"));
        }
        let key = PrivateKeyDer::from_pem_slice(&contents.key).map_err(|error| failed(&self.key, &error))?;
        CertifiedKey::from_der(chain, key, provider).map_err(|error| failed(&self.key, &error))
    }
}

fn failed(path: &Path, reason: &dyn std::fmt::Display) -> GatewayError {
    GatewayError::Tls { path: path.to_owned(), reason: reason.to_string() }
}

//! Which certificates of gateways are trusted.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, bail};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::TlsConnector;

/// Which certificates of gateways are trusted. Files are read again for each connection, so that a renewed certificate
/// is trusted at once.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    /// CA certificates, and certificates that are trusted as they are. Without it the system's CAs are trusted.
    pub ca: Option<PathBuf>,
    /// The certificate of this machine's own gateway, trusted as it is.
    pub own: Option<PathBuf>,
    system: Arc<OnceLock<RootCertStore>>,
}

impl Trust {
    /// Trusts the certificates in a file or, without one, the system's CAs, and the certificate of this machine's own
    /// gateway.
    pub fn new(ca: Option<PathBuf>, own: Option<PathBuf>) -> Self {
        Self { ca, own, system: Arc::default() }
    }

    /// Returns a connector for TLS connections.
    pub(crate) fn connector(&self) -> anyhow::Result<TlsConnector> {
        let mut known = self.own_certificate();
        let roots = match &self.ca {
            Some(file) => {
                let given = certificates(file)?;
                let mut roots = RootCertStore::empty();
                // A certificate that cannot be a CA is trusted as it is.
                roots.add_parsable_certificates(given.iter().cloned());
                known.extend(given);
                roots
            }
            None => self.system.get_or_init(system_authorities).clone(),
        };
        connector(known, roots)
    }

    /// Returns the own gateway's certificate, or nothing if it cannot be read: the gateway itself has reported that.
    fn own_certificate(&self) -> Vec<CertificateDer<'static>> {
        let chain = self.own.as_deref().map(certificates).and_then(Result::ok).unwrap_or_default();
        chain.into_iter().take(1).collect()
    }
}

/// Returns a connector that trusts no certificate, to detect whether a server speaks TLS.
pub(super) fn believing_nobody() -> anyhow::Result<TlsConnector> {
    connector(vec![], RootCertStore::empty())
}

fn connector(known: Vec<CertificateDer<'static>>, roots: RootCertStore) -> anyhow::Result<TlsConnector> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new(known, roots, &provider)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("no version of TLS can be spoken")?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

fn certificates(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let text = std::fs::read(file).with_context(|| format!("could not read {}", file.display()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| anyhow::anyhow!("{} is not a PEM file: {error}", file.display()))?;
    if found.is_empty() {
        bail!("{} holds no certificate; it must have lines -----BEGIN CERTIFICATE-----", file.display());
    }
    Ok(found)
}

/// Returns the system's CAs: none on a system without any, such as a bare container.
fn system_authorities() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// Accepts some certificates as they are, byte for byte, and others by their issuer, name and dates.
#[derive(Debug)]
struct Verifier {
    known: Vec<CertificateDer<'static>>,
    /// `None` if there are no CAs.
    authorities: Option<Arc<WebPkiServerVerifier>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(
        known: Vec<CertificateDer<'static>>,
        roots: RootCertStore,
        provider: &Arc<CryptoProvider>,
    ) -> anyhow::Result<Self> {
        let authorities = if roots.is_empty() {
            None
        } else {
            Some(WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?)
        };
        Ok(Self { known, authorities, algorithms: provider.signature_verification_algorithms })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // The user vouched for this very certificate, so its names and dates do not matter.
        if self.known.iter().any(|known| known == end_entity) {
            return Ok(ServerCertVerified::assertion());
        }
        match &self.authorities {
            Some(authorities) => {
                authorities.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

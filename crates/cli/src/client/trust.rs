//! Which certificates of gateways are believed.

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

/// Which certificates of gateways are believed. Files are read anew for each connection, so that a renewed certificate
/// is believed as soon as it is there.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    /// Authorities, and certificates that are believed as they are; without it, the system's authorities.
    pub ca: Option<PathBuf>,
    /// The certificate of this machine's own gateway, believed as it is.
    pub own: Option<PathBuf>,
    system: Arc<OnceLock<RootCertStore>>,
}

impl Trust {
    /// Believes what a file holds or, without one, what the system believes; and the certificate of this machine's own
    /// gateway.
    pub fn new(ca: Option<PathBuf>, own: Option<PathBuf>) -> Self {
        Self { ca, own, system: Arc::default() }
    }

    /// Returns what makes TLS connections.
    pub(crate) fn connector(&self) -> anyhow::Result<TlsConnector> {
        let mut known = self.own_certificate();
        let roots = match &self.ca {
            Some(file) => {
                let given = certificates(file)?;
                let mut roots = RootCertStore::empty();
                // Whatever cannot be an authority is believed as it is.
                roots.add_parsable_certificates(given.iter().cloned());
                known.extend(given);
                roots
            }
            None => self.system.get_or_init(system_authorities).clone(),
        };
        connector(known, roots)
    }

    /// A gateway that cannot show its own certificate has told its owner so.
    fn own_certificate(&self) -> Vec<CertificateDer<'static>> {
        let chain = self.own.as_deref().map(certificates).and_then(Result::ok).unwrap_or_default();
        chain.into_iter().take(1).collect()
    }
}

/// Returns what makes TLS connections and believes nobody: good for asking whether somebody speaks TLS.
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
    let found = found.map_err(|error| anyhow::anyhow!("{} is no PEM file: {error}", file.display()))?;
    if found.is_empty() {
        bail!("{} holds no certificate; it must have lines -----BEGIN CERTIFICATE-----", file.display());
    }
    Ok(found)
}

/// A system without authorities, such as a bare container, believes nobody.
fn system_authorities() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// Believes some certificates as they are, to the byte, and others by their authority, their names and their dates.
#[derive(Debug)]
struct Verifier {
    known: Vec<CertificateDer<'static>>,
    /// Missing where there are no authorities.
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
        // Whoever named a certificate knows whose it is: its names and dates say nothing more.
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

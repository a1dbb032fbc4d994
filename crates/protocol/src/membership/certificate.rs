//! Certificates, by which the pool's root key grants a node its roles, regions and models.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Exclusion;
use crate::clock::UnixMillis;
use crate::codec;
use crate::control::NodeRole;
use crate::error_code::{ErrorCode, WireError};
use crate::id::{ModelName, PublicKey, Region};
use crate::signature::{NodeKey, Signed};

/// The kind under which certificates are signed.
pub const KIND: &str = "certificate";
/// Version of the format.
pub const VERSION: u32 = 1;
/// The maximum size of a certificate, in bytes.
pub const CERTIFICATE_BYTES_MAX: usize = 64 * 1024;

/// What a node may do in the pool, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Admission.Certificate")]
pub struct Certificate {
    /// The contract's version: 1.
    pub v: u32,
    /// Serial number, which increases with each certificate of the pool.
    pub serial: u64,
    /// Public key of the pool's root, which signs the certificate.
    pub pool: PublicKey,
    /// Public key of the node.
    pub public_key: PublicKey,
    /// Roles that the node may have.
    pub roles: Vec<NodeRole>,
    /// Regions in which the node may act; empty for all.
    #[serde(default)]
    pub regions: Vec<Region>,
    /// Models that the node may serve as a worker; empty for all.
    #[serde(default)]
    pub models: Vec<ModelName>,
    /// First instant at which the certificate is valid.
    pub not_before: UnixMillis,
    /// First instant at which the certificate is no longer valid.
    pub not_after: UnixMillis,
}

/// Why a certificate is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// The certificate is larger than [`CERTIFICATE_BYTES_MAX`].
    #[error("the certificate is too large")]
    TooLarge,
    /// The bytes are not a certificate.
    #[error("the certificate is malformed")]
    Malformed,
    /// The certificate has another version of the contract.
    #[error("the certificate has another version")]
    Version,
    /// The certificate is signed by another root key.
    #[error("the certificate is of another pool")]
    Pool,
    /// The certificate names another public key.
    #[error("the certificate is for another key")]
    Holder,
    /// The certificate is not valid yet.
    #[error("the certificate has not begun yet; are the clocks right?")]
    Early,
    /// The certificate has expired.
    #[error("the certificate has ended, join again with a new invite")]
    Ended,
    /// The signature does not verify.
    #[error("the certificate's signature does not verify")]
    BadSignature,
}

impl From<CertificateError> for WireError {
    fn from(error: CertificateError) -> Self {
        Self::new(ErrorCode::NotEnrolled, error.to_string())
    }
}

impl Certificate {
    /// Signs the certificate with the pool's root key.
    pub fn sign(&self, root: &NodeKey) -> Signed {
        root.sign(KIND, String::from_utf8(codec::encode(self)).expect("JSON is UTF-8"))
    }

    /// Returns the certificate that the node with the key `holder` shows, if it is valid. Cheap checks run first.
    pub fn verify(
        signed: &Signed,
        pool: PublicKey,
        holder: PublicKey,
        now: UnixMillis,
    ) -> Result<Self, CertificateError> {
        if signed.body.len() > CERTIFICATE_BYTES_MAX {
            return Err(CertificateError::TooLarge);
        }
        if signed.key != pool {
            return Err(CertificateError::Pool);
        }
        let certificate: Self = codec::decode_within(signed.body.as_bytes(), CERTIFICATE_BYTES_MAX)
            .map_err(|_| CertificateError::Malformed)?;
        if certificate.v != VERSION {
            return Err(CertificateError::Version);
        }
        if certificate.pool != pool {
            return Err(CertificateError::Pool);
        }
        if certificate.public_key != holder {
            return Err(CertificateError::Holder);
        }
        certificate.check_time(now)?;
        signed.verify(KIND).map_err(|_| CertificateError::BadSignature)?;
        Ok(certificate)
    }

    /// Checks that the certificate is valid at `now`.
    pub fn check_time(&self, now: UnixMillis) -> Result<(), CertificateError> {
        if now < self.not_before {
            Err(CertificateError::Early)
        } else if now >= self.not_after {
            Err(CertificateError::Ended)
        } else {
            Ok(())
        }
    }

    /// Checks that the node may act in a role and, if given, in a region. Does not check the certificate's time.
    pub fn check_use(&self, role: NodeRole, region: Option<&Region>) -> Result<(), Exclusion> {
        if !self.roles.contains(&role) {
            Err(Exclusion::Role)
        } else if region.is_some_and(|region| !self.allows_region(region)) {
            Err(Exclusion::Region)
        } else {
            Ok(())
        }
    }

    /// Returns whether the node may act in a region.
    pub fn allows_region(&self, region: &Region) -> bool {
        self.regions.is_empty() || self.regions.contains(region)
    }

    /// Returns whether the node may serve a model.
    pub fn allows_model(&self, model: &ModelName) -> bool {
        self.models.is_empty() || self.models.contains(model)
    }

    /// Returns whether the certificate is due for renewal: half of its time is over.
    pub fn is_due(&self, now: UnixMillis) -> bool {
        let half = self.not_after.since(self.not_before) / 2;
        now >= self.not_before.after(half)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_700_000_000_000);
    const HOUR: Duration = Duration::from_hours(1);

    fn root() -> NodeKey {
        NodeKey::from_seed(&[1; 32])
    }

    fn node() -> PublicKey {
        NodeKey::from_seed(&[2; 32]).public_key()
    }

    fn certificate() -> Certificate {
        Certificate {
            v: VERSION,
            serial: 7,
            pool: root().public_key(),
            public_key: node(),
            roles: vec![NodeRole::Worker],
            regions: vec!["eu-west".parse().expect("region")],
            models: vec!["tether-tiny".parse().expect("name")],
            not_before: NOW,
            not_after: NOW.after(HOUR),
        }
    }

    fn verify(signed: &Signed, now: UnixMillis) -> Result<Certificate, CertificateError> {
        Certificate::verify(signed, root().public_key(), node(), now)
    }

    #[test]
    fn what_the_root_signed_is_believed() {
        assert_eq!(verify(&certificate().sign(&root()), NOW), Ok(certificate()));
    }

    #[test]
    fn each_kind_of_false_certificate_is_refused_for_its_own_reason() {
        let other = NodeKey::from_seed(&[3; 32]);
        let refused = |certificate: Certificate, why| assert_eq!(verify(&certificate.sign(&root()), NOW), Err(why));
        refused(Certificate { v: 2, ..certificate() }, CertificateError::Version);
        refused(Certificate { pool: other.public_key(), ..certificate() }, CertificateError::Pool);
        refused(Certificate { public_key: other.public_key(), ..certificate() }, CertificateError::Holder);
        refused(Certificate { not_before: UnixMillis(NOW.0 + 1), ..certificate() }, CertificateError::Early);
        refused(Certificate { not_after: NOW, ..certificate() }, CertificateError::Ended);
        // One is signed by a key that claims to be the root, the other by the root as another kind.
        assert_eq!(verify(&certificate().sign(&other), NOW), Err(CertificateError::Pool));
        let claimed = Signed { key: root().public_key(), ..certificate().sign(&other) };
        assert_eq!(verify(&claimed, NOW), Err(CertificateError::BadSignature));
        let body = certificate().sign(&root()).body;
        assert_eq!(verify(&root().sign("revocations", body), NOW), Err(CertificateError::BadSignature));
        let honest = certificate().sign(&root());
        let bent = Signed { body: honest.body.replace("worker", "gateway"), ..honest.clone() };
        assert_eq!(verify(&bent, NOW), Err(CertificateError::BadSignature));
        let long = Signed { body: " ".repeat(CERTIFICATE_BYTES_MAX + 1), ..honest.clone() };
        assert_eq!(verify(&long, NOW), Err(CertificateError::TooLarge));
        assert_eq!(verify(&Signed { body: "{}".into(), ..honest }, NOW), Err(CertificateError::Malformed));
    }

    #[test]
    fn a_certificate_is_good_for_its_roles_regions_and_models_only() {
        let limited = certificate();
        let (west, east) = ("eu-west".parse().expect("region"), "us-east".parse().expect("region"));
        assert_eq!(limited.check_use(NodeRole::Worker, Some(&west)), Ok(()));
        assert_eq!(limited.check_use(NodeRole::Worker, None), Ok(()));
        assert_eq!(limited.check_use(NodeRole::Orchestrator, Some(&west)), Err(Exclusion::Role));
        assert_eq!(limited.check_use(NodeRole::Worker, Some(&east)), Err(Exclusion::Region));
        let (tiny, other) = ("tether-tiny".parse().expect("name"), "other".parse().expect("name"));
        assert!(limited.allows_model(&tiny) && !limited.allows_model(&other));
        let free = Certificate { regions: vec![], models: vec![], ..limited };
        assert_eq!(free.check_use(NodeRole::Worker, Some(&east)), Ok(()));
        assert!(free.allows_model(&other));
    }

    #[test]
    fn the_next_certificate_is_due_at_half_of_this_ones_life() {
        assert!(!certificate().is_due(NOW.after(Duration::from_millis(30 * 60 * 1000 - 1))));
        assert!(certificate().is_due(NOW.after(HOUR / 2)));
    }
}

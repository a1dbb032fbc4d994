//! Diffie-Hellman with Ed25519 keys. Rejects exactly the points that libsodium rejects.

use curve25519_dalek::EdwardsPoint;
use curve25519_dalek::edwards::CompressedEdwardsY;
use curve25519_dalek::traits::IsIdentity;
use sha2::{Digest, Sha512};
use zeroize::{Zeroize, Zeroizing};

use super::NoiseError;
use crate::crypto::{KeyPair, PublicKey};

/// The other side's key, checked to be safe for Diffie-Hellman.
#[derive(Clone, Copy)]
pub(super) struct Point {
    key: PublicKey,
    point: EdwardsPoint,
}

impl Point {
    /// Checks a key, which takes as long as a Diffie-Hellman exchange.
    pub(super) fn new(key: PublicKey) -> Result<Self, NoiseError> {
        let compressed = CompressedEdwardsY(*key.as_bytes());
        let point = compressed.decompress().ok_or(NoiseError::Key)?;
        // A point has one canonical encoding, but the decoder is more lenient than libsodium. Outside the prime-order
        // subgroup, the secret would leak bits or be the same for everyone.
        if point.compress() != compressed || point.is_identity() || !point.is_torsion_free() {
            return Err(NoiseError::Key);
        }
        Ok(Self { key, point })
    }

    pub(super) fn key(&self) -> PublicKey {
        self.key
    }
}

/// Multiplies the other side's point by this side's secret scalar.
pub(super) fn exchange(local: &KeyPair, remote: &Point) -> Zeroizing<[u8; 32]> {
    let mut scalar = Zeroizing::new([0_u8; 32]);
    let mut expanded = Sha512::digest(local.seed());
    scalar.copy_from_slice(&expanded[..32]);
    expanded.as_mut_slice().zeroize();
    // The scalar is clamped but not reduced, as Ed25519 secret keys are.
    let mut shared = remote.point.mul_clamped(*scalar);
    let secret = Zeroizing::new(shared.compress().to_bytes());
    shared.zeroize();
    secret
}

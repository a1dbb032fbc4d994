//! Proves to the commands of a data folder that a gateway runs on it, before they show it the folder's API key.
//!
//! The command sends a nonce, and the gateway answers with an HMAC under a secret that is in the folder. The HMAC
//! covers the address at which the connection arrived, so that another listener cannot have it from the true gateway.

use std::fmt;
use std::net::SocketAddr;

use hmac::{Hmac, Mac as _};
use sha2::Sha256;

/// Length of a nonce and of a proof, in bytes.
pub const PROOF_BYTES: usize = 32;
/// The path that answers a nonce, which follows it as hexadecimal digits.
pub const PROOF_PATH: &str = "/healthz/folder/";
/// Keeps these HMACs apart from those of other uses.
const DOMAIN: &[u8] = b"tether folder proof 1";

/// A secret that is known to those who can read a data folder.
#[derive(Clone)]
pub struct FolderSecret([u8; PROOF_BYTES]);

impl FolderSecret {
    /// Wraps the secret of a folder.
    pub const fn new(secret: [u8; PROOF_BYTES]) -> Self {
        Self(secret)
    }

    /// Returns the proof for a nonce, of the gateway at this address.
    pub fn prove(&self, nonce: &[u8; PROOF_BYTES], address: SocketAddr) -> [u8; PROOF_BYTES] {
        self.mac(nonce, address).finalize().into_bytes().into()
    }

    /// Checks a proof, in constant time.
    pub fn verify(&self, nonce: &[u8; PROOF_BYTES], address: SocketAddr, proof: &[u8]) -> bool {
        self.mac(nonce, address).verify_slice(proof).is_ok()
    }

    fn mac(&self, nonce: &[u8; PROOF_BYTES], address: SocketAddr) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(DOMAIN);
        mac.update(nonce);
        mac.update(SocketAddr::new(address.ip().to_canonical(), address.port()).to_string().as_bytes());
        mac
    }
}

impl fmt::Debug for FolderSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("FolderSecret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_good_for_one_folder_one_nonce_and_one_address() {
        let (here, elsewhere) = (SocketAddr::from(([127, 0, 0, 1], 7070)), SocketAddr::from(([127, 0, 0, 1], 7071)));
        let (secret, other) = (FolderSecret::new([1; 32]), FolderSecret::new([2; 32]));
        let proof = secret.prove(&[3; 32], here);
        assert!(secret.verify(&[3; 32], here, &proof));
        assert!(secret.verify(&[3; 32], "[::ffff:127.0.0.1]:7070".parse().expect("an address"), &proof));
        assert!(!other.verify(&[3; 32], here, &proof));
        assert!(!secret.verify(&[4; 32], here, &proof));
        assert!(!secret.verify(&[3; 32], elsewhere, &proof));
        assert!(!secret.verify(&[3; 32], here, &proof[..31]));
        assert!(!format!("{secret:?}").contains('1'));
    }
}

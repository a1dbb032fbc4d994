//! Keys, hashes and authenticated encryption, compatible with how the Node packages use libsodium.

pub mod hash;
pub mod key_pair;
pub mod noise;
pub mod secretbox;

pub use hash::{hash, keyed_hash, namespace};
pub use key_pair::{KeyPair, PublicKey};

/// Returns cryptographically random bytes. All randomness of this crate comes from here.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system has a source of randomness");
    bytes
}

//! Keys, hashes and sealed messages, as the Node packages use libsodium for them.

pub mod hash;
pub mod key_pair;
pub mod noise;
pub mod secretbox;

pub use hash::{hash, keyed_hash, namespace};
pub use key_pair::{KeyPair, PublicKey};

/// Returns unpredictable bytes. The one place of this crate where chance comes in.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system has a source of randomness");
    bytes
}

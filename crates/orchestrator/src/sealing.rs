//! Encrypts what the store keeps of clients' texts.

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};

const NONCE_BYTES: usize = 24;

/// The key of what an orchestrator keeps at rest. It lies in the data folder and not in the store, so that a copy of
/// the store says nothing.
#[derive(Clone)]
pub struct SealingKey(pub [u8; 32]);

impl std::fmt::Debug for SealingKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("SealingKey")
    }
}

/// What was sealed is damaged, belongs to another owner, or was sealed with another key.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot be opened with this key")]
pub(crate) struct Unopened;

impl SealingKey {
    /// Encrypts a text that belongs to `owner`: XChaCha20-Poly1305, with a random nonce in front. Returns `None` if the
    /// system has no randomness.
    pub(crate) fn seal(&self, owner: &[u8], plain: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).ok()?;
        let payload = Payload { msg: plain, aad: owner };
        let sealed = self.cipher().encrypt(&XNonce::from(nonce), payload).ok()?;
        Some([&nonce[..], &sealed].concat())
    }

    pub(crate) fn open(&self, owner: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Unopened> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>().ok_or(Unopened)?;
        let payload = Payload { msg: sealed, aad: owner };
        self.cipher().decrypt(&XNonce::from(*nonce), payload).map_err(|_| Unopened)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&self.0.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_for_its_owner_and_key_alone() {
        let key = SealingKey([7; 32]);
        let sealed = key.seal(b"a", b"the answer").expect("sealed");
        assert_eq!(key.open(b"a", &sealed).as_deref(), Ok(&b"the answer"[..]));
        assert_eq!(key.open(b"b", &sealed), Err(Unopened));
        assert_eq!(SealingKey([8; 32]).open(b"a", &sealed), Err(Unopened));
        assert!(!sealed.windows(6).any(|bytes| bytes == b"answer"));
        assert_ne!(key.seal(b"a", b"the answer"), Some(sealed.clone()), "nonces differ");
        for cut in 0..sealed.len() {
            assert_eq!(key.open(b"a", &sealed[..cut]), Err(Unopened));
        }
    }
}

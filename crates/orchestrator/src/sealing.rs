//! Encrypts what the store keeps of clients' texts.

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use metadata_store::JobKey;
use protocol::codec;

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

/// What was sealed is damaged, belongs to another job, or was sealed with another key.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot be opened with this key")]
pub(crate) struct Unopened;

impl SealingKey {
    /// Encrypts what belongs to a job: XChaCha20-Poly1305, with a random nonce in front. Returns `None` if the system
    /// has no randomness.
    pub(crate) fn seal(&self, job: &JobKey, plain: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).ok()?;
        let payload = Payload { msg: plain, aad: &belonging_to(job) };
        let sealed = self.cipher().encrypt(&XNonce::from(nonce), payload).ok()?;
        Some([&nonce[..], &sealed].concat())
    }

    pub(crate) fn open(&self, job: &JobKey, sealed: &[u8]) -> Result<Vec<u8>, Unopened> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>().ok_or(Unopened)?;
        let payload = Payload { msg: sealed, aad: &belonging_to(job) };
        self.cipher().decrypt(&XNonce::from(*nonce), payload).map_err(|_| Unopened)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&self.0.into())
    }
}

fn belonging_to(job: &JobKey) -> Vec<u8> {
    codec::encode(&("answer", &job.tenant_id, job.correlation_id, &job.retry_token))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(token: &str) -> JobKey {
        JobKey {
            tenant_id: "acme".parse().expect("tenant"),
            correlation_id: "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("id"),
            retry_token: token.parse().expect("token"),
        }
    }

    #[test]
    fn what_is_sealed_opens_for_its_job_and_key_alone() {
        let key = SealingKey([7; 32]);
        let sealed = key.seal(&job("a"), b"the answer").expect("sealed");
        assert_eq!(key.open(&job("a"), &sealed).as_deref(), Ok(&b"the answer"[..]));
        assert_eq!(key.open(&job("b"), &sealed), Err(Unopened));
        assert_eq!(SealingKey([8; 32]).open(&job("a"), &sealed), Err(Unopened));
        assert!(!sealed.windows(6).any(|bytes| bytes == b"answer"));
        assert_ne!(key.seal(&job("a"), b"the answer"), Some(sealed.clone()), "nonces differ");
        for cut in 0..sealed.len() {
            assert_eq!(key.open(&job("a"), &sealed[..cut]), Err(Unopened));
        }
    }
}

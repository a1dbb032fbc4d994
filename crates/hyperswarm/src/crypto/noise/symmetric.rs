//! The symmetric state of a Noise handshake: chaining key, handshake hash and cipher key.

use blake2::Blake2b512;
use blake2::Digest;
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, Nonce, Tag};
use hmac::{Mac, SimpleHmac};
use zeroize::{Zeroize, Zeroizing};

use super::{NoiseError, Session};
use crate::crypto::PublicKey;

/// How much longer a ciphertext is than its plaintext.
pub(super) const SEAL_LENGTH: usize = 16;

const PROTOCOL: &[u8; 35] = b"Noise_IK_Ed25519_ChaChaPoly_BLAKE2b";

/// The handshake hash, the chaining key and the current cipher key.
#[derive(Clone)]
pub(super) struct Symmetric {
    hash: [u8; 64],
    chaining_key: [u8; 64],
    key: [u8; 32],
}

impl Symmetric {
    pub(super) fn new(prologue: &[u8], responder: &PublicKey) -> Self {
        let mut hash = [0; 64];
        hash[..PROTOCOL.len()].copy_from_slice(PROTOCOL);
        let mut symmetric = Self { hash, chaining_key: hash, key: [0; 32] };
        symmetric.mix_hash(prologue);
        symmetric.mix_hash(responder.as_bytes());
        symmetric
    }

    pub(super) fn mix_hash(&mut self, bytes: &[u8]) {
        let mut state = Blake2b512::new();
        state.update(self.hash);
        state.update(bytes);
        self.hash = state.finalize().into();
    }

    pub(super) fn mix_key(&mut self, secret: &[u8; 32]) {
        let (chaining_key, key) = derive(&self.chaining_key, secret);
        self.chaining_key = *chaining_key;
        self.key.copy_from_slice(&key[..32]);
    }

    /// Appends the encrypted text. In the IK pattern every key encrypts only one text, so the nonce is always zero.
    pub(super) fn seal(&mut self, text: &[u8], message: &mut Vec<u8>) {
        let start = message.len();
        message.extend_from_slice(text);
        let cipher = ChaCha20Poly1305::new(&self.key.into());
        let tag = cipher
            .encrypt_in_place_detached(&Nonce::default(), &self.hash, &mut message[start..])
            .expect("a handshake message is far below the cipher's limit");
        message.extend_from_slice(&tag);
        self.mix_hash(&message[start..]);
    }

    pub(super) fn open(&mut self, sealed: &[u8]) -> Result<Vec<u8>, NoiseError> {
        let (text, tag) = sealed.split_last_chunk::<SEAL_LENGTH>().ok_or(NoiseError::Length)?;
        let mut text = text.to_vec();
        ChaCha20Poly1305::new(&self.key.into())
            .decrypt_in_place_detached(&Nonce::default(), &self.hash, &mut text, Tag::from_slice(tag))
            .map_err(|_| NoiseError::Sealed)?;
        self.mix_hash(sealed);
        Ok(text)
    }

    /// Derives one key for each direction from the chaining key.
    pub(super) fn session(&self, is_initiator: bool, local_key: PublicKey, remote_key: PublicKey) -> Session {
        let (first, second) = derive(&self.chaining_key, &[]);
        let (send, receive) = if is_initiator { (first, second) } else { (second, first) };
        let mut session = Session { is_initiator, local_key, remote_key, tx: [0; 32], rx: [0; 32], hash: self.hash };
        session.tx.copy_from_slice(&send[..32]);
        session.rx.copy_from_slice(&receive[..32]);
        session
    }
}

impl Drop for Symmetric {
    fn drop(&mut self) {
        self.chaining_key.zeroize();
        self.key.zeroize();
    }
}

/// HKDF (RFC 5869) without info, with two outputs of the hash's length.
fn derive(salt: &[u8; 64], input: &[u8]) -> (Zeroizing<[u8; 64]>, Zeroizing<[u8; 64]>) {
    let secret = hmac(salt, &[input]);
    let first = hmac(&secret, &[&[1]]);
    let second = hmac(&secret, &[first.as_slice(), &[2]]);
    (first, second)
}

/// HMAC over BLAKE2b-512, whose block has 128 bytes.
fn hmac(key: &[u8; 64], parts: &[&[u8]]) -> Zeroizing<[u8; 64]> {
    let mut state = <SimpleHmac<Blake2b512> as Mac>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        state.update(part);
    }
    Zeroizing::new(state.finalize().into_bytes().into())
}

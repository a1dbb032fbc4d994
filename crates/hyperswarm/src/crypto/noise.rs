//! The Noise handshake that opens a connection: `Noise_IK_Ed25519_ChaChaPoly_BLAKE2b`.
//!
//! The client knows the server's static key beforehand. Two messages prove both keys and yield a [`Session`]. Static
//! and ephemeral keys are Ed25519 keys, and Diffie-Hellman runs on the Edwards curve.

mod exchange;
mod symmetric;

use zeroize::Zeroize;

use super::{KeyPair, PublicKey, random};
use exchange::{Point, exchange};
use symmetric::{SEAL_LENGTH, Symmetric};

/// The longest message that Noise allows.
const MESSAGE_LENGTH_MAX: usize = 65_535;

/// Why a handshake message was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoiseError {
    /// The message is shorter than its fixed part, or longer than Noise allows.
    #[error("the handshake message has an impossible length")]
    Length,
    /// A key is not a point that is safe for Diffie-Hellman.
    #[error("the handshake message carries an unusable key")]
    Key,
    /// The message was made for other keys, or modified on the way.
    #[error("the handshake message cannot be opened")]
    Sealed,
}

/// The result of a completed handshake.
#[derive(Clone)]
pub struct Session {
    /// Whether this side sent the first message.
    pub is_initiator: bool,
    /// This side's static key.
    pub local_key: PublicKey,
    /// The other side's static key, verified.
    pub remote_key: PublicKey,
    /// The key that encrypts what this side sends.
    pub tx: [u8; 32],
    /// The key that decrypts what the other side sends.
    pub rx: [u8; 32],
    /// The handshake hash, which is the same on both sides and unique to this connection.
    pub hash: [u8; 64],
}

impl Drop for Session {
    fn drop(&mut self) {
        self.tx.zeroize();
        self.rx.zeroize();
    }
}

/// The side that starts the handshake, and knows the other side's key.
pub struct Initiator {
    local: KeyPair,
    ephemeral: KeyPair,
    remote: Point,
    symmetric: Symmetric,
}

impl Initiator {
    /// Starts a handshake with the owner of `remote`.
    pub fn new(local: &KeyPair, remote: PublicKey, prologue: &[u8]) -> Result<Self, NoiseError> {
        Self::with_ephemeral(local, remote, prologue, KeyPair::from_seed(&random()))
    }

    /// Starts a handshake with a given ephemeral key, for tests that compare bytes.
    pub fn with_ephemeral(
        local: &KeyPair,
        remote: PublicKey,
        prologue: &[u8],
        ephemeral: KeyPair,
    ) -> Result<Self, NoiseError> {
        let symmetric = Symmetric::new(prologue, &remote);
        Ok(Self { local: local.clone(), ephemeral, remote: Point::new(remote)?, symmetric })
    }

    /// Returns the first message, with `payload`. Call it only once: a second message would reuse its keys.
    pub fn send(&mut self, payload: &[u8]) -> Result<Vec<u8>, NoiseError> {
        let ephemeral = self.ephemeral.public_key();
        let local = self.local.public_key();
        let mut message = Vec::with_capacity(32 + 32 + SEAL_LENGTH + payload.len() + SEAL_LENGTH);
        message.extend_from_slice(ephemeral.as_bytes());
        self.symmetric.mix_hash(ephemeral.as_bytes());
        self.symmetric.mix_key(&exchange(&self.ephemeral, &self.remote));
        self.symmetric.seal(local.as_bytes(), &mut message);
        self.symmetric.mix_key(&exchange(&self.local, &self.remote));
        self.symmetric.seal(payload, &mut message);
        if message.len() > MESSAGE_LENGTH_MAX {
            return Err(NoiseError::Length);
        }
        Ok(message)
    }

    /// Processes the response. A forged response does not change the handshake, so the real one can still be received.
    pub fn receive(&self, message: &[u8]) -> Result<(Vec<u8>, Session), NoiseError> {
        if message.len() > MESSAGE_LENGTH_MAX {
            return Err(NoiseError::Length);
        }
        let (ephemeral, sealed) = message.split_first_chunk::<32>().ok_or(NoiseError::Length)?;
        let mut symmetric = self.symmetric.clone();
        symmetric.mix_hash(ephemeral);
        let ephemeral = Point::new(PublicKey(*ephemeral))?;
        symmetric.mix_key(&exchange(&self.ephemeral, &ephemeral));
        symmetric.mix_key(&exchange(&self.local, &ephemeral));
        let payload = symmetric.open(sealed)?;
        Ok((payload, symmetric.session(true, self.local.public_key(), self.remote.key())))
    }
}

/// The side that responds to the handshake, and learns the other side's key from it.
pub struct Responder {
    local: KeyPair,
    ephemeral: KeyPair,
    symmetric: Symmetric,
    /// The initiator's static and ephemeral keys, once its message was received.
    remote: Option<(Point, Point)>,
}

impl Responder {
    /// Starts to wait for a handshake addressed to `local`.
    pub fn new(local: &KeyPair, prologue: &[u8]) -> Self {
        Self::with_ephemeral(local, prologue, KeyPair::from_seed(&random()))
    }

    /// Starts to wait for a handshake with a given ephemeral key for the response, for tests that compare bytes.
    pub fn with_ephemeral(local: &KeyPair, prologue: &[u8], ephemeral: KeyPair) -> Self {
        let symmetric = Symmetric::new(prologue, &local.public_key());
        Self { local: local.clone(), ephemeral, symmetric, remote: None }
    }

    /// Processes the first message. Returns its payload and the sender's verified static key.
    pub fn receive(&mut self, message: &[u8]) -> Result<(Vec<u8>, PublicKey), NoiseError> {
        if message.len() > MESSAGE_LENGTH_MAX {
            return Err(NoiseError::Length);
        }
        let (ephemeral, rest) = message.split_first_chunk::<32>().ok_or(NoiseError::Length)?;
        let (sealed_key, sealed_payload) = rest.split_at_checked(32 + SEAL_LENGTH).ok_or(NoiseError::Length)?;
        // Works on a copy, so that a bad message does not change the handshake.
        let mut symmetric = self.symmetric.clone();
        symmetric.mix_hash(ephemeral);
        let ephemeral = Point::new(PublicKey(*ephemeral))?;
        symmetric.mix_key(&exchange(&self.local, &ephemeral));
        let remote = symmetric.open(sealed_key)?;
        let remote = Point::new(PublicKey(remote.try_into().map_err(|_| NoiseError::Length)?))?;
        symmetric.mix_key(&exchange(&self.local, &remote));
        let payload = symmetric.open(sealed_payload)?;
        self.symmetric = symmetric;
        self.remote = Some((remote, ephemeral));
        Ok((payload, remote.key()))
    }

    /// Returns the response, with `payload`, and the session.
    pub fn send(mut self, payload: &[u8]) -> Result<(Vec<u8>, Session), NoiseError> {
        let (remote, remote_ephemeral) = self.remote.ok_or(NoiseError::Key)?;
        let ephemeral = self.ephemeral.public_key();
        let mut message = Vec::with_capacity(32 + payload.len() + SEAL_LENGTH);
        message.extend_from_slice(ephemeral.as_bytes());
        self.symmetric.mix_hash(ephemeral.as_bytes());
        self.symmetric.mix_key(&exchange(&self.ephemeral, &remote_ephemeral));
        self.symmetric.mix_key(&exchange(&self.ephemeral, &remote));
        self.symmetric.seal(payload, &mut message);
        if message.len() > MESSAGE_LENGTH_MAX {
            return Err(NoiseError::Length);
        }
        Ok((message, self.symmetric.session(false, self.local.public_key(), remote.key())))
    }
}

#[cfg(test)]
mod tests;

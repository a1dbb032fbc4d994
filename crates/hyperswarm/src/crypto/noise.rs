//! The handshake that opens a connection: `Noise_IK_Ed25519_ChaChaPoly_BLAKE2b`.

use super::PublicKey;

/// What a finished handshake leaves behind.
#[derive(Clone)]
pub struct Session {
    /// Whether this side sent the first message.
    pub is_initiator: bool,
    /// This side's static key.
    pub local_key: PublicKey,
    /// The other side's static key, proven.
    pub remote_key: PublicKey,
    /// The key that seals what this side sends.
    pub tx: [u8; 32],
    /// The key that opens what the other side sends.
    pub rx: [u8; 32],
    /// The hash of the whole handshake: the same on both sides, and of this connection alone.
    pub hash: [u8; 64],
}

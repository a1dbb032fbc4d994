//! Signed envelopes. A signature covers the bytes that were received, never a re-encoding of them.

use ed25519_dalek::{Signature, SigningKey, VerifyingKey};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::PublicKey;

/// A node's key pair. The public key is the node's address and id.
#[derive(Clone)]
pub struct NodeKey(SigningKey);

impl NodeKey {
    /// Makes the key pair from a 32-byte seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Returns the public key.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// Returns the 32 secret bytes, for code that needs the key in another form.
    pub fn seed(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }

    /// Signs a text of one kind, such as `health-report`.
    pub fn sign(&self, kind: &str, body: String) -> Signed {
        use ed25519_dalek::Signer as _;
        let signature = self.0.sign(&signed_bytes(kind, body.as_bytes()));
        Signed { key: self.public_key(), signature: hex::encode(signature.to_bytes()), body }
    }
}

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "NodeKey({})", self.public_key())
    }
}

/// A text with its signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Signed {
    /// The text, exactly as it was signed: a JSON document in a string.
    pub body: String,
    /// Public key of the signer.
    pub key: PublicKey,
    /// The ed25519 signature, 128 lower-case hex digits.
    pub signature: String,
}

/// The signature is not valid for the key and the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not verify")]
pub struct BadSignature;

impl Signed {
    /// Checks the signature strictly: weak keys and non-canonical encodings are refused.
    pub fn verify(&self, kind: &str) -> Result<(), BadSignature> {
        let key = VerifyingKey::from_bytes(&self.key.0).map_err(|_| BadSignature)?;
        let mut signature = [0; 64];
        // A signature has one spelling, so that texts can be compared.
        if self.signature.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(BadSignature);
        }
        hex::decode_to_slice(&self.signature, &mut signature).map_err(|_| BadSignature)?;
        key.verify_strict(&signed_bytes(kind, self.body.as_bytes()), &Signature::from_bytes(&signature))
            .map_err(|_| BadSignature)
    }
}

/// Returns the bytes that are signed: `tether/<kind>/v1`, a zero byte, the length as little-endian u64, the body. The
/// domain at the start prevents the use of a signature of one kind as another.
fn signed_bytes(kind: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(kind.len() + body.len() + 20);
    bytes.extend_from_slice(b"tether/");
    bytes.extend_from_slice(kind.as_bytes());
    bytes.extend_from_slice(b"/v1\0");
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed() -> Signed {
        NodeKey::from_seed(&[7; 32]).sign("health-report", "{\"seq\":1}".to_owned())
    }

    #[test]
    fn what_a_node_signs_verifies() {
        assert_eq!(signed().verify("health-report"), Ok(()));
    }

    #[test]
    fn a_signature_holds_for_one_kind_one_text_and_one_key() {
        assert_eq!(signed().verify("control"), Err(BadSignature));
        assert_eq!(Signed { body: "{\"seq\":2}".into(), ..signed() }.verify("health-report"), Err(BadSignature));
        let other = NodeKey::from_seed(&[8; 32]).public_key();
        assert_eq!(Signed { key: other, ..signed() }.verify("health-report"), Err(BadSignature));
    }

    #[test]
    fn a_signature_has_one_spelling() {
        let upper = Signed { signature: signed().signature.to_uppercase(), ..signed() };
        assert_eq!(upper.verify("health-report"), Err(BadSignature));
    }

    #[test]
    fn any_flipped_bit_of_a_signature_is_noticed() {
        let good = hex::decode(signed().signature).expect("hex");
        for bit in 0..512 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let forged = Signed { signature: hex::encode(bytes), ..signed() };
            assert_eq!(forged.verify("health-report"), Err(BadSignature), "bit {bit}");
        }
    }

    #[test]
    fn a_key_of_small_order_signs_nothing() {
        // The neutral element: lenient verification accepts R = identity, s = 0 for any text under it.
        let mut identity = [0; 32];
        identity[0] = 1;
        let mut signature = [0; 64];
        signature[0] = 1;
        let forged = Signed { body: "anything".into(), key: PublicKey(identity), signature: hex::encode(signature) };
        assert_eq!(forged.verify("health-report"), Err(BadSignature));
    }
}

//! The list of revoked nodes, signed by the pool's root key.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::codec;
use crate::id::PublicKey;
use crate::signature::{NodeKey, Signed};

/// The kind under which revocation lists are signed.
pub const KIND: &str = "revocations";
/// Version of the format.
pub const VERSION: u32 = 1;
/// The maximum size of a list in bytes, enough for about a hundred thousand keys.
pub const LIST_BYTES_MAX: usize = 8 * 1024 * 1024;

/// The maximum size of a stamp in bytes.
pub const STAMP_BYTES_MAX: usize = 1024;

/// The revoked nodes whose certificates may still be valid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Admission.Revocations")]
pub struct RevocationList {
    /// The contract's version: 1.
    pub v: u32,
    /// Public key of the pool's root, which signs the list.
    pub pool: PublicKey,
    /// Version of the list, which increases with each revocation; 0 before the first.
    pub version: u64,
    /// Public keys of the revoked nodes.
    pub keys: BTreeSet<PublicKey>,
}

/// The kind under which stamps are signed.
pub const STAMP_KIND: &str = "revocations.stamp";

/// A dated statement of which revocation list is the newest. A registry that withholds newer lists has no newer stamps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Admission.Stamp")]
pub struct RevocationStamp {
    /// The contract's version: 1.
    pub v: u32,
    /// Public key of the pool's root, which signs the stamp.
    pub pool: PublicKey,
    /// Version of the newest list.
    pub version: u64,
    /// Time of the signature.
    pub issued_at: UnixMillis,
}

/// Why a list or a stamp is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RevocationError {
    /// The list is larger than [`LIST_BYTES_MAX`].
    #[error("the revocation list is too large")]
    TooLarge,
    /// The bytes are not a revocation list.
    #[error("the revocation list is malformed")]
    Malformed,
    /// The list has another version of the contract.
    #[error("the revocation list has another version of the contract")]
    Version,
    /// The list is signed by another root key.
    #[error("the revocation list is of another pool")]
    Pool,
    /// The signature does not verify.
    #[error("the revocation list's signature does not verify")]
    BadSignature,
}

impl RevocationList {
    /// Makes the list of a pool without revoked nodes.
    pub fn empty(pool: PublicKey) -> Self {
        Self { v: VERSION, pool, version: 0, keys: BTreeSet::new() }
    }

    /// Signs the list with the pool's root key.
    pub fn sign(&self, root: &NodeKey) -> Signed {
        root.sign(KIND, String::from_utf8(codec::encode(self)).expect("JSON is UTF-8"))
    }

    /// Returns the list if it is valid. The caller checks whether it is newer than another.
    pub fn verify(signed: &Signed, pool: PublicKey) -> Result<Self, RevocationError> {
        if signed.body.len() > LIST_BYTES_MAX {
            return Err(RevocationError::TooLarge);
        }
        if signed.key != pool {
            return Err(RevocationError::Pool);
        }
        // The signature is verified first, because parsing a long list costs more.
        signed.verify(KIND).map_err(|_| RevocationError::BadSignature)?;
        let list: Self =
            codec::decode_within(signed.body.as_bytes(), LIST_BYTES_MAX).map_err(|_| RevocationError::Malformed)?;
        if list.v != VERSION {
            return Err(RevocationError::Version);
        }
        if list.pool != pool {
            return Err(RevocationError::Pool);
        }
        Ok(list)
    }
}

impl RevocationStamp {
    /// Signs the stamp with the pool's root key.
    pub fn sign(&self, root: &NodeKey) -> Signed {
        root.sign(STAMP_KIND, String::from_utf8(codec::encode(self)).expect("JSON is UTF-8"))
    }

    /// Returns the stamp if it is valid. The caller checks its age and its version.
    pub fn verify(signed: &Signed, pool: PublicKey) -> Result<Self, RevocationError> {
        if signed.body.len() > STAMP_BYTES_MAX {
            return Err(RevocationError::TooLarge);
        }
        if signed.key != pool {
            return Err(RevocationError::Pool);
        }
        signed.verify(STAMP_KIND).map_err(|_| RevocationError::BadSignature)?;
        let stamp: Self = codec::decode(signed.body.as_bytes()).map_err(|_| RevocationError::Malformed)?;
        match stamp {
            Self { v, .. } if v != VERSION => Err(RevocationError::Version),
            Self { pool: other, .. } if other != pool => Err(RevocationError::Pool),
            stamp => Ok(stamp),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> NodeKey {
        NodeKey::from_seed(&[1; 32])
    }

    fn list() -> RevocationList {
        let keys = BTreeSet::from([PublicKey([5; 32])]);
        RevocationList { version: 3, keys, ..RevocationList::empty(root().public_key()) }
    }

    #[test]
    fn what_the_root_signed_is_believed() {
        assert_eq!(RevocationList::verify(&list().sign(&root()), root().public_key()), Ok(list()));
    }

    #[test]
    fn a_stamp_is_believed_under_its_own_kind_and_pool_only() {
        let (root, pool) = (root(), root().public_key());
        let stamp = RevocationStamp { v: VERSION, pool, version: 3, issued_at: UnixMillis(7) };
        let verify = |signed: &Signed| RevocationStamp::verify(signed, pool);
        assert_eq!(verify(&stamp.sign(&root)), Ok(stamp.clone()));
        assert_eq!(verify(&stamp.sign(&NodeKey::from_seed(&[3; 32]))), Err(RevocationError::Pool));
        assert_eq!(verify(&list().sign(&root)), Err(RevocationError::BadSignature));
        assert_eq!(verify(&root.sign(STAMP_KIND, "x".repeat(2000))), Err(RevocationError::TooLarge));
        assert_eq!(verify(&root.sign(STAMP_KIND, "[]".into())), Err(RevocationError::Malformed));
        let older = RevocationStamp { v: 2, ..stamp.clone() };
        assert_eq!(verify(&older.sign(&root)), Err(RevocationError::Version));
        let bent = Signed { body: stamp.sign(&root).body.replace(":7", ":8"), ..stamp.sign(&root) };
        assert_eq!(verify(&bent), Err(RevocationError::BadSignature));
    }

    #[test]
    fn each_kind_of_false_list_is_refused_for_its_own_reason() {
        let pool = root().public_key();
        let other = NodeKey::from_seed(&[3; 32]);
        let verify = |signed: &Signed| RevocationList::verify(signed, pool);
        assert_eq!(verify(&RevocationList { v: 2, ..list() }.sign(&root())), Err(RevocationError::Version));
        let foreign = RevocationList { pool: other.public_key(), ..list() };
        assert_eq!(verify(&foreign.sign(&root())), Err(RevocationError::Pool));
        assert_eq!(verify(&list().sign(&other)), Err(RevocationError::Pool));
        let claimed = Signed { key: pool, ..list().sign(&other) };
        assert_eq!(verify(&claimed), Err(RevocationError::BadSignature));
        let honest = list().sign(&root());
        let bent = Signed { body: honest.body.replace("\"version\":3", "\"version\":4"), ..honest.clone() };
        assert_eq!(verify(&bent), Err(RevocationError::BadSignature));
        assert_eq!(verify(&root().sign("certificate", honest.body)), Err(RevocationError::BadSignature));
        assert_eq!(verify(&root().sign(KIND, "[]".into())), Err(RevocationError::Malformed));
        assert_eq!(verify(&root().sign(KIND, " ".repeat(LIST_BYTES_MAX + 1))), Err(RevocationError::TooLarge));
    }
}

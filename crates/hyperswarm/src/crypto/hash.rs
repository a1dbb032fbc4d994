//! BLAKE2b, plain and keyed, and the namespaces that provide domain separation for signatures.

use blake2::digest::consts::U32;
use blake2::digest::{FixedOutput, Mac, Update};
use blake2::{Blake2b, Blake2bMac, Digest};

/// Returns the BLAKE2b-256 hash of the concatenated parts.
pub fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut state = Blake2b::<U32>::default();
    for part in parts {
        Digest::update(&mut state, part);
    }
    state.finalize().into()
}

/// Returns the keyed BLAKE2b-256 hash of the concatenated parts. The key has 1 to 64 bytes.
pub fn keyed_hash(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut state = <Blake2bMac<U32> as Mac>::new_from_slice(key).expect("a key has at most 64 bytes");
    for part in parts {
        Update::update(&mut state, part);
    }
    state.finalize_fixed().into()
}

/// Returns a namespace: the hash of the hash of its name and a number, as in `hypercore-crypto`.
pub fn namespace(name: &str, id: u8) -> [u8; 32] {
    hash(&[&hash(&[name.as_bytes()]), &[id]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_those_of_the_node_packages() {
        let named = |name, id| hex::encode(namespace(name, id));
        assert_eq!(named("hyperswarm/dht", 4), "36386adddf9f6fd60db83a6f42fc159d1146aa8644037664230aaa1f0179d497");
        assert_eq!(
            named("hyperswarm/secret-stream", 0),
            "a931a0155b5c09e6d28628236af83c4b8a6af9af60986edeede9dc5d63192bf7"
        );
    }

    #[test]
    fn a_key_changes_the_hash() {
        assert_ne!(keyed_hash(&[1; 64], &[b"a"]), keyed_hash(&[2; 64], &[b"a"]));
        assert_ne!(keyed_hash(&[1; 32], &[b"a"]), hash(&[b"a"]));
    }
}

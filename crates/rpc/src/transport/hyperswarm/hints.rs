//! A bounded cache of peers' relay addresses, as found by lookups. With one, a dial needs no walk through the DHT.
//! Anyone may announce on a topic, so the cache evicts rarely used peers first.

use std::net::SocketAddrV4;

use parking_lot::Mutex;
use protocol::PublicKey;
use quick_cache::unsync::Cache;

/// The number of peers whose addresses are kept.
const PEERS_MAX: usize = 4096;

pub(super) struct Hints(Mutex<Cache<PublicKey, Vec<SocketAddrV4>>>);

impl Hints {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Cache::new(PEERS_MAX)))
    }

    /// Returns a peer's addresses, none if it is unknown.
    pub(super) fn of(&self, peer: PublicKey) -> Vec<SocketAddrV4> {
        self.0.lock().get(&peer).cloned().unwrap_or_default()
    }

    /// Replaces the addresses of the peers that a lookup found. A peer without addresses keeps its last ones.
    pub(super) fn learn(&self, found: impl IntoIterator<Item = (PublicKey, Vec<SocketAddrV4>)>) {
        let mut hints = self.0.lock();
        for (peer, addresses) in found.into_iter().filter(|(_, addresses)| !addresses.is_empty()) {
            hints.insert(peer, addresses);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(number: usize) -> (PublicKey, Vec<SocketAddrV4>) {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        (PublicKey(bytes), vec![SocketAddrV4::new([192, 0, 2, 1].into(), 49737)])
    }

    #[test]
    fn a_crowd_under_a_topic_pushes_out_no_peer_that_is_found_again_and_again() {
        let (hints, peer) = (Hints::new(), hint(0));
        hints.learn((1..2 * PEERS_MAX).map(hint));
        for _ in 0..2 {
            hints.learn([peer.clone()]);
        }
        hints.learn((2 * PEERS_MAX..4 * PEERS_MAX).map(hint));
        assert_eq!(hints.of(peer.0), peer.1);
        assert!(hints.0.lock().len() <= PEERS_MAX);
    }

    #[test]
    fn a_peer_found_without_addresses_keeps_its_last_ones() {
        let (hints, peer) = (Hints::new(), hint(1));
        hints.learn([peer.clone(), (peer.0, vec![])]);
        assert_eq!(hints.of(peer.0), peer.1);
    }
}

//! Caches the addresses at which servers were found, so that the next connection needs no walk through the DHT.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddrV4;

use crate::crypto::PublicKey;

const SERVERS_MAX: usize = 512;

/// The maximum number of addresses stored for one server. A server has three relays, and possibly an address of its
/// own.
pub(super) const ADDRESSES_MAX: usize = 4;

/// The addresses of the servers that were reached most recently.
#[derive(Debug, Default)]
pub(crate) struct KnownAddresses {
    by_server: HashMap<PublicKey, Vec<SocketAddrV4>>,
    /// The servers, the most recently set last.
    order: VecDeque<PublicKey>,
}

impl KnownAddresses {
    /// Returns the addresses at which to ask for a server, best first.
    pub(crate) fn get(&self, server: &PublicKey) -> Vec<SocketAddrV4> {
        self.by_server.get(server).cloned().unwrap_or_default()
    }

    /// Replaces the addresses of a server. Evicts the server that was set longest ago when the cache is full.
    pub(crate) fn set(&mut self, server: PublicKey, addresses: impl IntoIterator<Item = SocketAddrV4>) {
        let mut kept: Vec<SocketAddrV4> = Vec::with_capacity(ADDRESSES_MAX);
        for address in addresses {
            if kept.len() < ADDRESSES_MAX && !kept.contains(&address) && address.port() != 0 {
                kept.push(address);
            }
        }
        if kept.is_empty() {
            return;
        }
        if self.by_server.insert(server, kept).is_some() {
            self.order.retain(|other| *other != server);
        }
        self.order.push_back(server);
        if self.order.len() > SERVERS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_server.remove(&oldest);
        }
    }

    /// Returns all entries, oldest first, so that setting them again in this order restores the cache.
    pub(crate) fn all(&self) -> Vec<(PublicKey, Vec<SocketAddrV4>)> {
        self.order.iter().map(|server| (*server, self.get(server))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(number: u16) -> PublicKey {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&number.to_le_bytes());
        PublicKey(key)
    }

    fn address(port: u16) -> SocketAddrV4 {
        SocketAddrV4::new([127, 0, 0, 1].into(), port)
    }

    #[test]
    fn the_server_reached_longest_ago_gives_way() {
        let mut known = KnownAddresses::default();
        for number in 0..SERVERS_MAX as u16 {
            known.set(server(number), [address(1)]);
        }
        known.set(server(0), [address(2)]);
        known.set(server(9999), [address(3)]);
        assert_eq!(known.get(&server(0)), [address(2)]);
        assert!(known.get(&server(1)).is_empty());
        let all = known.all();
        assert_eq!(all.len(), SERVERS_MAX);
        assert_eq!(all.last(), Some(&(server(9999), vec![address(3)])));
    }

    #[test]
    fn few_addresses_are_kept_and_none_twice() {
        let mut known = KnownAddresses::default();
        known.set(server(1), [5, 5, 0, 6, 7, 8, 9].map(address));
        assert_eq!(known.get(&server(1)), [5, 6, 7, 8].map(address));
        known.set(server(1), []);
        assert_eq!(known.get(&server(1)).len(), 4, "nothing learnt, nothing forgotten");
    }
}

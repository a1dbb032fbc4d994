//! Which hosts the records of a topic come from, so that no host and no network has more than its share.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

use crate::crypto::PublicKey;

/// The first three bytes of an address. Whoever rents one address of a network often has all of them.
type Network = [u8; 3];

/// The keys of a topic's records by the network and the host that announced them, the oldest of each host first.
#[derive(Debug, Default)]
pub(super) struct Shares {
    networks: BTreeMap<Network, BTreeMap<Ipv4Addr, VecDeque<PublicKey>>>,
}

impl Shares {
    pub(super) fn insert(&mut self, host: Ipv4Addr, key: PublicKey) {
        self.networks.entry(network_of(host)).or_default().entry(host).or_default().push_back(key);
    }

    pub(super) fn remove(&mut self, host: Ipv4Addr, key: &PublicKey) {
        let Some(hosts) = self.networks.get_mut(&network_of(host)) else { return };
        let Some(keys) = hosts.get_mut(&host) else { return };
        if let Some(at) = keys.iter().position(|other| other == key) {
            keys.remove(at);
        }
        if keys.is_empty() {
            hosts.remove(&host);
        }
        if hosts.is_empty() {
            self.networks.remove(&network_of(host));
        }
    }

    /// Returns the oldest key of the host that has the most in the network that has the most.
    pub(super) fn oldest_of_largest(&self) -> Option<PublicKey> {
        let in_network = |hosts: &&BTreeMap<_, VecDeque<_>>| hosts.values().map(VecDeque::len).sum::<usize>();
        let hosts = self.networks.values().max_by_key(in_network)?;
        hosts.values().max_by_key(|keys| keys.len())?.front().copied()
    }

    /// Returns `count` different keys, or all if there are fewer. Takes one of each network, then another one of each,
    /// and so on, and those of a network from its hosts in turn. `below` draws a number below another.
    pub(super) fn draw(&self, count: usize, mut below: impl FnMut(usize) -> usize) -> Vec<PublicKey> {
        let networks: Vec<Vec<&VecDeque<PublicKey>>> =
            self.networks.values().map(|hosts| hosts.values().collect()).collect();
        if networks.is_empty() {
            return Vec::new();
        }
        // A random start and a stride that is coprime to the number of networks visit each network once.
        let (first, mut stride) = (below(networks.len()), below(networks.len()));
        while greatest_common_divisor(stride, networks.len()) != 1 {
            stride += 1;
        }
        let mut visited: Vec<_> = (0..networks.len().min(count))
            .map(|step| &networks[(first + step * stride) % networks.len()])
            .map(|hosts| (hosts, below(hosts.len()), below(usize::from(u16::MAX))))
            .collect();
        let mut drawn = Vec::with_capacity(count);
        for round in 0.. {
            // The hosts of a network take turns; `depth` is how often each had its own.
            visited.retain(|(hosts, ..)| hosts.iter().any(|keys| round / hosts.len() < keys.len()));
            if visited.is_empty() {
                break;
            }
            for (hosts, first_host, first_key) in &visited {
                let keys = hosts[(first_host + round) % hosts.len()];
                let depth = round / hosts.len();
                if depth < keys.len() {
                    drawn.push(keys[(first_key + depth) % keys.len()]);
                }
                if drawn.len() == count {
                    return drawn;
                }
            }
        }
        drawn
    }
}

fn network_of(host: Ipv4Addr) -> Network {
    let [first, second, third, _] = host.octets();
    [first, second, third]
}

fn greatest_common_divisor(left: usize, right: usize) -> usize {
    if right == 0 { left } else { greatest_common_divisor(right, left % right) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> PublicKey {
        PublicKey([number; 32])
    }

    fn shares(hosts: &[([u8; 4], u8)]) -> Shares {
        let mut shares = Shares::default();
        for (host, number) in hosts {
            shares.insert((*host).into(), key(*number));
        }
        shares
    }

    #[test]
    fn the_largest_network_gives_before_the_largest_host() {
        let mut shares = shares(&[
            ([10, 0, 0, 1], 1),
            ([10, 0, 0, 1], 2),
            ([10, 0, 1, 1], 3),
            ([10, 0, 1, 2], 4),
            ([10, 0, 1, 2], 5),
        ]);
        assert_eq!(shares.oldest_of_largest(), Some(key(4)));
        shares.remove([10, 0, 1, 2].into(), &key(4));
        shares.remove([10, 0, 1, 1].into(), &key(3));
        assert_eq!(shares.oldest_of_largest(), Some(key(1)));
        shares.remove([10, 0, 0, 1].into(), &key(1));
        shares.remove([10, 0, 0, 1].into(), &key(2));
        shares.remove([10, 0, 1, 2].into(), &key(5));
        assert!(shares.networks.is_empty() && shares.oldest_of_largest().is_none());
    }

    #[test]
    fn networks_and_then_their_hosts_take_turns() {
        let mut hosts = vec![([10, 0, 0, 1], 0), ([10, 0, 1, 1], 1), ([10, 0, 1, 2], 2)];
        hosts.extend((10..60).map(|number| ([10, 0, 1, 1], number)));
        let shares = shares(&hosts);
        for chance in 0..100 {
            let drawn = shares.draw(3, |limit| chance % limit);
            assert!(drawn.contains(&key(0)) && drawn.contains(&key(2)), "{drawn:?}");
        }
        let mut all = shares.draw(100, |_| 0);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 53);
    }
}

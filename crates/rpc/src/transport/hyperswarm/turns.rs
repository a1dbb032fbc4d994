//! The order of the peers that a lookup found.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;

use hyperswarm::crypto;
use protocol::PublicKey;

/// How many peers of one network one lookup returns. Whoever announces itself chooses the addresses at which it is
/// dialled, and may name those of another network. The next lookup draws others.
const PER_NETWORK_MAX: usize = 32;

/// The first three bytes of the address of a peer's first relay, if it names one.
type Network = Option<[u8; 3]>;

/// Returns peers in random order, but one of each network before a second of any, and at most 32 of each. Keys cost
/// nothing and addresses do, so a crowd of keys at a few addresses does not come before everyone else.
pub(super) fn in_turns(found: &BTreeMap<PublicKey, Vec<SocketAddrV4>>, seed: &[u8; 32]) -> Vec<PublicKey> {
    let chance = |key: &PublicKey| crypto::hash(&[seed, &key.0]);
    let mut by_network: BTreeMap<Network, Vec<PublicKey>> = BTreeMap::new();
    for (key, addresses) in found {
        by_network.entry(network_of(addresses)).or_default().push(*key);
    }
    let mut turns = Vec::with_capacity(found.len());
    for keys in by_network.values_mut() {
        keys.sort_by_cached_key(chance);
        turns.extend(keys.iter().take(PER_NETWORK_MAX).enumerate().map(|(turn, key)| (turn, chance(key), *key)));
    }
    turns.sort_unstable();
    turns.into_iter().map(|(_, _, key)| key).collect()
}

fn network_of(addresses: &[SocketAddrV4]) -> Network {
    let [first, second, third, _] = addresses.first()?.ip().octets();
    Some([first, second, third])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u16) -> PublicKey {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        PublicKey(key)
    }

    fn at(host: [u8; 4]) -> Vec<SocketAddrV4> {
        vec![SocketAddrV4::new(host.into(), 49_737)]
    }

    #[test]
    fn ten_thousand_keys_of_three_networks_come_after_one_peer_of_each_other_network() {
        let mut found: BTreeMap<_, _> =
            (0..10_000).map(|number| (key(number), at([10, 66, (number % 3) as u8, number as u8]))).collect();
        let honest = [key(20_000), key(20_001)];
        found.insert(honest[0], at([10, 1, 0, 1]));
        found.insert(honest[1], vec![]);
        for seed in 0..20 {
            let order = in_turns(&found, &[seed; 32]);
            assert_eq!(order.len(), 3 * PER_NETWORK_MAX + honest.len());
            assert!(honest.iter().all(|key| order[..5].contains(key)));
        }
    }

    #[test]
    fn peers_of_one_network_come_in_an_order_that_their_keys_do_not_decide() {
        let found: BTreeMap<_, _> = (0..100).map(|number| (key(number), at([10, 0, 0, 1]))).collect();
        let first = |seed: u8| in_turns(&found, &[seed; 32])[0];
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
        let late = (0..100).filter(|seed| first(*seed) >= key(50)).count();
        assert!((25..75).contains(&late), "{late}");
    }
}

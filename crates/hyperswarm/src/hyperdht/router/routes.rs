//! Routes: the addresses that servers announced themselves from.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddrV4;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Target;

/// A server announces itself again after about five minutes, and its record lives for twenty.
const AGE_MAX: Duration = Duration::from_mins(20);

const ROUTES_MAX: usize = 65_536;

/// The first three bytes of an address. Whoever rents one address of a network often has all of them.
type Network = [u8; 3];

/// The route to one server.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) relay: SocketAddrV4,
    pub(super) record: Bytes,
    seen: Instant,
    order: u64,
}

/// Routes to servers: bounded, and none older than its record may be. If the table is full, the oldest route of the
/// network that has the most gives way, because keys of servers cost nothing and addresses do.
#[derive(Debug, Default)]
pub(super) struct Routes {
    by_target: HashMap<Target, Route>,
    /// Every route by age.
    order: BTreeMap<u64, Target>,
    /// The places of each network's routes in the order.
    by_network: HashMap<Network, BTreeSet<u64>>,
    /// Every network by its number of routes.
    by_size: BTreeSet<(usize, Network)>,
    orders: u64,
}

impl Routes {
    pub(super) fn get(&self, target: &Target, now: Instant) -> Option<&Route> {
        self.by_target.get(target).filter(|route| now - route.seen < AGE_MAX)
    }

    /// Stores a route. It replaces an earlier one to the same server.
    pub(super) fn insert(&mut self, target: Target, relay: SocketAddrV4, record: Bytes, now: Instant) {
        self.remove(&target);
        self.expire(now);
        if self.by_target.len() >= ROUTES_MAX {
            self.remove_oldest_of_largest();
        }
        self.orders += 1;
        let order = self.orders;
        self.order.insert(order, target);
        self.change(network_of(relay), |orders| orders.insert(order));
        self.by_target.insert(target, Route { relay, record, seen: now, order });
    }

    pub(super) fn remove(&mut self, target: &Target) {
        let Some(Route { relay, order, .. }) = self.by_target.remove(target) else { return };
        self.order.remove(&order);
        self.change(network_of(relay), |orders| orders.remove(&order));
    }

    fn expire(&mut self, now: Instant) {
        while let Some((_, target)) = self.order.first_key_value() {
            let target = *target;
            if self.get(&target, now).is_some() {
                return;
            }
            self.remove(&target);
        }
    }

    fn remove_oldest_of_largest(&mut self) {
        let oldest = self.by_size.last().and_then(|(_, network)| self.by_network.get(network)?.first());
        if let Some(target) = oldest.and_then(|order| self.order.get(order)).copied() {
            self.remove(&target);
        }
    }

    fn change(&mut self, network: Network, change: impl FnOnce(&mut BTreeSet<u64>) -> bool) {
        let orders = self.by_network.entry(network).or_default();
        self.by_size.remove(&(orders.len(), network));
        change(orders);
        match orders.len() {
            0 => drop(self.by_network.remove(&network)),
            size => drop(self.by_size.insert((size, network))),
        }
    }
}

fn network_of(relay: SocketAddrV4) -> Network {
    let [first, second, third, _] = relay.ip().octets();
    [first, second, third]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(number: u32) -> Target {
        let mut target = [0; 32];
        target[..4].copy_from_slice(&number.to_le_bytes());
        target
    }

    fn relay(host: [u8; 4]) -> SocketAddrV4 {
        SocketAddrV4::new(host.into(), 49_737)
    }

    #[test]
    fn a_network_that_fills_the_table_takes_nobodys_place() {
        let now = Instant::now();
        let mut routes = Routes::default();
        for number in 0..50 {
            routes.insert(target(number), relay([10, 1, number as u8, 1]), Bytes::new(), now);
        }
        for number in 50..2 * ROUTES_MAX as u32 {
            routes.insert(target(number), relay([10, 66, 66, number as u8]), Bytes::new(), now);
        }
        assert_eq!(routes.by_target.len(), ROUTES_MAX);
        assert!((0..50).all(|number| routes.get(&target(number), now).is_some()));
        routes.insert(target(u32::MAX), relay([10, 2, 0, 1]), Bytes::new(), now);
        assert!(routes.get(&target(u32::MAX), now).is_some(), "a new server is not refused");
        assert!(routes.get(&target(2 * ROUTES_MAX as u32 - 1), now).is_some(), "the oldest gives way");
    }

    #[test]
    fn routes_expire_unless_they_are_renewed() {
        let now = Instant::now();
        let mut routes = Routes::default();
        routes.insert(target(1), relay([10, 0, 0, 1]), Bytes::new(), now);
        routes.insert(target(2), relay([10, 0, 0, 1]), Bytes::new(), now);
        routes.insert(target(1), relay([10, 0, 1, 1]), Bytes::new(), now + AGE_MAX / 2);
        assert!(routes.get(&target(2), now + AGE_MAX).is_none());
        routes.insert(target(3), relay([10, 0, 1, 2]), Bytes::new(), now + AGE_MAX);
        assert_eq!(routes.by_target.len(), 2);
        for number in [1, 3] {
            routes.remove(&target(number));
        }
        let Routes { by_target, order, by_network, by_size, .. } = routes;
        assert!(by_target.is_empty() && order.is_empty() && by_network.is_empty() && by_size.is_empty());
    }
}

//! Counts what each origin holds at present, such as connections.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::Ipv6Addr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::request_context::Origin;

/// An IPv6 /48 holds as much as this number of its /64 networks.
const NETWORKS_OF_SITE: usize = 8;

/// What each origin holds. Only origins that hold something are in memory. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct OriginPermits {
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    origins: HashMap<Option<Origin>, usize>,
    sites: HashMap<Ipv6Addr, usize>,
}

/// Counts against its origin until it is dropped.
#[derive(Debug)]
pub(crate) struct OriginPermit {
    origin: Option<Origin>,
    permits: OriginPermits,
}

impl OriginPermits {
    /// Returns a permit, or `None` if the origin holds `max` of them or the IPv6 site around it a multiple of that.
    pub(crate) fn acquire(&self, origin: Option<Origin>, max: usize) -> Option<OriginPermit> {
        let mut held = self.held.lock();
        let site = origin.and_then(Origin::site);
        let has_room = count(&held.origins, &origin) < max
            && site.is_none_or(|site| count(&held.sites, &site) < max.saturating_mul(NETWORKS_OF_SITE));
        if !has_room {
            return None;
        }
        *held.origins.entry(origin).or_default() += 1;
        if let Some(site) = site {
            *held.sites.entry(site).or_default() += 1;
        }
        Some(OriginPermit { origin, permits: self.clone() })
    }
}

impl Drop for OriginPermit {
    fn drop(&mut self) {
        let mut held = self.permits.held.lock();
        release(&mut held.origins, self.origin);
        if let Some(site) = self.origin.and_then(Origin::site) {
            release(&mut held.sites, site);
        }
    }
}

fn count<K: Eq + Hash>(counts: &HashMap<K, usize>, key: &K) -> usize {
    counts.get(key).copied().unwrap_or_default()
}

fn release<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: K) {
    match counts.get_mut(&key) {
        Some(count) if *count > 1 => *count -= 1,
        _ => drop(counts.remove(&key)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_holds_no_more_than_its_maximum_and_leaves_nothing_behind() {
        let permits = OriginPermits::default();
        let of = |last: u8| Some(Origin::of([192, 0, 2, last].into()));
        let held: Vec<_> = (0..3).filter_map(|_| permits.acquire(of(1), 2)).collect();
        assert_eq!(held.len(), 2);
        let other = permits.acquire(of(2), 2);
        assert!(other.is_some(), "another origin has its own");
        drop(held);
        assert!(permits.acquire(of(1), 1).is_some());
        drop(other);
        let held = permits.held.lock();
        assert!(held.origins.is_empty() && held.sites.is_empty());
    }

    #[test]
    fn an_ipv6_site_holds_no_more_than_eight_of_its_networks() {
        let permits = OriginPermits::default();
        let network = |number: u16| Some(Origin::of(Ipv6Addr::new(0x2001, 0xdb8, 7, number, 0, 0, 0, 1).into()));
        let held: Vec<_> = (0..1_000).filter_map(|number| permits.acquire(network(number), 2)).collect();
        assert_eq!(held.len(), 16);
        let elsewhere = Some(Origin::of(Ipv6Addr::new(0x2001, 0xdb8, 8, 0, 0, 0, 0, 1).into()));
        assert!(permits.acquire(elsewhere, 2).is_some(), "another site has its own");
        drop(held);
        assert!(permits.acquire(network(1), 2).is_some());
        let held = permits.held.lock();
        assert!(held.origins.is_empty() && held.sites.is_empty());
    }
}

//! Routes: the addresses that servers announced themselves from.

use std::collections::HashMap;
use std::net::SocketAddrV4;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Target;

/// A server announces itself again after about five minutes, and its record lives for twenty.
const AGE_MAX: Duration = Duration::from_mins(20);

const ROUTES_MAX: usize = 65_536;

/// The route to one server.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) relay: SocketAddrV4,
    pub(super) record: Bytes,
    seen: Instant,
}

/// Routes to servers: bounded, and none older than its record may be.
#[derive(Debug, Default)]
pub(super) struct Routes {
    by_target: HashMap<Target, Route>,
    swept: Option<Instant>,
}

impl Routes {
    pub(super) fn get(&self, target: &Target, now: Instant) -> Option<&Route> {
        self.by_target.get(target).filter(|route| now - route.seen < AGE_MAX)
    }

    /// Rejects new servers when the table is full, so that nobody can evict known servers.
    pub(super) fn insert(&mut self, target: Target, relay: SocketAddrV4, record: Bytes, now: Instant) -> bool {
        if self.by_target.len() >= ROUTES_MAX && !self.by_target.contains_key(&target) {
            // All routes are scanned once a second at most.
            if self.swept.is_some_and(|swept| now - swept < Duration::from_secs(1)) {
                return false;
            }
            self.swept = Some(now);
            self.by_target.retain(|_, route| now - route.seen < AGE_MAX);
            if self.by_target.len() >= ROUTES_MAX {
                return false;
            }
        }
        self.by_target.insert(target, Route { relay, record, seen: now });
        true
    }

    pub(super) fn remove(&mut self, target: &Target) {
        self.by_target.remove(target);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_keeps_whom_it_knows_until_they_age() {
        let now = Instant::now();
        let relay = "1.2.3.4:5".parse().unwrap();
        let mut routes = Routes::default();
        for number in 0..ROUTES_MAX as u64 {
            let mut target = [0; 32];
            target[..8].copy_from_slice(&number.to_le_bytes());
            assert!(routes.insert(target, relay, Bytes::new(), now));
        }
        assert!(!routes.insert([9; 32], relay, Bytes::new(), now));
        assert!(routes.insert([0; 32], relay, Bytes::new(), now + AGE_MAX / 2));

        assert!(routes.insert([9; 32], relay, Bytes::new(), now + AGE_MAX));
        assert_eq!(routes.by_target.len(), 2);
        assert!(routes.get(&[0; 32], now + AGE_MAX).is_some());
        assert!(routes.get(&[0; 32], now + AGE_MAX + AGE_MAX / 2).is_none());
    }
}

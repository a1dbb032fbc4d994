//! Limits how many handshakes one host may cause.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::time::Instant;

/// The handshakes that a host may cause in one burst. Many nodes may share one address.
const BURST: f64 = 1024.0;

/// The sustained number of handshakes per second. Each costs a server half a millisecond.
const PER_SECOND: f64 = 256.0;

const MACHINES_MAX: usize = 8192;

/// A token bucket for each host, and a shared one for the hosts that do not fit in the table.
#[derive(Debug, Default)]
pub(super) struct RateLimit {
    buckets: HashMap<Ipv4Addr, Bucket>,
    others: Option<Bucket>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    since: Instant,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self { tokens: BURST, since: now }
    }

    fn at(&self, now: Instant) -> f64 {
        (self.tokens + (now - self.since).as_secs_f64() * PER_SECOND).min(BURST)
    }

    fn take(&mut self, now: Instant) -> bool {
        self.tokens = self.at(now);
        self.since = now;
        let is_allowed = self.tokens >= 1.0;
        if is_allowed {
            self.tokens -= 1.0;
        }
        is_allowed
    }
}

impl RateLimit {
    /// Counts one more handshake of `machine`, and returns whether it is allowed.
    pub(super) fn take(&mut self, machine: Ipv4Addr, now: Instant) -> bool {
        // All nodes of a test network run on one host, and only that host can send from a loopback address.
        if machine.is_loopback() {
            return true;
        }
        if let Some(bucket) = self.buckets.get_mut(&machine) {
            return bucket.take(now);
        }
        if self.buckets.len() >= MACHINES_MAX {
            self.sweep(now);
        }
        if self.buckets.len() >= MACHINES_MAX {
            return self.others.get_or_insert_with(|| Bucket::full(now)).take(now);
        }
        self.buckets.entry(machine).or_insert_with(|| Bucket::full(now)).take(now)
    }

    /// Removes the hosts whose buckets are full again, once a second at most.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_none_or(|swept| now - swept >= Duration::from_secs(1)) {
            self.swept = Some(now);
            self.buckets.retain(|_, bucket| bucket.at(now) < BURST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_floods_is_slowed_down_and_others_are_not() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        let (flooder, other) = (Ipv4Addr::new(1, 2, 3, 4), Ipv4Addr::new(5, 6, 7, 8));
        assert_eq!((0..5000).filter(|_| limit.take(flooder, now)).count(), BURST as usize);
        assert!(limit.take(other, now));
        let later = now + Duration::from_secs(1);
        assert_eq!((0..5000).filter(|_| limit.take(flooder, later)).count(), PER_SECOND as usize);
    }

    #[test]
    fn invented_machines_share_what_is_left() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        let machines = (0..100_000_u32).map(Ipv4Addr::from);
        let allowed = machines.filter(|machine| limit.take(*machine, now)).count();
        assert_eq!(allowed, MACHINES_MAX + BURST as usize);
        assert_eq!(limit.buckets.len(), MACHINES_MAX);
        // They are forgotten once they are quiet.
        assert!(limit.take(Ipv4Addr::BROADCAST, now + Duration::from_secs(9)));
        assert_eq!(limit.buckets.len(), 1);
    }
}

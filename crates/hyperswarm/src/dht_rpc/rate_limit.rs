//! Limits the requests per source, so that nobody keeps this node busy.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddrV4;

use tokio::time::Instant;

const SOURCES: usize = 8_192;
/// A host may send as much as this many of its sockets, whatever ports it sends from.
const SOCKETS_PER_HOST: f32 = 4.0;

/// A token bucket per source address, and one per host other than this one. The number of buckets is fixed; a keyed
/// hash assigns sources to buckets, so several sources may share one.
#[derive(Debug)]
pub(super) struct RateLimit {
    buckets: Vec<Bucket>,
    secret: [u8; 32],
    start: Instant,
    per_second: f32,
    burst: f32,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// The tokens taken and not yet refilled.
    taken: f32,
    /// Seconds since the start.
    at: f64,
}

impl RateLimit {
    /// Allows bursts of `burst` requests and a sustained rate of `per_second`.
    pub(super) fn new(per_second: u32, burst: u32, secret: [u8; 32], start: Instant) -> Self {
        let buckets = vec![Bucket { taken: 0.0, at: 0.0 }; SOURCES];
        Self { buckets, secret, start, per_second: per_second as f32, burst: burst as f32 }
    }

    /// Counts a request from this source, and returns whether it may get a response.
    pub(super) fn allows(&mut self, source: SocketAddrV4, now: Instant) -> bool {
        // Every node of a test network runs on this host, so only its sockets are limited separately.
        self.take(&source, 1.0, now)
            && (source.ip().is_loopback() || self.take(source.ip(), 1.0 / SOCKETS_PER_HOST, now))
    }

    fn take(&mut self, source: &impl Hash, amount: f32, now: Instant) -> bool {
        let mut hasher = DefaultHasher::new();
        self.secret.hash(&mut hasher);
        source.hash(&mut hasher);
        let bucket = &mut self.buckets[hasher.finish() as usize % SOURCES];
        let at = now.saturating_duration_since(self.start).as_secs_f64();
        bucket.taken = (bucket.taken - (at - bucket.at) as f32 * self.per_second).max(0.0);
        bucket.at = at;
        let allowed = bucket.taken + amount <= self.burst;
        if allowed {
            bucket.taken += amount;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_allowed_and_then_only_the_rate() {
        let start = Instant::now();
        let mut limit = RateLimit::new(10, 20, [1; 32], start);
        let noisy = "1.1.1.1:1".parse().unwrap();
        assert_eq!((0..100).filter(|_| limit.allows(noisy, start)).count(), 20);
        let later = start + Duration::from_secs(1);
        assert_eq!((0..100).filter(|_| limit.allows(noisy, later)).count(), 10);
        assert!(limit.allows("2.2.2.2:1".parse().unwrap(), later));
    }

    #[tokio::test(start_paused = true)]
    async fn changing_ports_helps_a_foreign_host_only_so_far() {
        let start = Instant::now();
        let mut limit = RateLimit::new(10, 20, [1; 32], start);
        let foreign = (1..=2_000).map(|port| SocketAddrV4::new([9, 9, 9, 9].into(), port));
        assert_eq!(foreign.filter(|source| limit.allows(*source, start)).count(), 80);
        let mut limit = RateLimit::new(10, 20, [1; 32], start);
        let local = (1..=2_000).map(|port| SocketAddrV4::new([127, 0, 0, 1].into(), port));
        assert_eq!(local.filter(|source| limit.allows(*source, start)).count(), 2_000);
    }
}

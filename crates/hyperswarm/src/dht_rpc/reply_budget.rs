//! Limits what a host is sent before it proves its address, so that nobody can make this node flood a host whose
//! address they forge. QUIC has the same limit (RFC 9000, section 8.1).
//!
//! A request with a valid token proves the address, because only its owner was sent the token. The response to such a
//! request is free, and not counted here.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::Ipv4Addr;

use tokio::time::Instant;

const BUCKETS: usize = 8_192;
/// How many bytes a host may be sent beyond those that it sent. A walk asks each node once or twice, so walks need no
/// token.
const ALLOWANCE_BYTES: f32 = 64.0 * 1024.0;
/// How fast the allowance comes back. A host that is not the sender gets no more than this in the long run, beyond what
/// was sent in its name.
const BYTES_PER_SECOND: f32 = 64.0;

/// Counts what hosts were sent beyond what they sent. The number of buckets is fixed; a keyed hash assigns hosts to
/// buckets, so several hosts may share one.
#[derive(Debug)]
pub(super) struct ReplyBudget {
    buckets: Vec<Bucket>,
    secret: [u8; 32],
    start: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    debt_bytes: f32,
    /// Seconds since the start.
    at: f64,
}

impl ReplyBudget {
    pub(super) fn new(secret: [u8; 32], start: Instant) -> Self {
        Self { buckets: vec![Bucket { debt_bytes: 0.0, at: 0.0 }; BUCKETS], secret, start }
    }

    /// Counts a request of a host.
    pub(super) fn receive(&mut self, host: Ipv4Addr, bytes: usize, now: Instant) {
        let bucket = self.bucket(host, now);
        bucket.debt_bytes = (bucket.debt_bytes - bytes as f32).max(0.0);
    }

    /// Counts a datagram to a host, and returns whether it may be sent.
    pub(super) fn spend(&mut self, host: Ipv4Addr, bytes: usize, now: Instant) -> bool {
        // Every node of a test network runs on this host.
        if host.is_loopback() {
            return true;
        }
        let bucket = self.bucket(host, now);
        let debt_bytes = bucket.debt_bytes + bytes as f32;
        let is_allowed = debt_bytes <= ALLOWANCE_BYTES;
        if is_allowed {
            bucket.debt_bytes = debt_bytes;
        }
        is_allowed
    }

    fn bucket(&mut self, host: Ipv4Addr, now: Instant) -> &mut Bucket {
        let mut hasher = DefaultHasher::new();
        self.secret.hash(&mut hasher);
        host.hash(&mut hasher);
        let at = now.saturating_duration_since(self.start).as_secs_f64();
        let bucket = &mut self.buckets[hasher.finish() as usize % BUCKETS];
        bucket.debt_bytes = (bucket.debt_bytes - (at - bucket.at) as f32 * BYTES_PER_SECOND).max(0.0);
        bucket.at = at;
        bucket
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_host_is_sent_the_allowance_once_and_then_as_much_as_it_sends() {
        let start = Instant::now();
        let mut budget = ReplyBudget::new([1; 32], start);
        let host = Ipv4Addr::new(10, 0, 0, 1);
        let allowed = |budget: &mut ReplyBudget, now| (0..1_000).filter(|_| budget.spend(host, 1_024, now)).count();
        assert_eq!(allowed(&mut budget, start), 64);
        assert!(budget.spend(Ipv4Addr::new(10, 0, 0, 2), 1_024, start), "another host has its own");
        budget.receive(host, 3 * 1_024, start);
        assert_eq!(allowed(&mut budget, start), 3);
        assert_eq!(allowed(&mut budget, start + Duration::from_mins(1)), 3);
        let silent = start + Duration::from_hours(1);
        budget.receive(host, 1_000_000, silent);
        assert_eq!(allowed(&mut budget, silent), 64, "what a host sent earlier adds nothing");
    }
}

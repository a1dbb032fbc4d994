//! Limits how many handshakes one host may cause.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::time::Instant;

/// How many handshakes the sender of the datagrams may cause. Many nodes may share one address, and a relay sends those
/// of its clients. Each costs a server half a millisecond.
const SENDER: Rate = Rate { burst: 1024.0, per_second: 256.0 };

/// How many of a sender's handshakes may be for one client that it names, so that a client of a relay leaves most of
/// the relay's to the others.
const CLIENT: Rate = Rate { burst: 256.0, per_second: 64.0 };

/// The maximum number of senders, and of pairs of a sender and a client, that have a bucket of their own.
const BUCKETS_MAX: usize = 8192;

/// Token buckets for each sender, and for each client that a sender names.
///
/// Only the sender's address is more than a claim, and even that may be spoofed. A claimed client never has a bucket
/// that several senders share: otherwise each of them could spend what the client has left.
#[derive(Debug)]
pub(super) struct RateLimit {
    senders: Buckets<Ipv4Addr>,
    clients: Buckets<(Ipv4Addr, Ipv4Addr)>,
    /// Shared by the senders that do not fit in the table.
    others: Option<Bucket>,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self { senders: Buckets::new(SENDER), clients: Buckets::new(CLIENT), others: None }
    }
}

impl RateLimit {
    /// Counts one more handshake of a sender, and returns whether it is allowed.
    pub(super) fn take(&mut self, sender: Ipv4Addr, now: Instant) -> bool {
        // All nodes of a test network run on one host. The kernel drops datagrams with a loopback source that come from
        // another host. The same address in the payload of a datagram proves nothing.
        sender.is_loopback() || self.sender(sender, now).take(SENDER, now)
    }

    /// Counts one more handshake that a relay sends for a client, and returns whether it is allowed.
    pub(super) fn take_relayed(&mut self, relay: Ipv4Addr, client: Ipv4Addr, now: Instant) -> bool {
        if relay.is_loopback() {
            return true;
        }
        // A refused handshake costs the relay nothing, so that one client cannot spend what the relay has.
        if self.sender(relay, now).at(SENDER, now) < 1.0 {
            return false;
        }
        // While the table is full, only the relay's own limit counts.
        if self.clients.get((relay, client), now).is_some_and(|bucket| !bucket.take(CLIENT, now)) {
            return false;
        }
        self.sender(relay, now).take(SENDER, now)
    }

    fn sender(&mut self, sender: Ipv4Addr, now: Instant) -> &mut Bucket {
        match self.senders.get(sender, now) {
            Some(bucket) => bucket,
            None => self.others.get_or_insert_with(|| Bucket::full(SENDER, now)),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Rate {
    burst: f64,
    per_second: f64,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    since: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Self {
        Self { tokens: rate.burst, since: now }
    }

    fn at(&self, rate: Rate, now: Instant) -> f64 {
        (self.tokens + (now - self.since).as_secs_f64() * rate.per_second).min(rate.burst)
    }

    fn take(&mut self, rate: Rate, now: Instant) -> bool {
        self.tokens = self.at(rate, now);
        self.since = now;
        let is_allowed = self.tokens >= 1.0;
        if is_allowed {
            self.tokens -= 1.0;
        }
        is_allowed
    }
}

/// A bounded table of buckets.
#[derive(Debug)]
struct Buckets<K> {
    rate: Rate,
    by_key: HashMap<K, Bucket>,
    swept: Option<Instant>,
}

impl<K: Eq + Hash + Copy> Buckets<K> {
    fn new(rate: Rate) -> Self {
        Self { rate, by_key: HashMap::new(), swept: None }
    }

    /// Returns the bucket of a key, or `None` if the table is full.
    fn get(&mut self, key: K, now: Instant) -> Option<&mut Bucket> {
        let is_new = !self.by_key.contains_key(&key);
        if is_new && self.by_key.len() >= BUCKETS_MAX {
            self.sweep(now);
            if self.by_key.len() >= BUCKETS_MAX {
                return None;
            }
        }
        Some(self.by_key.entry(key).or_insert_with(|| Bucket::full(self.rate, now)))
    }

    /// Removes the buckets that are full again, once a second at most.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_none_or(|swept| now - swept >= Duration::from_secs(1)) {
            self.swept = Some(now);
            self.by_key.retain(|_, bucket| bucket.at(self.rate, now) < self.rate.burst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENDER_BURST: usize = SENDER.burst as usize;
    const CLIENT_BURST: usize = CLIENT.burst as usize;

    fn host(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, number)
    }

    #[test]
    fn a_machine_that_floods_is_slowed_down_and_others_are_not() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        assert_eq!((0..5000).filter(|_| limit.take(host(1), now)).count(), SENDER_BURST);
        assert!(limit.take(host(2), now));
        let later = now + Duration::from_secs(1);
        assert_eq!((0..5000).filter(|_| limit.take(host(1), later)).count(), SENDER.per_second as usize);
    }

    #[test]
    fn naming_many_clients_helps_a_sender_no_more_than_naming_itself() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        let clients = (0..100_000_u32).map(Ipv4Addr::from);
        assert_eq!(clients.filter(|client| limit.take_relayed(host(1), *client, now)).count(), SENDER_BURST);
        assert!(!limit.take_relayed(host(1), Ipv4Addr::LOCALHOST, now), "a claim to be on this host is a claim");
        assert!(!limit.take(host(1), now));
        assert!(limit.clients.by_key.len() <= SENDER_BURST + 1);
    }

    #[test]
    fn a_claim_costs_the_claimed_host_nothing() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        assert_eq!((0..5000).filter(|_| limit.take_relayed(host(1), host(2), now)).count(), CLIENT_BURST);
        assert!(limit.take(host(2), now));
        assert_eq!((0..5000).filter(|_| limit.take_relayed(host(3), host(2), now)).count(), CLIENT_BURST);
    }

    #[test]
    fn one_client_of_a_relay_leaves_most_of_its_handshakes_to_the_others() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        assert_eq!((0..5000).filter(|_| limit.take_relayed(host(1), host(2), now)).count(), CLIENT_BURST);
        let others =
            (0..SENDER_BURST).filter(|number| limit.take_relayed(host(1), host(100 + *number as u8 % 100), now));
        assert_eq!(others.count(), SENDER_BURST - CLIENT_BURST);
    }

    #[test]
    fn invented_machines_share_what_is_left() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        let machines = (0..100_000_u32).map(Ipv4Addr::from);
        let allowed = machines.filter(|machine| limit.take(*machine, now)).count();
        assert_eq!(allowed, BUCKETS_MAX + SENDER_BURST);
        assert_eq!(limit.senders.by_key.len(), BUCKETS_MAX);
        // They are forgotten once they are quiet.
        assert!(limit.take(Ipv4Addr::BROADCAST, now + Duration::from_secs(9)));
        assert_eq!(limit.senders.by_key.len(), 1);
    }
}

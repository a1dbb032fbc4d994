//! Which of the nodes that announce themselves on a topic are asked next.
//!
//! Anyone may announce, and keys cost nothing. So nodes that turned out not to be peers are asked less and less
//! often, and after those that were never asked.

use std::time::Duration;

use protocol::PublicKey;
use quick_cache::unsync::Cache;
use tokio::time::Instant;

use crate::backoff::{self, Backoff};

/// The delay before a node that turned out not to be a peer is asked again. It doubles each time.
const REST: Duration = Duration::from_millis(250);
/// The maximum delay before such a node is asked again.
const REST_MAX: Duration = Duration::from_mins(5);
/// How many such nodes are remembered.
const STRANGERS_MAX: usize = 16_384;
/// How many nodes are remembered that have been peers. They are asked each time, because they may come back.
const PEERS_MAX: usize = 256;

/// Remembers the outcomes of asking nodes.
pub(super) struct Candidates {
    own_key: PublicKey,
    strangers: Cache<PublicKey, Rest>,
    peers: Cache<PublicKey, ()>,
}

/// A node that turned out not to be a peer.
struct Rest {
    backoff: Backoff,
    failures: u32,
    until: Instant,
}

impl Candidates {
    pub(super) fn new(own_key: PublicKey) -> Self {
        Self { own_key, strangers: Cache::new(STRANGERS_MAX), peers: Cache::new(PEERS_MAX) }
    }

    /// Returns up to `count` of the nodes that may be asked now: those first that failed least often, otherwise in the
    /// given order.
    pub(super) fn choose(
        &self,
        nodes: impl IntoIterator<Item = PublicKey>,
        count: usize,
        now: Instant,
    ) -> Vec<PublicKey> {
        let failures = |key: PublicKey| match self.strangers.get(&key) {
            Some(rest) => (rest.until <= now).then_some((rest.failures, key)),
            None => Some((0, key)),
        };
        let mut due: Vec<_> = nodes.into_iter().filter_map(failures).collect();
        due.sort_by_key(|(failures, _)| *failures);
        due.into_iter().take(count).map(|(_, key)| key).collect()
    }

    /// Returns whether a node turned out not to be a peer when it was last asked.
    pub(super) fn has_failed(&self, key: PublicKey) -> bool {
        self.strangers.get(&key).is_some()
    }

    /// Records whether a node that was asked is a peer.
    pub(super) fn note(&mut self, key: PublicKey, is_peer: bool, now: Instant) {
        if is_peer {
            self.strangers.remove(&key);
            self.peers.insert(key, ());
        } else if self.peers.get(&key).is_some() {
            // It may be restarting.
        } else if let Some(mut rest) = self.strangers.get_mut(&key) {
            rest.failures += 1;
            rest.until = now + rest.backoff.next_wait();
        } else {
            let mut backoff = Backoff::new(REST, REST_MAX, backoff::seed_of([self.own_key, key]));
            let until = now + backoff.next_wait();
            self.strangers.insert(key, Rest { backoff, failures: 1, until });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> PublicKey {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        PublicKey(key)
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_that_were_never_asked_come_before_those_that_failed() {
        let (mut candidates, now) = (Candidates::new(key(0)), Instant::now());
        let all = || (1..=6).map(key);
        assert_eq!(candidates.choose(all(), 3, now), [1, 2, 3].map(key));
        for number in [1, 2, 3, 1] {
            candidates.note(key(number), false, now);
        }
        assert_eq!(candidates.choose(all(), 6, now), [4, 5, 6].map(key), "the others rest");
        let later = now + REST * 4;
        assert_eq!(candidates.choose(all(), 6, later), [4, 5, 6, 2, 3, 1].map(key));
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_is_no_peer_is_asked_less_and_less_often_and_one_that_was_a_peer_each_time() {
        let (mut candidates, begin) = (Candidates::new(key(0)), Instant::now());
        candidates.note(key(2), true, begin);
        let mut times = [0; 2];
        for tenth in 0..36_000 {
            let now = begin + Duration::from_millis(100) * tenth;
            for asked in candidates.choose([key(1), key(2)], 2, now) {
                candidates.note(asked, false, now);
                times[usize::from(asked == key(2))] += 1;
            }
        }
        assert!((14..=40).contains(&times[0]), "asked {} times in an hour", times[0]);
        assert_eq!(times[1], 36_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_takes_bounded_memory() {
        let (mut candidates, now) = (Candidates::new(key(0)), Instant::now());
        for number in 0..20_000 {
            candidates.note(key(number), false, now);
            candidates.note(key(number + 20_000), true, now);
        }
        assert!(candidates.strangers.len() <= STRANGERS_MAX && candidates.peers.len() <= PEERS_MAX);
    }
}

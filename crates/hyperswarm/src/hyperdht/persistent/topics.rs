//! Stores which peers announced which topic.

mod shares;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use self::shares::Shares;
use crate::crypto::PublicKey;
use crate::dht_rpc::Id;

/// The maximum number of peers under one topic, so that one topic cannot fill the store. The largest share gives way to
/// another peer.
const TOPIC_MAX: usize = 4_096;

/// The maximum number of records of one host under all topics, so that one host cannot fill the store. Its own oldest
/// gives way to another one.
const HOST_MAX: usize = 4_096;

/// Records by topic. They expire, and the oldest are evicted when the store is full.
///
/// Keys cost nothing, so the limits go by the hosts that announce, which have shown tokens.
#[derive(Debug)]
pub(super) struct Topics {
    topics: HashMap<Id, Topic>,
    /// Every record by age.
    order: BTreeMap<u64, (Id, PublicKey)>,
    /// The places of each host's records in the order.
    by_host: HashMap<Ipv4Addr, BTreeSet<u64>>,
    orders: u64,
    records_max: usize,
    age_max: Duration,
    chance: u64,
}

#[derive(Debug, Default)]
struct Topic {
    records: HashMap<PublicKey, Record>,
    shares: Shares,
}

#[derive(Debug)]
struct Record {
    bytes: Bytes,
    host: Ipv4Addr,
    order: u64,
    set: Instant,
}

impl Topics {
    pub(super) fn new(records_max: usize, age_max: Duration, seed: u64) -> Self {
        let (topics, order, by_host) = (HashMap::new(), BTreeMap::new(), HashMap::new());
        Self { topics, order, by_host, orders: 0, records_max, age_max, chance: seed | 1 }
    }

    /// Stores a record that a host announced. One that is already stored becomes the youngest.
    pub(super) fn insert(&mut self, topic: Id, public_key: PublicKey, bytes: Bytes, host: Ipv4Addr, now: Instant) {
        self.remove(&topic, &public_key);
        self.expire(now);
        let full = self.topics.get(&topic).filter(|topic| topic.records.len() >= TOPIC_MAX);
        if let Some(key) = full.and_then(|topic| topic.shares.oldest_of_largest()) {
            self.remove(&topic, &key);
        }
        let of_host = self.by_host.get(&host).filter(|orders| orders.len() >= HOST_MAX);
        if let Some(oldest) = of_host.and_then(|orders| orders.first().copied()) {
            self.remove_at(oldest);
        }
        while self.order.len() >= self.records_max {
            self.remove_oldest();
        }
        self.orders += 1;
        let order = self.orders;
        self.order.insert(order, (topic, public_key));
        self.by_host.entry(host).or_default().insert(order);
        let topic = self.topics.entry(topic).or_default();
        topic.records.insert(public_key, Record { bytes, host, order, set: now });
        topic.shares.insert(host, public_key);
    }

    /// Removes a record.
    pub(super) fn remove(&mut self, topic_id: &Id, public_key: &PublicKey) {
        let Some(topic) = self.topics.get_mut(topic_id) else { return };
        let Some(Record { host, order, .. }) = topic.records.remove(public_key) else { return };
        topic.shares.remove(host, public_key);
        if topic.records.is_empty() {
            self.topics.remove(topic_id);
        }
        self.order.remove(&order);
        if let Some(orders) = self.by_host.get_mut(&host) {
            orders.remove(&order);
            if orders.is_empty() {
                self.by_host.remove(&host);
            }
        }
    }

    /// Returns up to `count` records of a topic. If there are more, networks and then hosts take turns, from a random
    /// one on.
    pub(super) fn draw(&mut self, topic: &Id, count: usize, now: Instant) -> Vec<Bytes> {
        self.expire(now);
        let Some(Topic { records, shares }) = self.topics.get(topic) else { return Vec::new() };
        let chance = &mut self.chance;
        let keys = shares.draw(count, |limit| draw_below(chance, limit));
        keys.iter().filter_map(|key| records.get(key)).map(|record| record.bytes.clone()).collect()
    }

    fn expire(&mut self, now: Instant) {
        while let Some((order, (topic, public_key))) = self.order.first_key_value() {
            let record = self.topics.get(topic).and_then(|topic| topic.records.get(public_key));
            let set = record.map_or(now, |record| record.set);
            if now.saturating_duration_since(set) < self.age_max {
                return;
            }
            self.remove_at(*order);
        }
    }

    fn remove_oldest(&mut self) {
        if let Some((order, _)) = self.order.first_key_value() {
            self.remove_at(*order);
        }
    }

    fn remove_at(&mut self, order: u64) {
        if let Some((topic, public_key)) = self.order.remove(&order) {
            self.remove(&topic, &public_key);
        }
    }
}

/// Returns a number below `limit`, which is not zero.
fn draw_below(chance: &mut u64, limit: usize) -> usize {
    *chance ^= *chance << 13;
    *chance ^= *chance >> 7;
    *chance ^= *chance << 17;
    (*chance >> 16) as usize % limit
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Ipv4Addr = Ipv4Addr::LOCALHOST;
    const ATTACKER: Ipv4Addr = Ipv4Addr::new(10, 66, 66, 66);

    fn key(number: u16) -> PublicKey {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&number.to_le_bytes());
        PublicKey(key)
    }

    fn filled(count: u16, records_max: usize, now: Instant) -> Topics {
        let mut topics = Topics::new(records_max, Duration::from_mins(20), 7);
        for number in 0..count {
            topics.insert([1; 32], key(number), Bytes::copy_from_slice(&number.to_le_bytes()), HOST, now);
        }
        topics
    }

    #[tokio::test(start_paused = true)]
    async fn every_record_is_drawn_sooner_or_later_and_none_twice_at_once() {
        let now = Instant::now();
        let mut topics = filled(60, 100, now);
        let mut met = std::collections::HashSet::new();
        for _ in 0..100 {
            let mut drawn = topics.draw(&[1; 32], 20, now);
            met.extend(drawn.iter().cloned());
            drawn.sort();
            drawn.dedup();
            assert_eq!(drawn.len(), 20);
        }
        assert_eq!(met.len(), 60);
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_give_way_when_the_store_is_full() {
        let now = Instant::now();
        let mut topics = filled(30, 10, now);
        let drawn = topics.draw(&[1; 32], 20, now);
        assert_eq!(drawn.len(), 10);
        assert!(drawn.contains(&Bytes::copy_from_slice(&29_u16.to_le_bytes())));
        topics.insert([2; 32], key(1), Bytes::new(), HOST, now);
        assert_eq!(topics.draw(&[1; 32], 20, now).len(), 9);
    }

    #[tokio::test(start_paused = true)]
    async fn one_topic_cannot_fill_the_store() {
        let now = Instant::now();
        let mut topics = Topics::new(65_536, Duration::from_mins(20), 7);
        for number in 0..5_000_u16 {
            let [high, low] = number.to_be_bytes();
            topics.insert([1; 32], key(number), Bytes::new(), [10, high, low, 1].into(), now);
        }
        assert_eq!(topics.order.len(), TOPIC_MAX);
    }

    /// Stores one record of each of fifty hosts in networks of their own. Their bytes begin with 1.
    fn with_fifty_hosts(now: Instant) -> Topics {
        let mut topics = Topics::new(65_536, Duration::from_mins(20), 7);
        for number in 0..50 {
            let host = [10, 1, number, 1].into();
            topics.insert([1; 32], key(number.into()), Bytes::copy_from_slice(&[1, number]), host, now);
        }
        topics
    }

    /// Returns how many of the fifty are stored, and the fewest that a lookup names.
    fn honest(topics: &mut Topics, now: Instant) -> (usize, usize) {
        let topic = &topics.topics[&[1; 32]];
        let stored = topic.records.values().filter(|record| record.bytes.first() == Some(&1)).count();
        let named = |drawn: Vec<Bytes>| drawn.iter().filter(|bytes| bytes.first() == Some(&1)).count();
        (stored, (0..100).map(|_| named(topics.draw(&[1; 32], 20, now))).min().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_floods_a_topic_takes_nobodys_place_and_is_named_once() {
        let now = Instant::now();
        let mut topics = with_fifty_hosts(now);
        for number in 100..20_000 {
            topics.insert([1; 32], key(number), Bytes::from_static(b"flood"), ATTACKER, now);
        }
        assert_eq!(topics.topics[&[1; 32]].records.len(), TOPIC_MAX);
        assert_eq!(honest(&mut topics, now), (50, 19));
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_that_floods_a_topic_takes_nobodys_place_and_is_named_once() {
        let now = Instant::now();
        let mut topics = with_fifty_hosts(now);
        for number in 100..20_000_u16 {
            let host = [10, 66, 66, number as u8].into();
            topics.insert([1; 32], key(number), Bytes::from_static(b"flood"), host, now);
        }
        assert_eq!(honest(&mut topics, now), (50, 19));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_floods_many_topics_takes_nobodys_place() {
        let now = Instant::now();
        let mut topics = with_fifty_hosts(now);
        for number in 0..70_000_u32 {
            let mut topic = [2; 32];
            topic[..4].copy_from_slice(&number.to_be_bytes());
            topics.insert(topic, key(1), Bytes::new(), ATTACKER, now);
        }
        assert_eq!(topics.order.len(), 50 + HOST_MAX);
        assert_eq!(honest(&mut topics, now).0, 50);
    }

    #[tokio::test(start_paused = true)]
    async fn records_expire_unless_they_are_renewed() {
        let start = Instant::now();
        let mut topics = filled(2, 10, start);
        topics.insert([1; 32], key(1), Bytes::new(), HOST, start + Duration::from_mins(15));
        assert_eq!(topics.draw(&[1; 32], 20, start + Duration::from_mins(21)).len(), 1);
        assert_eq!(topics.draw(&[1; 32], 20, start + Duration::from_mins(36)).len(), 0);
        assert!(topics.topics.is_empty() && topics.order.is_empty() && topics.by_host.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_removed_record_is_gone_and_the_others_stay() {
        let now = Instant::now();
        let mut topics = filled(5, 10, now);
        topics.remove(&[1; 32], &key(0));
        topics.remove(&[1; 32], &key(4));
        topics.remove(&[1; 32], &key(9));
        let mut drawn = topics.draw(&[1; 32], 20, now);
        drawn.sort();
        assert_eq!(drawn.iter().map(|record| record[0]).collect::<Vec<_>>(), [1, 2, 3]);
    }
}

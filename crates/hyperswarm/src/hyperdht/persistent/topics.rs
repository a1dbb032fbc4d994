//! Stores which peers announced which topic.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::crypto::PublicKey;
use crate::dht_rpc::Id;

/// The maximum number of peers under one topic. More evict the oldest, so that one topic cannot fill the store.
const TOPIC_MAX: usize = 4_096;

/// Records by topic. They expire, and the oldest are evicted when the store is full.
#[derive(Debug)]
pub(super) struct Topics {
    topics: HashMap<Id, Topic>,
    /// Every record by age.
    order: BTreeMap<u64, (Id, PublicKey)>,
    orders: u64,
    records_max: usize,
    age_max: Duration,
    chance: u64,
}

#[derive(Debug, Default)]
struct Topic {
    records: Vec<Record>,
    index: HashMap<PublicKey, usize>,
}

#[derive(Debug)]
struct Record {
    public_key: PublicKey,
    bytes: Bytes,
    order: u64,
    set: Instant,
}

impl Topics {
    pub(super) fn new(records_max: usize, age_max: Duration, seed: u64) -> Self {
        let (topics, order) = (HashMap::new(), BTreeMap::new());
        Self { topics, order, orders: 0, records_max, age_max, chance: seed | 1 }
    }

    /// Stores a record. One that is already stored becomes the youngest.
    pub(super) fn insert(&mut self, topic: Id, public_key: PublicKey, bytes: Bytes, now: Instant) {
        self.remove(&topic, &public_key);
        self.expire(now);
        let is_full = self.topics.get(&topic).is_some_and(|topic| topic.records.len() >= TOPIC_MAX);
        let oldest_of_topic =
            self.topics.get(&topic).filter(|_| is_full).and_then(|topic| topic.records.iter().min_by_key(|r| r.order));
        if let Some(key) = oldest_of_topic.map(|record| record.public_key) {
            self.remove(&topic, &key);
        }
        while self.order.len() >= self.records_max {
            self.remove_oldest();
        }
        self.orders += 1;
        let order = self.orders;
        self.order.insert(order, (topic, public_key));
        let topic = self.topics.entry(topic).or_default();
        topic.index.insert(public_key, topic.records.len());
        topic.records.push(Record { public_key, bytes, order, set: now });
    }

    /// Removes a record.
    pub(super) fn remove(&mut self, topic_id: &Id, public_key: &PublicKey) {
        let Some(topic) = self.topics.get_mut(topic_id) else { return };
        let Some(index) = topic.index.remove(public_key) else { return };
        let record = topic.records.swap_remove(index);
        if let Some(moved) = topic.records.get(index) {
            topic.index.insert(moved.public_key, index);
        }
        self.order.remove(&record.order);
        if topic.records.is_empty() {
            self.topics.remove(topic_id);
        }
    }

    /// Returns up to `count` records of a topic, chosen at random if there are more.
    pub(super) fn draw(&mut self, topic: &Id, count: usize, now: Instant) -> Vec<Bytes> {
        self.expire(now);
        let Some(Topic { records, .. }) = self.topics.get(topic) else { return Vec::new() };
        if records.len() <= count {
            return records.iter().map(|record| record.bytes.clone()).collect();
        }
        // Starts at a random index and moves by a stride that is coprime to the number of records, so no record
        // repeats.
        let length = records.len();
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        let start = self.chance as usize % length;
        let mut stride = (self.chance >> 32) as usize % length;
        while greatest_common_divisor(stride, length) != 1 {
            stride += 1;
        }
        (0..count).map(|step| records[(start + step * stride) % length].bytes.clone()).collect()
    }

    fn expire(&mut self, now: Instant) {
        while let Some((_, (topic, public_key))) = self.order.first_key_value() {
            let record = self.topics.get(topic).and_then(|topic| topic.records.get(*topic.index.get(public_key)?));
            let set = record.map_or(now, |record| record.set);
            if now.saturating_duration_since(set) < self.age_max {
                return;
            }
            self.remove_oldest();
        }
    }

    fn remove_oldest(&mut self) {
        if let Some((_, (topic, public_key))) = self.order.pop_first() {
            self.remove(&topic, &public_key);
        }
    }
}

fn greatest_common_divisor(left: usize, right: usize) -> usize {
    if right == 0 { left } else { greatest_common_divisor(right, left % right) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u16) -> PublicKey {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&number.to_le_bytes());
        PublicKey(key)
    }

    fn filled(count: u16, records_max: usize, now: Instant) -> Topics {
        let mut topics = Topics::new(records_max, Duration::from_mins(20), 7);
        for number in 0..count {
            topics.insert([1; 32], key(number), Bytes::copy_from_slice(&number.to_le_bytes()), now);
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
        topics.insert([2; 32], key(1), Bytes::new(), now);
        assert_eq!(topics.draw(&[1; 32], 20, now).len(), 9);
    }

    #[tokio::test(start_paused = true)]
    async fn one_topic_cannot_fill_the_store() {
        let now = Instant::now();
        let topics = filled(5_000, 65_536, now);
        assert_eq!(topics.order.len(), TOPIC_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn records_expire_unless_they_are_renewed() {
        let start = Instant::now();
        let mut topics = filled(2, 10, start);
        topics.insert([1; 32], key(1), Bytes::new(), start + Duration::from_mins(15));
        assert_eq!(topics.draw(&[1; 32], 20, start + Duration::from_mins(21)).len(), 1);
        assert_eq!(topics.draw(&[1; 32], 20, start + Duration::from_mins(36)).len(), 0);
        assert!(topics.topics.is_empty() && topics.order.is_empty());
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

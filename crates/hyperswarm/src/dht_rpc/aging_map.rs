//! A map whose entries expire, and which evicts the oldest entry when it is full.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// Stores each value for a fixed time, up to a maximum number of values.
#[derive(Debug)]
pub struct AgingMap<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// Keys by insertion order, so the first is the first to expire.
    order: BTreeMap<u64, K>,
    orders: u64,
    size_max: usize,
    age_max: Duration,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    order: u64,
    set: Instant,
}

impl<K: Eq + Hash + Clone, V> AgingMap<K, V> {
    /// Makes an empty map.
    pub fn new(size_max: usize, age_max: Duration) -> Self {
        Self { entries: HashMap::new(), order: BTreeMap::new(), orders: 0, size_max, age_max }
    }

    /// Returns the number of entries, including those that expired since the last change.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether the map has no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns a value, unless it has expired.
    pub fn get(&self, key: &K, now: Instant) -> Option<&V> {
        let entry = self.entries.get(key)?;
        (now.saturating_duration_since(entry.set) < self.age_max).then_some(&entry.value)
    }

    /// Returns a mutable reference to a value, unless it has expired. This does not reset its age.
    pub fn get_mut(&mut self, key: &K, now: Instant) -> Option<&mut V> {
        let entry = self.entries.get_mut(key)?;
        (now.saturating_duration_since(entry.set) < self.age_max).then_some(&mut entry.value)
    }

    /// Sets a value and resets its age. Evicts the oldest entry when the map is full.
    pub fn insert(&mut self, key: K, value: V, now: Instant) -> Option<V> {
        self.orders += 1;
        let order = self.orders;
        let old = self.entries.insert(key.clone(), Entry { value, order, set: now });
        if let Some(old) = &old {
            self.order.remove(&old.order);
        }
        self.order.insert(order, key);
        self.expire(now);
        while self.entries.len() > self.size_max {
            self.remove_first();
        }
        old.map(|old| old.value)
    }

    /// Removes an entry.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.remove(key)?;
        self.order.remove(&entry.order);
        Some(entry.value)
    }

    /// Removes the expired entries.
    pub fn expire(&mut self, now: Instant) {
        while let Some((_, key)) = self.order.first_key_value() {
            let set = self.entries.get(key).map_or(now, |entry| entry.set);
            if now.saturating_duration_since(set) < self.age_max {
                return;
            }
            self.remove_first();
        }
    }

    fn remove_first(&mut self) {
        if let Some((_, key)) = self.order.pop_first() {
            self.entries.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_oldest_give_way_and_the_old_expire() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut map = AgingMap::new(2, 10 * second);
        map.insert("a", 1, start);
        map.insert("b", 2, start + second);
        map.insert("a", 3, start + 2 * second);
        map.insert("c", 4, start + 3 * second);
        assert_eq!(map.get(&"b", start + 3 * second), None, "the oldest gave way");
        assert_eq!(map.get(&"a", start + 11 * second), Some(&3));
        assert_eq!(map.get(&"a", start + 12 * second), None);
        map.expire(start + 12 * second);
        assert_eq!(map.len(), 1);
        assert_eq!(map.remove(&"c"), Some(4));
        assert!(map.is_empty() && map.order.is_empty());
    }
}

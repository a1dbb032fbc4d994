//! Counts what each origin holds at present, such as connections.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::request_context::Origin;

/// What each origin holds. Only origins that hold something are in memory. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct OriginPermits {
    held: Arc<Mutex<HashMap<Option<Origin>, usize>>>,
}

/// Counts against its origin until it is dropped.
#[derive(Debug)]
pub(crate) struct OriginPermit {
    origin: Option<Origin>,
    permits: OriginPermits,
}

impl OriginPermits {
    /// Returns a permit, or `None` if the origin holds `max` of them.
    pub(crate) fn acquire(&self, origin: Option<Origin>, max: usize) -> Option<OriginPermit> {
        let mut held = self.held.lock();
        let count = held.get(&origin).copied().unwrap_or_default();
        if count >= max {
            return None;
        }
        held.insert(origin, count + 1);
        Some(OriginPermit { origin, permits: self.clone() })
    }
}

impl Drop for OriginPermit {
    fn drop(&mut self) {
        let mut held = self.permits.held.lock();
        match held.get_mut(&self.origin) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(held.remove(&self.origin)),
        }
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
        assert!(permits.held.lock().is_empty());
    }
}

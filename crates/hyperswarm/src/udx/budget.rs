//! Memory that the streams of unproven peers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What each stream may hold even if the others have used up the budget, so that it makes progress.
const FREE_BYTES: usize = 4 * 1024;

/// A number of bytes that many streams share. Each may hold 4 KiB besides.
#[derive(Debug)]
pub struct Budget {
    bytes_max: usize,
    held: AtomicUsize,
}

impl Budget {
    /// Makes a budget of this many bytes.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { bytes_max, held: AtomicUsize::new(0) })
    }

    fn is_used_up(&self) -> bool {
        self.held.load(Ordering::Relaxed) >= self.bytes_max
    }

    fn try_add(&self, bytes: usize) -> bool {
        let added = |held: usize| held.checked_add(bytes).filter(|sum| *sum <= self.bytes_max);
        self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, added).is_ok()
    }
}

/// What one stream holds of a budget.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Share {
    pub(crate) fn of(budget: &Arc<Budget>) -> Self {
        Self { budget: budget.clone(), bytes: 0 }
    }

    /// Makes the share fit what the stream holds. Returns `false` if the budget does not allow that much.
    pub(crate) fn try_set(&mut self, held: usize) -> bool {
        let bytes = held.saturating_sub(FREE_BYTES);
        if bytes > self.bytes && !self.budget.try_add(bytes - self.bytes) {
            return false;
        }
        self.shrink(bytes);
        self.bytes = bytes;
        true
    }

    /// Makes the share fit what the stream holds already, even beyond the budget.
    pub(crate) fn set(&mut self, held: usize) {
        let bytes = held.saturating_sub(FREE_BYTES);
        self.budget.held.fetch_add(bytes.saturating_sub(self.bytes), Ordering::Relaxed);
        self.shrink(bytes);
        self.bytes = bytes;
    }

    /// Returns whether a stream that holds this much may hold more.
    pub(crate) fn has_room(&self, held: usize) -> bool {
        Self::is_free(held) || !self.budget.is_used_up()
    }

    /// Returns whether every stream may hold this much.
    pub(crate) fn is_free(held: usize) -> bool {
        held <= FREE_BYTES
    }

    fn shrink(&self, bytes: usize) {
        self.budget.held.fetch_sub(self.bytes.saturating_sub(bytes), Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_share_a_budget_and_give_it_back() {
        let budget = Budget::new(10_000);
        let (mut one, mut other) = (Share::of(&budget), Share::of(&budget));
        assert!(one.try_set(FREE_BYTES + 9_000) && one.has_room(FREE_BYTES + 9_000));
        assert!(!other.try_set(FREE_BYTES + 1_001));
        assert!(other.try_set(FREE_BYTES + 1_000) && !other.has_room(FREE_BYTES + 1_000));
        assert!(one.try_set(FREE_BYTES) && one.has_room(FREE_BYTES));
        other.set(FREE_BYTES + 20_000);
        assert!(!one.try_set(FREE_BYTES + 1), "the other holds more than there is");
        drop(other);
        assert!(one.try_set(FREE_BYTES + 10_000));
        drop(one);
        assert_eq!(budget.held.load(Ordering::Relaxed), 0);
    }
}

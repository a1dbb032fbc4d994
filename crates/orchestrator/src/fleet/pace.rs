//! How long a worker's jobs take, and how long its slots are empty between them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// If slots are empty for less than this share of the time, a worker gets no jobs beyond its slots.
const EMPTY_MAX: f32 = 0.05;
/// Weight of a new measurement in the mean.
const NEW: f32 = 0.2;

/// Means over a worker's last jobs, in microseconds; 0 if unknown. Concurrent measurements may overwrite each other.
#[derive(Debug, Default)]
pub(super) struct Pace {
    busy: AtomicU32,
    between: AtomicU32,
}

impl Clone for Pace {
    fn clone(&self) -> Self {
        let copy = |mean: &AtomicU32| AtomicU32::new(mean.load(Ordering::Relaxed));
        Self { busy: copy(&self.busy), between: copy(&self.between) }
    }
}

fn record(mean: &AtomicU32, measured: Duration) {
    let measured = u32::try_from(measured.as_micros()).unwrap_or(u32::MAX) as f32;
    let before = mean.load(Ordering::Relaxed) as f32;
    let after = if before == 0.0 { measured } else { before + NEW * (measured - before) };
    mean.store(after as u32, Ordering::Relaxed);
}

impl Pace {
    pub(super) fn record(&self, busy: Duration, between: Duration) {
        record(&self.busy, busy);
        record(&self.between, between);
    }

    /// Returns how many jobs the worker gets beyond its slots: as many as end until the next one can start.
    pub(super) fn backlog(&self, slots: u32, most: u32) -> u32 {
        let (busy, between) = (self.busy.load(Ordering::Relaxed), self.between.load(Ordering::Relaxed));
        let empty = between as f32 / busy.max(1) as f32;
        if busy == 0 || empty < EMPTY_MAX { 0 } else { ((slots as f32 * empty).ceil() as u32).min(most) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backlog(busy_ms: u64, between_ms: u64) -> u32 {
        let pace = Pace::default();
        pace.record(Duration::from_millis(busy_ms), Duration::from_millis(between_ms));
        pace.backlog(4, 8)
    }

    #[test]
    fn only_workers_with_short_jobs_get_more_than_their_slots() {
        assert_eq!(Pace::default().backlog(4, 8), 0);
        assert_eq!([backlog(2_000, 10), backlog(100, 10), backlog(20, 10), backlog(1, 100)], [0, 1, 2, 8]);
    }
}

//! Remembers how workers fared with their last jobs, and ejects those that fail or lie. Pure: times are arguments.
//!
//! The circuit breaker judges a model, this judges a worker: one bad worker must not close a model to everyone.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use protocol::WorkerId;
use tokio::time::Instant;

use crate::circuit_breaker::Outcome;

/// How many outcomes of a worker are remembered.
const OUTCOMES_MAX: usize = 10;
/// How many of them may be bad before the worker is ejected.
const FAILURES_MAX: usize = 3;
/// Failures within this time of each other may be those of one death.
const AT_ONCE: Duration = Duration::from_secs(2);
/// How many outcomes are remembered without regard to deaths, and how many must be known to judge by them.
const ALL_MAX: usize = 100;
const ALL_MIN: usize = 20;
/// How long the first ejection lasts. Each further one lasts twice as long.
const EJECTION: Duration = Duration::from_mins(1);
const EJECTION_MAX: Duration = Duration::from_mins(16);
/// How many workers are remembered. Those heard of longest ago are forgotten first.
const WORKERS_MAX: usize = 16_384;

/// The records of all workers that ran jobs.
#[derive(Debug, Default)]
pub struct WorkerRecords(HashMap<WorkerId, WorkerRecord>);

#[derive(Debug)]
struct WorkerRecord {
    /// Whether the last attempts were good, the newest last.
    outcomes: VecDeque<bool>,
    /// The same of all attempts, also of those that a death ended.
    all: VecDeque<bool>,
    /// When the last failure was counted.
    failed_at: Option<Instant>,
    /// How often it was ejected without a whole record of good outcomes since.
    ejections: u32,
    heard_at: Instant,
}

impl WorkerRecords {
    /// Records the outcome of an attempt. Returns until when the worker is ejected, if it is from now on.
    ///
    /// A worker or an engine that dies fails all its jobs at once. That counts as one failure: a failure that follows
    /// the last counted one within [`AT_ONCE`], of a job that began before it, is ignored. A worker that fails most of
    /// its jobs is ejected however it groups them.
    pub fn record(&mut self, outcome: Outcome, now: Instant) -> Option<Instant> {
        let record = self.of(outcome.worker, now);
        record.add_to_all(outcome.good);
        let is_of_a_death = |failed_at: Instant| outcome.began < failed_at && now - failed_at <= AT_ONCE;
        if !outcome.good && record.failed_at.is_some_and(is_of_a_death) {
            return record.fails_mostly().then(|| record.eject(now));
        }
        record.add(outcome.good, now);
        let failures = record.outcomes.iter().filter(|good| !**good).count();
        let is_bad = failures >= FAILURES_MAX || record.fails_mostly();
        (!outcome.good && is_bad).then(|| record.eject(now))
    }

    /// Records that a worker refused a job that another one did. Honest workers of different kinds differ in what they
    /// can do, so this counts only against a worker whose last attempts have no success.
    pub fn contradicted(&mut self, worker: WorkerId, now: Instant) -> Option<Instant> {
        let record = self.of(worker, now);
        if record.outcomes.contains(&true) {
            return None;
        }
        self.record(Outcome { good: false, worker, began: now }, now)
    }

    /// Ejects a worker that broke the contract or lied. Returns until when.
    pub fn breach(&mut self, worker: WorkerId, now: Instant) -> Instant {
        let record = self.of(worker, now);
        record.add(false, now);
        record.eject(now)
    }

    fn of(&mut self, worker: WorkerId, now: Instant) -> &mut WorkerRecord {
        if self.0.len() >= WORKERS_MAX && !self.0.contains_key(&worker) {
            let oldest = self.0.iter().min_by_key(|(_, record)| record.heard_at).map(|(worker, _)| *worker);
            oldest.map(|oldest| self.0.remove(&oldest));
        }
        let fresh = || WorkerRecord {
            outcomes: VecDeque::new(),
            all: VecDeque::new(),
            failed_at: None,
            ejections: 0,
            heard_at: now,
        };
        let record = self.0.entry(worker).or_insert_with(fresh);
        record.heard_at = now;
        record
    }
}

impl WorkerRecord {
    fn add(&mut self, good: bool, now: Instant) {
        if self.outcomes.len() == OUTCOMES_MAX {
            self.outcomes.pop_front();
        }
        self.outcomes.push_back(good);
        if !good {
            self.failed_at = Some(now);
        } else if self.outcomes.len() == OUTCOMES_MAX && self.outcomes.iter().all(|good| *good) {
            self.ejections = 0;
        }
    }

    fn add_to_all(&mut self, good: bool) {
        if self.all.len() == ALL_MAX {
            self.all.pop_front();
        }
        self.all.push_back(good);
    }

    fn fails_mostly(&self) -> bool {
        let failures = self.all.iter().filter(|good| !**good).count();
        self.all.len() >= ALL_MIN && failures * 2 > self.all.len()
    }

    fn eject(&mut self, now: Instant) -> Instant {
        let lasts = EJECTION.saturating_mul(1 << self.ejections.min(8)).min(EJECTION_MAX);
        self.ejections += 1;
        now + lasts
    }
}

#[cfg(test)]
mod tests {
    use protocol::PublicKey;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn outcome(good: bool, began: Instant) -> Outcome {
        Outcome { good, worker: PublicKey([1; 32]), began }
    }

    #[test]
    fn the_third_failure_of_ten_jobs_ejects() {
        let (mut records, mut now) = (WorkerRecords::default(), Instant::now());
        let mut tell = |good| {
            now += SECOND;
            records.record(outcome(good, now), now).map(|until| until - now)
        };
        let told = [false, true, true, false, true, true, true, true].map(&mut tell);
        assert_eq!(told, [None; 8]);
        assert_eq!(tell(false), Some(EJECTION));
        // The failures are remembered, so one more suffices after the ejection, and it lasts longer.
        assert_eq!(tell(false), Some(EJECTION * 2));
    }

    #[test]
    fn rare_failures_do_not_eject() {
        let (mut records, mut now) = (WorkerRecords::default(), Instant::now());
        for number in 0..100 {
            now += SECOND;
            assert_eq!(records.record(outcome(number % 5 != 0, now), now), None);
        }
    }

    #[test]
    fn a_death_counts_once_however_many_jobs_it_takes_along() {
        let (mut records, began) = (WorkerRecords::default(), Instant::now());
        for _ in 0..30 {
            records.record(outcome(true, began), began);
        }
        let died = began + SECOND;
        assert!((0..20).all(|_| records.record(outcome(false, began), died).is_none()));
    }

    #[test]
    fn long_jobs_that_go_well_count_though_another_has_failed_meanwhile() {
        let (mut records, mut now) = (WorkerRecords::default(), Instant::now());
        for number in 0..200 {
            now += SECOND * 4;
            // Jobs of a minute, of which each tenth fails at once.
            let (good, lasted) = if number % 10 == 0 { (false, SECOND) } else { (true, SECOND * 60) };
            assert_eq!(records.record(outcome(good, now - lasted), now), None, "job {number}");
        }
    }

    #[test]
    fn a_worker_that_fails_its_jobs_in_groups_is_ejected() {
        let (mut records, mut now) = (WorkerRecords::default(), Instant::now());
        let mut ejected = false;
        for _ in 0..3 {
            let began = now;
            now += SECOND * 10;
            ejected |= (0..20).any(|_| records.record(outcome(false, began), now).is_some());
            now += SECOND * 10;
            for _ in 0..4 {
                records.record(outcome(true, now), now);
            }
        }
        assert!(ejected);
    }

    #[test]
    fn refusing_what_others_do_counts_against_a_worker_that_does_nothing() {
        let (mut records, now) = (WorkerRecords::default(), Instant::now());
        let worker = PublicKey([1; 32]);
        assert_eq!([(); 3].map(|()| records.contradicted(worker, now).is_some()), [false, false, true]);
        let honest = PublicKey([2; 32]);
        records.record(Outcome { good: true, worker: honest, began: now }, now);
        assert!((0..20).all(|_| records.contradicted(honest, now).is_none()));
    }

    #[test]
    fn a_breach_ejects_at_once_ever_longer_until_ten_jobs_went_well() {
        let (mut records, mut now) = (WorkerRecords::default(), Instant::now());
        let worker = PublicKey([1; 32]);
        let lasts: Vec<_> = (0..20).map(|_| records.breach(worker, now) - now).collect();
        assert_eq!(lasts[..2], [EJECTION, EJECTION * 2]);
        assert_eq!(lasts.iter().max(), Some(&EJECTION_MAX));
        for _ in 0..OUTCOMES_MAX {
            now += SECOND;
            records.record(outcome(true, now), now);
        }
        assert_eq!(records.breach(worker, now) - now, EJECTION);
    }

    #[test]
    fn as_many_workers_are_remembered_as_fit() {
        let (mut records, now) = (WorkerRecords::default(), Instant::now());
        for number in 0..WORKERS_MAX as u32 + 10 {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&number.to_le_bytes());
            records.breach(PublicKey(key), now);
        }
        assert_eq!(records.0.len(), WORKERS_MAX);
    }
}

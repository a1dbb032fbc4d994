//! How long each worker takes to the first token of each of its models. Pure: times are arguments.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use protocol::WorkerId;
use protocol::model::ModelKey;
use tokio::time::Instant;

/// How many times of a worker and a model are remembered.
const TIMES_MAX: usize = 100;
/// How many must be known for a percentile.
const TIMES_MIN: usize = 20;
/// How many pairs of worker and model are remembered. Those heard of longest ago are forgotten first.
const PAIRS_MAX: usize = 4_096;

/// The last times to the first token of all workers. A time is the longest that an attempt waited for its first token
/// without a further evaluated token of the prompt, so that long prompts do not count as slow.
#[derive(Debug, Default)]
pub(crate) struct FirstTokens(HashMap<(WorkerId, ModelKey), Times>);

#[derive(Debug)]
struct Times {
    /// The last waits, oldest first.
    times: VecDeque<Duration>,
    heard_at: Instant,
}

impl FirstTokens {
    pub(crate) fn record(&mut self, worker: WorkerId, model: &ModelKey, time: Duration, now: Instant) {
        let pair = (worker, model.clone());
        if self.0.len() >= PAIRS_MAX && !self.0.contains_key(&pair) {
            let oldest = self.0.iter().min_by_key(|(_, times)| times.heard_at).map(|(pair, _)| pair.clone());
            oldest.map(|oldest| self.0.remove(&oldest));
        }
        let times = self.0.entry(pair).or_insert_with(|| Times { times: VecDeque::new(), heard_at: now });
        times.heard_at = now;
        if times.times.len() == TIMES_MAX {
            times.times.pop_front();
        }
        times.times.push_back(time);
    }

    /// Returns the 95th percentile of a worker's times with a model, or `None` if too few are known.
    pub(crate) fn p95(&self, worker: WorkerId, model: &ModelKey) -> Option<Duration> {
        let times = &self.0.get(&(worker, model.clone()))?.times;
        let mut sorted: Vec<Duration> = times.iter().copied().collect();
        sorted.sort_unstable();
        // The nearest rank.
        let rank = (sorted.len() * 95).div_ceil(100);
        sorted.get(rank - 1).copied().filter(|_| sorted.len() >= TIMES_MIN)
    }
}

#[cfg(test)]
mod tests {
    use protocol::PublicKey;

    use super::*;

    fn model(name: &str) -> ModelKey {
        ModelKey { model_id: name.parse().expect("a name"), version: "1.0".parse().expect("a version") }
    }

    fn millis(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn the_percentile_is_of_the_last_hundred_times_of_one_worker_and_model() {
        let (mut times, now, worker) = (FirstTokens::default(), Instant::now(), PublicKey([1; 32]));
        let (one, other) = (model("one"), model("other"));
        for count in 1..TIMES_MIN as u64 {
            times.record(worker, &one, millis(count), now);
            assert_eq!(times.p95(worker, &one), None, "{count} are too few");
        }
        times.record(worker, &one, millis(20), now);
        assert_eq!(times.p95(worker, &one), Some(millis(19)));
        assert_eq!((times.p95(worker, &other), times.p95(PublicKey([2; 32]), &one)), (None, None));
        for count in 1..=100 {
            times.record(worker, &one, millis(1_000 + count), now);
        }
        assert_eq!(times.p95(worker, &one), Some(millis(1_095)), "the older ones are forgotten");
    }

    #[test]
    fn as_many_pairs_are_remembered_as_fit() {
        let (mut times, begun, one) = (FirstTokens::default(), Instant::now(), model("one"));
        let worker = |number: usize| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            PublicKey(key)
        };
        for number in 0..PAIRS_MAX + 10 {
            times.record(worker(number), &one, millis(1), begun + millis(number as u64));
        }
        assert_eq!(times.0.len(), PAIRS_MAX);
        assert!(!times.0.contains_key(&(worker(0), one.clone())) && times.0.contains_key(&(worker(10), one)));
    }
}

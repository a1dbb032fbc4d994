//! Backoff with jitter, so that many nodes hit by the same event do not all react at once.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use protocol::PublicKey;

/// Waits that double from a first one up to a maximum. They never end.
#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    waits: ExponentialBackoff,
}

impl Backoff {
    /// Makes waits of which each is cut at random by up to a half. The seed decides the cuts, so that a run can be
    /// repeated.
    pub fn new(first: Duration, max: Duration, seed: u64) -> Self {
        // The library's jitter adds up to the whole of a wait.
        Self::of(doubling(first / 2, max / 2).with_jitter().with_jitter_seed(seed))
    }

    /// Makes waits without jitter.
    pub fn exact(first: Duration, max: Duration) -> Self {
        Self::of(doubling(first, max))
    }

    fn of(builder: ExponentialBuilder) -> Self {
        Self { builder, waits: builder.build() }
    }

    /// Returns the wait after one more failure.
    pub fn next_wait(&mut self) -> Duration {
        self.waits.next().expect("the waits never end")
    }

    /// Returns the wait after this many failures, at least one.
    pub fn nth_wait(mut self, failures: u32) -> Duration {
        self.waits.nth(failures.saturating_sub(1) as usize).expect("the waits never end")
    }

    /// Starts over with the first wait.
    pub fn reset(&mut self) {
        self.waits = self.builder.build();
    }
}

fn doubling(first: Duration, max: Duration) -> ExponentialBuilder {
    ExponentialBuilder::new().with_factor(2.0).with_min_delay(first.min(max)).with_max_delay(max).without_max_times()
}

/// Returns the seed of a node's waits for a peer.
pub fn seed_of(between: [PublicKey; 2]) -> u64 {
    hash(between, &[])
}

/// Returns a pause between three quarters of `nominal` and all of it, for what is done periodically. A pure function of
/// two keys and a count, so that each pair of nodes and each count has its own jitter.
pub fn spread(nominal: Duration, between: [PublicKey; 2], count: u64) -> Duration {
    nominal * (768 + (hash(between, &count.to_le_bytes()) >> 32) as u32 % 257) / 1024
}

/// FNV-1a, which is sufficient to distinguish pairs.
fn hash(between: [PublicKey; 2], further: &[u8]) -> u64 {
    let bytes = between[0].0.iter().chain(&between[1].0).chain(further);
    bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(5);

    fn waits(seed: u64) -> Vec<Duration> {
        let mut backoff = Backoff::new(FIRST, MAX, seed);
        (0..40).map(|_| backoff.next_wait()).collect()
    }

    #[test]
    fn waits_double_up_to_their_maximum_and_are_cut_by_up_to_a_half() {
        let mut whole = FIRST;
        for wait in waits(7) {
            assert!(wait <= whole && wait >= whole / 2, "{wait:?} of {whole:?}");
            whole = (whole * 2).min(MAX);
        }
        let mut exact = Backoff::exact(Duration::from_secs(5), Duration::from_mins(1));
        assert_eq!([(); 6].map(|()| exact.next_wait().as_secs()), [5, 10, 20, 40, 60, 60]);
        exact.reset();
        assert_eq!(exact.next_wait().as_secs(), 5);
    }

    #[test]
    fn waits_repeat_from_their_seed_and_differ_between_seeds() {
        assert_eq!(waits(1), waits(1));
        assert_ne!(waits(1), waits(2));
        assert_eq!(Backoff::new(FIRST, MAX, 1).nth_wait(3), waits(1)[2]);
    }

    #[test]
    fn a_first_wait_above_the_maximum_is_the_maximum() {
        assert_eq!(Backoff::exact(MAX, FIRST).next_wait(), FIRST);
    }

    #[test]
    fn pauses_are_shortened_by_up_to_a_quarter_and_differ_between_pairs() {
        let (one, two, three) = (PublicKey([1; 32]), PublicKey([2; 32]), PublicKey([3; 32]));
        for count in 0..100 {
            let pause = spread(MAX, [one, two], count);
            assert!(pause <= MAX && pause >= MAX * 3 / 4, "{pause:?}");
        }
        assert_ne!(spread(MAX, [one, two], 3), spread(MAX, [one, three], 3));
        assert_ne!(seed_of([one, two]), seed_of([one, three]));
    }
}

//! Backoff with jitter, so that many nodes hit by the same event do not all react at once.

use std::time::Duration;

use protocol::PublicKey;

/// Returns a wait between three quarters of `nominal` and all of it. A pure function of two keys and a count, so that
/// each pair of nodes and each count has its own jitter.
pub fn spread(nominal: Duration, between: [PublicKey; 2], count: u64) -> Duration {
    let count = count.to_le_bytes();
    let bytes = between[0].0.iter().chain(&between[1].0).chain(&count);
    // FNV-1a is sufficient to distinguish pairs.
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    nominal * (768 + (hash >> 32) as u32 % 257) / 1024
}

/// Returns a wait that doubles with each failure, from `first` up to `most`.
pub fn doubled(first: Duration, most: Duration, failures: u32) -> Duration {
    first.saturating_mul(1 << (failures.clamp(1, 16) - 1)).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_most_and_differ_between_pairs() {
        let (one, two, three) = (PublicKey([1; 32]), PublicKey([2; 32]), PublicKey([3; 32]));
        let (first, most) = (Duration::from_millis(100), Duration::from_secs(5));
        assert_eq!(
            [1, 2, 6, 7, 99].map(|failures| doubled(first, most, failures).as_millis()),
            [100, 200, 3200, 5000, 5000]
        );
        for count in 0..100 {
            let wait = spread(most, [one, two], count);
            assert!(wait <= most && wait >= most * 3 / 4, "{wait:?}");
        }
        assert_ne!(spread(most, [one, two], 3), spread(most, [one, three], 3));
    }
}

//! Token buckets by key, which limit how often a peer, a tenant or an address may call.

use std::hash::Hash;
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::unsync::Cache;
use tokio::time::Instant;

/// Maximum number of buckets. A dropped bucket is a full one, so the cache keeps those in use.
const KEYS_MAX: usize = 65_536;
/// The longest `retry_after`. Official SDKs give up above it.
const WAIT_MAX: Duration = Duration::from_mins(2);
const MINUTE: Duration = Duration::from_mins(1);

/// A bucket's capacity and its refill rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Maximum requests at once.
    pub burst: u32,
    /// Requests per minute in the long run.
    pub per_minute: u32,
}

impl Quota {
    /// Allows every request.
    pub const UNLIMITED: Self = Self { burst: u32::MAX, per_minute: u32::MAX };
}

/// The decision on one request, and the state of its bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the request is allowed.
    pub allowed: bool,
    /// Requests per minute in the long run.
    pub limit: u32,
    /// Requests that may follow immediately.
    pub remaining: u32,
    /// Time until the bucket is full again.
    pub reset: Duration,
    /// Time until a refused request may be retried; zero for an allowed one.
    pub retry_after: Duration,
}

impl Verdict {
    /// The verdict on a request that no bucket limits.
    pub const UNLIMITED: Self = Self {
        allowed: true,
        limit: Quota::UNLIMITED.per_minute,
        remaining: u32::MAX,
        reset: Duration::ZERO,
        retry_after: Duration::ZERO,
    };
}

/// Decides on one request by the generic cell rate algorithm. A bucket is the time at which it will be full, and each
/// request postpones that by its share of a minute. Returns the bucket afterwards.
///
/// A pure function of the bucket, its quota and `now`.
fn decide(bucket: Instant, quota: Quota, now: Instant) -> (Instant, Verdict) {
    let verdict = |allowed, remaining, reset, retry_after| Verdict {
        allowed,
        limit: quota.per_minute,
        remaining,
        reset,
        retry_after,
    };
    if quota.per_minute == 0 || quota.burst == 0 {
        return (bucket, verdict(false, 0, WAIT_MAX, WAIT_MAX));
    }
    let share = MINUTE / quota.per_minute;
    let debt = bucket.saturating_duration_since(now);
    let room = share * quota.burst;
    let owed = debt + share;
    if owed > room {
        return (bucket, verdict(false, 0, debt, owed.saturating_sub(room).min(WAIT_MAX)));
    }
    let remaining = (room.saturating_sub(owed).as_nanos() / share.as_nanos().max(1)) as u32;
    (now + owed, verdict(true, remaining, owed, Duration::ZERO))
}

/// Token buckets by key.
pub struct RateLimit<K> {
    /// The time at which each key's bucket will be full.
    buckets: Mutex<Cache<K, Instant>>,
}

impl<K: Eq + Hash> Default for RateLimit<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Eq + Hash> RateLimit<K> {
    /// Makes a limit with no buckets. A key without a bucket has a full one.
    pub fn new() -> Self {
        Self { buckets: Mutex::new(Cache::new(KEYS_MAX)) }
    }

    /// Counts one request against a key's bucket and returns the verdict.
    pub fn take(&self, key: K, quota: Quota) -> Verdict {
        let now = Instant::now();
        let mut buckets = self.buckets.lock();
        let bucket = buckets.get(&key).copied();
        let (full, verdict) = decide(bucket.unwrap_or(now), quota, now);
        if verdict.allowed {
            buckets.insert(key, full);
        }
        verdict
    }

    /// Returns the verdict on a key's next request without counting it.
    pub fn look(&self, key: &K, quota: Quota) -> Verdict {
        let now = Instant::now();
        let bucket = self.buckets.lock().get(key).copied();
        decide(bucket.unwrap_or(now), quota, now).1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const QUOTA: Quota = Quota { burst: 3, per_minute: 60 };

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_and_then_the_pace_holds() {
        let limit = RateLimit::new();
        let remaining: Vec<u32> = (0..3).map(|_| limit.take("a", QUOTA).remaining).collect();
        assert_eq!(remaining, [2, 1, 0]);
        let refused = limit.take("a", QUOTA);
        assert!(!refused.allowed);
        assert_eq!((refused.retry_after, refused.reset), (Duration::from_secs(1), Duration::from_secs(3)));
        assert!(limit.take("b", QUOTA).allowed, "another key has its own bucket");
        tokio::time::advance(refused.retry_after).await;
        assert!(limit.take("a", QUOTA).allowed, "the wait that was told is enough");
        assert!(!limit.take("a", QUOTA).allowed);
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(limit.take("a", QUOTA).remaining, 2, "a bucket holds no more than its burst");
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_takes_nothing() {
        let limit = RateLimit::new();
        for _ in 0..10 {
            assert!(limit.look(&"a", QUOTA).allowed);
        }
        assert_eq!(limit.take("a", QUOTA).remaining, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_quota_of_nothing_lets_nothing_pass() {
        let verdict = RateLimit::new().take("a", Quota { burst: 1, per_minute: 0 });
        assert!(!verdict.allowed);
        assert_eq!(verdict.retry_after, WAIT_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_of_keys_refills_no_bucket_in_use_and_memory_is_bounded() {
        let limit = RateLimit::new();
        let crowd = |first: usize| {
            for key in first..first + 2 * KEYS_MAX {
                assert!(limit.take(key, QUOTA).allowed);
            }
        };
        crowd(1);
        while limit.take(0, QUOTA).allowed {}
        crowd(1 + 2 * KEYS_MAX);
        assert!(!limit.take(0, QUOTA).allowed);
        assert!(limit.buckets.lock().len() <= KEYS_MAX);
    }

    proptest! {
        #[test]
        fn no_more_pass_than_burst_and_pace_allow(
            burst in 1u32..20, per_minute in 1u32..2_000, gaps in prop::collection::vec(0u64..3_000, 1..200)
        ) {
            let quota = Quota { burst, per_minute };
            let start = Instant::now();
            let (mut bucket, mut now, mut passed) = (start, start, 0u32);
            for gap in gaps {
                now += Duration::from_millis(gap);
                let (next, verdict) = decide(bucket, quota, now);
                bucket = next;
                passed += u32::from(verdict.allowed);
                let earned = (now - start).as_secs_f64() * f64::from(per_minute) / 60.0;
                prop_assert!(f64::from(passed) <= f64::from(burst) + earned + 1e-3);
                if !verdict.allowed && verdict.retry_after < WAIT_MAX {
                    prop_assert!(decide(bucket, quota, now + verdict.retry_after).1.allowed);
                }
            }
        }
    }
}

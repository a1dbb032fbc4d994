//! Checks of the secrets that any node may present: those of invites and of operators' tokens.
//!
//! Keys cost nothing to make, so a count that all keys share would let strangers lock everybody out. Therefore the
//! secret is checked first, and only wrong ones count, against the key that presented them. The work is bounded by the
//! number of concurrent checks. Secrets are too long to be guessed at any rate.

use protocol::{ErrorCode, PublicKey, WireError};
use rpc::rate_limit::{Quota, RateLimit};
use tokio::sync::Semaphore;

/// Maximum number of concurrent checks. Further ones wait; each takes a read of the store and an HMAC.
const CHECKS_MAX: usize = 16;
/// Wrong secrets that a key may present before it is refused without a reason.
const FAILURES: Quota = Quota { burst: 10, per_minute: 10 };

/// Checks of one kind of secret.
pub(crate) struct SecretChecks {
    slots: Semaphore,
    failures: RateLimit<PublicKey>,
}

impl SecretChecks {
    pub(crate) fn new() -> Self {
        Self { slots: Semaphore::new(CHECKS_MAX), failures: RateLimit::new() }
    }

    /// Runs a check for a caller once a slot is free. An error that says that the secret is wrong counts as a failure,
    /// and after too many failures becomes a rate limit error.
    pub(crate) async fn check<T>(
        &self,
        caller: PublicKey,
        check: impl Future<Output = Result<T, WireError>>,
    ) -> Result<T, WireError> {
        let _slot = self.slots.acquire().await.expect("the semaphore is never closed");
        check.await.map_err(|error| self.failed(caller, error))
    }

    fn failed(&self, caller: PublicKey, error: WireError) -> WireError {
        use ErrorCode::{InvalidApiKey, InviteUnknown, InviteWrongSecret};
        let is_wrong = matches!(error.code, InvalidApiKey | InviteUnknown | InviteWrongSecret);
        if !is_wrong {
            return error;
        }
        let verdict = self.failures.take(caller, FAILURES);
        if verdict.allowed {
            return error;
        }
        WireError::new(ErrorCode::RateLimitExceeded, "too many wrong secrets, wait before the next attempt")
            .with_retry_after(verdict.retry_after)
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::time;

    use super::*;

    fn key(number: u32) -> PublicKey {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&number.to_le_bytes());
        PublicKey(bytes)
    }

    async fn wrong(checks: &SecretChecks, caller: u32) -> WireError {
        let error = WireError::new(ErrorCode::InviteWrongSecret, "wrong");
        checks.check(key(caller), ready(Err::<(), _>(error))).await.expect_err("wrong")
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_fails_too_often_waits_and_a_right_secret_passes_all_the_same() {
        let checks = SecretChecks::new();
        for _ in 0..FAILURES.burst {
            assert_eq!(wrong(&checks, 1).await.code, ErrorCode::InviteWrongSecret);
        }
        let refused = wrong(&checks, 1).await;
        assert_eq!((refused.code, refused.retry_after_ms), (ErrorCode::RateLimitExceeded, Some(6_000)));
        assert_eq!(wrong(&checks, 2).await.code, ErrorCode::InviteWrongSecret, "another key has its own count");
        checks.check(key(1), ready(Ok(()))).await.expect("a right secret");
        time::advance(Duration::from_secs(6)).await;
        assert_eq!(wrong(&checks, 1).await.code, ErrorCode::InviteWrongSecret);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_that_is_not_about_the_secret_does_not_count() {
        let checks = SecretChecks::new();
        for _ in 0..100 {
            let away = ready(Err::<(), _>(WireError::new(ErrorCode::Unavailable, "away")));
            assert_eq!(checks.check(key(1), away).await.expect_err("away").code, ErrorCode::Unavailable);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn further_checks_wait_until_a_slot_is_free() {
        let (checks, running, most) = (SecretChecks::new(), AtomicUsize::new(0), AtomicUsize::new(0));
        let slow = || async {
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            time::sleep(Duration::from_millis(1)).await;
            running.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        };
        let outcomes = join_all((0..1_000).map(|number| checks.check(key(number), slow()))).await;
        assert!(outcomes.iter().all(Result::is_ok));
        assert_eq!(most.into_inner(), CHECKS_MAX);
    }
}

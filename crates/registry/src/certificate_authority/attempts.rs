//! Rate limit of attempts by strangers: a few a minute for each key, and some hundreds for all keys together.
//!
//! Keys cost nothing to make, so only the total limit bounds the work. Secrets are too long to be guessed either way.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use protocol::{ErrorCode, PublicKey, WireError};
use tokio::time::Instant;

const WINDOW: Duration = Duration::from_mins(1);
const PER_KEY: u32 = 10;
const IN_ALL: u32 = 600;

/// Attempts in the current minute.
#[derive(Default)]
pub(super) struct Attempts(Mutex<Window>);

#[derive(Default)]
struct Window {
    began: Option<Instant>,
    in_all: u32,
    /// Has at most `in_all` entries.
    by_key: HashMap<PublicKey, u32>,
}

impl Attempts {
    /// Counts an attempt, or refuses it.
    pub(super) fn take(&self, key: PublicKey, now: Instant) -> Result<(), WireError> {
        let mut window = self.window(now);
        window.check(key, now)?;
        window.in_all += 1;
        *window.by_key.entry(key).or_default() += 1;
        Ok(())
    }

    /// Refuses a key that has no attempt left.
    pub(super) fn check(&self, key: PublicKey, now: Instant) -> Result<(), WireError> {
        self.window(now).check(key, now)
    }

    fn window(&self, now: Instant) -> MutexGuard<'_, Window> {
        let mut window = self.0.lock();
        if window.began.is_none_or(|began| now.duration_since(began) >= WINDOW) {
            *window = Window { began: Some(now), ..Window::default() };
        }
        window
    }
}

impl Window {
    fn check(&self, key: PublicKey, now: Instant) -> Result<(), WireError> {
        let of_key = self.by_key.get(&key).copied().unwrap_or(0);
        if of_key < PER_KEY && self.in_all < IN_ALL {
            return Ok(());
        }
        let wait = self.began.map_or(WINDOW, |began| (began + WINDOW).saturating_duration_since(now));
        let error = WireError::new(ErrorCode::RateLimitExceeded, "too many attempts, wait before the next");
        Err(error.with_retry_after(wait))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> PublicKey {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&number.to_le_bytes());
        PublicKey(bytes)
    }

    #[test]
    fn a_key_that_tries_too_often_waits_for_the_next_minute() {
        let (attempts, now) = (Attempts::default(), Instant::now());
        assert!((0..PER_KEY).all(|_| attempts.take(key(1), now).is_ok()));
        let refused = attempts.take(key(1), now + WINDOW / 2).expect_err("too many");
        assert_eq!((refused.code, refused.retry_after_ms), (ErrorCode::RateLimitExceeded, Some(30_000)));
        attempts.take(key(2), now).expect("another key is not held up");
        attempts.take(key(1), now + WINDOW).expect("the next minute");
    }

    #[test]
    fn all_keys_together_are_bounded_and_so_is_what_is_remembered() {
        let (attempts, now) = (Attempts::default(), Instant::now());
        let taken = (0..10_000).filter(|number| attempts.take(key(*number), now).is_ok()).count();
        assert_eq!(taken, IN_ALL as usize);
        assert_eq!(attempts.0.lock().by_key.len(), IN_ALL as usize);
    }
}

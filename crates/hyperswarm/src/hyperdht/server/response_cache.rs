//! Caches recent responses by Noise message.
//!
//! A client sends the same message through several relays, and resends it when a response is late. Every copy must get
//! the identical response, since a different response would belong to a different stream with different keys.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::crypto::hash;
use crate::dht_rpc::AgingMap;

/// How long a response is cached. A client gives up on a message long before that.
const AGE_MAX: Duration = Duration::from_secs(20);

const RESPONSES_MAX: usize = 8192;

/// A bounded cache of responses that expire. The oldest is evicted when it is full, so that no flood makes the server
/// refuse a new message.
#[derive(Debug)]
pub(super) struct ResponseCache {
    by_message: AgingMap<[u8; 32], Bytes>,
}

impl Default for ResponseCache {
    fn default() -> Self {
        Self { by_message: AgingMap::new(RESPONSES_MAX, AGE_MAX) }
    }
}

impl ResponseCache {
    /// Returns the response to a message: the one that an earlier copy got, or the one that `make` returns, with what
    /// comes of it.
    ///
    /// A message without a response is not cached, because anyone can send bytes that nobody can decrypt. To reject a
    /// copy costs as much as to reject the first one.
    pub(super) fn get_or_make<T>(
        &mut self,
        noise: &[u8],
        now: Instant,
        make: impl FnOnce() -> Option<(Bytes, Option<T>)>,
    ) -> Option<(Bytes, Option<T>)> {
        self.by_message.expire(now);
        let name = hash(&[noise]);
        if let Some(answer) = self.by_message.get(&name, now) {
            return Some((answer.clone(), None));
        }
        let (answer, outcome) = make()?;
        self.by_message.insert(name, answer.clone(), now);
        Some((answer, outcome))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the response to a message, and whether it was made for this copy.
    fn answer(answers: &mut ResponseCache, noise: &[u8], new: &'static str, now: Instant) -> Option<(Bytes, bool)> {
        let (answer, made) = answers.get_or_make(noise, now, || Some((Bytes::from(new), Some(()))))?;
        Some((answer, made.is_some()))
    }

    #[test]
    fn every_copy_of_a_message_gets_the_same_answer_for_a_while() {
        let now = Instant::now();
        let mut answers = ResponseCache::default();
        assert_eq!(answer(&mut answers, b"message", "one", now), Some(("one".into(), true)));
        let later = now + Duration::from_secs(15);
        assert_eq!(answer(&mut answers, b"message", "two", later), Some(("one".into(), false)));
        assert_eq!(answer(&mut answers, b"message", "two", now + AGE_MAX), Some(("two".into(), true)));
    }

    #[test]
    fn messages_without_an_answer_take_no_place() {
        let now = Instant::now();
        let mut answers = ResponseCache::default();
        for number in 0..3 * RESPONSES_MAX {
            assert!(answers.get_or_make::<()>(&number.to_le_bytes(), now, || None).is_none());
        }
        assert!(answers.by_message.is_empty());
    }

    #[test]
    fn a_flood_of_answered_messages_evicts_the_oldest_and_refuses_nobody() {
        let now = Instant::now();
        let mut answers = ResponseCache::default();
        for number in 0..RESPONSES_MAX {
            answer(&mut answers, &number.to_le_bytes(), "flood", now);
        }
        assert_eq!(answer(&mut answers, b"honest", "honest", now), Some(("honest".into(), true)));
        assert_eq!(answer(&mut answers, b"honest", "other", now), Some(("honest".into(), false)));
        assert_eq!(answers.by_message.len(), RESPONSES_MAX);
    }
}

//! Caches recent answers by Noise message.
//!
//! A client sends the same message through several relays, and resends it when an answer is late. Every copy must get
//! the identical answer, since a different answer would belong to a different stream with different keys.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::crypto::hash;

/// How long an answer is cached. A client gives up on a message long before that.
const AGE_MAX: Duration = Duration::from_secs(20);

const ANSWERS_MAX: usize = 8192;

/// Whether a Noise message was seen before.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// It is new. Call [`Answers::set`] with this key.
    New([u8; 32]),
    /// It was seen before, and this is its answer; `None` if it gets no answer.
    Before(Option<Bytes>),
    /// The cache is full.
    Full,
}

/// A bounded cache of answers that expire.
#[derive(Debug, Default)]
pub(super) struct Answers {
    by_message: HashMap<[u8; 32], Option<Bytes>>,
    order: VecDeque<(Instant, [u8; 32])>,
}

impl Answers {
    /// Looks up a message.
    pub(super) fn look(&mut self, noise: &[u8], now: Instant) -> Seen {
        while self.order.front().is_some_and(|(set, _)| now - *set >= AGE_MAX) {
            if let Some((_, name)) = self.order.pop_front() {
                self.by_message.remove(&name);
            }
        }
        let name = hash(&[noise]);
        match self.by_message.get(&name) {
            Some(answer) => Seen::Before(answer.clone()),
            None if self.order.len() >= ANSWERS_MAX => Seen::Full,
            None => Seen::New(name),
        }
    }

    /// Caches the answer to a new message.
    pub(super) fn set(&mut self, name: [u8; 32], answer: Option<Bytes>, now: Instant) {
        if self.by_message.insert(name, answer).is_none() {
            self.order.push_back((now, name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(answers: &mut Answers, noise: &[u8], now: Instant) -> [u8; 32] {
        match answers.look(noise, now) {
            Seen::New(name) => name,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_copy_of_a_message_gets_the_same_answer_for_a_while() {
        let now = Instant::now();
        let mut answers = Answers::default();
        let name = new(&mut answers, b"message", now);
        answers.set(name, Some(Bytes::from_static(b"answer")), now);
        let refused = new(&mut answers, b"refused", now);
        answers.set(refused, None, now);

        let later = now + Duration::from_secs(15);
        assert_eq!(answers.look(b"message", later), Seen::Before(Some(Bytes::from_static(b"answer"))));
        assert_eq!(answers.look(b"refused", later), Seen::Before(None));
        assert_eq!(new(&mut answers, b"message", now + AGE_MAX), name);
        assert!(answers.by_message.is_empty() && answers.order.is_empty());
    }

    #[test]
    fn a_flood_is_left_unanswered_until_there_is_room() {
        let now = Instant::now();
        let mut answers = Answers::default();
        for number in 0..ANSWERS_MAX {
            let name = new(&mut answers, &number.to_le_bytes(), now);
            answers.set(name, None, now);
        }
        assert_eq!(answers.look(b"one more", now), Seen::Full);
        assert_eq!(answers.look(&0_usize.to_le_bytes(), now), Seen::Before(None));
        new(&mut answers, b"one more", now + AGE_MAX);
    }
}

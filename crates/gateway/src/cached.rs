//! A value that is fetched on demand and cached for a while, with single-flight fetches.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How long a stale value is served after a failed refresh before the next attempt.
const RETRY: Duration = Duration::from_secs(1);

/// A value that is fetched on demand and cached for a while, with single-flight fetches.
pub(crate) struct Cached<T> {
    believed: Duration,
    held: Mutex<Option<Held<T>>>,
    /// Makes fetches single-flight: the holder fetches, other callers wait or take the stale value.
    flight: tokio::sync::Mutex<()>,
}

struct Held<T> {
    value: Arc<T>,
    fetched: Instant,
    fresh_until: Instant,
}

impl<T> Cached<T> {
    pub(crate) fn new(believed: Duration) -> Self {
        Self { believed, held: Mutex::new(None), flight: tokio::sync::Mutex::new(()) }
    }

    /// Returns the value, and fetches it first if it is missing or stale. If the fetch fails, returns the stale value.
    pub(crate) async fn get<E>(&self, fetch: impl Future<Output = Result<T, E>>) -> Result<Arc<T>, E> {
        let now = Instant::now();
        match self.held(|held| (held.value.clone(), held.fresh_until > now)) {
            Some((value, true)) => return Ok(value),
            Some((stale, false)) => match self.flight.try_lock() {
                Ok(_flight) => return Ok(self.fetch(fetch).await.unwrap_or_else(|_| self.keep(stale))),
                // Another caller is fetching it. A slightly stale value is better than waiting.
                Err(_) => return Ok(stale),
            },
            None => {}
        }
        let _flight = self.flight.lock().await;
        match self.held(|held| held.value.clone()) {
            Some(value) => Ok(value),
            None => self.fetch(fetch).await,
        }
    }

    /// Returns the value, and fetches it first unless it is younger than `age`.
    pub(crate) async fn get_younger_than<E>(
        &self,
        age: Duration,
        fetch: impl Future<Output = Result<T, E>>,
    ) -> Result<Arc<T>, E> {
        let young = |held: &Held<T>| (held.fetched.elapsed() < age).then(|| held.value.clone());
        let _flight = self.flight.lock().await;
        match self.held(young).flatten() {
            Some(value) => Ok(value),
            None => self.fetch(fetch).await,
        }
    }

    /// Returns the cached value, however old.
    pub(crate) fn last(&self) -> Option<Arc<T>> {
        self.held(|held| held.value.clone())
    }

    /// Returns the age of the cached value.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.held(|held| held.fetched.elapsed())
    }

    async fn fetch<E>(&self, fetch: impl Future<Output = Result<T, E>>) -> Result<Arc<T>, E> {
        let value = Arc::new(fetch.await?);
        let fetched = Instant::now();
        let held = Held { value: value.clone(), fetched, fresh_until: fetched + self.believed };
        *self.held.lock() = Some(held);
        Ok(value)
    }

    fn keep(&self, stale: Arc<T>) -> Arc<T> {
        if let Some(held) = &mut *self.held.lock() {
            held.fresh_until = Instant::now() + RETRY;
        }
        stale
    }

    fn held<V>(&self, read: impl FnOnce(&Held<T>) -> V) -> Option<V> {
        self.held.lock().as_ref().map(read)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Ready, ready};

    use super::*;

    fn fetched(value: u32) -> Ready<Result<u32, &'static str>> {
        ready(Ok(value))
    }

    fn failed() -> Ready<Result<u32, &'static str>> {
        ready(Err("away"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_value_is_believed_for_its_time_and_then_fetched_anew() {
        let cached = Cached::new(Duration::from_secs(5));
        assert_eq!(*cached.get(fetched(1)).await.expect("fetched"), 1);
        assert_eq!(*cached.get(fetched(2)).await.expect("held"), 1);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(*cached.get(fetched(3)).await.expect("fetched"), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stale_value_stands_while_it_cannot_be_fetched() {
        let cached = Cached::new(Duration::from_secs(5));
        assert!(cached.get(failed()).await.is_err());
        cached.get(fetched(1)).await.expect("fetched");
        tokio::time::advance(Duration::from_mins(1)).await;
        assert_eq!(*cached.get(failed()).await.expect("stale"), 1);
        assert_eq!(*cached.get(fetched(2)).await.expect("stale, too soon to ask again"), 1);
        tokio::time::advance(RETRY).await;
        assert_eq!(*cached.get(fetched(2)).await.expect("fetched"), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_ask_at_once_make_one_call() {
        let cached = Cached::new(Duration::from_secs(5));
        let slow = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, &str>(1)
        };
        let (first, second) = tokio::join!(cached.get(slow), cached.get(fetched(2)));
        assert_eq!((*first.expect("fetched"), *second.expect("shared")), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_value_can_be_asked_for_younger_than_usual() {
        let cached = Cached::new(Duration::from_secs(5));
        cached.get(fetched(1)).await.expect("fetched");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(*cached.get_younger_than(Duration::from_secs(2), fetched(2)).await.expect("held"), 1);
        assert_eq!(*cached.get_younger_than(Duration::from_secs(1), fetched(2)).await.expect("fetched"), 2);
    }
}

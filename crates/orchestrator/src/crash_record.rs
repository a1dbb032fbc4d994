//! Remembers the requests on which engines crashed, so that none is given to a third engine. Pure.
//!
//! Within one job, two crashes are enough. Clients repeat failed requests, and each repeat is a job of its own, so
//! crashes are also remembered by the request's content. A request that merely ran concurrently with the cause must not
//! be blamed: across jobs, a request is convicted only if it was alone on its engine in at least one crash.

use std::collections::HashMap;
use std::time::Duration;

use protocol::Digest;
use tokio::time::Instant;

/// Engine crashes after which a request is not run again.
pub const CRASHES_MAX: u32 = 2;
/// The most requests remembered; the one with the oldest last crash is removed first.
const REQUESTS_MAX: usize = 1024;

/// The requests on which engines crashed.
#[derive(Debug)]
pub struct CrashRecord {
    kept: Duration,
    requests: HashMap<Digest, Crashes>,
}

#[derive(Debug, Clone, Copy)]
struct Crashes {
    count: u32,
    was_alone: bool,
    last: Instant,
}

impl CrashRecord {
    /// Makes a record that remembers each crash for `kept`.
    pub fn new(kept: Duration) -> Self {
        Self { kept, requests: HashMap::new() }
    }

    /// Returns whether nothing is remembered, so that no request needs to be looked up.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Records that an engine crashed on a request while it ran `suspects` requests.
    pub fn crashed(&mut self, request: Digest, suspects: u32, now: Instant) {
        self.forget(now);
        if self.kept.is_zero() {
            return;
        }
        if self.requests.len() >= REQUESTS_MAX
            && !self.requests.contains_key(&request)
            && let Some(oldest) = self.requests.iter().min_by_key(|(_, crashes)| crashes.last).map(|(key, _)| *key)
        {
            self.requests.remove(&oldest);
        }
        let crashes = self.requests.entry(request).or_insert(Crashes { count: 0, was_alone: false, last: now });
        crashes.count += 1;
        crashes.was_alone |= suspects <= 1;
        crashes.last = now;
    }

    /// Records that an engine answered a request, which is therefore not the cause of any crash.
    pub fn succeeded(&mut self, request: &Digest) {
        self.requests.remove(request);
    }

    /// Returns whether a request must not be given to another engine.
    pub fn is_convicted(&mut self, request: &Digest, now: Instant) -> bool {
        self.forget(now);
        self.requests.get(request).is_some_and(|crashes| crashes.was_alone && crashes.count >= CRASHES_MAX)
    }

    fn forget(&mut self, now: Instant) {
        let kept = self.kept;
        self.requests.retain(|_, crashes| now.duration_since(crashes.last) < kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: Duration = Duration::from_mins(10);

    fn request(number: u64) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    /// Returns whether a request is convicted after crashes with these numbers of suspects.
    fn convicted(crashes: &[u32]) -> bool {
        let (mut record, now) = (CrashRecord::new(KEPT), Instant::now());
        for suspects in crashes {
            record.crashed(request(1), *suspects, now);
        }
        assert!(!record.is_convicted(&request(2), now), "another request");
        record.is_convicted(&request(1), now)
    }

    #[test]
    fn two_crashes_convict_a_request_that_was_alone_once() {
        assert!(!convicted(&[1]));
        assert!(convicted(&[1, 1]));
        assert!(convicted(&[4, 1]));
        assert!(convicted(&[1, 4]));
    }

    #[test]
    fn whoever_always_ran_beside_others_is_not_convicted() {
        assert!(!convicted(&[2, 4, 36]));
    }

    #[test]
    fn a_request_that_is_answered_is_cleared() {
        let (mut record, now) = (CrashRecord::new(KEPT), Instant::now());
        record.crashed(request(1), 1, now);
        record.succeeded(&request(1));
        record.crashed(request(1), 1, now);
        assert!(!record.is_convicted(&request(1), now));
    }

    #[test]
    fn crashes_are_forgotten_in_time() {
        let (mut record, now) = (CrashRecord::new(KEPT), Instant::now());
        record.crashed(request(1), 1, now);
        record.crashed(request(1), 1, now);
        assert!(record.is_convicted(&request(1), now + KEPT / 2));
        assert!(!record.is_convicted(&request(1), now + KEPT));
        assert!(record.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_crash_is_forgotten_first() {
        let (mut record, now) = (CrashRecord::new(KEPT), Instant::now());
        for number in 0..2 * REQUESTS_MAX as u64 {
            record.crashed(request(number), 1, now + Duration::from_millis(number));
        }
        assert_eq!(record.requests.len(), REQUESTS_MAX);
        assert!(!record.requests.contains_key(&request(REQUESTS_MAX as u64 - 1)));
        assert!(record.requests.contains_key(&request(REQUESTS_MAX as u64)));
    }
}

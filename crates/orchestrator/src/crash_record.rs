//! Remembers the requests on which engines crashed, so that none is given to a third engine. Pure.
//!
//! Within one job, two crashes are enough. Clients repeat failed requests, and each repeat is a job of its own, so
//! crashes are also remembered by the request's content. A request that merely ran concurrently with the cause must not
//! be blamed: across jobs, a request is convicted only if it was alone on its engine in at least one crash. Two reports
//! of one crash are one crash: a second one counts from another worker, or from a process that was started since.

use std::collections::HashMap;
use std::time::Duration;

use protocol::{Digest, WorkerId};
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

/// A crash of an engine, as its worker reports it.
#[derive(Debug, Clone, Copy)]
pub struct EngineCrash {
    pub worker: WorkerId,
    /// When the attempt began that it ended.
    pub began: Instant,
    /// How many requests the engine worked on.
    pub suspects: u32,
}

#[derive(Debug)]
struct Crashes {
    /// The engines that crashed, by worker and time; as many as convict.
    engines: Vec<(WorkerId, Instant)>,
    was_alone: bool,
    last: Instant,
}

impl Crashes {
    /// Returns whether a crash is of an engine that is not listed yet.
    fn is_new(&self, crash: EngineCrash) -> bool {
        // An attempt that began after a crash ran in another process.
        self.engines.iter().all(|(worker, at)| *worker != crash.worker || crash.began > *at)
    }
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

    /// Records that an engine crashed on a request.
    pub fn crashed(&mut self, request: Digest, crash: EngineCrash, now: Instant) {
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
        let unknown = || Crashes { engines: vec![], was_alone: false, last: now };
        let crashes = self.requests.entry(request).or_insert_with(unknown);
        if crashes.engines.len() < CRASHES_MAX as usize && crashes.is_new(crash) {
            crashes.engines.push((crash.worker, now));
        }
        crashes.was_alone |= crash.suspects <= 1;
        crashes.last = now;
    }

    /// Records that an engine answered a request, which is therefore not the cause of any crash.
    pub fn succeeded(&mut self, request: &Digest) {
        self.requests.remove(request);
    }

    /// Returns whether a request must not be given to another engine.
    pub fn is_convicted(&mut self, request: &Digest, now: Instant) -> bool {
        self.forget(now);
        self.requests
            .get(request)
            .is_some_and(|crashes| crashes.was_alone && crashes.engines.len() >= CRASHES_MAX as usize)
    }

    fn forget(&mut self, now: Instant) {
        let kept = self.kept;
        self.requests.retain(|_, crashes| now.duration_since(crashes.last) < kept);
    }
}

#[cfg(test)]
mod tests {
    use protocol::PublicKey;

    use super::*;

    const KEPT: Duration = Duration::from_mins(10);

    fn request(number: u64) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    /// A crash of another engine than all before.
    fn crash(suspects: u32, now: Instant) -> EngineCrash {
        EngineCrash { worker: PublicKey([1; 32]), began: now + Duration::from_nanos(1), suspects }
    }

    /// Returns whether a request is convicted after crashes with these numbers of suspects.
    fn convicted(crashes: &[u32]) -> bool {
        let (mut record, now) = (CrashRecord::new(KEPT), Instant::now());
        for suspects in crashes {
            record.crashed(request(1), crash(*suspects, now), now);
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
    fn one_crash_that_takes_several_repeats_along_is_one() {
        let (mut record, began) = (CrashRecord::new(KEPT), Instant::now());
        let (one, other) = (PublicKey([1; 32]), PublicKey([2; 32]));
        let crashed = |worker, began| EngineCrash { worker, began, suspects: 1 };
        let later = |seconds| began + Duration::from_secs(seconds);
        for _ in 0..3 {
            record.crashed(request(1), crashed(one, began), later(1));
        }
        assert!(!record.is_convicted(&request(1), later(1)));
        record.crashed(request(1), crashed(other, began), later(1));
        assert!(record.is_convicted(&request(1), later(1)), "another worker");
        record.crashed(request(2), crashed(one, began), later(1));
        record.crashed(request(2), crashed(one, later(2)), later(3));
        assert!(record.is_convicted(&request(2), later(3)), "another process");
    }

    #[test]
    fn a_request_that_is_answered_is_cleared() {
        let (mut record, now) = (CrashRecord::new(KEPT), Instant::now());
        record.crashed(request(1), crash(1, now), now);
        record.succeeded(&request(1));
        record.crashed(request(1), crash(1, now), now);
        assert!(!record.is_convicted(&request(1), now));
    }

    #[test]
    fn crashes_are_forgotten_in_time() {
        let (mut record, now) = (CrashRecord::new(KEPT), Instant::now());
        record.crashed(request(1), crash(1, now), now);
        record.crashed(request(1), crash(1, now), now);
        assert!(record.is_convicted(&request(1), now + KEPT / 2));
        assert!(!record.is_convicted(&request(1), now + KEPT));
        assert!(record.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_crash_is_forgotten_first() {
        let (mut record, now) = (CrashRecord::new(KEPT), Instant::now());
        for number in 0..2 * REQUESTS_MAX as u64 {
            record.crashed(request(number), crash(1, now), now + Duration::from_millis(number));
        }
        assert_eq!(record.requests.len(), REQUESTS_MAX);
        assert!(!record.requests.contains_key(&request(REQUESTS_MAX as u64 - 1)));
        assert!(record.requests.contains_key(&request(REQUESTS_MAX as u64)));
    }
}

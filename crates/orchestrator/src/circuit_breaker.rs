//! A circuit breaker per model and region. Pure: times and outcomes are arguments.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use protocol::WorkerId;
use rpc::backoff::Backoff;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::usual_wait::UsualWait;

/// When a breaker opens and closes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BreakerConfig {
    /// Seconds for which an outcome counts.
    pub window_secs: u64,
    /// Number of outcomes within the window below which a breaker stays closed.
    pub outcomes_min: u32,
    /// Share of bad outcomes, 0 to 1, at which a breaker opens.
    pub failure_ratio: f64,
    /// Seconds of a worker's silence before the first token above which an outcome is bad.
    pub slow_secs: u64,
    /// An outcome is also bad if the wait for its first token is this many times the model's usual one: the median of
    /// several minutes. A wait ends with each further evaluated token of the prompt. With 0 only `slow_secs` counts.
    pub slow_factor: u32,
    /// Seconds below which no wait for the first token is slow, however short the usual one is.
    pub slow_factor_secs_min: u64,
    /// Seconds for which a breaker stays open at first. The time doubles with each failed probe.
    pub open_secs: u64,
    /// Maximum number of seconds for which a breaker stays open.
    pub open_secs_max: u64,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            window_secs: 30,
            outcomes_min: 10,
            failure_ratio: 0.5,
            slow_secs: 60,
            slow_factor: 10,
            slow_factor_secs_min: 10,
            open_secs: 5,
            open_secs_max: 60,
        }
    }
}

/// State of a circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    Closed,
    Open,
    /// Lets one probe through.
    HalfOpen,
}

impl BreakerState {
    /// Returns the state's value in the metric.
    pub fn as_gauge(self) -> i64 {
        match self {
            Self::Closed => 0,
            Self::Open => 1,
            Self::HalfOpen => 2,
        }
    }
}

/// A breaker's decision about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// The request passes and must report its outcome.
    Pass,
    /// The request passes as the only probe; its outcome closes or reopens the breaker.
    Probe,
    /// The request is refused until `retry_after` has passed.
    Refuse { retry_after: Duration },
}

/// Outcome of an admitted request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Whether the request succeeded, and fast enough.
    pub good: bool,
    /// The worker that ran it.
    pub worker: WorkerId,
    /// When the attempt began.
    pub began: Instant,
}

#[derive(Debug)]
pub struct CircuitBreaker {
    config: BreakerConfig,
    outcomes: VecDeque<(Instant, bool)>,
    failures: u32,
    /// When a worker's last failure was counted.
    failed_at: HashMap<WorkerId, Instant>,
    phase: Phase,
    usual_wait: UsualWait,
    /// How long it stays open. The time doubles until it closes.
    open_for: Backoff,
}

#[derive(Debug)]
enum Phase {
    Closed,
    Open {
        until: Instant,
    },
    /// A probe that never reports expires at `until`; another may then pass.
    Probing {
        until: Instant,
    },
}

impl CircuitBreaker {
    /// Makes a closed breaker.
    pub fn new(config: BreakerConfig) -> Self {
        let seconds = Duration::from_secs;
        Self {
            open_for: Backoff::exact(seconds(config.open_secs), seconds(config.open_secs_max)),
            config,
            outcomes: VecDeque::new(),
            failures: 0,
            failed_at: HashMap::new(),
            usual_wait: UsualWait::default(),
            phase: Phase::Closed,
        }
    }

    /// Returns the current state.
    pub fn state(&self) -> BreakerState {
        match self.phase {
            Phase::Closed => BreakerState::Closed,
            Phase::Open { .. } => BreakerState::Open,
            Phase::Probing { .. } => BreakerState::HalfOpen,
        }
    }

    /// Returns whether a request would be refused, without changing the state.
    pub fn refuses(&self, now: Instant) -> bool {
        match self.phase {
            Phase::Closed => false,
            Phase::Open { until } | Phase::Probing { until } => now < until,
        }
    }

    /// Decides whether a request may pass.
    pub fn admit(&mut self, now: Instant) -> Admission {
        match self.phase {
            Phase::Closed => Admission::Pass,
            Phase::Open { until } | Phase::Probing { until } if now < until => {
                Admission::Refuse { retry_after: until - now }
            }
            Phase::Open { .. } | Phase::Probing { .. } => {
                let until = now + Duration::from_secs(self.config.slow_secs);
                self.phase = Phase::Probing { until };
                Admission::Probe
            }
        }
    }

    /// Records how long a request waited for its first token. Returns whether that is far longer than usual.
    ///
    /// A probe is never too slow in this sense: a model that has become slower for good would be refused for ever.
    pub fn is_slow(&mut self, wait: Duration, admission: Admission, now: Instant) -> bool {
        let usual = self.usual_wait.median();
        self.usual_wait.record(wait, now);
        let floor = Duration::from_secs(self.config.slow_factor_secs_min);
        let factor = self.config.slow_factor;
        let is_long = |usual: Duration| wait > usual.saturating_mul(factor).max(floor);
        factor > 0 && admission == Admission::Pass && usual.is_some_and(is_long)
    }

    /// Records the outcome of an admitted request. Requests that ended through no fault of the model or the region (the
    /// caller left, the prompt was too long) call [`CircuitBreaker::abandon`] instead.
    ///
    /// A worker or an engine that dies fails all its jobs at once. That counts as one failure, not one per job: the
    /// failure of a job that began before its worker's last counted failure is ignored.
    pub fn record(&mut self, outcome: Outcome, now: Instant) {
        let Outcome { good, worker, began } = outcome;
        if !good && self.failed_at.get(&worker).is_some_and(|failed_at| began < *failed_at) {
            return;
        }
        if !good {
            self.failed_at.insert(worker, now);
        }
        if let Phase::Probing { .. } = self.phase {
            if good {
                self.close();
            } else {
                self.open(now);
            }
            return;
        }
        if let Phase::Open { .. } = self.phase {
            // A late outcome from before the breaker opened adds no information.
            return;
        }
        self.outcomes.push_back((now, good));
        self.failures += u32::from(!good);
        self.forget(now);
        let count = self.outcomes.len() as u32;
        let ratio = f64::from(self.failures) / f64::from(count.max(1));
        if count >= self.config.outcomes_min && ratio >= self.config.failure_ratio {
            self.open(now);
        }
    }

    /// Ends a request that has no outcome to report. If it was the probe, another may pass.
    pub fn abandon(&mut self, admission: Admission, now: Instant) {
        if admission == Admission::Probe && matches!(self.phase, Phase::Probing { .. }) {
            self.phase = Phase::Open { until: now };
        }
    }

    fn forget(&mut self, now: Instant) {
        let window = Duration::from_secs(self.config.window_secs);
        // A job that began before a forgotten failure and fails later is rare; its failure then counts again.
        const WORKERS_MAX: usize = 4096;
        if self.failed_at.len() > WORKERS_MAX {
            self.failed_at.retain(|_, failed_at| now.duration_since(*failed_at) <= window);
        }
        // The number of outcomes is bounded too: at high rates the newest ones are enough.
        const OUTCOMES_MAX: usize = 4096;
        while let Some(&(at, good)) = self.outcomes.front() {
            if now.duration_since(at) <= window && self.outcomes.len() <= OUTCOMES_MAX {
                break;
            }
            self.outcomes.pop_front();
            self.failures -= u32::from(!good);
        }
    }

    fn open(&mut self, now: Instant) {
        self.phase = Phase::Open { until: now + self.open_for.next_wait() };
        self.outcomes.clear();
        self.failures = 0;
    }

    fn close(&mut self) {
        self.phase = Phase::Closed;
        self.open_for.reset();
    }
}

#[cfg(test)]
mod tests {
    use protocol::PublicKey;

    use super::*;

    fn breaker() -> (CircuitBreaker, Instant) {
        (CircuitBreaker::new(BreakerConfig::default()), Instant::now())
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn outcome(good: bool, began: Instant) -> Outcome {
        Outcome { good, worker: PublicKey([1; 32]), began }
    }

    fn fail(breaker: &mut CircuitBreaker, times: u32, now: Instant) {
        for _ in 0..times {
            breaker.record(outcome(false, now), now);
        }
    }

    #[test]
    fn a_death_counts_once_however_many_jobs_it_takes_along() {
        let (mut breaker, began) = breaker();
        for worker in [1, 2] {
            for milli in 0..36 {
                let died = began + Duration::from_millis(1000 + milli);
                breaker.record(Outcome { good: false, worker: PublicKey([worker; 32]), began }, died);
            }
        }
        assert_eq!((breaker.state(), breaker.failures), (BreakerState::Closed, 2));
        // Failures of jobs that began later do count.
        for second in 2..10 {
            fail(&mut breaker, 1, began + seconds(second));
        }
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn long_jobs_that_go_well_count_though_another_has_failed_meanwhile() {
        let (mut breaker, mut now) = breaker();
        for number in 0..200 {
            now += Duration::from_millis(200);
            // Jobs of ten seconds, of which each fifth fails at once.
            let (good, lasted) = if number % 5 == 0 { (false, seconds(0)) } else { (true, seconds(10)) };
            breaker.record(outcome(good, now - lasted), now);
            assert_eq!(breaker.state(), BreakerState::Closed, "job {number}");
        }
    }

    #[test]
    fn it_opens_when_half_of_the_outcomes_are_bad_and_there_are_enough() {
        let (mut breaker, now) = breaker();
        for _ in 0..5 {
            breaker.record(outcome(true, now), now);
        }
        fail(&mut breaker, 4, now);
        assert_eq!(breaker.state(), BreakerState::Closed);
        fail(&mut breaker, 1, now);
        assert_eq!(breaker.state(), BreakerState::Open);
        assert_eq!(breaker.admit(now), Admission::Refuse { retry_after: seconds(5) });
    }

    /// A breaker whose model usually takes so long.
    fn used_to(wait: Duration, config: BreakerConfig) -> (CircuitBreaker, Instant) {
        let (mut breaker, mut now) = (CircuitBreaker::new(config), Instant::now());
        for _ in 0..100 {
            now += seconds(2);
            assert!(!breaker.is_slow(wait, Admission::Pass, now));
        }
        (breaker, now)
    }

    #[test]
    fn an_answer_is_slow_if_it_takes_far_longer_than_usual() {
        let (mut breaker, now) = used_to(seconds(2), BreakerConfig::default());
        assert!(!breaker.is_slow(seconds(20), Admission::Pass, now));
        assert!(breaker.is_slow(seconds(21), Admission::Pass, now));
        assert!(!breaker.is_slow(seconds(21), Admission::Probe, now), "a probe that completes is good");
        let (mut quick, now) = used_to(Duration::from_millis(1), BreakerConfig::default());
        assert!(!quick.is_slow(seconds(10), Admission::Pass, now), "the floor");
        assert!(quick.is_slow(seconds(11), Admission::Pass, now));
        let (mut fixed, now) = used_to(seconds(2), BreakerConfig { slow_factor: 0, ..BreakerConfig::default() });
        assert!(!fixed.is_slow(seconds(59), Admission::Pass, now));
        let mut new = CircuitBreaker::new(BreakerConfig::default());
        assert!(!new.is_slow(seconds(59), Admission::Pass, now), "nobody knows what is usual");
    }

    #[test]
    fn a_model_that_has_become_slower_for_good_is_not_slow_for_ever() {
        let (mut breaker, mut now) = used_to(seconds(1), BreakerConfig::default());
        let slow = (0..1_000).filter(|_| {
            now += seconds(2);
            breaker.is_slow(seconds(30), Admission::Pass, now)
        });
        assert!((90..=110).contains(&slow.count()));
    }

    #[test]
    fn old_outcomes_do_not_count() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 9, now);
        breaker.record(outcome(false, now + seconds(31)), now + seconds(31));
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn half_open_it_lets_one_probe_through_and_its_outcome_decides() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 10, now);
        let later = now + seconds(5);
        assert_eq!(breaker.admit(later), Admission::Probe);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        assert!(matches!(breaker.admit(later), Admission::Refuse { .. }));
        breaker.record(outcome(true, later), later);
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert_eq!(breaker.admit(later), Admission::Pass);
    }

    #[test]
    fn each_failed_probe_doubles_the_wait_up_to_the_limit() {
        let (mut breaker, mut now) = breaker();
        fail(&mut breaker, 10, now);
        for wait in [5, 10, 20, 40, 60, 60] {
            assert_eq!(breaker.admit(now), Admission::Refuse { retry_after: seconds(wait) });
            now += seconds(wait);
            assert_eq!(breaker.admit(now), Admission::Probe);
            breaker.record(outcome(false, now), now);
        }
    }

    #[test]
    fn a_probe_that_tells_nothing_makes_room_for_another() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 10, now);
        let later = now + seconds(5);
        let probe = breaker.admit(later);
        breaker.abandon(probe, later);
        assert_eq!(breaker.admit(later), Admission::Probe);
        // This probe never reports.
        assert_eq!(breaker.admit(later + seconds(60)), Admission::Probe);
    }

    #[test]
    fn stragglers_do_not_keep_an_open_breaker_open() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 10, now);
        fail(&mut breaker, 100, now + seconds(4));
        assert_eq!(breaker.admit(now + seconds(5)), Admission::Probe);
    }
}

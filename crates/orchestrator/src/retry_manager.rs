//! Decides whether a failed attempt is retried, and when. Pure.

use std::time::Duration;

use protocol::error_code::Blame;
use protocol::{CorrelationId, ErrorCode};
use rpc::backoff::Backoff;

/// How an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    pub code: ErrorCode,
    /// Whether part of the answer had reached the caller.
    pub streamed: bool,
}

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Another worker is tried after a delay.
    Retry {
        /// How long to wait.
        after: Duration,
    },
    GiveUp,
}

/// The longest delay after the first attempt; it doubles with each further one.
const BACKOFF: Duration = Duration::from_millis(10);
/// Upper limit of the delay.
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// Returns whether the model cannot do what was asked, so that another model may be able to.
pub fn is_of_the_model(failure: Failure) -> bool {
    let cannot = matches!(failure.code, ErrorCode::UnsupportedParameter | ErrorCode::ContextLengthExceeded);
    cannot && !failure.streamed
}

/// Decides what follows a failed attempt. Attempts are counted from 1.
pub fn plan(attempt: u32, attempts_max: u32, failure: Failure, correlation_id: CorrelationId) -> Plan {
    // Once the caller has part of an answer, another worker's answer cannot continue it.
    if failure.streamed || attempt >= attempts_max {
        return Plan::GiveUp;
    }
    match failure.code {
        // The caller may try again after the load; the job does not wait for it.
        ErrorCode::DeadlineExceeded | ErrorCode::Cancelled | ErrorCode::ModelLoading => Plan::GiveUp,
        // A refusal is not a fault, so the next worker is tried at once.
        ErrorCode::WorkerFull | ErrorCode::WorkerStopping | ErrorCode::ModelNotHere => {
            Plan::Retry { after: Duration::ZERO }
        }
        code if code.blame() == Blame::Caller => Plan::GiveUp,
        _ => Plan::Retry { after: delay(attempt, correlation_id) },
    }
}

/// Returns the delay after an attempt. Its jitter is derived from the job's id, so that simulations are reproducible.
fn delay(attempt: u32, correlation_id: CorrelationId) -> Duration {
    let id = correlation_id.0.as_u128();
    Backoff::new(BACKOFF, BACKOFF_MAX, (id ^ (id >> 64)) as u64).nth_wait(attempt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> CorrelationId {
        "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("well formed")
    }

    fn planned(attempt: u32, code: ErrorCode, streamed: bool) -> Plan {
        plan(attempt, 3, Failure { code, streamed }, job())
    }

    #[test]
    fn a_worker_that_fails_or_refuses_is_followed_by_another() {
        assert!(matches!(planned(1, ErrorCode::WorkerFailed, false), Plan::Retry { .. }));
        assert!(matches!(planned(2, ErrorCode::Unavailable, false), Plan::Retry { .. }));
        assert_eq!(planned(1, ErrorCode::WorkerFull, false), Plan::Retry { after: Duration::ZERO });
    }

    #[test]
    fn nobody_tries_a_fourth_time() {
        assert_eq!(planned(3, ErrorCode::WorkerFailed, false), Plan::GiveUp);
        assert_eq!(planned(3, ErrorCode::WorkerFull, false), Plan::GiveUp);
    }

    #[test]
    fn an_answer_that_has_begun_is_not_begun_again() {
        assert_eq!(planned(1, ErrorCode::WorkerFailed, true), Plan::GiveUp);
    }

    #[test]
    fn what_is_the_callers_fault_is_not_tried_again() {
        assert_eq!(planned(1, ErrorCode::ModelLoading, false), Plan::GiveUp);
        for code in [ErrorCode::ContextLengthExceeded, ErrorCode::UnsupportedParameter, ErrorCode::DeadlineExceeded] {
            assert_eq!(planned(1, code, false), Plan::GiveUp, "{code}");
        }
    }

    #[test]
    fn delays_are_bounded_and_differ_between_jobs() {
        let mut delays = std::collections::HashSet::new();
        for number in 0..100u128 {
            let job = CorrelationId(uuid::Uuid::from_u128(number << 70 | number));
            assert!(delay(1, job) <= BACKOFF);
            assert!(delay(2, job) <= BACKOFF * 2);
            delays.insert(delay(2, job));
        }
        assert!(delays.len() > 50);
    }
}

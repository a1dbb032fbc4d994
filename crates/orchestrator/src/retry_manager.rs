//! Decides whether a failed attempt is retried, and when. Pure.

use std::time::Duration;

use protocol::error_code::Blame;
use protocol::{CorrelationId, ErrorCode};
use rpc::backoff::Backoff;

/// How an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    pub code: ErrorCode,
    pub delivered: Part,
}

/// What the caller had of the answer when an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Nothing,
    /// A part that another worker can continue.
    Continuable {
        /// Whether the failed attempt delivered any of it.
        progressed: bool,
        /// Whether a worker was tried.
        tried: bool,
        /// The time since the answer was interrupted.
        waited: Duration,
    },
    /// A part that nobody can continue.
    Final,
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
/// How long an interrupted answer waits for a worker that can continue it.
const CONTINUE_WITHIN: Duration = Duration::from_secs(30);
/// How often it looks for one.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Returns whether the model cannot do what was asked, so that another model may be able to.
pub fn is_of_the_model(failure: Failure) -> bool {
    let cannot = matches!(failure.code, ErrorCode::UnsupportedParameter | ErrorCode::ContextLengthExceeded);
    cannot && failure.delivered == Part::Nothing
}

/// Decides what follows a failed attempt. `attempt` counts the failed attempts; if the caller has a part of the answer,
/// only those in a row that failed to continue it.
pub fn plan(attempt: u32, attempts_max: u32, failure: Failure, correlation_id: CorrelationId) -> Plan {
    match failure.delivered {
        Part::Final => Plan::GiveUp,
        Part::Nothing if attempt >= attempts_max => Plan::GiveUp,
        Part::Nothing => begin_anew(attempt, failure.code, correlation_id),
        Part::Continuable { progressed, tried, waited } => match failure.code {
            ErrorCode::Cancelled | ErrorCode::StaleAttempt => Plan::GiveUp,
            _ if waited >= CONTINUE_WITHIN && !progressed => Plan::GiveUp,
            _ if !tried => Plan::Retry { after: LOOK_EVERY },
            // Whoever began the answer can judge the request. Another may be unable to continue it.
            code if progressed && code.blame() == Blame::Caller => Plan::GiveUp,
            _ if attempt >= attempts_max => Plan::GiveUp,
            _ => Plan::Retry { after: delay(attempt.max(1), correlation_id) },
        },
    }
}

/// Decides what follows an attempt of which the caller has nothing.
fn begin_anew(attempt: u32, code: ErrorCode, correlation_id: CorrelationId) -> Plan {
    match code {
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

    fn planned(attempt: u32, code: ErrorCode, delivered: Part) -> Plan {
        plan(attempt, 3, Failure { code, delivered }, job())
    }

    fn part(progressed: bool, waited: u64) -> Part {
        Part::Continuable { progressed, tried: true, waited: Duration::from_secs(waited) }
    }

    fn waiting(waited: u64) -> Part {
        Part::Continuable { progressed: false, tried: false, waited: Duration::from_secs(waited) }
    }

    #[test]
    fn a_worker_that_fails_or_refuses_is_followed_by_another() {
        assert!(matches!(planned(1, ErrorCode::WorkerFailed, Part::Nothing), Plan::Retry { .. }));
        assert!(matches!(planned(2, ErrorCode::Unavailable, Part::Nothing), Plan::Retry { .. }));
        assert_eq!(planned(1, ErrorCode::WorkerFull, Part::Nothing), Plan::Retry { after: Duration::ZERO });
    }

    #[test]
    fn nobody_tries_a_fourth_time() {
        assert_eq!(planned(3, ErrorCode::WorkerFailed, Part::Nothing), Plan::GiveUp);
        assert_eq!(planned(3, ErrorCode::WorkerFull, Part::Nothing), Plan::GiveUp);
    }

    #[test]
    fn an_answer_that_has_begun_is_not_begun_again() {
        assert_eq!(planned(1, ErrorCode::WorkerFailed, Part::Final), Plan::GiveUp);
    }

    #[test]
    fn an_answer_that_was_interrupted_is_continued() {
        for code in [ErrorCode::WorkerFailed, ErrorCode::Unavailable, ErrorCode::EngineCrashed] {
            assert!(matches!(planned(1, code, part(true, 0)), Plan::Retry { .. }), "{code}");
            assert_eq!(planned(3, code, part(false, 0)), Plan::GiveUp, "{code}");
        }
        assert_eq!(planned(1, ErrorCode::StaleAttempt, part(true, 0)), Plan::GiveUp);
        assert_eq!(planned(1, ErrorCode::UnsupportedParameter, part(true, 0)), Plan::GiveUp);
        assert!(matches!(planned(1, ErrorCode::UnsupportedParameter, part(false, 0)), Plan::Retry { .. }));
    }

    #[test]
    fn an_answer_that_was_interrupted_waits_for_a_worker() {
        for code in [ErrorCode::NoCapacity, ErrorCode::Unavailable, ErrorCode::UnsupportedParameter] {
            assert_eq!(planned(0, code, waiting(29)), Plan::Retry { after: LOOK_EVERY }, "{code}");
            assert_eq!(planned(0, code, waiting(30)), Plan::GiveUp, "{code}");
        }
        assert_eq!(planned(1, ErrorCode::WorkerFailed, part(false, 30)), Plan::GiveUp);
        assert!(matches!(planned(0, ErrorCode::WorkerFailed, part(true, 30)), Plan::Retry { .. }));
    }

    #[test]
    fn what_is_the_callers_fault_is_not_tried_again() {
        assert_eq!(planned(1, ErrorCode::ModelLoading, Part::Nothing), Plan::GiveUp);
        for code in [ErrorCode::ContextLengthExceeded, ErrorCode::UnsupportedParameter, ErrorCode::DeadlineExceeded] {
            assert_eq!(planned(1, code, Part::Nothing), Plan::GiveUp, "{code}");
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

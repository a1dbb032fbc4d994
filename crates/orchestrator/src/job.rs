//! The states of a job and the transitions between them. Pure.
//!
//! `received → reserved → dispatched → streaming → completed | failed | cancelled | dead`. If a worker fails in the
//! middle of an answer, the job is `interrupted` and is reserved again. Only `reserved` and the terminal states are
//! written to the store (ADR-0008); the attempt number is the fencing token against writes of abandoned attempts.

/// State of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobState {
    /// It is accepted and has no reservation.
    Received,
    /// Capacity on a worker is reserved for it, on disk.
    Reserved,
    /// A worker acknowledged it.
    Dispatched,
    /// The caller has part of the answer; from here on it cannot begin anew on another worker, only continue.
    Streaming,
    /// Its worker failed in the middle of the answer, and another is to continue it.
    Interrupted,
    /// The answer is complete.
    Completed,
    Failed,
    /// Its caller cancelled or disconnected.
    Cancelled,
    /// Engines crashed on it, and it is not retried.
    Dead,
}

/// An event that changes a job's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobEvent {
    /// A reservation was written.
    Reserve,
    Acknowledge,
    Chunk,
    /// The last chunk arrived.
    Complete,
    /// The attempt failed before its answer began, and another will follow.
    GiveUpAttempt,
    /// The attempt failed in the middle of the answer, and another will continue it.
    Interrupt,
    /// The attempt failed and no other will follow.
    Fail,
    /// The attempt crashed an engine as earlier ones did; the job must not be retried.
    Die,
    /// The caller cancelled or disconnected.
    Cancel,
}

/// An event that a job's state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} cannot happen to a job that is {state:?}")]
pub struct IllegalTransition {
    /// The job's current state.
    pub state: JobState,
    /// The event that was refused.
    pub event: JobEvent,
}

impl JobState {
    /// Returns the state after an event.
    pub fn after(self, event: JobEvent) -> Result<Self, IllegalTransition> {
        use JobEvent as On;
        match (self, event) {
            (Self::Received | Self::Interrupted, On::Reserve) => Ok(Self::Reserved),
            (Self::Reserved, On::Acknowledge) => Ok(Self::Dispatched),
            (Self::Dispatched | Self::Streaming, On::Chunk) => Ok(Self::Streaming),
            (Self::Dispatched | Self::Streaming, On::Complete) => Ok(Self::Completed),
            // The next attempt has to be reserved like the first.
            (Self::Received | Self::Reserved | Self::Dispatched, On::GiveUpAttempt) => Ok(Self::Received),
            (Self::Interrupted | Self::Reserved | Self::Dispatched | Self::Streaming, On::Interrupt) => {
                Ok(Self::Interrupted)
            }
            (state, On::Fail) if !state.is_terminal() => Ok(Self::Failed),
            (Self::Reserved | Self::Dispatched | Self::Streaming, On::Die) => Ok(Self::Dead),
            (state, On::Cancel) if !state.is_terminal() => Ok(Self::Cancelled),
            (state, event) => Err(IllegalTransition { state, event }),
        }
    }

    /// Returns whether the job has ended.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::Dead)
    }
}

/// Position of a chunk: the attempt that sends it, and its number in the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub attempt: u32,
    pub seq: u64,
}

impl Position {
    /// Returns whether a chunk is the one that `expected` names. Any other belongs to an abandoned attempt, repeats
    /// what the caller has, or leaves a gap.
    pub fn is_next(self, expected: Self) -> bool {
        self == expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVENTS: [JobEvent; 9] = [
        JobEvent::Reserve,
        JobEvent::Acknowledge,
        JobEvent::Chunk,
        JobEvent::Complete,
        JobEvent::GiveUpAttempt,
        JobEvent::Interrupt,
        JobEvent::Fail,
        JobEvent::Die,
        JobEvent::Cancel,
    ];

    #[test]
    fn a_job_that_goes_well_passes_through_every_state() {
        let path = [JobEvent::Reserve, JobEvent::Acknowledge, JobEvent::Chunk, JobEvent::Chunk, JobEvent::Complete];
        let end = path.into_iter().try_fold(JobState::Received, JobState::after);
        assert_eq!(end, Ok(JobState::Completed));
    }

    #[test]
    fn an_answer_that_has_begun_is_never_begun_again() {
        assert!(JobState::Streaming.after(JobEvent::GiveUpAttempt).is_err());
    }

    #[test]
    fn an_answer_that_was_interrupted_continues_on_a_new_reservation() {
        let path = [JobEvent::Interrupt, JobEvent::Reserve, JobEvent::Acknowledge, JobEvent::Chunk, JobEvent::Complete];
        assert_eq!(path.into_iter().try_fold(JobState::Streaming, JobState::after), Ok(JobState::Completed));
        assert!(JobState::Interrupted.after(JobEvent::GiveUpAttempt).is_err());
        assert!(JobState::Interrupted.after(JobEvent::Chunk).is_err());
    }

    #[test]
    fn nothing_is_dispatched_without_a_reservation() {
        assert!(JobState::Received.after(JobEvent::Acknowledge).is_err());
    }

    proptest! {
        #[test]
        fn what_has_ended_stays_ended(path in proptest::collection::vec(0usize..EVENTS.len(), 0..40)) {
            let mut state = JobState::Received;
            for event in path {
                let before = state;
                state = state.after(EVENTS[event]).unwrap_or(state);
                prop_assert!(!before.is_terminal() || state == before);
            }
        }
    }
}

//! Which writes of a job a store accepts. Pure.
//!
//! A write names the attempt and the worker that it speaks for. It is refused once the job has moved on or is settled,
//! so that whoever was given up on can neither move nor keep nor settle nor bill the job.

use protocol::WorkerId;

use crate::job_store::{DurableState, Finalised, ReassignError};

/// A job as the store has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Standing {
    /// Number of the current attempt, counted from 1.
    pub attempt: u32,
    /// The worker of that attempt.
    pub worker_id: WorkerId,
    pub state: DurableState,
}

/// Returns whether a worker that holds `held` reservations may get another one.
pub fn has_room(held: u32, capacity: u32) -> bool {
    held < capacity
}

/// Checks that a job may move on from this attempt.
pub fn check_move(job: &Standing, from_attempt: u32) -> Result<(), ReassignError> {
    if job.attempt == from_attempt && job.state == DurableState::Reserved {
        return Ok(());
    }
    Err(ReassignError::Stale { state: job.state, attempt: job.attempt })
}

/// Returns whether an attempt may renew the lease of its job.
pub fn may_renew(job: &Standing, attempt: u32) -> bool {
    job.attempt == attempt && job.state == DurableState::Reserved
}

/// Decides what a settlement by an attempt on a worker does.
pub fn settle(job: &Standing, attempt: u32, worker_id: WorkerId) -> Finalised {
    match job.state {
        DurableState::Settled(state) => Finalised::AlreadySettled { state },
        DurableState::Reserved if job.attempt == attempt && job.worker_id == worker_id => Finalised::Settled,
        DurableState::Reserved => Finalised::Stale { attempt: job.attempt },
    }
}

//! What a job store must do, in its shortest form: the reference that real stores are compared with.

use std::collections::BTreeMap;

use metadata_store::fencing::{self, Standing};
use metadata_store::{DurableState, Finalised, ReassignError, TerminalState};
use protocol::WorkerId;

/// Which writes are accepted. Tests replace rules to see that their loss is noticed.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub has_room: fn(u32, u32) -> bool,
    pub check_move: fn(&Standing, u32) -> Result<(), ReassignError>,
    pub may_renew: fn(&Standing, u32) -> bool,
    pub settle: fn(&Standing, u32, WorkerId) -> Finalised,
}

impl Default for Rules {
    /// The rules of the program.
    fn default() -> Self {
        Self {
            has_room: fencing::has_room,
            check_move: fencing::check_move,
            may_renew: fencing::may_renew,
            settle: fencing::settle,
        }
    }
}

/// An operation of a job store. Jobs have numbers, and times are counted from any moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    Reserve {
        job: u32,
        worker: WorkerId,
        capacity: u32,
        lease_until: u64,
    },
    Reassign {
        job: u32,
        from_attempt: u32,
        worker: WorkerId,
        capacity: u32,
        lease_until: u64,
    },
    /// `tokens` is what the job is billed, if it is billed at all.
    Finalise {
        job: u32,
        attempt: u32,
        worker: WorkerId,
        state: TerminalState,
        tokens: u32,
    },
    Renew {
        job: u32,
        attempt: u32,
        lease_until: u64,
    },
    ReleaseExpired {
        now: u64,
    },
    Find {
        job: u32,
    },
    /// Counts a worker's reservations.
    Held {
        worker: WorkerId,
    },
}

/// What an operation returns.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The job is new and has its reservation.
    Reserved,
    /// The job came to nothing before, and is reserved again as this attempt.
    Again {
        attempt: u32,
    },
    /// There is a job with this key, and it is like this.
    Known(Entry),
    /// The worker has no room.
    Full,
    NotFound,
    /// The job is at its next attempt.
    Moved,
    /// The job may not move on from this attempt.
    CannotMove {
        state: DurableState,
        attempt: u32,
    },
    Finalised(Finalised),
    /// Whether the attempt has a reservation to renew.
    Renewed(bool),
    /// The jobs that were failed, in the order of their numbers.
    Released(Vec<u32>),
    Held(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    pub standing: Standing,
    /// When its reservation expires; `None` once it is settled.
    pub lease_until: Option<u64>,
    /// What it was billed.
    pub tokens: Option<u32>,
}

impl Entry {
    /// As `JobRecord::may_run_again`, of the same request.
    fn may_run_again(&self) -> bool {
        use TerminalState::{Cancelled, Failed};
        matches!(self.standing.state, DurableState::Settled(Failed | Cancelled)) && self.tokens.is_none()
    }
}

/// The jobs of a store, and what was ever done to them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct JobBook {
    pub jobs: BTreeMap<u32, Entry>,
    /// How often each job was settled since it was last reserved for a new request.
    pub settlements: BTreeMap<u32, u32>,
    /// How often each job was billed.
    pub bills: BTreeMap<u32, u32>,
}

impl JobBook {
    pub fn apply(&mut self, operation: &Operation, rules: &Rules) -> Outcome {
        match *operation {
            Operation::Reserve { job, worker, capacity, lease_until } => {
                self.reserve(job, worker, capacity, lease_until, rules)
            }
            Operation::Reassign { job, from_attempt, worker, capacity, lease_until } => {
                self.reassign(job, from_attempt, worker, capacity, lease_until, rules)
            }
            Operation::Finalise { job, attempt, worker, state, tokens } => {
                self.finalise(job, attempt, worker, state, tokens, rules)
            }
            Operation::Renew { job, attempt, lease_until } => {
                let entry = self.jobs.get_mut(&job).filter(|entry| (rules.may_renew)(&entry.standing, attempt));
                let lease = entry.and_then(|entry| entry.lease_until.as_mut());
                Outcome::Renewed(lease.map(|until| *until = lease_until.max(*until)).is_some())
            }
            Operation::ReleaseExpired { now } => {
                let expired: Vec<u32> = self.expired(now).collect();
                for job in &expired {
                    self.settle(*job, TerminalState::Failed, 0);
                }
                Outcome::Released(expired)
            }
            Operation::Find { job } => self.jobs.get(&job).map_or(Outcome::NotFound, |entry| Outcome::Known(*entry)),
            Operation::Held { worker } => Outcome::Held(self.held(worker, None)),
        }
    }

    fn reserve(&mut self, job: u32, worker: WorkerId, capacity: u32, lease_until: u64, rules: &Rules) -> Outcome {
        let known = self.jobs.get(&job).copied();
        if let Some(known) = known.filter(|known| !known.may_run_again()) {
            return Outcome::Known(known);
        }
        if !(rules.has_room)(self.held(worker, None), capacity) {
            return Outcome::Full;
        }
        if let Some(known) = known {
            let attempt = known.standing.attempt + 1;
            let standing = Standing { attempt, worker_id: worker, state: DurableState::Reserved };
            self.jobs.insert(job, Entry { standing, lease_until: Some(lease_until), tokens: None });
            self.settlements.remove(&job);
            return Outcome::Again { attempt };
        }
        let standing = Standing { attempt: 1, worker_id: worker, state: DurableState::Reserved };
        self.jobs.insert(job, Entry { standing, lease_until: Some(lease_until), tokens: None });
        Outcome::Reserved
    }

    fn reassign(
        &mut self,
        job: u32,
        from_attempt: u32,
        worker: WorkerId,
        capacity: u32,
        lease_until: u64,
        rules: &Rules,
    ) -> Outcome {
        let held = self.held(worker, Some(job));
        let Some(entry) = self.jobs.get_mut(&job) else { return Outcome::NotFound };
        if let Err(stale) = (rules.check_move)(&entry.standing, from_attempt) {
            return stale.into();
        }
        if !(rules.has_room)(held, capacity) {
            return Outcome::Full;
        }
        entry.standing.attempt += 1;
        entry.standing.worker_id = worker;
        entry.lease_until = Some(lease_until);
        Outcome::Moved
    }

    fn finalise(
        &mut self,
        job: u32,
        attempt: u32,
        worker: WorkerId,
        state: TerminalState,
        tokens: u32,
        rules: &Rules,
    ) -> Outcome {
        let Some(entry) = self.jobs.get(&job) else { return Outcome::NotFound };
        let outcome = (rules.settle)(&entry.standing, attempt, worker);
        if outcome == Finalised::Settled {
            self.settle(job, state, tokens);
        }
        Outcome::Finalised(outcome)
    }

    fn settle(&mut self, job: u32, state: TerminalState, tokens: u32) {
        let Some(entry) = self.jobs.get_mut(&job) else { return };
        entry.standing.state = DurableState::Settled(state);
        entry.lease_until = None;
        *self.settlements.entry(job).or_default() += 1;
        if state.is_billed() && tokens > 0 {
            entry.tokens = Some(tokens);
            *self.bills.entry(job).or_default() += 1;
        }
    }

    /// Lists the jobs whose lease has expired.
    pub fn expired(&self, now: u64) -> impl Iterator<Item = u32> {
        let is_expired = move |entry: &Entry| entry.lease_until.is_some_and(|until| until <= now);
        self.jobs.iter().filter(move |(_, entry)| is_expired(entry)).map(|(job, _)| *job)
    }

    /// Counts a worker's reservations, apart from that of one job.
    pub fn held(&self, worker: WorkerId, but_for: Option<u32>) -> u32 {
        let holds = |(job, entry): &(&u32, &Entry)| {
            entry.standing.worker_id == worker && entry.lease_until.is_some() && Some(**job) != but_for
        };
        self.jobs.iter().filter(holds).count() as u32
    }
}

impl From<ReassignError> for Outcome {
    fn from(error: ReassignError) -> Self {
        match error {
            ReassignError::Stale { state, attempt } => Self::CannotMove { state, attempt },
            ReassignError::NoCapacity { .. } => Self::Full,
            ReassignError::NotFound => Self::NotFound,
            ReassignError::Quota(refusal) => panic!("no limit applies: {refusal}"),
            ReassignError::Store(error) => panic!("the store failed: {error}"),
        }
    }
}

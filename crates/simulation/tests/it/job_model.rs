//! A model of a job's life for a model checker: orchestrators that share a store, workers, callers, and their faults.
//!
//! Everything that decides is the program's own code: the job's states and the place of a chunk (`orchestrator::job`),
//! what follows a failed attempt (`orchestrator::retry_manager`), and which writes the store accepts
//! (`metadata_store::fencing`). The model adds who acts when. Bounds on the number of faults keep it finite. No step
//! leads back, so a state without steps is where the network comes to rest.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use metadata_store::{DurableState, Finalised, TerminalState};
use orchestrator::job::{IllegalTransition, JobEvent, JobState, Position};
use orchestrator::retry_manager::{self, Failure, Part, Plan};
use parking_lot::Mutex;
use protocol::{CorrelationId, ErrorCode, PublicKey, WorkerId};
use stateright::{Model, Property};
use tether_simulation::job_book::{self, JobBook, Operation, Outcome};

/// How long a lease lasts, in ticks.
const LEASE: u64 = 1;
const ATTEMPTS_MAX: u32 = 2;
/// Long enough for an interrupted answer to be given up.
const TOO_LONG: Duration = Duration::from_mins(1);

/// The rules that the model follows.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) store: job_book::Rules,
    pub(crate) is_next: fn(Position, Position) -> bool,
    pub(crate) after: fn(JobState, JobEvent) -> Result<JobState, IllegalTransition>,
    /// Whether the last chunk waits for the job to be settled.
    pub(crate) settles_first: bool,
    /// Whether somebody releases expired reservations.
    pub(crate) sweeps: bool,
    /// Whether an orchestrator knows what its caller has.
    pub(crate) knows_delivered: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            store: job_book::Rules::default(),
            is_next: Position::is_next,
            after: JobState::after,
            settles_first: true,
            sweeps: true,
            knows_delivered: true,
        }
    }
}

/// How much happens at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct Bounds {
    /// Submissions of jobs, repeats included.
    pub(crate) submissions: u8,
    /// Orchestrators that end without warning.
    pub(crate) crashes: u8,
    /// Workers that end without warning.
    pub(crate) deaths: u8,
    /// Attempts that are given up although their worker goes on with them.
    pub(crate) partitions: u8,
    /// Callers that go away.
    pub(crate) departures: u8,
    /// Renewals of all leases of an orchestrator.
    pub(crate) renewals: u8,
    /// Jobs that another dispatcher takes over while their own still acts.
    pub(crate) takeovers: u8,
    /// Waits of an interrupted answer for workers that are back.
    pub(crate) waits: u8,
}

pub(crate) struct Jobs {
    pub(crate) rules: Rules,
    pub(crate) bounds: Bounds,
    pub(crate) jobs: u32,
    /// The capacity of each worker.
    pub(crate) capacities: Vec<u32>,
    /// Chunks of an answer before its last.
    pub(crate) chunks: u64,
    /// What happened in any history. It is no part of the state, which it would multiply.
    pub(crate) seen: Mutex<BTreeSet<Sight>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Network {
    now: u64,
    book: JobBook,
    /// The jobs of each orchestrator; `None` while it is down.
    orchestrators: [Option<BTreeMap<u32, Journey>>; 2],
    /// The jobs that each worker runs; `None` while it is down.
    workers: Vec<Option<BTreeSet<Run>>>,
    /// The latest attempt of each job that was sent to a worker.
    dispatched: BTreeMap<u32, u32>,
    /// The jobs whose caller has seen the end of the answer.
    ended: BTreeSet<u32>,
    left: Bounds,
    wrongs: BTreeSet<Wrong>,
}

/// What an orchestrator knows of a job.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Journey {
    state: JobState,
    /// The attempt and its worker.
    reservation: Option<(u32, usize)>,
    barred: BTreeSet<usize>,
    tries: u32,
    fruitless: u32,
    is_dispatched: bool,
    /// Chunks that its caller has.
    received: u64,
    /// Chunks that its caller had when the attempt began.
    had: u64,
    /// What the next worker is told that the caller has.
    delivered: u64,
    /// How the job is to be settled.
    ending: Option<TerminalState>,
    /// Whether the answer's last chunk was read. If not, it waits for the settlement.
    is_adopted: bool,
}

/// A worker's work on a job.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Run {
    orchestrator: usize,
    job: u32,
    attempt: u32,
    /// Number of its next chunk.
    next: u64,
}

/// What must never happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Wrong {
    OutOfStep,
    StaleChunk,
    Splice,
    BegunAnew,
    StaleWrite,
    EndWithoutSettlement,
}

/// What should happen in some histories, or the model proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sight {
    StaleChunkRefused,
    LateSettlementRefused,
    Continued,
    Expired,
    RepeatRefused,
    RunsAgain,
    Full,
    StaleMoveRefused,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Submit {
        orchestrator: usize,
        job: u32,
    },
    TakeOver {
        orchestrator: usize,
        job: u32,
        worker: usize,
    },
    /// The job gets its next worker.
    Place {
        orchestrator: usize,
        job: u32,
        worker: usize,
    },
    /// No worker is left.
    Nobody {
        orchestrator: usize,
        job: u32,
    },
    Dispatch {
        orchestrator: usize,
        job: u32,
    },
    Acknowledge {
        orchestrator: usize,
        job: u32,
    },
    /// The orchestrator hears no more of the attempt.
    Fail {
        orchestrator: usize,
        job: u32,
    },
    CallerLeaves {
        orchestrator: usize,
        job: u32,
    },
    Settle {
        orchestrator: usize,
        job: u32,
    },
    Renew {
        orchestrator: usize,
    },
    Release,
    Crash {
        orchestrator: usize,
    },
    Restart {
        orchestrator: usize,
    },
    Chunk {
        worker: usize,
        run: Run,
    },
    Die {
        worker: usize,
    },
    Return {
        worker: usize,
    },
    Tick,
}

impl Journey {
    fn new() -> Self {
        Self {
            state: JobState::Received,
            reservation: None,
            barred: BTreeSet::new(),
            tries: 0,
            fruitless: 0,
            is_dispatched: false,
            received: 0,
            had: 0,
            delivered: 0,
            ending: None,
            is_adopted: false,
        }
    }

    fn is_placing(&self) -> bool {
        self.ending.is_none() && matches!(self.state, JobState::Received | JobState::Interrupted)
    }

    /// As `Journey::delivered_part` and `Journey::failures` of the orchestrator.
    fn failure(&self, code: ErrorCode, waited: Duration, rules: &Rules) -> (Failure, u32) {
        if self.received == 0 || !rules.knows_delivered {
            return (Failure { code, delivered: Part::Nothing }, self.tries);
        }
        let progressed = self.received > self.had;
        let failures = if progressed { 0 } else { self.fruitless + u32::from(self.is_dispatched) };
        (Failure { code, delivered: Part::Continuable { progressed, tried: self.is_dispatched, waited } }, failures)
    }
}

fn worker_id(worker: usize) -> WorkerId {
    PublicKey([worker as u8; 32])
}

/// A change of the network, by the rules.
struct Change<'a> {
    model: &'a Jobs,
    to: Network,
}

impl Change<'_> {
    fn journey(&mut self, orchestrator: usize, job: u32) -> &mut Journey {
        self.to.orchestrators[orchestrator].as_mut().and_then(|jobs| jobs.get_mut(&job)).expect("only its jobs act")
    }

    fn forget(&mut self, orchestrator: usize, job: u32) {
        if let Some(jobs) = &mut self.to.orchestrators[orchestrator] {
            jobs.remove(&job);
        }
    }

    fn store(&mut self, operation: Operation) -> Outcome {
        let named = match operation {
            Operation::Reassign { job, from_attempt: attempt, .. }
            | Operation::Finalise { job, attempt, .. }
            | Operation::Renew { job, attempt, .. } => Some((job, attempt)),
            _ => None,
        };
        let before = named.and_then(|(job, attempt)| Some((self.to.book.jobs.get(&job)?.standing, attempt)));
        let outcome = self.to.book.apply(&operation, &self.model.rules.store);
        let is_written =
            matches!(outcome, Outcome::Moved | Outcome::Renewed(true) | Outcome::Finalised(Finalised::Settled));
        if let Some((standing, attempt)) = before
            && is_written
            && standing.attempt != attempt
        {
            self.to.wrongs.insert(Wrong::StaleWrite);
        }
        outcome
    }

    fn step(&mut self, orchestrator: usize, job: u32, event: JobEvent) {
        let after = self.model.rules.after;
        let journey = self.journey(orchestrator, job);
        match after(journey.state, event) {
            Ok(state) => journey.state = state,
            Err(_) => {
                self.to.wrongs.insert(Wrong::OutOfStep);
            }
        }
    }

    fn end(&mut self, orchestrator: usize, job: u32, event: JobEvent, state: TerminalState) {
        self.step(orchestrator, job, event);
        self.journey(orchestrator, job).ending = Some(state);
    }

    /// As `Orchestrator::after`.
    fn fail(&mut self, orchestrator: usize, job: u32, code: ErrorCode, waited: Duration) {
        let rules = &self.model.rules;
        let (failure, failures) = self.journey(orchestrator, job).failure(code, waited, rules);
        let id = CorrelationId(uuid::Uuid::from_u128(job.into()));
        match (retry_manager::plan(failures, ATTEMPTS_MAX, failure, id), failure.delivered) {
            (Plan::GiveUp, _) => self.end(orchestrator, job, JobEvent::Fail, TerminalState::Failed),
            (Plan::Retry { .. }, Part::Nothing) => {
                self.step(orchestrator, job, JobEvent::GiveUpAttempt);
                self.journey(orchestrator, job).is_dispatched = false;
            }
            (Plan::Retry { .. }, _) => self.interrupt(orchestrator, job),
        }
    }

    /// As `Journey::interrupt` of the orchestrator.
    fn interrupt(&mut self, orchestrator: usize, job: u32) {
        self.step(orchestrator, job, JobEvent::Interrupt);
        let journey = self.journey(orchestrator, job);
        if journey.received > journey.had {
            let last = journey.reservation.map(|(_, worker)| worker);
            journey.barred.retain(|worker| Some(*worker) == last);
            journey.fruitless = 0;
        } else if journey.is_dispatched {
            journey.fruitless += 1;
        } else {
            journey.barred.clear();
        }
        journey.had = journey.received;
        journey.delivered = journey.received;
        journey.is_dispatched = false;
    }

    fn place(&mut self, orchestrator: usize, job: u32, worker: usize) {
        let (capacity, lease_until) = (self.model.capacities[worker], self.to.now + LEASE);
        let (chosen, id) = (self.journey(orchestrator, job), worker_id(worker));
        chosen.barred.insert(worker);
        chosen.tries += 1;
        let operation = match chosen.reservation {
            None => Operation::Reserve { job, worker: id, capacity, lease_until },
            Some((from_attempt, _)) => Operation::Reassign { job, from_attempt, worker: id, capacity, lease_until },
        };
        match self.store(operation) {
            Outcome::Reserved => self.placed(orchestrator, job, (1, worker)),
            Outcome::Again { attempt } => {
                self.model.saw(Sight::RunsAgain);
                self.placed(orchestrator, job, (attempt, worker));
            }
            Outcome::Moved => {
                let attempt = self.journey(orchestrator, job).reservation.map_or(1, |(attempt, _)| attempt + 1);
                self.placed(orchestrator, job, (attempt, worker));
            }
            Outcome::Known(_) => {
                self.model.saw(Sight::RepeatRefused);
                self.forget(orchestrator, job);
            }
            Outcome::Full => {
                self.model.saw(Sight::Full);
                self.fail(orchestrator, job, ErrorCode::WorkerFull, Duration::ZERO);
            }
            _ => {
                self.model.saw(Sight::StaleMoveRefused);
                self.fail(orchestrator, job, ErrorCode::StaleAttempt, Duration::ZERO);
            }
        }
    }

    fn placed(&mut self, orchestrator: usize, job: u32, reservation: (u32, usize)) {
        self.journey(orchestrator, job).reservation = Some(reservation);
        self.step(orchestrator, job, JobEvent::Reserve);
    }

    fn dispatch(&mut self, orchestrator: usize, job: u32) {
        let journey = self.journey(orchestrator, job);
        let Some((attempt, worker)) = journey.reservation else { return };
        journey.is_dispatched = true;
        let (delivered, received) = (journey.delivered, journey.received);
        if delivered != received {
            self.to.wrongs.insert(Wrong::BegunAnew);
        }
        let latest = self.to.dispatched.entry(job).or_default();
        *latest = attempt.max(*latest);
        if let Some(runs) = &mut self.to.workers[worker] {
            runs.insert(Run { orchestrator, job, attempt, next: delivered });
        }
    }

    /// A worker sends its next chunk to whom it runs the job for.
    fn chunk(&mut self, worker: usize, run: Run) {
        let is_last = run.next == self.model.chunks;
        if let Some(runs) = &mut self.to.workers[worker] {
            runs.remove(&run);
            if !is_last {
                runs.insert(Run { next: run.next + 1, ..run });
            }
        }
        let Run { orchestrator, job, attempt, next } = run;
        let Some(journey) = self.to.orchestrators[orchestrator].as_ref().and_then(|jobs| jobs.get(&job)) else {
            return;
        };
        let Some((current, _)) = journey.reservation else { return };
        let is_listening = matches!(journey.state, JobState::Dispatched | JobState::Streaming);
        if !is_listening || journey.ending.is_some() {
            return;
        }
        let expected = Position { attempt: current, seq: journey.received };
        if !(self.model.rules.is_next)(Position { attempt, seq: next }, expected) {
            self.model.saw(Sight::StaleChunkRefused);
            return;
        }
        if next != journey.received {
            self.to.wrongs.insert(Wrong::Splice);
        }
        let is_adopted = journey.is_adopted;
        if !is_adopted && self.to.dispatched.get(&job).is_some_and(|latest| attempt < *latest) && attempt != current {
            self.to.wrongs.insert(Wrong::StaleChunk);
        }
        if journey.had > 0 {
            self.model.saw(Sight::Continued);
        }
        if is_last {
            if !self.model.rules.settles_first {
                self.to.ended.insert(job);
            }
            return self.end(orchestrator, job, JobEvent::Complete, TerminalState::Completed);
        }
        self.step(orchestrator, job, JobEvent::Chunk);
        self.journey(orchestrator, job).received += 1;
    }

    fn settle(&mut self, orchestrator: usize, job: u32) {
        let journey = self.journey(orchestrator, job).clone();
        self.forget(orchestrator, job);
        // A job that never got a reservation is in no store.
        let (Some(state), Some((attempt, worker))) = (journey.ending, journey.reservation) else { return };
        let (worker, tokens) = (worker_id(worker), journey.received as u32);
        match self.store(Operation::Finalise { job, attempt, worker, state, tokens }) {
            Outcome::Finalised(Finalised::Settled) if state == TerminalState::Completed => {
                self.to.ended.insert(job);
            }
            Outcome::Finalised(Finalised::Settled) => {}
            _ => {
                self.model.saw(Sight::LateSettlementRefused);
            }
        }
    }

    fn renew(&mut self, orchestrator: usize) {
        let lease_until = self.to.now + LEASE;
        let jobs = self.to.orchestrators[orchestrator].iter().flatten();
        let held: Vec<(u32, u32)> = jobs.filter_map(|(job, journey)| Some((*job, journey.reservation?.0))).collect();
        for (job, attempt) in held {
            if self.store(Operation::Renew { job, attempt, lease_until }) == Outcome::Renewed(false) {
                let journey = self.journey(orchestrator, job);
                if journey.ending.is_none() {
                    self.fail(orchestrator, job, ErrorCode::StaleAttempt, Duration::ZERO);
                }
            }
        }
    }

    fn take_over(&mut self, orchestrator: usize, job: u32, worker: usize) {
        let Some(entry) = self.to.book.jobs.get(&job) else { return };
        let before = usize::from(entry.standing.worker_id.0[0]);
        let reservation = Some((entry.standing.attempt, before));
        let journey = Journey { reservation, is_adopted: true, ..Journey::new() };
        if let Some(jobs) = &mut self.to.orchestrators[orchestrator] {
            jobs.insert(job, journey);
        }
        self.place(orchestrator, job, worker);
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Submit { orchestrator, job } => {
                self.to.left.submissions -= 1;
                if let Some(jobs) = &mut self.to.orchestrators[orchestrator] {
                    jobs.insert(job, Journey::new());
                }
            }
            Step::TakeOver { orchestrator, job, worker } => {
                self.to.left.takeovers -= 1;
                self.take_over(orchestrator, job, worker);
            }
            Step::Place { orchestrator, job, worker } => self.place(orchestrator, job, worker),
            Step::Nobody { orchestrator, job } => {
                let waited = if self.to.left.waits > 0 { Duration::ZERO } else { TOO_LONG };
                self.to.left.waits = self.to.left.waits.saturating_sub(1);
                self.journey(orchestrator, job).tries += 1;
                self.fail(orchestrator, job, ErrorCode::NoCapacity, waited);
            }
            Step::Dispatch { orchestrator, job } => self.dispatch(orchestrator, job),
            Step::Acknowledge { orchestrator, job } => self.step(orchestrator, job, JobEvent::Acknowledge),
            Step::Fail { orchestrator, job } => {
                if is_worked_on(&self.to, orchestrator, job) {
                    self.to.left.partitions -= 1;
                }
                self.fail(orchestrator, job, ErrorCode::WorkerFailed, Duration::ZERO);
            }
            Step::CallerLeaves { orchestrator, job } => {
                self.to.left.departures -= 1;
                self.end(orchestrator, job, JobEvent::Cancel, TerminalState::Cancelled);
            }
            Step::Settle { orchestrator, job } => self.settle(orchestrator, job),
            Step::Renew { orchestrator } => {
                self.to.left.renewals -= 1;
                self.renew(orchestrator);
            }
            Step::Release => {
                let now = self.to.now;
                self.store(Operation::ReleaseExpired { now });
                self.model.saw(Sight::Expired);
            }
            Step::Crash { orchestrator } => {
                self.to.left.crashes -= 1;
                self.to.orchestrators[orchestrator] = None;
            }
            Step::Restart { orchestrator } => self.to.orchestrators[orchestrator] = Some(BTreeMap::new()),
            Step::Chunk { worker, run } => self.chunk(worker, run),
            Step::Die { worker } => {
                self.to.left.deaths -= 1;
                self.to.workers[worker] = None;
            }
            Step::Return { worker } => self.to.workers[worker] = Some(BTreeSet::new()),
            Step::Tick => self.to.now += 1,
        }
        let unsettled = |job: &u32| {
            let completed = DurableState::Settled(TerminalState::Completed);
            self.to.book.jobs.get(job).is_none_or(|entry| entry.standing.state != completed)
        };
        if self.to.ended.iter().any(unsettled) {
            self.to.wrongs.insert(Wrong::EndWithoutSettlement);
        }
    }
}

/// Returns whether the worker of a job's attempt works on it.
fn is_worked_on(network: &Network, orchestrator: usize, job: u32) -> bool {
    let journey = network.orchestrators[orchestrator].as_ref().and_then(|jobs| jobs.get(&job));
    let Some((attempt, worker)) = journey.and_then(|journey| journey.reservation) else { return false };
    let is_it = |run: &Run| (run.orchestrator, run.job, run.attempt) == (orchestrator, job, attempt);
    network.workers[worker].as_ref().is_some_and(|runs| runs.iter().any(is_it))
}

impl Jobs {
    fn saw(&self, sight: Sight) {
        self.seen.lock().insert(sight);
    }

    fn steps_of(&self, network: &Network, orchestrator: usize, job: u32, journey: &Journey, steps: &mut Vec<Step>) {
        if journey.ending.is_some() {
            return steps.push(Step::Settle { orchestrator, job });
        }
        if network.left.departures > 0 {
            steps.push(Step::CallerLeaves { orchestrator, job });
        }
        if journey.is_placing() {
            let free: Vec<usize> =
                (0..self.capacities.len()).filter(|worker| !journey.barred.contains(worker)).collect();
            if free.is_empty() {
                steps.push(Step::Nobody { orchestrator, job });
            }
            steps.extend(free.into_iter().map(|worker| Step::Place { orchestrator, job, worker }));
            return;
        }
        let runs = is_worked_on(network, orchestrator, job);
        match journey.state {
            JobState::Reserved if !journey.is_dispatched => steps.push(Step::Dispatch { orchestrator, job }),
            JobState::Reserved if runs => steps.push(Step::Acknowledge { orchestrator, job }),
            _ => {}
        }
        if journey.is_dispatched && (!runs || network.left.partitions > 0) {
            steps.push(Step::Fail { orchestrator, job });
        }
    }

    fn steps_of_orchestrator(&self, network: &Network, orchestrator: usize, steps: &mut Vec<Step>) {
        let left = network.left;
        let Some(journeys) = &network.orchestrators[orchestrator] else {
            return steps.push(Step::Restart { orchestrator });
        };
        for job in (0..self.jobs).filter(|job| !journeys.contains_key(job)) {
            if left.submissions > 0 {
                steps.push(Step::Submit { orchestrator, job });
            }
            let is_unsettled = network.book.jobs.get(&job).is_some_and(|entry| entry.lease_until.is_some());
            if left.takeovers > 0 && is_unsettled {
                let everywhere = 0..self.capacities.len();
                steps.extend(everywhere.map(|worker| Step::TakeOver { orchestrator, job, worker }));
            }
        }
        for (job, journey) in journeys {
            self.steps_of(network, orchestrator, *job, journey, steps);
        }
        if left.renewals > 0 && journeys.values().any(|journey| journey.reservation.is_some()) {
            steps.push(Step::Renew { orchestrator });
        }
        if left.crashes > 0 && !journeys.is_empty() {
            steps.push(Step::Crash { orchestrator });
        }
    }

    fn is_at_rest(&self, network: &Network) -> bool {
        let mut steps = vec![];
        self.actions(network, &mut steps);
        steps.is_empty()
    }
}

impl Model for Jobs {
    type State = Network;
    type Action = Step;

    fn init_states(&self) -> Vec<Network> {
        vec![Network {
            now: 0,
            book: JobBook::default(),
            orchestrators: [Some(BTreeMap::new()), Some(BTreeMap::new())],
            workers: vec![Some(BTreeSet::new()); self.capacities.len()],
            dispatched: BTreeMap::new(),
            ended: BTreeSet::new(),
            left: self.bounds,
            wrongs: BTreeSet::new(),
        }]
    }

    fn actions(&self, network: &Network, steps: &mut Vec<Step>) {
        for orchestrator in 0..network.orchestrators.len() {
            self.steps_of_orchestrator(network, orchestrator, steps);
        }
        for (worker, runs) in network.workers.iter().enumerate() {
            let Some(runs) = runs else {
                steps.push(Step::Return { worker });
                continue;
            };
            if network.left.deaths > 0 && !runs.is_empty() {
                steps.push(Step::Die { worker });
            }
            steps.extend(runs.iter().map(|run| Step::Chunk { worker, run: run.clone() }));
        }
        let is_sweeping = self.rules.sweeps && network.orchestrators.iter().any(Option::is_some);
        if is_sweeping && network.book.expired(network.now).next().is_some() {
            steps.push(Step::Release);
        }
        if network.book.jobs.values().any(|entry| entry.lease_until.is_some_and(|until| until > network.now)) {
            steps.push(Step::Tick);
        }
    }

    fn next_state(&self, from: &Network, step: Step) -> Option<Network> {
        let mut change = Change { model: self, to: from.clone() };
        change.apply(step);
        Some(change.to)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("every job is settled once", |_, network: &Network| {
                network.book.settlements.values().all(|times| *times <= 1)
            }),
            Property::always("every job is billed at most once", |_, network: &Network| {
                network.book.bills.values().all(|times| *times <= 1)
            }),
            Property::always("no worker is over-committed", |model: &Self, network: &Network| {
                let mut workers = model.capacities.iter().enumerate();
                workers.all(|(worker, capacity)| network.book.held(worker_id(worker), None) <= *capacity)
            }),
            Property::always("no attempt writes after its successor", |_, network: &Network| {
                !network.wrongs.contains(&Wrong::StaleWrite)
            }),
            Property::always("no chunk of a stale attempt is accepted", |_, network: &Network| {
                !network.wrongs.contains(&Wrong::StaleChunk)
            }),
            Property::always("no answer is spliced", |_, network: &Network| !network.wrongs.contains(&Wrong::Splice)),
            Property::always("no answer is begun again", |_, network: &Network| {
                !network.wrongs.contains(&Wrong::BegunAnew)
            }),
            Property::always("no job is out of step", |_, network: &Network| {
                !network.wrongs.contains(&Wrong::OutOfStep)
            }),
            Property::always("whoever sees the end of an answer has a completed job", |_, network: &Network| {
                !network.wrongs.contains(&Wrong::EndWithoutSettlement)
            }),
            // No step leads back, so every history comes to rest.
            Property::always("every accepted job comes to its end", |model: &Self, network: &Network| {
                let is_over = network.book.jobs.values().all(|entry| entry.lease_until.is_none())
                    && network.orchestrators.iter().flatten().all(BTreeMap::is_empty);
                is_over || !model.is_at_rest(network)
            }),
        ]
    }
}

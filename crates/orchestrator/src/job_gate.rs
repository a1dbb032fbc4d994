//! Holds jobs back while every worker that may run them is busy, and releases them in the order of the fair queue.
//!
//! A job that finds a free slot while nobody waits does not touch it, except for one atomic counter.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{self, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use protocol::infer::InferRequest;
use protocol::model::ModelKey;
use protocol::policy::ServiceClass;
use protocol::prefix::PrefixChain;
use protocol::queue::{self, QueuePage, WaitReason};
use protocol::usage::TokenUsage;
use protocol::{AdapterName, CorrelationId, Digest, Region, TenantId};
use tokio::sync::oneshot;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::fair_queue::{Arrival, FairQueue, Limits, Ticket, TooMany};
use crate::fleet::{Fleet, Wanted};
use crate::metrics::{Metrics, WaitingLabel};
use crate::scheduler::{self, Supply};

/// How often free slots are looked for while jobs wait, besides when one is known to be free.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long jobs wait for the only workers that may run them, once those are gone.
const WORKERS_RETURN_WITHIN: Duration = Duration::from_secs(15);
/// Tokens of an answer of a model whose answers are not known yet.
const ANSWER_TOKENS: f64 = 256.0;
/// Weight of a new answer in the mean length of a model's answers.
const NEW: f64 = 0.05;
/// The most models whose answers are remembered.
const MODELS_MAX: usize = 4_096;
/// A running job is charged again after so many further tokens.
const CHARGE_EVERY: u64 = 64;

/// Determines which workers may run a job.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Group {
    pub(crate) models: Vec<(ModelKey, Option<Digest>)>,
    pub(crate) adapter: Option<AdapterName>,
    /// The regions in which the job may run; all if `None`.
    pub(crate) regions: Option<Vec<Region>>,
}

impl Group {
    /// Returns the room of its workers.
    fn supply(&self, fleet: &Fleet) -> Supply {
        static NO_PROMPT: PrefixChain = PrefixChain::NONE;
        let wanted = self.models.iter().map(|(model, digest)| Wanted {
            model,
            digest: *digest,
            adapter: self.adapter.as_ref(),
            prefix: &NO_PROMPT,
            short_context: 0,
            continuation: None,
            regions: self.regions.as_deref(),
        });
        let wanted: Vec<Wanted<'_>> = wanted.collect();
        fleet.with_candidates(&wanted, Instant::now(), |candidates| scheduler::supply(candidates))
    }
}

/// A job that is to wait.
pub(crate) type WaitingJob = Arrival<Arc<Group>>;

/// What operators see of a waiting job.
#[derive(Debug, Clone)]
pub(crate) struct Label {
    pub(crate) correlation_id: CorrelationId,
    pub(crate) tenant_id: TenantId,
    pub(crate) class: ServiceClass,
    pub(crate) model: ModelKey,
    pub(crate) prompt_tokens: u32,
}

/// Why a waiting job does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shed {
    /// The queue was full, and this job's tenant was the farthest over its share.
    OverShare {
        retry_after: Duration,
    },
    Stopped,
}

pub(crate) struct JobGate {
    fleet: Arc<Fleet>,
    metrics: Metrics,
    began: Instant,
    waiting: AtomicUsize,
    state: Mutex<State>,
    /// Mean tokens of the answers of each model.
    answers: Mutex<HashMap<ModelKey, f64>>,
}

struct State {
    queue: FairQueue<Arc<Group>>,
    waiters: HashMap<Ticket, Waiter>,
    /// Released jobs that do not count towards the load of a worker yet.
    released: u32,
    /// Since when groups have no workers.
    deserted: HashMap<Arc<Group>, Instant>,
}

struct Waiter {
    sender: oneshot::Sender<Result<Turn, Shed>>,
    job: WaitingJob,
    label: Label,
    since: Instant,
}

/// The right of a job to look for a worker. If it is dropped, the job has ended.
pub(crate) struct Turn {
    /// `None` once the turn is over and the job goes on.
    share: Option<Share>,
    search: Search,
}

/// Counts a released job that does not count towards the load of a worker yet.
struct Search {
    gate: Arc<JobGate>,
    is_over: bool,
}

/// What a job's flow is charged for it. If it is dropped, the job has ended.
pub(crate) struct Share {
    gate: Arc<JobGate>,
    ticket: Ticket,
    job: WaitingJob,
    label: Label,
    since: Instant,
    /// Tokens when the flow was last charged.
    charged: u64,
    tokens: u64,
    /// Whether the job waits again.
    is_given_back: bool,
}

/// A job's place in the queue. If it is dropped, the job leaves.
pub(crate) struct QueuePosition {
    gate: Arc<JobGate>,
    ticket: Ticket,
    receiver: oneshot::Receiver<Result<Turn, Shed>>,
    /// Whether the wait is over. The ticket then belongs to the turn, which may take a new place with it.
    is_over: bool,
}

impl JobGate {
    pub(crate) fn new(fleet: Arc<Fleet>, metrics: Metrics, limits: Limits) -> Self {
        let state =
            State { queue: FairQueue::new(limits), waiters: HashMap::new(), released: 0, deserted: HashMap::new() };
        let began = Instant::now();
        Self {
            fleet,
            metrics,
            began,
            waiting: AtomicUsize::new(0),
            state: Mutex::new(state),
            answers: Mutex::default(),
        }
    }

    /// Returns whether no job waits.
    pub(crate) fn is_quiet(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// Returns the tokens that a request is expected to take.
    pub(crate) fn cost(&self, request: &InferRequest, prompt_tokens: u32) -> u64 {
        let input = &request.input;
        if input.embed.is_some() || input.count_only {
            return u64::from(prompt_tokens);
        }
        let usual = self.answers.lock().get(&request.model()).copied().unwrap_or(ANSWER_TOKENS);
        let each = input.max_tokens.map_or(usual, |most| usual.min(f64::from(most))).max(1.0) as u64;
        u64::from(prompt_tokens) + each * u64::from(input.answers())
    }

    /// Records the length of a complete answer.
    pub(crate) fn note_answer(&self, request: &InferRequest, usage: TokenUsage) {
        let tokens = f64::from(usage.completion_tokens) / f64::from(request.input.answers().max(1));
        let mut answers = self.answers.lock();
        if let Some(usual) = answers.get_mut(&request.model()) {
            *usual += NEW * (tokens - *usual);
        } else if answers.len() < MODELS_MAX {
            answers.insert(request.model(), tokens);
        }
    }

    /// Returns the room of a group's workers.
    pub(crate) fn supply(&self, group: &Group) -> Supply {
        group.supply(&self.fleet)
    }

    /// Returns how long a job would wait that arrives now; `None` if unknown.
    pub(crate) fn expected_wait(&self, job: &WaitingJob) -> Option<Duration> {
        let (state, supply) = (self.state.lock(), self.supply(&job.group));
        let waiting = state.queue.len();
        let is_batch = job.flow.class == ServiceClass::Batch;
        let room = if is_batch { supply.room(waiting) } else { supply.urgent_room(waiting) };
        if room > state.released {
            return Some(Duration::ZERO);
        }
        state.queue.expected_wait(job)
    }

    /// Returns how long a tenant's job should wait before it is submitted again.
    pub(crate) fn retry_after(&self, job: &WaitingJob) -> Duration {
        retry_after(&self.state.lock().queue, job)
    }

    /// Adds a job to the queue.
    pub(crate) fn enter(self: &Arc<Self>, job: WaitingJob, label: Label) -> Result<QueuePosition, TooMany> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state.lock();
        let accepted = state.queue.enter(job.clone(), self.now())?;
        self.count(&label, 1);
        state.waiters.insert(accepted.ticket, Waiter { sender, job, label, since: Instant::now() });
        let shed = accepted.shed.and_then(|shed| state.waiters.remove(&shed));
        let shed = shed.map(|shed| (retry_after(&state.queue, &shed.job), shed));
        let released = self.pump(&mut state);
        drop(state);
        if let Some((retry_after, shed)) = shed {
            self.count(&shed.label, -1);
            let _ = shed.sender.send(Err(Shed::OverShare { retry_after }));
        }
        send(released);
        Ok(QueuePosition { gate: self.clone(), ticket: accepted.ticket, receiver, is_over: false })
    }

    /// Releases the jobs that have room now. A slot must be free before this is called.
    pub(crate) fn poke(self: &Arc<Self>) {
        // Whoever frees a slot writes that first and then reads whether somebody waits. `pump` does the two the other
        // way round, so that one of them sees the other.
        atomic::fence(Ordering::SeqCst);
        if !self.is_quiet() {
            let released = self.pump(&mut self.state.lock());
            send(released);
        }
    }

    /// Looks for room again and again until `stop` is cancelled: workers that were set aside come back without a
    /// report, and jobs give up on workers that are gone.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.poke();
        }
    }

    /// Lists the waiting jobs, the next ones of each group first.
    pub(crate) fn list(&self, limit: usize) -> QueuePage {
        let state = self.state.lock();
        let mut waiting = vec![];
        for (group, rows) in state.queue.list() {
            let is_deserted = state.deserted.contains_key(group);
            waiting.extend(rows.into_iter().filter_map(|row| {
                let Waiter { label, since, .. } = state.waiters.get(&row.ticket)?;
                let reason = match row.is_over_share {
                    _ if is_deserted => WaitReason::NoWorker,
                    true => WaitReason::ShareUsed,
                    false => WaitReason::AllFull,
                };
                let starts_in = state.queue.time_for(group, row.tokens_ahead).filter(|_| !is_deserted);
                Some(queue::WaitingJob {
                    correlation_id: label.correlation_id,
                    tenant_id: label.tenant_id.clone(),
                    class: label.class,
                    model: label.model.clone(),
                    prompt_tokens: label.prompt_tokens,
                    waited_ms: since.elapsed().as_millis() as u64,
                    reason,
                    starts_in_ms: starts_in.map(|wait| wait.as_millis() as u64),
                })
            }));
        }
        let total = waiting.len() as u64;
        waiting.truncate(limit);
        QueuePage { waiting, total }
    }

    /// Releases jobs as long as there is room for them.
    fn pump(self: &Arc<Self>, state: &mut State) -> Vec<(Waiter, Turn)> {
        self.publish(state);
        atomic::fence(Ordering::SeqCst);
        let now = Instant::now();
        let waiting = state.queue.len();
        let supplies = state.queue.groups().map(|group| (group.clone(), self.supply(group)));
        let supplies: HashMap<Arc<Group>, Supply> = supplies.collect();
        state.deserted.retain(|group, _| supplies.get(group).is_some_and(|supply| !supply.exists));
        let mut room = HashMap::new();
        for (group, supply) in supplies {
            let is_given_up = !supply.exists && {
                let since = *state.deserted.entry(group.clone()).or_insert(now);
                now - since >= WORKERS_RETURN_WITHIN
            };
            // Jobs that nobody can run any more are released, and fail.
            let rooms = (supply.room(waiting), supply.urgent_room(waiting));
            room.insert(group, if is_given_up { (u32::MAX, u32::MAX) } else { rooms });
        }
        let mut turns = vec![];
        loop {
            let released = state.released;
            let has_room = |group: &Arc<Group>| room.get(group).is_some_and(|(room, _)| *room > released);
            let has_urgent = |group: &Arc<Group>| room.get(group).is_some_and(|(_, room)| *room > released);
            let next = state.queue.release(self.now(), has_room);
            // Batch jobs give up their slots to the others.
            let next = next.or_else(|| state.queue.release_urgent(self.now(), has_urgent));
            let Some(ticket) = next else { break };
            let Some(waiter) = state.waiters.remove(&ticket) else {
                state.queue.end(ticket, 0);
                continue;
            };
            state.released += 1;
            self.count(&waiter.label, -1);
            let (job, label, since) = (waiter.job.clone(), waiter.label.clone(), waiter.since);
            let gate = self.clone();
            let share = Share { gate, ticket, job, label, since, charged: 0, tokens: 0, is_given_back: false };
            let search = Search { gate: self.clone(), is_over: false };
            turns.push((waiter, Turn { share: Some(share), search }));
        }
        self.publish(state);
        turns
    }

    fn remove(&self, state: &mut State, ticket: Ticket) {
        state.queue.leave(ticket);
        if let Some(waiter) = state.waiters.remove(&ticket) {
            self.count(&waiter.label, -1);
            self.publish(state);
        }
    }

    fn publish(&self, state: &State) {
        self.waiting.store(state.queue.len(), Ordering::Release);
    }

    fn count(&self, label: &Label, change: i64) {
        let label = WaitingLabel { model: label.model.to_string(), class: label.class.as_str() };
        self.metrics.waiting.get_or_create(&label).inc_by(change);
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

fn send(released: Vec<(Waiter, Turn)>) {
    for (waiter, turn) in released {
        // If the job has gone, its turn is dropped.
        let _ = waiter.sender.send(Ok(turn));
    }
}

/// Returns the expected wait, spread by a quarter, so that those who are refused do not come back together.
fn retry_after(queue: &FairQueue<Arc<Group>>, job: &WaitingJob) -> Duration {
    const UNKNOWN: Duration = Duration::from_secs(2);
    const MOST: Duration = Duration::from_secs(96);
    let wait = queue.expected_wait(job).unwrap_or(UNKNOWN).clamp(Duration::from_secs(1), MOST);
    wait.mul_f64(1.0 + (queue.len() % 16) as f64 / 64.0)
}

impl QueuePosition {
    /// Waits for the job's turn. Cancel safe.
    pub(crate) async fn turn(&mut self) -> Result<Turn, Shed> {
        let turn = (&mut self.receiver).await.unwrap_or(Err(Shed::Stopped));
        self.is_over = true;
        turn
    }
}

impl Drop for QueuePosition {
    fn drop(&mut self) {
        if !self.is_over {
            let gate = &self.gate;
            gate.remove(&mut gate.state.lock(), self.ticket);
        }
    }
}

impl Turn {
    /// Ends the turn of a job that counts towards the load of its worker from now on.
    pub(crate) fn taken(mut self) -> Option<Share> {
        self.share.take()
    }

    /// Lets others look for a worker, because this job found none.
    pub(crate) fn pass(&mut self) {
        self.search.end();
    }

    /// Takes the job back to its place in the queue.
    pub(crate) fn give_back(mut self) -> Option<QueuePosition> {
        let mut share = self.share.take()?;
        self.search.end();
        share.is_given_back = true;
        let (gate, ticket, since) = (&share.gate, share.ticket, share.since);
        let (job, label) = (share.job.clone(), share.label.clone());
        let (sender, receiver) = oneshot::channel();
        let mut state = gate.state.lock();
        state.queue.give_back(ticket, gate.now());
        gate.count(&label, 1);
        state.waiters.insert(ticket, Waiter { sender, job, label, since });
        let released = gate.pump(&mut state);
        drop(state);
        send(released);
        Some(QueuePosition { gate: gate.clone(), ticket, receiver, is_over: false })
    }
}

impl Search {
    fn end(&mut self) {
        if !std::mem::replace(&mut self.is_over, true) {
            let mut state = self.gate.state.lock();
            state.released = state.released.saturating_sub(1);
            let released = self.gate.pump(&mut state);
            drop(state);
            send(released);
        }
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        self.end();
    }
}

impl Share {
    /// Records the tokens that the job took so far.
    pub(crate) fn charge(&mut self, usage: TokenUsage) {
        self.tokens = u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens);
        if self.tokens >= self.charged + CHARGE_EVERY {
            self.charged = self.tokens;
            self.gate.state.lock().queue.charge(self.ticket, self.tokens);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if !self.is_given_back {
            self.gate.state.lock().queue.end(self.ticket, self.tokens);
        }
    }
}

#[cfg(test)]
mod tests;

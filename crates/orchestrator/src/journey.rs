//! One running job: its attempts, its state and its reservation.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use protocol::control::{AttemptDecision, Decision, QueueWait};
use protocol::infer::{Degraded, InferRequest, Input};
use protocol::jobs::AttemptRecord;
use protocol::model::{ALTERNATIVES_MAX, ModelKey};
use protocol::policy::TenantPolicy;
use protocol::prefix::PrefixChain;
use protocol::usage::TokenUsage;
use protocol::{AdapterName, Digest, UnixMillis, WireError, WorkerId, codec};
use tokio::time::Instant;
use tracing::error;

use crate::bounds::Meter;
use crate::circuit_breaker::{Admission, Outcome};
use crate::dead_letters;
use crate::dispatch::{AttemptEnd, Fault};
use crate::fleet::{Continuation, Wanted};
use crate::job::{JobEvent, JobState};
use crate::job_gate::{Group, Share, Turn};
use crate::journal::Journal;
use crate::quotas::JobPermit;
use crate::reservation_manager::Reservation;
use crate::retry_manager::Part;
use crate::running_jobs::RunningJob;
use crate::scheduler::{Placement, Tried};

/// The most attempts that are kept with a job; the oldest are dropped. Many workers may continue a long answer.
const HISTORY_MAX: usize = 32;
/// Outcome of an attempt that runs.
const PLACED: &str = "placed";
/// Outcome of an attempt whose job a second worker has taken over.
const OVERTAKEN: &str = "overtaken";

/// A model that may run a job.
struct Build {
    model: ModelKey,
    /// Digests of the prompt's prefixes; a worker that has one of them cached is preferred.
    prefix: PrefixChain,
    /// The longest context known to be too short for the job, in tokens; 0 if unknown.
    short_context: u32,
}

impl Build {
    fn new(model: ModelKey, request: &InferRequest) -> Self {
        Self { prefix: PrefixChain::with(request, &model), model, short_context: 0 }
    }
}

/// What an attempt says of its model.
#[derive(Debug)]
pub struct Verdict {
    pub model: ModelKey,
    pub outcome: Outcome,
    /// Whether the attempt failed. An attempt that completed may be bad as well, because it was slow.
    pub is_failure: bool,
}

pub struct Journey {
    /// The request, with the number of the current attempt.
    pub request: InferRequest,
    /// Digest of what the client asks for, or of the request as received.
    pub fingerprint: [u8; 32],
    /// The rules of its tenant.
    pub policy: Arc<TenantPolicy>,
    /// Lets an operator cancel it.
    pub(crate) running: RunningJob,
    /// Counts it among the jobs of its tenant.
    pub permit: Option<JobPermit>,
    /// The most tokens of each answer, if the request sets none and the tenant's tokens are limited.
    pub answer_tokens: Option<u32>,
    /// Length of the request as its first worker got it.
    pub request_bytes: Option<usize>,
    /// The fewest tokens that it could cost on a worker and that its tenant's quotas did not allow.
    pub(crate) tokens_refused: Option<u64>,
    /// The request as its worker gets it, if it was encoded for the attempt with this number.
    pub encoded: Option<(u32, Bytes)>,
    /// The model that the request names. A tenant's policy may have removed it from `builds`.
    requested: ModelKey,
    /// The other models that the request names.
    alternatives: Vec<ModelKey>,
    /// The models that may run it, the requested one first. Never empty.
    builds: Vec<Build>,
    /// Index of the current attempt's model in `builds`.
    build: usize,
    /// The time by which the answer must have begun.
    pub deadline: Instant,
    /// Whether the caller asked for progress.
    pub wants_progress: bool,
    /// The workers that were tried, in order, each with the model it was to run.
    pub tried: Vec<Tried>,
    /// Those that must not be tried again, each with the time of its failure.
    barred: Vec<(Tried, Instant)>,
    /// How many workers in a row took the job and failed to continue the answer.
    fruitless: u32,
    /// How many workers handed it over because they stop.
    pub handed_over: u32,
    /// What the caller has of the answers.
    pub journal: Journal,
    /// What was delivered, over all attempts that continue the answer.
    pub(crate) meter: Option<Meter>,
    /// What the caller had when the current attempt began, as [`Journal::progress`] counts it.
    had: u64,
    /// How often another worker continued the answer.
    pub continued: u32,
    /// When the answer was interrupted, until another worker continues it.
    interrupted_at: Option<Instant>,
    /// Estimated tokens of its prompt.
    pub(crate) prompt_tokens: u32,
    /// Whether the workers that could run it had no room when it was last placed.
    pub(crate) is_busy: bool,
    /// Its turn to look for a worker, if it waited for one.
    pub(crate) turn: Option<Turn>,
    /// What its tenant's share is charged, if it waited.
    pub(crate) share: Option<Share>,
    /// How long it waited for a free slot.
    pub(crate) waited: Duration,
    /// How it was made cheaper, and the adapter and the limit of tokens that its caller asked for.
    pub(crate) degraded: Option<Degraded>,
    asked: (Option<AdapterName>, Option<u32>),
    /// The models that it asked for, while it runs on another one.
    own_builds: Vec<Build>,
    /// Why the queue refused it.
    pub(crate) shed: Option<&'static str>,
    /// When its worker took the current attempt.
    pub(crate) acknowledged_at: Option<Instant>,
    /// Its reservation on a worker.
    pub reservation: Option<Reservation>,
    /// The breaker's decision about the current attempt.
    pub admission: Option<Admission>,
    /// What the breakers are told of its attempts when it ends.
    pub verdicts: Vec<Verdict>,
    /// A refusal that is believed only if another worker says the same, and the worker that gave it.
    pub doubted: Option<(WorkerId, WireError)>,
    /// The workers whose engine crashed on it.
    pub crashed: Vec<WorkerId>,
    /// The workers that refused it as full.
    pub refusing: Vec<WorkerId>,
    /// Whether the current attempt was sent to its worker.
    pub is_dispatched: bool,
    /// When the current attempt began.
    pub attempt_began: Instant,
    /// Number of engines that crashed on it.
    pub crashes: u32,
    /// How long each worker waited before it began the answer, or was overtaken.
    pub waits: Vec<(WorkerId, Duration)>,
    /// Error of the previous attempt.
    pub last_error: Option<WireError>,
    /// Why a model could not do what the job asks, if another was to be tried.
    pub refusal: Option<WireError>,
    state: JobState,
    attempts: Vec<AttemptDecision>,
    /// The second workers that were started and have not overtaken the first.
    hedges: Vec<AttemptDecision>,
    /// The attempts that have ended.
    history: Vec<AttemptRecord>,
    /// What is kept with the answer.
    pub late_note: Option<String>,
}

impl Journey {
    pub(crate) fn new(
        mut request: InferRequest,
        fingerprint: [u8; 32],
        deadline: Instant,
        running: RunningJob,
    ) -> Self {
        // The orchestrator needs progress itself, to tell a busy worker from a silent one.
        let wants_progress = std::mem::replace(&mut request.progress, true);
        // Workers need neither the fingerprint nor acknowledgements, and only this orchestrator knows what was
        // delivered.
        (request.fingerprint, request.acknowledges, request.delivered) = (None, false, None);
        (request.linger_ms, request.keeps_answer, request.note, request.detached) = (None, false, None, false);
        let mut models = vec![request.model()];
        for model in std::mem::take(&mut request.alternatives).into_iter().take(ALTERNATIVES_MAX) {
            if !models.contains(&model) {
                models.push(model);
            }
        }
        let alternatives = models[1..].to_vec();
        let builds = models.into_iter().map(|model| Build::new(model, &request));
        Self {
            requested: request.model(),
            alternatives,
            builds: builds.collect(),
            build: 0,
            fingerprint,
            policy: Arc::default(),
            running,
            permit: None,
            answer_tokens: None,
            request_bytes: None,
            tokens_refused: None,
            encoded: None,
            deadline,
            wants_progress,
            tried: vec![],
            barred: vec![],
            fruitless: 0,
            handed_over: 0,
            journal: Journal::new(&request.input),
            meter: None,
            had: 0,
            continued: 0,
            interrupted_at: None,
            prompt_tokens: 0,
            is_busy: false,
            turn: None,
            share: None,
            waited: Duration::ZERO,
            degraded: None,
            asked: (request.input.adapter.clone(), request.input.max_tokens),
            own_builds: vec![],
            shed: None,
            acknowledged_at: None,
            reservation: None,
            admission: None,
            verdicts: vec![],
            doubted: None,
            crashed: vec![],
            refusing: vec![],
            is_dispatched: false,
            attempt_began: Instant::now(),
            crashes: 0,
            waits: vec![],
            last_error: None,
            refusal: None,
            state: JobState::Received,
            attempts: vec![],
            hedges: vec![],
            history: vec![],
            late_note: None,
            request,
        }
    }

    /// Returns the request as its worker gets it.
    pub fn sent(&self) -> Cow<'_, InferRequest> {
        self.limited_to(self.answer_tokens)
    }

    /// Returns the request as a worker gets it that may make so many tokens of each answer.
    pub fn limited_to(&self, answer_tokens: Option<u32>) -> Cow<'_, InferRequest> {
        if answer_tokens.is_none() {
            return Cow::Borrowed(&self.request);
        }
        let mut request = self.request.clone();
        request.input.max_tokens = answer_tokens;
        Cow::Owned(request)
    }

    /// Returns the request as its worker gets it, encoded.
    pub fn take_encoded(&mut self) -> Bytes {
        match self.encoded.take() {
            Some((attempt, body)) if attempt == self.request.attempt => body,
            _ => codec::encode(&*self.sent()).into(),
        }
    }

    /// Returns the model of the current attempt, or the requested one before the first attempt.
    pub fn model(&self) -> &ModelKey {
        &self.builds[self.build].model
    }

    /// Returns the index of the current attempt's model.
    pub fn build(&self) -> usize {
        self.build
    }

    /// Returns the models that may run it.
    pub fn models(&self) -> impl Iterator<Item = &ModelKey> + Clone {
        self.builds.iter().map(|build| &build.model)
    }

    /// Records that a worker is tried with the current model.
    pub fn try_worker(&mut self, worker: WorkerId) {
        self.tried.push((worker, self.build));
        self.barred.push(((worker, self.build), Instant::now()));
    }

    /// Returns the workers that must not be tried again.
    pub fn barred(&self) -> Vec<Tried> {
        self.barred.iter().map(|(tried, _)| *tried).collect()
    }

    /// Returns what the caller had of the answer when the current attempt failed. `began` says whether it has a part.
    pub fn delivered_part(&self, began: bool) -> Part {
        if !began {
            Part::Nothing
        } else if self.journal.delivered().is_none() {
            Part::Final
        } else {
            let waited = self.interrupted_at.map(|interrupted| interrupted.elapsed()).unwrap_or_default();
            let (progressed, tried) = (self.has_progressed(), self.is_dispatched);
            Part::Continuable { progressed, tried, waited }
        }
    }

    /// Returns whether the current attempt delivered a part of the answer.
    fn has_progressed(&self) -> bool {
        self.journal.progress() > self.had
    }

    /// Returns how many attempts failed, including the current one. Attempts that delivered something, that no worker
    /// acknowledged, or that a stopping worker handed over, do not count.
    pub fn failures(&self, part: Part, fault: Fault) -> u32 {
        match part {
            Part::Continuable { progressed: true, .. } => 0,
            Part::Continuable { .. } => self.fruitless + u32::from(self.is_fruitless(fault)),
            Part::Nothing | Part::Final => (self.tried.len() as u32).saturating_sub(self.handed_over),
        }
    }

    fn is_fruitless(&self, fault: Fault) -> bool {
        self.is_dispatched && !matches!(fault, Fault::Unacknowledged | Fault::Leaving)
    }

    /// Returns what was delivered, over all attempts that continue the answer.
    pub fn delivered_usage(&self) -> TokenUsage {
        self.meter.map(|meter| meter.delivered()).unwrap_or_default()
    }

    /// Prepares an attempt that continues the answer. It must run the same model. `has_reported` says whether a worker
    /// has reported since a time.
    pub fn interrupt(&mut self, fault: Fault, has_reported: impl Fn(WorkerId, Instant) -> bool) {
        self.step(JobEvent::Interrupt);
        let now = Instant::now();
        if let Some((_, failed_at)) = self.barred.last_mut().filter(|_| self.is_dispatched) {
            *failed_at = now;
        }
        if self.has_progressed() {
            self.barred.drain(..self.barred.len().saturating_sub(1));
            self.fruitless = 0;
            self.interrupted_at = None;
        } else if self.is_fruitless(fault) {
            self.fruitless += 1;
        } else if !self.is_dispatched {
            // If no other worker can continue the answer, those may that are back.
            self.barred.retain(|((worker, _), failed_at)| !has_reported(*worker, *failed_at));
        }
        self.interrupted_at.get_or_insert(now);
        self.had = self.journal.progress();
        self.request.delivered = self.journal.delivered();
        self.request.deadline_ms = None;
        (self.doubted, self.refusal, self.tokens_refused) = (None, None, None);
        self.keep_current_build();
    }

    /// Drops the other models that may run the job.
    fn keep_current_build(&mut self) {
        const OTHER: usize = usize::MAX;
        let barred = self.barred.iter_mut().map(|(tried, _)| tried);
        for (_, build) in self.tried.iter_mut().chain(barred) {
            *build = if *build == self.build { 0 } else { OTHER };
        }
        let current = self.builds.swap_remove(self.build);
        self.builds = vec![current];
        self.build = 0;
    }

    /// Returns the worker that was tried last.
    pub fn last_worker(&self) -> Option<WorkerId> {
        self.tried.last().map(|(worker, _)| *worker)
    }

    /// Removes the models that are not allowed, unless none is allowed.
    pub fn keep_models(&mut self, may_have: impl Fn(&ModelKey) -> bool) {
        if self.models().any(&may_have) {
            self.builds.retain(|build| may_have(&build.model));
            self.choose(0);
        }
    }

    /// Returns what the job needs from a worker, for each model that may run it.
    pub fn wanted(&self) -> Vec<Wanted<'_>> {
        let adapter = self.request.input.adapter.as_ref();
        let digest_of = |model: &ModelKey| self.request.digests.iter().find(|known| known.key == *model);
        let wanted = self.builds.iter().map(|Build { model, prefix, short_context }| Wanted {
            model,
            digest: digest_of(model).map(|known| known.digest),
            adapter,
            prefix,
            short_context: *short_context,
            continuation: self.continuation(),
            regions: self.policy.allowed_regions.as_deref(),
        });
        wanted.collect()
    }

    /// Returns which workers may run it.
    pub(crate) fn group(&self) -> Group {
        let wanted = self.wanted();
        let models = wanted.iter().map(|wanted| (wanted.model.clone(), wanted.digest)).collect();
        Group { models, adapter: self.request.input.adapter.clone(), regions: self.policy.allowed_regions.clone() }
    }

    /// Changes the request as a policy says, and keeps what its caller is told of it.
    pub(crate) fn degrade(&mut self, degraded: Degraded) {
        let input = &mut self.request.input;
        if degraded.model.is_some() {
            // Adapters belong to a model.
            input.adapter = None;
        }
        if let Some(adapter) = &degraded.adapter {
            input.adapter = Some(adapter.clone());
        }
        if let Some(tokens) = degraded.max_tokens {
            input.max_tokens = Some(tokens);
        }
        if let Some(model) = &degraded.model {
            let other = vec![Build::new(model.clone(), &self.request)];
            self.own_builds = std::mem::replace(&mut self.builds, other);
            (self.tried, self.barred) = (vec![], vec![]);
            self.choose(0);
        }
        self.degraded = Some(degraded);
    }

    /// Returns it to the models that it asked for, if it was given to another one. Happens once: a job with a
    /// reservation does not wait again.
    pub(crate) fn restore_models(&mut self) -> bool {
        if self.own_builds.is_empty() {
            return false;
        }
        self.builds = std::mem::take(&mut self.own_builds);
        self.request.input.adapter.clone_from(&self.asked.0);
        (self.tried, self.barred) = (vec![], vec![]);
        (self.doubted, self.refusal, self.degraded) = (None, None, None);
        self.choose(0);
        true
    }

    /// Charges its tenant's share for what was delivered so far.
    pub(crate) fn charge(&mut self, usage: TokenUsage) {
        if let Some(share) = &mut self.share {
            share.charge(usage);
        }
    }

    /// Returns what a worker must be able to continue.
    fn continuation(&self) -> Option<Continuation> {
        self.request.delivered.as_ref()?;
        Some(self.journal.text_server().map_or(Continuation::Tokens, Continuation::Text))
    }

    /// Selects the model of the next attempt, by its index.
    pub fn choose(&mut self, build: usize) {
        self.build = build;
        self.request.model_id = self.model().model_id.clone();
        self.request.version = self.model().version;
    }

    /// Rules out the current model on workers whose context has at most `context` tokens, or on all workers if
    /// `context` is 0. The attempt does not count as failed.
    pub fn rule_out(&mut self, context: u32, refusal: &WireError) {
        self.tried.pop();
        self.barred.pop();
        self.refusal = Some(refusal.clone());
        let build = &mut self.builds[self.build];
        build.short_context = if context == 0 { u32::MAX } else { build.short_context.max(context) };
    }

    /// Rules out the workers on which it could cost as much as on the current one. No worker failed.
    pub(crate) fn refuse_tokens(&mut self, tokens: u64) {
        self.tried.pop();
        self.barred.pop();
        self.tokens_refused = Some(self.tokens_refused.map_or(tokens, |fewest| fewest.min(tokens)));
    }

    /// Asks another worker whether the model can really not do what the job asks: one worker's word is not enough to
    /// refuse a job, unless nobody else can take it. Returns false if one was asked before.
    pub fn doubt(&mut self, refusal: &WireError) -> bool {
        let Some(worker) = self.last_worker().filter(|_| self.is_dispatched && self.doubted.is_none()) else {
            return false;
        };
        self.doubted = Some((worker, refusal.clone()));
        true
    }

    /// Returns a digest of the tenant, the requested model and the input. It is the same when a client repeats the
    /// request.
    pub fn content(&self) -> Digest {
        match self.degraded {
            Some(_) => content_of(&self.requested, &self.original()),
            None => content_of(&self.requested, &self.request),
        }
    }

    /// Records a placement as a new attempt. While a job waits for a worker, only the latest placement is kept.
    pub fn record(&mut self, placement: Placement) {
        if placement.chosen.is_none() && self.attempts.last().is_some_and(|last| last.chosen.is_none()) {
            self.attempts.pop();
        }
        self.attempts.push(decision(self.attempts.len() as u32 + 1, placement, PLACED));
    }

    /// Records that the answer of the current attempt begins after such a wait.
    pub fn begins(&mut self, waited: Duration) {
        if self.request.delivered.is_some() {
            self.continued += 1;
        } else if let Some(worker) = self.last_worker() {
            self.waits.push((worker, waited));
        }
    }

    /// Records that a second worker was started beside that of the current attempt.
    pub fn hedge(&mut self, placement: Placement) {
        let attempt = self.attempts.len() as u32;
        self.hedges.push(decision(attempt, placement, "hedge_lost"));
    }

    /// Records that the second worker failed before any had begun to answer.
    pub fn hedge_failed(&mut self) {
        if let Some(hedge) = self.hedges.last_mut() {
            "hedge_failed".clone_into(&mut hedge.outcome);
        }
    }

    /// Returns the current attempt as one that a second worker ends.
    pub fn overtaken_attempt(&self) -> Option<AttemptRecord> {
        let now = self.reservation.as_ref()?.now();
        self.attempt_record(OVERTAKEN.to_owned(), false, now)
    }

    /// Records that the second worker has the job, and how long the first one had waited.
    pub fn overtaken(&mut self, ended: Option<AttemptRecord>, waited: Duration) {
        self.waits.extend(self.last_worker().map(|worker| (worker, waited)));
        self.note(OVERTAKEN);
        self.keep(ended);
        if let Some(hedge) = self.hedges.pop() {
            let attempt = self.attempts.len() as u32 + 1;
            self.attempts.push(AttemptDecision { attempt, outcome: PLACED.to_owned(), ..hedge });
        }
    }

    /// Records how the attempt ended whose worker was chosen last. An attempt without a worker leaves no record.
    pub fn ended(&mut self, end: &AttemptEnd, now: UnixMillis) {
        let counted = dead_letters::counts(end, self.is_dispatched, self.has_progressed());
        let record = self.attempt_record(end.outcome().to_owned(), counted, now);
        self.keep(record);
    }

    fn attempt_record(&self, outcome: String, counted: bool, now: UnixMillis) -> Option<AttemptRecord> {
        let last = self.attempts.last()?;
        let millis = self.attempt_began.elapsed().as_millis() as u64;
        Some(AttemptRecord {
            attempt: last.attempt,
            worker_id: last.chosen?,
            model: self.model().clone(),
            outcome,
            began_at: UnixMillis(now.0.saturating_sub(millis)),
            ended_at: now,
            progressed: self.has_progressed(),
            counted,
        })
    }

    fn keep(&mut self, record: Option<AttemptRecord>) {
        let Some(record) = record else { return };
        if self.history.len() == HISTORY_MAX {
            self.history.remove(0);
        }
        self.history.push(record);
    }

    /// Returns the attempts that have ended.
    pub fn history(&self) -> &[AttemptRecord] {
        &self.history
    }

    /// Returns the request as its caller made it, so that it can run again.
    pub fn original(&self) -> InferRequest {
        let (adapter, max_tokens) = self.asked.clone();
        InferRequest {
            input: Input { adapter, max_tokens, ..self.request.input.clone() },
            model_id: self.requested.model_id.clone(),
            version: self.requested.version,
            alternatives: self.alternatives.clone(),
            attempt: 1,
            deadline_ms: None,
            delivered: None,
            ..self.request.clone()
        }
    }

    /// Sets the outcome of the last placement.
    pub fn note(&mut self, outcome: &str) {
        if let Some(attempt) = self.attempts.last_mut() {
            outcome.clone_into(&mut attempt.outcome);
        }
    }

    /// Applies an event to the job's state. An event that the state does not allow is a bug: it is logged and changes
    /// nothing.
    pub fn step(&mut self, event: JobEvent) {
        match self.state.after(event) {
            Ok(state) => self.state = state,
            Err(illegal) => error!(correlation_id = %self.request.correlation_id, %illegal, "job out of step"),
        }
    }

    /// Returns the record of the job's placements.
    pub fn into_decision(self) -> Decision {
        // A second worker follows the attempt beside which it ran.
        let mut attempts = [self.attempts, self.hedges].concat();
        attempts.sort_by_key(|attempt| attempt.attempt);
        let has_waited = !self.waited.is_zero() || self.shed.is_some();
        Decision {
            wait: has_waited.then(|| QueueWait {
                class: self.request.class,
                waited_ms: self.waited.as_millis() as u64,
                shed: self.shed.map(ToOwned::to_owned),
            }),
            degraded: self.degraded,
            correlation_id: self.request.correlation_id,
            tenant_id: self.request.tenant_id,
            attempts,
            weights: None,
            job: None,
        }
    }
}

fn decision(attempt: u32, placement: Placement, outcome: &str) -> AttemptDecision {
    AttemptDecision {
        attempt,
        chosen: placement.chosen.map(|worker| worker.worker_id),
        outcome: outcome.to_owned(),
        candidates: placement.candidates,
        refused: placement.refused,
    }
}

/// Returns a digest of what a client asks for. `requested` is the model that it names.
pub(crate) fn content_of(requested: &ModelKey, request: &InferRequest) -> Digest {
    let InferRequest { tenant_id, input, .. } = request;
    Digest::of(&codec::encode(&(tenant_id, requested, input)))
}

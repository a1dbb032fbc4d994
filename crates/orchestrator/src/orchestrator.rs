//! The orchestrator service: takes each job from submission to settlement.

mod batches;
mod files;
mod hedging;
mod kept;
mod repeats;
mod waiting;

use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use failpoints::failpoint;
use futures_util::future::join_all;
use metadata_store::{Finalised, JobStore, StoreError};
use observability::metrics::ReasonLabel;
use parking_lot::{Mutex, MutexGuard};
use protocol::batches::{
    BATCH_CANCEL, BATCH_CLAIM, BATCH_CREATE, BATCH_LINES, BATCH_LIST, BATCH_RECORD, BATCH_SHOW, BATCH_STEP,
};
use protocol::codec::MESSAGE_BYTES_MAX;
use protocol::control::{
    ARTIFACT_HOLDERS, ArtifactHolders, ArtifactHoldersRequest, Empty, FLEET_LIST, Fleet as FleetMessage, JOB_EXPLAIN,
    MODEL_MOVE, ModelMove, ModelResidency, NodeInfo, NodeRole, PRESENCE_REPORT, ResidencyState, WorkerResidency,
};
use protocol::files::{FILE_CREATE, FILE_FINISH, FILE_LIST, FILE_READ, FILE_REMOVE, FILE_SHOW, FILE_WRITE};
use protocol::infer::{InferRequest, SUBMIT};
use protocol::jobs::{
    DEAD_LETTER_LIST, DEAD_LETTER_PURGE, DEAD_LETTER_RELEASE, DEAD_LETTER_SHOW, JOB_CANCEL, JOB_LIST, JOB_SHOW,
};
use protocol::kept::{KEPT_CANCEL, KEPT_READ, KEPT_REMOVE, KEPT_SHOW};
use protocol::membership::Exclusion;
use protocol::model::ModelKey;
use protocol::policy::ServiceClass;
use protocol::presence::Rejection;
use protocol::queue::QUEUE_LIST;
use protocol::quota::QUOTA_LIST;
use protocol::signature::Signed;
use protocol::{Clock, Digest, ErrorCode, PublicKey, Region, TenantId, Topic, WireError, WorkerId, codec};
use rpc::server::STRANGER_BYTES_MAX;
use rpc::{
    Access, Caller, Client, Directory, Membership, MembershipTask, Server, StreamCall, StreamOptions, Transport,
    announce,
};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use self::repeats::Repeatable;
use crate::answers::Answers;
use crate::circuit_breaker::{Admission, CircuitBreaker, Outcome};
use crate::config::Config;
use crate::crash_record::{CRASHES_MAX, CrashRecord, EngineCrash};
use crate::dead_letter_relay::DeadLetterRelay;
use crate::dead_letters;
use crate::decision_log::DecisionLog;
use crate::discovery_sub::DiscoverySub;
use crate::discovery_sub::search::Search;
use crate::dispatch::hedge::Hedging;
use crate::dispatch::{self, AttemptEnd, Delivery, Fault};
use crate::fair_queue::Limits;
use crate::first_tokens::FirstTokens;
use crate::fleet::{Change, Fleet, Wanted, listing};
use crate::history_keeper::HistoryKeeper;
use crate::job::JobEvent;
use crate::job_gate::JobGate;
use crate::journey::{Journey, Verdict};
use crate::metrics::{BreakerLabel, Metrics, PhaseLabel};
use crate::operator_check::OperatorCheck;
use crate::policy_engine::PolicyEngine;
use crate::quotas::Quotas;
use crate::refusals;
use crate::registry_policies::RegistryPolicies;
use crate::reservation_manager::{Ending, ReservationManager, key_of};
use crate::retry_budget::RetryBudgets;
use crate::retry_manager::{self, Failure, Part, Plan};
use crate::running_jobs::RunningJobs;
use crate::scheduler::{self, Candidate, Placement, Refusal};
use crate::sealing::SealingKey;
use crate::worker_record::WorkerRecords;

/// How long a worker may take to respond to a request to load or unload a model.
const MOVE_WITHIN: Duration = Duration::from_millis(1_500);
/// How long a worker that was set aside may take to respond on a new connection.
const CHECK_WITHIN: Duration = Duration::from_secs(5);
/// How long after a restart jobs wait for the workers that were known before to report again. A worker that has not
/// done so by then is gone.
const WORKERS_RETURN_WITHIN: Duration = Duration::from_secs(15);
/// How often a job that waits looks for them.
const WORKERS_LOOK_EVERY: Duration = Duration::from_millis(100);

/// Dependencies of an [`Orchestrator`].
pub struct OrchestratorParts {
    /// The orchestrator's connection to the network.
    pub transport: Arc<dyn Transport>,
    pub region: Region,
    pub clock: Arc<dyn Clock>,
    /// Stores jobs, reservations and usage.
    pub store: Arc<dyn JobStore>,
    pub metrics: Metrics,
    /// Decides which nodes may submit jobs, send reports and receive jobs.
    pub membership: Membership,
    /// Encrypts the answers that are kept, and the requests of dead letters.
    pub sealing_key: SealingKey,
    pub version: String,
}

/// Finds a worker for each job and follows the job until it is settled.
pub struct Orchestrator {
    pub(crate) config: Config,
    pub(crate) region: Region,
    metrics: Metrics,
    pub(crate) fleet: Arc<Fleet>,
    discovery: DiscoverySub,
    search: Arc<Search>,
    pub(crate) policies: PolicyEngine,
    pub(crate) quotas: Quotas,
    breakers: Mutex<HashMap<ModelKey, CircuitBreaker>>,
    pub(crate) gate: Arc<JobGate>,
    pub(crate) store: Arc<dyn JobStore>,
    pub(crate) reservations: Arc<ReservationManager>,
    pub(crate) running: Arc<RunningJobs>,
    pub(crate) decisions: DecisionLog,
    retry_budgets: Mutex<RetryBudgets>,
    crashes: Mutex<CrashRecord>,
    records: Mutex<WorkerRecords>,
    first_tokens: Mutex<FirstTokens>,
    client: Client,
    membership: Membership,
    pub(crate) operators: OperatorCheck,
    /// Checks of workers that were set aside, and jobs of second workers.
    checks: TaskTracker,
    answers: Arc<Answers>,
    pub(crate) sealing_key: SealingKey,
    /// The workers that were known before this start, and until when jobs wait for them.
    known_workers: Vec<WorkerId>,
    workers_return_by: Instant,
}

impl Orchestrator {
    /// Runs one job to its end: policy → queue → fleet, score → breaker → reserve → dispatch, relay → finalise.
    ///
    /// A job begins anew on another worker until the first chunk of its answer is sent. An answer that the caller has
    /// begun to receive is never restarted: another worker continues it after the tokens that were delivered. A
    /// reserved job is settled exactly once, and its last chunk is sent only after that.
    pub async fn submit(&self, mut journey: Journey, delivery: &mut Delivery) -> Result<(), WireError> {
        self.admit(&mut journey).await?;
        self.complete(journey, delivery).await
    }

    /// Checks whether a job may run now, and counts it among those of its tenant.
    async fn admit(&self, journey: &mut Journey) -> Result<(), WireError> {
        let policy = self.policies.admit(&journey.request.tenant_id, journey.models()).await?;
        if !policy.allows_class(journey.request.class) {
            return Err(refusals::class_not_allowed(journey.request.class));
        }
        journey.keep_models(|model| policy.allows(&model.model_id));
        self.check_residency(&policy)?;
        journey.permit = Some(self.quotas.admit(&journey.request.tenant_id, &policy).await?);
        journey.policy = policy;
        self.retry_budgets.lock().job(&journey.request.tenant_id, Instant::now());
        if self.is_convicted(journey) {
            return Err(refusals::crashes_engines());
        }
        failpoint!("orchestrator-admitted");
        Ok(())
    }

    /// Runs a job that is admitted.
    async fn complete(&self, mut journey: Journey, delivery: &mut Delivery) -> Result<(), WireError> {
        let end = loop {
            let end = self.attempt(&mut journey, delivery).await.unwrap_or_else(AttemptEnd::refused);
            journey.turn = None;
            journey.ended(&end, self.reservations.now());
            self.judge(&mut journey, &end);
            if let ControlFlow::Break(end) = self.after(&mut journey, end, delivery).await {
                break end;
            }
        };
        self.tell_breakers(&mut journey, &end);
        self.finalise(journey, end, delivery).await
    }

    /// Makes one attempt, on the worker with the best score.
    async fn attempt(&self, journey: &mut Journey, delivery: &mut Delivery) -> Result<AttemptEnd, WireError> {
        journey.is_dispatched = false;
        let worker = self.find_slot(journey, delivery).await?;
        journey.attempt_began = Instant::now();
        self.pass_breaker(journey)?;
        self.reserve(journey, &worker, delivery).await?;
        if !worker.has_file {
            // Marks the fetch as begun, so that other jobs do not make other workers fetch the same file.
            self.fleet.expect_fetch(worker.worker_id, journey.model());
        }
        self.dispatch(journey, delivery).await
    }

    /// Chooses a worker. Soon after a restart, a job waits for the workers that were known before.
    async fn find_worker(&self, journey: &mut Journey, delivery: &mut Delivery) -> Result<Candidate, WireError> {
        loop {
            let chosen = self.choose_worker(journey);
            let is_missing = chosen.as_ref().is_err_and(|error| error.code == ErrorCode::NoCapacity);
            let is_late = Instant::now() >= self.workers_return_by.min(journey.deadline);
            if !is_missing || is_late || self.have_returned() {
                return chosen;
            }
            tokio::select! {
                () = time::sleep(WORKERS_LOOK_EVERY) => {}
                // The caller's end is noticed once more where it is handled.
                () = delivery.gone() => return chosen,
                () = journey.running.cancelled().cancelled() => return Err(refusals::cancelled()),
            }
        }
    }

    /// Returns whether every worker that was known before this start has reported.
    fn have_returned(&self) -> bool {
        let now = Instant::now();
        self.known_workers.iter().all(|worker| self.fleet.silence(*worker, now).is_some())
    }

    fn choose_worker(&self, journey: &mut Journey) -> Result<Candidate, WireError> {
        let models: Vec<ModelKey> = journey.models().cloned().collect();
        let shut: Vec<bool> = models.iter().map(|model| self.is_shut(model)).collect();
        let is_choice = models.len() > 1;
        // A model whose breaker refuses requests is skipped. If all breakers refuse, none is skipped, and
        // `pass_breaker` returns the error.
        let may_run = |candidate: &Candidate| !is_choice || !shut[candidate.build] || shut.iter().all(|shut| *shut);
        let table = if is_choice { &models[..] } else { &[] };
        let (wanted, barred) = (journey.wanted(), journey.barred());
        // The place that the job holds already is its own.
        let own = journey.reservation.as_ref().map(|reservation| reservation.worker_id);
        let yields = journey.request.class == ServiceClass::Batch;
        let without_own = |candidate: Candidate| {
            let held = u32::from(Some(candidate.worker_id) == own);
            // The slots of jobs that give them up are free, but the worker holds those jobs, and no more than it may.
            let yielding = if yields { 0 } else { candidate.yielding };
            // A job that has a reservation never waits behind others.
            let limit = if own.is_some() { candidate.capacity } else { candidate.limit.saturating_add(yielding) };
            let barred = self.is_over_quota(journey, candidate.context_length).then_some(Refusal::OverQuota);
            let barred = barred.or(candidate.barred);
            Candidate { load: candidate.load.saturating_sub(held), limit, barred, ..candidate }
        };
        let mut placement = self.fleet.with_candidates(&wanted, Instant::now(), |candidates| {
            scheduler::place(candidates.map(without_own).filter(may_run), &barred, &self.config.weights, table)
        });
        if placement.may_wait_for_file && own.is_none() && journey.turn.is_none() {
            (placement.chosen, placement.is_busy) = (None, true);
        }
        let worker = placement.chosen.ok_or_else(|| self.nobody(journey, &wanted, &placement));
        if let Ok(worker) = &worker {
            journey.choose(worker.build);
        }
        journey.is_busy = placement.is_busy;
        journey.record(placement);
        worker
    }

    /// Returns the error for a job that no worker can take.
    fn nobody(&self, journey: &Journey, wanted: &[Wanted<'_>], placement: &Placement) -> WireError {
        if let Some((_, refusal)) = &journey.doubted {
            return refusal.clone();
        }
        // A worker's refusal is final if every other worker would refuse too, whether or not it has a free slot now.
        if let Some(refusal) = &journey.refusal {
            let can_never =
                |candidate: Candidate| matches!(candidate.barred, Some(Refusal::ShortContext | Refusal::NoAdapter));
            let is_final = self.fleet.with_candidates(wanted, Instant::now(), |mut all| all.all(can_never));
            if is_final {
                return refusal.clone();
            }
        }
        let loading = wanted.iter().find_map(|wanted| Some((wanted, self.fleet.loading(*wanted, Instant::now())?)));
        match loading {
            Some((wanted, (worker, progress))) => refusals::model_loading(wanted.model, worker, progress),
            None => refusals::no_capacity(journey.model(), journey.request.input.adapter.as_ref(), placement),
        }
    }

    /// Returns whether the model's breaker refuses requests now.
    fn is_shut(&self, model: &ModelKey) -> bool {
        let breakers = self.breakers.lock();
        breakers.get(model).is_some_and(|breaker| breaker.refuses(Instant::now()))
    }

    /// Asks the breaker whether the job may run. A job that was accepted passes without asking: a worker's failure
    /// before the first token costs the caller nothing.
    fn pass_breaker(&self, journey: &mut Journey) -> Result<(), WireError> {
        if journey.reservation.is_some() || !journey.tried.is_empty() {
            journey.admission = Some(Admission::Pass);
            return Ok(());
        }
        match self.with_breaker(journey.model(), CircuitBreaker::admit) {
            Admission::Refuse { retry_after } => {
                let message = format!("{} fails too often in region {}, try again later", journey.model(), self.region);
                Err(WireError::new(ErrorCode::BreakerOpen, message).with_retry_after(retry_after))
            }
            admission => {
                journey.admission = Some(admission);
                Ok(())
            }
        }
    }

    /// Writes the job and its reservation on the worker, or moves both there from the worker that failed.
    async fn reserve(
        &self,
        journey: &mut Journey,
        worker: &Candidate,
        delivery: &mut Delivery,
    ) -> Result<(), WireError> {
        journey.try_worker(worker.worker_id);
        let claim = self.claim(journey, worker.worker_id);
        journey.answer_tokens = claim.answer_tokens;
        let (model, history) = (journey.model().clone(), journey.history().to_vec());
        if let Some(reservation) = &mut journey.reservation {
            failpoint!("orchestrator-moves");
            reservation.reassign(model, worker.worker_id, worker.capacity, claim, history).await?;
            failpoint!("orchestrator-moved");
        } else {
            let counted = self.reservations.count(worker.worker_id, journey.request.class);
            if let Some(turn) = journey.turn.take() {
                journey.share = turn.taken();
            }
            let cancelled = journey.running.cancelled().clone();
            failpoint!("orchestrator-reserves");
            let reserved = self
                .reservations
                .reserve(&journey.request, journey.fingerprint, counted, worker.capacity, claim, cancelled)
                .await?;
            failpoint!("orchestrator-reserved");
            journey.reservation = Some(reserved);
            journey.running.reserved();
            self.tell_quota(journey, delivery).await;
        }
        journey.step(JobEvent::Reserve);
        Ok(())
    }

    async fn dispatch(&self, journey: &mut Journey, delivery: &mut Delivery) -> Result<AttemptEnd, WireError> {
        journey.acknowledged_at = None;
        let Some(reservation) = &journey.reservation else {
            return Err(WireError::new(ErrorCode::InternalError, "a job was to be sent without a reservation"));
        };
        journey.request.attempt = reservation.attempt;
        let timeouts = self.timeouts(journey);
        if timeouts.options.deadline.is_some_and(|left| left.is_zero()) {
            return Err(WireError::new(ErrorCode::DeadlineExceeded, "the deadline passed"));
        }
        debug!(
            correlation_id = %journey.request.correlation_id,
            worker = reservation.worker_id.short(),
            attempt = reservation.attempt,
            "dispatch"
        );
        let (worker_id, stop) = (reservation.worker_id, reservation.stop.clone());
        let context_length = self.fleet.context_length(worker_id, journey.model());
        journey.journal.begin(self.fleet.server(worker_id, journey.model()));
        journey.is_dispatched = true;
        let target = dispatch::Target { worker_id, timeouts, context_length };
        let mut hedging = Hedging::new(self, self.hedge_after(worker_id, journey));
        failpoint!("orchestrator-dispatches");
        Ok(dispatch::attempt(&self.client, target, &stop, &mut hedging, journey, delivery).await)
    }

    fn timeouts(&self, journey: &Journey) -> dispatch::Timeouts {
        let left = journey.deadline.saturating_duration_since(Instant::now());
        let options = StreamOptions {
            accept_within: Duration::from_millis(self.config.dispatch_ack_ms),
            // The deadline is for the beginning of the answer.
            deadline: journey.request.delivered.is_none().then_some(left),
            stall: Duration::from_secs(self.config.stall_secs),
        };
        // A worker lets a batch job wait for as long as others want its slot.
        let may_stall = self.config.token_stall_secs == 0 || journey.request.class == ServiceClass::Batch;
        let token_stall = (!may_stall).then(|| Duration::from_secs(self.config.token_stall_secs));
        dispatch::Timeouts { options, token_stall }
    }

    /// Decides whether another attempt follows.
    async fn after(&self, journey: &mut Journey, end: AttemptEnd, delivery: &mut Delivery) -> ControlFlow<AttemptEnd> {
        let AttemptEnd::Failed { error, fault, .. } = &end else { return ControlFlow::Break(end) };
        journey.note(error.code.as_str());
        let aside = match fault {
            Fault::Unacknowledged => Some("it did not acknowledge a job"),
            Fault::Ended => Some("its port is closed, so its process has ended"),
            Fault::None | Fault::Lost | Fault::EngineKilled | Fault::Leaving | Fault::Breach => None,
        };
        if let Some((reason, reservation)) = aside.zip(journey.reservation.as_ref()) {
            self.set_aside(reservation.worker_id, journey.attempt_began, reason);
        }
        journey.handed_over += u32::from(*fault == Fault::Leaving);
        if error.code == ErrorCode::EngineCrashed && self.crashed(journey, error) {
            return ControlFlow::Break(AttemptEnd::Dead { error: refusals::crashes_engines() });
        }
        let failure = Failure { code: error.code, delivered: journey.delivered_part(delivery.has_begun()) };
        if retry_manager::is_of_the_model(failure) && self.restore_models(journey, delivery).await {
            self.metrics.retries.get_or_create(&ReasonLabel { reason: error.code.as_str() }).inc();
            journey.step(JobEvent::GiveUpAttempt);
            return ControlFlow::Continue(());
        }
        if retry_manager::is_of_the_model(failure) && self.rule_out(journey, error) {
            self.metrics.retries.get_or_create(&ReasonLabel { reason: error.code.as_str() }).inc();
            journey.step(JobEvent::GiveUpAttempt);
            return ControlFlow::Continue(());
        }
        if retry_manager::is_of_the_model(failure) && journey.doubt(error) {
            journey.step(JobEvent::GiveUpAttempt);
            return ControlFlow::Continue(());
        }
        if failure.delivered == Part::Nothing && self.costs_too_much(journey, error) {
            self.metrics.retries.get_or_create(&ReasonLabel { reason: error.code.as_str() }).inc();
            journey.step(JobEvent::GiveUpAttempt);
            journey.last_error = Some(error.clone());
            return ControlFlow::Continue(());
        }
        let tries = journey.failures(failure.delivered, *fault);
        match retry_manager::plan(tries, self.config.attempts_max, failure, journey.request.correlation_id) {
            Plan::GiveUp => {
                if tries >= self.config.attempts_max {
                    self.metrics.retries_exhausted.inc();
                }
                ControlFlow::Break(end)
            }
            Plan::Retry { after } => {
                if failure.delivered == Part::Nothing {
                    // A worker that refused the job when it was dispatched has borne it.
                    let is_counted = error.code == ErrorCode::WorkerFull && journey.is_dispatched;
                    if is_counted && !self.has_retry(&journey.request.tenant_id) {
                        self.metrics.retries_exhausted.inc();
                        return ControlFlow::Break(end);
                    }
                    self.count_failover(error.code, "pre_token");
                    journey.step(JobEvent::GiveUpAttempt);
                } else {
                    // While the answer waits for a worker, none fails.
                    if journey.is_dispatched {
                        self.count_failover(error.code, "mid_stream");
                        let (id, reason) = (journey.request.correlation_id, &error.message);
                        info!(correlation_id = %id, reason, "an answer is to be continued by another worker");
                    }
                    journey.interrupt(*fault, |worker, since| self.has_reported(worker, since));
                }
                if error.code != ErrorCode::NoCapacity {
                    journey.last_error = Some(error.clone());
                }
                tokio::select! {
                    () = time::sleep(after) => ControlFlow::Continue(()),
                    () = delivery.gone() => {
                        let usage = delivery.read_of(journey.delivered_usage());
                        ControlFlow::Break(AttemptEnd::CallerGone { usage })
                    }
                    () = journey.running.cancelled().cancelled() => {
                        let usage = delivery.read_of(journey.delivered_usage());
                        ControlFlow::Break(AttemptEnd::CallerGone { usage })
                    }
                }
            }
        }
    }

    fn has_reported(&self, worker: WorkerId, since: Instant) -> bool {
        self.fleet.silence(worker, Instant::now()).is_some_and(|silence| silence < since.elapsed())
    }

    fn has_retry(&self, tenant: &TenantId) -> bool {
        self.retry_budgets.lock().take(tenant, Instant::now())
    }

    fn count_failover(&self, code: ErrorCode, phase: &'static str) {
        self.metrics.retries.get_or_create(&ReasonLabel { reason: code.as_str() }).inc();
        self.metrics.failovers.get_or_create(&PhaseLabel { phase }).inc();
    }

    /// Sets a worker aside that does not respond, after an attempt that began at `began`. It is taken back as soon as
    /// it responds on a newer connection, because then only the old one was at fault.
    fn set_aside(&self, worker: WorkerId, began: Instant, reason: &str) {
        let until = Instant::now() + Duration::from_secs(self.config.set_aside_secs);
        self.fleet.set_aside(worker, until);
        warn!(worker = worker.short(), reason, "a worker is set aside");
        let (client, fleet) = (self.client.clone(), self.fleet.clone());
        self.checks.spawn(async move {
            if client.check(worker, CHECK_WITHIN).await.is_ok_and(|opened_at| opened_at > began) {
                fleet.take_back(worker, until);
                info!(worker = worker.short(), "worker taken back: it responds on a new connection");
            }
        });
    }

    /// Records that a model could not do what the job asks. Returns whether another model or another worker may be able
    /// to.
    fn rule_out(&self, journey: &mut Journey, refusal: &WireError) -> bool {
        let Some(worker) = journey.last_worker().filter(|_| journey.is_dispatched) else { return false };
        let context = match refusal.code {
            ErrorCode::ContextLengthExceeded => self.fleet.context_length(worker, journey.model()),
            _ => 0,
        };
        if context == 0 && journey.models().nth(1).is_none() {
            return false;
        }
        journey.rule_out(context, refusal);
        true
    }

    /// Settles the job, then sends the last chunk or returns the error.
    async fn finalise(&self, mut journey: Journey, end: AttemptEnd, delivery: &mut Delivery) -> Result<(), WireError> {
        let usage = end.usage();
        let (mut ending, event) = match &end {
            AttemptEnd::Complete { finish_reason, .. } => {
                (Ending::completed(*finish_reason, usage), JobEvent::Complete)
            }
            AttemptEnd::CallerGone { .. } => {
                let is_by_operator = journey.running.cancelled().is_cancelled();
                let error = if delivery.is_too_long() {
                    Some(refusals::too_long_to_store())
                } else {
                    is_by_operator.then(refusals::cancelled)
                };
                (Ending { error, ..Ending::cancelled(usage) }, JobEvent::Cancel)
            }
            AttemptEnd::Failed { error, .. } => {
                // `NoCapacity` would hide why the earlier attempts failed.
                let error = journey
                    .last_error
                    .take()
                    .filter(|_| error.code == ErrorCode::NoCapacity)
                    .unwrap_or_else(|| error.clone());
                let error = if delivery.has_begun() { refusals::in_mid_answer(error) } else { error.as_job_failure() };
                // A gateway takes `Unavailable` for its orchestrator's, and would submit the job again.
                let error = match error.code {
                    ErrorCode::Unavailable if journey.is_dispatched => refusals::worker_unavailable(),
                    _ => error,
                };
                (Ending::failed(error), JobEvent::Fail)
            }
            AttemptEnd::Dead { error } => (Ending::dead(error.clone()), JobEvent::Die),
        };
        journey.step(event);
        let (worker, outcome) = (journey.last_worker(), ending.outcome());
        journey.note(outcome);
        ending.history = journey.history().to_vec();
        ending.continued = journey.continued;
        ending.dead_letter = dead_letters::cause(&end, journey.history(), self.config.attempts_max).map(|cause| {
            let history = journey.history().to_vec();
            dead_letters::letter(cause, &journey.original(), history, &self.sealing_key, &self.config)
        });
        let error = ending.error.clone();
        if let Some(error) = &error
            && matches!(error.code, ErrorCode::NoCapacity | ErrorCode::ModelLoading)
        {
            let reason = journey.shed.unwrap_or(error.code.as_str());
            self.metrics.shed.get_or_create(&ReasonLabel { reason }).inc();
        }
        journey.charge(usage);
        journey.share = None;
        let ended = Instant::now();
        let settled = match journey.reservation.take() {
            Some(reservation) => {
                if let AttemptEnd::Complete { last_chunk, .. } = &end {
                    ending.answer = self.sealed(&reservation.key, delivery, last_chunk).await;
                    if let Some(note) = journey.late_note.take().filter(|_| ending.answer.is_some()) {
                        let created_at = delivery.created_at().unwrap_or_else(|| reservation.now());
                        ending.note = self.sealed_note(&reservation.key, note, created_at).await;
                    }
                }
                reservation.finalise(ending).await
            }
            None => Ok(Finalised::Settled),
        };
        if let AttemptEnd::Complete { .. } = &end {
            self.note_completed(&journey, usage, ended);
        }
        info!(
            correlation_id = %journey.request.correlation_id,
            model = %journey.model(),
            worker = worker.map(|worker| worker.short()),
            attempts = journey.tried.len(),
            outcome,
            prompt_tokens = usage.prompt_tokens,
            completion_tokens = usage.completion_tokens,
            "job"
        );
        self.decisions.keep(journey.into_decision());
        match (end, settled) {
            (AttemptEnd::Complete { last_chunk, .. }, Ok(Finalised::Settled)) => {
                failpoint!("orchestrator-settled");
                // A caller that disconnects now has received everything but the last chunk, and is billed.
                let _ = delivery.send_last(&last_chunk, usage).await;
                failpoint!("orchestrator-last-sent");
                Ok(())
            }
            (AttemptEnd::Complete { .. }, Ok(_)) => {
                Err(WireError::new(ErrorCode::StaleAttempt, "the job was given to another attempt"))
            }
            (AttemptEnd::Complete { .. }, Err(error)) => Err(error),
            (_, settled) => {
                if let Err(error) = settled {
                    // The job is settled when its lease expires.
                    warn!(%error, "could not settle a job that did not complete");
                }
                error.map_or(Ok(()), Err)
            }
        }
    }

    /// Returns whether engines crashed repeatedly on a request with this content.
    fn is_convicted(&self, journey: &Journey) -> bool {
        let mut crashes = self.crashes();
        // Hashing a long prompt takes time, so it is hashed only if there are crashes to compare it with.
        !crashes.is_empty() && crashes.is_convicted(&journey.content(), Instant::now())
    }

    /// Records that an engine crashed on a job. Returns whether the job must not be given to another engine.
    fn crashed(&self, journey: &mut Journey, error: &WireError) -> bool {
        journey.crashes += 1;
        let (content, now) = (journey.content(), Instant::now());
        let mut crashes = self.crashes();
        if let Some(worker) = journey.last_worker() {
            let (began, suspects) = (journey.attempt_began, error.suspects.unwrap_or(1));
            crashes.crashed(content, EngineCrash { worker, began, suspects }, now);
        }
        let is_dead = journey.crashes >= CRASHES_MAX || crashes.is_convicted(&content, now);
        warn!(
            correlation_id = %journey.request.correlation_id,
            model = %journey.model(),
            suspects = error.suspects,
            is_dead,
            "an engine crashed while it worked on a job"
        );
        is_dead
    }

    pub(crate) fn crashes(&self) -> MutexGuard<'_, CrashRecord> {
        self.crashes.lock()
    }

    /// Records what an attempt says of its worker and of its model, and ejects a worker that failed too often or lied.
    fn judge(&self, journey: &mut Journey, end: &AttemptEnd) {
        if journey.request.class == ServiceClass::Batch {
            // It may have waited at the worker for others to end, which says nothing of the worker's speed.
            journey.waits.clear();
        }
        let wait = journey.waits.last().map(|(_, wait)| *wait).filter(|_| matches!(end, AttemptEnd::Complete { .. }));
        self.record_waits(journey);
        let slow = Duration::from_secs(self.config.breaker.slow_secs);
        let good = match end {
            AttemptEnd::Complete { silence, overclaims, .. } => Some(*silence <= slow && !overclaims),
            AttemptEnd::Failed { error, .. } => is_workers_fault(error.code).then_some(false),
            AttemptEnd::CallerGone { .. } | AttemptEnd::Dead { .. } => None,
        };
        let worker = journey.last_worker().filter(|_| journey.is_dispatched);
        let began = journey.attempt_began;
        let outcome = worker.zip(good).map(|(worker, good)| Outcome { good, worker, began });
        if let Some(admission) = journey.admission.take() {
            let (model, is_failure) = (journey.model().clone(), matches!(end, AttemptEnd::Failed { .. }));
            match outcome {
                Some(outcome) => {
                    // Workers differ in speed, so this is no fault of the worker.
                    let is_slow =
                        |wait| self.with_breaker(&model, |breaker, now| breaker.is_slow(wait, admission, now));
                    let outcome = Outcome { good: !wait.is_some_and(is_slow) && outcome.good, ..outcome };
                    journey.verdicts.push(Verdict { model, outcome, is_failure });
                }
                None => self.with_breaker(&model, |breaker, now| breaker.abandon(admission, now)),
            }
        }
        if let AttemptEnd::Failed { error, .. } = end
            && let Some(worker) = worker
        {
            // If the engine worked on others as well, one of those may be the cause.
            let is_alone =
                error.code == ErrorCode::EngineCrashed && error.suspects.is_none_or(|suspects| suspects <= 1);
            journey.crashed.extend(is_alone.then_some(worker));
            journey.refusing.extend((error.code == ErrorCode::WorkerFull).then_some(worker));
        }
        // A worker that takes no calls is no fault of the model.
        let is_away =
            matches!(end, AttemptEnd::Failed { error, fault: Fault::None, .. } if error.code == ErrorCode::Unavailable);
        let outcome = outcome.or(worker.filter(|_| is_away).map(|worker| Outcome { good: false, worker, began }));
        let now = Instant::now();
        if let (Some(worker), AttemptEnd::Failed { error, fault: Fault::Breach, .. }) = (worker, end) {
            let until = self.records.lock().breach(worker, now);
            self.eject(worker, until, &error.message);
        } else if let Some(outcome) = outcome
            && let Some(until) = self.records.lock().record(outcome, now)
        {
            self.eject(outcome.worker, until, "it failed too often");
        }
        if let AttemptEnd::Complete { .. } = end {
            let doubted = journey.doubted.take().map(|(worker, _)| worker);
            let refusing = std::mem::take(&mut journey.refusing).into_iter().chain(doubted);
            for refusing in others(refusing, worker) {
                if let Some(until) = self.records.lock().contradicted(refusing, now) {
                    self.eject(refusing, until, "it refused jobs that other workers of their model did");
                }
            }
            // The request is not what crashed these.
            for crashed in others(std::mem::take(&mut journey.crashed), worker) {
                let outcome = Outcome { good: false, worker: crashed, began: now };
                if let Some(until) = self.records.lock().record(outcome, now) {
                    self.eject(crashed, until, "its engine crashed on jobs that others did");
                }
            }
            let mut crashes = self.crashes();
            if !crashes.is_empty() {
                crashes.succeeded(&journey.content());
            }
        }
    }

    fn eject(&self, worker: WorkerId, until: Instant, reason: &str) {
        self.fleet.eject(worker, until);
        let secs = until.saturating_duration_since(Instant::now()).as_secs();
        warn!(worker = worker.short(), secs, reason, "a worker is ejected");
    }

    /// Reports the outcomes of a job's attempts to the breakers of their models. The failed attempts of a job that its
    /// model completes were their workers'.
    fn tell_breakers(&self, journey: &mut Journey, end: &AttemptEnd) {
        let completed = matches!(end, AttemptEnd::Complete { .. }).then(|| journey.model().clone());
        for Verdict { model, outcome, is_failure } in std::mem::take(&mut journey.verdicts) {
            if !(is_failure && completed.as_ref() == Some(&model)) {
                self.with_breaker(&model, |breaker, now| breaker.record(outcome, now));
            }
        }
    }

    fn with_breaker<T>(&self, model: &ModelKey, act: impl FnOnce(&mut CircuitBreaker, Instant) -> T) -> T {
        let mut breakers = self.breakers.lock();
        if !breakers.contains_key(model) {
            breakers.insert(model.clone(), CircuitBreaker::new(self.config.breaker.clone()));
        }
        let breaker = breakers.get_mut(model).expect("it was put there just above");
        let before = breaker.state();
        let result = act(breaker, Instant::now());
        let after = breaker.state();
        if before != after {
            let label = BreakerLabel { model: model.to_string(), region: self.region.to_string() };
            self.metrics.breaker_state.get_or_create(&label).set(after.as_gauge());
            self.metrics.breaker_transitions.get_or_create(&label).inc();
            info!(%model, ?before, ?after, "circuit breaker");
        }
        result
    }

    /// Decodes a submitted job, runs it and responds to the call.
    async fn take_job(self: Arc<Self>, call: StreamCall) {
        let mut request: InferRequest = match codec::decode(&call.body) {
            Ok(request) => request,
            Err(error) => return call.refuse(error.into()).await,
        };
        let fingerprint = request.fingerprint.unwrap_or_else(|| Digest::of(&call.body)).0;
        let deadline = call.deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(self.config.deadline_secs));
        let stall = Duration::from_secs(self.config.caller_stall_secs);
        let note_bytes = request.note.as_ref().map_or(0, String::len);
        let prompt_tokens = waiting::prompt_tokens(call.body.len().saturating_sub(note_bytes));
        let mut delivery = Delivery::new(call, stall, request.acknowledges);
        let repeatable = Repeatable::of(&mut request);
        let running = self.running.enter(key_of(&request));
        let mut journey = Journey::new(request, fingerprint, deadline, running);
        journey.prompt_tokens = prompt_tokens;
        if let Some(repeatable) = repeatable {
            return Box::pin(self.take_repeatable(repeatable, journey, delivery)).await;
        }
        match Box::pin(self.submit(journey, &mut delivery)).await {
            Ok(()) => delivery.finish().await,
            Err(error) => delivery.fail(error).await,
        }
    }

    fn take_report(&self, remote_key: PublicKey, signed: &Signed) -> Result<Empty, WireError> {
        match self.discovery.take(remote_key, signed) {
            Ok(change) => {
                if change == Change::Restarted {
                    // Open connections lead to the process that ended; the next job would run into a timeout on them.
                    self.client.disconnect(remote_key);
                }
                if matches!(change, Change::Found | Change::Restarted) {
                    self.search.greet(remote_key);
                }
                self.gate.poke();
                Ok(Empty {})
            }
            Err(rejection) => {
                debug!(worker = remote_key.short(), %rejection, "report dropped");
                Err(match rejection {
                    Rejection::Excluded(exclusion) => exclusion.into(),
                    other => WireError::new(ErrorCode::InvalidValue, other.to_string()),
                })
            }
        }
    }

    /// Runs an orchestrator until `stop` is cancelled.
    pub async fn run(config: Config, parts: OrchestratorParts, stop: CancellationToken) -> Result<(), StoreError> {
        let OrchestratorParts { transport, region, clock, store, metrics, membership, sealing_key, version } = parts;
        let connect_within = Duration::from_millis(config.dispatch_connect_ms);
        let client = Client::connecting_within(transport.clone(), connect_within).with_membership(membership.clone());
        let topic = Topic::Control(region.clone());
        let (directory, directory_task) = Directory::new(transport.clone(), client.clone(), topic.clone());
        let fleet = Fleet::new(region.clone(), config.near_regions.clone()).with_backlog(config.worker_backlog_max);
        let fleet = Arc::new(fleet);
        let limits = Limits { jobs_max: config.queue_max, tenant_jobs_max: config.tenant_queue_max };
        let gate = Arc::new(JobGate::new(fleet.clone(), metrics.clone(), limits));
        fleet.feed(&gate);
        let mut regions = vec![region.clone()];
        regions.extend(config.near_regions.iter().cloned());
        let marks = store.high_waters().await?;
        let known_workers: Vec<WorkerId> = marks.iter().map(|(worker, _)| *worker).collect();
        let workers_return_by = Instant::now() + WORKERS_RETURN_WITHIN;
        let search = Search::new(transport.clone(), client.clone(), fleet.clone(), regions.clone());
        let discovery = DiscoverySub::new(
            fleet.clone(),
            regions,
            clock.clone(),
            store.clone(),
            metrics.clone(),
            membership.clone(),
            marks,
        );
        let membership_task = MembershipTask::new(client.clone(), directory.clone());
        let operators = OperatorCheck::new(client.clone(), directory.clone());
        let policies = RegistryPolicies::new(client.clone(), directory);
        let lease = Duration::from_secs(config.lease_secs.max(3));
        let keeper = HistoryKeeper::new(store.clone(), clock.clone(), metrics.clone(), &config);
        let relay = DeadLetterRelay::new(store.clone(), config.redis.clone(), metrics.clone(), transport.public_key());
        let quota_clock = clock.clone();
        let reservations =
            ReservationManager::new(store.clone(), clock, fleet.clone(), metrics.clone(), region.clone(), lease);
        reservations.release_orphans().await;
        let orchestrator = Arc::new(Self {
            policies: PolicyEngine::new(
                Arc::new(policies),
                Duration::from_secs(config.policy_cache_secs),
                config.registry_absence,
            ),
            quotas: Quotas::new(store.clone(), quota_clock),
            decisions: DecisionLog::new(config.decisions_kept),
            retry_budgets: Mutex::new(RetryBudgets::new(config.retry_budget_percent)),
            records: Mutex::default(),
            first_tokens: Mutex::default(),
            crashes: Mutex::new(CrashRecord::new(Duration::from_secs(config.crashes_kept_secs))),
            reservations: Arc::new(reservations),
            running: Arc::default(),
            breakers: Mutex::default(),
            gate,
            region: region.clone(),
            metrics,
            fleet,
            discovery,
            search: Arc::new(search),
            client,
            membership,
            operators,
            store,
            checks: TaskTracker::new(),
            answers: Arc::default(),
            sealing_key,
            known_workers,
            workers_return_by,
            config,
        });

        let background = TaskTracker::new();
        let ended = CancellationToken::new();
        background.spawn(directory_task.run(ended.clone()));
        background.spawn(membership_task.run(ended.clone()));
        background.spawn({
            let (orchestrator, ended) = (orchestrator.clone(), ended.clone());
            async move { orchestrator.discovery.run(ended).await }
        });
        background.spawn({
            let (orchestrator, search) = (orchestrator.clone(), orchestrator.search.clone());
            search.run(ended.clone(), move |worker, signed| orchestrator.take_report(worker, signed).is_ok())
        });
        background.spawn({
            let (orchestrator, ended) = (orchestrator.clone(), ended.clone());
            async move { orchestrator.reservations.run(ended).await }
        });
        background.spawn({
            let (gate, ended) = (orchestrator.gate.clone(), ended.clone());
            async move { gate.run(ended).await }
        });

        background.spawn({
            let (reservations, ended) = (orchestrator.reservations.clone(), ended.clone());
            let bytes_max = orchestrator.config.answers_kept_mib << 20;
            async move { reservations.prune_answers(bytes_max, ended).await }
        });
        background.spawn({
            let (answers, ended) = (orchestrator.answers.clone(), ended.clone());
            async move { answers.run(ended).await }
        });

        background.spawn(keeper.run(ended.clone()));
        background.spawn(relay.run(ended.clone()));
        background.spawn(orchestrator.client.clone().watch_for_pauses(ended.clone()));

        let drain = Duration::from_secs(orchestrator.config.drain_secs);
        let info = NodeInfo { roles: vec![NodeRole::Orchestrator], region, version };
        let (known, counting) = (orchestrator.membership.clone(), orchestrator.clone());
        let server = orchestrator
            .serve(Server::new(transport.clone(), info))
            .membership(orchestrator.membership.clone())
            .on_revoked_call(move |_, method| {
                if method == PRESENCE_REPORT {
                    counting.discovery.count(Rejection::Excluded(Exclusion::Revoked));
                }
            })
            .body_limit(move |key| if known.is_member(key) { MESSAGE_BYTES_MAX } else { STRANGER_BYTES_MAX });
        let announced = announce::keep_announced(&*transport, &topic, &stop);
        tokio::join!(server.run(stop.clone(), drain), announced);
        ended.cancel();
        orchestrator.checks.close();
        orchestrator.checks.wait().await;
        background.close();
        background.wait().await;
        Ok(())
    }

    /// Asks every worker that serves a model to load or unload it.
    async fn move_model(&self, request: ModelMove) -> ModelResidency {
        let serving =
            self.fleet.list(Instant::now()).into_iter().filter(|worker| worker.report.serves(&request.key, None));
        let moves = serving.map(|worker| {
            let (worker_id, request) = (worker.report.worker_id, &request);
            async move {
                match self.client.call::<_, ModelResidency>(worker_id, MODEL_MOVE, request, MOVE_WITHIN).await {
                    Ok(residency) => residency.workers.into_iter().find(|worker| worker.worker_id == worker_id),
                    Err(error) => Some(WorkerResidency {
                        worker_id,
                        state: ResidencyState::Unknown,
                        reason: Some(error.to_string()),
                    }),
                }
            }
        });
        let workers = join_all(moves).await.into_iter().flatten().collect();
        ModelResidency { key: request.key, workers }
    }

    fn serve(self: &Arc<Self>, server: Server) -> Server {
        let gateway = || Access::RoleIn(NodeRole::Gateway, self.region.clone());
        server
            .with_state(self.clone())
            .stream(SUBMIT, gateway(), Self::take_job)
            .stream(KEPT_READ, gateway(), Self::read_kept)
            .unary(KEPT_SHOW, gateway(), Self::show_kept)
            .unary(KEPT_CANCEL, gateway(), Self::cancel_kept)
            .unary(KEPT_REMOVE, gateway(), Self::remove_kept)
            .unary(FILE_CREATE, gateway(), Self::create_file)
            .unary(FILE_WRITE, gateway(), Self::write_file)
            .unary(FILE_FINISH, gateway(), Self::finish_file)
            .unary(FILE_SHOW, gateway(), Self::show_file)
            .unary(FILE_LIST, gateway(), Self::list_files)
            .unary(FILE_READ, gateway(), Self::read_file)
            .unary(FILE_REMOVE, gateway(), Self::remove_file)
            .unary(BATCH_CREATE, gateway(), Self::create_batch)
            .unary(BATCH_SHOW, gateway(), Self::show_batch)
            .unary(BATCH_LIST, gateway(), Self::list_batches)
            .unary(BATCH_CANCEL, gateway(), Self::cancel_batch)
            .unary(BATCH_CLAIM, gateway(), Self::claim_batch)
            .unary(BATCH_STEP, gateway(), Self::step_batch)
            .unary(BATCH_LINES, gateway(), Self::list_lines)
            .unary(BATCH_RECORD, gateway(), Self::record_line)
            .unary(FLEET_LIST, gateway(), Self::list_fleet)
            .unary(JOB_EXPLAIN, gateway(), Self::explain)
            .unary(MODEL_MOVE, gateway(), Self::move_for_gateway)
            .unary(JOB_LIST, gateway(), Self::list_jobs)
            .unary(JOB_SHOW, gateway(), Self::show_jobs)
            .unary(QUOTA_LIST, gateway(), Self::list_quotas)
            // These check the operator's token as well.
            .unary(JOB_CANCEL, gateway(), Self::cancel_jobs)
            .unary(QUEUE_LIST, gateway(), Self::list_queue)
            .unary(DEAD_LETTER_LIST, gateway(), Self::list_dead_letters)
            .unary(DEAD_LETTER_SHOW, gateway(), Self::show_dead_letter)
            .unary(DEAD_LETTER_RELEASE, gateway(), Self::release_dead_letter)
            .unary(DEAD_LETTER_PURGE, gateway(), Self::purge_dead_letters)
            // Reports carry their worker's signature, and refused ones are counted by reason.
            .unary(PRESENCE_REPORT, Access::Anyone, Self::report)
            .unary(ARTIFACT_HOLDERS, Access::Role(NodeRole::Worker), Self::list_holders)
            .into_server()
    }

    #[expect(clippy::unused_async, reason = "handlers are async")]
    async fn report(self: Arc<Self>, caller: Caller, signed: Signed) -> Result<Empty, WireError> {
        self.take_report(caller.key, &signed)
    }

    #[expect(clippy::unused_async, reason = "handlers are async")]
    async fn list_fleet(self: Arc<Self>, _: Caller, _: Empty) -> Result<FleetMessage, WireError> {
        Ok(FleetMessage { workers: listing::bounded(self.fleet.list(Instant::now()), listing::LISTING_BYTES_MAX) })
    }

    #[expect(clippy::unused_async, reason = "handlers are async")]
    async fn list_holders(
        self: Arc<Self>,
        caller: Caller,
        request: ArtifactHoldersRequest,
    ) -> Result<ArtifactHolders, WireError> {
        let holders = self
            .fleet
            .list(Instant::now())
            .into_iter()
            .map(|worker| worker.report)
            .filter(|report| report.worker_id != caller.key && report.has_file(&request.digest, &request.models));
        Ok(ArtifactHolders { workers: holders.map(|report| report.worker_id).collect() })
    }

    async fn move_for_gateway(self: Arc<Self>, _: Caller, request: ModelMove) -> Result<ModelResidency, WireError> {
        Ok(self.move_model(request).await)
    }
}

/// Returns each worker once, without the one that completed the job.
fn others(workers: impl IntoIterator<Item = WorkerId>, completed: Option<WorkerId>) -> BTreeSet<WorkerId> {
    workers.into_iter().filter(|worker| Some(*worker) != completed).collect()
}

fn is_workers_fault(code: ErrorCode) -> bool {
    use protocol::error_code::Blame;
    let refusal = matches!(
        code,
        ErrorCode::WorkerFull | ErrorCode::WorkerStopping | ErrorCode::ModelNotHere | ErrorCode::ModelLoading
    );
    // A crash counts against the request, not the model. Otherwise any API key could open a model's breaker for
    // everyone.
    let refusal = refusal || code == ErrorCode::EngineCrashed;
    code.blame() == Blame::Worker && !refusal
}

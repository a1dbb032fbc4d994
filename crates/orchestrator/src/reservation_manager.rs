//! Writes a job and its reservation before dispatch, renews the lease, and settles the job.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use metadata_store::{
    FinaliseError, Finalised, JobError, JobKey, JobRecord, JobStore, KeptNote, Lease, NewDeadLetter, NewJob, NewNote,
    ReassignError, Reassignment, ReserveError, Reserved, SealedAnswer, Settlement, StoreError, TerminalState,
};
use parking_lot::Mutex;
use protocol::infer::{FinishReason, InferRequest};
use protocol::jobs::AttemptRecord;
use protocol::model::ModelKey;
use protocol::policy::ServiceClass;
use protocol::usage::TokenUsage;
use protocol::{Clock, CorrelationId, Digest, ErrorCode, Region, TenantId, UnixMillis, WireError, WorkerId};
use rpc::backoff::Backoff;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::fleet::Fleet;
use crate::metrics::Metrics;
use crate::quotas::Claim;
use crate::refusals;

/// The most expired leases that one sweep releases.
const EXPIRED_AT_ONCE: u32 = 256;

/// How often kept answers are pruned.
const PRUNE_EVERY: Duration = Duration::from_mins(1);
/// The most answers that one write removes.
const PRUNED_AT_ONCE: u32 = 1_024;

/// Delay before a settlement is retried; it doubles with each retry.
const SETTLE_AGAIN: Duration = Duration::from_millis(20);
/// The longest delay between retries.
const SETTLE_AGAIN_MAX: Duration = Duration::from_secs(1);

/// Makes, renews and settles reservations.
pub struct ReservationManager {
    store: Arc<dyn JobStore>,
    clock: Arc<dyn Clock>,
    fleet: Arc<Fleet>,
    metrics: Metrics,
    region: Region,
    lease: Duration,
    held: Mutex<HashMap<JobKey, Held>>,
}

/// A reservation that is renewed.
struct Held {
    /// The attempt that holds it; `None` while the job moves to another worker.
    attempt: Option<u32>,
    stop: Stop,
}

/// What ends a running job from outside.
#[derive(Clone, Default)]
pub struct Stop {
    /// Cancelled when the lease is lost: the attempt is void and must end.
    pub void: CancellationToken,
    /// Cancelled when an operator cancels the job.
    pub cancelled: CancellationToken,
    /// Whether it is the reservation of a second worker.
    is_hedge: bool,
}

/// A job's reservation on a worker, written to disk.
///
/// If it is dropped without settling, its lease is no longer renewed and expires.
pub struct Reservation {
    manager: Arc<ReservationManager>,
    /// Counts the job towards its worker's load.
    counted: Counted,
    pub key: JobKey,
    pub worker_id: WorkerId,
    /// Number of the attempt, counted from 1.
    pub attempt: u32,
    pub stop: Stop,
    /// Whether its tenant's tokens are limited, so that it is billed no more than it holds.
    is_bounded: bool,
}

/// Counts a job on a worker until dropped. Counting starts when the worker is chosen, before the reservation is
/// written, so that jobs placed meanwhile see it. Otherwise a burst would go to one worker.
pub struct Counted {
    fleet: Arc<Fleet>,
    worker_id: WorkerId,
    /// Whether it gives way to jobs of other classes.
    yields: bool,
}

impl Counted {
    fn on(fleet: &Arc<Fleet>, worker_id: WorkerId, yields: bool) -> Self {
        fleet.count_reserved(worker_id, yields, true);
        Self { fleet: fleet.clone(), worker_id, yields }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.fleet.count_reserved(self.worker_id, self.yields, false);
    }
}

/// How a job ends.
pub struct Ending {
    pub state: TerminalState,
    pub finish_reason: Option<FinishReason>,
    pub usage: Option<TokenUsage>,
    pub error: Option<WireError>,
    /// The answer to keep for repeats of the request.
    pub answer: Option<SealedAnswer>,
    /// The note to keep with the answer.
    pub note: Option<NewNote>,
    /// The attempts that have ended.
    pub history: Vec<AttemptRecord>,
    /// How often another worker continued the answer.
    pub continued: u32,
    pub dead_letter: Option<NewDeadLetter>,
}

impl Ending {
    /// The answer is complete.
    pub fn completed(finish_reason: Option<FinishReason>, usage: TokenUsage) -> Self {
        Self { finish_reason, usage: Some(usage), ..Self::of(TerminalState::Completed) }
    }

    /// The caller cancelled; what it received is billed.
    pub fn cancelled(usage: TokenUsage) -> Self {
        Self { usage: Some(usage), ..Self::of(TerminalState::Cancelled) }
    }

    /// The job failed; nothing is billed.
    pub fn failed(error: WireError) -> Self {
        Self { error: Some(error), ..Self::of(TerminalState::Failed) }
    }

    /// The job must not be retried; nothing is billed.
    pub fn dead(error: WireError) -> Self {
        Self { state: TerminalState::Dead, ..Self::failed(error) }
    }

    fn of(state: TerminalState) -> Self {
        Self {
            state,
            finish_reason: None,
            usage: None,
            error: None,
            history: vec![],
            continued: 0,
            dead_letter: None,
            answer: None,
            note: None,
        }
    }

    /// Returns the error code, or the state if there is no error.
    pub fn outcome(&self) -> &'static str {
        self.error.as_ref().map_or(self.state.as_str(), |error| error.code.as_str())
    }
}

/// Returns the identity of a request's job.
pub(crate) fn key_of(request: &InferRequest) -> JobKey {
    JobKey {
        tenant_id: request.tenant_id.clone(),
        correlation_id: request.correlation_id,
        retry_token: request.retry_token.clone(),
    }
}

/// Returns the fingerprint of a second worker's reservation. No request has it.
fn hedge_fingerprint() -> [u8; 32] {
    Digest::of(b"tether: a second worker for a job").0
}

/// Returns whether a job is the reservation of a second worker for another job.
pub(crate) fn is_hedge(job: &JobRecord) -> bool {
    job.request_fingerprint == hedge_fingerprint()
}

/// Converts a store error to the error that the caller gets.
fn store_error(error: &StoreError) -> WireError {
    match error {
        // An immediate retry would only add to the load.
        StoreError::Overloaded => WireError::new(ErrorCode::NoCapacity, "too many jobs are being taken in, try again")
            .with_retry_after(Duration::from_secs(1)),
        _ => WireError::new(ErrorCode::Unavailable, "jobs cannot be written now, try again"),
    }
}

fn worker_full(message: String) -> WireError {
    WireError::new(ErrorCode::WorkerFull, message)
}

impl ReservationManager {
    /// Makes a manager whose reservations expire after `lease` unless they are renewed.
    pub fn new(
        store: Arc<dyn JobStore>,
        clock: Arc<dyn Clock>,
        fleet: Arc<Fleet>,
        metrics: Metrics,
        region: Region,
        lease: Duration,
    ) -> Self {
        Self { store, clock, fleet, metrics, region, lease, held: Mutex::default() }
    }

    /// Counts a job towards a worker's load.
    pub fn count(&self, worker_id: WorkerId, class: ServiceClass) -> Counted {
        Counted::on(&self.fleet, worker_id, class == ServiceClass::Batch)
    }

    /// Writes a job and its reservation on the worker where it is counted. A job that is known is refused, because it
    /// must not run again. `cancelled` is cancelled when an operator cancels the job.
    pub async fn reserve(
        self: &Arc<Self>,
        request: &InferRequest,
        fingerprint: [u8; 32],
        counted: Counted,
        worker_capacity: u32,
        claim: Claim,
        cancelled: CancellationToken,
    ) -> Result<Reservation, WireError> {
        let stop = Stop { cancelled, ..Stop::default() };
        self.write(request, fingerprint, counted, worker_capacity, (1, stop, claim)).await
    }

    /// Writes a reservation of a second worker for a job that has one. `request` names a job of its own, which is
    /// settled without a bill as soon as it is known whose answer counts.
    pub(crate) async fn reserve_hedge(
        self: &Arc<Self>,
        request: &InferRequest,
        worker_id: WorkerId,
        worker_capacity: u32,
    ) -> Result<Reservation, WireError> {
        let stop = Stop { is_hedge: true, ..Stop::default() };
        let fingerprint = hedge_fingerprint();
        // The job itself counts against its tenant's quotas, and has reserved what may be billed.
        let written = (request.attempt, stop, Claim::default());
        self.write(request, fingerprint, self.count(worker_id, request.class), worker_capacity, written).await
    }

    async fn write(
        self: &Arc<Self>,
        request: &InferRequest,
        fingerprint: [u8; 32],
        counted: Counted,
        worker_capacity: u32,
        (attempt, stop, claim): (u32, Stop, Claim),
    ) -> Result<Reservation, WireError> {
        let worker_id = counted.worker_id;
        let now = self.clock.now();
        let (key, counts, is_bounded) = (key_of(request), !stop.is_hedge, claim.limits.limits_tokens());
        let job = NewJob {
            key: key.clone(),
            trace_id: request.trace_id,
            model: ModelKey { model_id: request.model_id.clone(), version: request.version },
            region: self.region.clone(),
            worker_id,
            worker_capacity,
            attempt,
            now,
            lease_until: now.after(self.lease),
            request_fingerprint: fingerprint,
            limits: claim.limits,
            tokens: claim.tokens,
            counts,
        };
        let attempt = match self.store.reserve(job).await {
            Err(ReserveError::Store(error)) => return Err(store_error(&error)),
            Err(full @ ReserveError::NoCapacity { .. }) => return Err(worker_full(full.to_string())),
            Err(ReserveError::Quota(refusal)) => return Err(refusal.error(now)),
            Ok(Reserved::Duplicate(known)) => return Err(refusals::repeated(&known, &fingerprint)),
            Ok(Reserved::New) => attempt,
            Ok(Reserved::Again { attempt }) => attempt,
        };
        self.lock().insert(key.clone(), Held { attempt: Some(attempt), stop: stop.clone() });
        self.metrics.reservations_active.inc();
        Ok(Reservation { manager: self.clone(), counted, key, worker_id, attempt, stop, is_bounded })
    }

    pub(crate) async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, WireError> {
        self.store.job(key).await.map_err(|error| store_error(&error))
    }

    /// Returns the sealed answer of a job that is kept.
    pub(crate) async fn answer(&self, key: &JobKey) -> Result<Option<Vec<u8>>, WireError> {
        self.store.answer(key, self.now()).await.map_err(|error| store_error(&error))
    }

    pub(crate) async fn keep_note(&self, note: NewNote) -> Result<(), WireError> {
        self.store.keep_note(note).await.map_err(|error| store_error(&error))
    }

    pub(crate) async fn note(&self, tenant_id: &TenantId, id: CorrelationId) -> Result<Option<KeptNote>, WireError> {
        self.store.note(tenant_id, id, self.now()).await.map_err(|error| store_error(&error))
    }

    pub(crate) async fn fail_note(&self, key: &JobKey, error: WireError) -> Result<(), WireError> {
        self.store.fail_note(key, error).await.map_err(|error| store_error(&error))
    }

    pub(crate) async fn remove_note(&self, tenant_id: &TenantId, id: CorrelationId) -> Result<bool, WireError> {
        self.store.remove_note(tenant_id, id).await.map_err(|error| store_error(&error))
    }

    /// Removes kept answers and notes that have expired or are too many, until `stop` is cancelled.
    pub(crate) async fn prune_answers(&self, bytes_max: u64, stop: CancellationToken) {
        let mut ticks = time::interval(PRUNE_EVERY);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            while let Ok(PRUNED_AT_ONCE..) = self.store.prune_answers(self.now(), bytes_max, PRUNED_AT_ONCE).await {}
            while let Ok(PRUNED_AT_ONCE..) = self.store.prune_notes(self.now(), bytes_max, PRUNED_AT_ONCE).await {}
        }
    }

    /// Returns the time of day.
    pub fn now(&self) -> UnixMillis {
        self.clock.now()
    }

    /// Renews the leases of running jobs and releases expired ones until `stop` is cancelled.
    pub async fn run(&self, stop: CancellationToken) {
        let mut ticks = time::interval(self.lease / 3);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.renew().await;
            self.release_expired().await;
        }
    }

    async fn renew(&self) {
        let leases = self.leases();
        if leases.is_empty() {
            return;
        }
        match self.store.renew(leases, self.clock.now().after(self.lease)).await {
            Ok(lost) => {
                let held = self.lock();
                for Lease { key, attempt } in &lost {
                    // The job was settled or has moved meanwhile, or its lease is lost. Only then is the attempt the
                    // current one.
                    if let Some(held) = held.get(key).filter(|held| held.attempt == Some(*attempt)) {
                        warn!(correlation_id = %key.correlation_id, "lease lost, the attempt is void");
                        held.stop.void.cancel();
                    }
                }
            }
            // The next renewal is a third of a lease away.
            Err(error) => warn!(%error, "could not renew leases"),
        }
    }

    /// Returns the leases to renew. A job that moves gets a new one.
    fn leases(&self) -> Vec<Lease> {
        let held = self.lock();
        held.iter().filter_map(|(key, held)| Some(Lease { key: key.clone(), attempt: held.attempt? })).collect()
    }

    /// Records which attempt holds the reservation of a job.
    fn hold(&self, key: &JobKey, attempt: Option<u32>) {
        if let Some(held) = self.lock().get_mut(key) {
            held.attempt = attempt;
        }
    }

    /// Releases what an orchestrator held that had the store before and died, so that repeats of its jobs run at once.
    /// Called before the first reservation.
    pub(crate) async fn release_orphans(&self) {
        match self.store.release_orphans(self.now()).await {
            Ok(jobs) if jobs.is_empty() => {}
            Ok(jobs) => warn!(jobs = jobs.len(), "the orchestrator before this one ended in the middle of jobs"),
            // They are released when their leases expire.
            Err(error) => warn!(%error, "could not release what the orchestrator before this one held"),
        }
    }

    async fn release_expired(&self) {
        match self.store.release_expired(self.clock.now(), EXPIRED_AT_ONCE).await {
            Ok(jobs) => {
                for job in jobs {
                    debug!(correlation_id = %job.key.correlation_id, "lease ran out, the job has failed");
                }
            }
            Err(error) => warn!(%error, "could not release reservations that ran out"),
        }
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, HashMap<JobKey, Held>> {
        self.held.lock()
    }
}

impl Reservation {
    /// Returns the time of day.
    pub fn now(&self) -> UnixMillis {
        self.manager.now()
    }

    /// Moves the job to another worker or model as its next attempt. On an error the job stays where it is.
    pub async fn reassign(
        &mut self,
        model: ModelKey,
        worker_id: WorkerId,
        worker_capacity: u32,
        claim: Claim,
        history: Vec<AttemptRecord>,
    ) -> Result<(), WireError> {
        let manager = &self.manager;
        let counted = Counted::on(&manager.fleet, worker_id, self.counted.yields);
        let now = manager.clock.now();
        let reassignment = Reassignment {
            key: self.key.clone(),
            from_attempt: self.attempt,
            model,
            worker_id,
            worker_capacity,
            now,
            lease_until: now.after(manager.lease),
            limits: claim.limits,
            tokens: claim.tokens,
            history,
        };
        manager.hold(&self.key, None);
        let moved = manager.store.reassign(reassignment).await;
        manager.hold(&self.key, Some(self.attempt + u32::from(moved.is_ok())));
        moved.map_err(|error| match error {
            ReassignError::Store(error) => store_error(&error),
            ReassignError::Quota(refusal) => refusal.error(now),
            ReassignError::NoCapacity { .. } => worker_full(error.to_string()),
            ReassignError::NotFound | ReassignError::Stale { .. } => {
                WireError::new(ErrorCode::StaleAttempt, error.to_string())
            }
        })?;
        self.counted = counted;
        self.worker_id = worker_id;
        self.attempt += 1;
        Ok(())
    }

    /// Settles the job exactly once. The answer's last chunk must not be sent before this returns.
    pub async fn finalise(self, ending: Ending) -> Result<Finalised, WireError> {
        let settlement = Settlement {
            key: self.key.clone(),
            attempt: self.attempt,
            worker_id: self.worker_id,
            state: ending.state,
            finish_reason: ending.finish_reason,
            error: ending.error.map(|error| JobError { code: error.code, message: error.message }),
            usage: ending.usage,
            is_bounded: self.is_bounded,
            answer: ending.answer,
            note: ending.note,
            now: self.manager.clock.now(),
            history: ending.history,
            continued: ending.continued,
            dead_letter: ending.dead_letter,
        };
        let settled = self.settle(settlement).await;
        settled.map_err(|error| match error {
            FinaliseError::Store(error) => store_error(&error),
            FinaliseError::NotFound => WireError::new(ErrorCode::StaleAttempt, error.to_string()),
        })
    }
}

impl Reservation {
    /// Writes the settlement, retrying for up to one lease while the store is overloaded, because finished work must be
    /// settled. The lease is renewed meanwhile.
    async fn settle(&self, settlement: Settlement) -> Result<Finalised, FinaliseError> {
        let give_up = time::Instant::now() + self.manager.lease;
        let mut backoff = Backoff::exact(SETTLE_AGAIN, SETTLE_AGAIN_MAX);
        loop {
            let settled = self.manager.store.finalise(settlement.clone()).await;
            let wait = backoff.next_wait();
            let busy = matches!(settled, Err(FinaliseError::Store(StoreError::Overloaded)));
            if !busy || time::Instant::now() + wait >= give_up {
                return settled;
            }
            time::sleep(wait).await;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.manager.lock().remove(&self.key);
        self.manager.metrics.reservations_active.dec();
    }
}

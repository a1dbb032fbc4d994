//! The orchestrator's store: jobs, their reservations, usage, dead letters, and the high-water mark of each worker's
//! health reports.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use protocol::infer::FinishReason;
use protocol::jobs::{
    AttemptRecord, DeadLetter, DeadLetterCause, DeadLetterPage, DeadLetterPurge, DeadLetterQuery, JobQuery,
};
use protocol::model::ModelKey;
use protocol::presence::HighWater;
use protocol::quota::{QuotaLimits, QuotaRefusal, QuotaUsage};
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, Region, RetryToken, TenantId, TraceId, UnixMillis, WireError, WorkerId};

use crate::batch_store::BatchStore;
use crate::store::{Store, StoreError};

/// Stores jobs. Several orchestrators may share one store: the attempt number is the fencing token of their writes, and
/// a reservation's lease expires when its orchestrator no longer renews it.
#[async_trait]
pub trait JobStore: Store {
    /// Writes a job and its reservation, on its worker and of its tenant's quotas, unless the worker is full or a limit
    /// would be exceeded. If the key is already in use, its job is returned.
    /// The exception is a job of the same request that failed, or was cancelled, and was not billed: it is reserved
    /// again as its next attempt.
    async fn reserve(&self, job: NewJob) -> Result<Reserved, ReserveError>;

    /// Moves a job to another worker as its next attempt, and frees its previous reservation. What it holds of its
    /// tenant's quotas stays, or is raised, in the windows in which the job was reserved, to what it may use there,
    /// unless a limit would be exceeded.
    ///
    /// Only the attempt named in `from_attempt` can be moved, and only while the job is unsettled.
    async fn reassign(&self, reassignment: Reassignment) -> Result<(), ReassignError>;

    /// Settles a job: its terminal state, the end of its reservation, what is billed, the answer that is kept, and its
    /// dead letter, in one transaction. What is billed is spent in the windows in which the job was reserved, and the
    /// rest of what it held of its tenant's quotas is free again.
    ///
    /// A job is settled once, by its current attempt. Later calls change and bill nothing.
    async fn finalise(&self, settlement: Settlement) -> Result<Finalised, FinaliseError>;

    /// Extends the leases of running jobs, and returns those that could not be extended: the job is settled, or at
    /// another attempt. A lease is never shortened.
    async fn renew(&self, leases: Vec<Lease>, lease_until: UnixMillis) -> Result<Vec<Lease>, StoreError>;

    /// Fails up to `limit` jobs whose lease has expired, frees their reservations, and returns the jobs.
    async fn release_expired(&self, now: UnixMillis, limit: u32) -> Result<Vec<JobRecord>, StoreError>;

    /// Fails the jobs that a dead process has left, frees their reservations, and returns the jobs. Call it once,
    /// before the first reservation. A store that several processes may share returns none, because their processes may
    /// live.
    async fn release_orphans(&self, now: UnixMillis) -> Result<Vec<JobRecord>, StoreError>;

    /// Returns the part that has files and batches.
    fn batches(&self) -> &dyn BatchStore;

    async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, StoreError>;

    /// Returns a job's answer, sealed, if it is kept and has not expired.
    async fn answer(&self, key: &JobKey, now: UnixMillis) -> Result<Option<Vec<u8>>, StoreError>;

    /// Removes up to `limit` answers that have expired. If the rest has more than `bytes_max` bytes together, it also
    /// removes of the tenant that has most then, always the answer that would expire next. Returns how many it removed.
    async fn prune_answers(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError>;

    /// Keeps a note with a job that is about to run. It replaces the one that the job may have.
    async fn keep_note(&self, note: NewNote) -> Result<(), StoreError>;

    /// Returns the note of a tenant's job, if it is kept and has not expired.
    async fn note(
        &self,
        tenant_id: &TenantId,
        id: CorrelationId,
        now: UnixMillis,
    ) -> Result<Option<KeptNote>, StoreError>;

    /// Records with a job's note, if it has one, why the job came to no answer. The first reason stays, and a job
    /// that has completed has none.
    async fn fail_note(&self, key: &JobKey, error: WireError) -> Result<(), StoreError>;

    /// Removes the note of a tenant's job, and the job's answer. Returns whether there was one.
    async fn remove_note(&self, tenant_id: &TenantId, id: CorrelationId) -> Result<bool, StoreError>;

    /// Removes notes as [`Self::prune_answers`] removes answers.
    async fn prune_notes(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError>;

    /// Returns the newest jobs of a request; at most [`protocol::jobs::PAGE_MAX`].
    async fn jobs_of(&self, id: CorrelationId) -> Result<Vec<JobRecord>, StoreError>;

    /// Returns a page of jobs, the newest first.
    async fn list_jobs(&self, query: JobQuery) -> Result<RecordPage, StoreError>;

    /// Removes up to `limit` jobs that were settled before a time, the oldest first, and returns their number. Usage
    /// and dead letters stay.
    async fn prune(&self, settled_before: UnixMillis, limit: u32) -> Result<u32, StoreError>;

    /// Returns a page of dead letters without their payloads, the newest first.
    async fn list_dead_letters(&self, query: DeadLetterQuery) -> Result<DeadLetterPage, StoreError>;

    /// Returns the newest dead letter of a request, with its sealed payload.
    async fn dead_letter(&self, id: CorrelationId) -> Result<Option<(DeadLetter, Option<Vec<u8>>)>, StoreError>;

    /// Deletes the dead letters that meet every condition, and returns their number.
    async fn purge_dead_letters(&self, purge: DeadLetterPurge) -> Result<u64, StoreError>;

    async fn count_dead_letters(&self) -> Result<u64, StoreError>;

    /// Returns each worker that has reservations, with their number.
    async fn active_reservations(&self) -> Result<Vec<(WorkerId, u32)>, StoreError>;

    /// Returns up to `limit` of a tenant's usage records after a cursor, the oldest first.
    async fn usage(&self, tenant_id: &TenantId, after: UsageCursor, limit: u32)
    -> Result<Vec<UsageRecord>, StoreError>;

    /// Returns what a tenant uses in the windows that contain a time.
    async fn quota_usage(&self, tenant_id: &TenantId, now: UnixMillis) -> Result<QuotaUsage, StoreError>;

    /// Returns up to `limit` tenants that have used or reserved something in the day that contains a time.
    async fn quota_tenants(&self, now: UnixMillis, limit: u32) -> Result<Vec<TenantId>, StoreError>;

    /// Returns the high-water marks of all workers.
    async fn high_waters(&self) -> Result<Vec<(WorkerId, HighWater)>, StoreError>;

    /// Raises high-water marks. A mark that is not above the stored one is ignored.
    async fn raise_high_water(&self, marks: Vec<(WorkerId, HighWater)>) -> Result<(), StoreError>;
}

/// Identity of a job.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobKey {
    pub tenant_id: TenantId,
    pub correlation_id: CorrelationId,
    /// The same token never runs a job twice.
    pub retry_token: RetryToken,
}

/// A reservation to renew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub key: JobKey,
    /// The attempt that holds it.
    pub attempt: u32,
}

/// A job to write before it is sent to its worker.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub key: JobKey,
    pub trace_id: TraceId,
    pub model: ModelKey,
    pub region: Region,
    /// The worker that is to run it.
    pub worker_id: WorkerId,
    /// The most reservations the worker may hold, including this one.
    pub worker_capacity: u32,
    /// Number of the attempt; 1 for a new job.
    pub attempt: u32,
    pub now: UnixMillis,
    /// When the reservation expires unless it is renewed.
    pub lease_until: UnixMillis,
    /// Hash of the request's body; distinguishes a resend from another request under the same key.
    pub request_fingerprint: [u8; 32],
    /// The limits of its tenant.
    pub limits: QuotaLimits,
    /// The most tokens, of prompt and answers, that it may be billed.
    pub tokens: u64,
    /// Whether it counts against its tenant's quotas. The reservation of a second worker for a job does not.
    pub counts: bool,
}

/// Outcome of a reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reserved {
    /// The job is new and has its reservation.
    New,
    /// A job with this key had failed, and has a reservation again.
    Again { attempt: u32 },
    /// A job with this key exists. Nothing was written; compare the fingerprint, then attach or replay.
    Duplicate(Box<JobRecord>),
}

/// Moves a job to another worker.
#[derive(Debug, Clone)]
pub struct Reassignment {
    pub key: JobKey,
    /// The attempt that is abandoned; the next one is `from_attempt + 1`.
    pub from_attempt: u32,
    /// The model that runs it next; the job is billed under it.
    pub model: ModelKey,
    /// The worker that is to run it next.
    pub worker_id: WorkerId,
    /// The most reservations the worker may hold, including this one.
    pub worker_capacity: u32,
    pub now: UnixMillis,
    /// When the new reservation expires unless it is renewed.
    pub lease_until: UnixMillis,
    /// The limits of its tenant.
    pub limits: QuotaLimits,
    /// The most tokens, of prompt and answers, that it may be billed there. It holds no less than before.
    pub tokens: u64,
    /// The attempts that have ended.
    pub history: Vec<AttemptRecord>,
}

/// How a job ends.
#[derive(Debug, Clone)]
pub struct Settlement {
    pub key: JobKey,
    /// The attempt that settles it.
    pub attempt: u32,
    /// The worker of that attempt.
    pub worker_id: WorkerId,
    pub state: TerminalState,
    pub finish_reason: Option<FinishReason>,
    pub error: Option<JobError>,
    /// The tokens it used. Billed if the job is completed or cancelled, and dropped otherwise.
    pub usage: Option<TokenUsage>,
    /// Whether it is billed no more than it holds, because its tenant's tokens are limited.
    pub is_bounded: bool,
    pub answer: Option<SealedAnswer>,
    /// The note to keep with the answer.
    pub note: Option<NewNote>,
    pub now: UnixMillis,
    /// The attempts that have ended.
    pub history: Vec<AttemptRecord>,
    /// How often another worker continued the answer.
    pub continued: u32,
    /// The dead letter to write with it.
    pub dead_letter: Option<NewDeadLetter>,
}

/// A dead letter to write. Job and error are those of the settlement.
#[derive(Debug, Clone)]
pub struct NewDeadLetter {
    pub cause: DeadLetterCause,
    pub history: Vec<AttemptRecord>,
    /// The request; `None` if it is not kept.
    pub payload: Option<SealedPayload>,
    /// The most letters to keep; the oldest are deleted. With 0 none is written.
    pub letters_max: u32,
    /// The most bytes of payloads to keep. A payload that alone exceeds it is dropped.
    pub bytes_max: u64,
}

/// A request that only its orchestrator can read.
#[derive(Debug, Clone)]
pub struct SealedPayload {
    pub sealed: Vec<u8>,
    /// Length of the request.
    pub plain_bytes: u64,
}

/// An answer to keep.
#[derive(Clone)]
pub struct SealedAnswer {
    pub sealed: Arc<[u8]>,
    pub expires_at: UnixMillis,
}

impl fmt::Debug for SealedAnswer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes until {}", self.sealed.len(), self.expires_at.0)
    }
}

/// A note to keep with a job: what its gateway needs to answer for it later.
#[derive(Clone)]
pub struct NewNote {
    pub key: JobKey,
    pub sealed: Arc<[u8]>,
    pub created_at: UnixMillis,
    pub expires_at: UnixMillis,
}

impl fmt::Debug for NewNote {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "note of {} bytes until {}", self.sealed.len(), self.expires_at.0)
    }
}

/// A note that is kept with a job.
#[derive(Debug, Clone, PartialEq)]
pub struct KeptNote {
    pub key: JobKey,
    pub created_at: UnixMillis,
    pub sealed: Vec<u8>,
    /// Why the job came to no answer.
    pub error: Option<WireError>,
}

/// Outcome of a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finalised {
    /// This call settled the job.
    Settled,
    /// The job was already settled; nothing was changed or billed.
    AlreadySettled {
        /// How it ended.
        state: TerminalState,
    },
    /// The job has moved on to another attempt or worker; nothing was changed or billed.
    Stale { attempt: u32 },
}

/// How a job can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TerminalState {
    /// The answer is complete.
    Completed,
    Failed,
    /// The caller cancelled or disconnected.
    Cancelled,
    /// It failed repeatedly and is not retried.
    Dead,
}

impl TerminalState {
    /// Returns the state's name in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Dead => "dead",
        }
    }

    /// Returns whether the job's usage is billed.
    pub fn is_billed(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled)
    }
}

/// The part of a job's state that outlives the orchestrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DurableState {
    /// It has a reservation and is not settled.
    Reserved,
    Settled(TerminalState),
}

impl DurableState {
    /// Returns the state's name in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Settled(state) => state.as_str(),
        }
    }
}

/// What went wrong with a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError {
    /// The code that clients see.
    pub code: ErrorCode,
    /// A description for people.
    pub message: String,
}

/// A job as last written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRecord {
    /// Number of the job, ascending in the order of reservation.
    pub sequence: u64,
    pub key: JobKey,
    pub trace_id: TraceId,
    pub model: ModelKey,
    pub region: Region,
    /// The worker that runs it or ran it last.
    pub worker_id: WorkerId,
    /// Number of that attempt, counted from 1.
    pub attempt: u32,
    pub state: DurableState,
    pub finish_reason: Option<FinishReason>,
    pub error: Option<JobError>,
    pub usage: Option<TokenUsage>,
    /// Hash of the request's body.
    pub request_fingerprint: [u8; 32],
    /// When its reservation expires; `None` once it is settled.
    pub lease_until: Option<UnixMillis>,
    /// When it was first reserved.
    pub created_at: UnixMillis,
    /// When it was last reserved, reassigned or settled.
    pub updated_at: UnixMillis,
    /// How often another worker continued the answer.
    pub continued: u32,
    /// The attempts that have ended, if there was more than one or it failed.
    pub history: Vec<AttemptRecord>,
}

/// A page of jobs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecordPage {
    /// The jobs, the newest first.
    pub jobs: Vec<JobRecord>,
    /// Where the next page begins; `None` after the last.
    pub next: Option<u64>,
}

impl JobRecord {
    /// Returns whether a repeat of the request runs the job again: it came to nothing, and cost nothing.
    pub fn may_run_again(&self, request_fingerprint: &[u8; 32]) -> bool {
        use TerminalState::{Cancelled, Failed};
        let came_to_nothing = matches!(self.state, DurableState::Settled(Failed | Cancelled)) && self.usage.is_none();
        came_to_nothing && self.request_fingerprint == *request_fingerprint
    }
}

/// The billed usage of a settled job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRecord {
    /// Number of the record, ascending in the order of settlement.
    pub sequence: u64,
    pub key: JobKey,
    pub model: ModelKey,
    pub region: Region,
    pub worker_id: WorkerId,
    /// The attempt that settled it.
    pub attempt: u32,
    pub usage: TokenUsage,
    /// When it was settled.
    pub settled_at: UnixMillis,
}

impl UsageRecord {
    /// Returns the cursor that continues after this record.
    pub fn cursor(&self) -> UsageCursor {
        UsageCursor { settled_at: self.settled_at, sequence: self.sequence }
    }
}

/// A position between two records of a tenant's usage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsageCursor {
    settled_at: UnixMillis,
    sequence: u64,
}

impl UsageCursor {
    /// Returns the position before the first record that was settled at `time` or later.
    pub fn since(time: UnixMillis) -> Self {
        // Sequences start at 1.
        Self { settled_at: time, sequence: 0 }
    }

    pub(crate) fn parts(self) -> (UnixMillis, u64) {
        (self.settled_at, self.sequence)
    }
}

/// Why a job could not be reserved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// The worker has reached its reservation limit: try another.
    #[error("worker {} has no free slot", .worker_id.short())]
    NoCapacity { worker_id: WorkerId },
    /// The job would exceed a limit of its tenant.
    #[error(transparent)]
    Quota(Box<QuotaRefusal>),
    #[error("could not write the reservation")]
    Store(#[from] StoreError),
}

/// Why a job could not be moved to another worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReassignError {
    /// There is no such job.
    #[error("there is no such job")]
    NotFound,
    /// The job is settled or at another attempt: the caller no longer owns it.
    #[error("the job is {} at attempt {attempt}", .state.as_str())]
    Stale {
        /// The job's current state.
        state: DurableState,
        attempt: u32,
    },
    /// The worker has reached its reservation limit: try another.
    #[error("worker {} has no free slot", .worker_id.short())]
    NoCapacity { worker_id: WorkerId },
    /// The job may use more there, and would exceed a limit of its tenant.
    #[error(transparent)]
    Quota(Box<QuotaRefusal>),
    #[error("could not move the reservation")]
    Store(#[from] StoreError),
}

/// Why a job could not be settled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FinaliseError {
    /// There is no such job.
    #[error("there is no such job")]
    NotFound,
    #[error("could not settle the job")]
    Store(#[from] StoreError),
}

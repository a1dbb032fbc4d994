//! The interface every store has, its records and its errors.

use async_trait::async_trait;
use protocol::control::{NodeRole, Scope};
use protocol::infer::FinishReason;
use protocol::model::{AdapterEntry, AdapterKey, AliasEntry, ModelEntry, ModelKey};
use protocol::policy::TenantPolicy;
use protocol::presence::HighWater;
use protocol::usage::TokenUsage;
use protocol::{
    CorrelationId, Digest, ErrorCode, InviteId, ModelName, PublicKey, Region, RetryToken, TenantId, TraceId,
    UnixMillis, WorkerId,
};

/// Keeps what must outlive a process.
///
/// A call that returned `Ok` is on the disk. Each call takes hold as a whole or not at all. A call whose future is
/// dropped may still take hold. The store reads no clock: times are arguments.
#[async_trait]
pub trait MetadataStore: Send + Sync {
    /// Writes a job and its reservation, unless its worker is full. The same key again returns the job there is.
    async fn reserve(&self, job: NewJob) -> Result<Reserved, ReserveError>;

    /// Moves a job to another worker as its next attempt, and frees the reservation it had.
    ///
    /// Only the attempt named in `from_attempt` can be moved, and only while the job is unsettled.
    async fn reassign(&self, reassignment: Reassignment) -> Result<(), ReassignError>;

    /// Settles a job: its terminal state, the end of its reservation, and what is billed, in one transaction.
    ///
    /// A job is settled once, by its present attempt; whoever comes later changes and bills nothing.
    async fn finalise(&self, settlement: Settlement) -> Result<Finalised, FinaliseError>;

    /// Extends the leases of running jobs, never shortens them, and returns the keys that hold no reservation.
    async fn renew(&self, keys: Vec<JobKey>, lease_until: UnixMillis) -> Result<Vec<JobKey>, StoreError>;

    /// Fails up to `limit` jobs whose lease has run out, frees their reservations, and returns the jobs.
    async fn release_expired(&self, now: UnixMillis, limit: u32) -> Result<Vec<JobRecord>, StoreError>;

    /// Returns a job.
    async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, StoreError>;

    /// Returns a tenant's latest job of a correlation id.
    async fn job_by_correlation(
        &self,
        tenant_id: &TenantId,
        correlation_id: CorrelationId,
    ) -> Result<Option<JobRecord>, StoreError>;

    /// Returns each worker that holds reservations, and how many.
    async fn active_reservations(&self) -> Result<Vec<(WorkerId, u32)>, StoreError>;

    /// Returns up to `limit` usage records of a tenant behind a cursor, the oldest first.
    async fn usage(&self, tenant_id: &TenantId, after: UsageCursor, limit: u32)
    -> Result<Vec<UsageRecord>, StoreError>;

    /// Adds a token.
    async fn put_token(&self, token: TokenRecord) -> Result<(), PutTokenError>;

    /// Returns the token of a key id, revoked and expired ones too.
    async fn token(&self, key_id: &str) -> Result<Option<TokenRecord>, StoreError>;

    /// Returns every token, the oldest first.
    async fn tokens(&self) -> Result<Vec<TokenRecord>, StoreError>;

    /// Revokes a token; false where there is none. The first revocation keeps its time.
    async fn revoke_token(&self, key_id: &str, now: UnixMillis) -> Result<bool, StoreError>;

    /// Sets a tenant's rules.
    async fn put_policy(&self, tenant_id: &TenantId, policy: &TenantPolicy) -> Result<(), StoreError>;

    /// Returns a tenant's rules, where it has any.
    async fn policy(&self, tenant_id: &TenantId) -> Result<Option<TenantPolicy>, StoreError>;

    /// Returns every tenant that has rules, by name.
    async fn tenants(&self) -> Result<Vec<(TenantId, TenantPolicy)>, StoreError>;

    /// Registers a model version. The same digest again updates what describes it; another digest is refused.
    async fn put_model(&self, entry: ModelEntry) -> Result<(), PutModelError>;

    /// Returns every model version, by name and then by version.
    async fn models(&self) -> Result<Vec<ModelEntry>, StoreError>;

    /// Sets how long workers keep a model version in memory; false where it does not exist. [`Self::put_model`] leaves that as it is.
    async fn keep_model(&self, key: &ModelKey, pin: bool, keep_alive_secs: Option<i64>) -> Result<bool, StoreError>;

    /// Forgets a model version and its adapters; false where there is none.
    async fn remove_model(&self, key: &ModelKey) -> Result<bool, StoreError>;

    /// Registers an adapter of a model version. The same digest again updates what describes it; another digest is
    /// refused.
    async fn put_adapter(&self, entry: AdapterEntry) -> Result<(), PutAdapterError>;

    /// Returns every adapter, by model and then by name.
    async fn adapters(&self) -> Result<Vec<AdapterEntry>, StoreError>;

    /// Forgets an adapter; false where there is none.
    async fn remove_adapter(&self, key: &AdapterKey) -> Result<bool, StoreError>;

    /// Sets what an alias stands for; false where a model has its name that is not one of its targets. Whether there
    /// are such targets is for the caller to check.
    async fn put_alias(&self, entry: AliasEntry) -> Result<bool, StoreError>;

    /// Returns every alias, by name.
    async fn aliases(&self) -> Result<Vec<AliasEntry>, StoreError>;

    /// Forgets an alias; false where it does not exist.
    async fn remove_alias(&self, alias: &ModelName) -> Result<bool, StoreError>;

    /// Adds an invite, not redeemed yet.
    async fn put_invite(&self, invite: InviteRecord) -> Result<(), PutInviteError>;

    /// Returns an invite, redeemed and expired ones too.
    async fn invite(&self, invite_id: InviteId) -> Result<Option<InviteRecord>, StoreError>;

    /// Redeems an invite for a node, unless another node has. Its secret and its end are for the caller to check.
    async fn redeem_invite(
        &self,
        invite_id: InviteId,
        node: PublicKey,
        now: UnixMillis,
    ) -> Result<Redemption, StoreError>;

    /// Writes a node's next certificate down and returns its number, greater than all before.
    async fn put_certificate(&self, certificate: NewCertificate) -> Result<u64, StoreError>;

    /// Returns a node with its last certificate, expelled ones too.
    async fn node(&self, public_key: PublicKey) -> Result<Option<NodeRecord>, StoreError>;

    /// Returns every node that was ever admitted, the first first.
    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError>;

    /// Gives a node another name. Returns false where there is no such node.
    async fn rename_node(&self, public_key: PublicKey, name: &str) -> Result<bool, StoreError>;

    /// Expels a key, known or not, and returns the version of the list that names it. The first time counts.
    ///
    /// Versions grow, and are not below the time they are made, so that they grow even where a store was lost.
    async fn revoke_node(&self, public_key: PublicKey, now: UnixMillis) -> Result<u64, StoreError>;

    /// Returns who was expelled, by version.
    async fn revocations(&self) -> Result<Vec<Revocation>, StoreError>;

    /// Returns a node's next epoch: 1 at first, then one more at each call, over all restarts.
    async fn next_epoch(&self, node: PublicKey) -> Result<u64, StoreError>;

    /// Returns the mark of the last report believed of a worker.
    async fn high_water(&self, worker_id: WorkerId) -> Result<Option<HighWater>, StoreError>;

    /// Returns the marks of all workers.
    async fn high_waters(&self) -> Result<Vec<(WorkerId, HighWater)>, StoreError>;

    /// Raises marks; one that is not above the mark there is changes nothing.
    async fn raise_high_water(&self, marks: Vec<(WorkerId, HighWater)>) -> Result<(), StoreError>;

    /// Finishes what is waiting and closes the store; later calls get [`StoreError::Closed`].
    async fn close(&self) -> Result<(), StoreError>;
}

/// What makes a job the same job.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobKey {
    /// Who pays.
    pub tenant_id: TenantId,
    /// The job's name.
    pub correlation_id: CorrelationId,
    /// The same token never runs a job twice.
    pub retry_token: RetryToken,
}

/// A job to write before it is sent to its worker.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// What makes it the same job.
    pub key: JobKey,
    /// The trace it belongs to.
    pub trace_id: TraceId,
    /// The model it runs.
    pub model: ModelKey,
    /// Where it runs.
    pub region: Region,
    /// Who is to run it.
    pub worker_id: WorkerId,
    /// How many reservations that worker may hold, this one included.
    pub worker_capacity: u32,
    /// Which try this is; 1 for a new job.
    pub attempt: u32,
    /// The present time.
    pub now: UnixMillis,
    /// When the reservation ends unless it is renewed.
    pub lease_until: UnixMillis,
    /// Hash of the request's body; tells a resend from another request under the same key.
    pub request_fingerprint: [u8; 32],
}

/// What came of a reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reserved {
    /// The job is new and has its reservation.
    New,
    /// A job of this key is known. Nothing was written; compare the fingerprint, then attach or replay.
    Duplicate(Box<JobRecord>),
}

/// Moves a job to another worker.
#[derive(Debug, Clone)]
pub struct Reassignment {
    /// The job.
    pub key: JobKey,
    /// The attempt that is given up on; the next one is `from_attempt + 1`.
    pub from_attempt: u32,
    /// The model that runs it next; the job is billed under it.
    pub model: ModelKey,
    /// Who is to run it next.
    pub worker_id: WorkerId,
    /// How many reservations that worker may hold, this one included.
    pub worker_capacity: u32,
    /// The present time.
    pub now: UnixMillis,
    /// When the new reservation ends unless it is renewed.
    pub lease_until: UnixMillis,
}

/// How a job ends.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The job.
    pub key: JobKey,
    /// The attempt that settles it.
    pub attempt: u32,
    /// The worker of that attempt.
    pub worker_id: WorkerId,
    /// How it ends.
    pub state: TerminalState,
    /// Why the answer ended.
    pub finish_reason: Option<FinishReason>,
    /// What went wrong.
    pub error: Option<JobError>,
    /// What it took. Billed when the job is completed or cancelled, and dropped otherwise.
    pub usage: Option<TokenUsage>,
    /// The present time.
    pub now: UnixMillis,
}

/// What came of a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finalised {
    /// This call settled the job.
    Settled,
    /// The job had been settled; nothing was changed or billed.
    AlreadySettled {
        /// How it had ended.
        state: TerminalState,
    },
    /// The job has moved on to another attempt or worker; nothing was changed or billed.
    Stale {
        /// The present attempt.
        attempt: u32,
    },
}

/// How a job can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TerminalState {
    /// The answer is whole.
    Completed,
    /// It went wrong.
    Failed,
    /// The caller gave up.
    Cancelled,
    /// It went wrong so often that nobody tries again.
    Dead,
}

impl TerminalState {
    /// Returns the state as it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Dead => "dead",
        }
    }

    /// Says whether what the job took is billed.
    pub fn is_billed(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled)
    }
}

/// Where a job stands, as far as it must outlive the orchestrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobState {
    /// It has a reservation and is not settled.
    Reserved,
    /// It has ended.
    Settled(TerminalState),
}

impl JobState {
    /// Returns the state as it is written.
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
    /// What, as clients name it.
    pub code: ErrorCode,
    /// What, for people.
    pub message: String,
}

/// A job as it was written last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRecord {
    /// What makes it the same job.
    pub key: JobKey,
    /// The trace it belongs to.
    pub trace_id: TraceId,
    /// The model it runs.
    pub model: ModelKey,
    /// Where it runs.
    pub region: Region,
    /// Who runs it, or ran it last.
    pub worker_id: WorkerId,
    /// Which try that is, counted from 1.
    pub attempt: u32,
    /// Where it stands.
    pub state: JobState,
    /// Why its answer ended.
    pub finish_reason: Option<FinishReason>,
    /// What went wrong.
    pub error: Option<JobError>,
    /// What was billed.
    pub usage: Option<TokenUsage>,
    /// Hash of the request's body.
    pub request_fingerprint: [u8; 32],
    /// When its reservation ends; none once it is settled.
    pub lease_until: Option<UnixMillis>,
    /// When it was first reserved.
    pub created_at: UnixMillis,
    /// When it was reserved, reassigned or settled last.
    pub updated_at: UnixMillis,
}

/// What a settled job took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRecord {
    /// Its place among all usage records; it grows in the order of the settlements.
    pub sequence: u64,
    /// The job.
    pub key: JobKey,
    /// The model it ran.
    pub model: ModelKey,
    /// Where it ran.
    pub region: Region,
    /// Who ran it.
    pub worker_id: WorkerId,
    /// The attempt that was settled.
    pub attempt: u32,
    /// What it took.
    pub usage: TokenUsage,
    /// When it was settled.
    pub settled_at: UnixMillis,
}

impl UsageRecord {
    /// Returns the cursor that goes on behind this record.
    pub fn cursor(&self) -> UsageCursor {
        UsageCursor { settled_at: self.settled_at, sequence: self.sequence }
    }
}

/// A place in a tenant's usage, between two records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsageCursor {
    settled_at: UnixMillis,
    sequence: u64,
}

impl UsageCursor {
    /// Returns the place before the first record that was settled at `time` or later.
    pub fn since(time: UnixMillis) -> Self {
        // Sequences start at 1.
        Self { settled_at: time, sequence: 0 }
    }

    pub(crate) fn parts(self) -> (UnixMillis, u64) {
        (self.settled_at, self.sequence)
    }
}

/// An API token as the registry keeps it: never the secret itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRecord {
    /// The public part.
    pub key_id: String,
    /// Whose it is.
    pub tenant_id: TenantId,
    /// Keyed hash of the secret.
    pub hash: [u8; 32],
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// What it is for, for people.
    pub name: String,
    /// When it was made.
    pub created_at: UnixMillis,
    /// When it ends.
    pub expires_at: Option<UnixMillis>,
    /// When it was revoked.
    pub revoked_at: Option<UnixMillis>,
}

/// Why the store could not do its part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The queue stayed full. Nothing was done; shed the request or try again later.
    #[error("too many operations wait for the store")]
    Overloaded,
    /// The store is closed. Nothing was done.
    #[error("the store is closed")]
    Closed,
    /// The disk is full, fails or is locked. A write was not acknowledged; look before trying again.
    #[error("the store cannot be read or written: {reason}")]
    Unavailable {
        /// What SQLite or the database says.
        reason: String,
    },
    /// The data make no sense. Stop, and restore a copy.
    #[error("the store is damaged: {reason}")]
    Damaged {
        /// What is wrong, and where.
        reason: String,
    },
}

/// Why a job could not be reserved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// The worker holds as many reservations as it may: try another.
    #[error("worker {} has no free slot", .worker_id.short())]
    NoCapacity {
        /// The worker.
        worker_id: WorkerId,
    },
    /// The store failed.
    #[error("could not write the reservation")]
    Store(#[from] StoreError),
}

/// Why a job could not be moved to another worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReassignError {
    /// There is no such job.
    #[error("there is no such job")]
    NotFound,
    /// The job is settled, or at another attempt: whoever asks has lost it.
    #[error("the job is {} at attempt {attempt}", .state.as_str())]
    Stale {
        /// Where the job stands.
        state: JobState,
        /// Its present attempt.
        attempt: u32,
    },
    /// The worker holds as many reservations as it may: try another.
    #[error("worker {} has no free slot", .worker_id.short())]
    NoCapacity {
        /// The worker.
        worker_id: WorkerId,
    },
    /// The store failed.
    #[error("could not move the reservation")]
    Store(#[from] StoreError),
}

/// Why a job could not be settled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FinaliseError {
    /// There is no such job.
    #[error("there is no such job")]
    NotFound,
    /// The store failed.
    #[error("could not settle the job")]
    Store(#[from] StoreError),
}

/// An invite as it is kept: never its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InviteRecord {
    /// Its public name.
    pub invite_id: InviteId,
    /// Keyed hash of the secret.
    pub hash: [u8; 32],
    /// Who it is for, for people.
    pub name: String,
    /// What the node may become.
    pub roles: Vec<NodeRole>,
    /// Where; none for everywhere.
    pub regions: Vec<Region>,
    /// The models it may serve; none for all.
    pub models: Vec<ModelName>,
    /// When it was made.
    pub created_at: UnixMillis,
    /// When it ends.
    pub expires_at: UnixMillis,
    /// Who redeemed it, and when.
    pub redeemed: Option<InviteRedemption>,
}

/// The one use of an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InviteRedemption {
    /// The node it brought in.
    pub node: PublicKey,
    /// When.
    pub at: UnixMillis,
}

/// What came of redeeming an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redemption {
    /// It is used up by this.
    Done,
    /// The same node had redeemed it before.
    Again,
    /// Another node had.
    Used,
    /// There is no such invite.
    Unknown,
}

/// A certificate to be written down before it is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCertificate {
    /// The node.
    pub public_key: PublicKey,
    /// Its name, for people.
    pub name: String,
    /// What it may be.
    pub roles: Vec<NodeRole>,
    /// Where; none for everywhere.
    pub regions: Vec<Region>,
    /// The models it may serve; none for all.
    pub models: Vec<ModelName>,
    /// When it begins.
    pub not_before: UnixMillis,
    /// When it ends.
    pub not_after: UnixMillis,
    /// The present time.
    pub now: UnixMillis,
}

/// A node with its last certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its key.
    pub public_key: PublicKey,
    /// The certificate's number.
    pub serial: u64,
    /// Its name, for people.
    pub name: String,
    /// What it may be.
    pub roles: Vec<NodeRole>,
    /// Where; none for everywhere.
    pub regions: Vec<Region>,
    /// The models it may serve; none for all.
    pub models: Vec<ModelName>,
    /// When it was first admitted.
    pub joined_at: UnixMillis,
    /// When the certificate begins.
    pub not_before: UnixMillis,
    /// When it ends.
    pub not_after: UnixMillis,
    /// When the node was expelled.
    pub revoked_at: Option<UnixMillis>,
}

/// A key that was expelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revocation {
    /// The key.
    pub public_key: PublicKey,
    /// The version of the list that first named it.
    pub version: u64,
    /// When.
    pub revoked_at: UnixMillis,
}

/// Why an invite could not be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutInviteError {
    /// There is one of this name.
    #[error("there is an invite {invite_id}")]
    Taken {
        /// The name.
        invite_id: InviteId,
    },
    /// The store failed.
    #[error("could not write the invite")]
    Store(#[from] StoreError),
}

/// Why a token could not be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutTokenError {
    /// The key id is taken: make another token.
    #[error("key id {key_id} is taken")]
    Taken {
        /// The key id.
        key_id: String,
    },
    /// The store failed.
    #[error("could not write the token")]
    Store(#[from] StoreError),
}

/// Why a model could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutModelError {
    /// The version has another artifact, and a version never changes: register a new version.
    #[error("{key} is registered with digest {registered}; a version never changes, register a new one")]
    Conflict {
        /// The model version.
        key: ModelKey,
        /// The digest it has.
        registered: Digest,
    },
    /// The store failed.
    #[error("could not write the model")]
    Store(#[from] StoreError),
}

/// Why an adapter could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutAdapterError {
    /// Its model is not registered.
    #[error("{model} is not registered")]
    NoModel {
        /// The model version.
        model: ModelKey,
    },
    /// The name has another artifact: remove it first, or choose another name.
    #[error("{key} is registered with digest {registered}; remove it first, or choose another name")]
    Conflict {
        /// The adapter.
        key: AdapterKey,
        /// The digest it has.
        registered: Digest,
    },
    /// The store failed.
    #[error("could not write the adapter")]
    Store(#[from] StoreError),
}

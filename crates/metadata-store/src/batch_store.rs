//! The part of the orchestrator's store that has files and batches.

use async_trait::async_trait;
use protocol::batches::{BatchCounts, BatchId, BatchRef, BatchStatus, BatchTimes};
use protocol::files::{FileId, FilePurpose, FileQuery, FileRef};
use protocol::{PublicKey, TenantId, UnixMillis};

use crate::job_store::JobKey;
use crate::store::StoreError;

/// Stores files and batches. Gateways work on batches under a lease, whose epoch is the fencing token of their writes.
#[async_trait]
pub trait BatchStore: Send + Sync {
    /// Begins an upload, unless the tenant has as many files as it may have. Returns whether it has begun.
    async fn create_file(&self, file: NewFileRecord, files_max: u32) -> Result<bool, StoreError>;

    /// Adds a piece to a file that is being uploaded. One that is there stays as it is.
    async fn add_piece(&self, piece: NewPiece, limits: PieceLimits) -> Result<PieceAdded, StoreError>;

    /// Ends an upload. Returns `None` if nobody uploads the file.
    async fn finish_file(&self, file: FileRef, expires_at: UnixMillis) -> Result<Option<FileRecord>, StoreError>;

    /// Returns a file that is complete and has not expired.
    async fn file(&self, file: FileRef, now: UnixMillis) -> Result<Option<FileRecord>, StoreError>;

    /// Lists files that are complete and have not expired.
    async fn list_files(&self, query: FileQuery, now: UnixMillis) -> Result<Vec<FileRecord>, StoreError>;

    /// Returns the pieces of a complete file after `after`: as many as have `bytes_max` bytes, and at least one.
    async fn pieces(
        &self,
        file: FileRef,
        after: Option<u32>,
        bytes_max: usize,
        now: UnixMillis,
    ) -> Result<Vec<(u32, Vec<u8>)>, StoreError>;

    /// Deletes a file, unless a batch reads it or writes it.
    async fn remove_file(&self, file: FileRef) -> Result<FileGone, StoreError>;

    /// Deletes up to `limit` pieces of files that have expired, those files, and batches that are to be forgotten.
    /// Returns how much was deleted.
    async fn prune_files(&self, now: UnixMillis, limit: u32) -> Result<u32, StoreError>;

    /// Creates a batch and the files for its results. Returns `None` if its input is not there.
    async fn create_batch(&self, batch: NewBatchRecord, files_max: u32) -> Result<BatchCreated, StoreError>;

    async fn batch(&self, batch: BatchRef) -> Result<Option<BatchRecord>, StoreError>;

    /// Lists the batches of a tenant, the newest first.
    async fn list_batches(
        &self,
        tenant_id: TenantId,
        after: Option<BatchId>,
        limit: u32,
    ) -> Result<Vec<BatchRecord>, StoreError>;

    /// Gives `holder` the lease of a batch that has not ended, and whose lease is over, or is that of a process that
    /// `holder` was before: it does not work on it. The batch enters its next epoch.
    async fn claim_batch(
        &self,
        holder: PublicKey,
        working_on: Vec<BatchId>,
        now: UnixMillis,
        lease_until: UnixMillis,
    ) -> Result<Option<BatchRecord>, StoreError>;

    /// Takes a batch to another status, if that may follow, and extends its lease. Returns the batch as it is then, or
    /// `None` if it is not there or in another epoch.
    async fn step_batch(&self, step: BatchChange) -> Result<Option<BatchRecord>, StoreError>;

    /// Writes the result of a line and removes the kept answer of its job. A line that has a result keeps it. Returns
    /// whether the batch is in this epoch and its lines may have results.
    async fn record_line(&self, line: NewLine) -> Result<bool, StoreError>;

    /// Returns which of the lines from `from` to before `to` have a result, in ascending order.
    async fn lines(&self, batch: BatchRef, from: u32, to: u32) -> Result<Vec<u32>, StoreError>;

    /// Counts the batches that have not ended, and their lines without a result.
    async fn open_batches(&self) -> Result<(u64, u64), StoreError>;
}

/// An upload that begins.
#[derive(Debug, Clone)]
pub struct NewFileRecord {
    pub file: FileRef,
    pub created_at: UnixMillis,
    pub expires_at: UnixMillis,
    /// The name that its client gave it.
    pub sealed: Vec<u8>,
}

/// A piece of a file.
#[derive(Debug, Clone)]
pub struct NewPiece {
    pub file: FileRef,
    pub piece: u32,
    /// Length of the piece before it was sealed.
    pub bytes: u64,
    pub sealed: Vec<u8>,
}

/// What a tenant may store.
#[derive(Debug, Clone, Copy)]
pub struct PieceLimits {
    pub file_bytes_max: u64,
    pub tenant_bytes_max: u64,
}

/// What became of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceAdded {
    Added,
    /// Nobody uploads this file, or not any more.
    NoUpload,
    /// The file would be longer than allowed.
    FileTooLong,
    /// The tenant's files would take more than they may.
    TenantFull,
}

/// A file, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRecord {
    pub id: FileId,
    pub purpose: FilePurpose,
    pub created_at: UnixMillis,
    pub expires_at: UnixMillis,
    pub bytes: u64,
    pub sealed: Vec<u8>,
}

/// What became of a file that was to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileGone {
    Removed,
    Missing,
    /// A batch that has not ended reads it.
    InUse,
}

/// A batch that is created.
#[derive(Debug, Clone)]
pub struct NewBatchRecord {
    pub batch: BatchRef,
    pub endpoint: String,
    pub input_file: FileId,
    pub output_file: FileId,
    pub error_file: FileId,
    pub created_at: UnixMillis,
    pub expires_at: UnixMillis,
    /// Seconds for which its result files are kept after its end.
    pub results_secs: u64,
    pub sealed: Vec<u8>,
    /// Names of the result files.
    pub sealed_names: [Vec<u8>; 2],
}

/// What became of a batch that was to be created.
#[derive(Debug, Clone, PartialEq)]
pub enum BatchCreated {
    Created(Box<BatchRecord>),
    NoInput,
    /// The tenant has as many files as it may have.
    TooManyFiles,
}

/// A batch as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchRecord {
    pub batch: BatchRef,
    pub endpoint: String,
    pub input_file: FileId,
    pub output_file: FileId,
    pub error_file: FileId,
    pub status: BatchStatus,
    pub times: BatchTimes,
    pub counts: BatchCounts,
    pub sealed: Vec<u8>,
    pub epoch: u64,
}

/// A step of a batch.
#[derive(Debug, Clone)]
pub struct BatchChange {
    pub batch: BatchRef,
    /// The epoch in which it must be; any if `None`.
    pub epoch: Option<u64>,
    /// The status that it goes to.
    pub status: Option<BatchStatus>,
    pub total: Option<u32>,
    /// Replaces what is kept of it encrypted.
    pub sealed: Option<Vec<u8>>,
    pub now: UnixMillis,
    pub lease_until: Option<UnixMillis>,
}

/// The result of a line.
#[derive(Debug, Clone)]
pub struct NewLine {
    pub batch: BatchRef,
    pub epoch: u64,
    pub line: u32,
    pub is_error: bool,
    /// Length of the result before it was sealed.
    pub bytes: u64,
    pub sealed: Vec<u8>,
    /// Its job, whose answer is no longer needed.
    pub job: JobKey,
}

//! Durable state, in one store per owner: [`JobStore`] is the orchestrator's, [`RegistryStore`] the registry's.
//!
//! [`SqliteStore`] implements both in a SQLite file. When a call returns `Ok`, its changes are on disk.

mod batch_store;
pub mod fencing;
mod job_store;
mod registry_store;
mod sqlite;
mod store;

pub use batch_store::{
    BatchChange, BatchCreated, BatchRecord, BatchStore, FileGone, FileRecord, NewBatchRecord, NewFileRecord, NewLine,
    NewPiece, PieceAdded, PieceLimits,
};
pub use job_store::{
    DurableState, FinaliseError, Finalised, JobError, JobKey, JobRecord, JobStore, KeptNote, Lease, NewDeadLetter,
    NewJob, NewNote, ReassignError, Reassignment, RecordPage, ReserveError, Reserved, SealedAnswer, SealedPayload,
    Settlement, TerminalState, UsageCursor, UsageRecord,
};
pub use registry_store::{
    InviteRecord, InviteRedemption, NewCertificate, NodeRecord, PutAdapterError, PutInviteError, PutModelError,
    PutTokenError, Redemption, RegistryStore, Revocation, TokenRecord,
};
pub use sqlite::{OpenError, SqliteStore, StoreOptions};
pub use store::{Store, StoreError};

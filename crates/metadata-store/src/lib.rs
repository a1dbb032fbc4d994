//! What must outlive a process: jobs and their reservations, usage, tokens, models, policies, invites, nodes,
//! revocations and presence marks.
//!
//! [`MetadataStore`] is the one interface; [`SqliteStore`] keeps it in a file. The orchestrator and the registry each
//! own a store of their own. A call that returned `Ok` is on the disk.

mod metadata_store;
mod sqlite;

pub use metadata_store::{
    FinaliseError, Finalised, InviteRecord, InviteRedemption, JobError, JobKey, JobRecord, JobState, MetadataStore,
    NewCertificate, NewJob, NodeRecord, PutAdapterError, PutInviteError, PutModelError, PutTokenError, ReassignError,
    Reassignment, Redemption, ReserveError, Reserved, Revocation, Settlement, StoreError, TerminalState, TokenRecord,
    UsageCursor, UsageRecord,
};
pub use sqlite::{OpenError, SqliteStore, StoreOptions};

//! What must outlive a process: jobs and their reservations, usage, tokens, models, policies and presence marks.
//!
//! [`MetadataStore`] is the one interface; [`SqliteStore`] keeps it in a file. The orchestrator and the registry each
//! own a store of their own. A call that returned `Ok` is on the disk.

mod jobs;
mod metadata_store;
mod models;
mod presence;
mod quotas;
mod reservations;
mod row;
mod sqlite;
mod tokens;
mod usage;

pub use metadata_store::{
    FinaliseError, Finalised, JobError, JobKey, JobRecord, JobState, MetadataStore, NewJob, PutModelError,
    PutTokenError, ReassignError, Reassignment, ReserveError, Reserved, Settlement, StoreError, TerminalState,
    TokenRecord, UsageCursor, UsageRecord,
};
pub use sqlite::{OpenError, SqliteStore, StoreOptions};

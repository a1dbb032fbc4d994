//! The trait and the error that both stores share.

use async_trait::async_trait;

/// A store of state that outlives the process.
///
/// When a call returns `Ok`, its changes are on disk. Each call is atomic. A call whose future is dropped may still be
/// applied. A store reads no clock: times are arguments.
#[async_trait]
pub trait Store: Send + Sync {
    /// Finishes the queued operations and closes the store; later calls return [`StoreError::Closed`].
    async fn close(&self) -> Result<(), StoreError>;
}

/// Why a store operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The queue stayed full. Nothing was done; shed the request or try again later.
    #[error("too many operations wait for the store")]
    Overloaded,
    /// The store is closed. Nothing was done.
    #[error("the store is closed")]
    Closed,
    /// The file cannot be used: the disk is full, failing or locked. A write may have been applied; check before trying
    /// again.
    #[error("the store cannot be read or written: {reason}")]
    Unavailable {
        /// The error message of SQLite.
        reason: String,
    },
    /// The data are inconsistent. Stop, and restore a backup.
    #[error("the store is damaged: {reason}")]
    Damaged {
        /// What is wrong, and where.
        reason: String,
    },
}

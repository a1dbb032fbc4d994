//! What both stores have in common.

use async_trait::async_trait;

/// Keeps what must outlive a process.
///
/// A call that returned `Ok` is on the disk. Each call takes hold as a whole or not at all. A call whose future is
/// dropped may still take hold. A store reads no clock: times are arguments.
#[async_trait]
pub trait Store: Send + Sync {
    /// Finishes what is waiting and closes the store; later calls get [`StoreError::Closed`].
    async fn close(&self) -> Result<(), StoreError>;
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

//! A store in one SQLite file.
//!
//! One thread performs the writes and commits all that are queued as one group. Another performs the reads, so that
//! they never wait for a commit. Calls wait without blocking the async runtime.

mod adapters;
mod aliases;
mod answers;
mod batch_store;
mod batches;
mod db_thread;
mod dead_letters;
mod files;
mod job_store;
mod jobs;
mod membership;
mod models;
mod notes;
mod open;
mod policies;
mod presence;
mod quotas;
mod registry_store;
mod reservations;
mod row;
mod tokens;
mod usage;
mod writer;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::Connection;

use self::db_thread::DbThread;
pub use self::open::OpenError;
use crate::store::{Store, StoreError};

/// Options of a [`SqliteStore`]. The defaults suit every service.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// The most writes in the queue; the same limit applies to reads.
    pub queue_depth_max: usize,
    /// The most writes in one commit.
    pub group_max: usize,
    /// How long a call waits for a position in a full queue.
    pub queue_timeout: Duration,
    /// How long SQLite waits for a lock that another program holds.
    pub busy_timeout: Duration,
    /// Whether the whole file is checked for damage when opened, which takes about a second per GiB.
    pub verify: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            queue_depth_max: 4096,
            group_max: 256,
            queue_timeout: Duration::from_millis(250),
            busy_timeout: Duration::from_secs(5),
            verify: true,
        }
    }
}

/// A [`JobStore`](crate::JobStore) or a [`RegistryStore`](crate::RegistryStore) in a SQLite file, or in memory for
/// tests and simulations.
///
/// Dropping the store finishes the queued operations and blocks until then; [`Store::close`] does so without blocking.
pub struct SqliteStore(Backend);

enum Backend {
    // The reader is dropped first: the last connection to close removes the write-ahead log.
    File {
        reader: DbThread,
        writer: DbThread,
        /// Whether the file may still have reservations of the process that had it before.
        has_orphans: AtomicBool,
    },
    // In memory there is no disk to wait for: each call runs on the caller's thread, in the caller's order.
    Memory(Mutex<Option<Connection>>),
}

impl SqliteStore {
    /// Opens the file, or creates it, readable only by its owner. Blocks.
    ///
    /// Only one store may have the file open, across all processes of a machine.
    pub fn open(path: impl AsRef<Path>, options: StoreOptions) -> Result<Self, OpenError> {
        let open::Opened { writer, reader, lock } = open::open(path.as_ref(), &options)?;
        let start = |name: &'static str, work: Box<dyn FnOnce(db_thread::Tasks) + Send>| {
            DbThread::start(name, &options, work)
                .map_err(|error| OpenError::Unwritable { path: path.as_ref().to_owned(), reason: error.to_string() })
        };
        let group_max = options.group_max.max(1);
        Ok(Self(Backend::File {
            reader: start("store-reader", Box::new(move |tasks| db_thread::read_all(&reader, tasks)))?,
            writer: start(
                "store-writer",
                Box::new(move |tasks| {
                    writer::write_all(&writer, tasks, group_max);
                    drop(writer);
                    // Another store may open the file once this one has closed it.
                    drop(lock);
                }),
            )?,
            has_orphans: AtomicBool::new(true),
        }))
    }

    /// Makes an empty store that is lost when this value is dropped. It has no threads and calls finish at once, so
    /// that simulations are reproducible and paused time does not advance.
    pub fn in_memory() -> Result<Self, OpenError> {
        Ok(Self(Backend::Memory(Mutex::new(Some(open::open_in_memory()?)))))
    }

    /// Returns whether all reservations in the store are those of a process that has ended. That is so once: this store
    /// has locked the file since it was opened, and nothing was reserved with it. In memory, nobody knows who else has
    /// the store.
    fn takes_orphans(&self) -> bool {
        match &self.0 {
            Backend::File { has_orphans, .. } => has_orphans.swap(false, Ordering::Relaxed),
            Backend::Memory(_) => false,
        }
    }

    async fn write<T, F>(&self, run: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Fn(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        match &self.0 {
            Backend::File { writer, .. } => writer.call(run).await,
            Backend::Memory(connection) => on_the_spot(connection, |connection| {
                let transaction = connection.unchecked_transaction()?;
                let outcome = run(&transaction)?;
                transaction.commit()?;
                Ok(outcome)
            }),
        }
    }

    async fn read<T, F>(&self, run: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Fn(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        match &self.0 {
            Backend::File { reader, .. } => reader.call(run).await,
            Backend::Memory(connection) => on_the_spot(connection, run),
        }
    }
}

fn on_the_spot<T>(
    connection: &Mutex<Option<Connection>>,
    run: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> Result<T, StoreError> {
    // A panic inside a call rolls its transaction back and does not poison the lock, so the connection stays usable.
    let connection = connection.lock();
    Ok(run(connection.as_ref().ok_or(StoreError::Closed)?)?)
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::{Error, ErrorCode};
        match error {
            Error::FromSqlConversionFailure(_, _, source) => Self::Damaged { reason: source.to_string() },
            Error::SqliteFailure(code, _)
                if !matches!(
                    code.code,
                    ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::ConstraintViolation
                ) =>
            {
                Self::Unavailable { reason: error.to_string() }
            }
            error => Self::Damaged { reason: error.to_string() },
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn close(&self) -> Result<(), StoreError> {
        match &self.0 {
            Backend::File { reader, writer, .. } => {
                reader.close().await;
                writer.close().await;
            }
            Backend::Memory(connection) => {
                connection.lock().take();
            }
        }
        Ok(())
    }
}

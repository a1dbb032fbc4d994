//! The store in one SQLite file.
//!
//! Writes go to one thread that commits whatever waits as one group; reads go to another, so that they never wait
//! behind a commit. Calls wait without blocking the async runtime.

mod adapters;
mod admission;
mod aliases;
mod db_thread;
mod jobs;
mod models;
mod open;
mod policies;
mod presence;
mod reservations;
mod row;
mod tokens;
mod usage;
mod writer;

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use protocol::model::{AdapterEntry, AdapterKey, AliasEntry, ModelEntry, ModelKey};
use protocol::policy::TenantPolicy;
use protocol::presence::HighWater;
use protocol::{CorrelationId, InviteId, ModelName, PublicKey, TenantId, UnixMillis, WorkerId};
use rusqlite::Connection;

use self::db_thread::DbThread;
pub use self::open::OpenError;
use crate::metadata_store::{
    FinaliseError, Finalised, InviteRecord, JobKey, JobRecord, MetadataStore, NewCertificate, NewJob, NodeRecord,
    PutAdapterError, PutInviteError, PutModelError, PutTokenError, ReassignError, Reassignment, Redemption,
    ReserveError, Reserved, Revocation, Settlement, StoreError, TokenRecord, UsageCursor, UsageRecord,
};

/// How a [`SqliteStore`] works. The defaults suit every service.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Writes that may wait, and as many reads.
    pub queue_depth_max: usize,
    /// Writes that are committed together at most.
    pub group_max: usize,
    /// How long a call waits for a place in a full queue.
    pub patience: Duration,
    /// How long SQLite waits for a lock that another program holds.
    pub busy_timeout: Duration,
    /// Reads the whole file for damage when it is opened, about a second a GiB.
    pub verify: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            queue_depth_max: 4096,
            group_max: 256,
            patience: Duration::from_millis(250),
            busy_timeout: Duration::from_secs(5),
            verify: true,
        }
    }
}

/// Keeps the metadata in a SQLite file, or in memory for tests and simulations.
///
/// Dropping the store finishes what is waiting and blocks until then; [`MetadataStore::close`] does so without
/// blocking.
pub struct SqliteStore(Backend);

enum Backend {
    // The reader is dropped first: the last connection to leave takes the write-ahead log along.
    File { reader: DbThread, writer: DbThread },
    // Without a disk there is nothing to wait for: each call runs where it is made, in an order the caller decides.
    Memory(Mutex<Option<Connection>>),
}

impl SqliteStore {
    /// Opens the file, or makes it, readable by its owner only. Blocks for the time it takes.
    ///
    /// A file has one store at a time, over all processes of a machine.
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
        }))
    }

    /// Makes an empty store that ends with this value. It has no threads and calls finish at once, so that a
    /// simulation repeats and paused time stands still.
    pub fn in_memory() -> Result<Self, OpenError> {
        Ok(Self(Backend::Memory(Mutex::new(Some(open::open_in_memory()?)))))
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
    // A panic inside a call rolls its transaction back, so the connection behind a poisoned lock is sound.
    let connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
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
impl MetadataStore for SqliteStore {
    async fn reserve(&self, job: NewJob) -> Result<Reserved, ReserveError> {
        self.write(move |connection| reservations::reserve(connection, &job)).await?
    }

    async fn reassign(&self, reassignment: Reassignment) -> Result<(), ReassignError> {
        self.write(move |connection| reservations::reassign(connection, &reassignment)).await?
    }

    async fn finalise(&self, settlement: Settlement) -> Result<Finalised, FinaliseError> {
        self.write(move |connection| jobs::finalise(connection, &settlement)).await?
    }

    async fn renew(&self, keys: Vec<JobKey>, lease_until: UnixMillis) -> Result<Vec<JobKey>, StoreError> {
        self.write(move |connection| reservations::renew(connection, &keys, lease_until)).await
    }

    async fn release_expired(&self, now: UnixMillis, limit: u32) -> Result<Vec<JobRecord>, StoreError> {
        self.write(move |connection| reservations::release_expired(connection, now, limit)).await
    }

    async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, StoreError> {
        let key = key.clone();
        self.read(move |connection| jobs::find(connection, &key)).await
    }

    async fn job_by_correlation(
        &self,
        tenant_id: &TenantId,
        correlation_id: CorrelationId,
    ) -> Result<Option<JobRecord>, StoreError> {
        let tenant_id = tenant_id.clone();
        self.read(move |connection| jobs::find_by_correlation(connection, &tenant_id, correlation_id)).await
    }

    async fn active_reservations(&self) -> Result<Vec<(WorkerId, u32)>, StoreError> {
        self.read(reservations::active).await
    }

    async fn usage(
        &self,
        tenant_id: &TenantId,
        after: UsageCursor,
        limit: u32,
    ) -> Result<Vec<UsageRecord>, StoreError> {
        let tenant_id = tenant_id.clone();
        self.read(move |connection| usage::list(connection, &tenant_id, after, limit)).await
    }

    async fn put_token(&self, token: TokenRecord) -> Result<(), PutTokenError> {
        self.write(move |connection| tokens::put(connection, &token)).await?
    }

    async fn token(&self, key_id: &str) -> Result<Option<TokenRecord>, StoreError> {
        let key_id = key_id.to_owned();
        self.read(move |connection| tokens::find(connection, &key_id)).await
    }

    async fn tokens(&self) -> Result<Vec<TokenRecord>, StoreError> {
        self.read(tokens::list).await
    }

    async fn revoke_token(&self, key_id: &str, now: UnixMillis) -> Result<bool, StoreError> {
        let key_id = key_id.to_owned();
        self.write(move |connection| tokens::revoke(connection, &key_id, now)).await
    }

    async fn put_policy(&self, tenant_id: &TenantId, policy: &TenantPolicy) -> Result<(), StoreError> {
        let (tenant_id, policy) = (tenant_id.clone(), policy.clone());
        self.write(move |connection| policies::put(connection, &tenant_id, &policy)).await
    }

    async fn policy(&self, tenant_id: &TenantId) -> Result<Option<TenantPolicy>, StoreError> {
        let tenant_id = tenant_id.clone();
        self.read(move |connection| policies::find(connection, &tenant_id)).await
    }

    async fn tenants(&self) -> Result<Vec<(TenantId, TenantPolicy)>, StoreError> {
        self.read(policies::list).await
    }

    async fn put_model(&self, entry: ModelEntry) -> Result<(), PutModelError> {
        self.write(move |connection| models::put(connection, &entry)).await?
    }

    async fn models(&self) -> Result<Vec<ModelEntry>, StoreError> {
        self.read(models::list).await
    }

    async fn keep_model(&self, key: &ModelKey, pin: bool, keep_alive_secs: Option<i64>) -> Result<bool, StoreError> {
        let key = key.clone();
        self.write(move |connection| models::keep(connection, &key, pin, keep_alive_secs)).await
    }

    async fn remove_model(&self, key: &ModelKey) -> Result<bool, StoreError> {
        let key = key.clone();
        self.write(move |connection| models::remove(connection, &key)).await
    }

    async fn put_adapter(&self, entry: AdapterEntry) -> Result<(), PutAdapterError> {
        self.write(move |connection| adapters::put(connection, &entry)).await?
    }

    async fn adapters(&self) -> Result<Vec<AdapterEntry>, StoreError> {
        self.read(adapters::list).await
    }

    async fn remove_adapter(&self, key: &AdapterKey) -> Result<bool, StoreError> {
        let key = key.clone();
        self.write(move |connection| adapters::remove(connection, &key)).await
    }

    async fn put_alias(&self, entry: AliasEntry) -> Result<bool, StoreError> {
        self.write(move |connection| aliases::put(connection, &entry)).await
    }

    async fn aliases(&self) -> Result<Vec<AliasEntry>, StoreError> {
        self.read(aliases::list).await
    }

    async fn remove_alias(&self, alias: &ModelName) -> Result<bool, StoreError> {
        let alias = alias.clone();
        self.write(move |connection| aliases::remove(connection, &alias)).await
    }

    async fn put_invite(&self, invite: InviteRecord) -> Result<(), PutInviteError> {
        self.write(move |connection| admission::put_invite(connection, &invite)).await?
    }

    async fn invite(&self, invite_id: InviteId) -> Result<Option<InviteRecord>, StoreError> {
        self.read(move |connection| admission::invite(connection, invite_id)).await
    }

    async fn redeem_invite(
        &self,
        invite_id: InviteId,
        node: PublicKey,
        now: UnixMillis,
    ) -> Result<Redemption, StoreError> {
        self.write(move |connection| admission::redeem_invite(connection, invite_id, node, now)).await
    }

    async fn put_certificate(&self, certificate: NewCertificate) -> Result<u64, StoreError> {
        self.write(move |connection| admission::put_certificate(connection, &certificate)).await
    }

    async fn node(&self, public_key: PublicKey) -> Result<Option<NodeRecord>, StoreError> {
        self.read(move |connection| admission::node(connection, public_key)).await
    }

    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        self.read(admission::nodes).await
    }

    async fn rename_node(&self, public_key: PublicKey, name: &str) -> Result<bool, StoreError> {
        let name = name.to_owned();
        self.write(move |connection| admission::rename_node(connection, public_key, &name)).await
    }

    async fn revoke_node(&self, public_key: PublicKey, now: UnixMillis) -> Result<u64, StoreError> {
        self.write(move |connection| admission::revoke_node(connection, public_key, now)).await
    }

    async fn revocations(&self) -> Result<Vec<Revocation>, StoreError> {
        self.read(admission::revocations).await
    }

    async fn next_epoch(&self, node: PublicKey) -> Result<u64, StoreError> {
        self.write(move |connection| presence::next_epoch(connection, node)).await
    }

    async fn high_water(&self, worker_id: WorkerId) -> Result<Option<HighWater>, StoreError> {
        self.read(move |connection| presence::high_water(connection, worker_id)).await
    }

    async fn high_waters(&self) -> Result<Vec<(WorkerId, HighWater)>, StoreError> {
        self.read(presence::high_waters).await
    }

    async fn raise_high_water(&self, marks: Vec<(WorkerId, HighWater)>) -> Result<(), StoreError> {
        self.write(move |connection| presence::raise(connection, &marks)).await
    }

    async fn close(&self) -> Result<(), StoreError> {
        match &self.0 {
            Backend::File { reader, writer } => {
                reader.close().await;
                writer.close().await;
            }
            Backend::Memory(connection) => {
                connection.lock().unwrap_or_else(PoisonError::into_inner).take();
            }
        }
        Ok(())
    }
}

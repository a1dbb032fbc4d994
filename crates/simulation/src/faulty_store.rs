//! A job store that fails as disks do, and a record of what was written to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use metadata_store::{
    BatchStore, FinaliseError, Finalised, JobKey, JobRecord, JobStore, KeptNote, Lease, NewJob, NewNote, ReassignError,
    Reassignment, RecordPage, ReserveError, Reserved, Settlement, SqliteStore, Store, StoreError, UsageCursor,
    UsageRecord,
};
use parking_lot::Mutex;
use protocol::jobs::{DeadLetter, DeadLetterPage, DeadLetterPurge, DeadLetterQuery, JobQuery};
use protocol::presence::HighWater;
use protocol::quota::QuotaUsage;
use protocol::{CorrelationId, TenantId, UnixMillis, WireError, WorkerId};

use crate::findings::Findings;

/// The disk of an orchestrator, which outlives it.
#[derive(Clone)]
pub struct Disk {
    pub store: Arc<SqliteStore>,
    trouble: Arc<Mutex<Trouble>>,
    ledger: Arc<Mutex<Ledger>>,
    findings: Findings,
}

/// What is wrong with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    None,
    /// Its queue is full: nothing is done.
    Overloaded,
    /// It is full: nothing can be written.
    Full,
    /// Writes are done, and reported as failed.
    Lying,
}

#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// The jobs that were accepted, and how often each was settled since it was last accepted.
    pub settlements: BTreeMap<JobKey, u32>,
}

impl Disk {
    pub fn new(findings: Findings) -> Self {
        let store = Arc::new(SqliteStore::in_memory().expect("memory is there"));
        Self { store, trouble: Arc::new(Mutex::new(Trouble::None)), ledger: Arc::default(), findings }
    }

    pub fn set(&self, trouble: Trouble) {
        *self.trouble.lock() = trouble;
    }

    pub fn ledger(&self) -> Ledger {
        self.ledger.lock().clone()
    }

    /// Opens the disk for an orchestrator, until that crashes.
    pub fn open(&self) -> Arc<FaultyStore> {
        Arc::new(FaultyStore { disk: self.clone(), is_gone: AtomicBool::new(false) })
    }

    /// Checks that no worker has more reservations than it may hold.
    async fn check_room(&self, worker_id: WorkerId, capacity: u32) {
        let held = self.store.active_reservations().await.unwrap_or_default();
        if let Some((_, count)) = held.iter().find(|(worker, count)| *worker == worker_id && *count > capacity) {
            self.findings.report(format!("{} holds {count} jobs and may hold {capacity}", worker_id.short()));
        }
    }

    fn settled(&self, key: &JobKey) {
        let mut ledger = self.ledger.lock();
        let times = ledger.settlements.entry(key.clone()).or_default();
        *times += 1;
        if *times > 1 {
            self.findings.report(format!("{} was settled {times} times", key.correlation_id));
        }
    }
}

/// A disk as one run of an orchestrator has it.
pub struct FaultyStore {
    disk: Disk,
    is_gone: AtomicBool,
}

impl FaultyStore {
    /// Cuts the orchestrator off from its disk, as its end would.
    pub fn cut(&self) {
        self.is_gone.store(true, Ordering::SeqCst);
    }

    /// Runs a write, or fails as the disk does.
    async fn write<T, E: From<StoreError>>(&self, write: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        if self.is_gone.load(Ordering::SeqCst) {
            return Err(StoreError::Closed.into());
        }
        let full = || StoreError::Unavailable { reason: "no space left on device".into() };
        let trouble = *self.disk.trouble.lock();
        match trouble {
            Trouble::None => write.await,
            Trouble::Overloaded => Err(StoreError::Overloaded.into()),
            Trouble::Full => Err(full().into()),
            Trouble::Lying => {
                let _ = write.await;
                Err(full().into())
            }
        }
    }

    async fn read<T>(&self, read: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        if self.is_gone.load(Ordering::SeqCst) { Err(StoreError::Closed) } else { read.await }
    }
}

#[async_trait]
impl JobStore for FaultyStore {
    async fn reserve(&self, job: NewJob) -> Result<Reserved, ReserveError> {
        let disk = &self.disk;
        self.write(async {
            let (key, worker_id, capacity) = (job.key.clone(), job.worker_id, job.worker_capacity);
            let reserved = disk.store.reserve(job).await?;
            if matches!(reserved, Reserved::New | Reserved::Again { .. }) {
                disk.ledger.lock().settlements.insert(key, 0);
                disk.check_room(worker_id, capacity).await;
            }
            Ok(reserved)
        })
        .await
    }

    async fn reassign(&self, to: Reassignment) -> Result<(), ReassignError> {
        let disk = &self.disk;
        self.write(async {
            let (worker_id, capacity) = (to.worker_id, to.worker_capacity);
            disk.store.reassign(to).await?;
            disk.check_room(worker_id, capacity).await;
            Ok(())
        })
        .await
    }

    async fn finalise(&self, settlement: Settlement) -> Result<Finalised, FinaliseError> {
        let disk = &self.disk;
        self.write(async {
            let key = settlement.key.clone();
            let finalised = disk.store.finalise(settlement).await?;
            if finalised == Finalised::Settled {
                disk.settled(&key);
            }
            Ok(finalised)
        })
        .await
    }

    async fn renew(&self, leases: Vec<Lease>, until: UnixMillis) -> Result<Vec<Lease>, StoreError> {
        self.write(self.disk.store.renew(leases, until)).await
    }

    async fn release_expired(&self, now: UnixMillis, limit: u32) -> Result<Vec<JobRecord>, StoreError> {
        let disk = &self.disk;
        self.write(async {
            let released = disk.store.release_expired(now, limit).await?;
            for job in &released {
                disk.settled(&job.key);
            }
            Ok(released)
        })
        .await
    }

    /// Several orchestrators share the disk.
    async fn release_orphans(&self, _now: UnixMillis) -> Result<Vec<JobRecord>, StoreError> {
        Ok(vec![])
    }

    fn batches(&self) -> &dyn BatchStore {
        self.disk.store.batches()
    }

    async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, StoreError> {
        self.read(self.disk.store.job(key)).await
    }

    async fn answer(&self, key: &JobKey, now: UnixMillis) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(self.disk.store.answer(key, now)).await
    }

    async fn prune_answers(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError> {
        self.write(self.disk.store.prune_answers(now, bytes_max, limit)).await
    }

    async fn keep_note(&self, note: NewNote) -> Result<(), StoreError> {
        self.write(self.disk.store.keep_note(note)).await
    }

    async fn note(
        &self,
        tenant: &TenantId,
        id: CorrelationId,
        now: UnixMillis,
    ) -> Result<Option<KeptNote>, StoreError> {
        self.read(self.disk.store.note(tenant, id, now)).await
    }

    async fn fail_note(&self, key: &JobKey, error: WireError) -> Result<(), StoreError> {
        self.write(self.disk.store.fail_note(key, error)).await
    }

    async fn remove_note(&self, tenant: &TenantId, id: CorrelationId) -> Result<bool, StoreError> {
        self.write(self.disk.store.remove_note(tenant, id)).await
    }

    async fn prune_notes(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError> {
        self.write(self.disk.store.prune_notes(now, bytes_max, limit)).await
    }

    async fn jobs_of(&self, id: CorrelationId) -> Result<Vec<JobRecord>, StoreError> {
        self.read(self.disk.store.jobs_of(id)).await
    }

    async fn list_jobs(&self, query: JobQuery) -> Result<RecordPage, StoreError> {
        self.read(self.disk.store.list_jobs(query)).await
    }

    async fn prune(&self, settled_before: UnixMillis, limit: u32) -> Result<u32, StoreError> {
        self.write(self.disk.store.prune(settled_before, limit)).await
    }

    async fn list_dead_letters(&self, query: DeadLetterQuery) -> Result<DeadLetterPage, StoreError> {
        self.read(self.disk.store.list_dead_letters(query)).await
    }

    async fn dead_letter(&self, id: CorrelationId) -> Result<Option<(DeadLetter, Option<Vec<u8>>)>, StoreError> {
        self.read(self.disk.store.dead_letter(id)).await
    }

    async fn purge_dead_letters(&self, purge: DeadLetterPurge) -> Result<u64, StoreError> {
        self.write(self.disk.store.purge_dead_letters(purge)).await
    }

    async fn count_dead_letters(&self) -> Result<u64, StoreError> {
        self.read(self.disk.store.count_dead_letters()).await
    }

    async fn active_reservations(&self) -> Result<Vec<(WorkerId, u32)>, StoreError> {
        self.read(self.disk.store.active_reservations()).await
    }

    async fn usage(&self, tenant: &TenantId, after: UsageCursor, limit: u32) -> Result<Vec<UsageRecord>, StoreError> {
        self.read(self.disk.store.usage(tenant, after, limit)).await
    }

    async fn quota_usage(&self, tenant_id: &TenantId, now: UnixMillis) -> Result<QuotaUsage, StoreError> {
        self.read(self.disk.store.quota_usage(tenant_id, now)).await
    }

    async fn quota_tenants(&self, now: UnixMillis, limit: u32) -> Result<Vec<TenantId>, StoreError> {
        self.read(self.disk.store.quota_tenants(now, limit)).await
    }

    async fn high_waters(&self) -> Result<Vec<(WorkerId, HighWater)>, StoreError> {
        self.read(self.disk.store.high_waters()).await
    }

    async fn raise_high_water(&self, marks: Vec<(WorkerId, HighWater)>) -> Result<(), StoreError> {
        self.write(self.disk.store.raise_high_water(marks)).await
    }
}

#[async_trait]
impl Store for FaultyStore {
    async fn close(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

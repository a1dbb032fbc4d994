//! A store that is too busy to settle jobs at first, and that writes several at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use metadata_store::{
    BatchStore, DurableState, FinaliseError, Finalised, JobKey, JobRecord, JobStore, KeptNote, Lease, NewJob, NewNote,
    ReassignError, Reassignment, RecordPage, ReserveError, Reserved, Settlement, SqliteStore, Store, StoreError,
    TerminalState, UsageCursor, UsageRecord,
};
use protocol::jobs::{DeadLetter, DeadLetterPage, DeadLetterPurge, DeadLetterQuery, JobQuery};
use protocol::presence::HighWater;
use protocol::quota::QuotaUsage;
use protocol::{CorrelationId, TenantId, UnixMillis, WireError, WorkerId};
use tether_orchestrator::Config;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::stand::{Manner, Worker, stand_on, submit};

/// Refuses the first settlements, writes jobs once so many are there, and passes all else on to a real store.
struct BusyStore {
    store: SqliteStore,
    refusals_left: AtomicU32,
    together: Barrier,
}

impl BusyStore {
    fn new(refusals: u32, together: usize) -> Arc<Self> {
        let store = SqliteStore::in_memory().expect("a store");
        Arc::new(Self { store, refusals_left: AtomicU32::new(refusals), together: Barrier::new(together) })
    }
}

#[async_trait]
#[rustfmt::skip] // One line a method that is passed on.
impl JobStore for BusyStore {
    async fn finalise(&self, settlement: Settlement) -> Result<Finalised, FinaliseError> {
        let less = |left: u32| left.checked_sub(1);
        match self.refusals_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less) {
            Ok(_) => Err(StoreError::Overloaded.into()),
            Err(_) => self.store.finalise(settlement).await,
        }
    }

    async fn reserve(&self, job: NewJob) -> Result<Reserved, ReserveError> {
        self.together.wait().await;
        self.store.reserve(job).await
    }

    async fn reassign(&self, to: Reassignment) -> Result<(), ReassignError> { self.store.reassign(to).await }
    async fn renew(&self, leases: Vec<Lease>, until: UnixMillis) -> Result<Vec<Lease>, StoreError> { self.store.renew(leases, until).await }
    async fn release_expired(&self, now: UnixMillis, limit: u32) -> Result<Vec<JobRecord>, StoreError> { self.store.release_expired(now, limit).await }
    async fn release_orphans(&self, now: UnixMillis) -> Result<Vec<JobRecord>, StoreError> { self.store.release_orphans(now).await }
    fn batches(&self) -> &dyn BatchStore { self.store.batches() }
    async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, StoreError> { self.store.job(key).await }
    async fn answer(&self, key: &JobKey, now: UnixMillis) -> Result<Option<Vec<u8>>, StoreError> { self.store.answer(key, now).await }
    async fn prune_answers(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError> { self.store.prune_answers(now, bytes_max, limit).await }
    async fn keep_note(&self, note: NewNote) -> Result<(), StoreError> { self.store.keep_note(note).await }
    async fn note(&self, tenant: &TenantId, id: CorrelationId, now: UnixMillis) -> Result<Option<KeptNote>, StoreError> { self.store.note(tenant, id, now).await }
    async fn fail_note(&self, key: &JobKey, error: WireError) -> Result<(), StoreError> { self.store.fail_note(key, error).await }
    async fn remove_note(&self, tenant: &TenantId, id: CorrelationId) -> Result<bool, StoreError> { self.store.remove_note(tenant, id).await }
    async fn prune_notes(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError> { self.store.prune_notes(now, bytes_max, limit).await }
    async fn jobs_of(&self, id: CorrelationId) -> Result<Vec<JobRecord>, StoreError> { self.store.jobs_of(id).await }
    async fn list_jobs(&self, query: JobQuery) -> Result<RecordPage, StoreError> { self.store.list_jobs(query).await }
    async fn prune(&self, before: UnixMillis, limit: u32) -> Result<u32, StoreError> { self.store.prune(before, limit).await }
    async fn list_dead_letters(&self, query: DeadLetterQuery) -> Result<DeadLetterPage, StoreError> { self.store.list_dead_letters(query).await }
    async fn dead_letter(&self, id: CorrelationId) -> Result<Option<(DeadLetter, Option<Vec<u8>>)>, StoreError> { self.store.dead_letter(id).await }
    async fn purge_dead_letters(&self, purge: DeadLetterPurge) -> Result<u64, StoreError> { self.store.purge_dead_letters(purge).await }
    async fn count_dead_letters(&self) -> Result<u64, StoreError> { self.store.count_dead_letters().await }
    async fn active_reservations(&self) -> Result<Vec<(WorkerId, u32)>, StoreError> { self.store.active_reservations().await }
    async fn usage(&self, tenant: &TenantId, after: UsageCursor, limit: u32) -> Result<Vec<UsageRecord>, StoreError> { self.store.usage(tenant, after, limit).await }
    async fn quota_usage(&self, tenant: &TenantId, now: UnixMillis) -> Result<QuotaUsage, StoreError> { self.store.quota_usage(tenant, now).await }
    async fn quota_tenants(&self, now: UnixMillis, limit: u32) -> Result<Vec<TenantId>, StoreError> { self.store.quota_tenants(now, limit).await }
    async fn high_waters(&self) -> Result<Vec<(WorkerId, HighWater)>, StoreError> { self.store.high_waters().await }
    async fn raise_high_water(&self, marks: Vec<(WorkerId, HighWater)>) -> Result<(), StoreError> { self.store.raise_high_water(marks).await }
}

#[async_trait]
impl Store for BusyStore {
    async fn close(&self) -> Result<(), StoreError> {
        self.store.close().await
    }
}

#[tokio::test]
async fn an_answer_is_settled_and_billed_however_busy_the_store_was() {
    let stand = stand_on(BusyStore::new(4, 1), Config::default()).await;
    stand.worker(1, Manner::Answer(2)).await;
    let job = stand.job();
    assert_eq!(stand.answer(&job).await.expect("answered").len(), 3);
    let record = stand.record(&job).await.expect("kept");
    assert_eq!(record.state, DurableState::Settled(TerminalState::Completed));
    assert_eq!(stand.usage().await.len(), 1);
}

#[tokio::test]
async fn a_burst_spreads_over_idle_workers_before_anything_of_it_is_written() {
    const BURST: usize = 12;
    let stand = stand_on(BusyStore::new(0, BURST), Config::default()).await;
    let mut workers = vec![];
    for number in 1..=3 {
        workers.push(stand.worker(number, Manner::Hang).await);
    }
    let mut burst = JoinSet::new();
    for _ in 0..BURST {
        let (gateway, orchestrator, job) = (stand.gateway.clone(), stand.orchestrator, stand.job());
        burst.spawn(async move { submit(&gateway, orchestrator, &job).await });
    }
    assert!(burst.join_all().await.iter().all(Result::is_ok));
    assert_eq!(workers.iter().map(Worker::jobs_seen).collect::<Vec<_>>(), [4, 4, 4]);
}

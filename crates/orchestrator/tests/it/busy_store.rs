//! A store that is too busy to settle jobs at first, and that writes several at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use metadata_store::{
    FinaliseError, Finalised, InviteRecord, JobKey, JobRecord, JobState, MetadataStore, NewCertificate, NewJob,
    NodeRecord, PutAdapterError, PutInviteError, PutModelError, PutTokenError, ReassignError, Reassignment, Redemption,
    ReserveError, Reserved, Revocation, Settlement, SqliteStore, StoreError, TerminalState, TokenRecord, UsageCursor,
    UsageRecord,
};
use protocol::model::{AdapterEntry, AdapterKey, AliasEntry, ModelEntry, ModelKey};
use protocol::policy::TenantPolicy;
use protocol::presence::HighWater;
use protocol::{CorrelationId, InviteId, ModelName, PublicKey, TenantId, UnixMillis, WorkerId};
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
impl MetadataStore for BusyStore {
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
    async fn renew(&self, keys: Vec<JobKey>, until: UnixMillis) -> Result<Vec<JobKey>, StoreError> { self.store.renew(keys, until).await }
    async fn release_expired(&self, now: UnixMillis, limit: u32) -> Result<Vec<JobRecord>, StoreError> { self.store.release_expired(now, limit).await }
    async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, StoreError> { self.store.job(key).await }
    async fn job_by_correlation(&self, tenant: &TenantId, id: CorrelationId) -> Result<Option<JobRecord>, StoreError> { self.store.job_by_correlation(tenant, id).await }
    async fn active_reservations(&self) -> Result<Vec<(WorkerId, u32)>, StoreError> { self.store.active_reservations().await }
    async fn usage(&self, tenant: &TenantId, after: UsageCursor, limit: u32) -> Result<Vec<UsageRecord>, StoreError> { self.store.usage(tenant, after, limit).await }
    async fn put_token(&self, token: TokenRecord) -> Result<(), PutTokenError> { self.store.put_token(token).await }
    async fn token(&self, key_id: &str) -> Result<Option<TokenRecord>, StoreError> { self.store.token(key_id).await }
    async fn tokens(&self) -> Result<Vec<TokenRecord>, StoreError> { self.store.tokens().await }
    async fn revoke_token(&self, key_id: &str, now: UnixMillis) -> Result<bool, StoreError> { self.store.revoke_token(key_id, now).await }
    async fn put_policy(&self, tenant: &TenantId, policy: &TenantPolicy) -> Result<(), StoreError> { self.store.put_policy(tenant, policy).await }
    async fn policy(&self, tenant: &TenantId) -> Result<Option<TenantPolicy>, StoreError> { self.store.policy(tenant).await }
    async fn tenants(&self) -> Result<Vec<(TenantId, TenantPolicy)>, StoreError> { self.store.tenants().await }
    async fn put_model(&self, entry: ModelEntry) -> Result<(), PutModelError> { self.store.put_model(entry).await }
    async fn models(&self) -> Result<Vec<ModelEntry>, StoreError> { self.store.models().await }
    async fn keep_model(&self, key: &ModelKey, pin: bool, keep_alive_secs: Option<i64>) -> Result<bool, StoreError> {
        self.store.keep_model(key, pin, keep_alive_secs).await
    }

    async fn remove_model(&self, key: &ModelKey) -> Result<bool, StoreError> { self.store.remove_model(key).await }
    async fn put_adapter(&self, entry: AdapterEntry) -> Result<(), PutAdapterError> { self.store.put_adapter(entry).await }
    async fn adapters(&self) -> Result<Vec<AdapterEntry>, StoreError> { self.store.adapters().await }
    async fn remove_adapter(&self, key: &AdapterKey) -> Result<bool, StoreError> { self.store.remove_adapter(key).await }
    async fn put_alias(&self, entry: AliasEntry) -> Result<bool, StoreError> { self.store.put_alias(entry).await }
    async fn aliases(&self) -> Result<Vec<AliasEntry>, StoreError> { self.store.aliases().await }
    async fn remove_alias(&self, alias: &ModelName) -> Result<bool, StoreError> { self.store.remove_alias(alias).await }
    async fn put_invite(&self, invite: InviteRecord) -> Result<(), PutInviteError> { self.store.put_invite(invite).await }
    async fn invite(&self, id: InviteId) -> Result<Option<InviteRecord>, StoreError> { self.store.invite(id).await }
    async fn redeem_invite(&self, id: InviteId, node: PublicKey, now: UnixMillis) -> Result<Redemption, StoreError> { self.store.redeem_invite(id, node, now).await }
    async fn put_certificate(&self, certificate: NewCertificate) -> Result<u64, StoreError> { self.store.put_certificate(certificate).await }
    async fn node(&self, key: PublicKey) -> Result<Option<NodeRecord>, StoreError> { self.store.node(key).await }
    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> { self.store.nodes().await }
    async fn rename_node(&self, key: PublicKey, name: &str) -> Result<bool, StoreError> { self.store.rename_node(key, name).await }
    async fn revoke_node(&self, key: PublicKey, now: UnixMillis) -> Result<u64, StoreError> { self.store.revoke_node(key, now).await }
    async fn revocations(&self) -> Result<Vec<Revocation>, StoreError> { self.store.revocations().await }
    async fn next_epoch(&self, node: PublicKey) -> Result<u64, StoreError> { self.store.next_epoch(node).await }
    async fn high_water(&self, worker: WorkerId) -> Result<Option<HighWater>, StoreError> { self.store.high_water(worker).await }
    async fn high_waters(&self) -> Result<Vec<(WorkerId, HighWater)>, StoreError> { self.store.high_waters().await }
    async fn raise_high_water(&self, marks: Vec<(WorkerId, HighWater)>) -> Result<(), StoreError> { self.store.raise_high_water(marks).await }
    async fn close(&self) -> Result<(), StoreError> { self.store.close().await }
}

#[tokio::test]
async fn an_answer_is_settled_and_billed_however_busy_the_store_was() {
    let stand = stand_on(BusyStore::new(4, 1), Config::default()).await;
    stand.worker(1, Manner::Answer(2)).await;
    let job = stand.job();
    assert_eq!(stand.answer(&job).await.expect("answered").len(), 3);
    let record = stand.record(&job).await.expect("kept");
    assert_eq!(record.state, JobState::Settled(TerminalState::Completed));
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

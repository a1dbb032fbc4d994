//! [`JobStore`] in SQLite: what each call reads or writes.

use async_trait::async_trait;
use protocol::jobs::{DeadLetter, DeadLetterPage, DeadLetterPurge, DeadLetterQuery, JobQuery};
use protocol::presence::HighWater;
use protocol::quota::QuotaUsage;
use protocol::{CorrelationId, TenantId, UnixMillis, WireError, WorkerId};

use super::{SqliteStore, answers, dead_letters, jobs, notes, presence, quotas, reservations, usage};
use crate::batch_store::BatchStore;
use crate::job_store::{
    FinaliseError, Finalised, JobKey, JobRecord, JobStore, KeptNote, Lease, NewJob, NewNote, ReassignError,
    Reassignment, RecordPage, ReserveError, Reserved, Settlement, UsageCursor, UsageRecord,
};
use crate::store::StoreError;

#[async_trait]
impl JobStore for SqliteStore {
    async fn reserve(&self, job: NewJob) -> Result<Reserved, ReserveError> {
        // From here on, not all reservations are those of the process before.
        self.takes_orphans();
        self.write(move |connection| reservations::reserve(connection, &job)).await?
    }

    async fn reassign(&self, reassignment: Reassignment) -> Result<(), ReassignError> {
        self.write(move |connection| reservations::reassign(connection, &reassignment)).await?
    }

    async fn finalise(&self, settlement: Settlement) -> Result<Finalised, FinaliseError> {
        self.write(move |connection| jobs::finalise(connection, &settlement)).await?
    }

    async fn renew(&self, leases: Vec<Lease>, lease_until: UnixMillis) -> Result<Vec<Lease>, StoreError> {
        self.write(move |connection| reservations::renew(connection, &leases, lease_until)).await
    }

    async fn release_expired(&self, now: UnixMillis, limit: u32) -> Result<Vec<JobRecord>, StoreError> {
        self.write(move |connection| reservations::release_expired(connection, now, limit)).await
    }

    async fn release_orphans(&self, now: UnixMillis) -> Result<Vec<JobRecord>, StoreError> {
        if !self.takes_orphans() {
            return Ok(vec![]);
        }
        self.write(move |connection| reservations::release_all(connection, now)).await
    }

    fn batches(&self) -> &dyn BatchStore {
        self
    }

    async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, StoreError> {
        let key = key.clone();
        self.read(move |connection| jobs::find(connection, &key)).await
    }

    async fn answer(&self, key: &JobKey, now: UnixMillis) -> Result<Option<Vec<u8>>, StoreError> {
        let key = key.clone();
        self.read(move |connection| answers::find(connection, &key, now)).await
    }

    async fn prune_answers(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError> {
        let expired = self.write(move |connection| answers::remove_expired(connection, now, limit)).await?;
        // The choice reads every row, which must not hold up other writes.
        let left = limit.saturating_sub(expired);
        let victims = self.read(move |connection| answers::victims(connection, bytes_max, left)).await?;
        if victims.is_empty() {
            return Ok(expired);
        }
        Ok(expired + self.write(move |connection| answers::remove(connection, &victims)).await?)
    }

    async fn keep_note(&self, note: NewNote) -> Result<(), StoreError> {
        self.write(move |connection| notes::keep(connection, &note)).await
    }

    async fn note(
        &self,
        tenant_id: &TenantId,
        id: CorrelationId,
        now: UnixMillis,
    ) -> Result<Option<KeptNote>, StoreError> {
        let tenant_id = tenant_id.clone();
        self.read(move |connection| notes::find(connection, &tenant_id, id, now)).await
    }

    async fn fail_note(&self, key: &JobKey, error: WireError) -> Result<(), StoreError> {
        let key = key.clone();
        self.write(move |connection| notes::fail(connection, &key, &error)).await
    }

    async fn remove_note(&self, tenant_id: &TenantId, id: CorrelationId) -> Result<bool, StoreError> {
        let tenant_id = tenant_id.clone();
        self.write(move |connection| notes::remove(connection, &tenant_id, id)).await
    }

    async fn prune_notes(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError> {
        let expired = self.write(move |connection| notes::remove_expired(connection, now, limit)).await?;
        let left = limit.saturating_sub(expired);
        let victims = self.read(move |connection| notes::victims(connection, bytes_max, left)).await?;
        if victims.is_empty() {
            return Ok(expired);
        }
        Ok(expired + self.write(move |connection| notes::remove_all(connection, &victims)).await?)
    }

    async fn jobs_of(&self, id: CorrelationId) -> Result<Vec<JobRecord>, StoreError> {
        self.read(move |connection| jobs::of_request(connection, &id)).await
    }

    async fn list_jobs(&self, query: JobQuery) -> Result<RecordPage, StoreError> {
        self.read(move |connection| jobs::list(connection, &query)).await
    }

    async fn prune(&self, settled_before: UnixMillis, limit: u32) -> Result<u32, StoreError> {
        self.write(move |connection| jobs::prune(connection, settled_before, limit)).await
    }

    async fn list_dead_letters(&self, query: DeadLetterQuery) -> Result<DeadLetterPage, StoreError> {
        self.read(move |connection| dead_letters::list(connection, &query)).await
    }

    async fn dead_letter(&self, id: CorrelationId) -> Result<Option<(DeadLetter, Option<Vec<u8>>)>, StoreError> {
        self.read(move |connection| dead_letters::newest_of(connection, &id)).await
    }

    async fn purge_dead_letters(&self, purge: DeadLetterPurge) -> Result<u64, StoreError> {
        self.write(move |connection| dead_letters::purge(connection, &purge)).await
    }

    async fn count_dead_letters(&self) -> Result<u64, StoreError> {
        self.read(dead_letters::count).await
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

    async fn quota_usage(&self, tenant_id: &TenantId, now: UnixMillis) -> Result<QuotaUsage, StoreError> {
        let tenant_id = tenant_id.clone();
        self.read(move |connection| quotas::of_tenant(connection, &tenant_id, now)).await
    }

    async fn quota_tenants(&self, now: UnixMillis, limit: u32) -> Result<Vec<TenantId>, StoreError> {
        self.read(move |connection| quotas::tenants(connection, now, limit)).await
    }

    async fn high_waters(&self) -> Result<Vec<(WorkerId, HighWater)>, StoreError> {
        self.read(presence::high_waters).await
    }

    async fn raise_high_water(&self, marks: Vec<(WorkerId, HighWater)>) -> Result<(), StoreError> {
        self.write(move |connection| presence::raise(connection, &marks)).await
    }
}

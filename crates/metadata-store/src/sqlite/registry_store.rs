//! [`RegistryStore`] in SQLite: what each call reads or writes.

use async_trait::async_trait;
use protocol::model::{AdapterEntry, AdapterKey, AliasEntry, ModelEntry, ModelKey};
use protocol::policy::TenantPolicy;
use protocol::{InviteId, ModelName, PublicKey, TenantId, UnixMillis};

use super::{SqliteStore, adapters, aliases, membership, models, policies, tokens};
use crate::registry_store::{
    InviteRecord, NewCertificate, NodeRecord, PutAdapterError, PutInviteError, PutModelError, PutTokenError,
    Redemption, RegistryStore, Revocation, TokenRecord,
};
use crate::store::StoreError;

#[async_trait]
impl RegistryStore for SqliteStore {
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

    async fn policies(&self) -> Result<Vec<(TenantId, TenantPolicy)>, StoreError> {
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
        self.write(move |connection| membership::put_invite(connection, &invite)).await?
    }

    async fn invite(&self, invite_id: InviteId) -> Result<Option<InviteRecord>, StoreError> {
        self.read(move |connection| membership::invite(connection, invite_id)).await
    }

    async fn redeem_invite(
        &self,
        invite_id: InviteId,
        node: PublicKey,
        now: UnixMillis,
    ) -> Result<Redemption, StoreError> {
        self.write(move |connection| membership::redeem_invite(connection, invite_id, node, now)).await
    }

    async fn put_certificate(&self, certificate: NewCertificate) -> Result<u64, StoreError> {
        self.write(move |connection| membership::put_certificate(connection, &certificate)).await
    }

    async fn node(&self, public_key: PublicKey) -> Result<Option<NodeRecord>, StoreError> {
        self.read(move |connection| membership::node(connection, public_key)).await
    }

    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        self.read(membership::nodes).await
    }

    async fn rename_node(&self, public_key: PublicKey, name: &str) -> Result<bool, StoreError> {
        let name = name.to_owned();
        self.write(move |connection| membership::rename_node(connection, public_key, &name)).await
    }

    async fn revoke_node(&self, public_key: PublicKey, now: UnixMillis) -> Result<u64, StoreError> {
        self.write(move |connection| membership::revoke_node(connection, public_key, now)).await
    }

    async fn revocations(&self) -> Result<Vec<Revocation>, StoreError> {
        self.read(membership::revocations).await
    }
}

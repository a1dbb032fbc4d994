//! The registry's store: tokens, policies, models with their adapters and aliases, invites, nodes, revocations.

use async_trait::async_trait;
use protocol::control::{NodeRole, Scope};
use protocol::model::{AdapterEntry, AdapterKey, AliasEntry, ModelEntry, ModelKey};
use protocol::policy::TenantPolicy;
use protocol::{Digest, InviteId, ModelName, PublicKey, Region, TenantId, UnixMillis};

use crate::store::{Store, StoreError};

/// Stores the catalogue of models, the tokens and policies of tenants, and the nodes of the pool.
#[async_trait]
pub trait RegistryStore: Store {
    async fn put_token(&self, token: TokenRecord) -> Result<(), PutTokenError>;

    /// Returns the token with a key id, even if it is revoked or expired.
    async fn token(&self, key_id: &str) -> Result<Option<TokenRecord>, StoreError>;

    /// Returns every token, the oldest first.
    async fn tokens(&self) -> Result<Vec<TokenRecord>, StoreError>;

    /// Revokes a token; returns false if it does not exist. The first revocation keeps its time.
    async fn revoke_token(&self, key_id: &str, now: UnixMillis) -> Result<bool, StoreError>;

    /// Sets a tenant's policy.
    async fn put_policy(&self, tenant_id: &TenantId, policy: &TenantPolicy) -> Result<(), StoreError>;

    /// Returns a tenant's policy, if it has one.
    async fn policy(&self, tenant_id: &TenantId) -> Result<Option<TenantPolicy>, StoreError>;

    /// Returns every tenant's policy, ordered by tenant.
    async fn policies(&self) -> Result<Vec<(TenantId, TenantPolicy)>, StoreError>;

    /// Registers a model version. The same digest again updates its context length, description and facts; another
    /// digest is refused.
    async fn put_model(&self, entry: ModelEntry) -> Result<(), PutModelError>;

    /// Returns every model version, by name and then by version.
    async fn models(&self) -> Result<Vec<ModelEntry>, StoreError>;

    /// Sets how long workers keep a model version in memory; returns false if it does not exist. [`Self::put_model`]
    /// does not change this.
    async fn keep_model(&self, key: &ModelKey, pin: bool, keep_alive_secs: Option<i64>) -> Result<bool, StoreError>;

    /// Removes a model version and its adapters; returns false if it does not exist.
    async fn remove_model(&self, key: &ModelKey) -> Result<bool, StoreError>;

    /// Registers an adapter of a model version. The same digest again updates its description; another digest is
    /// refused.
    async fn put_adapter(&self, entry: AdapterEntry) -> Result<(), PutAdapterError>;

    /// Returns every adapter, by model and then by name.
    async fn adapters(&self) -> Result<Vec<AdapterEntry>, StoreError>;

    /// Removes an adapter; returns false if it does not exist.
    async fn remove_adapter(&self, key: &AdapterKey) -> Result<bool, StoreError>;

    /// Sets what an alias stands for; returns false if a model that is not one of its targets has its name. The caller
    /// checks that the targets exist.
    async fn put_alias(&self, entry: AliasEntry) -> Result<bool, StoreError>;

    /// Returns every alias, by name.
    async fn aliases(&self) -> Result<Vec<AliasEntry>, StoreError>;

    /// Removes an alias; returns false if it does not exist.
    async fn remove_alias(&self, alias: &ModelName) -> Result<bool, StoreError>;

    /// Adds an invite that is not yet redeemed.
    async fn put_invite(&self, invite: InviteRecord) -> Result<(), PutInviteError>;

    /// Returns an invite, even if it is redeemed or expired.
    async fn invite(&self, invite_id: InviteId) -> Result<Option<InviteRecord>, StoreError>;

    /// Redeems an invite for a node, unless another node has redeemed it. The caller checks its secret and expiry.
    async fn redeem_invite(
        &self,
        invite_id: InviteId,
        node: PublicKey,
        now: UnixMillis,
    ) -> Result<Redemption, StoreError>;

    /// Records a node's next certificate and returns its serial number, greater than all earlier ones.
    async fn put_certificate(&self, certificate: NewCertificate) -> Result<u64, StoreError>;

    /// Returns a node with its last certificate, even if it is expelled.
    async fn node(&self, public_key: PublicKey) -> Result<Option<NodeRecord>, StoreError>;

    /// Returns every node that was ever enrolled, in order of enrolment.
    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError>;

    /// Renames a node; returns false if it does not exist.
    async fn rename_node(&self, public_key: PublicKey, name: &str) -> Result<bool, StoreError>;

    /// Expels a key, known or not, and returns the version of the list that names it. A second call changes nothing.
    ///
    /// Versions ascend and are never below the current time, so that they ascend even after a store is lost.
    async fn revoke_node(&self, public_key: PublicKey, now: UnixMillis) -> Result<u64, StoreError>;

    /// Returns the expelled keys, by version.
    async fn revocations(&self) -> Result<Vec<Revocation>, StoreError>;
}

/// An API token as stored, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRecord {
    pub key_id: String,
    pub tenant_id: TenantId,
    /// Keyed hash of the secret.
    pub hash: [u8; 32],
    pub scopes: Vec<Scope>,
    pub name: String,
    pub created_at: UnixMillis,
    pub expires_at: Option<UnixMillis>,
    pub revoked_at: Option<UnixMillis>,
}

/// An invite as stored, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InviteRecord {
    pub invite_id: InviteId,
    /// Keyed hash of the secret.
    pub hash: [u8; 32],
    /// Display name of the node it is for.
    pub name: String,
    /// The roles the node may have.
    pub roles: Vec<NodeRole>,
    /// The regions it is allowed in; empty for all.
    pub regions: Vec<Region>,
    /// The models it may serve; empty for all.
    pub models: Vec<ModelName>,
    pub created_at: UnixMillis,
    pub expires_at: UnixMillis,
    /// Who redeemed it, and when.
    pub redeemed: Option<InviteRedemption>,
}

/// The one use of an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InviteRedemption {
    /// The node that redeemed it.
    pub node: PublicKey,
    pub at: UnixMillis,
}

/// Outcome of redeeming an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redemption {
    /// This call redeemed it.
    Done,
    /// The same node had redeemed it before.
    Again,
    Used,
    /// There is no such invite.
    Unknown,
}

/// A certificate to record before it is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCertificate {
    pub public_key: PublicKey,
    pub name: String,
    /// The roles it may have.
    pub roles: Vec<NodeRole>,
    /// The regions it is allowed in; empty for all.
    pub regions: Vec<Region>,
    /// The models it may serve; empty for all.
    pub models: Vec<ModelName>,
    pub not_before: UnixMillis,
    pub not_after: UnixMillis,
    pub now: UnixMillis,
}

/// A node with its last certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    pub public_key: PublicKey,
    pub serial: u64,
    pub name: String,
    /// The roles it may have.
    pub roles: Vec<NodeRole>,
    /// The regions it is allowed in; empty for all.
    pub regions: Vec<Region>,
    /// The models it may serve; empty for all.
    pub models: Vec<ModelName>,
    /// When it was first admitted.
    pub joined_at: UnixMillis,
    /// When the certificate becomes valid.
    pub not_before: UnixMillis,
    pub not_after: UnixMillis,
    /// When the node was expelled, if it was.
    pub revoked_at: Option<UnixMillis>,
}

/// A key that was expelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revocation {
    pub public_key: PublicKey,
    /// The version of the list that first named it.
    pub version: u64,
    pub revoked_at: UnixMillis,
}

/// Why an invite could not be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutInviteError {
    /// The id is already in use.
    #[error("there is an invite {invite_id}")]
    Taken { invite_id: InviteId },
    #[error("could not write the invite")]
    Store(#[from] StoreError),
}

/// Why a token could not be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutTokenError {
    /// The key id is taken: make another token.
    #[error("key id {key_id} is taken")]
    Taken { key_id: String },
    #[error("could not write the token")]
    Store(#[from] StoreError),
}

/// Why a model could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutModelError {
    /// The version is registered with another artifact. Versions are immutable: register a new one.
    #[error("{key} is registered with digest {registered}; a version never changes, register a new one")]
    Conflict {
        key: ModelKey,
        /// The registered digest.
        registered: Digest,
    },
    #[error("could not write the model")]
    Store(#[from] StoreError),
}

/// Why an adapter could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutAdapterError {
    /// Its model is not registered.
    #[error("{model} is not registered")]
    NoModel { model: ModelKey },
    /// The name is registered with another artifact: remove it first, or choose another name.
    #[error("{key} is registered with digest {registered}; remove it first, or choose another name")]
    Conflict {
        key: AdapterKey,
        /// The registered digest.
        registered: Digest,
    },
    #[error("could not write the adapter")]
    Store(#[from] StoreError),
}

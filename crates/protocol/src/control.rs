//! Calls between the services: method names, and the messages they carry.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::health::{Activity, HealthReport};
use crate::id::{
    AdapterName, CorrelationId, Digest, InviteId, ModelName, ModelVersion, PublicKey, Region, TenantId, WorkerId,
};
use crate::infer::Degraded;
use crate::jobs::{AttemptRecord, JobInfo};
use crate::membership::Transcript;
use crate::model::{AdapterEntry, AliasEntry, ModelEntry, ModelFacts, ModelKey, ModelRef};
use crate::policy::{ServiceClass, TenantPolicy};
use crate::signature::Signed;

/// Any node: describes itself. [`Empty`] → [`NodeInfo`].
pub const NODE_DESCRIBE: &str = "node.describe";
/// Any node: confirms that it is alive. [`Empty`] → [`Empty`].
pub const NODE_PING: &str = "node.ping";
/// Orchestrator: takes a worker's signed report. [`Signed`] → [`Empty`].
pub const PRESENCE_REPORT: &str = "presence.report";
/// Worker: returns a signed report of its current state. [`Empty`] → [`Signed`].
pub const PRESENCE_DESCRIBE: &str = "presence.describe";
/// Orchestrator: lists the live workers. [`Empty`] → [`Fleet`].
pub const FLEET_LIST: &str = "fleet.list";
/// Orchestrator: lists the workers that have a file, for a worker that fetches it. [`ArtifactHoldersRequest`] →
/// [`ArtifactHolders`].
pub const ARTIFACT_HOLDERS: &str = "artifact.holders";
/// Orchestrator: tells how a job was placed. [`ExplainRequest`] → [`Decision`].
pub const JOB_EXPLAIN: &str = "job.explain";
/// Registry: checks an API token. [`TokenCheck`] → [`TokenGrant`].
pub const TOKEN_CHECK: &str = "registry.token.check";
/// Registry: lists the models and their adapters. [`Empty`] → [`Catalog`].
pub const CATALOG_LIST: &str = "registry.catalog.list";
/// Registry: lists a model that the calling worker offers. [`crate::model::ModelOffer`] → [`Empty`].
pub const MODEL_OFFER: &str = "registry.model.offer";
/// Registry: registers an adapter for an operator. [`ByOperator`] of an [`AdapterAdd`] → [`AdapterEntry`].
pub const ADAPTER_ADD: &str = "registry.adapter.add";
/// Registry: forgets an adapter for an operator. [`ByOperator`] of an [`AdapterRemove`] → [`AdapterRemoved`].
pub const ADAPTER_REMOVE: &str = "registry.adapter.remove";
/// Registry: registers a model for an operator. [`ByOperator`] of a [`ModelAdd`] → [`ModelEntry`].
pub const MODEL_ADD: &str = "registry.model.add";
/// Registry: removes a model for an operator. [`ByOperator`] of a [`ModelRemove`] → [`ModelRemoved`].
pub const MODEL_REMOVE: &str = "registry.model.remove";
/// Registry: sets for an operator how long workers keep a model in memory. [`ByOperator`] of a [`ModelKeep`] →
/// [`ModelEntry`].
pub const MODEL_KEEP: &str = "registry.model.keep";
/// Registry: sets an alias for an operator. [`ByOperator`] of an [`AliasSet`] → [`AliasEntry`].
pub const ALIAS_SET: &str = "registry.alias.set";
/// Registry: removes an alias for an operator. [`ByOperator`] of an [`AliasRemove`] → [`AliasRemoved`].
pub const ALIAS_REMOVE: &str = "registry.alias.remove";
/// Registry: checks that a token may operate the network. [`OperatorRequest`] → [`Empty`].
pub const OPERATOR_CHECK: &str = "registry.operator.check";
/// Registry: lists models, adapters and aliases to an operator. [`OperatorRequest`] → [`Catalog`].
pub const OPERATOR_CATALOG_LIST: &str = "registry.operator.catalog.list";
/// Orchestrator: makes every worker that serves a model load or unload it. Worker: loads or unloads it. [`ModelMove`] →
/// [`ModelResidency`].
pub const MODEL_MOVE: &str = "model.move";
/// Registry: returns a tenant's rules. [`PolicyRequest`] → [`TenantPolicy`].
pub const POLICY_GET: &str = "registry.policy.get";
/// Registry: returns a tenant's rules to an operator. [`ByOperator`] of a [`PolicyRequest`] → [`TenantPolicy`].
pub const OPERATOR_POLICY_GET: &str = "registry.operator.policy.get";
/// Registry: sets a tenant's rules for an operator. [`ByOperator`] of a [`crate::policy::PolicySet`] →
/// [`crate::policy::PolicySaved`].
pub const OPERATOR_POLICY_SET: &str = "registry.operator.policy.set";
/// Registry: lists the tenants' rules to an operator. [`OperatorRequest`] → [`crate::policy::PolicyList`].
pub const OPERATOR_POLICY_LIST: &str = "registry.operator.policy.list";

/// Any node: takes the caller's introduction and returns the callee's. [`Hello`] → [`Hello`].
pub const NODE_HELLO: &str = "node.hello";
/// Registry: makes an invite. [`InviteCreate`] → [`InviteCreated`].
pub const INVITE_CREATE: &str = "registry.invite.create";
/// Registry: redeems an invite and makes the caller a member. [`InviteRedeem`] → [`Enrolled`].
pub const INVITE_REDEEM: &str = "registry.invite.redeem";
/// Registry: renews a member's certificate. [`Empty`] → [`Enrolled`].
pub const CERTIFICATE_RENEW: &str = "registry.certificate.renew";
/// Registry: revokes a node. [`NodeRevoke`] → [`NodeRevoked`].
pub const NODE_REVOKE: &str = "registry.node.revoke";
/// Registry: renames a node. [`NodeRename`] → [`NodeRenamed`].
pub const NODE_RENAME: &str = "registry.node.rename";
/// Registry: issues a token to an operator. [`ByOperator`] of a [`TokenCreate`] → [`TokenCreated`].
pub const OPERATOR_TOKEN_CREATE: &str = "registry.operator.token.create";
/// Registry: lists the tokens to an operator. [`OperatorRequest`] → [`TokenList`].
pub const OPERATOR_TOKEN_LIST: &str = "registry.operator.token.list";
/// Registry: revokes a token for an operator. [`ByOperator`] of a [`TokenRevoke`] → [`TokenRevoked`].
pub const OPERATOR_TOKEN_REVOKE: &str = "registry.operator.token.revoke";
/// Registry: lists the nodes, including revoked ones. [`OperatorRequest`] → [`NodeList`].
pub const NODE_LIST: &str = "registry.node.list";
/// Registry: returns to a member what has changed in the pool. [`PoolStateRequest`] → [`PoolState`].
pub const POOL_STATE: &str = "pool.state";

/// Registry: returns its current time. [`Empty`] → [`ClockReading`].
pub const CLOCK_READ: &str = "registry.clock.read";

/// A message without content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Empty {}

/// A role of a node in the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Accepts requests from clients.
    Gateway,
    /// Places jobs on workers.
    Orchestrator,
    /// Manages models, tokens and members.
    Registry,
    /// Loads models and runs jobs.
    Worker,
}

/// A node's description of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeInfo {
    /// Roles that the node serves.
    pub roles: Vec<NodeRole>,
    /// Region of the node.
    pub region: Region,
    /// Version of the program.
    pub version: String,
}

/// A worker's signed report to an orchestrator.
pub type PresenceReport = Signed;

/// The live workers as one orchestrator sees them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Fleet {
    /// Live workers, in no particular order.
    pub workers: Vec<FleetWorker>,
}

/// A live worker as an orchestrator sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FleetWorker {
    /// Last accepted health report.
    pub report: HealthReport,
    /// Milliseconds since that report arrived.
    pub age_ms: u64,
    /// Number of jobs for which this orchestrator has reserved capacity on the worker.
    pub reserved: u32,
    /// Whether parts of the report are left out, because the list would be too large.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shortened: bool,
}

/// Asks which workers have a file of one of some models.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactHoldersRequest {
    /// Digest of the file.
    pub digest: Digest,
    /// The models that the file belongs to.
    pub models: Vec<ModelKey>,
}

/// The workers that have a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactHolders {
    /// Public keys of live workers that report one of the models. One of them may turn out not to have the file of an
    /// adapter.
    pub workers: Vec<WorkerId>,
}

/// An API token to check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenCheck {
    /// The token as the client sent it.
    pub token: String,
}

/// What a valid token allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenGrant {
    /// Public part of the token. Logs contain only this part.
    pub key_id: String,
    /// Tenant that the token belongs to.
    pub tenant_id: TenantId,
    /// What the token may do.
    pub scopes: Vec<Scope>,
    /// Policy of the tenant.
    pub policy: TenantPolicy,
    /// Expiry of the token; `None` for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMillis>,
}

/// A token to issue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenCreate {
    /// Tenant that the token belongs to.
    pub tenant_id: TenantId,
    /// Purpose of the token, for people.
    #[serde(default)]
    pub name: String,
    /// What the token may do.
    pub scopes: Vec<Scope>,
    /// Expiry of the token; `None` for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMillis>,
    /// New limit of the tenant's requests per minute; 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
}

/// A new token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenCreated {
    /// The whole token. It is returned only once.
    pub token: String,
    /// Public part of the token.
    pub key_id: String,
    /// Tenant that the token belongs to.
    pub tenant_id: TenantId,
}

/// Every token, without its secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenList {
    /// All tokens, oldest first.
    pub tokens: Vec<TokenInfo>,
}

/// Public data of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenInfo {
    /// Public part of the token.
    pub key_id: String,
    /// Tenant that the token belongs to.
    pub tenant_id: TenantId,
    /// Purpose of the token, for people.
    pub name: String,
    /// What the token may do.
    pub scopes: Vec<Scope>,
    /// Time of creation.
    pub created_at: UnixMillis,
    /// Expiry of the token; `None` for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMillis>,
    /// Time of revocation; absent if the token is not revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<UnixMillis>,
}

/// A token to revoke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenRevoke {
    /// Public part of the token.
    pub key_id: String,
}

/// Result of revoking a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenRevoked {
    /// Whether the token existed.
    pub found: bool,
}

/// What a token may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// May submit jobs.
    Infer,
    /// May call the admin API.
    Admin,
}

/// The models, adapters and aliases of the registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Catalog {
    /// Each version of each model.
    pub models: Vec<ModelEntry>,
    /// Each adapter of each version.
    #[serde(default)]
    pub adapters: Vec<AdapterEntry>,
    /// Aliases, ordered by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<AliasEntry>,
}

impl Catalog {
    /// Returns the models that an operator added and that have an artifact as their file or as an adapter. Nodes may
    /// fetch the artifact from each other for these models.
    pub fn added_with(&self, digest: &Digest) -> Vec<ModelKey> {
        let added = self.models.iter().filter(|model| model.added);
        let has = |model: &ModelEntry| {
            let adapters = self.adapters.iter().filter(|adapter| adapter.key.model == model.key);
            model.digest == *digest || adapters.into_iter().any(|adapter| adapter.digest == *digest)
        };
        added.filter(|model| has(model)).map(|model| model.key.clone()).collect()
    }
}

/// A model to register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelAdd {
    /// Name of the model.
    pub model_id: ModelName,
    /// Version of the model. If omitted, it is the version that already has these bytes, or else the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// SHA-256 of the artifact.
    pub digest: Digest,
    /// Length of the artifact in bytes; at least 1.
    pub bytes: u64,
    /// Context length in tokens; at least 1.
    pub context_length: u32,
    /// One-line description for people.
    #[serde(default)]
    pub description: String,
    /// Facts from the model's file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<ModelFacts>,
}

/// A model to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelRemove {
    /// Name of the model.
    pub model_id: ModelName,
    /// Version of the model. It may be omitted if there is only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// Also removes the aliases that stand for the model. Without `force`, a model with aliases is not removed.
    #[serde(default)]
    pub force: bool,
}

/// How long workers keep a model in memory. Omitted fields are not changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelKeep {
    /// Name of the model.
    pub model_id: ModelName,
    /// Version of the model. It may be omitted if there is only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// Whether workers never unload the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
    /// Seconds without work after which workers unload the model; -1 for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
}

/// A model to load into memory, or to unload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelMove {
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// Whether to load the model; `false` unloads it.
    pub load: bool,
    /// Seconds without work for which the model stays in memory this time; -1 for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
}

/// Residency of a model on its workers, after a request to load or unload it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelResidency {
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// Workers that serve the model.
    pub workers: Vec<WorkerResidency>,
}

/// Residency of a model on one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerResidency {
    /// Worker that serves the model.
    pub worker_id: WorkerId,
    /// Whether the worker has it in memory.
    pub state: ResidencyState,
    /// Why the model is not in the requested state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Whether a model is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResidencyState {
    /// In memory and ready.
    Loaded,
    /// Being loaded.
    Loading,
    /// Not in memory.
    Unloaded,
    /// Still in memory, because jobs run on it.
    InUse,
    /// The load failed.
    Failed,
    /// The worker did not return a state.
    Unknown,
}

/// Result of removing a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelRemoved {
    /// Whether the model existed.
    pub found: bool,
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// Aliases that were removed with the model.
    pub aliases: Vec<ModelName>,
    /// Artifacts that nothing in the catalogue needs any more.
    pub unused: Vec<Digest>,
}

/// An alias to set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasSet {
    /// Name of the alias.
    pub alias: ModelName,
    /// Model that the alias stands for, as `name[@MAJOR.MINOR][:adapter]`; never another alias.
    pub target: ModelRef,
    /// Further models that the alias stands for, without adapters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<ModelRef>,
}

/// An alias to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasRemove {
    /// Name of the alias.
    pub alias: ModelName,
}

/// Result of removing an alias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasRemoved {
    /// Whether the alias existed.
    pub found: bool,
}

/// All aliases of the network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasList {
    /// Aliases, ordered by name.
    pub aliases: Vec<AliasEntry>,
}

/// An adapter to register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterAdd {
    /// Name of the model.
    pub model_id: ModelName,
    /// Version of the model; the newest if omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// Name of the adapter.
    pub adapter: AdapterName,
    /// SHA-256 of the artifact.
    pub digest: Digest,
    /// Length of the artifact in bytes.
    pub bytes: u64,
    /// One-line description for people.
    #[serde(default)]
    pub description: String,
}

/// An adapter to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterRemove {
    /// Name of the model.
    pub model_id: ModelName,
    /// Version of the model; the newest if omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// Name of the adapter.
    pub adapter: AdapterName,
}

/// Result of removing an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterRemoved {
    /// Whether the adapter existed.
    pub found: bool,
}

/// The adapters of the registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterList {
    /// Adapters, ordered by model and then by name.
    pub adapters: Vec<AdapterEntry>,
}

/// Requests a tenant's rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRequest {
    /// Tenant whose policy this is.
    pub tenant_id: TenantId,
}

/// Introduces a node. It is sent first on each new connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Hello {
    /// Certificate of the node, if it has one: a signed [`crate::membership::Certificate`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Signed>,
    /// What the node says of its versions, bound to the connection. Nodes of version 1 of the protocol send none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transcript: Option<Transcript>,
}

/// An invite to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InviteCreate {
    /// API token with the scope `admin`. Over HTTP it is the token of the request.
    #[serde(default)]
    pub token: String,
    /// Roles that the node may have; at least one.
    pub roles: Vec<NodeRole>,
    /// Regions in which the node may act; empty for all.
    #[serde(default)]
    pub regions: Vec<Region>,
    /// Models that the node may serve as a worker; empty for all.
    #[serde(default)]
    pub models: Vec<ModelName>,
    /// Name of the node, for people.
    #[serde(default)]
    pub name: String,
    /// Seconds for which the invite is valid; at most 24 h, and 24 h if omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_secs: Option<u64>,
    /// Addresses in the invite, as `host:port`. If empty, it contains the registry's own.
    #[serde(default)]
    pub bootstrap: Vec<String>,
}

/// A new invite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InviteCreated {
    /// The whole invite. It is returned only once.
    pub invite: String,
    /// Public id of the invite.
    pub invite_id: InviteId,
    /// Expiry of the invite.
    pub expires_at: UnixMillis,
}

/// An invite to redeem. The certificate is for the key that the connection proved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InviteRedeem {
    /// Public id of the invite.
    pub invite_id: InviteId,
    /// Secret of the invite in hex.
    pub secret: String,
    /// Name of the node, for people; the name in the invite if omitted.
    #[serde(default)]
    pub name: String,
}

/// Certificate and revocation list of a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Enrolled {
    /// Certificate of the node: a signed [`crate::membership::Certificate`].
    pub certificate: Signed,
    /// Revoked nodes: a signed [`crate::membership::RevocationList`].
    pub revocations: Signed,
}

/// A node to revoke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRevoke {
    /// API token with the scope `admin`.
    pub token: String,
    /// Public key of the node.
    pub public_key: PublicKey,
}

/// Result of revoking a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRevoked {
    /// Whether the node was enrolled. It is revoked in either case.
    pub found: bool,
    /// Version of the revocation list that contains the node.
    pub version: u64,
}

/// A node to rename.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRename {
    /// API token with the scope `admin`. Over HTTP it is the token of the request.
    #[serde(default)]
    pub token: String,
    /// Public key of the node.
    pub public_key: PublicKey,
    /// New name of the node, for people.
    pub name: String,
}

/// Result of renaming a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRenamed {
    /// Whether the node was enrolled.
    pub found: bool,
}

/// A request of an operator to the registry. Any node may bring it: only the operator's token counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ByOperator<T> {
    /// API token with the scope `admin`.
    pub token: String,
    /// The request itself.
    pub request: T,
}

/// A request from an operator without further content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OperatorRequest {
    /// API token with the scope `admin`.
    pub token: String,
}

/// Every node that was ever enrolled.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeList {
    /// Nodes in order of enrolment.
    pub nodes: Vec<NodeEntry>,
}

/// A node in the registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeEntry {
    /// Public key of the node.
    pub public_key: PublicKey,
    /// Name of the node, for people.
    pub name: String,
    /// Roles that the node may have.
    pub roles: Vec<NodeRole>,
    /// Regions in which the node may act; empty for all.
    pub regions: Vec<Region>,
    /// Models that the node may serve; empty for all.
    pub models: Vec<ModelName>,
    /// Serial number of the latest certificate.
    pub serial: u64,
    /// Time of enrolment.
    pub joined_at: UnixMillis,
    /// Expiry of the latest certificate.
    pub not_after: UnixMillis,
    /// Time of revocation; absent if the node is not revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<UnixMillis>,
}

/// Every node that was ever enrolled, as a gateway lists them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Members {
    /// Nodes in order of enrolment.
    pub members: Vec<Member>,
}

/// A node in the registry, and whether it responds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// The node in the registry.
    #[serde(flatten)]
    pub node: NodeEntry,
    /// Whether the node responds to the gateway. Absent for revoked nodes and for workers, which report to
    /// orchestrators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<bool>,
}

/// Requests what has changed in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolStateRequest {
    /// Version of the caller's revocation list.
    pub version: u64,
}

/// What has changed in the pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolState {
    /// Version of the registry's revocation list.
    pub version: u64,
    /// The revocation list, if the caller has another version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revocations: Option<Signed>,
    /// A signed [`crate::membership::RevocationStamp`], made for this response. A node counts a registry that sends
    /// none as silent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<Signed>,
}

/// Current time of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClockReading {
    /// Current time by the node's wall clock.
    pub now: UnixMillis,
}

/// Requests how a job was placed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExplainRequest {
    /// Id of the job.
    pub correlation_id: CorrelationId,
}

/// How a job was placed: each attempt with its candidates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Id of the job.
    pub correlation_id: CorrelationId,
    /// Tenant of the job.
    pub tenant_id: TenantId,
    /// Attempts, in order. Once the orchestrator has forgotten the candidates, only attempts that had a worker are
    /// left.
    pub attempts: Vec<AttemptDecision>,
    /// The job's time in the queue. Absent if it never waited, or if the orchestrator has forgotten it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<QueueWait>,
    /// How the job was made cheaper, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded: Option<Degraded>,
    /// Weights of the terms of the scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<ScoreWeights>,
    /// The job, with the ends of its attempts. Absent if it never got a reservation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<Box<JobInfo>>,
}

impl Decision {
    /// Returns what is left of a job's decision without its candidates.
    pub fn without_candidates(job: &JobInfo) -> Self {
        let decision = |record: &AttemptRecord| AttemptDecision {
            attempt: record.attempt,
            chosen: Some(record.worker_id),
            outcome: record.outcome.clone(),
            candidates: vec![],
            refused: vec![],
        };
        Self {
            correlation_id: job.correlation_id,
            tenant_id: job.tenant_id.clone(),
            attempts: job.history.iter().map(decision).collect(),
            wait: None,
            degraded: None,
            weights: None,
            job: None,
        }
    }
}

/// How long a job waited for a free slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueueWait {
    /// Class of the job.
    pub class: ServiceClass,
    /// Milliseconds in the queue.
    pub waited_ms: u64,
    /// Why the queue refused the job, if it did: `queue_full`, `tenant_queue_full`, `over_share` or `wait_too_long`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shed: Option<String>,
}

/// Weights of the terms of a worker's score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScoreWeights {
    /// Weight of a loaded model and an attached adapter.
    pub model_match: f64,
    /// Weight of a near region.
    pub region_proximity: f64,
    /// Weight of free slots and a short queue.
    pub queue_depth: f64,
    /// Weight of the share of the prompt in the worker's prefix cache.
    pub warm_cache: f64,
    /// Weight of the speed relative to the fastest candidate.
    pub speed: f64,
}

/// One attempt of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptDecision {
    /// Number of the attempt, from 1.
    pub attempt: u32,
    /// Worker that was chosen; `None` if no candidate was left.
    pub chosen: Option<WorkerId>,
    /// Outcome of the attempt.
    pub outcome: String,
    /// The best candidates with their scores, the best first; at most 64.
    pub candidates: Vec<CandidateScore>,
    /// Workers that could not be chosen, and why; at most 64.
    pub refused: Vec<RefusedWorker>,
}

/// A candidate's score and its terms, each between 0 and 1 before its weight is applied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CandidateScore {
    /// Worker that was scored.
    pub worker_id: WorkerId,
    /// Model that the worker would run, if several models may run the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelKey>,
    /// Whether its owner lets it take all jobs, or only those that find room on no other worker.
    #[serde(default, skip_serializing_if = "Activity::is_accepting")]
    pub activity: Activity,
    /// Weighted sum of the terms.
    pub score: f64,
    /// 1 if the model is in memory, 0.9 if an adapter must be attached, 0.5 if the model must be loaded.
    pub model_match: f64,
    /// 1 in the same region, less in regions farther away.
    pub region_proximity: f64,
    /// 1 when idle, 0.5 with all slots taken, less with a queue.
    pub queue_depth: f64,
    /// Share of the prompt in the worker's prefix cache.
    pub warm_cache: f64,
    /// Speed relative to the fastest candidate; 0.5 if unknown.
    pub speed: f64,
}

/// A worker that could not be chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RefusedWorker {
    /// Worker that was ruled out.
    pub worker_id: WorkerId,
    /// Model that the worker would have run, if several models may run the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelKey>,
    /// Reason, as a short word such as `no_adapter`.
    pub reason: String,
}

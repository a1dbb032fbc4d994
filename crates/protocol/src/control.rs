//! Calls between the services: method names, and the messages they carry.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::health::HealthReport;
use crate::id::{
    AdapterName, CorrelationId, Digest, InviteId, ModelName, ModelVersion, PublicKey, Region, TenantId, WorkerId,
};
use crate::model::{AdapterEntry, AliasEntry, ModelEntry, ModelFacts, ModelKey, ModelRef};
use crate::policy::TenantPolicy;
use crate::signature::Signed;

/// Any node: says what it is. [`Empty`] → [`NodeInfo`].
pub const NODE_DESCRIBE: &str = "node.describe";
/// Any node: says that it is there. [`Empty`] → [`Empty`].
pub const NODE_PING: &str = "node.ping";
/// Orchestrator: takes a worker's signed report. [`Signed`] → [`Empty`].
pub const PRESENCE_REPORT: &str = "presence.report";
/// Worker: signs a report of how it is now. [`Empty`] → [`Signed`].
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
/// Registry: lists a model of a server that the calling worker has adopted. [`crate::model::ModelOffer`] → [`Empty`].
pub const MODEL_OFFER: &str = "registry.model.offer";
/// Registry: registers an adapter for an operator. [`ByOperator`] of an [`AdapterAdd`] → [`AdapterEntry`].
pub const ADAPTER_ADD: &str = "registry.adapter.add";
/// Registry: forgets an adapter for an operator. [`ByOperator`] of an [`AdapterRemove`] → [`AdapterRemoved`].
pub const ADAPTER_REMOVE: &str = "registry.adapter.remove";
/// Registry: registers a model for an operator. [`ByOperator`] of a [`ModelAdd`] → [`ModelEntry`].
pub const MODEL_ADD: &str = "registry.model.add";
/// Registry: forgets a model for an operator. [`ByOperator`] of a [`ModelRemove`] → [`ModelRemoved`].
pub const MODEL_REMOVE: &str = "registry.model.remove";
/// Registry: says for an operator how long workers keep a model in memory. [`ByOperator`] of a [`ModelKeep`] →
/// [`ModelEntry`].
pub const MODEL_KEEP: &str = "registry.model.keep";
/// Registry: gives a model another name for an operator. [`ByOperator`] of an [`AliasSet`] → [`AliasEntry`].
pub const ALIAS_SET: &str = "registry.alias.set";
/// Registry: forgets an alias for an operator. [`ByOperator`] of an [`AliasRemove`] → [`AliasRemoved`].
pub const ALIAS_REMOVE: &str = "registry.alias.remove";
/// Registry: lists models, adapters and aliases to an operator. [`OperatorRequest`] → [`Catalog`].
pub const OPERATOR_CATALOG_LIST: &str = "registry.operator.catalog.list";
/// Orchestrator: has every worker that serves a model load or unload it. Worker: does so. [`ModelMove`] →
/// [`ModelResidency`].
pub const MODEL_MOVE: &str = "model.move";
/// Registry: tells a tenant's rules. [`PolicyRequest`] → [`TenantPolicy`].
pub const POLICY_GET: &str = "registry.policy.get";

/// Any node: introduces the caller, and takes the callee's introduction. [`Hello`] → [`Hello`].
pub const NODE_HELLO: &str = "node.hello";
/// Registry: makes an invite. [`InviteCreate`] → [`InviteCreated`].
pub const INVITE_CREATE: &str = "registry.invite.create";
/// Registry: takes an invite and makes the caller a member. [`InviteRedeem`] → [`Enrolled`].
pub const INVITE_REDEEM: &str = "registry.invite.redeem";
/// Registry: gives a member its next certificate. [`Empty`] → [`Enrolled`].
pub const CERTIFICATE_RENEW: &str = "registry.certificate.renew";
/// Registry: expels a node. [`NodeRevoke`] → [`NodeRevoked`].
pub const NODE_REVOKE: &str = "registry.node.revoke";
/// Registry: gives a node another name. [`NodeRename`] → [`NodeRenamed`].
pub const NODE_RENAME: &str = "registry.node.rename";
/// Registry: issues a token to an operator. [`ByOperator`] of a [`TokenCreate`] → [`TokenCreated`].
pub const OPERATOR_TOKEN_CREATE: &str = "registry.operator.token.create";
/// Registry: lists the tokens to an operator. [`OperatorRequest`] → [`TokenList`].
pub const OPERATOR_TOKEN_LIST: &str = "registry.operator.token.list";
/// Registry: revokes a token for an operator. [`ByOperator`] of a [`TokenRevoke`] → [`TokenRevoked`].
pub const OPERATOR_TOKEN_REVOKE: &str = "registry.operator.token.revoke";
/// Registry: lists the members and the expelled. [`OperatorRequest`] → [`NodeList`].
pub const NODE_LIST: &str = "registry.node.list";
/// Registry: tells a member what has changed in the pool. [`PoolStateRequest`] → [`PoolState`].
pub const POOL_STATE: &str = "pool.state";

/// Registry: tells what time it is there. [`Empty`] → [`ClockReading`].
pub const CLOCK_READ: &str = "registry.clock.read";

/// A message without content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Empty {}

/// What a node does in the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Accepts requests of clients.
    Gateway,
    /// Places jobs on workers.
    Orchestrator,
    /// Knows models and tokens.
    Registry,
    /// Loads models and runs jobs.
    Worker,
}

/// What a node says of itself when asked.
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

/// A worker's signed report on its way to an orchestrator.
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
    /// Milliseconds since that report came.
    pub age_ms: u64,
    /// Jobs this orchestrator has reserved on it.
    pub reserved: u32,
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
    /// The public part of the token; logs carry only this.
    pub key_id: String,
    /// Whose token it is.
    pub tenant_id: TenantId,
    /// What it may do.
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
    /// Whose token it is.
    pub tenant_id: TenantId,
    /// What it is for, for people.
    #[serde(default)]
    pub name: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// Expiry of the token; `None` for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMillis>,
    /// Sets the tenant's requests a minute; 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
}

/// A token that was issued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenCreated {
    /// The whole token, told this once.
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

/// What may be told of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenInfo {
    /// Public part of the token.
    pub key_id: String,
    /// Tenant that the token belongs to.
    pub tenant_id: TenantId,
    /// What it is for, for people.
    pub name: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// When it was made.
    pub created_at: UnixMillis,
    /// Expiry of the token; `None` for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMillis>,
    /// When it was revoked.
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

/// What came of a revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenRevoked {
    /// Whether there was such a token.
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

/// The models of the registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Catalog {
    /// Each version of each model.
    pub models: Vec<ModelEntry>,
    /// Each adapter of each version.
    #[serde(default)]
    pub adapters: Vec<AdapterEntry>,
    /// Other names of theirs, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<AliasEntry>,
}

impl Catalog {
    /// Returns the models that an artifact belongs to and that nodes may fetch from each other: those that an operator
    /// added, and whose file or adapter it is.
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
    /// The name to ask for it by.
    pub model_id: ModelName,
    /// Its version; missing for the one that has these bytes already, or the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// SHA-256 of the artifact.
    pub digest: Digest,
    /// Length of the artifact in bytes; at least 1.
    pub bytes: u64,
    /// Tokens of context; at least 1.
    pub context_length: u32,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// What its file says of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<ModelFacts>,
}

/// A model to forget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelRemove {
    /// The name of the model.
    pub model_id: ModelName,
    /// Its version; missing for the only one there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// Forgets the aliases that stand for it as well; without it, it stays while there are such.
    #[serde(default)]
    pub force: bool,
}

/// How long workers keep a model in memory. What is missing stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelKeep {
    /// The name of the model.
    pub model_id: ModelName,
    /// Its version; missing for the only one there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// Whether they keep it whatever happens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
    /// Seconds without work after which they unload it; -1 for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
}

/// A model that is to come into memory, or to leave it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelMove {
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// Whether it is to be in memory.
    pub load: bool,
    /// Seconds without work for which it stays there this time; -1 for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
}

/// Whether a model is in memory after an operator loaded or unloaded it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelResidency {
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// The workers that serve it.
    pub workers: Vec<WorkerResidency>,
}

/// Whether a model is in memory at one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerResidency {
    /// Worker that serves the model.
    pub worker_id: WorkerId,
    /// Whether the worker has it in memory.
    pub state: ResidencyState,
    /// Why it is not where it is wanted.
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
    /// Served, but not in memory.
    Unloaded,
    /// In memory, because jobs run on it.
    InUse,
    /// It could not be loaded.
    Failed,
    /// The worker does not say.
    Unknown,
}

/// What came of forgetting a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelRemoved {
    /// Whether there was such a model.
    pub found: bool,
    /// The model that was meant.
    #[serde(flatten)]
    pub key: ModelKey,
    /// The aliases that were forgotten with it.
    pub aliases: Vec<ModelName>,
    /// The artifacts that nothing in the catalogue needs any more.
    pub unused: Vec<Digest>,
}

/// Another name to give a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasSet {
    /// The name to give.
    pub alias: ModelName,
    /// What it stands for, as `name[@MAJOR.MINOR][:adapter]`; never another alias.
    pub target: ModelRef,
    /// What else it stands for, without adapters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<ModelRef>,
}

/// An alias to forget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasRemove {
    /// The name to forget.
    pub alias: ModelName,
}

/// What came of forgetting an alias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasRemoved {
    /// Whether there was such an alias.
    pub found: bool,
}

/// All aliases of the network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasList {
    /// The aliases by name.
    pub aliases: Vec<AliasEntry>,
}

/// An adapter to register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterAdd {
    /// Name of the model.
    pub model_id: ModelName,
    /// Its version; the newest where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// Name of the adapter.
    pub adapter: AdapterName,
    /// SHA-256 of the artifact.
    pub digest: Digest,
    /// Length of the artifact in bytes.
    pub bytes: u64,
    /// One line for people.
    #[serde(default)]
    pub description: String,
}

/// An adapter to forget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterRemove {
    /// Name of the model.
    pub model_id: ModelName,
    /// Its version; the newest where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<ModelVersion>,
    /// Name of the adapter.
    pub adapter: AdapterName,
}

/// What came of a removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterRemoved {
    /// Whether there was such an adapter.
    pub found: bool,
}

/// The adapters of the registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterList {
    /// By model and then by name.
    pub adapters: Vec<AdapterEntry>,
}

/// Asks for a tenant's rules.
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
    /// Its certificate, where it has one: a signed [`crate::admission::Certificate`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Signed>,
}

/// An invite to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InviteCreate {
    /// An API token that may operate the network. By HTTP it is the request's own.
    #[serde(default)]
    pub token: String,
    /// What the node may become; at least one role.
    pub roles: Vec<NodeRole>,
    /// Where; none for everywhere.
    #[serde(default)]
    pub regions: Vec<Region>,
    /// The models it may serve as a worker; none for all.
    #[serde(default)]
    pub models: Vec<ModelName>,
    /// Who it is for, for people.
    #[serde(default)]
    pub name: String,
    /// How long it is good for, at most 24 h; missing for 24 h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_secs: Option<u64>,
    /// Addresses it names, `host:port`; none for the registry's own.
    #[serde(default)]
    pub bootstrap: Vec<String>,
}

/// An invite that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InviteCreated {
    /// The whole invite, told this once.
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
    /// Its secret in hex.
    pub secret: String,
    /// The node's name, for people; missing for that of the invite.
    #[serde(default)]
    pub name: String,
}

/// What makes a node a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Enrolled {
    /// Its certificate: a signed [`crate::admission::Certificate`].
    pub certificate: Signed,
    /// The expelled nodes: a signed [`crate::admission::RevocationList`].
    pub revocations: Signed,
}

/// A node to expel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRevoke {
    /// An API token that may operate the network.
    pub token: String,
    /// Public key of the node.
    pub public_key: PublicKey,
}

/// What came of an expulsion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRevoked {
    /// Whether the registry had admitted such a node. It is expelled either way.
    pub found: bool,
    /// The version of the list that names it.
    pub version: u64,
}

/// A node to rename.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRename {
    /// An API token that may operate the network. By HTTP it is the request's own.
    #[serde(default)]
    pub token: String,
    /// Public key of the node.
    pub public_key: PublicKey,
    /// Its new name, for people.
    pub name: String,
}

/// What came of a new name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRenamed {
    /// Whether the registry had admitted such a node.
    pub found: bool,
}

/// A request of an operator to the registry. Any node may bring it: only the operator's token counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ByOperator<T> {
    /// An API token that may operate the network.
    pub token: String,
    /// What it asks for.
    pub request: T,
}

/// A request of an operator without further content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OperatorRequest {
    /// An API token that may operate the network.
    pub token: String,
}

/// Every node that was ever admitted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeList {
    /// The first admitted first.
    pub nodes: Vec<NodeEntry>,
}

/// A node as the registry knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeEntry {
    /// Public key of the node.
    pub public_key: PublicKey,
    /// Its name, for people.
    pub name: String,
    /// What it may be.
    pub roles: Vec<NodeRole>,
    /// Where; none for everywhere.
    pub regions: Vec<Region>,
    /// The models it may serve; none for all.
    pub models: Vec<ModelName>,
    /// The number of its last certificate.
    pub serial: u64,
    /// When it was first admitted.
    pub joined_at: UnixMillis,
    /// When its last certificate ends.
    pub not_after: UnixMillis,
    /// When it was expelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<UnixMillis>,
}

/// Every node that was ever admitted, as a gateway lists them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Members {
    /// The first admitted first.
    pub members: Vec<Member>,
}

/// A node as the registry knows it, and whether it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// What the registry knows.
    #[serde(flatten)]
    pub node: NodeEntry,
    /// Whether it answers the gateway. Workers are not asked: they report to orchestrators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<bool>,
}

/// Asks what has changed in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolStateRequest {
    /// The version of the revocation list the caller has.
    pub version: u64,
}

/// What has changed in the pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolState {
    /// Version of the revocation list that the caller has.
    pub version: u64,
    /// The list, where the caller has another version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revocations: Option<Signed>,
}

/// What time it is at a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClockReading {
    /// The time of day.
    pub now: UnixMillis,
}

/// Asks how a job was placed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExplainRequest {
    /// Id of the job.
    pub correlation_id: CorrelationId,
}

/// How a job was placed: every try, and every candidate of each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Id of the job.
    pub correlation_id: CorrelationId,
    /// Whose job it is.
    pub tenant_id: TenantId,
    /// Each try, in order.
    pub attempts: Vec<AttemptDecision>,
}

/// One try of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptDecision {
    /// Number of the attempt, from 1.
    pub attempt: u32,
    /// Worker that was chosen; `None` if no candidate was left.
    pub chosen: Option<WorkerId>,
    /// What became of it.
    pub outcome: String,
    /// Every candidate with its score, the best first.
    pub candidates: Vec<CandidateScore>,
    /// Every worker that could not be taken, and why.
    pub refused: Vec<RefusedWorker>,
}

/// A candidate's score and the terms it is made of, each 0 to 1 before its weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CandidateScore {
    /// Worker that was scored.
    pub worker_id: WorkerId,
    /// The model that it would run, where several may run the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelKey>,
    /// Weighted sum of the terms.
    pub score: f64,
    /// Exact version served, and resident.
    pub model_match: f64,
    /// Same region, or how far.
    pub region_proximity: f64,
    /// The emptier the better.
    pub queue_depth: f64,
    /// The prompt's beginning is at hand.
    pub warm_cache: f64,
    /// Measured speed against the fastest candidate.
    pub speed: f64,
}

/// A worker that could not be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RefusedWorker {
    /// Worker that was ruled out.
    pub worker_id: WorkerId,
    /// The model that it would have run, where several may run the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelKey>,
    /// Why, as a short word.
    pub reason: String,
}

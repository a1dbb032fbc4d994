//! The registry service: responds to gateways and orchestrators about tokens, models and policies, and to all nodes
//! about the pool's membership.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use artifact_store::ArtifactStore;
use metadata_store::RegistryStore;
use protocol::artifact::FETCH;
use protocol::codec::MESSAGE_BYTES_MAX;
use protocol::control::{
    ADAPTER_ADD, ADAPTER_REMOVE, ALIAS_REMOVE, ALIAS_SET, AdapterAdd, AdapterRemove, AdapterRemoved, AliasRemove,
    AliasRemoved, AliasSet, ByOperator, CATALOG_LIST, CERTIFICATE_RENEW, CLOCK_READ, Catalog, ClockReading, Empty,
    Enrolled, INVITE_CREATE, INVITE_REDEEM, InviteCreate, InviteCreated, InviteRedeem, MODEL_ADD, MODEL_KEEP,
    MODEL_OFFER, MODEL_REMOVE, ModelAdd, ModelKeep, ModelRemove, ModelRemoved, NODE_LIST, NODE_RENAME, NODE_REVOKE,
    NodeInfo, NodeList, NodeRename, NodeRenamed, NodeRevoke, NodeRevoked, NodeRole, OPERATOR_CATALOG_LIST,
    OPERATOR_CHECK, OPERATOR_POLICY_GET, OPERATOR_POLICY_LIST, OPERATOR_POLICY_SET, OPERATOR_TOKEN_CREATE,
    OPERATOR_TOKEN_LIST, OPERATOR_TOKEN_REVOKE, OperatorRequest, POLICY_GET, POOL_STATE, PolicyRequest, PoolState,
    PoolStateRequest, Scope, TOKEN_CHECK, TokenCheck, TokenCreate, TokenCreated, TokenGrant, TokenList, TokenRevoke,
    TokenRevoked,
};
use protocol::membership::Certificate;
use protocol::model::{AdapterEntry, AliasEntry, ModelEntry, ModelOffer};
use protocol::policy::{PolicyList, PolicySaved, PolicySet, TenantPolicy};
use protocol::{Clock, ErrorCode, PublicKey, Region, Topic, WireError};
use rpc::server::STRANGER_BYTES_MAX;
use rpc::{Access, ArtifactServer, Caller, Membership, Server, StreamCall, Transport, announce};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::adapters::{self, AdapterError};
use crate::catalog::OfferError;
use crate::certificate_authority::{AuthorityError, CertificateAuthority, Grant};
use crate::models::{self, ModelError};
use crate::secret_checks::SecretChecks;
use crate::tokens::{Pepper, TokenIssuer};
use crate::{catalog, policies};

/// How long running calls may take to finish once the registry stops.
const DRAIN: Duration = Duration::from_secs(2);
/// How often the registry checks whether its own certificate needs renewal.
const OWN_CERTIFICATE_EVERY: Duration = Duration::from_mins(1);

/// Dependencies of a [`Registry`].
pub struct RegistryParts {
    /// The registry's connection to the network.
    pub transport: Arc<dyn Transport>,
    pub region: Region,
    pub clock: Arc<dyn Clock>,
    /// Stores models, tokens, policies and nodes.
    pub store: Arc<dyn RegistryStore>,
    /// The model files that it serves to workers, if it has any.
    pub artifacts: Option<ArtifactStore>,
    /// The HMAC key for secrets.
    pub pepper: Pepper,
    /// Decides which nodes belong to the pool.
    pub authority: CertificateAuthority,
    pub version: String,
}

/// Answers questions about tokens, models, policies and membership.
pub struct Registry {
    parts: RegistryParts,
    tokens: TokenIssuer,
    operator_checks: SecretChecks,
    membership: Membership,
    artifacts: Option<ArtifactServer>,
    /// The number of models that each worker had listed since the start. Offers are taken one after the other.
    offered: tokio::sync::Mutex<HashMap<PublicKey, usize>>,
}

impl Registry {
    /// Runs a registry until `stop` is cancelled. The registry issues its own certificate.
    pub async fn run(parts: RegistryParts, stop: CancellationToken) -> Result<(), AuthorityError> {
        let tokens = TokenIssuer::new(parts.store.clone(), parts.clock.clone(), parts.pepper.clone());
        let transport = parts.transport.clone();
        let topic = Topic::Control(parts.region.clone());
        let (authority, own_key) = (&parts.authority, transport.public_key());
        let certificate = authority.certify(own_key, own_grant()).await?;
        let membership = Membership::new(authority.pool(), own_key, certificate, parts.clock.clone())
            .expect("what the authority has just signed is good");
        let artifacts = parts.artifacts.clone().map(|store| ArtifactServer::new(store, membership.clone()));
        let operator_checks = SecretChecks::new();
        let offered = tokio::sync::Mutex::default();
        let registry = Arc::new(Self { parts, tokens, operator_checks, membership, artifacts, offered });
        registry.take_revocations().await?;
        let server = registry.serve(registry.server());
        let announced = announce::keep_announced(&*transport, &topic, &stop);
        tokio::join!(server.run(stop.clone(), DRAIN), announced, stop.run_until_cancelled(registry.keep_up()));
        Ok(())
    }

    /// Renews the registry's own certificate, and copies each new revocation list from the certificate authority.
    async fn keep_up(&self) {
        let mut changes = self.parts.authority.changes();
        let mut ticks = time::interval(OWN_CERTIFICATE_EVERY);
        loop {
            let kept = tokio::select! {
                // The certificate authority outlives this loop, so the channel stays open.
                _ = changes.changed() => self.take_revocations().await,
                _ = ticks.tick() => self.renew_own().await,
            };
            if let Err(error) = kept {
                warn!(%error, "the registry could not keep its own membership up to date");
            }
        }
    }

    async fn take_revocations(&self) -> Result<(), AuthorityError> {
        let list = self.parts.authority.revocations().await?;
        // The list is our own, so the only possible error is that it is not newer.
        let _ = self.membership.take_revocations(&list);
        Ok(())
    }

    async fn renew_own(&self) -> Result<(), AuthorityError> {
        if self.membership.own().is_some_and(|own| own.is_due(self.parts.clock.now())) {
            let own_key = self.parts.transport.public_key();
            let renewed = self.parts.authority.certify(own_key, own_grant()).await?;
            if let Err(error) = self.membership.renew(renewed) {
                warn!(%error, "the registry's own certificate is invalid; is the clock right?");
            }
        }
        Ok(())
    }

    /// Checks that an API token has operator rights. Any node may bring it.
    async fn operator(&self, caller: Caller, token: &str) -> Result<(), WireError> {
        let grant = self.operator_checks.check(caller.key, self.tokens.check(token)).await?;
        if grant.scopes.contains(&Scope::Admin) {
            Ok(())
        } else {
            Err(WireError::new(ErrorCode::InsufficientScope, "this API key may not operate the network"))
        }
    }

    /// Makes a server that knows who its callers are.
    fn server(&self) -> Server {
        let RegistryParts { transport, region, version, .. } = &self.parts;
        let info = NodeInfo { roles: vec![NodeRole::Registry], region: region.clone(), version: version.clone() };
        let known = self.membership.clone();
        Server::new(transport.clone(), info)
            .membership(self.membership.clone())
            .body_limit(move |key| if known.is_member(key) { MESSAGE_BYTES_MAX } else { STRANGER_BYTES_MAX })
    }

    /// Adds the registry's calls to a server.
    fn serve(self: &Arc<Self>, server: Server) -> Server {
        server
            .with_state(self.clone())
            .unary(CLOCK_READ, Access::Anyone, Self::read_clock)
            .unary(INVITE_REDEEM, Access::Anyone, Self::redeem_invite)
            .unary(CERTIFICATE_RENEW, Access::Members, Self::renew_certificate)
            .unary(POOL_STATE, Access::Members, Self::pool_state)
            .unary(CATALOG_LIST, Access::Members, Self::catalog)
            .unary(MODEL_OFFER, Access::Role(NodeRole::Worker), Self::take_offer)
            .stream(FETCH, Access::Role(NodeRole::Worker), Self::give_artifact)
            .unary(TOKEN_CHECK, Access::Role(NodeRole::Gateway), Self::check_token)
            .unary(POLICY_GET, Access::Role(NodeRole::Orchestrator), Self::policy)
            // Operators are people, not nodes: any node may bring their request, and only their token counts.
            .unary(INVITE_CREATE, Access::Anyone, by_operator(Self::create_invite))
            .unary(NODE_REVOKE, Access::Anyone, by_operator(Self::revoke_node))
            .unary(NODE_LIST, Access::Anyone, by_operator(Self::list_nodes))
            .unary(NODE_RENAME, Access::Anyone, by_operator(Self::rename_node))
            .unary(OPERATOR_TOKEN_CREATE, Access::Anyone, by_operator(Self::issue_token))
            .unary(OPERATOR_TOKEN_LIST, Access::Anyone, by_operator(Self::list_tokens))
            .unary(OPERATOR_TOKEN_REVOKE, Access::Anyone, by_operator(Self::revoke_token))
            .unary(OPERATOR_CHECK, Access::Anyone, by_operator(Self::confirm_operator))
            .unary(OPERATOR_CATALOG_LIST, Access::Anyone, by_operator(Self::list_catalog))
            .unary(MODEL_ADD, Access::Anyone, by_operator(Self::add_model))
            .unary(MODEL_REMOVE, Access::Anyone, by_operator(Self::remove_model))
            .unary(MODEL_KEEP, Access::Anyone, by_operator(Self::keep_model))
            .unary(ALIAS_SET, Access::Anyone, by_operator(Self::set_alias))
            .unary(ALIAS_REMOVE, Access::Anyone, by_operator(Self::remove_alias))
            .unary(ADAPTER_ADD, Access::Anyone, by_operator(Self::add_adapter))
            .unary(ADAPTER_REMOVE, Access::Anyone, by_operator(Self::remove_adapter))
            .unary(OPERATOR_POLICY_GET, Access::Anyone, by_operator(Self::show_policy))
            .unary(OPERATOR_POLICY_SET, Access::Anyone, by_operator(Self::set_policy))
            .unary(OPERATOR_POLICY_LIST, Access::Anyone, by_operator(Self::list_policies))
            .into_server()
    }

    #[expect(clippy::unused_async, reason = "handlers are async")]
    async fn read_clock(self: Arc<Self>, _: Caller, _: Empty) -> Result<ClockReading, WireError> {
        Ok(ClockReading { now: self.parts.clock.now() })
    }

    async fn redeem_invite(self: Arc<Self>, caller: Caller, request: InviteRedeem) -> Result<Enrolled, WireError> {
        self.parts.authority.redeem(caller.key, request).await
    }

    async fn renew_certificate(self: Arc<Self>, caller: Caller, _: Empty) -> Result<Enrolled, WireError> {
        self.parts.authority.renew(caller.key).await
    }

    async fn pool_state(self: Arc<Self>, _: Caller, request: PoolStateRequest) -> Result<PoolState, WireError> {
        Ok(self.parts.authority.state(request.version).await?)
    }

    async fn check_token(self: Arc<Self>, _: Caller, request: TokenCheck) -> Result<TokenGrant, WireError> {
        self.tokens.check(&request.token).await
    }

    async fn catalog(self: Arc<Self>, _: Caller, _: Empty) -> Result<Catalog, WireError> {
        catalog::list(&*self.parts.store).await.map_err(|error| unavailable(&error))
    }

    async fn policy(self: Arc<Self>, _: Caller, request: PolicyRequest) -> Result<TenantPolicy, WireError> {
        policies::of(&*self.parts.store, &request.tenant_id).await.map_err(|error| unavailable(&error))
    }

    async fn create_invite(self: Arc<Self>, request: InviteCreate) -> Result<InviteCreated, WireError> {
        Ok(self.parts.authority.invite(request).await?)
    }

    async fn revoke_node(self: Arc<Self>, request: NodeRevoke) -> Result<NodeRevoked, WireError> {
        Ok(self.parts.authority.revoke(request.public_key).await?)
    }

    async fn list_nodes(self: Arc<Self>, _: OperatorRequest) -> Result<NodeList, WireError> {
        Ok(self.parts.authority.nodes().await?)
    }

    async fn rename_node(self: Arc<Self>, request: NodeRename) -> Result<NodeRenamed, WireError> {
        Ok(self.parts.authority.rename(request.public_key, &request.name).await?)
    }

    async fn issue_token(self: Arc<Self>, operation: ByOperator<TokenCreate>) -> Result<TokenCreated, WireError> {
        self.issue(operation.request).await
    }

    async fn list_tokens(self: Arc<Self>, _: OperatorRequest) -> Result<TokenList, WireError> {
        self.tokens.list().await.map_err(|error| unavailable(&error))
    }

    async fn revoke_token(self: Arc<Self>, operation: ByOperator<TokenRevoke>) -> Result<TokenRevoked, WireError> {
        self.tokens.revoke(&operation.request.key_id).await.map_err(|error| unavailable(&error))
    }

    /// Responds to a token that was checked already.
    #[expect(clippy::unused_async, reason = "handlers are async")]
    async fn confirm_operator(self: Arc<Self>, _: OperatorRequest) -> Result<Empty, WireError> {
        Ok(Empty {})
    }

    async fn list_catalog(self: Arc<Self>, _: OperatorRequest) -> Result<Catalog, WireError> {
        catalog::list(&*self.parts.store).await.map_err(|error| unavailable(&error))
    }

    async fn add_model(self: Arc<Self>, operation: ByOperator<ModelAdd>) -> Result<ModelEntry, WireError> {
        let (store, now) = (&*self.parts.store, self.parts.clock.now());
        Ok(models::add(store, operation.request, now).await.inspect_err(log_model)?)
    }

    async fn remove_model(self: Arc<Self>, operation: ByOperator<ModelRemove>) -> Result<ModelRemoved, WireError> {
        Ok(models::remove(&*self.parts.store, operation.request).await.inspect_err(log_model)?)
    }

    async fn keep_model(self: Arc<Self>, operation: ByOperator<ModelKeep>) -> Result<ModelEntry, WireError> {
        Ok(models::keep(&*self.parts.store, operation.request).await.inspect_err(log_model)?)
    }

    async fn set_alias(self: Arc<Self>, operation: ByOperator<AliasSet>) -> Result<AliasEntry, WireError> {
        let (store, now) = (&*self.parts.store, self.parts.clock.now());
        Ok(models::set_alias(store, operation.request, now).await.inspect_err(log_model)?)
    }

    async fn remove_alias(self: Arc<Self>, operation: ByOperator<AliasRemove>) -> Result<AliasRemoved, WireError> {
        Ok(models::remove_alias(&*self.parts.store, &operation.request.alias).await.inspect_err(log_model)?)
    }

    async fn add_adapter(self: Arc<Self>, operation: ByOperator<AdapterAdd>) -> Result<AdapterEntry, WireError> {
        let (store, now) = (&*self.parts.store, self.parts.clock.now());
        Ok(adapters::add(store, operation.request, now).await.inspect_err(log_refusal)?)
    }

    async fn remove_adapter(
        self: Arc<Self>,
        operation: ByOperator<AdapterRemove>,
    ) -> Result<AdapterRemoved, WireError> {
        Ok(adapters::remove(&*self.parts.store, operation.request).await.inspect_err(log_refusal)?)
    }

    async fn show_policy(self: Arc<Self>, operation: ByOperator<PolicyRequest>) -> Result<TenantPolicy, WireError> {
        policies::of(&*self.parts.store, &operation.request.tenant_id).await.map_err(|error| unavailable(&error))
    }

    async fn set_policy(self: Arc<Self>, operation: ByOperator<PolicySet>) -> Result<PolicySaved, WireError> {
        let saved = policies::set(&*self.parts.store, operation.request).await?;
        info!(tenant_id = %saved.tenant_id, "an operator set a tenant's policy");
        Ok(saved)
    }

    async fn list_policies(self: Arc<Self>, _: OperatorRequest) -> Result<PolicyList, WireError> {
        policies::list(&*self.parts.store).await.map_err(|error| unavailable(&error))
    }

    async fn issue(&self, new: TokenCreate) -> Result<TokenCreated, WireError> {
        self.tokens.issue(new).await.map_err(|error| {
            warn!(%error, "could not issue a token");
            WireError::new(ErrorCode::Unavailable, "the token could not be issued, try again")
        })
    }

    /// Serves a worker the file of a model that was added.
    async fn give_artifact(self: Arc<Self>, call: StreamCall) {
        let Some(artifact_server) = &self.artifacts else {
            let error = WireError::new(ErrorCode::ModelNotHere, "this registry keeps no artifacts, try another node");
            return call.refuse(error).await;
        };
        let models_of = async |digest| {
            let catalog = catalog::list(&*self.parts.store).await.map_err(|error| unavailable(&error))?;
            Ok(catalog.added_with(&digest).into_iter().map(|key| key.model_id).collect())
        };
        artifact_server.serve(call, models_of).await;
    }

    /// Lists a model that a worker serves, if the worker's certificate allows it that name.
    async fn take_offer(self: Arc<Self>, caller: Caller, offer: ModelOffer) -> Result<Empty, WireError> {
        let worker = caller.key;
        let allows = |certificate: Arc<Certificate>| certificate.allows_model(&offer.key.model_id);
        if !self.membership.standing(worker)?.is_none_or(allows) {
            let message = format!("this node's certificate does not allow {}", offer.key.model_id);
            return Err(WireError::new(ErrorCode::ModelNotAllowed, message));
        }
        let mut offered = self.offered.lock().await;
        let of_worker = offered.entry(worker).or_default();
        match catalog::offer(&*self.parts.store, offer, of_worker, self.parts.clock.now()).await {
            Ok(()) => Ok(Empty {}),
            Err(OfferError::Store(error)) => Err(unavailable(&error)),
            Err(error) => Err(WireError::new(ErrorCode::InvalidValue, error.to_string())),
        }
    }
}

/// A request that carries the API token of the operator who makes it.
trait CarriesToken {
    fn token(&self) -> &str;
}

impl<T> CarriesToken for ByOperator<T> {
    fn token(&self) -> &str {
        &self.token
    }
}

impl CarriesToken for OperatorRequest {
    fn token(&self) -> &str {
        &self.token
    }
}

impl CarriesToken for InviteCreate {
    fn token(&self) -> &str {
        &self.token
    }
}

impl CarriesToken for NodeRevoke {
    fn token(&self) -> &str {
        &self.token
    }
}

impl CarriesToken for NodeRename {
    fn token(&self) -> &str {
        &self.token
    }
}

type Reply<T> = Pin<Box<dyn Future<Output = Result<T, WireError>> + Send>>;

/// Makes a method of a handler that only operators may reach: it checks the token of each request first.
fn by_operator<Request, Response, Work>(
    handler: impl Fn(Arc<Registry>, Request) -> Work + Copy + Send + Sync + 'static,
) -> impl Fn(Arc<Registry>, Caller, Request) -> Reply<Response>
where
    Request: CarriesToken + Send + 'static,
    Work: Future<Output = Result<Response, WireError>> + Send + 'static,
{
    move |registry, caller, request| {
        Box::pin(async move {
            registry.operator(caller, request.token()).await?;
            handler(registry, request).await
        })
    }
}

/// The grant of the registry's own certificate.
fn own_grant() -> Grant {
    Grant::of(NodeRole::Registry, "registry")
}

fn log_refusal(error: &AdapterError) {
    warn!(%error, "an adapter was neither registered nor forgotten");
}

fn log_model(error: &ModelError) {
    warn!(%error, "a change of the catalogue was refused");
}

fn unavailable(error: &metadata_store::StoreError) -> WireError {
    warn!(%error, "could not read the registry's store");
    WireError::new(ErrorCode::Unavailable, "the registry cannot read its store, try again")
}

#[cfg(test)]
mod tests;

//! The service: answers gateways and orchestrators about tokens, models and rules, and all nodes about who belongs to
//! the pool (R1).

use std::sync::Arc;
use std::time::Duration;

use artifact_store::ArtifactStore;
use metadata_store::RegistryStore;
use protocol::admission::Certificate;
use protocol::artifact::FETCH;
use protocol::codec::MESSAGE_BYTES_MAX;
use protocol::control::{
    ADAPTER_ADD, ADAPTER_REMOVE, ALIAS_REMOVE, ALIAS_SET, AdapterAdd, AdapterRemove, AliasRemove, AliasSet, ByOperator,
    CATALOG_LIST, CERTIFICATE_RENEW, CLOCK_READ, ClockReading, Empty, INVITE_CREATE, INVITE_REDEEM, InviteCreate,
    InviteRedeem, MODEL_ADD, MODEL_KEEP, MODEL_OFFER, MODEL_REMOVE, ModelAdd, ModelKeep, ModelRemove, NODE_LIST,
    NODE_RENAME, NODE_REVOKE, NodeInfo, NodeRename, NodeRevoke, NodeRole, OPERATOR_CATALOG_LIST, OPERATOR_TOKEN_CREATE,
    OPERATOR_TOKEN_LIST, OPERATOR_TOKEN_REVOKE, OperatorRequest, POLICY_GET, POOL_STATE, PolicyRequest,
    PoolStateRequest, Scope, TOKEN_CHECK, TOKEN_CREATE, TOKEN_LIST, TOKEN_REVOKE, TokenCheck, TokenCreate,
    TokenCreated, TokenRevoke,
};
use protocol::model::ModelOffer;
use protocol::{Clock, ErrorCode, PublicKey, Region, Topic, WireError};
use rpc::server::STRANGER_BYTES_MAX;
use rpc::{ArtifactServer, Caller, Membership, Server, StreamCall, Transport, announce};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::adapters::{self, AdapterError};
use crate::admission::{AdmissionError, AdmissionOffice, Grant};
use crate::catalog::OfferError;
use crate::models::{self, ModelError};
use crate::tokens::{Pepper, TokenOffice};
use crate::{catalog, policies};

/// How long calls under way may take to end once the registry stops.
const DRAIN: Duration = Duration::from_secs(2);
/// How often the registry looks at its own certificate.
const OWN_CERTIFICATE_EVERY: Duration = Duration::from_mins(1);

/// What a registry is made of.
pub struct RegistryParts {
    /// Its end of the network.
    pub transport: Arc<dyn Transport>,
    pub region: Region,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// Models, tokens and rules.
    pub store: Arc<dyn RegistryStore>,
    /// The models' files that it gives to workers, where it has any.
    pub artifacts: Option<ArtifactStore>,
    /// The key under which secrets are hashed.
    pub pepper: Pepper,
    /// Says who belongs to the pool.
    pub admission: AdmissionOffice,
    pub version: String,
}

/// Answers about tokens, models and rules.
pub struct Registry {
    parts: RegistryParts,
    tokens: TokenOffice,
    membership: Membership,
    artifacts: Option<ArtifactServer>,
}

impl Registry {
    /// Runs a registry until `stop`. It certifies itself.
    pub async fn run(parts: RegistryParts, stop: CancellationToken) -> Result<(), AdmissionError> {
        let tokens = TokenOffice::new(parts.store.clone(), parts.clock.clone(), parts.pepper.clone());
        let transport = parts.transport.clone();
        let topic = Topic::Control(parts.region.clone());
        let info =
            NodeInfo { roles: vec![NodeRole::Registry], region: parts.region.clone(), version: parts.version.clone() };
        let (office, own_key) = (&parts.admission, transport.public_key());
        let certificate = office.certify(own_key, own_grant()).await?;
        let membership = Membership::new(office.pool(), own_key, certificate, parts.clock.clone())
            .expect("what the office has just signed is good");
        let artifacts = parts.artifacts.clone().map(|store| ArtifactServer::new(store, membership.clone()));
        let registry = Arc::new(Self { parts, tokens, membership, artifacts });
        registry.take_revocations().await?;
        let known = registry.membership.clone();
        let server = registry
            .serve(Server::new(transport.clone(), info))
            .membership(registry.membership.clone())
            .body_limit(move |key| if known.is_member(key) { MESSAGE_BYTES_MAX } else { STRANGER_BYTES_MAX });
        let announced = announce::keep_announced(&*transport, &topic, &stop);
        tokio::join!(server.run(stop.clone(), DRAIN), announced, stop.run_until_cancelled(registry.keep_up()));
        Ok(())
    }

    /// Keeps the registry's own certificate good, and its own list of revocations that of the office.
    async fn keep_up(&self) {
        let mut changes = self.parts.admission.changes();
        let mut ticks = time::interval(OWN_CERTIFICATE_EVERY);
        loop {
            let kept = tokio::select! {
                // The office outlives this.
                _ = changes.changed() => self.take_revocations().await,
                _ = ticks.tick() => self.renew_own().await,
            };
            if let Err(error) = kept {
                warn!(%error, "the registry could not keep its own membership up to date");
            }
        }
    }

    async fn take_revocations(&self) -> Result<(), AdmissionError> {
        let list = self.parts.admission.revocations().await?;
        // It is ours: not newer is the worst it can be.
        let _ = self.membership.take_revocations(&list);
        Ok(())
    }

    async fn renew_own(&self) -> Result<(), AdmissionError> {
        if self.membership.own().is_some_and(|own| own.is_due(self.parts.clock.now())) {
            let own_key = self.parts.transport.public_key();
            let renewed = self.parts.admission.certify(own_key, own_grant()).await?;
            if let Err(error) = self.membership.renew(renewed) {
                warn!(%error, "the registry's own certificate is no good; is the clock right?");
            }
        }
        Ok(())
    }

    /// Lets an operator in, by an API token; whose node it is that brings it does not matter.
    async fn operator(&self, caller: Caller, token: &str) -> Result<(), WireError> {
        let office = &self.parts.admission;
        office.check_attempts(caller.key)?;
        let checked = self.tokens.check(token).await;
        if checked.as_ref().is_err_and(|error| error.code == ErrorCode::InvalidApiKey) {
            office.count_attempt(caller.key);
        }
        if checked?.scopes.contains(&Scope::Admin) {
            Ok(())
        } else {
            Err(WireError::new(ErrorCode::InsufficientScope, "this API key may not operate the network"))
        }
    }

    /// Serves operators who come without a gateway: their token is all that counts.
    fn serve_operators(self: &Arc<Self>, server: Server) -> Server {
        let [renamed, issued, listed, revoked] = std::array::from_fn(|_| self.clone());
        server
            .unary(NODE_RENAME, move |caller, request: NodeRename| {
                let registry = renamed.clone();
                async move {
                    registry.operator(caller, &request.token).await?;
                    Ok(registry.parts.admission.rename(request.public_key, &request.name).await?)
                }
            })
            .unary(OPERATOR_TOKEN_CREATE, move |caller, asked: ByOperator<TokenCreate>| {
                let registry = issued.clone();
                async move {
                    registry.operator(caller, &asked.token).await?;
                    registry.issue(asked.request).await
                }
            })
            .unary(OPERATOR_TOKEN_LIST, move |caller, request: OperatorRequest| {
                let registry = listed.clone();
                async move {
                    registry.operator(caller, &request.token).await?;
                    registry.tokens.list().await.map_err(|error| unavailable(&error))
                }
            })
            .unary(OPERATOR_TOKEN_REVOKE, move |caller, asked: ByOperator<TokenRevoke>| {
                let registry = revoked.clone();
                async move {
                    registry.operator(caller, &asked.token).await?;
                    registry.tokens.revoke(&asked.request.key_id).await.map_err(|error| unavailable(&error))
                }
            })
    }

    /// Serves operators what they change of models, from a gateway or without one.
    fn serve_models(self: &Arc<Self>, server: Server) -> Server {
        let [listed, added, removed, kept, named, unnamed] = std::array::from_fn(|_| self.clone());
        server
            .unary(OPERATOR_CATALOG_LIST, move |caller, request: OperatorRequest| {
                let registry = listed.clone();
                async move {
                    registry.operator(caller, &request.token).await?;
                    catalog::list(&*registry.parts.store).await.map_err(|error| unavailable(&error))
                }
            })
            .unary(MODEL_ADD, move |caller, asked: ByOperator<ModelAdd>| {
                let registry = added.clone();
                async move {
                    registry.operator(caller, &asked.token).await?;
                    let (store, now) = (&*registry.parts.store, registry.parts.clock.now());
                    Ok(models::add(store, asked.request, now).await.inspect_err(log_model)?)
                }
            })
            .unary(MODEL_REMOVE, move |caller, asked: ByOperator<ModelRemove>| {
                let registry = removed.clone();
                async move {
                    registry.operator(caller, &asked.token).await?;
                    Ok(models::remove(&*registry.parts.store, asked.request).await.inspect_err(log_model)?)
                }
            })
            .unary(MODEL_KEEP, move |caller, asked: ByOperator<ModelKeep>| {
                let registry = kept.clone();
                async move {
                    registry.operator(caller, &asked.token).await?;
                    Ok(models::keep(&*registry.parts.store, asked.request).await.inspect_err(log_model)?)
                }
            })
            .unary(ALIAS_SET, move |caller, asked: ByOperator<AliasSet>| {
                let registry = named.clone();
                async move {
                    registry.operator(caller, &asked.token).await?;
                    let (store, now) = (&*registry.parts.store, registry.parts.clock.now());
                    Ok(models::set_alias(store, asked.request, now).await.inspect_err(log_model)?)
                }
            })
            .unary(ALIAS_REMOVE, move |caller, asked: ByOperator<AliasRemove>| {
                let registry = unnamed.clone();
                async move {
                    registry.operator(caller, &asked.token).await?;
                    let store = &*registry.parts.store;
                    Ok(models::remove_alias(store, &asked.request.alias).await.inspect_err(log_model)?)
                }
            })
    }

    async fn issue(&self, new: TokenCreate) -> Result<TokenCreated, WireError> {
        self.tokens.issue(new).await.map_err(|error| {
            warn!(%error, "could not issue a token");
            WireError::new(ErrorCode::Unavailable, "the token could not be issued, try again")
        })
    }

    fn serve_admission(self: &Arc<Self>, server: Server) -> Server {
        let [invited, redeemed, renewed, revoked, listed, asked] = std::array::from_fn(|_| self.clone());
        let clock = self.parts.clock.clone();
        server
            .unary(CLOCK_READ, move |_, _: Empty| {
                let reading = ClockReading { now: clock.now() };
                async move { Ok(reading) }
            })
            .unary(INVITE_CREATE, move |caller, request: InviteCreate| {
                let registry = invited.clone();
                async move {
                    registry.operator(caller, &request.token).await?;
                    Ok(registry.parts.admission.invite(request).await?)
                }
            })
            .unary(INVITE_REDEEM, move |caller, request: InviteRedeem| {
                let registry = redeemed.clone();
                async move { registry.parts.admission.redeem(caller.key, request).await }
            })
            .unary(CERTIFICATE_RENEW, move |caller, _: Empty| {
                let registry = renewed.clone();
                async move {
                    registry.membership.standing(caller.key)?;
                    registry.parts.admission.renew(caller.key).await
                }
            })
            .unary(NODE_REVOKE, move |caller, request: NodeRevoke| {
                let registry = revoked.clone();
                async move {
                    registry.operator(caller, &request.token).await?;
                    Ok(registry.parts.admission.revoke(request.public_key).await?)
                }
            })
            .unary(NODE_LIST, move |caller, request: OperatorRequest| {
                let registry = listed.clone();
                async move {
                    registry.operator(caller, &request.token).await?;
                    Ok(registry.parts.admission.nodes().await?)
                }
            })
            .unary(POOL_STATE, move |caller, request: PoolStateRequest| {
                let registry = asked.clone();
                async move {
                    registry.membership.standing(caller.key)?;
                    Ok(registry.parts.admission.state(request.version).await?)
                }
            })
    }

    fn serve(self: &Arc<Self>, server: Server) -> Server {
        let [tokens, issued, listed, revoked, catalogue, offered, added, removed, rules, fetched] =
            std::array::from_fn(|_| self.clone());
        self.serve_models(self.serve_operators(self.serve_admission(server)))
            .stream(FETCH, move |call| {
                let registry = fetched.clone();
                async move { registry.give_artifact(call).await }
            })
            .unary(TOKEN_CHECK, move |caller, request: TokenCheck| {
                let registry = tokens.clone();
                async move {
                    registry.admit_gateway(caller.key)?;
                    registry.tokens.check(&request.token).await
                }
            })
            .unary(TOKEN_CREATE, move |caller, request: TokenCreate| {
                let registry = issued.clone();
                async move {
                    registry.admit_gateway(caller.key)?;
                    registry.issue(request).await
                }
            })
            .unary(TOKEN_LIST, move |caller, _: Empty| {
                let registry = listed.clone();
                async move {
                    registry.admit_gateway(caller.key)?;
                    registry.tokens.list().await.map_err(|error| unavailable(&error))
                }
            })
            .unary(TOKEN_REVOKE, move |caller, request: TokenRevoke| {
                let registry = revoked.clone();
                async move {
                    registry.admit_gateway(caller.key)?;
                    registry.tokens.revoke(&request.key_id).await.map_err(|error| unavailable(&error))
                }
            })
            .unary(CATALOG_LIST, move |caller, _: Empty| {
                let registry = catalogue.clone();
                async move {
                    registry.admit(caller.key)?;
                    catalog::list(&*registry.parts.store).await.map_err(|error| unavailable(&error))
                }
            })
            .unary(MODEL_OFFER, move |caller, offer: ModelOffer| {
                let registry = offered.clone();
                async move { registry.take_offer(caller.key, offer).await }
            })
            .unary(ADAPTER_ADD, move |caller, request: AdapterAdd| {
                let registry = added.clone();
                async move {
                    registry.admit_gateway(caller.key)?;
                    let (store, now) = (&*registry.parts.store, registry.parts.clock.now());
                    Ok(adapters::add(store, request, now).await.inspect_err(log_refusal)?)
                }
            })
            .unary(ADAPTER_REMOVE, move |caller, request: AdapterRemove| {
                let registry = removed.clone();
                async move {
                    registry.admit_gateway(caller.key)?;
                    let store = &*registry.parts.store;
                    Ok(adapters::remove(store, request).await.inspect_err(log_refusal)?)
                }
            })
            .unary(POLICY_GET, move |caller, request: PolicyRequest| {
                let registry = rules.clone();
                async move {
                    registry.admit(caller.key)?;
                    policies::of(&*registry.parts.store, &request.tenant_id).await.map_err(|error| unavailable(&error))
                }
            })
    }

    /// Gives a worker the file of a model that was added.
    async fn give_artifact(&self, call: StreamCall) {
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
    async fn take_offer(&self, worker: PublicKey, offer: ModelOffer) -> Result<Empty, WireError> {
        self.membership.admit(worker, NodeRole::Worker, None)?;
        let allows = |certificate: Arc<Certificate>| certificate.allows_model(&offer.key.model_id);
        if !self.membership.standing(worker)?.is_none_or(allows) {
            let message = format!("this node's certificate does not allow {}", offer.key.model_id);
            return Err(WireError::new(ErrorCode::ModelNotAllowed, message));
        }
        match catalog::offer(&*self.parts.store, offer, self.parts.clock.now()).await {
            Ok(()) => Ok(Empty {}),
            Err(OfferError::Store(error)) => Err(unavailable(&error)),
            Err(error) => Err(WireError::new(ErrorCode::InvalidValue, error.to_string())),
        }
    }

    /// Tokens, and what operators change, are the gateways' business only.
    fn admit_gateway(&self, key: PublicKey) -> Result<(), WireError> {
        Ok(self.membership.admit(key, NodeRole::Gateway, None)?)
    }

    fn admit(&self, key: PublicKey) -> Result<(), WireError> {
        Ok(self.membership.standing(key).map(drop)?)
    }
}

/// What a registry certifies itself for.
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

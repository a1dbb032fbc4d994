//! The service: answers gateways and orchestrators about tokens, models and rules (R1).

use std::sync::Arc;
use std::time::Duration;

use metadata_store::MetadataStore;
use protocol::codec::MESSAGE_BYTES_MAX;
use protocol::control::{
    CATALOG_LIST, Empty, NodeInfo, NodeRole, POLICY_GET, PolicyRequest, TOKEN_CHECK, TOKEN_CREATE, TOKEN_LIST,
    TOKEN_REVOKE, TokenCheck, TokenCreate, TokenRevoke,
};
use protocol::{Clock, ErrorCode, PublicKey, Region, Topic, WireError};
use rpc::server::STRANGER_BYTES_MAX;
use rpc::{Server, Transport, announce};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::tokens::{Pepper, TokenOffice};
use crate::{catalog, policies};

/// How long calls under way may take to end once the registry stops.
const DRAIN: Duration = Duration::from_secs(2);

/// What a registry is made of.
pub struct RegistryParts {
    /// Its end of the network.
    pub transport: Arc<dyn Transport>,
    /// Where it stands.
    pub region: Region,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// Models, tokens and rules.
    pub store: Arc<dyn MetadataStore>,
    /// The key under which secrets are hashed.
    pub pepper: Pepper,
    /// Who may ask.
    pub enrolled: Arc<dyn Fn(PublicKey) -> bool + Send + Sync>,
    /// The program's version.
    pub version: String,
}

/// Answers about tokens, models and rules.
pub struct Registry {
    parts: RegistryParts,
    tokens: TokenOffice,
}

impl Registry {
    /// Runs a registry until `stop`.
    pub async fn run(parts: RegistryParts, stop: CancellationToken) {
        let tokens = TokenOffice::new(parts.store.clone(), parts.clock.clone(), parts.pepper.clone());
        let transport = parts.transport.clone();
        let topic = Topic::Control(parts.region.clone());
        let info =
            NodeInfo { roles: vec![NodeRole::Registry], region: parts.region.clone(), version: parts.version.clone() };
        let registry = Arc::new(Self { parts, tokens });
        let known = registry.parts.enrolled.clone();
        let server = registry
            .serve(Server::new(transport.clone(), info))
            .body_limit(move |key| if known(key) { MESSAGE_BYTES_MAX } else { STRANGER_BYTES_MAX });
        let announced = announce::keep_announced(&*transport, &topic, &stop);
        tokio::join!(server.run(stop.clone(), DRAIN), announced);
    }

    fn serve(self: &Arc<Self>, server: Server) -> Server {
        let [tokens, issued, listed, revoked, models, rules] = std::array::from_fn(|_| self.clone());
        server
            .unary(TOKEN_CHECK, move |caller, request: TokenCheck| {
                let registry = tokens.clone();
                async move {
                    registry.admit(caller.key)?;
                    registry.tokens.check(&request.token).await
                }
            })
            .unary(TOKEN_CREATE, move |caller, request: TokenCreate| {
                let registry = issued.clone();
                async move {
                    registry.admit(caller.key)?;
                    registry.tokens.issue(request).await.map_err(|error| {
                        warn!(%error, "could not issue a token");
                        WireError::new(ErrorCode::Unavailable, "the token could not be issued, try again")
                    })
                }
            })
            .unary(TOKEN_LIST, move |caller, _: Empty| {
                let registry = listed.clone();
                async move {
                    registry.admit(caller.key)?;
                    registry.tokens.list().await.map_err(|error| unavailable(&error))
                }
            })
            .unary(TOKEN_REVOKE, move |caller, request: TokenRevoke| {
                let registry = revoked.clone();
                async move {
                    registry.admit(caller.key)?;
                    registry.tokens.revoke(&request.key_id).await.map_err(|error| unavailable(&error))
                }
            })
            .unary(CATALOG_LIST, move |caller, _: Empty| {
                let registry = models.clone();
                async move {
                    registry.admit(caller.key)?;
                    catalog::list(&*registry.parts.store).await.map_err(|error| unavailable(&error))
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

    fn admit(&self, key: PublicKey) -> Result<(), WireError> {
        if (self.parts.enrolled)(key) {
            Ok(())
        } else {
            Err(WireError::new(ErrorCode::NotEnrolled, "this node is not enrolled in the network"))
        }
    }
}

fn unavailable(error: &metadata_store::StoreError) -> WireError {
    warn!(%error, "could not read the registry's store");
    WireError::new(ErrorCode::Unavailable, "the registry cannot read its store, try again")
}

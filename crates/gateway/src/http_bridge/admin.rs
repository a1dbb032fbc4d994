//! What operators ask of the network over HTTP.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use http::Response;
use protocol::control::{
    ADAPTER_ADD, ADAPTER_REMOVE, ALIAS_REMOVE, ALIAS_SET, AdapterAdd, AdapterList, AdapterRemove, AdapterRemoved,
    AliasList, AliasRemove, AliasRemoved, AliasSet, ByOperator, CATALOG_LIST, Catalog, Empty, INVITE_CREATE,
    InviteCreate, InviteCreated, MODEL_ADD, MODEL_KEEP, MODEL_REMOVE, Member, Members, ModelAdd, ModelKeep, ModelMove,
    ModelRemove, ModelRemoved, NODE_LIST, NODE_RENAME, NODE_REVOKE, NodeEntry, NodeList, NodeRename, NodeRenamed,
    NodeRevoke, NodeRevoked, NodeRole, OperatorRequest, Scope, TOKEN_CREATE, TOKEN_LIST, TOKEN_REVOKE, TokenCreate,
    TokenCreated, TokenList, TokenRevoke, TokenRevoked,
};
use protocol::health::{CachedModel, ModelState};
use protocol::model::{AdapterEntry, AliasEntry, ModelEntry, ModelKey, ModelRef};
use protocol::{CorrelationId, ErrorCode, ModelName, ModelVersion, PublicKey, WireError, codec};
use serde::de::DeserializeOwned;
use tracing::info;

use super::errors::json;
use super::extract::{Bridge, Inquiry, Segment, respond};
use super::request_body;
use crate::catalog;
use crate::openai::response::models::ModelList;

/// The longest description of a token or an adapter to make.
const NEW_BYTES_MAX: usize = 64 * 1024;
/// How long an operator may pause while sending it.
const BODY_IDLE: Duration = Duration::from_secs(10);

/// Lists the live workers.
#[utoipa::path(
    get, path = "/admin/v1/nodes", tag = "admin", operation_id = "listNodes", security(("bearer" = [])),
    responses(
        (status = 200, description = "The live workers", body = crate::http_bridge::Fleet),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn nodes(State(bridge): State<Bridge>, inquiry: Inquiry) -> Response<Body> {
    let listed = async {
        operator(&bridge, &inquiry).await?;
        Ok(json(&bridge.gateway.fleet_now().await?))
    };
    respond(inquiry.context, listed.await)
}

/// Lists every registered model, also those that no worker serves.
#[utoipa::path(
    get, path = "/admin/v1/models", tag = "admin", operation_id = "listRegisteredModels", security(("bearer" = [])),
    responses(
        (status = 200, description = "Every model, by name and then by version", body = ModelList),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn models(State(bridge): State<Bridge>, inquiry: Inquiry) -> Response<Body> {
    let listed = async {
        operator(&bridge, &inquiry).await?;
        let (models, fleet) = (bridge.gateway.models_now().await?, bridge.gateway.fleet_now().await?);
        Ok(json(&ModelList::registered(&models, &fleet)))
    };
    respond(inquiry.context, listed.await)
}

/// Lists every node that was ever admitted, whatever it does, and says which of them answer.
#[utoipa::path(
    get, path = "/admin/v1/members", tag = "admin", operation_id = "listMembers", security(("bearer" = [])),
    responses(
        (status = 200, description = "Every node, the first admitted first", body = crate::http_bridge::Members),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn members(State(bridge): State<Bridge>, inquiry: Inquiry) -> Response<Body> {
    let listed = async {
        let token = operator(&bridge, &inquiry).await?;
        let list: NodeList = bridge.gateway.ask_registry(NODE_LIST, &OperatorRequest { token }).await?;
        let member = |node: NodeEntry| {
            let asked = node.roles.iter().filter(|role| **role != NodeRole::Worker && node.revoked_at.is_none());
            let answers =
                asked.map(|role| bridge.gateway.answers(node.public_key, *role)).reduce(|one, other| one || other);
            Member { node, answers }
        };
        Ok(json(&Members { members: list.nodes.into_iter().map(member).collect() }))
    };
    respond(inquiry.context, listed.await)
}

/// Takes a node out of the network; no node deals with it within five seconds.
#[utoipa::path(
    delete, path = "/admin/v1/members/{publicKey}", tag = "admin", operation_id = "revokeMember", security(("bearer" = [])),
    params(("publicKey" = String, Path, description = "The node's key, 64 hex digits")),
    responses(
        (status = 200, description = "Whether there was such a node", body = crate::http_bridge::NodeRevoked),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn revoke_member(
    State(bridge): State<Bridge>,
    Segment(public_key): Segment,
    inquiry: Inquiry,
) -> Response<Body> {
    let revoked = async {
        let token = operator(&bridge, &inquiry).await?;
        let request = NodeRevoke { token, public_key: member_key(&public_key)? };
        let revoked: NodeRevoked = bridge.gateway.ask_registry(NODE_REVOKE, &request).await?;
        info!(node = request.public_key.short(), found = revoked.found, "node revoked");
        Ok(json(&revoked))
    };
    respond(inquiry.context, revoked.await)
}

/// Gives a node another name.
#[utoipa::path(
    patch, path = "/admin/v1/members/{publicKey}", tag = "admin", operation_id = "renameMember", security(("bearer" = [])),
    params(("publicKey" = String, Path, description = "The node's key, 64 hex digits")),
    request_body(content = crate::http_bridge::NewName, content_type = "application/json"),
    responses(
        (status = 200, description = "Whether there was such a node", body = crate::http_bridge::NodeRenamed),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn rename_member(
    State(bridge): State<Bridge>,
    Segment(public_key): Segment,
    inquiry: Inquiry,
    body: Body,
) -> Response<Body> {
    let renamed = async {
        let token = operator(&bridge, &inquiry).await?;
        let bytes = request_body::read(&mut { body }, NEW_BYTES_MAX, BODY_IDLE).await?;
        let crate::http_bridge::NewName { name } = codec::decode(&bytes)?;
        let request = NodeRename { token, public_key: member_key(&public_key)?, name };
        Ok(json(&bridge.gateway.ask_registry::<_, NodeRenamed>(NODE_RENAME, &request).await?))
    };
    respond(inquiry.context, renamed.await)
}

/// Makes an invite. It is told this once.
#[utoipa::path(
    post, path = "/admin/v1/invites", tag = "admin", operation_id = "createInvite", security(("bearer" = [])),
    request_body(content = crate::http_bridge::InviteCreate, content_type = "application/json"),
    responses(
        (status = 200, description = "The invite, told this once", body = crate::http_bridge::InviteCreated),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn create_invite(State(bridge): State<Bridge>, inquiry: Inquiry, body: Body) -> Response<Body> {
    let created = async {
        let token = operator(&bridge, &inquiry).await?;
        let bytes = request_body::read(&mut { body }, NEW_BYTES_MAX, BODY_IDLE).await?;
        let new: InviteCreate = codec::decode(&bytes)?;
        let created: InviteCreated = bridge.gateway.ask_registry(INVITE_CREATE, &InviteCreate { token, ..new }).await?;
        info!(invite = %created.invite_id, "invite made");
        Ok(json(&created))
    };
    respond(inquiry.context, created.await)
}

/// Tells how a job was placed: every try, and every candidate of each.
#[utoipa::path(
    get, path = "/admin/v1/jobs/{correlationId}/decision", tag = "admin", operation_id = "explainJob", security(("bearer" = [])),
    params(("correlationId" = String, Path, description = "The job's name, as `x-tether-decision` told it")),
    responses(
        (status = 200, description = "How it was placed", body = crate::http_bridge::Decision),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn decision(
    State(bridge): State<Bridge>,
    Segment(correlation_id): Segment,
    inquiry: Inquiry,
) -> Response<Body> {
    let explained = async {
        operator(&bridge, &inquiry).await?;
        let correlation_id: CorrelationId = correlation_id.parse().map_err(|malformed: protocol::MalformedId| {
            WireError::new(ErrorCode::InvalidValue, malformed.to_string()).with_param("correlationId")
        })?;
        Ok(json(&bridge.gateway.explain(correlation_id).await?))
    };
    respond(inquiry.context, explained.await)
}

/// Makes a token.
#[utoipa::path(
    post, path = "/admin/v1/tokens", tag = "admin", operation_id = "createToken", security(("bearer" = [])),
    request_body(content = crate::http_bridge::TokenCreate, content_type = "application/json"),
    responses(
        (status = 200, description = "The token, told this once", body = crate::http_bridge::TokenCreated),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn create_token(State(bridge): State<Bridge>, inquiry: Inquiry, body: Body) -> Response<Body> {
    let created = async {
        operator(&bridge, &inquiry).await?;
        let bytes = request_body::read(&mut { body }, NEW_BYTES_MAX, BODY_IDLE).await?;
        let new: TokenCreate = codec::decode(&bytes)?;
        let created: TokenCreated = bridge.gateway.ask_registry(TOKEN_CREATE, &new).await?;
        info!(key_id = created.key_id, tenant_id = %created.tenant_id, "token made");
        Ok(json(&created))
    };
    respond(inquiry.context, created.await)
}

/// Lists the tokens, without their secrets.
#[utoipa::path(
    get, path = "/admin/v1/tokens", tag = "admin", operation_id = "listTokens", security(("bearer" = [])),
    responses(
        (status = 200, description = "Every token, the oldest first", body = crate::http_bridge::TokenList),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn tokens(State(bridge): State<Bridge>, inquiry: Inquiry) -> Response<Body> {
    let listed = async {
        operator(&bridge, &inquiry).await?;
        Ok(json(&bridge.gateway.ask_registry::<_, TokenList>(TOKEN_LIST, &Empty {}).await?))
    };
    respond(inquiry.context, listed.await)
}

/// Revokes a token; it stops working within five seconds.
#[utoipa::path(
    delete, path = "/admin/v1/tokens/{keyId}", tag = "admin", operation_id = "revokeToken", security(("bearer" = [])),
    params(("keyId" = String, Path, description = "The token's public part")),
    responses(
        (status = 200, description = "Whether there was such a token", body = crate::http_bridge::TokenRevoked),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn revoke_token(
    State(bridge): State<Bridge>,
    Segment(key_id): Segment,
    inquiry: Inquiry,
) -> Response<Body> {
    let revoked = async {
        operator(&bridge, &inquiry).await?;
        let request = TokenRevoke { key_id };
        let revoked: TokenRevoked = bridge.gateway.ask_registry(TOKEN_REVOKE, &request).await?;
        info!(key_id = request.key_id, found = revoked.found, "token revoked");
        Ok(json(&revoked))
    };
    respond(inquiry.context, revoked.await)
}

/// Lists the adapters of every model.
#[utoipa::path(
    get, path = "/admin/v1/adapters", tag = "admin", operation_id = "listAdapters", security(("bearer" = [])),
    responses(
        (status = 200, description = "Every adapter, by model and then by name", body = crate::http_bridge::AdapterList),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn adapters(State(bridge): State<Bridge>, inquiry: Inquiry) -> Response<Body> {
    let listed = async {
        operator(&bridge, &inquiry).await?;
        let Catalog { adapters, .. } = bridge.gateway.ask_registry(CATALOG_LIST, &Empty {}).await?;
        Ok(json(&AdapterList { adapters }))
    };
    respond(inquiry.context, listed.await)
}

/// Registers an adapter of a model. Its artifact must lie where the workers of the model find it.
#[utoipa::path(
    post, path = "/admin/v1/adapters", tag = "admin", operation_id = "addAdapter", security(("bearer" = [])),
    request_body(content = crate::http_bridge::AdapterAdd, content_type = "application/json"),
    responses(
        (status = 200, description = "The adapter as it is registered", body = crate::http_bridge::AdapterEntry),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn add_adapter(State(bridge): State<Bridge>, inquiry: Inquiry, body: Body) -> Response<Body> {
    let added = async {
        operator(&bridge, &inquiry).await?;
        let bytes = request_body::read(&mut { body }, NEW_BYTES_MAX, BODY_IDLE).await?;
        let new: AdapterAdd = codec::decode(&bytes)?;
        let added: AdapterEntry = bridge.gateway.ask_registry(ADAPTER_ADD, &new).await?;
        info!(adapter = %added.key, digest = %added.digest, "adapter registered");
        Ok(json(&added))
    };
    respond(inquiry.context, added.await)
}

/// Forgets an adapter; requests for it are refused within five seconds.
#[utoipa::path(
    delete, path = "/admin/v1/adapters/{id}", tag = "admin", operation_id = "removeAdapter", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name:adapter`, of the newest version, or `name@MAJOR.MINOR:adapter`")),
    responses(
        (status = 200, description = "Whether there was such an adapter", body = crate::http_bridge::AdapterRemoved),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn remove_adapter(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    inquiry: Inquiry,
) -> Response<Body> {
    let removed = async {
        operator(&bridge, &inquiry).await?;
        let ModelRef { name, version, adapter } = catalog::parse_ref(&id)?;
        let adapter = adapter.ok_or_else(|| catalog::not_found(&id))?;
        let old = AdapterRemove { model_id: name, version, adapter };
        let removed: AdapterRemoved = bridge.gateway.ask_registry(ADAPTER_REMOVE, &old).await?;
        info!(adapter = id, found = removed.found, "adapter forgotten");
        Ok(json(&removed))
    };
    respond(inquiry.context, removed.await)
}

/// Registers a model. Its artifact must lie where workers find it.
#[utoipa::path(
    post, path = "/admin/v1/models", tag = "admin", operation_id = "addModel", security(("bearer" = [])),
    request_body(content = crate::http_bridge::ModelAdd, content_type = "application/json"),
    responses(
        (status = 200, description = "The model as it is registered", body = crate::http_bridge::ModelEntry),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn add_model(State(bridge): State<Bridge>, inquiry: Inquiry, body: Body) -> Response<Body> {
    let added = async {
        let token = operator(&bridge, &inquiry).await?;
        let request: ModelAdd = read(body).await?;
        let added: ModelEntry = bridge.gateway.ask_registry(MODEL_ADD, &ByOperator { token, request }).await?;
        info!(model = %added.key, digest = %added.digest, "model registered");
        Ok(json(&added))
    };
    respond(inquiry.context, added.await)
}

/// Has the workers that serve a model bring it into memory, and says where it is by then.
#[utoipa::path(
    post, path = "/admin/v1/models/{id}/load", tag = "admin", operation_id = "loadModel", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name` or `name@MAJOR.MINOR`, or an alias")),
    request_body(content = crate::http_bridge::ModelKept, content_type = "application/json"),
    responses(
        (status = 200, description = "Where it is", body = crate::http_bridge::ModelPlaces),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn load_model(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    inquiry: Inquiry,
    body: Body,
) -> Response<Body> {
    let moved = async {
        let token = operator(&bridge, &inquiry).await?;
        let bytes = request_body::read(&mut { body }, NEW_BYTES_MAX, BODY_IDLE).await?;
        // A request without a body loads the model and changes nothing.
        let change: Kept = if bytes.is_empty() { Kept::default() } else { codec::decode(&bytes)? };
        let keep_alive_secs = change.keep_alive_secs;
        let key = bridge.gateway.model_key(&id).await?;
        if keep_alive_secs.is_some() {
            keep(&bridge, token, &key, Kept { pin: None, keep_alive_secs }).await?;
        }
        info!(model = %key, keep_alive_secs, "an operator has the model loaded");
        Ok(json(&bridge.gateway.move_model(ModelMove { key, load: true, keep_alive_secs }).await?))
    };
    respond(inquiry.context, moved.await)
}

/// What is to be changed of how long workers keep a model.
#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Kept {
    pin: Option<bool>,
    keep_alive_secs: Option<i64>,
}

/// Says how long workers keep a model in memory, for good: unless their own settings say otherwise, they follow within
/// seconds, also after a restart.
#[utoipa::path(
    post, path = "/admin/v1/models/{id}/keep", tag = "admin", operation_id = "keepModel", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name` or `name@MAJOR.MINOR`, or an alias")),
    request_body(content = crate::http_bridge::ModelKept, content_type = "application/json"),
    responses(
        (status = 200, description = "The model as it is registered", body = crate::http_bridge::ModelEntry),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn keep_model(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    inquiry: Inquiry,
    body: Body,
) -> Response<Body> {
    let kept = async {
        let token = operator(&bridge, &inquiry).await?;
        let change: Kept = read(body).await?;
        let key = bridge.gateway.model_key(&id).await?;
        Ok(json(&keep(&bridge, token, &key, change).await?))
    };
    respond(inquiry.context, kept.await)
}

async fn keep(bridge: &Bridge, token: String, key: &ModelKey, change: Kept) -> Result<ModelEntry, WireError> {
    let Kept { pin, keep_alive_secs } = change;
    let ModelKey { model_id, version } = key.clone();
    let request = ModelKeep { model_id, version: Some(version), pin, keep_alive_secs };
    let kept = bridge.gateway.ask_registry(MODEL_KEEP, &ByOperator { token, request }).await?;
    info!(model = %key, ?pin, ?keep_alive_secs, "an operator said how long the model is kept");
    Ok(kept)
}

/// Has the workers that serve a model let it leave their memory, unless jobs run on it, and says where it is by then.
#[utoipa::path(
    post, path = "/admin/v1/models/{id}/unload", tag = "admin", operation_id = "unloadModel", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name` or `name@MAJOR.MINOR`, or an alias")),
    responses(
        (status = 200, description = "Where it is", body = crate::http_bridge::ModelPlaces),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn unload_model(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    inquiry: Inquiry,
) -> Response<Body> {
    let moved = async {
        operator(&bridge, &inquiry).await?;
        let key = bridge.gateway.model_key(&id).await?;
        info!(model = %key, "an operator has the model unloaded");
        Ok(json(&bridge.gateway.move_model(ModelMove { key, load: false, keep_alive_secs: None }).await?))
    };
    respond(inquiry.context, moved.await)
}

/// Forgets a model. It stays while a worker holds it or an alias stands for it, unless that is forced.
#[utoipa::path(
    delete, path = "/admin/v1/models/{id}", tag = "admin", operation_id = "removeModel", security(("bearer" = [])),
    params(
        ("id" = String, Path, description = "`name@MAJOR.MINOR`, or `name` where it has one version"),
        ("force" = Option<bool>, Query, description = "Forget it although it is in use, and the aliases that stand for it"),
    ),
    responses(
        (status = 200, description = "What was forgotten", body = crate::http_bridge::ModelRemoved),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn remove_model(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    RawQuery(query): RawQuery,
    inquiry: Inquiry,
) -> Response<Body> {
    let removed = async {
        let token = operator(&bridge, &inquiry).await?;
        let ModelRef { name: model_id, version, adapter: None } = catalog::parse_ref(&id)? else {
            return Err(catalog::not_found(&id));
        };
        let force = query.is_some_and(|query| query.split('&').any(|part| part == "force=true"));
        if !force {
            check_unloaded(&bridge, &model_id, version).await?;
        }
        let request = ModelRemove { model_id, version, force };
        let removed: ModelRemoved = bridge.gateway.ask_registry(MODEL_REMOVE, &ByOperator { token, request }).await?;
        info!(model = %removed.key, found = removed.found, "model forgotten");
        Ok(json(&removed))
    };
    respond(inquiry.context, removed.await)
}

/// Refuses to forget a model that a worker holds or loads. Where no orchestrator answers, that is not known.
async fn check_unloaded(bridge: &Bridge, name: &ModelName, version: Option<ModelVersion>) -> Result<(), WireError> {
    let Ok(fleet) = bridge.gateway.fleet_now().await else { return Ok(()) };
    for worker in &fleet.workers {
        let is_it = |cached: &&CachedModel| {
            let key = &cached.key;
            key.model_id == *name
                && version.is_none_or(|version| key.version == version)
                && matches!(cached.state, ModelState::Ready | ModelState::Loading)
        };
        if let Some(held) = worker.report.model_cache.iter().find(is_it) {
            let message = format!(
                "{} is in the memory of worker {}; wait until it is unloaded, or force it (--force)",
                held.key,
                worker.report.worker_id.short()
            );
            return Err(WireError::new(ErrorCode::InvalidValue, message).with_param("model"));
        }
    }
    Ok(())
}

/// Lists the aliases, also those whose model is gone.
#[utoipa::path(
    get, path = "/admin/v1/aliases", tag = "admin", operation_id = "listAliases", security(("bearer" = [])),
    responses(
        (status = 200, description = "Every alias, by name", body = crate::http_bridge::AliasList),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn aliases(State(bridge): State<Bridge>, inquiry: Inquiry) -> Response<Body> {
    let listed = async {
        operator(&bridge, &inquiry).await?;
        let Catalog { aliases, .. } = bridge.gateway.ask_registry(CATALOG_LIST, &Empty {}).await?;
        Ok(json(&AliasList { aliases }))
    };
    respond(inquiry.context, listed.await)
}

/// Gives a model another name, within five seconds.
#[utoipa::path(
    post, path = "/admin/v1/aliases", tag = "admin", operation_id = "setAlias", security(("bearer" = [])),
    request_body(content = crate::http_bridge::AliasSet, content_type = "application/json"),
    responses(
        (status = 200, description = "The alias as it is kept", body = crate::http_bridge::AliasEntry),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn set_alias(State(bridge): State<Bridge>, inquiry: Inquiry, body: Body) -> Response<Body> {
    let set = async {
        let token = operator(&bridge, &inquiry).await?;
        let request: AliasSet = read(body).await?;
        let set: AliasEntry = bridge.gateway.ask_registry(ALIAS_SET, &ByOperator { token, request }).await?;
        info!(alias = %set.alias, target = %set.target, "alias set");
        Ok(json(&set))
    };
    respond(inquiry.context, set.await)
}

/// Forgets an alias; requests for it are refused within five seconds.
#[utoipa::path(
    delete, path = "/admin/v1/aliases/{alias}", tag = "admin", operation_id = "removeAlias", security(("bearer" = [])),
    params(("alias" = String, Path, description = "The name")),
    responses(
        (status = 200, description = "Whether there was such an alias", body = crate::http_bridge::AliasRemoved),
        crate::http_bridge::Errors,
    ),
)]
pub(crate) async fn remove_alias(
    State(bridge): State<Bridge>,
    Segment(alias): Segment,
    inquiry: Inquiry,
) -> Response<Body> {
    let removed = async {
        let token = operator(&bridge, &inquiry).await?;
        let request = AliasRemove { alias: alias.parse().map_err(|_| catalog::not_found(&alias))? };
        let removed: AliasRemoved = bridge.gateway.ask_registry(ALIAS_REMOVE, &ByOperator { token, request }).await?;
        info!(alias, found = removed.found, "alias forgotten");
        Ok(json(&removed))
    };
    respond(inquiry.context, removed.await)
}

async fn read<T: DeserializeOwned>(body: Body) -> Result<T, WireError> {
    Ok(codec::decode(&request_body::read(&mut { body }, NEW_BYTES_MAX, BODY_IDLE).await?)?)
}

/// Lets an operator in and returns the token, by which the registry knows the operator, too.
async fn operator(bridge: &Bridge, inquiry: &Inquiry) -> Result<String, WireError> {
    let Inquiry { context, token } = inquiry;
    bridge.gateway.authenticate(token.as_deref(), context.origin, Scope::Admin).await?;
    Ok(token.clone().unwrap_or_default())
}

fn member_key(text: &str) -> Result<PublicKey, WireError> {
    text.parse().map_err(|malformed: protocol::MalformedId| {
        WireError::new(ErrorCode::InvalidValue, malformed.to_string()).with_param("publicKey")
    })
}

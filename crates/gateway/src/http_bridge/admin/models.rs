//! Admin endpoints for models: list, add, remove, load, unload, and how long a model stays in memory.

use axum::Json;
use axum::body::Body;
use axum::extract::RawQuery;
use protocol::control::{
    MODEL_ADD, MODEL_KEEP, MODEL_REMOVE, ModelAdd, ModelKeep, ModelMove, ModelRemove, ModelRemoved, ModelResidency,
};
use protocol::health::{CachedModel, ModelState};
use protocol::model::{ModelEntry, ModelKey, ModelRef};
use protocol::{ErrorCode, ModelName, ModelVersion, WireError};
use serde::Deserialize;
use tracing::info;
use utoipa::ToSchema;

use super::{AdminBody, Operator, decode, read};
use crate::catalog;
use crate::gateway::Gateway;
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Segment;
use crate::openai::response::models::ModelList;
use crate::published;

/// Lists all registered models, including those that no worker serves.
#[utoipa::path(
    get, path = "/admin/v1/models", tag = "admin", operation_id = "listRegisteredModels", security(("bearer" = [])),
    responses(
        (status = 200, description = "All models, ordered by name and then by version", body = ModelList),
        ApiError,
    ),
)]
pub(crate) async fn list(Operator { gateway, .. }: Operator) -> Result<Json<ModelList>, ApiError> {
    let (models, fleet) = (gateway.models_now().await?, gateway.fleet_now().await?);
    Ok(Json(ModelList::registered(&models, &fleet)))
}

/// Registers a model.
///
/// At least one worker's artifact store must have its artifact, or no worker can serve the model.
#[utoipa::path(
    post, path = "/admin/v1/models", tag = "admin", operation_id = "addModel", security(("bearer" = [])),
    request_body(content = published::ModelAdd, content_type = "application/json"),
    responses(
        (status = 200, description = "The registered model", body = published::ModelEntry),
        ApiError,
    ),
)]
pub(crate) async fn add(operator: Operator, AdminBody(new): AdminBody<ModelAdd>) -> Result<Json<ModelEntry>, ApiError> {
    let added: ModelEntry = operator.ask_registry(MODEL_ADD, new).await?;
    info!(model = %added.key, digest = %added.digest, "model registered");
    Ok(Json(added))
}

/// Removes a model.
///
/// If a worker has it in memory or an alias stands for it, this requires `force`.
#[utoipa::path(
    delete, path = "/admin/v1/models/{id}", tag = "admin", operation_id = "removeModel", security(("bearer" = [])),
    params(
        ("id" = String, Path, description = "`name@MAJOR.MINOR`, or `name` if it has only one version"),
        ("force" = Option<bool>, Query, description = "Remove it even if it is in use, with the aliases that stand for it"),
    ),
    responses(
        (status = 200, description = "What was removed", body = published::ModelRemoved),
        ApiError,
    ),
)]
pub(crate) async fn remove(
    Segment(id): Segment,
    RawQuery(query): RawQuery,
    operator: Operator,
) -> Result<Json<ModelRemoved>, ApiError> {
    let ModelRef { name: model_id, version, adapter: None } = catalog::parse_ref(&id)? else {
        return Err(catalog::not_found(&id).into());
    };
    let force = query.is_some_and(|query| query.split('&').any(|part| part == "force=true"));
    if !force {
        check_unloaded(&operator.gateway, &model_id, version).await?;
    }
    let removed: ModelRemoved = operator.ask_registry(MODEL_REMOVE, ModelRemove { model_id, version, force }).await?;
    info!(model = %removed.key, found = removed.found, "model forgotten");
    Ok(Json(removed))
}

/// Returns an error if a worker has the model in memory or loads it. If no orchestrator responds, this is unknown and
/// the check passes.
async fn check_unloaded(gateway: &Gateway, name: &ModelName, version: Option<ModelVersion>) -> Result<(), WireError> {
    let Ok(fleet) = gateway.fleet_now().await else { return Ok(()) };
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

/// Loads a model on the workers that serve it, and returns its state on them.
#[utoipa::path(
    post, path = "/admin/v1/models/{id}/load", tag = "admin", operation_id = "loadModel", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name` or `name@MAJOR.MINOR`, or an alias")),
    request_body(content = Option<Kept>, content_type = "application/json"),
    responses(
        (status = 200, description = "State of the model on each worker", body = published::ModelResidency),
        ApiError,
    ),
)]
pub(crate) async fn load(
    Segment(id): Segment,
    operator: Operator,
    body: Body,
) -> Result<Json<ModelResidency>, ApiError> {
    let bytes = read(body).await?;
    // A request without a body loads the model and changes nothing.
    let change: Kept = if bytes.is_empty() { Kept::default() } else { decode(&bytes)? };
    let keep_alive_secs = change.keep_alive_secs;
    let key = operator.gateway.model_key(&id).await?;
    if keep_alive_secs.is_some() {
        set_keep(&operator, &key, Kept { pin: None, keep_alive_secs }).await?;
    }
    info!(model = %key, keep_alive_secs, "an operator has the model loaded");
    Ok(Json(operator.gateway.move_model(ModelMove { key, load: true, keep_alive_secs }).await?))
}

/// Unloads a model from the workers that serve it, unless jobs run on it, and returns its state on them.
#[utoipa::path(
    post, path = "/admin/v1/models/{id}/unload", tag = "admin", operation_id = "unloadModel", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name` or `name@MAJOR.MINOR`, or an alias")),
    responses(
        (status = 200, description = "State of the model on each worker", body = published::ModelResidency),
        ApiError,
    ),
)]
pub(crate) async fn unload(Segment(id): Segment, operator: Operator) -> Result<Json<ModelResidency>, ApiError> {
    let key = operator.gateway.model_key(&id).await?;
    info!(model = %key, "an operator has the model unloaded");
    Ok(Json(operator.gateway.move_model(ModelMove { key, load: false, keep_alive_secs: None }).await?))
}

/// Sets how long workers keep a model in memory.
///
/// Workers apply the change within seconds and keep it after a restart. A worker's own settings take precedence.
/// Omitted fields are not changed.
#[utoipa::path(
    post, path = "/admin/v1/models/{id}/keep", tag = "admin", operation_id = "keepModel", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name` or `name@MAJOR.MINOR`, or an alias")),
    request_body(content = Kept, content_type = "application/json"),
    responses(
        (status = 200, description = "The registered model", body = published::ModelEntry),
        ApiError,
    ),
)]
pub(crate) async fn keep(
    Segment(id): Segment,
    operator: Operator,
    AdminBody(change): AdminBody<Kept>,
) -> Result<Json<ModelEntry>, ApiError> {
    let key = operator.gateway.model_key(&id).await?;
    Ok(Json(set_keep(&operator, &key, change).await?))
}

/// How long workers keep a model in memory.
#[derive(Default, Deserialize, ToSchema)]
#[schema(as = ModelKept)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Kept {
    /// Whether workers never unload the model. `load` does not change this.
    pin: Option<bool>,
    /// Seconds without work after which workers unload the model; -1 for never.
    #[schema(minimum = -1)]
    keep_alive_secs: Option<i64>,
}

async fn set_keep(operator: &Operator, key: &ModelKey, change: Kept) -> Result<ModelEntry, WireError> {
    let Kept { pin, keep_alive_secs } = change;
    let ModelKey { model_id, version } = key.clone();
    let request = ModelKeep { model_id, version: Some(version), pin, keep_alive_secs };
    let kept = operator.ask_registry(MODEL_KEEP, request).await?;
    info!(model = %key, ?pin, ?keep_alive_secs, "an operator said how long the model is kept");
    Ok(kept)
}

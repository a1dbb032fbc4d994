//! Admin endpoints for adapters: list, add, remove.

use axum::Json;
use protocol::control::{
    ADAPTER_ADD, ADAPTER_REMOVE, AdapterAdd, AdapterList, AdapterRemove, AdapterRemoved, CATALOG_LIST, Catalog, Empty,
};
use protocol::model::{AdapterEntry, ModelRef};
use tracing::info;

use super::{AdminBody, Operator};
use crate::catalog;
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Segment;
use crate::published;

/// Lists the adapters of every model.
#[utoipa::path(
    get, path = "/admin/v1/adapters", tag = "admin", operation_id = "listAdapters", security(("bearer" = [])),
    responses(
        (status = 200, description = "All adapters, ordered by model and then by name", body = published::AdapterList),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator) -> Result<Json<AdapterList>, ApiError> {
    let Catalog { adapters, .. } = operator.gateway.ask_registry(CATALOG_LIST, &Empty {}).await?;
    Ok(Json(AdapterList { adapters }))
}

/// Registers an adapter of a model.
///
/// At least one worker's artifact store must have its artifact, or no worker can serve the adapter.
#[utoipa::path(
    post, path = "/admin/v1/adapters", tag = "admin", operation_id = "addAdapter", security(("bearer" = [])),
    request_body(content = published::AdapterAdd, content_type = "application/json"),
    responses(
        (status = 200, description = "The registered adapter", body = published::AdapterEntry),
        ApiError,
    ),
)]
pub(crate) async fn add(
    operator: Operator,
    AdminBody(new): AdminBody<AdapterAdd>,
) -> Result<Json<AdapterEntry>, ApiError> {
    let added: AdapterEntry = operator.ask_registry(ADAPTER_ADD, new).await?;
    info!(adapter = %added.key, digest = %added.digest, "adapter registered");
    Ok(Json(added))
}

/// Removes an adapter. Requests for it are refused within five seconds.
#[utoipa::path(
    delete, path = "/admin/v1/adapters/{id}", tag = "admin", operation_id = "removeAdapter", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name:adapter` for the newest version, or `name@MAJOR.MINOR:adapter`")),
    responses(
        (status = 200, description = "Whether the adapter existed", body = published::AdapterRemoved),
        ApiError,
    ),
)]
pub(crate) async fn remove(Segment(id): Segment, operator: Operator) -> Result<Json<AdapterRemoved>, ApiError> {
    let ModelRef { name, version, adapter } = catalog::parse_ref(&id)?;
    let adapter = adapter.ok_or_else(|| catalog::not_found(&id))?;
    let old = AdapterRemove { model_id: name, version, adapter };
    let removed: AdapterRemoved = operator.ask_registry(ADAPTER_REMOVE, old).await?;
    info!(adapter = id, found = removed.found, "adapter forgotten");
    Ok(Json(removed))
}

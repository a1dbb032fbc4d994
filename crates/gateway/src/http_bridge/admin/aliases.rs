//! Admin endpoints for aliases: list, set, remove.

use axum::Json;
use protocol::control::{
    ALIAS_REMOVE, ALIAS_SET, AliasList, AliasRemove, AliasRemoved, AliasSet, CATALOG_LIST, Catalog, Empty,
};
use protocol::model::AliasEntry;
use tracing::info;

use super::{AdminBody, Operator};
use crate::catalog;
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Segment;
use crate::published;

/// Lists all aliases, including those whose model no longer exists.
#[utoipa::path(
    get, path = "/admin/v1/aliases", tag = "admin", operation_id = "listAliases", security(("bearer" = [])),
    responses(
        (status = 200, description = "All aliases, ordered by name", body = published::AliasList),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator) -> Result<Json<AliasList>, ApiError> {
    let Catalog { aliases, .. } = operator.gateway.ask_registry(CATALOG_LIST, &Empty {}).await?;
    Ok(Json(AliasList { aliases }))
}

/// Sets an alias. It takes effect within five seconds.
#[utoipa::path(
    post, path = "/admin/v1/aliases", tag = "admin", operation_id = "setAlias", security(("bearer" = [])),
    request_body(content = published::AliasSet, content_type = "application/json"),
    responses(
        (status = 200, description = "The alias as it is stored", body = published::AliasEntry),
        ApiError,
    ),
)]
pub(crate) async fn set(operator: Operator, AdminBody(new): AdminBody<AliasSet>) -> Result<Json<AliasEntry>, ApiError> {
    let set: AliasEntry = operator.ask_registry(ALIAS_SET, new).await?;
    info!(alias = %set.alias, target = %set.target, "alias set");
    Ok(Json(set))
}

/// Removes an alias. Requests for it are refused within five seconds.
#[utoipa::path(
    delete, path = "/admin/v1/aliases/{alias}", tag = "admin", operation_id = "removeAlias", security(("bearer" = [])),
    params(("alias" = String, Path, description = "Name of the alias")),
    responses(
        (status = 200, description = "Whether the alias existed", body = published::AliasRemoved),
        ApiError,
    ),
)]
pub(crate) async fn remove(Segment(alias): Segment, operator: Operator) -> Result<Json<AliasRemoved>, ApiError> {
    let request = AliasRemove { alias: alias.parse().map_err(|_| catalog::not_found(&alias))? };
    let removed: AliasRemoved = operator.ask_registry(ALIAS_REMOVE, request).await?;
    info!(alias, found = removed.found, "alias forgotten");
    Ok(Json(removed))
}

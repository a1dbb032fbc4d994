//! Admin endpoints for dead letters: list, show, replay, delete.

use axum::Json;
use protocol::jobs::{
    DeadLetter, DeadLetterList, DeadLetterPurge, DeadLetterQuery, DeadLetterReplayed, DeadLettersPurged,
};
use protocol::{ErrorCode, UnixMillis, WireError};

use super::jobs::limit;
use super::{Operator, request_id};
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::{Query, Segment};
use crate::operations::Cursor;
use crate::published;

/// Lists dead letters, the newest first: failed jobs that are kept with their requests.
#[utoipa::path(
    get, path = "/admin/v1/dead-letters", tag = "admin", operation_id = "listDeadLetters", security(("bearer" = [])),
    params(
        ("tenant" = Option<String>, Query, description = "Only letters of this tenant"),
        ("model" = Option<String>, Query, description = "Only letters of this model, in any version"),
        ("limit" = Option<u32>, Query, description = "The most letters to return; 50 if omitted, at most 200"),
        ("after" = Option<String>, Query, description = "`next` of the page before"),
    ),
    responses(
        (status = 200, description = "A page of letters", body = published::DeadLetterList),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator, query: Query) -> Result<Json<DeadLetterList>, ApiError> {
    let after: Option<Cursor> = query.get("after")?;
    let wanted = DeadLetterQuery {
        tenant_id: query.get("tenant")?,
        model_id: query.get("model")?,
        before: None,
        limit: limit(&query)?,
    };
    Ok(Json(operator.gateway.list_dead_letters(operator.token, wanted, after.as_ref()).await?))
}

/// Shows the newest dead letter of a request.
#[utoipa::path(
    get, path = "/admin/v1/dead-letters/{correlationId}", tag = "admin", operation_id = "showDeadLetter", security(("bearer" = [])),
    params(
        ("correlationId" = String, Path, format = "uuid", description = "Id of the request, as in the header `x-request-id`"),
        ("payload" = Option<bool>, Query, description = "Return the request too, with its prompt"),
    ),
    responses(
        (status = 200, description = "The letter", body = published::DeadLetter),
        ApiError,
    ),
)]
pub(crate) async fn show(
    Segment(correlation_id): Segment,
    operator: Operator,
    query: Query,
) -> Result<Json<DeadLetter>, ApiError> {
    let payload = query.get("payload")?.unwrap_or(false);
    let id = request_id(&correlation_id)?;
    Ok(Json(operator.gateway.show_dead_letter(operator.token, id, payload).await?))
}

/// Runs the request of a dead letter again, and waits for its end.
///
/// It is a new request of the same tenant, billed like any other. The letter is deleted if it completes.
#[utoipa::path(
    post, path = "/admin/v1/dead-letters/{correlationId}/replay", tag = "admin", operation_id = "replayDeadLetter", security(("bearer" = [])),
    params(
        ("correlationId" = String, Path, format = "uuid", description = "Id of the request, as in the header `x-request-id`"),
        ("keep" = Option<bool>, Query, description = "Keep the letter even if the request completes"),
    ),
    responses(
        (status = 200, description = "What became of the new request", body = published::DeadLetterReplayed),
        ApiError,
    ),
)]
pub(crate) async fn replay(
    Segment(correlation_id): Segment,
    operator: Operator,
    query: Query,
) -> Result<Json<DeadLetterReplayed>, ApiError> {
    let (id, keep) = (request_id(&correlation_id)?, query.get("keep")?.unwrap_or(false));
    Ok(Json(operator.gateway.replay_dead_letter(operator.token, id, keep).await?))
}

/// Deletes the dead letters of a request.
#[utoipa::path(
    delete, path = "/admin/v1/dead-letters/{correlationId}", tag = "admin", operation_id = "purgeDeadLetter", security(("bearer" = [])),
    params(("correlationId" = String, Path, format = "uuid", description = "Id of the request, as in the header `x-request-id`")),
    responses(
        (status = 200, description = "How many were deleted", body = published::DeadLettersPurged),
        ApiError,
    ),
)]
pub(crate) async fn purge(
    Segment(correlation_id): Segment,
    operator: Operator,
) -> Result<Json<DeadLettersPurged>, ApiError> {
    let correlation_id = Some(request_id(&correlation_id)?);
    let wanted = DeadLetterPurge { correlation_id, ..DeadLetterPurge::default() };
    Ok(Json(operator.gateway.purge_dead_letters(operator.token, wanted).await?))
}

/// Deletes the dead letters of jobs that died before a time.
#[utoipa::path(
    delete, path = "/admin/v1/dead-letters", tag = "admin", operation_id = "purgeDeadLetters", security(("bearer" = [])),
    params(("before" = u64, Query, description = "Milliseconds since 1970-01-01 UTC")),
    responses(
        (status = 200, description = "How many were deleted", body = published::DeadLettersPurged),
        ApiError,
    ),
)]
pub(crate) async fn purge_old(operator: Operator, query: Query) -> Result<Json<DeadLettersPurged>, ApiError> {
    let before: Option<u64> = query.get("before")?;
    let Some(before) = before else {
        let message = "name the time before which dead letters are deleted: ?before=MILLISECONDS";
        return Err(WireError::new(ErrorCode::InvalidValue, message).with_param("before").into());
    };
    let wanted = DeadLetterPurge { died_before: Some(UnixMillis(before)), ..DeadLetterPurge::default() };
    Ok(Json(operator.gateway.purge_dead_letters(operator.token, wanted).await?))
}

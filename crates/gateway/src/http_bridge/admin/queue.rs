//! Admin endpoint for waiting jobs.

use axum::Json;
use protocol::queue::{QUEUE_PAGE_MAX, WaitingJobs};

use super::Operator;
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Query;
use crate::published;

/// Lists the jobs that wait for a free slot, the next ones of each model first.
#[utoipa::path(
    get, path = "/admin/v1/queue", tag = "admin", operation_id = "listQueue", security(("bearer" = [])),
    params(("limit" = Option<u32>, Query, description = "The most jobs to return; 200 if omitted, at most 1000")),
    responses(
        (status = 200, description = "The waiting jobs, and how many there are in all", body = published::WaitingJobs),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator, query: Query) -> Result<Json<WaitingJobs>, ApiError> {
    const USUAL: u32 = 200;
    let limit = query.get::<u32>("limit")?.unwrap_or(USUAL).clamp(1, QUEUE_PAGE_MAX);
    Ok(Json(operator.gateway.list_waiting(operator.token, limit).await?))
}

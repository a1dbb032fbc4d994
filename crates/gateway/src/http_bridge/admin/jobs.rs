//! Admin endpoints for jobs: list, show, cancel.

use axum::Json;
use protocol::WireError;
use protocol::jobs::{CancelledJobs, JobList, JobQuery, JobStatus, PAGE_MAX};
use tracing::info;

use super::{Operator, request_id};
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::{Query, Segment};
use crate::operations::Cursor;
use crate::published;

/// Lists running and settled jobs, the newest first. Settled jobs are kept for a limited time.
#[utoipa::path(
    get, path = "/admin/v1/jobs", tag = "admin", operation_id = "listJobs", security(("bearer" = [])),
    params(
        ("status" = Option<String>, Query, description = "`running`, `completed`, `failed`, `cancelled` or `dead`"),
        ("tenant" = Option<String>, Query, description = "Only jobs of this tenant"),
        ("model" = Option<String>, Query, description = "Only jobs of this model, in any version"),
        ("limit" = Option<u32>, Query, description = "The most jobs to return; 50 if omitted, at most 200"),
        ("after" = Option<String>, Query, description = "`next` of the page before"),
    ),
    responses(
        (status = 200, description = "A page of jobs, which may be empty although another follows", body = published::JobList),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator, query: Query) -> Result<Json<JobList>, ApiError> {
    let after: Option<Cursor> = query.get("after")?;
    let wanted = JobQuery {
        status: query.get::<JobStatus>("status")?,
        tenant_id: query.get("tenant")?,
        model_id: query.get("model")?,
        before: None,
        limit: limit(&query)?,
    };
    Ok(Json(operator.gateway.list_jobs(wanted, after.as_ref()).await?))
}

/// Returns the size of the page that a query asks for.
pub(super) fn limit(query: &Query) -> Result<u32, WireError> {
    const USUAL: u32 = 50;
    Ok(query.get::<u32>("limit")?.unwrap_or(USUAL).clamp(1, PAGE_MAX))
}

/// Shows the jobs of a request, the newest first. There is one, unless the request was repeated with another token.
#[utoipa::path(
    get, path = "/admin/v1/jobs/{correlationId}", tag = "admin", operation_id = "showJobs", security(("bearer" = [])),
    params(("correlationId" = String, Path, format = "uuid", description = "Id of the request, as in the header `x-request-id`")),
    responses(
        (status = 200, description = "The jobs; none if no orchestrator knows one", body = published::JobList),
        ApiError,
    ),
)]
pub(crate) async fn show(Segment(correlation_id): Segment, operator: Operator) -> Result<Json<JobList>, ApiError> {
    Ok(Json(operator.gateway.show_jobs(request_id(&correlation_id)?).await?))
}

/// Cancels the jobs of a request that run or wait. Its client gets the error `cancelled_by_operator`, and what it has
/// read is billed.
#[utoipa::path(
    post, path = "/admin/v1/jobs/{correlationId}/cancel", tag = "admin", operation_id = "cancelJobs", security(("bearer" = [])),
    params(("correlationId" = String, Path, format = "uuid", description = "Id of the request, as in the header `x-request-id`")),
    responses(
        (status = 200, description = "The jobs that were running, as they are now, and how many waited",
            body = published::CancelledJobs),
        ApiError,
    ),
)]
pub(crate) async fn cancel(
    Segment(correlation_id): Segment,
    operator: Operator,
) -> Result<Json<CancelledJobs>, ApiError> {
    let id = request_id(&correlation_id)?;
    let cancelled = operator.gateway.cancel_jobs(operator.token, id).await?;
    info!(correlation_id = %id, jobs = cancelled.jobs.len(), waiting = cancelled.waiting, "an operator cancelled jobs");
    Ok(Json(cancelled))
}

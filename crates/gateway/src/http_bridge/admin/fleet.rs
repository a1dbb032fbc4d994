//! Admin endpoints for the live workers, and for how jobs were placed on them.

use axum::Json;
use protocol::control::{Decision, Fleet};

use super::{Operator, request_id};
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Segment;
use crate::published;

/// Lists the live workers.
#[utoipa::path(
    get, path = "/admin/v1/nodes", tag = "admin", operation_id = "listNodes", security(("bearer" = [])),
    responses(
        (status = 200, description = "The live workers", body = published::Fleet),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator) -> Result<Json<Fleet>, ApiError> {
    Ok(Json(operator.gateway.fleet_now().await?))
}

/// Returns how a job was placed: each attempt with its candidates and its end.
///
/// The candidates of old jobs are forgotten first.
#[utoipa::path(
    get, path = "/admin/v1/jobs/{correlationId}/decision", tag = "admin", operation_id = "explainJob", security(("bearer" = [])),
    params(("correlationId" = String, Path, format = "uuid", description = "Id of the request, as in the header `x-request-id`")),
    responses(
        (status = 200, description = "How the job was placed", body = published::Decision),
        ApiError,
    ),
)]
pub(crate) async fn decision(Segment(correlation_id): Segment, operator: Operator) -> Result<Json<Decision>, ApiError> {
    Ok(Json(operator.gateway.explain(request_id(&correlation_id)?).await?))
}

//! Admin endpoints for the live workers, and for how jobs were placed on them.

use axum::Json;
use protocol::control::{Decision, Fleet};
use protocol::{CorrelationId, ErrorCode, WireError};

use super::Operator;
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

/// Returns how a job was placed: each attempt with its candidates.
#[utoipa::path(
    get, path = "/admin/v1/jobs/{correlationId}/decision", tag = "admin", operation_id = "explainJob", security(("bearer" = [])),
    params(("correlationId" = String, Path, description = "Id of the job, as in the header `x-tether-decision`")),
    responses(
        (status = 200, description = "How the job was placed", body = published::Decision),
        ApiError,
    ),
)]
pub(crate) async fn decision(Segment(correlation_id): Segment, operator: Operator) -> Result<Json<Decision>, ApiError> {
    let correlation_id: CorrelationId = correlation_id.parse().map_err(|malformed: protocol::MalformedId| {
        WireError::new(ErrorCode::InvalidValue, malformed.to_string()).with_param("correlationId")
    })?;
    Ok(Json(operator.gateway.explain(correlation_id).await?))
}

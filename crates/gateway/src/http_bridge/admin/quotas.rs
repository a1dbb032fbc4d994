//! Admin endpoint for tenants' quotas.

use axum::Json;
use protocol::quota::{QuotaList, QuotaQuery};

use super::Operator;
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Query;
use crate::published;

/// Lists what tenants use of their quotas, as each orchestrator counts it.
#[utoipa::path(
    get, path = "/admin/v1/quotas", tag = "admin", operation_id = "listQuotas", security(("bearer" = [])),
    params(("tenant" = Option<String>, Query, description = "Only this tenant; else all that have used something today")),
    responses(
        (status = 200, description = "Each rule with its limit, what is spent and reserved, and when it resets", body = published::QuotaList),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator, query: Query) -> Result<Json<QuotaList>, ApiError> {
    let wanted = QuotaQuery { tenant_id: query.get("tenant")? };
    Ok(Json(operator.gateway.list_quotas(wanted).await?))
}

//! Admin endpoints for tenants' policies: list, show, set.

use axum::Json;
use protocol::control::{
    OPERATOR_POLICY_GET, OPERATOR_POLICY_LIST, OPERATOR_POLICY_SET, OperatorRequest, PolicyRequest,
};
use protocol::policy::{InvalidPolicy, PolicyList, PolicySaved, PolicySet, TenantPolicy};
use protocol::{ErrorCode, MalformedId, TenantId, WireError};
use serde_json::Value;
use tracing::info;

use super::{AdminBody, Operator};
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Segment;
use crate::published;

/// Lists the tenants that have a policy.
#[utoipa::path(
    get, path = "/admin/v1/policies", tag = "admin", operation_id = "listPolicies", security(("bearer" = [])),
    responses(
        (status = 200, description = "The policies, ordered by tenant", body = published::PolicyList),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator) -> Result<Json<PolicyList>, ApiError> {
    let Operator { gateway, token } = operator;
    Ok(Json(gateway.ask_registry(OPERATOR_POLICY_LIST, &OperatorRequest { token }).await?))
}

/// Shows the policy of a tenant. A tenant without one has no rules.
#[utoipa::path(
    get, path = "/admin/v1/tenants/{tenant}/policy", tag = "admin", operation_id = "getPolicy", security(("bearer" = [])),
    params(("tenant" = String, Path, description = "Name of the tenant")),
    responses(
        (status = 200, description = "The policy", body = published::TenantPolicy),
        ApiError,
    ),
)]
pub(crate) async fn get(Segment(tenant): Segment, operator: Operator) -> Result<Json<TenantPolicy>, ApiError> {
    let request = PolicyRequest { tenant_id: parse_tenant(&tenant)? };
    Ok(Json(operator.ask_registry(OPERATOR_POLICY_GET, request).await?))
}

/// Sets the whole policy of a tenant. Rules that the body omits no longer apply. It takes effect within two seconds.
#[utoipa::path(
    put, path = "/admin/v1/tenants/{tenant}/policy", tag = "admin", operation_id = "setPolicy", security(("bearer" = [])),
    params(("tenant" = String, Path, description = "Name of the tenant")),
    request_body(content = published::TenantPolicy, content_type = "application/json"),
    responses(
        (status = 200, description = "The policy, with warnings of what may be a mistake", body = published::PolicySaved),
        ApiError,
    ),
)]
pub(crate) async fn set(
    Segment(tenant): Segment,
    operator: Operator,
    AdminBody(written): AdminBody<Value>,
) -> Result<Json<PolicySaved>, ApiError> {
    let tenant_id = parse_tenant(&tenant)?;
    let policy = TenantPolicy::parse(written).map_err(|invalid: InvalidPolicy| {
        WireError::new(ErrorCode::InvalidValue, invalid.to_string()).with_param("policy")
    })?;
    let saved: PolicySaved = operator.ask_registry(OPERATOR_POLICY_SET, PolicySet { tenant_id, policy }).await?;
    info!(tenant_id = %saved.tenant_id, "policy set");
    Ok(Json(saved))
}

fn parse_tenant(text: &str) -> Result<TenantId, WireError> {
    text.parse().map_err(|malformed: MalformedId| {
        WireError::new(ErrorCode::InvalidValue, malformed.to_string()).with_param("tenant")
    })
}

//! Admin endpoints for API tokens: list, create, revoke.

use axum::Json;
use protocol::control::{
    OPERATOR_TOKEN_CREATE, OPERATOR_TOKEN_LIST, OPERATOR_TOKEN_REVOKE, OperatorRequest, TokenCreate, TokenCreated,
    TokenList, TokenRevoke, TokenRevoked,
};
use tracing::info;

use super::{AdminBody, Operator};
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Segment;
use crate::published;

/// Lists the tokens, without their secrets.
#[utoipa::path(
    get, path = "/admin/v1/tokens", tag = "admin", operation_id = "listTokens", security(("bearer" = [])),
    responses(
        (status = 200, description = "All tokens, the oldest first", body = published::TokenList),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator) -> Result<Json<TokenList>, ApiError> {
    let Operator { gateway, token } = operator;
    Ok(Json(gateway.ask_registry(OPERATOR_TOKEN_LIST, &OperatorRequest { token }).await?))
}

/// Creates a token.
#[utoipa::path(
    post, path = "/admin/v1/tokens", tag = "admin", operation_id = "createToken", security(("bearer" = [])),
    request_body(content = published::TokenCreate, content_type = "application/json"),
    responses(
        (status = 200, description = "The token, which is returned only once", body = published::TokenCreated),
        ApiError,
    ),
)]
pub(crate) async fn create(
    operator: Operator,
    AdminBody(new): AdminBody<TokenCreate>,
) -> Result<Json<TokenCreated>, ApiError> {
    let created: TokenCreated = operator.ask_registry(OPERATOR_TOKEN_CREATE, new).await?;
    info!(key_id = created.key_id, tenant_id = %created.tenant_id, "token made");
    Ok(Json(created))
}

/// Revokes a token. It stops working within five seconds.
#[utoipa::path(
    delete, path = "/admin/v1/tokens/{keyId}", tag = "admin", operation_id = "revokeToken", security(("bearer" = [])),
    params(("keyId" = String, Path, description = "Public part of the token")),
    responses(
        (status = 200, description = "Whether the token existed", body = published::TokenRevoked),
        ApiError,
    ),
)]
pub(crate) async fn revoke(Segment(key_id): Segment, operator: Operator) -> Result<Json<TokenRevoked>, ApiError> {
    let request = TokenRevoke { key_id };
    let revoked: TokenRevoked = operator.ask_registry(OPERATOR_TOKEN_REVOKE, request.clone()).await?;
    info!(key_id = request.key_id, found = revoked.found, "token revoked");
    Ok(Json(revoked))
}

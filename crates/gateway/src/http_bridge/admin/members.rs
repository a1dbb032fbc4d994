//! Admin endpoints for the network's nodes: list, rename, revoke, and invite new ones.

use axum::Json;
use protocol::control::{
    INVITE_CREATE, InviteCreate, InviteCreated, Member, Members, NODE_LIST, NODE_RENAME, NODE_REVOKE, NodeEntry,
    NodeList, NodeRename, NodeRenamed, NodeRevoke, NodeRevoked, NodeRole, OperatorRequest,
};
use protocol::{ErrorCode, PublicKey, WireError};
use serde::Deserialize;
use tracing::info;
use utoipa::ToSchema;

use super::{AdminBody, Operator};
use crate::http_bridge::errors::ApiError;
use crate::http_bridge::extract::Segment;
use crate::published;

/// Lists all nodes that were ever enrolled, and which of them respond.
#[utoipa::path(
    get, path = "/admin/v1/members", tag = "admin", operation_id = "listMembers", security(("bearer" = [])),
    responses(
        (status = 200, description = "All nodes, in order of enrolment", body = published::Members),
        ApiError,
    ),
)]
pub(crate) async fn list(operator: Operator) -> Result<Json<Members>, ApiError> {
    let Operator { gateway, token } = operator;
    let list: NodeList = gateway.ask_registry(NODE_LIST, &OperatorRequest { token }).await?;
    let member = |node: NodeEntry| {
        let roles = node.roles.iter().filter(|role| **role != NodeRole::Worker && node.revoked_at.is_none());
        let answers = roles.map(|role| gateway.is_reachable(node.public_key, *role)).reduce(|one, other| one || other);
        Member { node, answers }
    };
    Ok(Json(Members { members: list.nodes.into_iter().map(member).collect() }))
}

/// Revokes a node. All nodes refuse it within five seconds.
#[utoipa::path(
    delete, path = "/admin/v1/members/{publicKey}", tag = "admin", operation_id = "revokeMember", security(("bearer" = [])),
    params(("publicKey" = String, Path, description = "The node's key, 64 hex digits")),
    responses(
        (status = 200, description = "Whether the node was enrolled", body = published::NodeRevoked),
        ApiError,
    ),
)]
pub(crate) async fn revoke(Segment(public_key): Segment, operator: Operator) -> Result<Json<NodeRevoked>, ApiError> {
    let request = NodeRevoke { token: operator.token, public_key: member_key(&public_key)? };
    let revoked: NodeRevoked = operator.gateway.ask_registry(NODE_REVOKE, &request).await?;
    info!(node = request.public_key.short(), found = revoked.found, "node revoked");
    Ok(Json(revoked))
}

/// Renames a node.
#[utoipa::path(
    patch, path = "/admin/v1/members/{publicKey}", tag = "admin", operation_id = "renameMember", security(("bearer" = [])),
    params(("publicKey" = String, Path, description = "The node's key, 64 hex digits")),
    request_body(content = NewName, content_type = "application/json"),
    responses(
        (status = 200, description = "Whether the node was enrolled", body = published::NodeRenamed),
        ApiError,
    ),
)]
pub(crate) async fn rename(
    Segment(public_key): Segment,
    operator: Operator,
    AdminBody(new): AdminBody<NewName>,
) -> Result<Json<NodeRenamed>, ApiError> {
    let request = NodeRename { token: operator.token, public_key: member_key(&public_key)?, name: new.name };
    Ok(Json(operator.gateway.ask_registry(NODE_RENAME, &request).await?))
}

/// Creates an invite. It is returned only once.
#[utoipa::path(
    post, path = "/admin/v1/invites", tag = "admin", operation_id = "createInvite", security(("bearer" = [])),
    request_body(content = published::InviteCreate, content_type = "application/json"),
    responses(
        (status = 200, description = "The invite, which is returned only once", body = published::InviteCreated),
        ApiError,
    ),
)]
pub(crate) async fn create_invite(
    operator: Operator,
    AdminBody(new): AdminBody<InviteCreate>,
) -> Result<Json<InviteCreated>, ApiError> {
    let request = InviteCreate { token: operator.token, ..new };
    let created: InviteCreated = operator.gateway.ask_registry(INVITE_CREATE, &request).await?;
    info!(invite = %created.invite_id, "invite made");
    Ok(Json(created))
}

/// A new name for a node.
#[derive(Deserialize, ToSchema)]
pub(crate) struct NewName {
    /// 1 to 64 printable characters.
    name: String,
}

fn member_key(text: &str) -> Result<PublicKey, WireError> {
    text.parse().map_err(|malformed: protocol::MalformedId| {
        WireError::new(ErrorCode::InvalidValue, malformed.to_string()).with_param("publicKey")
    })
}

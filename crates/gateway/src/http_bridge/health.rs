//! Health checks, metrics and the version.

use axum::body::Body;
use axum::extract::{Extension, State};
use http::{HeaderMap, HeaderValue, Response, header};
use protocol::control::Scope;
use protocol::{ErrorCode, WireError};
use serde::Serialize;
use utoipa::ToSchema;

use super::client_address::is_direct;
use super::errors::{self, ApiError};
use super::extract::{ArrivedAt, Bridge, Inquiry, Segment};
use crate::config::MetricsAccess;
use crate::folder_proof::PROOF_BYTES;
use crate::gateway::Gateway;
use crate::openai::response::error::ErrorBody;
use crate::request_context::{Origin, RequestContext};

/// The content type of OpenMetrics text.
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

#[derive(Serialize, ToSchema)]
pub(super) struct Status {
    /// `ok`.
    status: &'static str,
}

/// Whether the gateway can answer requests.
#[derive(Serialize, ToSchema)]
pub(super) struct Readiness {
    /// `ok`, or `degraded` while no registry responds and the gateway uses cached data.
    status: &'static str,
    /// Seconds since a registry last responded. Absent while one responds.
    #[serde(skip_serializing_if = "Option::is_none")]
    registry_silent_secs: Option<u64>,
    /// Seconds until the gateway refuses all requests, if no registry responds before.
    #[serde(skip_serializing_if = "Option::is_none")]
    closes_in_secs: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct FolderProof {
    /// The proof, as 64 hexadecimal digits.
    proof: String,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Version<'a> {
    /// Always `tether`.
    name: &'static str,
    /// The program's version.
    version: &'a str,
}

/// Says what runs here. Some clients ask for it before anything else.
#[utoipa::path(
    get, path = "/", tag = "operations", operation_id = "root",
    responses((status = 200, description = "A line for people", body = String, content_type = "text/plain")),
)]
pub(super) async fn root() -> &'static str {
    "Tether is running\n"
}

/// Returns 200 while the gateway is alive.
#[utoipa::path(get, path = "/healthz", tag = "operations", operation_id = "live", responses((status = 200, description = "Alive", body = Status)))]
pub(super) async fn live() -> Response<Body> {
    errors::json(&Status { status: "ok" })
}

/// The same as `/healthz`.
#[utoipa::path(get, path = "/health", tag = "operations", operation_id = "health", responses((status = 200, description = "Alive", body = Status)))]
pub(super) async fn alias() -> Response<Body> {
    live().await
}

/// Proves that the gateway runs on a data folder.
///
/// The commands of a machine ask this before they show the gateway the API key of their data folder. The proof is an
/// HMAC of the nonce and the gateway's address under a secret in the folder.
#[utoipa::path(
    get, path = "/healthz/folder/{nonce}", tag = "operations", operation_id = "proveFolder",
    params(("nonce" = String, Path, pattern = "^[0-9a-fA-F]{64}$", description = "A random number, as 64 hexadecimal digits")),
    responses(
        (status = 200, description = "The proof", body = FolderProof),
        (status = 400, description = "The nonce is malformed", body = ErrorBody),
        (status = 404, description = "This gateway has no data folder", body = ErrorBody),
    ),
)]
pub(super) async fn prove(
    State(bridge): State<Bridge>,
    Extension(ArrivedAt(address)): Extension<ArrivedAt>,
    Segment(nonce): Segment,
) -> Result<Response<Body>, ApiError> {
    let mut bytes = [0; PROOF_BYTES];
    hex::decode_to_slice(&nonce, &mut bytes)
        .map_err(|_| WireError::new(ErrorCode::InvalidValue, "the nonce has 64 hexadecimal digits"))?;
    let secret = bridge.gateway.folder_secret();
    let secret = secret.ok_or_else(|| WireError::new(ErrorCode::NotFound, "this gateway has no data folder"))?;
    Ok(errors::json(&FolderProof { proof: hex::encode(secret.prove(&bytes, address)) }))
}

/// Returns 200 while the gateway can answer requests.
///
/// This means that a worker has a model ready or loads it when a request needs it, that a registry responds or did so
/// recently and since the gateway started, and that the gateway is not stopping.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", operation_id = "ready",
    responses(
        (status = 200, description = "Ready", body = Readiness),
        (status = 503, description = "Not ready", body = ErrorBody),
    ),
)]
pub(super) async fn ready(State(bridge): State<Bridge>, Inquiry { context, .. }: Inquiry) -> Response<Body> {
    match readiness(&bridge).await {
        Ok(readiness) => errors::json(&readiness),
        Err(error) => errors::refuse(context, &error),
    }
}

async fn readiness(bridge: &Bridge) -> Result<Readiness, WireError> {
    if bridge.stop.is_cancelled() {
        return Err(WireError::new(ErrorCode::Unavailable, "this gateway is stopping"));
    }
    bridge.gateway.check_first_contact().await?;
    if !bridge.gateway.is_routable().await? {
        return Err(WireError::new(ErrorCode::NoCapacity, "no worker has a model ready"));
    }
    let membership = bridge.gateway.membership();
    if !membership.is_registry_away() {
        return Ok(Readiness { status: "ok", registry_silent_secs: None, closes_in_secs: None });
    }
    bridge.gateway.check_registry()?;
    let silence = membership.registry_silence();
    let left = bridge.gateway.config().registry_absence.saturating_sub(silence);
    Ok(Readiness {
        status: "degraded",
        registry_silent_secs: Some(silence.as_secs()),
        closes_in_secs: Some(left.as_secs()),
    })
}

/// Returns the metrics as OpenMetrics text.
#[utoipa::path(
    get, path = "/metrics", tag = "operations", operation_id = "metrics",
    security((), ("api_key" = [])),
    responses(
        (status = 200, description = "Metrics", body = String, content_type = "application/openmetrics-text"),
        (status = 401, description = "Clients of other machines need an operator's API key", body = ErrorBody),
        (status = 403, description = "The API key is not an operator's", body = ErrorBody),
    ),
)]
pub(super) async fn metrics(
    State(bridge): State<Bridge>,
    headers: HeaderMap,
    Inquiry { context, token }: Inquiry,
) -> Result<Response<Body>, ApiError> {
    check_reader(&bridge.gateway, context, &headers, token.as_deref()).await?;
    let mut response = Response::new(Body::from(bridge.gateway.exposition().encode()));
    response.headers_mut().insert(header::CONTENT_TYPE, OPEN_METRICS);
    Ok(response)
}

/// Checks whether a client may read the metrics.
async fn check_reader(
    gateway: &Gateway,
    context: RequestContext,
    headers: &HeaderMap,
    token: Option<&str>,
) -> Result<(), WireError> {
    // A proxy on this machine speaks for clients elsewhere, and headers that contradict each other count as its own.
    let is_proxy = |address| gateway.config().trusted_proxies.iter().any(|network| network.contains(address));
    let is_here = matches!(context.origin, Some(Origin::Address(from)) if from.is_loopback() && !is_proxy(from));
    let is_local = is_here && is_direct(headers, None, |_| true);
    match gateway.config().metrics_access {
        MetricsAccess::Anyone => Ok(()),
        MetricsAccess::Local if is_local => Ok(()),
        MetricsAccess::Local | MetricsAccess::Operators => {
            gateway.authenticate(token, context.origin, Scope::Admin).await.map(drop)
        }
    }
}

/// Returns the program's version.
#[utoipa::path(get, path = "/version", tag = "operations", operation_id = "version", responses((status = 200, description = "Version", body = Version)))]
pub(super) async fn version(State(bridge): State<Bridge>) -> Response<Body> {
    errors::json(&Version { name: "tether", version: bridge.gateway.version() })
}

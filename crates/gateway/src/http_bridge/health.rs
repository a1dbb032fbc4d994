//! What probes and dashboards look at.

use axum::body::Body;
use axum::extract::State;
use http::{HeaderValue, Response, header};
use protocol::{ErrorCode, WireError};
use serde::Serialize;
use utoipa::ToSchema;

use super::errors;
use super::router::{Bridge, Inquiry, respond};

/// How OpenMetrics text is announced.
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

#[derive(Serialize, ToSchema)]
pub(super) struct Status {
    /// `ok`.
    status: &'static str,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Version<'a> {
    /// Always `tether`.
    name: &'static str,
    /// The program's version.
    version: &'a str,
}

/// Says that the gateway is alive.
#[utoipa::path(get, path = "/healthz", tag = "operations", operation_id = "live", responses((status = 200, description = "Alive", body = Status)))]
pub(super) async fn live() -> Response<Body> {
    errors::json(&Status { status: "ok" })
}

/// The same as `/healthz`.
#[utoipa::path(get, path = "/health", tag = "operations", operation_id = "health", responses((status = 200, description = "Alive", body = Status)))]
pub(super) async fn alias() -> Response<Body> {
    live().await
}

/// Says whether requests can be answered: some worker has a model ready, and the gateway is not stopping.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", operation_id = "ready",
    responses(
        (status = 200, description = "Ready", body = Status),
        (status = 503, description = "Not ready", body = super::openapi::ErrorBody),
    ),
)]
pub(super) async fn ready(State(bridge): State<Bridge>, Inquiry { context, .. }: Inquiry) -> Response<Body> {
    if bridge.stop.is_cancelled() {
        return respond(context, Err(WireError::new(ErrorCode::Unavailable, "this gateway is stopping")));
    }
    if !bridge.gateway.is_routable().await {
        return respond(context, Err(WireError::new(ErrorCode::NoCapacity, "no worker has a model ready")));
    }
    errors::json(&Status { status: "ok" })
}

/// Shows the metrics, as OpenMetrics text.
#[utoipa::path(
    get, path = "/metrics", tag = "operations", operation_id = "metrics",
    responses((status = 200, description = "Metrics", body = String, content_type = "application/openmetrics-text")),
)]
pub(super) async fn metrics(State(bridge): State<Bridge>) -> Response<Body> {
    let mut response = Response::new(Body::from(bridge.gateway.metrics().encode()));
    response.headers_mut().insert(header::CONTENT_TYPE, OPEN_METRICS);
    response
}

/// Tells the program's version.
#[utoipa::path(get, path = "/version", tag = "operations", operation_id = "version", responses((status = 200, description = "Version", body = Version)))]
pub(super) async fn version(State(bridge): State<Bridge>) -> Response<Body> {
    errors::json(&Version { name: "tether", version: bridge.gateway.version() })
}

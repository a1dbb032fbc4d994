//! The admin API: its extractors and its handlers.

pub(super) mod adapters;
pub(super) mod aliases;
pub(super) mod dead_letters;
pub(super) mod fleet;
pub(super) mod jobs;
pub(super) mod members;
pub(super) mod models;
pub(super) mod policies;
pub(super) mod queue;
pub(super) mod quotas;
pub(super) mod tokens;

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use bytes::Bytes;
use http::request::Parts;
use protocol::control::{ByOperator, Scope};
use protocol::{CorrelationId, ErrorCode, MalformedId, WireError, codec};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::errors::ApiError;
use super::extract::{Bridge, context, token};
use super::request_body;
use crate::gateway::Gateway;

/// Maximum length of a request body.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// How long a client may pause while it sends the body.
const BODY_IDLE: Duration = Duration::from_secs(10);

/// An operator: a client whose token has the scope `admin`.
pub(super) struct Operator {
    gateway: Gateway,
    /// Also authenticates the operator to the registry.
    token: String,
}

impl FromRequestParts<Bridge> for Operator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, bridge: &Bridge) -> Result<Self, ApiError> {
        let token = token(&parts.headers);
        bridge.gateway.authenticate(token, context(&parts.extensions).origin, Scope::Admin).await?;
        Ok(Self { gateway: bridge.gateway.clone(), token: token.unwrap_or_default().to_owned() })
    }
}

impl Operator {
    /// Sends the registry a request that it accepts only from operators.
    async fn ask_registry<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: Request,
    ) -> Result<Reply, WireError> {
        self.gateway.ask_registry(method, &ByOperator { token: self.token.clone(), request }).await
    }
}

/// Parses the id of a request, as in the header `x-request-id` of its response.
fn request_id(text: &str) -> Result<CorrelationId, WireError> {
    text.parse().map_err(|malformed: MalformedId| {
        WireError::new(ErrorCode::InvalidValue, malformed.to_string()).with_param("correlationId")
    })
}

/// The JSON body of an operator's request.
pub(super) struct AdminBody<T>(T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for AdminBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        decode(&read(request.into_body()).await?).map(Self).map_err(ApiError::from)
    }
}

async fn read(mut body: Body) -> Result<Bytes, WireError> {
    request_body::read(&mut body, BODY_BYTES_MAX, BODY_IDLE).await
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    Ok(codec::decode(bytes)?)
}

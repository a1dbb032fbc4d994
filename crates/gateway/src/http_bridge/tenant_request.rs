//! Admitted requests for what a tenant has stored, which are no jobs.

use axum::body::Body;
use axum::extract::FromRequestParts;
use http::Response;
use http::request::Parts;
use protocol::{TenantId, WireError};

use super::errors;
use super::extract::{Bridge, context, token};
use super::job::refused;
use crate::request_context::{AdmittedRequest, RequestContext};

/// An admitted request of a tenant.
pub(crate) struct TenantRequest {
    pub(super) context: RequestContext,
    pub(super) admitted: AdmittedRequest,
}

impl FromRequestParts<Bridge> for TenantRequest {
    type Rejection = Response<Body>;

    async fn from_request_parts(parts: &mut Parts, bridge: &Bridge) -> Result<Self, Response<Body>> {
        let context = context(&parts.extensions);
        let admitted = bridge.gateway.admit_or_refuse(token(&parts.headers), context).await;
        let admitted = admitted.map_err(|refusal| refused(&refusal, context.correlation_id))?;
        Ok(Self { context, admitted })
    }
}

impl TenantRequest {
    pub(super) fn tenant_id(&self) -> TenantId {
        self.admitted.grant.tenant_id.clone()
    }

    /// Ends the request with a response.
    pub(super) fn answer(self, response: Result<Response<Body>, WireError>) -> Response<Body> {
        let Self { context, mut admitted } = self;
        match response {
            Ok(mut response) => {
                admitted.record.answered();
                errors::add_rate(response.headers_mut(), &admitted.rate);
                errors::with_request(response, context.correlation_id)
            }
            Err(error) => refused(&admitted.refuse(error), context.correlation_id),
        }
    }
}

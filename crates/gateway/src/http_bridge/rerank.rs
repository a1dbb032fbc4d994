//! `POST /v1/rerank`, in the format that Jina's and Cohere's clients share, also under the other paths that they use.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;

use super::errors::{self, ApiError};
use super::extract::Bridge;
use super::job::{self, ResponseHeaders};
use super::repeats::RepeatHeaders;
use crate::answer;
use crate::openai::request::{self, RerankRequest};
use crate::openai::response::ranking::RerankResponse;

/// Ranks documents by their relevance to a query.
#[utoipa::path(
    post, path = "/v1/rerank", tag = "openai", operation_id = "rerank", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body = RerankRequest,
    responses((status = 200, description = "The most relevant documents", body = RerankResponse), ApiError),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    rank(&bridge, request).await
}

/// The same as `POST /v1/rerank`, for clients of Cohere's second version.
#[utoipa::path(
    post, path = "/v2/rerank", tag = "openai", operation_id = "rerankV2", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body = RerankRequest,
    responses((status = 200, description = "The most relevant documents", body = RerankResponse), ApiError),
)]
pub(super) async fn second(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    rank(&bridge, request).await
}

/// The same as `POST /v1/rerank`, for clients whose base address has no version.
#[utoipa::path(
    post, path = "/rerank", tag = "openai", operation_id = "rerankWithoutVersion", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body = RerankRequest,
    responses((status = 200, description = "The most relevant documents", body = RerankResponse), ApiError),
)]
pub(super) async fn bare(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    rank(&bridge, request).await
}

async fn rank(bridge: &Bridge, request: Request) -> Response<Body> {
    let request = match job::ask(bridge, request, request::parse_rerank).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let asked = request.parsed;
    let (admitted, job) = match job::identify(bridge, request.context, request.admitted, asked.job.clone(), false) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(request.context, &job, request.rate);
    let id = response_headers.correlation_id();
    job::collect(bridge, job::open(bridge, admitted, job), response_headers, |_, whole| {
        let ranked = RerankResponse::of(&asked, id, whole);
        Ok(errors::json(&ranked.ok_or_else(|| answer::broken("the answer has no scores"))?))
    })
    .await
}

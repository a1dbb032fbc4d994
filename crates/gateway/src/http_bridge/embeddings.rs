//! `POST /v1/embeddings`.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;

use super::errors::{self, ApiError};
use super::extract::Bridge;
use super::job::{self, ResponseHeaders};
use super::repeats::RepeatHeaders;
use crate::openai::request::{self, EmbeddingRequest, Vectors};
use crate::openai::response::vectors::{EmbeddingList, write_vectors};

/// Creates an embedding vector for each text.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "openai", operation_id = "createEmbedding", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body = EmbeddingRequest,
    responses(
        (status = 200, description = "The vectors, in the order of the texts", body = EmbeddingList),
        ApiError,
    ),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    let request = match job::ask(&bridge, request, request::parse_embeddings).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let Vectors { job, model, encoding } = request.parsed;
    let (admitted, job) = match job::identify(&bridge, request.context, request.admitted, job, false) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(request.context, &job, request.rate);
    let opening = job::open(&bridge, admitted, job);
    job::collect(&bridge, opening, response_headers, |_, whole| {
        Ok(errors::json(&write_vectors(&model, encoding, whole).ok_or_else(job::unwritable)?))
    })
    .await
}

//! `POST /v1/embeddings`.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;
use protocol::{ErrorCode, WireError};

use super::errors::{self, ApiError};
use super::extract::Bridge;
use super::job::{self, AnswerFacts, Opening, ResponseHeaders};
use super::repeats::RepeatHeaders;
use crate::openai::request::{self, EmbeddingRequest, Encoding, Vectors};
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
    match whole(job::open(&bridge, admitted, job), &model, encoding).await {
        Ok((mut response, facts)) => {
            response_headers.add(&bridge, response.headers_mut(), Some(&facts));
            response
        }
        Err(error) => response_headers.failure(&bridge, &error),
    }
}

async fn whole(opening: Opening, model: &str, encoding: Encoding) -> Result<(Response<Body>, AnswerFacts), WireError> {
    let mut answer = opening.await?;
    let whole = answer.collect().await?;
    let facts = AnswerFacts::of(&answer);
    let written = write_vectors(model, encoding, &whole);
    let written = written.ok_or_else(|| WireError::new(ErrorCode::InternalError, "the answer could not be written"))?;
    Ok((errors::json(&written), facts))
}

//! `POST /v1/chat/completions/input_tokens`, as in llama-server.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::errors::{self, ApiError};
use super::extract::Bridge;
use super::job::{self, ResponseHeaders};
use crate::answer;
use crate::openai::request::{self, ChatCompletionRequest};

/// The number of a prompt's tokens.
#[derive(Serialize, ToSchema)]
pub(super) struct InputTokens {
    /// `response.input_tokens`.
    object: &'static str,
    /// Number of tokens, including those of the chat template and of tools.
    input_tokens: u32,
}

/// Counts the input tokens of a conversation, without an answer and without cost.
#[utoipa::path(
    post, path = "/v1/chat/completions/input_tokens", tag = "openai", operation_id = "countInputTokens",
    security(("bearer" = [])), request_body = ChatCompletionRequest,
    responses(
        (status = 200, description = "The number of tokens", body = InputTokens),
        ApiError,
    ),
)]
pub(super) async fn count(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    let request = match job::ask(&bridge, request, request::parse_chat).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let mut job = request.parsed.job;
    (job.input.count_only, job.input.n) = (true, None);
    let (admitted, job) = match job::identify(&bridge, request.context, request.admitted, job, false) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(request.context, &job, request.rate);
    job::collect(&bridge, job::open(&bridge, admitted, job), response_headers, |_, whole| {
        let input_tokens = whole.input_tokens.ok_or_else(|| answer::broken("the answer has no number of tokens"))?;
        Ok(errors::json(&InputTokens { object: "response.input_tokens", input_tokens }))
    })
    .await
}

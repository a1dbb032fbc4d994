//! `POST /v1/chat/completions`.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;

use super::completions::generate;
use super::errors::ApiError;
use super::extract::Bridge;
use super::repeats::RepeatHeaders;
use crate::openai::Endpoint;
use crate::openai::request::{self, ChatCompletionRequest};
use crate::openai::response::whole::ChatCompletion;

/// Answers a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "openai", operation_id = "createChatCompletion", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body = ChatCompletionRequest,
    responses(
        (status = 200, description = "The answer, as server-sent events if `stream` is true", content(
            (ChatCompletion = "application/json"), (String = "text/event-stream"),
        )),
        ApiError,
    ),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    generate(&bridge, request, Endpoint::Chat, request::parse_chat).await
}

//! `POST /v1/messages` and `POST /v1/messages/count_tokens`.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;

use super::errors::{self, MessageError};
use super::extract::Bridge;
use super::job::{self, ResponseHeaders};
use super::repeats::RepeatHeaders;
use crate::answer;
use crate::anthropic::request::{self, MessageCountRequest, MessageOrder, MessagesRequest};
use crate::anthropic::response::events::Events;
use crate::anthropic::response::whole::write_whole;
use crate::anthropic::response::{Heading, Message, TokenCount};

/// Answers a conversation, in Anthropic's format.
#[utoipa::path(
    post, path = "/v1/messages", tag = "anthropic", operation_id = "createMessage", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body = MessagesRequest,
    responses(
        (status = 200, description = "The answer, as server-sent events if `stream` is true", content(
            (Message = "application/json"), (String = "text/event-stream"),
        )),
        MessageError,
    ),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    let request = match job::ask(&bridge, request, request::parse_messages).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let MessageOrder { job, model, stream } = request.parsed;
    let (admitted, job) = match job::identify(&bridge, request.context, request.admitted, job, stream) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(request.context, &job, request.rate);
    let heading = Heading::new(model, &job, response_headers.correlation_id());
    let opening = job::open(&bridge, admitted, job);
    if stream {
        return job::stream(&bridge, opening, Events::new(heading), "text/event-stream", response_headers).await;
    }
    job::collect(&bridge, opening, response_headers, |answer, whole| {
        Ok(errors::json(&write_whole(heading, answer, whole).map_err(|_| job::unwritable())?))
    })
    .await
}

/// Counts the input tokens of a conversation, without an answer and without cost.
#[utoipa::path(
    post, path = "/v1/messages/count_tokens", tag = "anthropic", operation_id = "countMessageTokens",
    security(("bearer" = [])), request_body = MessageCountRequest,
    responses((status = 200, description = "The number of tokens", body = TokenCount), MessageError),
)]
pub(super) async fn count(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    let request = match job::ask(&bridge, request, request::parse_message_count).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let (admitted, job) = match job::identify(&bridge, request.context, request.admitted, request.parsed, false) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(request.context, &job, request.rate);
    job::collect(&bridge, job::open(&bridge, admitted, job), response_headers, |_, whole| {
        let input_tokens = whole.input_tokens.ok_or_else(|| answer::broken("the answer has no number of tokens"))?;
        Ok(errors::json(&TokenCount { input_tokens }))
    })
    .await
}

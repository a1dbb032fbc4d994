//! `POST /v1/completions`, and the code that it shares with chat.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;
use protocol::WireError;

use super::errors::{self, ApiError};
use super::extract::Bridge;
use super::job::{self, ResponseHeaders};
use super::repeats::RepeatHeaders;
use crate::openai::Endpoint;
use crate::openai::request::{self, CompletionRequest, Generation};
use crate::openai::response::Heading;
use crate::openai::response::sse::Sse;
use crate::openai::response::whole::{Completion, write_whole};

/// Continues a text.
#[utoipa::path(
    post, path = "/v1/completions", tag = "openai", operation_id = "createCompletion", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer, as server-sent events if `stream` is true", content(
            (Completion = "application/json"), (String = "text/event-stream"),
        )),
        ApiError,
    ),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    generate(&bridge, request, Endpoint::Completion, request::parse_completion).await
}

/// Handles a request to either endpoint.
pub(super) async fn generate(
    bridge: &Bridge,
    request: Request,
    endpoint: Endpoint,
    parse: fn(&[u8]) -> Result<Generation, WireError>,
) -> Response<Body> {
    let request = match job::ask(bridge, request, parse).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let Generation { job, model, stream, include_usage, names_tier, calls_functions } = request.parsed;
    let (context, last_event_id) = (request.context, request.last_event_id);
    let (admitted, job) = match job::identify(bridge, context, request.admitted, job, stream) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(context, &job, request.rate);
    let now = bridge.gateway.clock().now();
    let heading = Heading::new(endpoint, model, &job, response_headers.correlation_id(), now);
    let heading = Heading { include_usage, calls_functions, ..heading };
    let heading = if names_tier { heading.with_tier(job.class) } else { heading };
    let opening = job::open(bridge, admitted, job);
    if stream {
        let format = Sse::new(heading).after(last_event_id);
        let opening = job::resumed(opening, last_event_id);
        return job::stream(bridge, opening, format, "text/event-stream", response_headers).await;
    }
    job::collect(bridge, opening, response_headers, |answer, whole| {
        Ok(errors::json(&write_whole(&heading, answer, whole).map_err(|_| job::unwritable())?))
    })
    .await
}

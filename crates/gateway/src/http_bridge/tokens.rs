//! `POST /tokenize` and `POST /detokenize`, as in vLLM and llama-server.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;
use protocol::WireError;
use rpc::rate_limit::Verdict;

use super::errors::{self, ApiError};
use super::extract::Bridge;
use super::job::{self, ParsedRequest, ResponseHeaders};
use crate::answer::{self, Answer, Whole};
use crate::job::Job;
use crate::openai::request::{self, DetokenizeRequest, TokenizeRequest, Tokenizing};
use crate::openai::response::tokens::{DetokenizedText, TokenList};
use crate::request_context::{AdmittedRequest, RequestContext};

/// Lists the tokens of a text or of a conversation, without cost.
#[utoipa::path(
    post, path = "/tokenize", tag = "openai", operation_id = "tokenize", security(("bearer" = [])),
    request_body = TokenizeRequest,
    responses((status = 200, description = "The tokens", body = TokenList), ApiError),
)]
pub(super) async fn tokenize(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    list(&bridge, request).await
}

/// The same as `POST /tokenize`.
#[utoipa::path(
    post, path = "/v1/tokenize", tag = "openai", operation_id = "tokenizeV1", security(("bearer" = [])),
    request_body = TokenizeRequest,
    responses((status = 200, description = "The tokens", body = TokenList), ApiError),
)]
pub(super) async fn tokenize_v1(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    list(&bridge, request).await
}

/// Converts tokens to a text, without cost.
#[utoipa::path(
    post, path = "/detokenize", tag = "openai", operation_id = "detokenize", security(("bearer" = [])),
    request_body = DetokenizeRequest,
    responses((status = 200, description = "The text", body = DetokenizedText), ApiError),
)]
pub(super) async fn detokenize(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    join(&bridge, request).await
}

/// The same as `POST /detokenize`.
#[utoipa::path(
    post, path = "/v1/detokenize", tag = "openai", operation_id = "detokenizeV1", security(("bearer" = [])),
    request_body = DetokenizeRequest,
    responses((status = 200, description = "The text", body = DetokenizedText), ApiError),
)]
pub(super) async fn detokenize_v1(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    join(&bridge, request).await
}

async fn list(bridge: &Bridge, request: Request) -> Response<Body> {
    let request = match job::ask(bridge, request, request::parse_tokenize).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let ParsedRequest { context, rate, admitted, parsed, .. } = request;
    let Tokenizing { job, param, with_pieces, with_texts } = parsed;
    run(bridge, (context, rate), admitted, (job, param), |answer, whole| {
        let list = TokenList::of(whole, answer.model().context_length, with_pieces, with_texts);
        Ok(errors::json(&list.ok_or_else(unlisted)?))
    })
    .await
}

async fn join(bridge: &Bridge, request: Request) -> Response<Body> {
    let request = match job::ask(bridge, request, request::parse_detokenize).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let ParsedRequest { context, rate, admitted, parsed: job, .. } = request;
    run(bridge, (context, rate), admitted, (job, request::DETOKENIZE_PARAM), |_, whole| {
        Ok(errors::json(&DetokenizedText::of(whole).ok_or_else(unlisted)?))
    })
    .await
}

/// Runs a job whose prompt the client sent in the field `param`.
async fn run(
    bridge: &Bridge,
    (context, rate): (RequestContext, Verdict),
    admitted: AdmittedRequest,
    (job, param): (Job, &'static str),
    write: impl FnOnce(&Answer, &Whole) -> Result<Response<Body>, WireError>,
) -> Response<Body> {
    let (admitted, job) = match job::identify(bridge, context, admitted, job, false) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(context, &job, rate);
    let named = |error| request::of_param(error, param);
    job::collect_or(bridge, job::open(bridge, admitted, job), response_headers, write, named).await
}

fn unlisted() -> WireError {
    answer::broken("the answer does not list its tokens")
}

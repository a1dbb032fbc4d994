//! Ollama's API under `/api`.

use std::future::ready;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use http::{HeaderValue, Response, header};
use protocol::control::Scope;
use protocol::{ErrorCode, WireError};
use serde::Serialize;
use utoipa::ToSchema;

use super::errors::{self, ApiError, OllamaError};
use super::extract::{Bridge, Inquiry, context, token};
use super::job::{self, ParsedRequest, ResponseHeaders};
use super::{models, request_body};
use crate::answer::{Answer, Whole};
use crate::config::seconds;
use crate::ollama::models::{Shown, Tags};
use crate::ollama::request::{
    self, NamedModel, OllamaEmbedRequest, OllamaEmbeddingRequest, OllamaGeneration, OllamaModelRequest, OllamaRequest,
    OllamaVectors,
};
use crate::ollama::response::{self, Heading, Line, Lines, Vector, Vectors};
use crate::ollama::{Endpoint, VERSION};

/// The media type of streamed answers.
const LINES: &str = "application/x-ndjson";
/// The maximum size of a request about a model.
const MODEL_BYTES_MAX: usize = 16 * 1024;

/// Answers a conversation with the next message.
#[utoipa::path(
    post, path = "/api/chat", tag = "ollama", operation_id = "ollamaChat", security(("bearer" = [])),
    request_body = OllamaRequest,
    responses(
        (status = 200, description = "The answer, as lines of JSON unless `stream` is false", content(
            (Line = "application/x-ndjson"), (Line = "application/json"),
        )),
        OllamaError,
    ),
)]
pub(super) async fn chat(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    generation(&bridge, request, Endpoint::Chat, request::parse_ollama_chat).await
}

/// Answers a text, or continues it.
#[utoipa::path(
    post, path = "/api/generate", tag = "ollama", operation_id = "ollamaGenerate", security(("bearer" = [])),
    request_body = OllamaRequest,
    responses(
        (status = 200, description = "The answer, as lines of JSON unless `stream` is false", content(
            (Line = "application/x-ndjson"), (Line = "application/json"),
        )),
        OllamaError,
    ),
)]
pub(super) async fn generate(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    generation(&bridge, request, Endpoint::Generate, request::parse_ollama_generate).await
}

/// Handles a request to either endpoint.
async fn generation(
    bridge: &Bridge,
    request: Request,
    endpoint: Endpoint,
    parse: fn(&[u8]) -> Result<OllamaGeneration, WireError>,
) -> Response<Body> {
    let request = match job::ask(bridge, request, parse).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let ParsedRequest { context, rate, admitted, parsed, .. } = request;
    let OllamaGeneration { job, model, stream, only_loads } = parsed;
    let is_kept = job.input.keep_alive_secs != Some(0);
    let (admitted, job) = match job::identify(bridge, context, admitted, job, stream) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(context, &job, rate);
    let mut heading = Heading::new(endpoint, model, bridge.gateway.clock().now(), context.received);
    let mut opening = job::open(bridge, admitted, job);
    if only_loads {
        match opening.await {
            Err(error) if cannot_count(&error) => return errors::json(&response::loaded(&heading, is_kept)),
            outcome => opening = Box::pin(ready(outcome)),
        }
    } else if stream {
        return job::stream(bridge, opening, Lines::new(heading), LINES, response_headers).await;
    }
    job::collect(bridge, opening, response_headers, |answer, whole| {
        heading.begin(answer);
        if only_loads { Ok(errors::json(&response::loaded(&heading, is_kept))) } else { write(&heading, whole) }
    })
    .await
}

/// Returns whether a server refused to count tokens, which is how a model is loaded here. Servers load their own.
fn cannot_count(error: &WireError) -> bool {
    error.code == ErrorCode::UnsupportedParameter && error.param.as_deref() == Some("input")
}

fn write(heading: &Heading, whole: &Whole) -> Result<Response<Body>, WireError> {
    let choice = whole.choices.first().ok_or_else(job::unwritable)?;
    Ok(errors::json(&response::whole(heading, choice, whole.usage)))
}

/// Creates an embedding vector for each text.
#[utoipa::path(
    post, path = "/api/embed", tag = "ollama", operation_id = "ollamaEmbed", security(("bearer" = [])),
    request_body = OllamaEmbedRequest,
    responses((status = 200, description = "The vectors", body = Vectors), OllamaError),
)]
pub(super) async fn embed(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    let request = match job::ask(&bridge, request, request::parse_ollama_embed).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let received = request.context.received;
    vectors(&bridge, request, |model, whole| Some(errors::json(&Vectors::of(model, whole, received)?))).await
}

/// Creates the embedding vector of one text.
#[utoipa::path(
    post, path = "/api/embeddings", tag = "ollama", operation_id = "ollamaEmbedding", security(("bearer" = [])),
    request_body = OllamaEmbeddingRequest,
    responses((status = 200, description = "The vector", body = Vector), OllamaError),
)]
pub(super) async fn embedding(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    match job::ask(&bridge, request, request::parse_ollama_embedding).await {
        Ok(request) => vectors(&bridge, request, |_, whole| Some(errors::json(&Vector::of(whole)?))).await,
        Err(response) => response,
    }
}

async fn vectors(
    bridge: &Bridge,
    request: ParsedRequest<OllamaVectors>,
    write: impl FnOnce(&str, &Whole) -> Option<Response<Body>>,
) -> Response<Body> {
    let ParsedRequest { context, rate, admitted, parsed: OllamaVectors { job, model }, .. } = request;
    let (admitted, job) = match job::identify(bridge, context, admitted, job, false) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(context, &job, rate);
    let write = |_: &Answer, whole: &Whole| write(&model, whole).ok_or_else(job::unwritable);
    job::collect(bridge, job::open(bridge, admitted, job), response_headers, write).await
}

/// Lists the models that a worker serves and this API key may use.
#[utoipa::path(
    get, path = "/api/tags", tag = "ollama", operation_id = "ollamaTags", security(("bearer" = [])),
    responses((status = 200, description = "The models", body = Tags), OllamaError),
)]
pub(super) async fn tags(State(bridge): State<Bridge>, inquiry: Inquiry) -> Result<Json<Tags>, ApiError> {
    Ok(Json(Tags::of(&models::served(&bridge, &inquiry).await?)))
}

/// Lists those of them that a worker has in memory.
#[utoipa::path(
    get, path = "/api/ps", tag = "ollama", operation_id = "ollamaPs", security(("bearer" = [])),
    responses((status = 200, description = "The models", body = Tags), OllamaError),
)]
pub(super) async fn ps(State(bridge): State<Bridge>, inquiry: Inquiry) -> Result<Json<Tags>, ApiError> {
    Ok(Json(Tags::in_memory(&models::served(&bridge, &inquiry).await?)))
}

/// Describes a model: its file, its context and what it can do.
#[utoipa::path(
    post, path = "/api/show", tag = "ollama", operation_id = "ollamaShow", security(("bearer" = [])),
    request_body = OllamaModelRequest,
    responses((status = 200, description = "The model", body = Shown), OllamaError),
)]
pub(super) async fn show(State(bridge): State<Bridge>, request: Request) -> Result<Json<Shown>, ApiError> {
    let (inquiry, named) = ask_of_model(&bridge, request).await?;
    Ok(Json(Shown::of(&models::named(&bridge, &inquiry, &named.model).await?)))
}

/// Says that a model is there.
///
/// A model that no worker serves is not fetched: add it with `tether model add` on a worker's machine.
#[utoipa::path(
    post, path = "/api/pull", tag = "ollama", operation_id = "ollamaPull", security(("bearer" = [])),
    request_body = OllamaModelRequest,
    responses(
        (status = 200, description = "The progress, as lines of JSON unless `stream` is false", content(
            (Pulled = "application/x-ndjson"), (Pulled = "application/json"),
        )),
        OllamaError,
    ),
)]
pub(super) async fn pull(State(bridge): State<Bridge>, request: Request) -> Result<Response<Body>, ApiError> {
    let (inquiry, named) = ask_of_model(&bridge, request).await?;
    match models::named(&bridge, &inquiry, &named.model).await {
        Ok(_) => Ok(pulled(named.stream)),
        Err(error) if error.code == ErrorCode::ModelNotFound => Err(not_fetched(&named.name).into()),
        Err(error) => Err(error.into()),
    }
}

/// Returns the progress of a model that is there.
fn pulled(stream: bool) -> Response<Body> {
    if !stream {
        return errors::json(&Pulled { status: "success" });
    }
    let lines = "{\"status\":\"pulling manifest\"}\n{\"status\":\"success\"}\n";
    let mut response = Response::new(Body::from(lines));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(LINES));
    response
}

fn not_fetched(name: &str) -> WireError {
    let name: String = name.chars().take(80).collect();
    let message = format!("no worker serves {name:?}; add it on a worker's machine with `tether model add`");
    WireError::new(ErrorCode::ModelNotFound, message).with_param("model")
}

/// Reads a request about one model.
async fn ask_of_model(bridge: &Bridge, request: Request) -> Result<(Inquiry, NamedModel), WireError> {
    let (parts, mut body) = request.into_parts();
    let inquiry = Inquiry { context: context(&parts.extensions), token: token(&parts.headers).map(str::to_owned) };
    let config = bridge.gateway.config();
    request_body::check_head(&parts.headers, MODEL_BYTES_MAX)?;
    // Nobody without a key has a body read.
    bridge.gateway.authenticate(inquiry.token.as_deref(), inquiry.context.origin, Scope::Infer).await?;
    let bytes = request_body::read(&mut body, MODEL_BYTES_MAX, seconds(config.body_idle_secs)).await?;
    Ok((inquiry, request::parse_model(&bytes)?))
}

/// The progress of a download.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaPulled)]
pub(super) struct Pulled {
    status: &'static str,
}

/// The version of Ollama whose API this is.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaVersion)]
pub(super) struct Version {
    version: &'static str,
}

/// Returns the version of Ollama whose API this is. `GET /version` returns Tether's own.
#[utoipa::path(
    get, path = "/api/version", tag = "ollama", operation_id = "ollamaVersion",
    responses((status = 200, description = "The version", body = Version)),
)]
pub(super) async fn version() -> Json<Version> {
    Json(Version { version: VERSION })
}

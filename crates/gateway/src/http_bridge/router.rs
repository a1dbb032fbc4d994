//! The HTTP routes, CORS, and the responses for unknown paths and methods.

use std::sync::LazyLock;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::middleware::{self, Next};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, Uri, header};
use protocol::{ErrorCode, WireError};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use utoipa::OpenApi as _;
use utoipa::openapi::{OpenApi, PathItem};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Bridge, Inquiry, context};
use super::{
    GatewayError, admin, batches, chat, completions, embeddings, errors, files, health, infer, input_tokens, messages,
    models, ollama, openapi, rerank, responses, tokens,
};

/// The response headers that pages of other origins may read.
const EXPOSED: [&str; 21] = [
    "x-request-id",
    "request-id",
    "openai-processing-ms",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "idempotency-replayed",
    "x-tether-region",
    "x-tether-attempts",
    "x-tether-continued",
    "x-tether-degraded",
    "x-tether-decision",
    "x-tether-model",
    "x-tether-model-digest",
    "www-authenticate",
];

static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| openapi::write(routes().get_openapi()));

pub(super) fn router(bridge: Bridge) -> Router {
    let origins = bridge.gateway.config().cors_origins.clone();
    let routes = routes();
    let cors = cors(&origins, methods(routes.get_openapi()));
    let router = Router::from(routes).fallback(no_path).method_not_allowed_fallback(no_method).with_state(bridge);
    match cors {
        Some(layer) => router.layer(layer),
        None => router,
    }
}

/// Returns every route with its OpenAPI description.
fn routes() -> OpenApiRouter<Bridge> {
    let api = OpenApiRouter::with_openapi(openapi::Document::openapi())
        .routes(routes!(chat::create))
        .routes(routes!(input_tokens::count))
        .routes(routes!(completions::create))
        .routes(routes!(embeddings::create))
        .routes(routes!(rerank::create))
        .routes(routes!(rerank::second))
        .routes(routes!(rerank::bare))
        .routes(routes!(tokens::tokenize))
        .routes(routes!(tokens::tokenize_v1))
        .routes(routes!(tokens::detokenize))
        .routes(routes!(tokens::detokenize_v1))
        .routes(routes!(messages::create))
        .routes(routes!(messages::count))
        .routes(routes!(responses::create))
        .routes(routes!(responses::stored::get, responses::stored::delete))
        .routes(routes!(responses::stored::cancel))
        .routes(routes!(responses::stored::input_items))
        .routes(routes!(files::list, files::upload))
        .routes(routes!(files::get, files::delete))
        .routes(routes!(files::content))
        .routes(routes!(batches::list, batches::create))
        .routes(routes!(batches::get))
        .routes(routes!(batches::cancel))
        .routes(routes!(models::list))
        .routes(routes!(models::get))
        .routes(routes!(infer::create))
        .routes(routes!(ollama::chat))
        .routes(routes!(ollama::generate))
        .routes(routes!(ollama::embed))
        .routes(routes!(ollama::embedding))
        .routes(routes!(ollama::tags))
        .routes(routes!(ollama::ps))
        .routes(routes!(ollama::show))
        .routes(routes!(ollama::pull))
        .routes(routes!(ollama::version))
        .routes(routes!(admin::fleet::list))
        .routes(routes!(admin::fleet::decision))
        .routes(routes!(admin::jobs::list))
        .routes(routes!(admin::jobs::show))
        .routes(routes!(admin::jobs::cancel))
        .routes(routes!(admin::queue::list))
        .routes(routes!(admin::dead_letters::list, admin::dead_letters::purge_old))
        .routes(routes!(admin::dead_letters::show, admin::dead_letters::purge))
        .routes(routes!(admin::dead_letters::replay))
        .routes(routes!(admin::models::list, admin::models::add))
        .routes(routes!(admin::models::remove))
        .routes(routes!(admin::models::load))
        .routes(routes!(admin::models::keep))
        .routes(routes!(admin::models::unload))
        .routes(routes!(admin::aliases::list, admin::aliases::set))
        .routes(routes!(admin::aliases::remove))
        .routes(routes!(admin::members::list))
        .routes(routes!(admin::members::revoke, admin::members::rename))
        .routes(routes!(admin::members::create_invite))
        .routes(routes!(admin::tokens::list, admin::tokens::create))
        .routes(routes!(admin::tokens::revoke))
        .routes(routes!(admin::policies::list))
        .routes(routes!(admin::policies::get, admin::policies::set))
        .routes(routes!(admin::quotas::list))
        .routes(routes!(admin::adapters::list, admin::adapters::add))
        .routes(routes!(admin::adapters::remove))
        .layer(middleware::from_fn(name_request));
    let operations = OpenApiRouter::new()
        .routes(routes!(health::root))
        .routes(routes!(health::live))
        .routes(routes!(health::alias))
        .routes(routes!(health::prove))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
        .routes(routes!(health::version))
        .routes(routes!(document));
    api.merge(operations)
}

/// Returns this document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "operations", operation_id = "openapi",
    responses((status = 200, description = "This document", body = Object)),
)]
async fn document() -> Response<Body> {
    let mut response = Response::new(Body::from(DOCUMENT.clone()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Returns whether a path is one that supervisors and proxies call to see whether the gateway is well.
pub(super) fn is_health_check(path: &str) -> bool {
    ["/healthz", "/health", "/readyz"].contains(&path)
}

/// Adds the request's id to a response that does not carry its job's id.
async fn name_request(request: Request, next: Next) -> Response<Body> {
    let name = context(request.extensions()).correlation_id;
    let response = next.run(request).await;
    if response.headers().contains_key(errors::REQUEST_ID) { response } else { errors::with_request(response, name) }
}

async fn no_path(uri: Uri, inquiry: Inquiry) -> Response<Body> {
    let message = nothing_under(uri.path());
    errors::refuse(inquiry.context, &WireError::new(ErrorCode::NotFound, message))
}

/// Returns the message for an unknown path. The most common cause is a base address without `/v1`, or one with `/v1` to
/// which the client adds another.
fn nothing_under(path: &str) -> String {
    let once = path.trim_start_matches("/v1");
    let is_openai = ["/chat/completions", "/completions", "/embeddings", "/models", "/responses"].contains(&once);
    if is_openai && path != format!("/v1{once}") {
        return format!("there is nothing under {path}; the path is /v1{once}: look at the client's base address");
    }
    if let Some((endpoint, instead)) = ABSENT.iter().find(|(endpoint, _)| is_under(path, endpoint)) {
        return format!("{endpoint} is not supported here: {instead}");
    }
    "there is nothing under this path; GET /openapi.json tells what there is".to_owned()
}

/// Returns whether a path is the endpoint's or continues it.
fn is_under(path: &str, endpoint: &str) -> bool {
    path.strip_prefix(endpoint).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Endpoints of OpenAI's API that do not exist here, and what a client can do instead.
const ABSENT: [(&str, &str); 19] = [
    ("/v1/moderations", "no model here moderates; a chat model with response_format gives a verdict"),
    ("/v1/images", "no model here makes images"),
    ("/v1/videos", "no model here makes videos"),
    ("/v1/audio", "no model here hears or speaks; ask a speech server directly"),
    ("/v1/realtime", "POST /v1/responses streams answers to texts"),
    ("/v1/fine_tuning", "models are trained elsewhere; an operator adds a LoRA adapter with `tether adapter add`"),
    ("/v1/fine-tunes", "models are trained elsewhere; an operator adds a LoRA adapter with `tether adapter add`"),
    ("/v1/assistants", "POST /v1/responses answers with instructions and tools"),
    ("/v1/threads", "POST /v1/responses continues a conversation by previous_response_id"),
    ("/v1/conversations", "POST /v1/responses continues a conversation by previous_response_id"),
    ("/v1/vector_stores", "POST /v1/embeddings makes vectors and POST /v1/rerank ranks texts; a database keeps them"),
    ("/v1/uploads", "requests carry their texts themselves"),
    ("/v1/containers", "no code runs here"),
    ("/v1/evals", "an evaluation such as lm-eval asks POST /v1/completions or /v1/chat/completions"),
    ("/v1/graders", "an evaluation such as lm-eval asks POST /v1/completions or /v1/chat/completions"),
    ("/v1/organization", "operators use the program `tether` or /admin/v1"),
    ("/v1/edits", "POST /v1/chat/completions edits a text on instruction"),
    ("/v1/engines", "GET /v1/models lists the models"),
    ("/v1/chat/completions", "chat completions are not stored; POST /v1/responses stores responses"),
];

async fn no_method(inquiry: Inquiry) -> Response<Body> {
    let message = "this path does not take this method; the Allow header lists those that it takes";
    errors::refuse(inquiry.context, &WireError::new(ErrorCode::MethodNotAllowed, message))
}

/// Checks that the configured origins are valid.
pub(super) fn check_origins(origins: &[String]) -> Result<(), GatewayError> {
    let plausible = |origin: &str| {
        origin == "*" || (origin.contains("://") && !origin.ends_with('/') && HeaderValue::from_str(origin).is_ok())
    };
    match origins.iter().find(|origin| !plausible(origin)) {
        Some(origin) => Err(GatewayError::Origin { origin: origin.clone() }),
        None => Ok(()),
    }
}

/// Returns the methods that at least one route takes.
fn methods(document: &OpenApi) -> Vec<Method> {
    let takes = |of: fn(&PathItem) -> bool| document.paths.paths.values().any(of);
    let taken = [
        (Method::GET, takes(|path| path.get.is_some())),
        (Method::POST, takes(|path| path.post.is_some())),
        (Method::PUT, takes(|path| path.put.is_some())),
        (Method::PATCH, takes(|path| path.patch.is_some())),
        (Method::DELETE, takes(|path| path.delete.is_some())),
    ];
    taken.into_iter().filter(|(_, is_taken)| *is_taken).map(|(method, _)| method).collect()
}

/// Returns the CORS layer, or `None` if no origins are configured.
fn cors(origins: &[String], methods: Vec<Method>) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origin = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    Some(
        CorsLayer::new()
            .allow_origin(origin)
            .allow_methods(methods)
            // API tokens travel in a header that a page must set itself, so browsers never attach credentials on their
            // own.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(EXPOSED.map(HeaderName::from_static))
            .max_age(std::time::Duration::from_hours(1)),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    fn build() -> Value {
        serde_json::from_slice(&DOCUMENT).expect("JSON")
    }

    #[test]
    fn every_route_is_in_the_document() {
        // A router reveals its paths only in its debug output, together with those of its fallback.
        let printed = format!("{:?}", Router::from(routes()));
        let paths = printed.split('"').filter(|text| text.starts_with('/'));
        let routed: BTreeSet<&str> = paths.filter(|path| *path != "/{*__private__axum_fallback}").collect();
        let document = build();
        let described: BTreeSet<&str> =
            document["paths"].as_object().expect("paths").keys().map(String::as_str).collect();
        assert_eq!(routed, described);
    }

    #[test]
    fn every_method_of_a_route_is_allowed_to_pages() {
        let document = build();
        let items = document["paths"].as_object().expect("paths").values();
        let described: BTreeSet<String> = items
            .flat_map(|path| path.as_object().expect("operations").keys().map(|name| name.to_uppercase()))
            .collect();
        let allowed: BTreeSet<String> = methods(routes().get_openapi()).iter().map(ToString::to_string).collect();
        assert_eq!(allowed, described);
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document = build();
        let mut references = vec![];
        collect(&document, &mut references);
        assert!(references.len() > 20);
        for reference in references {
            let pointer = reference.strip_prefix('#').expect("a local reference");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }

    fn collect(value: &Value, references: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                references.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|field| collect(field, references));
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, references)),
            _ => {}
        }
    }

    #[test]
    fn operations_have_names_of_their_own() {
        let document = build();
        let operations = document["paths"]
            .as_object()
            .expect("paths")
            .values()
            .flat_map(|path| path.as_object().expect("operations").values());
        let names: Vec<_> =
            operations.map(|operation| operation["operationId"].as_str().expect("named").to_owned()).collect();
        let distinct: BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }

    #[test]
    fn a_base_address_that_lacks_v1_or_has_it_twice_is_told_so() {
        for path in ["/chat/completions", "/v1/v1/chat/completions"] {
            assert!(nothing_under(path).contains("the path is /v1/chat/completions:"), "{path}");
        }
        for path in ["/v1", "/v1/chat", "/v1/completion"] {
            assert!(nothing_under(path).contains("/openapi.json"), "{path}");
        }
    }

    #[test]
    fn an_endpoint_that_does_not_exist_here_is_refused_by_name() {
        for (path, endpoint) in [
            ("/v1/moderations", "/v1/moderations"),
            ("/v1/audio/transcriptions", "/v1/audio"),
            ("/v1/threads/thread_1/runs", "/v1/threads"),
            ("/v1/chat/completions/chatcmpl-1", "/v1/chat/completions"),
        ] {
            let message = nothing_under(path);
            assert!(message.starts_with(&format!("{endpoint} is not supported here: ")), "{message}");
        }
        assert!(nothing_under("/v1/imagesx").contains("/openapi.json"));
    }

    #[test]
    fn what_is_no_origin_is_refused_at_start() {
        let check = |origin: &str| check_origins(&[origin.to_owned()]).is_ok();
        assert!(check("*") && check("https://app.example.com") && check("http://localhost:3000"));
        assert!(!check("app.example.com") && !check("https://app.example.com/") && !check("https://a\nb"));
    }
}

//! Which path does what.

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::routing::{delete, get, post};
use http::{HeaderName, HeaderValue, Method, Response, Uri};
use protocol::{ErrorCode, WireError};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::extract::{Bridge, Inquiry, context};
use super::{GatewayError, admin, chat, completions, embeddings, errors, health, infer, input_tokens, models, openapi};

/// The headers of ours that pages of other origins may read.
const EXPOSED: [&str; 14] = [
    "x-request-id",
    "openai-processing-ms",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-tether-region",
    "x-tether-attempts",
    "x-tether-decision",
    "x-tether-model",
    "x-tether-model-digest",
    "www-authenticate",
];

/// Builds the router. Each route is also in the OpenAPI document; a test compares them.
pub(super) fn router(bridge: Bridge) -> Router {
    let origins = bridge.gateway.config().cors_origins.clone();
    let api = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/chat/completions/input_tokens", post(input_tokens::count))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{id}", get(models::get))
        .route("/infer", post(infer::create))
        .route("/admin/v1/nodes", get(admin::fleet::list))
        .route("/admin/v1/models", get(admin::models::list).post(admin::models::add))
        .route("/admin/v1/models/{id}", delete(admin::models::remove))
        .route("/admin/v1/models/{id}/load", post(admin::models::load))
        .route("/admin/v1/models/{id}/keep", post(admin::models::keep))
        .route("/admin/v1/models/{id}/unload", post(admin::models::unload))
        .route("/admin/v1/aliases", get(admin::aliases::list).post(admin::aliases::set))
        .route("/admin/v1/aliases/{alias}", delete(admin::aliases::remove))
        .route("/admin/v1/members", get(admin::members::list))
        .route("/admin/v1/members/{public_key}", delete(admin::members::revoke).patch(admin::members::rename))
        .route("/admin/v1/invites", post(admin::members::create_invite))
        .route("/admin/v1/jobs/{correlation_id}/decision", get(admin::fleet::decision))
        .route("/admin/v1/tokens", get(admin::tokens::list).post(admin::tokens::create))
        .route("/admin/v1/tokens/{key_id}", delete(admin::tokens::revoke))
        .route("/admin/v1/adapters", get(admin::adapters::list).post(admin::adapters::add))
        .route("/admin/v1/adapters/{id}", delete(admin::adapters::remove))
        .layer(middleware::from_fn(name_request));
    let operations = Router::new()
        .route("/healthz", get(health::live))
        .route("/health", get(health::alias))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics))
        .route("/version", get(health::version))
        .route("/openapi.json", get(openapi::document));
    let router = api.merge(operations).fallback(no_path).method_not_allowed_fallback(no_method).with_state(bridge);
    match cors(&origins) {
        Some(layer) => router.layer(layer),
        None => router,
    }
}

/// Adds the request's name to a response that does not bear its job's.
async fn name_request(request: Request, next: Next) -> Response<Body> {
    let name = context(request.extensions()).correlation_id;
    let response = next.run(request).await;
    if response.headers().contains_key(errors::REQUEST_ID) { response } else { errors::with_request(response, name) }
}

async fn no_path(uri: Uri, inquiry: Inquiry) -> Response<Body> {
    let message = nothing_under(uri.path());
    errors::refuse(inquiry.context, &WireError::new(ErrorCode::NotFound, message))
}

/// Most often the base address that a client was given has no /v1, or has it and the client adds another.
fn nothing_under(path: &str) -> String {
    let once = path.trim_start_matches("/v1");
    let is_openai = ["/chat/completions", "/completions", "/embeddings", "/models"].contains(&once);
    if is_openai && path != format!("/v1{once}") {
        return format!("there is nothing under {path}; the path is /v1{once}: look at the client's base address");
    }
    "there is nothing under this path; GET /openapi.json tells what there is".to_owned()
}

async fn no_method(inquiry: Inquiry) -> Response<Body> {
    let message = "this path does not take this method; the header Allow tells which";
    errors::refuse(inquiry.context, &WireError::new(ErrorCode::MethodNotAllowed, message))
}

/// Checks that the configured origins are some.
pub(super) fn check_origins(origins: &[String]) -> Result<(), GatewayError> {
    let plausible = |origin: &str| {
        origin == "*" || (origin.contains("://") && !origin.ends_with('/') && HeaderValue::from_str(origin).is_ok())
    };
    match origins.iter().find(|origin| !plausible(origin)) {
        Some(origin) => Err(GatewayError::Origin { origin: origin.clone() }),
        None => Ok(()),
    }
}

/// Returns what lets pages of other origins call, where any may.
fn cors(origins: &[String]) -> Option<CorsLayer> {
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
            .allow_methods([Method::GET, Method::POST])
            // Tokens travel in a header that pages must set themselves, so nothing is sent without their doing.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(EXPOSED.map(HeaderName::from_static))
            .max_age(std::time::Duration::from_hours(1)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_address_that_lacks_v1_or_has_it_twice_is_told_so() {
        for path in ["/chat/completions", "/v1/v1/chat/completions"] {
            assert!(nothing_under(path).contains("the path is /v1/chat/completions:"), "{path}");
        }
        for path in ["/", "/v1", "/v1/chat", "/v1/completion"] {
            assert!(nothing_under(path).contains("/openapi.json"), "{path}");
        }
    }

    #[test]
    fn what_is_no_origin_is_refused_at_start() {
        let check = |origin: &str| check_origins(&[origin.to_owned()]).is_ok();
        assert!(check("*") && check("https://app.example.com") && check("http://localhost:3000"));
        assert!(!check("app.example.com") && !check("https://app.example.com/") && !check("https://a\nb"));
    }
}

//! The parts of the OpenAPI document that belong to no route, and its serialization.

use bytes::Bytes;
use serde_json::{Map, Value};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::errors::EitherBody;
use crate::anthropic::response::error as anthropic;
use crate::ollama::response as ollama;

#[derive(OpenApi)]
#[openapi(
    info(title = "Tether", description = "One address for the models of a peer-to-peer network."),
    // Responses refer to these by name.
    components(schemas(anthropic::ErrorBody, ollama::ErrorBody, EitherBody)),
    modifiers(&Bearer),
)]
pub(super) struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("tth_live_…").build();
        document.components.get_or_insert_default().add_security_scheme("bearer", SecurityScheme::Http(scheme));
    }
}

/// Serializes the document in a stable order.
pub(super) fn write(document: &utoipa::openapi::OpenApi) -> Bytes {
    let mut document = serde_json::to_value(document).expect("the document is plain JSON");
    let schemas = document.pointer_mut("/components/schemas").and_then(Value::as_object_mut);
    schemas
        .into_iter()
        .flat_map(|schemas| schemas.values_mut())
        .filter_map(Value::as_object_mut)
        .for_each(Map::sort_keys);
    document.to_string().into()
}

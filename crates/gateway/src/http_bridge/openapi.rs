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
    bound_unsigned(&mut document);
    let schemas = document.pointer_mut("/components/schemas").and_then(Value::as_object_mut);
    schemas
        .into_iter()
        .flat_map(|schemas| schemas.values_mut())
        .filter_map(Value::as_object_mut)
        .for_each(Map::sort_keys);
    document.to_string().into()
}

/// Gives unsigned integers their own range. OpenAPI has formats for signed ones alone, with half of it.
fn bound_unsigned(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(bound_unsigned),
        Value::Object(fields) => {
            let is_unsigned = fields.get("minimum") == Some(&0.into());
            let maximum = match fields.get("format").and_then(Value::as_str).filter(|_| is_unsigned) {
                Some("int32") => Some(u64::from(u32::MAX)),
                Some("int64") => Some(u64::MAX),
                _ => None,
            };
            if let Some(maximum) = maximum {
                fields.remove("format");
                fields.entry("maximum").or_insert_with(|| maximum.into());
            }
            fields.values_mut().for_each(bound_unsigned);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_unsigned_integer_has_its_whole_range() {
        let mut schemas = json!([
            {"type": "integer", "format": "int32", "minimum": 0},
            {"type": ["integer", "null"], "format": "int64", "minimum": 0, "maximum": 100},
            {"type": "integer", "format": "int32"},
        ]);
        bound_unsigned(&mut schemas);
        let expected = json!([
            {"type": "integer", "minimum": 0, "maximum": u32::MAX},
            {"type": ["integer", "null"], "minimum": 0, "maximum": 100},
            {"type": "integer", "format": "int32"},
        ]);
        assert_eq!(schemas, expected);
    }
}

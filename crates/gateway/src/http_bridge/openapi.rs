//! The OpenAPI document. Contracts of ours are shown by the schemas that `protocol` publishes, `bodies` shows
//! what `openai::request` reads.

mod bodies;

use std::sync::LazyLock;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderValue, Response, header};
use schemars::generate::SchemaSettings;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{IntoResponses, Modify, OpenApi, ToSchema};

use super::{admin, chat, completions, embeddings, health, infer, input_tokens, models};

pub(crate) use bodies::*;

static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(build().to_string()));

/// Tells what there is: this document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "operations", operation_id = "openapi",
    responses((status = 200, description = "This document", body = Object)),
)]
pub(super) async fn document() -> Response<Body> {
    let mut response = Response::new(Body::from(DOCUMENT.clone()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Tether", description = "One address for the models of a peer-to-peer network."),
    paths(
        chat::create,
        completions::create,
        embeddings::create,
        input_tokens::count,
        models::list,
        models::get,
        infer::create,
        health::live,
        health::alias,
        health::ready,
        health::metrics,
        health::version,
        document,
        admin::fleet::list,
        admin::models::list,
        admin::members::list,
        admin::members::revoke,
        admin::members::rename,
        admin::members::create_invite,
        admin::fleet::decision,
        admin::tokens::create,
        admin::tokens::list,
        admin::tokens::revoke,
        admin::adapters::list,
        admin::adapters::add,
        admin::adapters::remove,
        admin::models::add,
        admin::models::remove,
        admin::models::load,
        admin::models::unload,
        admin::models::keep,
        admin::aliases::list,
        admin::aliases::set,
        admin::aliases::remove,
    ),
    modifiers(&Bearer),
)]
struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("tth_live_…").build();
        document.components.get_or_insert_default().add_security_scheme("bearer", SecurityScheme::Http(scheme));
    }
}

fn build() -> Value {
    let mut document = serde_json::to_value(Document::openapi()).expect("the document is plain JSON");
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let contracts = [
        ("InferSubmission", generator.subschema_for::<protocol::infer::InferSubmission>()),
        ("InferChunk", generator.subschema_for::<protocol::infer::InferChunk>()),
        ("Fleet", generator.subschema_for::<protocol::control::Fleet>()),
        ("Decision", generator.subschema_for::<protocol::control::Decision>()),
        ("TokenCreate", generator.subschema_for::<protocol::control::TokenCreate>()),
        ("TokenCreated", generator.subschema_for::<protocol::control::TokenCreated>()),
        ("TokenList", generator.subschema_for::<protocol::control::TokenList>()),
        ("AdapterAdd", generator.subschema_for::<protocol::control::AdapterAdd>()),
        ("AdapterEntry", generator.subschema_for::<protocol::model::AdapterEntry>()),
        ("AdapterList", generator.subschema_for::<protocol::control::AdapterList>()),
        ("AdapterRemoved", generator.subschema_for::<protocol::control::AdapterRemoved>()),
        ("ModelAdd", generator.subschema_for::<protocol::control::ModelAdd>()),
        ("ModelEntry", generator.subschema_for::<protocol::model::ModelEntry>()),
        ("ModelFacts", generator.subschema_for::<protocol::model::ModelFacts>()),
        ("ModelRemoved", generator.subschema_for::<protocol::control::ModelRemoved>()),
        ("ModelPlaces", generator.subschema_for::<protocol::control::ModelPlaces>()),
        ("AliasSet", generator.subschema_for::<protocol::control::AliasSet>()),
        ("AliasEntry", generator.subschema_for::<protocol::model::AliasEntry>()),
        ("AliasList", generator.subschema_for::<protocol::control::AliasList>()),
        ("AliasRemoved", generator.subschema_for::<protocol::control::AliasRemoved>()),
        ("Members", generator.subschema_for::<protocol::control::Members>()),
        ("NodeRevoked", generator.subschema_for::<protocol::control::NodeRevoked>()),
        ("NodeRenamed", generator.subschema_for::<protocol::control::NodeRenamed>()),
        ("InviteCreate", generator.subschema_for::<protocol::control::InviteCreate>()),
        ("InviteCreated", generator.subschema_for::<protocol::control::InviteCreated>()),
        ("TokenRevoked", generator.subschema_for::<protocol::control::TokenRevoked>()),
    ];
    if let Some(schemas) = document.pointer_mut("/components/schemas").and_then(Value::as_object_mut) {
        for (name, schema) in contracts {
            schemas.insert(name.to_owned(), schema.to_value());
        }
        // After the placeholders, so that a contract of the same name takes its place.
        let definitions: Map<String, Value> = generator.take_definitions(true);
        schemas.extend(definitions);
    }
    document
}

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct InferSubmission;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct InferChunk;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct Fleet;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct Decision;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct TokenCreate;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct TokenCreated;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct TokenList;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct TokenRevoked;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct AdapterAdd;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct AdapterEntry;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct AdapterList;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct AdapterRemoved;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct ModelAdd;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct ModelEntry;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct ModelFacts;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct ModelRemoved;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct ModelPlaces;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct AliasSet;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct AliasEntry;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct AliasList;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct AliasRemoved;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct Members;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct NodeRevoked;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct NodeRenamed;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct InviteCreate;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct InviteCreated;

/// Another name for a node.
#[derive(Deserialize, ToSchema)]
pub(crate) struct NewName {
    /// 1 to 64 printable characters.
    pub(crate) name: String,
}

/// Every error has this form.
#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Serialize, ToSchema)]
struct ErrorDetail {
    /// What went wrong and what to do, for people.
    message: String,
    /// OpenAI's kind of error.
    r#type: String,
    /// The field at fault.
    param: Option<String>,
    /// What went wrong, for programs.
    code: String,
}

/// The errors of requests that need an API key.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "described, never made")]
pub(crate) enum Errors {
    /// The request makes no sense, or asks for what is not done here; `param` names the field.
    #[response(status = 400)]
    BadRequest(ErrorBody),
    /// No API key, or a wrong, revoked or expired one.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// The API key does not allow it.
    #[response(status = 403)]
    Forbidden(ErrorBody),
    /// There is no such model or job.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The body came too slowly.
    #[response(status = 408)]
    Timeout(ErrorBody),
    /// A job of this retry token exists already.
    #[response(status = 409)]
    Conflict(ErrorBody),
    /// The body is over the limit.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The body is not JSON.
    #[response(status = 415)]
    MediaType(ErrorBody),
    /// Too many requests; `Retry-After` tells when the next may come.
    #[response(status = 429)]
    TooMany(ErrorBody),
    /// A defect of ours.
    #[response(status = 500)]
    Internal(ErrorBody),
    /// The workers that tried failed.
    #[response(status = 502)]
    Worker(ErrorBody),
    /// No room, or a part of the network is away; `Retry-After` tells when to try again.
    #[response(status = 503)]
    Unavailable(ErrorBody),
    /// The deadline passed.
    #[response(status = 504)]
    Deadline(ErrorBody),
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_route_is_in_the_document() {
        let router = include_str!("router.rs");
        let routed: BTreeSet<String> = router
            .match_indices(".route(\"")
            .map(|(at, found)| router[at + found.len()..].split('"').next().unwrap_or_default())
            .map(|path| path.replace("{correlation_id}", "{correlationId}").replace("{key_id}", "{keyId}"))
            .map(|path| path.replace("{public_key}", "{publicKey}"))
            .collect();
        let document = build();
        let described: BTreeSet<String> = document["paths"].as_object().expect("paths").keys().cloned().collect();
        assert_eq!(routed, described);
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
}

//! Adds types of `protocol` to the OpenAPI document, with the schemas that `protocol` generates.

use std::borrow::Cow;
use std::marker::PhantomData;

use protocol::{control, infer, jobs, model, policy, queue, quota};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};
use utoipa::openapi::schema::SchemaType;
use utoipa::openapi::{Object, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// Represents a type of `protocol` in the document. The type aliases below have no parameters, which utoipa would make
/// part of the schema's name.
pub(crate) struct Published<T>(PhantomData<T>);

pub(crate) type AdapterName = Published<protocol::AdapterName>;
pub(crate) type AdapterAdd = Published<control::AdapterAdd>;
pub(crate) type AdapterEntry = Published<model::AdapterEntry>;
pub(crate) type AdapterList = Published<control::AdapterList>;
pub(crate) type AdapterRemoved = Published<control::AdapterRemoved>;
pub(crate) type AliasEntry = Published<model::AliasEntry>;
pub(crate) type AliasList = Published<control::AliasList>;
pub(crate) type AliasRemoved = Published<control::AliasRemoved>;
pub(crate) type AliasSet = Published<control::AliasSet>;
pub(crate) type CancelledJobs = Published<jobs::CancelledJobs>;
pub(crate) type DeadLetter = Published<jobs::DeadLetter>;
pub(crate) type DeadLetterList = Published<jobs::DeadLetterList>;
pub(crate) type DeadLetterReplayed = Published<jobs::DeadLetterReplayed>;
pub(crate) type DeadLettersPurged = Published<jobs::DeadLettersPurged>;
pub(crate) type Decision = Published<control::Decision>;
pub(crate) type FinishReason = Published<infer::FinishReason>;
pub(crate) type Fleet = Published<control::Fleet>;
pub(crate) type InferChunk = Published<infer::InferChunk>;
pub(crate) type InferSubmission = Published<infer::InferSubmission>;
pub(crate) type InviteCreate = Published<control::InviteCreate>;
pub(crate) type InviteCreated = Published<control::InviteCreated>;
pub(crate) type JobList = Published<jobs::JobList>;
pub(crate) type Members = Published<control::Members>;
pub(crate) type ModelAdd = Published<control::ModelAdd>;
pub(crate) type ModelEntry = Published<model::ModelEntry>;
pub(crate) type ModelFacts = Published<model::ModelFacts>;
pub(crate) type ModelResidency = Published<control::ModelResidency>;
pub(crate) type ModelRemoved = Published<control::ModelRemoved>;
pub(crate) type NodeRenamed = Published<control::NodeRenamed>;
pub(crate) type NodeRevoked = Published<control::NodeRevoked>;
pub(crate) type PolicyList = Published<policy::PolicyList>;
pub(crate) type PolicySaved = Published<policy::PolicySaved>;
pub(crate) type QuotaList = Published<quota::QuotaList>;
pub(crate) type TenantPolicy = Published<policy::TenantPolicy>;
pub(crate) type TokenCreate = Published<control::TokenCreate>;
pub(crate) type TokenCreated = Published<control::TokenCreated>;
pub(crate) type TokenList = Published<control::TokenList>;
pub(crate) type TokenRevoked = Published<control::TokenRevoked>;
pub(crate) type WaitingJobs = Published<queue::WaitingJobs>;

impl<T: JsonSchema> PartialSchema for Published<T> {
    fn schema() -> RefOr<Schema> {
        let schema = definitions::<T>().remove(&*T::schema_name());
        as_it_is(schema.expect("a published type is defined under its name"))
    }
}

impl<T: JsonSchema> ToSchema for Published<T> {
    fn name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.extend(definitions::<T>().into_iter().map(|(name, schema)| (name, as_it_is(schema))));
    }
}

/// Returns the schemas of a type and of the types it refers to, by name.
fn definitions<T: JsonSchema>() -> Map<String, Value> {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.definitions_path = "/components/schemas".into());
    let mut generator = settings.into_generator();
    generator.subschema_for::<T>();
    generator.take_definitions(true)
}

/// Copies a schema verbatim. Its keywords become extensions, since utoipa has no fields for some of them.
fn as_it_is(schema: Value) -> RefOr<Schema> {
    let mut object = Object::with_type(SchemaType::AnyValue);
    if let Value::Object(keywords) = schema {
        object.extensions = Some(keywords.into_iter().collect());
    }
    object.into()
}

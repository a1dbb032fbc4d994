//! The JSON schemas of the published contracts.

use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::Value;

use crate::control::Catalog;
use crate::gateway::{GatewayAnswer, GatewaySubmission};
use crate::health::HealthReport;
use crate::infer::{InferChunk, InferRequest};
use crate::membership::{Certificate, RevocationList, RevocationStamp};
use crate::model::ModelOffer;
use crate::signature::Signed;

/// Returns each published contract's file name and schema (JSON Schema 2020-12).
pub fn published() -> Vec<(&'static str, Value)> {
    let schema = |make: fn(&mut SchemaGenerator) -> schemars::Schema| {
        make(&mut SchemaSettings::draft2020_12().into_generator()).to_value()
    };
    vec![
        ("infer.request.json", schema(SchemaGenerator::root_schema_for::<InferRequest>)),
        ("infer.chunk.json", schema(SchemaGenerator::root_schema_for::<InferChunk>)),
        ("gateway.submission.json", schema(SchemaGenerator::root_schema_for::<GatewaySubmission>)),
        ("gateway.answer.json", schema(SchemaGenerator::root_schema_for::<GatewayAnswer>)),
        ("health.report.json", schema(SchemaGenerator::root_schema_for::<HealthReport>)),
        ("registry.catalog.json", schema(SchemaGenerator::root_schema_for::<Catalog>)),
        ("registry.offer.json", schema(SchemaGenerator::root_schema_for::<ModelOffer>)),
        ("admission.certificate.json", schema(SchemaGenerator::root_schema_for::<Certificate>)),
        ("admission.stamp.json", schema(SchemaGenerator::root_schema_for::<RevocationStamp>)),
        ("admission.revocations.json", schema(SchemaGenerator::root_schema_for::<RevocationList>)),
        ("signed.json", schema(SchemaGenerator::root_schema_for::<Signed>)),
    ]
}

//! Models in the format of Ollama's lists.

use protocol::UnixMillis;
use protocol::model::{Capability, ModelFacts};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::response::rfc3339;
use crate::openai::response::models::{Model, ModelList};

/// The models that this API key may use.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaTags)]
pub(crate) struct Tags {
    models: Vec<Tag>,
}

/// A model in a list.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaTag)]
struct Tag {
    /// `name:latest` for the newest version, `name@MAJOR.MINOR:latest` for others, `…:adapter` with an adapter.
    name: String,
    /// The same as `name`.
    model: String,
    /// Time of registration, as RFC 3339.
    modified_at: String,
    /// Length of the file in bytes; 0 for a model of an adopted server.
    size: u64,
    /// SHA-256 of the file, in hex.
    digest: String,
    details: Details,
    /// In `/api/ps`, the context length in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    context_length: Option<u32>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = OllamaDetails)]
struct Details {
    /// Always empty: models here are files of their own.
    parent_model: &'static str,
    /// Format of the file: always `gguf`.
    format: &'static str,
    /// Architecture, such as `llama`; empty if unknown.
    family: String,
    families: Vec<String>,
    /// Number of weights, such as `7.6B`; empty if unknown.
    parameter_size: String,
    /// Quantisation of the weights, such as `Q4_K_M`; empty if unknown.
    quantization_level: String,
}

/// A model in full.
#[derive(Serialize, ToSchema)]
#[schema(as = OllamaModel)]
pub(crate) struct Shown {
    /// Always empty: models are not made of instructions here.
    modelfile: &'static str,
    /// Always empty: a model's settings are those in its file.
    parameters: &'static str,
    /// Always empty: workers know the chat template.
    template: &'static str,
    details: Details,
    /// Facts from the model's file, by their names in GGUF.
    #[schema(value_type = Object)]
    model_info: Map<String, Value>,
    /// `completion`, `tools`, `thinking`, `embedding`.
    capabilities: Vec<&'static str>,
    /// Time of registration, as RFC 3339.
    modified_at: String,
}

impl Tags {
    pub(crate) fn of(list: &ModelList) -> Self {
        Self { models: list.data.iter().map(Tag::of).collect() }
    }

    /// Lists the models that a worker has in memory.
    pub(crate) fn in_memory(list: &ModelList) -> Self {
        let ready = list.data.iter().filter(|model| model.is_ready());
        let tag = |model: &Model| Tag { context_length: Some(model.context_length), ..Tag::of(model) };
        Self { models: ready.map(tag).collect() }
    }
}

impl Tag {
    fn of(model: &Model) -> Self {
        let name = if model.id.contains(':') { model.id.clone() } else { format!("{}:latest", model.id) };
        Self {
            model: name.clone(),
            name,
            modified_at: modified_at(model),
            size: model.bytes,
            digest: model.digest.clone(),
            details: Details::of(model.facts.as_ref()),
            context_length: None,
        }
    }
}

fn modified_at(model: &Model) -> String {
    rfc3339(UnixMillis(model.created * 1000))
}

impl Details {
    fn of(facts: Option<&ModelFacts>) -> Self {
        let family = facts.map(|facts| facts.architecture.clone()).unwrap_or_default();
        Self {
            parent_model: "",
            format: "gguf",
            families: Some(family.clone()).filter(|family| !family.is_empty()).into_iter().collect(),
            family,
            parameter_size: facts.map(|facts| short_count(facts.parameters)).unwrap_or_default(),
            quantization_level: facts.map(|facts| facts.quantisation.clone()).unwrap_or_default(),
        }
    }
}

/// Writes a number of weights as people say it: `135M`, `7.6B`.
fn short_count(count: u64) -> String {
    match count {
        0 => String::new(),
        1..1_000_000 => format!("{}K", count.div_ceil(1_000)),
        1_000_000..1_000_000_000 => format!("{:.0}M", count as f64 / 1e6),
        _ => format!("{:.1}B", count as f64 / 1e9),
    }
}

impl Shown {
    pub(crate) fn of(model: &Model) -> Self {
        Self {
            modelfile: "",
            parameters: "",
            template: "",
            details: Details::of(model.facts.as_ref()),
            model_info: model_info(model),
            capabilities: capabilities(model.facts.as_ref()),
            modified_at: modified_at(model),
        }
    }
}

fn model_info(model: &Model) -> Map<String, Value> {
    let architecture = model.facts.as_ref().map(|facts| &*facts.architecture).filter(|name| !name.is_empty());
    let architecture = architecture.unwrap_or("unknown");
    let parameters = model.facts.as_ref().map_or(0, |facts| facts.parameters);
    let facts: [(String, Value); 4] = [
        ("general.architecture".into(), architecture.into()),
        ("general.basename".into(), model.id.clone().into()),
        ("general.parameter_count".into(), parameters.into()),
        (format!("{architecture}.context_length"), model.context_length.into()),
    ];
    facts.into_iter().collect()
}

/// Returns what a model can do. A model without facts is one of an adopted server, which may call functions.
fn capabilities(facts: Option<&ModelFacts>) -> Vec<&'static str> {
    let Some(facts) = facts else { return vec!["completion", "tools"] };
    let can = |capability| facts.capabilities.contains(&capability);
    let known = [
        ("completion", can(Capability::Completion) || can(Capability::Chat)),
        ("tools", can(Capability::Tools)),
        ("thinking", can(Capability::Reasoning)),
        ("embedding", can(Capability::Embeddings)),
    ];
    known.into_iter().filter(|(_, can)| *can).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_counted_as_people_say_it() {
        let written = [0, 3_456, 134_515_008, 7_615_616_512].map(short_count);
        assert_eq!(written, ["", "4K", "135M", "7.6B"]);
    }

    #[test]
    fn a_model_of_which_nothing_is_known_may_call_functions() {
        assert_eq!(capabilities(None), ["completion", "tools"]);
        let facts = ModelFacts { capabilities: vec![Capability::Chat, Capability::Reasoning], ..ModelFacts::default() };
        assert_eq!(capabilities(Some(&facts)), ["completion", "thinking"]);
    }
}

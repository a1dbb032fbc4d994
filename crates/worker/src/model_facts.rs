//! Facts about a model from its file, as the protocol has them.

use engine::gguf::Header;
use engine::{Dialect, LoadOptions, ServerFacts};
use protocol::health::{ModelServer, ServerKind};
use protocol::model::{Capability, ModelFacts};

/// Returns the facts in a header, with the default load settings.
pub fn of(header: &Header) -> ModelFacts {
    to_protocol(engine::ModelFacts::of(header, &LoadOptions::default()))
}

/// Converts facts to the protocol's type.
pub(crate) fn to_protocol(facts: engine::ModelFacts) -> ModelFacts {
    let capabilities = [
        (facts.generates, Capability::Completion),
        (facts.chats, Capability::Chat),
        (facts.calls_tools, Capability::Tools),
        (facts.reasons, Capability::Reasoning),
        (facts.embeds, Capability::Embeddings),
    ];
    let facts = ModelFacts {
        name: facts.name.unwrap_or_default(),
        architecture: facts.architecture,
        parameters: facts.parameters,
        quantisation: facts.quantisation,
        trained_context: facts.trained_context,
        capabilities: capabilities.into_iter().filter_map(|(can, what)| can.then_some(what)).collect(),
        chat_template: facts.has_chat_template,
        memory_bytes: facts.memory_bytes,
    };
    facts.bounded()
}

/// Converts the facts of a server to the protocol's type.
pub(crate) fn server_to_protocol(server: ServerFacts) -> ModelServer {
    let kind = match server.dialect {
        Dialect::Vllm => ServerKind::Vllm,
        Dialect::Sglang => ServerKind::Sglang,
        Dialect::LlamaServer => ServerKind::LlamaServer,
        Dialect::Ollama => ServerKind::Ollama,
        Dialect::LmStudio => ServerKind::LmStudio,
        Dialect::Other => ServerKind::Other,
    };
    ModelServer { kind, prefills: server.prefills }
}

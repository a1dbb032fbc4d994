//! Differences between servers: how to recognise a server's software, and what it reports about its models.

use serde::Deserialize;
use serde_json::Value;

use crate::model_facts::ModelFacts;
pub use crate::model_runtime::Dialect;

impl Dialect {
    /// Returns whether servers of this dialect may have rerankers.
    pub(super) fn may_rerank(self) -> bool {
        !matches!(self, Self::Ollama | Self::LmStudio)
    }
}

/// A model as listed by a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The model's name on that server.
    pub name: String,
    /// The context length in tokens, if the server reports it.
    pub context_length: Option<u32>,
    /// The kind of model, if the server reports it.
    pub kind: Kind,
    /// Whether it is loaded in the server's memory; most servers list only loaded models.
    pub is_loaded: bool,
    /// Further facts, if the server reports them.
    pub facts: Option<ModelFacts>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Vectors,
    /// The server does not report the kind.
    Unknown,
}

impl Listed {
    fn named(name: String) -> Self {
        Self { name, context_length: None, kind: Kind::Unknown, is_loaded: true, facts: None }
    }
}

/// Parses the response to `GET /v1/models`: the models, and the dialect if the owner of the first model shows it.
pub fn read_models(body: &[u8]) -> Option<(Vec<Listed>, Option<Dialect>)> {
    #[derive(Deserialize)]
    struct Models {
        // Ollama writes `null` if there are no models.
        data: Option<Vec<Model>>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
        owned_by: Option<String>,
        max_model_len: Option<u32>,
        meta: Option<Meta>,
    }
    #[derive(Deserialize)]
    struct Meta {
        n_ctx: Option<u32>,
        n_ctx_train: Option<u32>,
    }
    let models = serde_json::from_slice::<Models>(body).ok()?.data.unwrap_or_default();
    let dialect = models.first().and_then(|model| match model.owned_by.as_deref()? {
        "vllm" => Some(Dialect::Vllm),
        "sglang" => Some(Dialect::Sglang),
        "llamacpp" => Some(Dialect::LlamaServer),
        _ => None,
    });
    let listed = models.into_iter().map(|model| {
        let trained = model.meta.and_then(|meta| meta.n_ctx.or(meta.n_ctx_train));
        Listed { context_length: model.max_model_len.or(trained), ..Listed::named(model.id) }
    });
    Some((listed.collect(), dialect))
}

/// Parses the context length of one sequence from llama-server's response to `GET /props`.
pub fn read_props(body: &[u8]) -> Option<u32> {
    #[derive(Deserialize)]
    struct Props {
        default_generation_settings: Settings,
    }
    #[derive(Deserialize)]
    struct Settings {
        n_ctx: u32,
    }
    let context = serde_json::from_slice::<Props>(body).ok()?.default_generation_settings.n_ctx;
    // A server that starts other servers for its models has no context of its own.
    (context > 0).then_some(context)
}

/// A conversation whose last message shows whether llama-server continues it.
pub const BEGUN_WORD: &str = "Certainly";

/// Returns whether llama-server continues the last message of a conversation, from its response to
/// `POST /apply-template`: then the prompt ends with [`BEGUN_WORD`]. Versions before April 2025, those started with
/// `--no-prefill-assistant` and models that must reason first do not.
pub fn read_template(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Templated {
        prompt: String,
    }
    serde_json::from_slice::<Templated>(body).is_ok_and(|templated| templated.prompt.ends_with(BEGUN_WORD))
}

/// Parses the response to Ollama's `GET /api/tags`.
pub fn read_tags(body: &[u8]) -> Option<Vec<Listed>> {
    #[derive(Deserialize)]
    struct Tags {
        models: Vec<Tag>,
    }
    #[derive(Deserialize)]
    struct Tag {
        name: String,
        details: Value,
    }
    let tags = serde_json::from_slice::<Tags>(body).ok()?;
    // llama-server answers here too, but without the complete `details` that Ollama always sends. It is recognised by
    // the owner of its models.
    let ours = tags.models.into_iter().filter(|tag| tag.details.is_object());
    Some(ours.map(|tag| Listed::named(tag.name)).collect())
}

/// Adds the facts from Ollama's `POST /api/show` to a model.
///
/// Ollama silently truncates prompts to `num_ctx`. If a model sets it, that is its context length.
pub fn add_show(listed: &mut Listed, body: &[u8]) {
    #[derive(Deserialize)]
    struct Show {
        #[serde(default)]
        parameters: String,
        #[serde(default)]
        model_info: serde_json::Map<String, Value>,
        #[serde(default)]
        capabilities: Vec<String>,
        #[serde(default)]
        details: Details,
        #[serde(default)]
        template: String,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Details {
        family: String,
        quantization_level: String,
    }
    let Ok(show) = serde_json::from_slice::<Show>(body) else { return };
    let trained = show.model_info.iter().find(|(name, _)| name.ends_with(".context_length"));
    let trained = trained.and_then(|(_, length)| u32::try_from(length.as_u64()?).ok());
    let set = show.parameters.lines().find_map(|line| line.strip_prefix("num_ctx")?.trim().parse().ok());
    listed.context_length = set.or(trained);
    let can = |ability: &str| show.capabilities.iter().any(|capability| capability == ability);
    listed.kind = match (can("completion"), can("embedding")) {
        (true, _) => Kind::Text,
        (false, true) => Kind::Vectors,
        (false, false) => Kind::Unknown,
    };
    // Older versions do not list capabilities.
    listed.facts = (!show.capabilities.is_empty()).then(|| ModelFacts {
        name: None,
        architecture: show.details.family.clone(),
        parameters: show.model_info.get("general.parameter_count").and_then(Value::as_u64).unwrap_or(0),
        quantisation: show.details.quantization_level.clone(),
        trained_context: trained.unwrap_or(0),
        generates: can("completion"),
        // If a model has no template, Ollama renders conversations as plain text.
        chats: can("completion"),
        calls_tools: can("tools"),
        reasons: can("thinking"),
        embeds: can("embedding"),
        has_chat_template: !show.template.is_empty(),
        memory_bytes: 0,
    });
}

/// Parses the response to LM Studio's `GET /api/v0/models`.
pub fn read_lm_studio(body: &[u8]) -> Option<Vec<Listed>> {
    #[derive(Deserialize)]
    struct Models {
        data: Vec<Model>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
        r#type: String,
        state: String,
        max_context_length: Option<u32>,
        loaded_context_length: Option<u32>,
    }
    let models = serde_json::from_slice::<Models>(body).ok()?.data;
    let listed = models.into_iter().map(|model| Listed {
        name: model.id,
        context_length: model.loaded_context_length.or(model.max_context_length),
        kind: if model.r#type == "embeddings" { Kind::Vectors } else { Kind::Text },
        is_loaded: model.state == "loaded",
        facts: None,
    });
    Some(listed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str, context_length: Option<u32>) -> Listed {
        Listed { context_length, ..Listed::named(name.into()) }
    }

    #[test]
    fn servers_are_known_by_the_owner_of_their_models() {
        for (body, dialect, model) in [
            (
                r#"{"object":"list","data":[{"id":"Qwen/Qwen3-8B","object":"model","created":1,"owned_by":"vllm","root":"Qwen/Qwen3-8B","parent":null,"max_model_len":40960,"permission":[]}]}"#,
                Some(Dialect::Vllm),
                named("Qwen/Qwen3-8B", Some(40_960)),
            ),
            (
                r#"{"object":"list","data":[{"id":"qwen/qwen3-8b","object":"model","created":1,"owned_by":"sglang","root":"qwen/qwen3-8b","max_model_len":32768}]}"#,
                Some(Dialect::Sglang),
                named("qwen/qwen3-8b", Some(32_768)),
            ),
            (
                r#"{"models":[{"name":"m"}],"object":"list","data":[{"id":"/models/tiny.gguf","object":"model","owned_by":"llamacpp","meta":{"vocab_type":2,"n_vocab":1024,"n_ctx_train":512,"n_embd":192}}]}"#,
                Some(Dialect::LlamaServer),
                named("/models/tiny.gguf", Some(512)),
            ),
            (
                r#"{"object":"list","data":[{"id":"llama3.2:3b","object":"model","created":1,"owned_by":"library"}]}"#,
                None,
                named("llama3.2:3b", None),
            ),
        ] {
            assert_eq!(read_models(body.as_bytes()), Some((vec![model], dialect)));
        }
        assert_eq!(read_models(br#"{"object":"list","data":null}"#), Some((vec![], None)));
        assert_eq!(read_models(b"<html>"), None);
    }

    #[test]
    fn ollama_tells_context_and_kind_by_model() {
        let tags = br#"{"models":[{"name":"llama3.2:3b","model":"llama3.2:3b","size":1,"digest":"a8","details":{"family":"llama"}}]}"#;
        let mut listed = read_tags(tags).expect("read").remove(0);
        add_show(&mut listed, br#"{"parameters":"stop \"<|eot_id|>\"","model_info":{"llama.context_length":131072},"capabilities":["completion","tools"]}"#);
        let facts = listed.facts.take().expect("it names abilities");
        assert_eq!(listed, Listed { kind: Kind::Text, ..named("llama3.2:3b", Some(131_072)) });
        assert!(facts.generates && facts.chats && facts.calls_tools && !facts.reasons && !facts.embeds);
        add_show(&mut listed, br#"{"parameters":"num_ctx                        8192\nseed 1","model_info":{"bert.context_length":512},"capabilities":["embedding"]}"#);
        assert_eq!((listed.context_length, listed.kind), (Some(8_192), Kind::Vectors));
        add_show(&mut listed, br#"{"model_info":{"general.parameter_count":7},"details":{"family":"qwen3","quantization_level":"Q4_K_M"},"capabilities":["completion","thinking"],"template":"{{ .Prompt }}"}"#);
        let facts = listed.facts.take().expect("it names abilities");
        assert!(facts.reasons && facts.has_chat_template && !facts.calls_tools);
        assert_eq!((facts.parameters, &*facts.architecture, &*facts.quantisation), (7, "qwen3", "Q4_K_M"));
        add_show(&mut listed, b"{}");
        assert_eq!(listed.facts, None, "an older one");
    }

    #[test]
    fn lm_studio_tells_which_models_are_loaded() {
        let body = br#"{"object":"list","data":[
            {"id":"qwen2.5-7b","object":"model","type":"llm","arch":"qwen2","state":"loaded","max_context_length":32768,"loaded_context_length":4096},
            {"id":"nomic","object":"model","type":"embeddings","state":"not-loaded","max_context_length":2048}]}"#;
        let text = Listed { kind: Kind::Text, ..named("qwen2.5-7b", Some(4_096)) };
        let vectors = Listed { kind: Kind::Vectors, is_loaded: false, ..named("nomic", Some(2_048)) };
        assert_eq!(read_lm_studio(body), Some(vec![text, vectors]));
        assert_eq!(read_lm_studio(br#"{"error":"Unexpected endpoint or method. (GET /api/v0/models)"}"#), None);
    }

    #[test]
    fn llama_server_tells_the_context_of_a_slot() {
        assert_eq!(read_props(br#"{"default_generation_settings":{"id":0,"n_ctx":512},"total_slots":4}"#), Some(512));
        assert_eq!(read_props(b"{}"), None);
    }
}

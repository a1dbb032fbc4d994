//! Reads facts about a model from its GGUF header and states them in terms that users know.

use std::collections::BTreeMap;

use crate::answer_parser::AnswerFormat;
use crate::chat_template::{self, CHATML_TOKENS};
use crate::gguf::{Header, Tensor};
use crate::memory_plan;
use crate::model_runtime::{LoadOptions, Ranking};

/// Architectures that compute embeddings and do not generate text.
const NOT_GENERATIVE: [&str; 9] =
    ["bert", "clip", "eurobert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert", "t5encoder"];
/// `pooling_type` of rerankers in model files, which is llama.cpp's `LLAMA_POOLING_TYPE_RANK`.
const RANK_POOLING: u64 = 4;
/// The bit that marks a file type as guessed by llama.cpp.
const GUESSED: u64 = 1 << 10;

/// Facts about a model, from its header, as the engine reads them. The network carries them as
/// `protocol::model::ModelFacts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    /// The name in the file, as chosen by the model's authors.
    pub name: Option<String>,
    /// Its architecture, such as `llama`.
    pub architecture: String,
    /// The number of weights.
    pub parameters: u64,
    /// The quantisation of its weights, such as `Q4_K_M`.
    pub quantisation: String,
    /// The context length in tokens that it was trained with.
    pub trained_context: u32,
    pub generates: bool,
    pub chats: bool,
    /// Whether its template describes tools and its calls can be parsed.
    pub calls_tools: bool,
    /// Whether it reasons before it answers, in a format that can be parsed.
    pub reasons: bool,
    /// Whether it was made for embeddings.
    pub embeds: bool,
    /// Whether the file has a chat template.
    pub has_chat_template: bool,
    /// Memory in bytes that it takes when it is loaded with the given options.
    pub memory_bytes: u64,
}

/// Returns whether a model generates text.
pub(crate) fn generates(header: &Header) -> bool {
    !NOT_GENERATIVE.contains(&header.architecture().unwrap_or_default())
}

/// Returns how a model ranks texts, by the pooling that its file names.
pub(crate) fn ranking(header: &Header) -> Ranking {
    match header.hyperparameter("pooling_type") {
        Some(RANK_POOLING) => Ranking::Scores,
        Some(1..) => Ranking::Vectors,
        _ if !generates(header) => Ranking::Vectors,
        _ => Ranking::None,
    }
}

impl ModelFacts {
    /// Reads the facts from a header. No template is rendered: that takes memory, and is left to engine processes.
    pub fn of(header: &Header, options: &LoadOptions) -> Self {
        let generates = generates(header);
        let template = header.chat_template();
        let tool_use = header.text(chat_template::TOOL_USE);
        let both: String = template.into_iter().chain(tool_use).collect();
        let answers = AnswerFormat::detect(&both);
        let chats = generates && (template.is_some() || CHATML_TOKENS.iter().all(|token| header.has_token(token)));
        Self {
            name: header.text("general.name").map(str::to_owned),
            architecture: header.architecture().unwrap_or_default().to_owned(),
            parameters: parameters(header),
            quantisation: quantisation(header),
            trained_context: header.context_length().unwrap_or(0),
            generates,
            chats,
            // A template that never mentions `tools` does not pass them to the model.
            calls_tools: chats && answers.takes_tools() && both.contains("tools"),
            reasons: chats && answers.thinks(),
            embeds: ranking(header) == Ranking::Vectors,
            has_chat_template: template.is_some(),
            memory_bytes: memory_plan::plan(header, options).map_or(0, |plan| plan.total_bytes()),
        }
    }
}

fn parameters(header: &Header) -> u64 {
    let elements =
        |tensor: &Tensor| tensor.dimensions.iter().fold(1, |product: u64, side| product.saturating_mul(*side));
    header.tensors.iter().map(elements).fold(0, u64::saturating_add)
}

/// Returns the quantisation that the file names, or else the type of most of its bytes.
fn quantisation(header: &Header) -> String {
    let from_field = header.unsigned("general.file_type").and_then(|number| of_file_type(number & !GUESSED));
    from_field.or_else(|| of_most(header)).unwrap_or("unknown").to_owned()
}

fn of_most(header: &Header) -> Option<&'static str> {
    let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
    // Vectors are 32-bit floats in every file.
    for tensor in header.tensors.iter().filter(|tensor| tensor.dimensions.len() > 1) {
        let sum = bytes.entry(tensor.kind).or_default();
        *sum = sum.saturating_add(tensor.bytes);
    }
    let (most, _) = bytes.into_iter().max_by_key(|(_, sum)| *sum)?;
    of_tensor(most)
}

/// Returns the name of a file type, as numbered by llama.cpp's `llama_ftype`.
fn of_file_type(number: u64) -> Option<&'static str> {
    Some(match number {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4",
        39 => "NVFP4",
        40 => "Q1_0",
        41 => "Q2_0",
        _ => return None,
    })
}

/// Returns the name of a tensor type, as numbered by `ggml_type`.
fn of_tensor(kind: u32) -> Option<&'static str> {
    Some(match kind {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        30 => "BF16",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        41 => "Q1_0",
        42 => "Q2_0",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Value;
    use crate::gguf::tests::tiny_header;

    fn set(header: &mut Header, key: &str, value: &str) {
        header.metadata.insert(key.to_owned(), Value::Text(value.to_owned()));
    }

    fn facts(header: &Header) -> ModelFacts {
        ModelFacts::of(header, &LoadOptions::default())
    }

    #[test]
    fn the_tiny_model_is_described_by_its_header() {
        let header = tiny_header();
        let facts = facts(&header);
        assert_eq!((facts.architecture.as_str(), facts.trained_context), ("llama", 512));
        assert!((1_400_000..1_700_000).contains(&facts.parameters), "{}", facts.parameters);
        assert!(facts.generates && facts.chats && facts.has_chat_template && !facts.embeds && !facts.reasons);
        let plan = memory_plan::plan(&header, &LoadOptions::default()).expect("a plan");
        assert_eq!(facts.memory_bytes, plan.total_bytes());
    }

    #[test]
    fn a_quantisation_is_what_the_file_says_or_what_most_bytes_are() {
        let mut header = tiny_header();
        header.metadata.insert("general.file_type".into(), Value::Unsigned(15));
        assert_eq!(facts(&header).quantisation, "Q4_K_M");
        header.metadata.insert("general.file_type".into(), Value::Unsigned(15 | GUESSED));
        assert_eq!(facts(&header).quantisation, "Q4_K_M");
        for tensor in &mut header.tensors {
            tensor.kind = if tensor.dimensions.len() > 1 { 14 } else { 0 };
        }
        for unknown in [Some(Value::Unsigned(999)), None] {
            header.metadata.remove("general.file_type");
            header.metadata.extend(unknown.map(|value| ("general.file_type".to_owned(), value)));
            assert_eq!(facts(&header).quantisation, "Q6_K");
        }
        header.tensors.clear();
        assert_eq!(facts(&header).quantisation, "unknown");
    }

    #[test]
    fn template_and_architecture_say_what_a_model_can() {
        let mut header = tiny_header();
        let key = "tokenizer.chat_template";
        set(&mut header, key, "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call></tool_call><think></think>");
        assert!(facts(&header).calls_tools && facts(&header).reasons);
        // The markers alone are not enough: the model would not know about the tools.
        set(&mut header, key, "{{ messages }}<tool_call></tool_call>");
        assert!(!facts(&header).calls_tools && !facts(&header).reasons);
        header.metadata.remove(key);
        assert!(facts(&header).chats && !facts(&header).has_chat_template, "it has the tokens of ChatML");
        header.metadata.retain(|key, _| !key.starts_with("tokenizer."));
        assert!(facts(&header).generates && !facts(&header).chats);
        set(&mut header, "general.architecture", "nomic-bert");
        assert!(facts(&header).embeds && !facts(&header).generates);
    }
}

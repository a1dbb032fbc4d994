//! Embedding responses in OpenAI's format.

use protocol::infer::Embedding;
use protocol::usage::TokenUsage;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use utoipa::ToSchema;

use crate::answer::Whole;
use crate::openai::request::Encoding;

/// Embedding vectors, normalised to length 1.
#[derive(Serialize, ToSchema)]
pub(crate) struct EmbeddingList<'a> {
    /// `list`.
    object: &'static str,
    data: Vec<EmbeddingItem<'a>>,
    model: &'a str,
    usage: EmbeddingUsage,
}

#[derive(Serialize, ToSchema)]
struct EmbeddingItem<'a> {
    /// `embedding`.
    object: &'static str,
    /// Index of the text, from 0.
    index: u32,
    embedding: EmbeddingVector<'a>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum EmbeddingVector<'a> {
    Numbers(Vec<f32>),
    Base64(&'a str),
}

#[derive(Serialize, ToSchema)]
pub(super) struct EmbeddingUsage {
    prompt_tokens: u32,
    total_tokens: u32,
}

impl EmbeddingUsage {
    pub(super) fn of(usage: TokenUsage) -> Self {
        Self { prompt_tokens: usage.prompt_tokens, total_tokens: usage.total_tokens() }
    }
}

impl<'a> EmbeddingItem<'a> {
    fn of(embedding: &'a Embedding, encoding: Encoding) -> Option<Self> {
        let vector = match encoding {
            Encoding::Float => EmbeddingVector::Numbers(embedding.vector()?),
            Encoding::Base64 => EmbeddingVector::Base64(&embedding.base64),
        };
        Some(Self { object: "embedding", index: embedding.index, embedding: vector })
    }
}

/// Serializes vectors as `OpenAI` does. Returns `None` if a worker sent an invalid vector.
pub(crate) fn write_vectors(model: &str, encoding: Encoding, whole: &Whole) -> Option<Box<RawValue>> {
    let data =
        whole.embeddings.iter().map(|embedding| EmbeddingItem::of(embedding, encoding)).collect::<Option<_>>()?;
    let usage = EmbeddingUsage::of(whole.usage);
    to_raw_value(&EmbeddingList { object: "list", data, model, usage }).ok()
}

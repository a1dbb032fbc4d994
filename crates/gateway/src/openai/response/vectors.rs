//! The vectors of texts.

use protocol::infer::Embedding;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use crate::answer::Whole;
use crate::openai::request::Encoding;

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Item<'a> {
    object: &'static str,
    index: u32,
    embedding: Vector<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    Numbers(Vec<f32>),
    Base64(&'a str),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
}

impl<'a> Item<'a> {
    fn of(embedding: &'a Embedding, encoding: Encoding) -> Option<Self> {
        let vector = match encoding {
            Encoding::Float => Vector::Numbers(embedding.vector()?),
            Encoding::Base64 => Vector::Base64(&embedding.base64),
        };
        Some(Self { object: "embedding", index: embedding.index, embedding: vector })
    }
}

/// Writes vectors as `OpenAI` does, or returns `None` where a worker sent something else.
pub(crate) fn write_vectors(model: &str, encoding: Encoding, whole: &Whole) -> Option<Box<RawValue>> {
    let data = whole.embeddings.iter().map(|embedding| Item::of(embedding, encoding)).collect::<Option<_>>()?;
    let usage = Usage { prompt_tokens: whole.usage.prompt_tokens, total_tokens: whole.usage.total_tokens() };
    to_raw_value(&List { object: "list", data, model, usage }).ok()
}

//! The request body of `POST /v1/embeddings`.

use protocol::infer::Input;
use protocol::keep_alive::KeepAlive;
use protocol::{AdapterName, WireError};
use serde::Deserialize;
use utoipa::ToSchema;

use super::texts::Texts;
use crate::catalog;
use crate::class;
use crate::job::Job;
use crate::json_body::{missing, read, renamed};
use crate::published;

/// A parsed request for embedding vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Vectors {
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
    /// How the vectors are written.
    pub encoding: Encoding,
}

/// How vectors are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As an array of numbers.
    #[default]
    Float,
    /// As the bytes of 32-bit floats, which takes a third of the space.
    Base64,
}

/// Texts to embed.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct EmbeddingRequest {
    /// `name[@MAJOR.MINOR][:adapter]`. Without a version it is the newest.
    #[schema(value_type = String)]
    model: Option<String>,
    /// At most 2048 texts.
    #[schema(value_type = Texts)]
    input: Option<Texts>,
    /// Adapter of the model, if `model` does not name one. Not in OpenAI's API.
    #[schema(value_type = Option<published::AdapterName>)]
    adapter: Option<AdapterName>,
    /// `float`, or `base64` for the bytes of little-endian 32-bit floats.
    #[schema(inline, default = "float")]
    encoding_format: Option<Encoding>,
    /// Refused unless it is the length of the model's vectors.
    #[schema(minimum = 1)]
    dimensions: Option<u32>,
    /// As in completions. Not in OpenAI's API.
    #[schema(value_type = Option<Value>)]
    keep_alive: Option<KeepAlive>,
    /// As in completions. Not in OpenAI's API.
    service_tier: Option<String>,
}

/// Parses the body of `POST /v1/embeddings`.
pub fn parse_embeddings(bytes: &[u8]) -> Result<Vectors, WireError> {
    let EmbeddingRequest { model, input, adapter, encoding_format, dimensions, keep_alive, service_tier } =
        read(bytes)?;
    let (model, name) = catalog::parse_named(model.as_deref())?;
    let texts = input.ok_or_else(|| missing("input"))?.0;
    let input = Input {
        embed: Some(texts),
        adapter,
        dimensions,
        keep_alive_secs: keep_alive.map(|KeepAlive(secs)| secs),
        ..Input::default()
    };
    input.check().map_err(|problem| renamed(problem.into(), "embed", "input"))?;
    let class = service_tier.as_deref().map(class::of_tier).transpose()?.flatten();
    Ok(Vectors {
        job: Job { class, ..Job::new(model, input) },
        model: name,
        encoding: encoding_format.unwrap_or_default(),
    })
}

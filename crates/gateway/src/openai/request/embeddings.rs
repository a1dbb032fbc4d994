//! What `POST /v1/embeddings` takes.

use protocol::infer::Input;
use protocol::keep_alive::KeepAlive;
use protocol::{AdapterName, WireError};
use serde::Deserialize;

use super::body::named_model;
use super::job;
use super::texts::Texts;
use crate::job::Job;
use crate::json_body::{missing, read};

/// A request for vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Vectors {
    /// The job to run.
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
    /// How the vectors are written.
    pub encoding: Encoding,
}

/// How vectors are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As an array of numbers.
    #[default]
    Float,
    /// As the bytes of 32-bit floats, which takes a third of the space.
    Base64,
}

#[derive(Debug, Deserialize)]
struct Body {
    model: Option<String>,
    input: Option<Texts>,
    adapter: Option<AdapterName>,
    encoding_format: Option<Encoding>,
    dimensions: Option<u32>,
    keep_alive: Option<KeepAlive>,
}

/// Reads the body of `POST /v1/embeddings`.
pub fn parse_embeddings(bytes: &[u8]) -> Result<Vectors, WireError> {
    let Body { model, input, adapter, encoding_format, dimensions, keep_alive } = read(bytes)?;
    let (model, name) = named_model(model.as_deref())?;
    let texts = input.ok_or_else(|| missing("input"))?.0;
    let input = Input {
        embed: Some(texts),
        adapter,
        dimensions,
        keep_alive_secs: keep_alive.map(|KeepAlive(secs)| secs),
        ..Input::default()
    };
    input.check().map_err(|invalid| under_its_name(invalid.into()))?;
    Ok(Vectors { job: job(model, input), model: name, encoding: encoding_format.unwrap_or_default() })
}

/// Renames the texts from our name for them to OpenAI's.
fn under_its_name(mut error: WireError) -> WireError {
    if error.param.as_deref() == Some("embed") {
        error.param = Some("input".into());
        error.message = error.message.replacen("embed", "input", 1);
    }
    error
}

//! A line as the job of its endpoint, and the answer as the endpoint writes it.

use bytes::BytesMut;
use protocol::{CorrelationId, UnixMillis, WireError};
use serde_json::value::RawValue;

use crate::answer::{Answer, Whole};
use crate::job::Job;
use crate::json_body::{invalid, unsupported};
use crate::openai::Endpoint;
use crate::openai::batch::BatchEndpoint;
use crate::openai::request::{self, Encoding, Generation};
use crate::openai::response::vectors::write_vectors;
use crate::openai::response::whole::write_whole;
use crate::openai::response::{Heading, error};
use crate::responses::request::{ResponseRequest, parse_response};
use crate::responses::response;

/// A line that is ready to run.
pub(super) struct LineTask {
    pub(super) job: Job,
    writer: Writer,
}

/// Writes an answer as its endpoint does.
enum Writer {
    Generation { endpoint: Endpoint, model: String, names_tier: bool },
    Vectors { model: String, encoding: Encoding },
    Response(Box<ResponseRequest>),
}

impl LineTask {
    /// Parses the body of a line.
    pub(super) fn parse(endpoint: BatchEndpoint, body: &[u8]) -> Result<Self, WireError> {
        match endpoint {
            BatchEndpoint::Chat => Self::generation(Endpoint::Chat, request::parse_chat(body)?),
            BatchEndpoint::Completions => Self::generation(Endpoint::Completion, request::parse_completion(body)?),
            BatchEndpoint::Embeddings => {
                let request::Vectors { job, model, encoding } = request::parse_embeddings(body)?;
                Ok(Self { job, writer: Writer::Vectors { model, encoding } })
            }
            BatchEndpoint::Responses => Self::response(parse_response(body)?),
        }
    }

    fn generation(endpoint: Endpoint, parsed: Generation) -> Result<Self, WireError> {
        let Generation { job, model, stream, names_tier, .. } = parsed;
        refuse_stream(stream)?;
        Ok(Self { job, writer: Writer::Generation { endpoint, model, names_tier } })
    }

    /// The responses of a batch are in its file, and not stored besides.
    fn response(mut parsed: ResponseRequest) -> Result<Self, WireError> {
        refuse_stream(parsed.stream)?;
        if parsed.background {
            return Err(unsupported("background"));
        }
        if parsed.previous_response_id.is_some() {
            return Err(unsupported("previous_response_id"));
        }
        parsed.echo.store = false;
        Ok(Self { job: parsed.job.clone(), writer: Writer::Response(Box::new(parsed)) })
    }

    /// Writes the body of the response.
    pub(super) fn write(&self, id: CorrelationId, answer: &Answer, whole: &Whole, now: UnixMillis) -> Option<Vec<u8>> {
        let written = |raw: Box<RawValue>| raw.get().as_bytes().to_vec();
        match &self.writer {
            Writer::Generation { endpoint, model, names_tier } => {
                let heading = Heading::new(*endpoint, model.clone(), &self.job, id, now);
                let heading = if *names_tier { heading.with_tier(self.job.class) } else { heading };
                write_whole(&heading, answer, whole).ok().map(written)
            }
            Writer::Vectors { model, encoding } => write_vectors(model, *encoding, whole).map(written),
            Writer::Response(parsed) => {
                let ResponseRequest { model, echo, names, .. } = &**parsed;
                let heading = response::Heading::new(id, model.clone(), echo.clone(), names.clone(), now);
                response::write_whole(heading.with_tier(self.job.class), answer, whole).ok()
            }
        }
    }
}

fn refuse_stream(stream: bool) -> Result<(), WireError> {
    if stream { Err(invalid("stream", "must be false in a batch")) } else { Ok(()) }
}

/// Writes an error as the body of a response.
pub(super) fn write_error(error: &WireError) -> Vec<u8> {
    let mut body = BytesMut::new();
    error::write(error, &mut body);
    body.to_vec()
}

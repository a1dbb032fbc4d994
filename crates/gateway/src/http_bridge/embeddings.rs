//! `POST /v1/embeddings`.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;
use protocol::infer::Embedding;
use protocol::{ErrorCode, WireError};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::errors;
use super::job::{self, AnswerFacts, Opening, Told};
use super::router::Bridge;
use crate::answer::Whole;
use crate::openai::request::{self, Encoding, Vectors};

/// Makes a vector of each text.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "openai", operation_id = "createEmbedding", security(("bearer" = [])),
    request_body = super::openapi::EmbeddingRequest,
    responses(
        (status = 200, description = "The vectors, in the order of the texts", body = super::openapi::EmbeddingList),
        super::openapi::Errors,
    ),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    let asked = match job::ask(&bridge, request, request::parse_embeddings).await {
        Ok(asked) => asked,
        Err(response) => return response,
    };
    let Vectors { job, model, encoding } = asked.parsed;
    let told = Told::new(asked.context, &job, asked.rate);
    match whole(job::open(&bridge, asked.admission, job), &model, encoding).await {
        Ok((mut response, facts)) => {
            told.add(&bridge, response.headers_mut(), Some(&facts));
            response
        }
        Err(error) => told.failure(&bridge, &error),
    }
}

async fn whole(opening: Opening, model: &str, encoding: Encoding) -> Result<(Response<Body>, AnswerFacts), WireError> {
    let mut answer = opening.await?;
    let facts = AnswerFacts::of(&answer);
    let whole = answer.collect().await?;
    let written = write_vectors(model, encoding, &whole);
    let written = written.ok_or_else(|| WireError::new(ErrorCode::InternalError, "the answer could not be written"))?;
    Ok((errors::json(&written), facts))
}

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

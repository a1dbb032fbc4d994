//! `POST /v1/completions`, and what it has in common with chat.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;
use protocol::{ErrorCode, WireError};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::errors;
use super::job::{self, AnswerFacts, Opening, Told};
use super::router::Bridge;
use super::sse::{self, Endpoint, Heading, Sse, Usage};
use crate::answer::{Answer, End};
use crate::validation::{self, Generation};

/// Goes on with a text.
#[utoipa::path(
    post, path = "/v1/completions", tag = "openai", operation_id = "createCompletion", security(("bearer" = [])),
    request_body = super::openapi::CompletionRequest,
    responses(
        (status = 200, description = "The answer; as server-sent events where `stream` is true", content(
            (super::openapi::Completion = "application/json"), (String = "text/event-stream"),
        )),
        super::openapi::Errors,
    ),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    generate(&bridge, request, Endpoint::Completion, validation::parse_completion).await
}

/// Answers a request of either endpoint.
pub(super) async fn generate(
    bridge: &Bridge,
    request: Request,
    endpoint: Endpoint,
    parse: fn(&[u8]) -> Result<Generation, WireError>,
) -> Response<Body> {
    let asked = match job::ask(bridge, request, parse).await {
        Ok(asked) => asked,
        Err(response) => return response,
    };
    let Generation { job, model, stream, include_usage } = asked.parsed;
    let told = Told::new(asked.context, &job, asked.rate);
    let heading = Heading {
        endpoint,
        id: format!("{}{}", endpoint.id_prefix(), told.correlation_id().0.simple()),
        created: bridge.gateway.clock().now().0 / 1000,
        model,
        include_usage,
    };
    let opening = job::open(bridge, asked.admission, job);
    if stream {
        return job::stream(bridge, opening, Sse::new(heading), "text/event-stream", told).await;
    }
    match whole(opening, &heading).await {
        Ok((mut response, facts)) => {
            told.add(bridge, response.headers_mut(), Some(&facts));
            response
        }
        Err(error) => told.failure(bridge, &error),
    }
}

/// Waits for the whole answer.
async fn whole(opening: Opening, heading: &Heading) -> Result<(Response<Body>, AnswerFacts), WireError> {
    let mut answer = opening.await?;
    let facts = AnswerFacts::of(&answer);
    let (text, end) = answer.collect().await?;
    let written = write_whole(heading, &answer, &text, end);
    let written = written.map_err(|_| WireError::new(ErrorCode::InternalError, "the answer could not be written"))?;
    Ok((errors::json(&written), facts))
}

#[derive(Serialize)]
struct Whole<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: [C; 1],
    usage: Usage,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: AssistantMessage<'a>,
    logprobs: (),
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct AssistantMessage<'a> {
    role: &'static str,
    content: &'a str,
    refusal: (),
}

#[derive(Serialize)]
struct TextChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: (),
    finish_reason: &'static str,
}

/// Writes a whole answer as `OpenAI` does.
pub(crate) fn write_whole(
    heading: &Heading,
    answer: &Answer,
    text: &str,
    end: End,
) -> serde_json::Result<Box<RawValue>> {
    let fingerprint = &sse::fingerprint(answer);
    let finish_reason = end.reason.as_str();
    match heading.endpoint {
        Endpoint::Chat => {
            let message = AssistantMessage { role: "assistant", content: text, refusal: () };
            let choice = ChatChoice { index: 0, message, logprobs: (), finish_reason };
            to_raw_value(&with_choice(heading, fingerprint, "chat.completion", choice, end))
        }
        Endpoint::Completion => {
            let choice = TextChoice { index: 0, text, logprobs: (), finish_reason };
            to_raw_value(&with_choice(heading, fingerprint, "text_completion", choice, end))
        }
    }
}

fn with_choice<'a, C>(
    heading: &'a Heading,
    system_fingerprint: &'a str,
    object: &'static str,
    choice: C,
    end: End,
) -> Whole<'a, C> {
    let Heading { id, created, model, .. } = heading;
    Whole { id, object, created: *created, model, system_fingerprint, choices: [choice], usage: end.usage.into() }
}

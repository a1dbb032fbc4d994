//! `POST /v1/completions`, and what it has in common with chat.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;
use protocol::gateway::Choice;
use protocol::infer::{EmbedInput, Input};
use protocol::usage::TokenUsage;
use protocol::{ErrorCode, WireError};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::errors;
use super::job::{self, AnswerFacts, Opening, Told};
use super::router::Bridge;
use crate::answer::{Answer, Whole};
use crate::gateway::Job;
use crate::openai::request::{self, Generation};
use crate::openai::response::logprobs::{ChatLogprobs, TextLogprobs, TextPlace};
use crate::openai::response::sse::{self, Endpoint, Heading, Sse, Usage};
use crate::openai::response::tool_calls::WholeCall;

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
    generate(&bridge, request, Endpoint::Completion, request::parse_completion).await
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
        prompt_chars: prompt_chars(&job),
        echo: job.input.echo,
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

/// Returns how many characters stand before each answer, where they are known: of tokens they are not.
pub(crate) fn prompt_chars(job: &Job) -> Vec<usize> {
    let of = |prompt: &EmbedInput| match prompt {
        EmbedInput::Text(text) => text.chars().count(),
        EmbedInput::Tokens(_) => 0,
    };
    let each = job.input.answers_each() as usize;
    match &job.input {
        Input { prompts: Some(prompts), .. } => {
            prompts.iter().map(of).flat_map(|chars| std::iter::repeat_n(chars, each)).collect()
        }
        Input { prompt, .. } => vec![prompt.as_ref().map_or(0, |prompt| prompt.chars().count()); each],
    }
}

/// Waits for the whole answer.
async fn whole(opening: Opening, heading: &Heading) -> Result<(Response<Body>, AnswerFacts), WireError> {
    let mut answer = opening.await?;
    let facts = AnswerFacts::of(&answer);
    let whole = answer.collect().await?;
    let written = write_whole(heading, &answer, &whole);
    let written = written.map_err(|_| WireError::new(ErrorCode::InternalError, "the answer could not be written"))?;
    Ok((errors::json(&written), facts))
}

#[derive(Serialize)]
struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    usage: Usage,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: AssistantMessage<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct AssistantMessage<'a> {
    role: &'static str,
    /// Null where the model only calls functions.
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning_content: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WholeCall<'a>>,
    refusal: (),
}

#[derive(Serialize)]
struct TextChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<TextLogprobs<'a>>,
    finish_reason: &'static str,
}

impl<'a> ChatChoice<'a> {
    fn of((index, choice): (u32, &'a Choice)) -> Self {
        let Choice { text, reasoning, tool_calls, logprobs, finish_reason } = choice;
        let message = AssistantMessage {
            role: "assistant",
            content: (!text.is_empty() || tool_calls.is_empty()).then_some(text),
            reasoning_content: reasoning,
            tool_calls: tool_calls.iter().map(WholeCall::of).collect(),
            refusal: (),
        };
        Self { index, message, logprobs: ChatLogprobs::of(logprobs), finish_reason: finish_reason.as_str() }
    }
}

impl<'a> TextChoice<'a> {
    fn of((index, choice): (u32, &'a Choice), mut place: TextPlace) -> Self {
        let Choice { text, logprobs, finish_reason, .. } = choice;
        let logprobs = TextLogprobs::of(logprobs, &mut place);
        Self { index, text, logprobs, finish_reason: finish_reason.as_str() }
    }
}

/// Writes a whole answer as `OpenAI` does.
pub(crate) fn write_whole(heading: &Heading, answer: &Answer, whole: &Whole) -> serde_json::Result<Box<RawValue>> {
    let choices = (0..).zip(&whole.choices);
    match heading.endpoint {
        Endpoint::Chat => write(heading, answer, "chat.completion", choices.map(ChatChoice::of).collect(), whole.usage),
        Endpoint::Completion => {
            let chars = |index: u32| heading.prompt_chars.get(index as usize).copied().unwrap_or_default();
            let place = |index: u32| TextPlace::of(chars(index), heading.echo);
            let choices = choices.map(|choice| TextChoice::of(choice, place(choice.0))).collect();
            write(heading, answer, "text_completion", choices, whole.usage)
        }
    }
}

fn write<C: Serialize>(
    heading: &Heading,
    answer: &Answer,
    object: &'static str,
    choices: Vec<C>,
    usage: TokenUsage,
) -> serde_json::Result<Box<RawValue>> {
    let Heading { id, created, model, .. } = heading;
    let system_fingerprint = &sse::fingerprint(answer);
    to_raw_value(&Envelope { id, object, created: *created, model, system_fingerprint, choices, usage: usage.into() })
}

//! Answers as a whole.

use protocol::gateway::Choice;
use protocol::usage::TokenUsage;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::logprobs::{ChatLogprobs, TextLogprobs, TextPlace};
use super::tool_calls::WholeCall;
use super::{Heading, Usage, fingerprint};
use crate::answer::{Answer, Whole};
use crate::openai::Endpoint;

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
    let system_fingerprint = &fingerprint(answer);
    to_raw_value(&Envelope { id, object, created: *created, model, system_fingerprint, choices, usage: usage.into() })
}

//! Unstreamed answers in OpenAI's format.

use protocol::gateway::Choice;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use utoipa::ToSchema;

use super::logprobs::{ChatLogprobs, TextLogprobs, TextPosition};
use super::tool_calls::{WholeCall, WholeFunction};
use super::{Heading, Usage, fingerprint};
use crate::answer::{Answer, Whole};
use crate::openai::Endpoint;
use crate::published;

/// An answer to a conversation.
#[derive(Serialize, ToSchema)]
pub(crate) struct ChatCompletion<'a> {
    id: &'a str,
    /// `chat.completion`.
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    model: &'a str,
    /// The beginning of the model's digest.
    system_fingerprint: &'a str,
    /// How urgent the request was: `default`, `priority` or `flex`. Absent unless the request named a tier.
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<&'static str>,
    choices: Vec<ChatChoice<'a>>,
    usage: Usage,
}

/// A continued text.
#[derive(Serialize, ToSchema)]
pub(crate) struct Completion<'a> {
    id: &'a str,
    /// `text_completion`.
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    model: &'a str,
    /// The beginning of the model's digest.
    system_fingerprint: &'a str,
    /// How urgent the request was: `default`, `priority` or `flex`. Absent unless the request named a tier.
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<&'static str>,
    choices: Vec<TextChoice<'a>>,
    usage: Usage,
}

#[derive(Serialize, ToSchema)]
struct ChatChoice<'a> {
    index: u32,
    message: AssistantMessage<'a>,
    /// Null unless requested.
    logprobs: Option<ChatLogprobs<'a>>,
    #[schema(value_type = ChatFinishReason)]
    finish_reason: &'static str,
}

/// Why an answer to a conversation ended.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its description is used")]
enum ChatFinishReason {
    /// The model ended its turn, or generated a stop sequence.
    Stop,
    /// The token limit or the end of the context was reached.
    Length,
    /// The model ended its turn and called functions.
    ToolCalls,
    /// As `tool_calls`, if the request offers `functions`.
    FunctionCall,
}

#[derive(Serialize, ToSchema)]
struct AssistantMessage<'a> {
    /// Always `assistant`.
    role: &'static str,
    /// Text of the answer; null if the model only calls functions.
    content: Option<&'a str>,
    /// The model's reasoning; absent if the model did not reason. Not in OpenAI's API.
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning_content: &'a str,
    /// The same text as `reasoning_content`, for clients that know it by this name.
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning: &'a str,
    /// Functions that the model calls; absent if it calls no function.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WholeCall<'a>>,
    /// The function that the model calls, instead of `tool_calls`, if the request offers `functions`.
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<WholeFunction<'a>>,
    /// Always null.
    #[schema(value_type = Option<String>)]
    refusal: (),
}

#[derive(Serialize, ToSchema)]
struct TextChoice<'a> {
    index: u32,
    text: &'a str,
    /// Null unless requested.
    logprobs: Option<TextLogprobs<'a>>,
    #[schema(value_type = published::FinishReason)]
    finish_reason: &'static str,
}

impl<'a> ChatChoice<'a> {
    fn of((index, choice): (u32, &'a Choice), heading: &Heading) -> Self {
        let Choice { text, reasoning, tool_calls, logprobs, finish_reason, stop_sequence: _ } = choice;
        let calls_functions = heading.calls_functions;
        let message = AssistantMessage {
            role: "assistant",
            content: (!text.is_empty() || tool_calls.is_empty()).then_some(text),
            reasoning_content: reasoning,
            reasoning,
            tool_calls: tool_calls.iter().filter(|_| !calls_functions).map(WholeCall::of).collect(),
            function_call: tool_calls.first().filter(|_| calls_functions).map(WholeFunction::of),
            refusal: (),
        };
        let finish_reason = heading.finish_reason(*finish_reason);
        Self { index, message, logprobs: ChatLogprobs::of(logprobs), finish_reason }
    }
}

impl<'a> TextChoice<'a> {
    fn of((index, choice): (u32, &'a Choice), mut position: TextPosition) -> Self {
        let Choice { text, logprobs, finish_reason, .. } = choice;
        let logprobs = TextLogprobs::of(logprobs, &mut position);
        Self { index, text, logprobs, finish_reason: finish_reason.as_str() }
    }
}

/// Serializes a whole answer as `OpenAI` does.
pub(crate) fn write_whole(heading: &Heading, answer: &Answer, whole: &Whole) -> serde_json::Result<Box<RawValue>> {
    let choices = (0..).zip(&whole.choices);
    let Heading { endpoint, id, service_tier, .. } = heading;
    let (model, service_tier) = (&*heading.model(answer), *service_tier);
    let (created, system_fingerprint, usage) = (heading.created(answer), &*fingerprint(answer), whole.usage.into());
    match endpoint {
        Endpoint::Chat => {
            let (object, choices) =
                ("chat.completion", choices.map(|choice| ChatChoice::of(choice, heading)).collect());
            to_raw_value(&ChatCompletion {
                id,
                object,
                created,
                model,
                system_fingerprint,
                service_tier,
                choices,
                usage,
            })
        }
        Endpoint::Completion => {
            let chars = |index: u32| heading.prompt_chars.get(index as usize).copied().unwrap_or_default();
            let position = |index: u32| TextPosition::of(chars(index), heading.echo);
            let choices = choices.map(|choice| TextChoice::of(choice, position(choice.0))).collect();
            to_raw_value(&Completion {
                id,
                object: "text_completion",
                created,
                model,
                system_fingerprint,
                service_tier,
                choices,
                usage,
            })
        }
    }
}

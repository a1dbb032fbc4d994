//! Serializes answers as Anthropic's responses.

mod block;
pub(crate) mod error;
pub(crate) mod events;
pub(crate) mod models;
pub(crate) mod whole;

use protocol::CorrelationId;
use protocol::infer::FinishReason;
use protocol::policy::ServiceClass;
use protocol::usage::TokenUsage;
use serde::Serialize;
use utoipa::ToSchema;

use crate::job::Job;
use block::Block;

/// What a message begins with.
#[derive(Debug, Clone)]
pub(crate) struct Heading {
    pub(crate) id: String,
    /// The model as the client named it.
    pub(crate) model: String,
    pub(crate) service_tier: &'static str,
}

impl Heading {
    pub(crate) fn new(model: String, job: &Job, id: CorrelationId) -> Self {
        let service_tier = tier(job.class.unwrap_or_default());
        Self { id: format!("msg_{}", id.0.simple()), model, service_tier }
    }
}

/// Returns the tier as which this API names a class.
fn tier(class: ServiceClass) -> &'static str {
    match class {
        ServiceClass::Interactive => "priority",
        ServiceClass::Standard => "standard",
        ServiceClass::Batch => "batch",
    }
}

/// A model's message: a whole answer, or the beginning of a streamed one.
#[derive(Serialize, ToSchema)]
pub(crate) struct Message<'a> {
    id: &'a str,
    /// Kind of the object: always `message`.
    r#type: &'static str,
    /// Author of the message: always `assistant`.
    role: &'static str,
    model: &'a str,
    content: Vec<Block<'a>>,
    /// `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`.
    stop_reason: Option<&'static str>,
    /// The stop sequence that ended the answer, if one did.
    stop_sequence: Option<&'a str>,
    usage: Usage,
}

impl<'a> Message<'a> {
    /// Begins a message that nothing was said of yet.
    fn begin(heading: &'a Heading, usage: TokenUsage) -> Self {
        let Heading { id, model, service_tier } = heading;
        Self {
            id,
            r#type: "message",
            role: "assistant",
            model,
            content: vec![],
            stop_reason: None,
            stop_sequence: None,
            usage: Usage::of(usage, service_tier),
        }
    }
}

/// Token usage of a message. The prompt's tokens are the sum of the three numbers of input tokens.
#[derive(Serialize, ToSchema)]
#[schema(as = MessageUsage)]
struct Usage {
    /// Prompt tokens that were evaluated.
    input_tokens: u32,
    /// Always 0: what is evaluated is cached without further cost.
    cache_creation_input_tokens: u32,
    /// Prompt tokens that were cached and not evaluated again.
    cache_read_input_tokens: u32,
    output_tokens: u32,
    /// Absent if the model did not reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    output_tokens_details: Option<OutputTokens>,
    /// How urgent the request was: `standard`, `priority` or `batch`.
    service_tier: &'static str,
}

#[derive(Serialize, ToSchema)]
#[schema(as = MessageOutputTokens)]
struct OutputTokens {
    /// Reasoning tokens. `output_tokens` includes them.
    thinking_tokens: u32,
}

impl Usage {
    fn of(usage: TokenUsage, service_tier: &'static str) -> Self {
        let TokenUsage { prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens } = usage;
        Self {
            input_tokens: prompt_tokens.saturating_sub(cached_tokens),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: cached_tokens,
            output_tokens: completion_tokens,
            output_tokens_details: (reasoning_tokens > 0).then_some(OutputTokens { thinking_tokens: reasoning_tokens }),
            service_tier,
        }
    }
}

/// Returns why an answer ended, and the stop sequence that ended it.
fn stop(reason: FinishReason, stop_sequence: Option<&str>) -> (&'static str, Option<&str>) {
    match (reason, stop_sequence) {
        (FinishReason::Stop, None) => ("end_turn", None),
        (FinishReason::Stop, stop) => ("stop_sequence", stop),
        (FinishReason::Length, _) => ("max_tokens", None),
        (FinishReason::ToolCalls, _) => ("tool_use", None),
    }
}

/// The number of input tokens of a request.
#[derive(Serialize, ToSchema)]
#[schema(as = MessageTokenCount)]
pub(crate) struct TokenCount {
    /// Number of tokens, including those of the chat template and of tools.
    pub(crate) input_tokens: u32,
}

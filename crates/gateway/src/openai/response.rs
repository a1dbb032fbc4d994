//! Serializes answers as OpenAI responses.

mod chunk;
pub(crate) mod error;
pub(crate) mod logprobs;
pub(crate) mod models;
pub(crate) mod ranking;
pub(crate) mod sse;
pub(crate) mod tokens;
mod tool_calls;
pub(crate) mod vectors;
pub(crate) mod whole;

use protocol::infer::{EmbedInput, FinishReason, Input};
use protocol::policy::ServiceClass;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, UnixMillis};
use serde::Serialize;
use utoipa::ToSchema;

use super::Endpoint;
use crate::answer::Answer;
use crate::class;
use crate::job::Job;

/// The fields that all chunks of one answer share, and that a whole answer begins with.
#[derive(Debug, Clone)]
pub(crate) struct Heading {
    pub(crate) endpoint: Endpoint,
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The model as the client named it.
    pub(crate) model: String,
    /// For each answer, the number of characters of its prompt.
    pub(crate) prompt_chars: Vec<usize>,
    /// Whether the answers begin with the prompt.
    pub(crate) echo: bool,
    /// Whether a usage chunk follows the last chunk.
    pub(crate) include_usage: bool,
    /// The service tier, if the response names it.
    pub(crate) service_tier: Option<&'static str>,
    /// Whether calls are written in the older form, as `function_call`.
    pub(crate) calls_functions: bool,
}

impl Heading {
    /// Creates the heading for a job that arrived at `now`, without a usage chunk.
    pub(crate) fn new(endpoint: Endpoint, model: String, job: &Job, id: CorrelationId, now: UnixMillis) -> Self {
        Self {
            endpoint,
            id: format!("{}{}", endpoint.id_prefix(), id.0.simple()),
            created: now.0 / 1000,
            model,
            prompt_chars: prompt_chars(&job.input),
            echo: job.input.echo,
            include_usage: false,
            service_tier: None,
            calls_functions: false,
        }
    }

    /// Returns why an answer ended, in the form in which its calls are written.
    fn finish_reason(&self, reason: FinishReason) -> &'static str {
        match reason {
            FinishReason::ToolCalls if self.calls_functions => "function_call",
            reason => reason.as_str(),
        }
    }

    /// Names the service tier in the response.
    pub(crate) fn with_tier(self, class: Option<ServiceClass>) -> Self {
        Self { service_tier: Some(class::tier(class.unwrap_or_default())), ..self }
    }

    /// Returns the model as the response names it: as the client did, unless another one runs the job.
    fn model(&self, answer: &Answer) -> String {
        answer.model_name(&self.model)
    }

    /// Returns when the answer was created. A replayed one is as old as the first.
    fn created(&self, answer: &Answer) -> u64 {
        answer.origin().map_or(self.created, |origin| origin.created_at.0 / 1000)
    }
}

/// Token usage of an answer.
#[derive(Serialize, ToSchema)]
#[schema(as = CompletionUsage)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
    /// Absent if the model did not reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionTokensDetails>,
}

#[derive(Serialize, ToSchema)]
struct PromptTokensDetails {
    /// Prompt tokens that were cached and not evaluated again.
    cached_tokens: u32,
}

#[derive(Serialize, ToSchema)]
struct CompletionTokensDetails {
    /// Reasoning tokens. `completion_tokens` includes them.
    reasoning_tokens: u32,
}

impl From<TokenUsage> for Usage {
    fn from(usage: TokenUsage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.total_tokens(),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
            completion_tokens_details: Some(usage.reasoning_tokens)
                .filter(|thought| *thought > 0)
                .map(|reasoning_tokens| CompletionTokensDetails { reasoning_tokens }),
        }
    }
}

/// Returns the fingerprint of the model that answers: the beginning of its digest.
fn fingerprint(answer: &Answer) -> String {
    format!("fp_{}", &answer.model().digest.to_string()[..12])
}

/// Returns the number of prompt characters before each answer; 0 for prompts given as tokens, where it is unknown.
fn prompt_chars(input: &Input) -> Vec<usize> {
    let of = |prompt: &EmbedInput| match prompt {
        EmbedInput::Text(text) => text.chars().count(),
        EmbedInput::Tokens(_) => 0,
    };
    let each = input.answers_each() as usize;
    match input {
        Input { prompts: Some(prompts), .. } => {
            prompts.iter().map(of).flat_map(|chars| std::iter::repeat_n(chars, each)).collect()
        }
        Input { prompt, .. } => vec![prompt.as_ref().map_or(0, |prompt| prompt.chars().count()); each],
    }
}

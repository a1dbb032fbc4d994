//! Serializes answers as responses, whole and as events.

pub(crate) mod events;
mod free_form;
pub(crate) mod output;

use protocol::infer::{Degraded, FinishReason, Origin};
use protocol::kept::KeptStatus;
use protocol::policy::ServiceClass;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, UnixMillis, WireError};
use serde::Serialize;
use utoipa::ToSchema;

use self::output::OutputItem;
use super::item::Item;
use super::note::{Note, response_id};
use super::request::Echo;
use super::tool_names::ToolNames;
use crate::answer::{Answer, KeptWhole, Whole};
use crate::class;

/// What a response says before its answer.
#[derive(Debug, Clone)]
pub(crate) struct Heading {
    id: String,
    /// Arrival of the request, in seconds since 1970.
    created_at: u64,
    /// The model as the client named it.
    model: String,
    echo: Echo,
    names: ToolNames,
}

impl Heading {
    /// Creates the heading for a job that arrived at `now`.
    pub(crate) fn new(job: CorrelationId, model: String, echo: Echo, names: ToolNames, now: UnixMillis) -> Self {
        Self { id: response_id(job), created_at: now.0 / 1000, model, echo, names }
    }

    /// Creates the heading of a stored response.
    pub(crate) fn of_kept(job: CorrelationId, note: Note, created_at: UnixMillis) -> Self {
        let Note { model, echo, names, items: _ } = note;
        Self::new(job, model, echo, names, created_at)
    }

    /// Returns whether the response is generated without its client.
    pub(crate) fn is_background(&self) -> bool {
        self.echo.background
    }

    /// Names the service tier in the response.
    pub(crate) fn with_tier(mut self, class: Option<ServiceClass>) -> Self {
        class::tier(class.unwrap_or_default()).clone_into(&mut self.echo.service_tier);
        self
    }

    /// Adapts the heading to the answer: another model may run the job, and a replayed answer is as old as the first.
    fn begin(&mut self, degraded: Option<&Degraded>, origin: Option<Origin>) {
        if let Some(model) = degraded.and_then(|degraded| degraded.model.as_ref()) {
            self.model = model.model_id.to_string();
        }
        if let Some(origin) = origin {
            self.created_at = origin.created_at.0 / 1000;
        }
    }

    fn response<'a>(&'a self, status: Status, output: &'a [OutputItem]) -> Response<'a> {
        Response {
            id: &self.id,
            object: "response",
            created_at: self.created_at,
            status,
            error: None,
            incomplete_details: None,
            model: &self.model,
            output,
            usage: None,
            echo: &self.echo,
        }
    }

    /// Returns the response to a job that has ended.
    fn ended<'a>(&'a self, reason: FinishReason, usage: TokenUsage, output: &'a [OutputItem]) -> Response<'a> {
        let is_cut = reason == FinishReason::Length;
        let status = if is_cut { Status::Incomplete } else { Status::Completed };
        let incomplete_details = is_cut.then_some(IncompleteDetails { reason: "max_output_tokens" });
        Response { incomplete_details, usage: Some(usage.into()), ..self.response(status, output) }
    }
}

/// Writes a whole response.
pub(crate) fn write_whole(mut heading: Heading, answer: &Answer, whole: &Whole) -> serde_json::Result<Vec<u8>> {
    heading.begin(answer.degraded(), answer.origin());
    write_ended(&heading, whole)
}

fn write_ended(heading: &Heading, whole: &Whole) -> serde_json::Result<Vec<u8>> {
    let Some(choice) = whole.choices.first() else { return Ok(vec![]) };
    let output = output::items(heading, choice);
    serde_json::to_vec(&heading.ended(choice.finish_reason, whole.usage, &output))
}

/// Writes a stored response whose answer is complete.
pub(crate) fn write_kept(mut heading: Heading, kept: &KeptWhole) -> serde_json::Result<Vec<u8>> {
    heading.begin(kept.degraded.as_ref(), kept.origin);
    write_ended(&heading, &kept.whole)
}

/// Writes a stored response that has no answer, or none yet.
pub(crate) fn write_unanswered(
    heading: &Heading,
    status: KeptStatus,
    error: Option<&WireError>,
) -> serde_json::Result<Vec<u8>> {
    let error = error.map(Failure::of);
    serde_json::to_vec(&Response { error, ..heading.response(status.into(), &[]) })
}

/// Returns the items of a complete answer, for the conversation that continues it.
pub(crate) fn items_of(heading: &Heading, whole: &Whole) -> Vec<Item> {
    let output = whole.choices.first().map(|choice| output::items(heading, choice)).unwrap_or_default();
    output.into_iter().map(Item::from).collect()
}

/// A response as it is now: its settings, and what has been generated.
#[derive(Serialize, ToSchema)]
pub(crate) struct Response<'a> {
    id: &'a str,
    /// Kind of the object: always `response`.
    object: &'static str,
    /// Arrival of the request, in seconds since 1970.
    created_at: u64,
    status: Status,
    /// Why it failed; null unless it did.
    error: Option<Failure<'a>>,
    /// Why it is incomplete; null unless it is.
    incomplete_details: Option<IncompleteDetails>,
    model: &'a str,
    output: &'a [OutputItem],
    /// Null until it has ended.
    usage: Option<Usage>,
    #[serde(flatten)]
    #[schema(value_type = Echo, inline)]
    echo: &'a Echo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ResponseStatus)]
pub(crate) enum Status {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

impl From<KeptStatus> for Status {
    fn from(status: KeptStatus) -> Self {
        match status {
            KeptStatus::Queued => Self::Queued,
            KeptStatus::Running => Self::InProgress,
            KeptStatus::Completed => Self::Completed,
            KeptStatus::Failed => Self::Failed,
            KeptStatus::Cancelled => Self::Cancelled,
        }
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = ResponseIncompleteDetails)]
struct IncompleteDetails {
    /// Always `max_output_tokens`: no answer is cut for another reason.
    reason: &'static str,
}

#[derive(Serialize, ToSchema)]
#[schema(as = ResponseFailure)]
struct Failure<'a> {
    /// `rate_limit_exceeded` or `server_error`, which OpenAI's clients know.
    code: &'static str,
    message: &'a str,
}

impl<'a> Failure<'a> {
    fn of(error: &'a WireError) -> Self {
        let code = if error.code.http_status() == 429 { "rate_limit_exceeded" } else { "server_error" };
        Self { code, message: &error.message }
    }
}

/// Token usage of a response.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ResponseUsage)]
struct Usage {
    input_tokens: u32,
    input_tokens_details: InputDetails,
    output_tokens: u32,
    output_tokens_details: OutputDetails,
    total_tokens: u32,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ResponseInputTokensDetails)]
struct InputDetails {
    /// Input tokens that were cached and not evaluated again.
    cached_tokens: u32,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ResponseOutputTokensDetails)]
struct OutputDetails {
    /// Reasoning tokens. `output_tokens` includes them.
    reasoning_tokens: u32,
}

impl From<TokenUsage> for Usage {
    fn from(usage: TokenUsage) -> Self {
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputDetails { cached_tokens: usage.cached_tokens },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: usage.reasoning_tokens },
            total_tokens: usage.total_tokens(),
        }
    }
}

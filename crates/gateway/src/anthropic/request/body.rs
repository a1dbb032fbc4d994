//! The request body of messages, which the count of their tokens shares.

use protocol::WireError;
use protocol::infer::{Input, OutputFormat, ToolChoice};
use protocol::policy::ServiceClass;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::MessageOrder;
use super::conversation::{self, Content, Text, Turn, TurnSchema};
use super::tools::{OfferedTool, OfferedToolSchema, ToolUse, tools};
use crate::anthropic::THREAD;
use crate::catalog;
use crate::job::Job;
use crate::json_body::{invalid, missing, refuse_unless};

/// The body of `POST /v1/messages`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct MessagesRequest(pub(super) Body);

/// The body of `POST /v1/messages/count_tokens`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct MessageCountRequest(pub(super) Body);

impl PartialSchema for MessagesRequest {
    fn schema() -> RefOr<Schema> {
        let description = "A conversation to answer, in Anthropic's format. Unknown fields have no effect, such as \
                           `metadata`, `context_management` and `cache_control`.";
        Body::schema_with(&["model", "messages", "max_tokens"], description)
    }
}

impl ToSchema for MessagesRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Body::schemas(schemas);
    }
}

impl PartialSchema for MessageCountRequest {
    fn schema() -> RefOr<Schema> {
        Body::schema_with(&["model", "messages"], "A conversation whose tokens are counted.")
    }
}

impl ToSchema for MessageCountRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Body::schemas(schemas);
    }
}

#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Body {
    /// `name[@MAJOR.MINOR][:adapter]`. Without a version it is the newest.
    #[schema(value_type = String, min_length = 1)]
    model: Option<String>,
    /// The conversation so far. If an assistant's text is last, the answer continues it.
    #[schema(value_type = Vec<TurnSchema>, min_items = 1)]
    messages: Option<Vec<Turn>>,
    /// Instructions before the conversation: a text, or blocks of it.
    #[schema(value_type = Option<Text>)]
    system: Option<Content>,
    /// Maximum number of tokens to generate.
    #[schema(value_type = u32, minimum = 1)]
    pub(super) max_tokens: Option<u32>,
    /// Whether to stream the answer as server-sent events.
    #[schema(default = false)]
    stream: Option<bool>,
    /// Sampling temperature. 0 chooses the most likely token; 1 leaves the distribution unchanged. The defaults of
    /// `temperature`, `top_p` and `top_k` are the model's own.
    #[schema(minimum = 0, maximum = 1)]
    temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities sum to this.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    top_k: Option<u32>,
    /// Texts at which the answer ends.
    #[schema(max_items = 16)]
    stop_sequences: Option<Vec<String>>,
    /// Tools that the model may call. Tools of a type other than `custom` have no effect.
    #[schema(value_type = Option<Vec<OfferedToolSchema>>, max_items = 128)]
    tools: Option<Vec<OfferedTool>>,
    /// Whether the model calls tools.
    tool_choice: Option<ToolUse>,
    /// Whether the model reasons, if it has the choice. Without this it does not.
    thinking: Option<Thinking>,
    /// Format and effort of the answer.
    output_config: Option<OutputConfig>,
    /// The older name of `output_config.format`.
    output_format: Option<Format>,
    /// Refused. The SDKs then send the whole conversation with each request.
    #[schema(value_type = Option<Value>)]
    thread: Option<IgnoredAny>,
    /// How urgent the request is: `auto` leaves this to the header `x-tether-class`.
    service_tier: Option<ServiceTier>,
}

/// Whether a model reasons before it answers.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = MessageThinking)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Thinking {
    /// It reasons. `budget_tokens` has no effect.
    Enabled,
    /// It does not reason.
    Disabled,
    /// It decides for each answer, if its chat template lets it.
    Adaptive,
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageOutputConfig)]
struct OutputConfig {
    /// How long the model reasons, if its chat template knows this.
    effort: Option<Effort>,
    /// Format that the answer must have.
    format: Option<Format>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = MessageEffort)]
#[serde(rename_all = "lowercase")]
enum Effort {
    Low,
    Medium,
    High,
    Xhigh,
    Max,
}

impl Effort {
    /// Returns the value of `reasoning_effort` in chat templates.
    fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Xhigh | Self::Max => "xhigh",
        }
    }
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessageFormat)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Format {
    /// JSON that the schema allows. A schema that cannot be enforced completely is refused.
    JsonSchema {
        #[schema(value_type = Object)]
        schema: Value,
    },
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = MessageServiceTier)]
#[serde(rename_all = "snake_case")]
enum ServiceTier {
    Auto,
    StandardOnly,
}

impl Body {
    /// Returns the schema of an endpoint's body, with the fields that it requires.
    fn schema_with(required: &[&str], description: &str) -> RefOr<Schema> {
        let mut schema = Self::schema();
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            object.description = Some(description.to_owned());
            object.required = required.iter().map(ToString::to_string).collect();
        }
        schema
    }

    /// Converts the body to a job.
    pub(super) fn order(self) -> Result<MessageOrder, WireError> {
        let (model, name) = catalog::parse_named(self.model.as_deref())?;
        if self.max_tokens == Some(0) {
            return Err(invalid("max_tokens", "must be at least 1"));
        }
        if self.temperature.is_some_and(|temperature| temperature > 1.0) {
            return Err(invalid("temperature", "must be between 0 and 1"));
        }
        refuse_unless(self.thread.is_none(), THREAD)?;
        let stream = self.stream.unwrap_or(false);
        let class = matches!(self.service_tier, Some(ServiceTier::StandardOnly)).then_some(ServiceClass::Standard);
        let input = self.input()?;
        input.check()?;
        Ok(MessageOrder { job: Job { class, ..Job::new(model, input) }, model: name, stream })
    }

    fn input(self) -> Result<Input, WireError> {
        let template_options = self.template_options();
        let messages = self.messages.ok_or_else(|| missing("messages"))?;
        let (messages, continue_last) = conversation::convert(self.system, messages)?;
        let (tool_choice, one_call) = self.tool_choice.map_or((ToolChoice::Auto, false), ToolUse::convert);
        let format = self.output_config.and_then(|config| config.format).or(self.output_format);
        Ok(Input {
            messages: Some(messages),
            continue_last,
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            stop: self.stop_sequences.unwrap_or_default(),
            tools: tools(self.tools.unwrap_or_default())?,
            tool_choice,
            one_call,
            template_options,
            format: format.map_or(OutputFormat::Text, |Format::JsonSchema { schema }| OutputFormat::JsonSchema(schema)),
            ..Input::default()
        })
    }

    /// Returns the variables for the chat template.
    fn template_options(&self) -> Map<String, Value> {
        let thinks = match self.thinking {
            Some(Thinking::Enabled) => Some(true),
            Some(Thinking::Disabled) | None => Some(false),
            Some(Thinking::Adaptive) => None,
        };
        let effort = self.output_config.as_ref().and_then(|config| config.effort);
        let thinks = thinks.map(|thinks| ("enable_thinking".to_owned(), thinks.into()));
        let effort = effort.map(|effort| ("reasoning_effort".to_owned(), effort.as_str().into()));
        thinks.into_iter().chain(effort).collect()
    }
}

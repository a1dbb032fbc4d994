//! The request body of `POST /v1/responses`.

use protocol::WireError;
use protocol::infer::{Input, InvalidInput, OutputFormat, ToolChoice};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::tools::Offer;
use super::{Echo, ReasoningEcho, ResponseRequest, TextEcho};
use crate::catalog;
use crate::class;
use crate::job::Job;
use crate::json_body::{invalid, is_empty, missing, refuse_unless, unsupported};
use crate::openai::request::{Count, of_schema, reasoning_options};
use crate::responses::item::{self, ItemsOrText};

/// The value of `include` that asks for log-probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";
/// The limits of `metadata`, as in OpenAI's API: pairs, and characters of a key and of a value.
const METADATA_MAX: (usize, usize, usize) = (16, 64, 512);

/// A request for a response. Unknown fields are ignored. Known fields of OpenAI's API that are not supported are
/// refused with `unsupported_parameter`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ResponseRequestBody {
    /// `name[@MAJOR.MINOR][:adapter]`. Without a version it is the newest.
    #[schema(value_type = String)]
    model: Option<String>,
    #[schema(value_type = ItemsOrText)]
    input: Option<ItemsOrText>,
    /// Instructions before the conversation.
    instructions: Option<String>,
    /// Maximum number of tokens to generate. Without it, the answer may fill the context.
    #[schema(value_type = Option<u32>, minimum = 1)]
    max_output_tokens: Option<Count>,
    /// Has no effect, since it limits tools that OpenAI runs.
    #[schema(value_type = Option<u32>)]
    max_tool_calls: Option<Count>,
    /// Sampling temperature. The default is the model's.
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities sum to this.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Number of most likely tokens to return at each position, if `include` asks for log-probabilities.
    #[schema(value_type = Option<u32>, maximum = 20)]
    top_logprobs: Option<Count>,
    text: Option<TextOptions>,
    reasoning: Option<ReasoningOptions>,
    /// Tools of the types `function`, `custom` and `namespace`. Others are left out.
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
    /// `auto`, `none`, `required`, a function or custom tool, or `allowed_tools`.
    tool_choice: Option<Value>,
    /// If false, the answer ends after its first call. The default is true, or false if `tool_choice` is `required`.
    parallel_tool_calls: Option<bool>,
    /// Up to 16 texts that the response repeats.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    /// The response repeats it.
    user: Option<String>,
    /// The response repeats it.
    safety_identifier: Option<String>,
    /// The response repeats it. Requests with the same beginning share a cache in any case.
    prompt_cache_key: Option<String>,
    /// How urgent the request is: `priority`, `default` (also `auto`), or `flex` for one that may wait.
    service_tier: Option<String>,
    /// Refused unless it is `disabled`.
    truncation: Option<String>,
    /// `message.output_text.logprobs` adds log-probabilities. Other values have no effect.
    include: Option<Vec<String>>,
    /// Whether to stream the answer as server-sent events.
    #[schema(default = false)]
    stream: Option<bool>,
    /// Allowed with `stream` only. It has no effect, since events have no padding.
    #[schema(value_type = Option<Object>)]
    stream_options: Option<Map<String, Value>>,
    /// Whether the response is stored, encrypted and for 24 hours by default.
    #[schema(default = true)]
    store: Option<bool>,
    /// Whether the response is generated without the client, who asks for it later. It must be stored.
    #[schema(default = false)]
    background: Option<bool>,
    /// A stored response whose conversation goes on.
    previous_response_id: Option<String>,
    /// Refused unless it is empty.
    conversation: Option<Value>,
    /// Refused unless it is empty.
    prompt: Option<Value>,
}

/// Format and length of the answer.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[schema(as = ResponseTextOptions)]
struct TextOptions {
    format: Option<TextFormat>,
    /// `low`, `medium` or `high`. It has no effect.
    verbosity: Option<String>,
}

/// Format that the answer must have.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = ResponseTextFormat)]
struct TextFormat {
    /// `text`, `json_object` or `json_schema`.
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    description: Option<String>,
    /// Schema of the answer, with `json_schema`.
    #[schema(value_type = Option<Object>)]
    schema: Option<Value>,
    /// Whether to refuse a schema that cannot be enforced completely. Otherwise unsupported parts are ignored.
    strict: Option<bool>,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[schema(as = ResponseReasoningOptions)]
struct ReasoningOptions {
    /// How long a model reasons that can: `none`, `minimal`, `low`, `medium`, `high` or `xhigh`.
    effort: Option<String>,
    /// Has no effect: the whole reasoning is returned.
    summary: Option<String>,
}

impl ResponseRequestBody {
    pub(super) fn request(mut self) -> Result<ResponseRequest, WireError> {
        self.check_supported()?;
        let (model, name) = catalog::parse_named(self.model.as_deref())?;
        let items = self.input.take().ok_or_else(|| missing("input"))?.into_items();
        let messages = item::messages(self.instructions.as_deref(), &items)?;
        let offered = self.tools.take().unwrap_or_default();
        let Offer { tools, names, choice } = Offer::read(&offered, self.tool_choice.as_ref())?;
        let one_call = self.parallel_tool_calls.map_or(choice == ToolChoice::Required, |several| !several);
        let effort = self.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_deref());
        let effort = effort.map(|effort| reasoning_options(effort, "reasoning.effort")).transpose()?;
        let input = Input {
            messages: Some(messages),
            max_tokens: self.max_output_tokens.map(|count| count.0),
            temperature: self.temperature,
            top_p: self.top_p,
            logprobs: self.logprobs()?,
            tools,
            tool_choice: choice,
            one_call,
            format: self.format()?,
            template_options: effort.unwrap_or_default(),
            ..Input::default()
        };
        input.check().map_err(own_name)?;
        let class = self.service_tier.as_deref().map(class::of_tier).transpose()?.flatten();
        let stream = self.stream.unwrap_or(false);
        let (store, background) = (self.store.unwrap_or(true), self.background.unwrap_or(false));
        let previous_response_id = self.previous_response_id.clone();
        let echo = self.echo(offered, !one_call)?;
        let job = Job { class, ..Job::new(model, input) };
        Ok(ResponseRequest { job, model: name, stream, store, background, previous_response_id, echo, names, items })
    }

    fn check_supported(&self) -> Result<(), WireError> {
        if self.max_output_tokens.is_some_and(|count| count.0 == 0) {
            return Err(invalid("max_output_tokens", "must be at least 1"));
        }
        if self.stream_options.is_some() && !self.stream.unwrap_or(false) {
            return Err(invalid("stream_options", "is only allowed when stream is true"));
        }
        if self.background == Some(true) && self.store == Some(false) {
            return Err(invalid("background", "needs store, since its client reads the response later"));
        }
        refuse_unless(self.truncation.as_deref().is_none_or(|truncation| truncation == "disabled"), "truncation")?;
        refuse_unless(self.conversation.as_ref().is_none_or(is_empty), "conversation")?;
        refuse_unless(self.prompt.as_ref().is_none_or(is_empty), "prompt")
    }

    /// Returns how many of the most likely tokens are requested at each position, if any log-probabilities are.
    fn logprobs(&self) -> Result<Option<u32>, WireError> {
        let are_included = self.include.iter().flatten().any(|value| value == LOGPROBS);
        match (are_included, self.top_logprobs) {
            (true, top) => Ok(Some(top.map_or(0, |count| count.0))),
            (false, None | Some(Count(0))) => Ok(None),
            (false, Some(_)) => Err(invalid("top_logprobs", &format!("needs {LOGPROBS:?} in include"))),
        }
    }

    fn format(&self) -> Result<OutputFormat, WireError> {
        let Some(format) = self.text.as_ref().and_then(|text| text.format.as_ref()) else {
            return Ok(OutputFormat::Text);
        };
        match &*format.kind {
            "text" => Ok(OutputFormat::Text),
            "json_object" => Ok(OutputFormat::Json),
            "json_schema" => {
                let schema = format.schema.clone().ok_or_else(|| missing("text.format.schema"))?;
                Ok(of_schema(schema, format.strict))
            }
            _ => Err(unsupported("text.format.type")),
        }
    }

    /// Returns what the response repeats of the request.
    fn echo(self, tools: Vec<Value>, parallel_tool_calls: bool) -> Result<Echo, WireError> {
        let metadata = self.metadata.unwrap_or_default();
        check_metadata(&metadata)?;
        let text = self.text.unwrap_or_default();
        let verbosity = text.verbosity.unwrap_or_else(|| "medium".to_owned());
        if !["low", "medium", "high"].contains(&&*verbosity) {
            return Err(invalid("text.verbosity", "must be low, medium or high"));
        }
        let reasoning = self.reasoning.unwrap_or_default();
        Ok(Echo {
            background: self.background.unwrap_or(false),
            instructions: self.instructions,
            max_output_tokens: self.max_output_tokens.map(|count| count.0),
            max_tool_calls: self.max_tool_calls.map(|count| count.0),
            metadata,
            parallel_tool_calls,
            previous_response_id: self.previous_response_id,
            prompt_cache_key: self.prompt_cache_key,
            reasoning: ReasoningEcho { effort: reasoning.effort, summary: reasoning.summary },
            safety_identifier: self.safety_identifier,
            service_tier: String::new(),
            store: self.store.unwrap_or(true),
            temperature: self.temperature,
            text: TextEcho { format: repeated(text.format), verbosity: Some(verbosity) },
            tool_choice: self.tool_choice.filter(|choice| !choice.is_null()).unwrap_or_else(|| "auto".into()),
            tools,
            top_logprobs: self.top_logprobs.map_or(0, |count| count.0),
            top_p: self.top_p,
            truncation: "disabled".to_owned(),
            user: self.user,
        })
    }
}

/// Names a field of a job as this API does.
fn own_name(invalid: InvalidInput) -> WireError {
    let param = match invalid.param {
        "messages" => "input",
        "max_tokens" => "max_output_tokens",
        "logprobs" => "top_logprobs",
        "response_format" => "text.format",
        other => other,
    };
    InvalidInput { param, ..invalid }.into()
}

fn check_metadata(metadata: &Map<String, Value>) -> Result<(), WireError> {
    let (pairs, key, value) = METADATA_MAX;
    let is_short = |text: &Value| text.as_str().is_some_and(|text| text.chars().count() <= value);
    let is_good = metadata.iter().all(|(name, text)| name.chars().count() <= key && is_short(text));
    if metadata.len() <= pairs && is_good {
        return Ok(());
    }
    let what = format!("may have {pairs} texts of {value} characters, with keys of {key} characters");
    Err(invalid("metadata", &what))
}

fn repeated(format: Option<TextFormat>) -> Value {
    let Some(TextFormat { kind, name, description, schema, strict }) = format else { return json!({ "type": "text" }) };
    let mut fields = Map::from_iter([("type".to_owned(), kind.into())]);
    let optional = [
        ("name", name.map(Value::from)),
        ("description", description.map(Value::from)),
        ("schema", schema),
        ("strict", strict.map(Value::from)),
    ];
    fields.extend(optional.into_iter().filter_map(|(field, value)| Some((field.to_owned(), value?))));
    fields.into()
}

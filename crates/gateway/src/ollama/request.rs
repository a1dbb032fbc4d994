//! Parses the bodies of Ollama requests into jobs. Pure functions that never panic, whatever the input.
//!
//! Unknown fields and options are ignored, as Ollama ignores them.

mod message;

use std::borrow::Cow;

use protocol::WireError;
use protocol::infer::{Input, Message, OutputFormat, Role};
use protocol::keep_alive::KeepAlive;
use protocol::model::ModelRef;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::openapi::schema::Type;
use utoipa::openapi::{ObjectBuilder, OneOfBuilder, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::Endpoint;
use crate::catalog;
use crate::job::Job;
use crate::json_body::{invalid, is_empty, missing, read, refuse_unless, renamed};
use crate::openai::request::{OfferedTool, Stop, Texts, tools};
use message::OllamaMessage;

/// A parsed request for generated text.
#[derive(Debug, Clone, PartialEq)]
pub struct OllamaGeneration {
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
    /// Whether to stream the answer.
    pub stream: bool,
    /// Whether the request has no prompt: it loads the model, or unloads it, and wants no answer.
    pub only_loads: bool,
}

/// A parsed request for embedding vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct OllamaVectors {
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
}

/// A parsed request about one model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NamedModel {
    pub(crate) model: ModelRef,
    /// Its name as the client wrote it.
    pub(crate) name: String,
    /// Whether to stream the answer, where it is one.
    pub(crate) stream: bool,
}

/// The body of `POST /api/chat` and `POST /api/generate`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct OllamaRequest {
    /// `name[@MAJOR.MINOR][:adapter]`, or with `:latest`, which means the same as nothing.
    #[schema(value_type = String)]
    model: Option<String>,
    /// In `/api/chat`, the conversation so far. Without messages, the model is only loaded.
    messages: Option<Vec<OllamaMessage>>,
    /// In `/api/chat`, functions that the model may call.
    #[schema(max_items = 128)]
    tools: Option<Vec<OfferedTool>>,
    /// In `/api/generate`, the text to answer. Without a text, the model is only loaded.
    prompt: Option<String>,
    /// In `/api/generate`, text after the answer. The model fills in what is between. Not every model can.
    suffix: Option<String>,
    /// In `/api/generate`, instructions to the model.
    system: Option<String>,
    /// In `/api/generate`, whether to continue the prompt as it is, without the model's chat template.
    raw: Option<bool>,
    /// `json`, or the JSON schema that the answer must follow.
    format: Option<Format>,
    /// Settings of the sampler. Those that are not listed here have no effect.
    options: Option<Options>,
    /// Whether to stream the answer, one JSON object per line.
    #[schema(default = true)]
    stream: Option<bool>,
    /// Whether a model reasons that can, or how long: `low`, `medium` or `high`.
    think: Option<Think>,
    /// How long the model stays in memory without work after this request.
    #[schema(value_type = Option<KeepAliveTime>)]
    keep_alive: Option<KeepAlive>,
    /// Returns the log-probability of each token.
    logprobs: Option<bool>,
    /// Number of most likely tokens to return at each position, if `logprobs` is true.
    #[schema(maximum = 20)]
    top_logprobs: Option<u32>,
    /// Refused unless it is empty: models here take texts alone.
    images: Option<Value>,
    /// Refused unless it is empty. Send the conversation to `/api/chat`.
    context: Option<Value>,
    /// Refused unless it is empty. A model has its own.
    template: Option<String>,
}

/// The body of `POST /api/embed`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct OllamaEmbedRequest {
    /// Name of the model, written as in `/api/chat`.
    #[schema(value_type = String)]
    model: Option<String>,
    /// At most 2048 texts.
    #[schema(value_type = Texts)]
    input: Option<Texts>,
    /// Refused unless it is the length of the model's vectors.
    #[schema(minimum = 1)]
    dimensions: Option<u32>,
    /// How long the model stays in memory without work after this request.
    #[schema(value_type = Option<KeepAliveTime>)]
    keep_alive: Option<KeepAlive>,
}

/// The body of `POST /api/embeddings`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct OllamaEmbeddingRequest {
    /// Name of the model, written as in `/api/chat`.
    #[schema(value_type = String)]
    model: Option<String>,
    /// The text to make a vector of.
    #[schema(value_type = String)]
    prompt: Option<String>,
    /// How long the model stays in memory without work after this request.
    #[schema(value_type = Option<KeepAliveTime>)]
    keep_alive: Option<KeepAlive>,
}

/// The body of a request about one model.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct OllamaModelRequest {
    /// Name of the model, written as in `/api/chat`.
    #[schema(value_type = String)]
    model: Option<String>,
    /// The older name of `model`.
    name: Option<String>,
    /// Whether to stream the answer, where it is one.
    #[schema(default = true)]
    stream: Option<bool>,
}

/// Settings of the sampler.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[schema(as = OllamaOptions)]
struct Options {
    /// Maximum number of tokens to generate; -1 or -2 for as many as fit.
    #[schema(minimum = -2)]
    num_predict: Option<i64>,
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    /// Keeps this many of the most likely tokens; 0 and less keep all.
    top_k: Option<i64>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    #[schema(exclusive_minimum = 0, maximum = 2)]
    repeat_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Seed of the sampler; -1 for a different one each time.
    seed: Option<i64>,
    /// Stop sequences, at most 16.
    stop: Option<Stop>,
}

/// Whether a model reasons, or how long.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = OllamaThink)]
#[serde(untagged, expecting = "expected true, false, low, medium or high")]
enum Think {
    Switch(bool),
    Effort(Effort),
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[schema(as = OllamaEffort)]
#[serde(rename_all = "lowercase")]
enum Effort {
    Low,
    Medium,
    High,
}

/// A format that an answer must have.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected \"json\" or a JSON schema")]
enum Format {
    Named(FormatName),
    Schema(Map<String, Value>),
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum FormatName {
    #[serde(rename = "json")]
    Json,
    #[serde(rename = "")]
    Text,
}

impl PartialSchema for Format {
    fn schema() -> RefOr<Schema> {
        let name = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["json", ""]));
        OneOfBuilder::new().item(name).item(ObjectBuilder::new().schema_type(Type::Object)).into()
    }
}

impl ToSchema for Format {
    fn name() -> Cow<'static, str> {
        "OllamaFormat".into()
    }
}

/// Describes [`KeepAlive`] in the API's document.
enum KeepAliveTime {}

impl PartialSchema for KeepAliveTime {
    fn schema() -> RefOr<Schema> {
        const TIME: &str = r"^-?(\d+(\.\d+)?(ms|s|m|h))+$";
        let description = "Seconds, or a time such as `5m`; -1 for ever, and 0 for not at all.";
        let text = ObjectBuilder::new().schema_type(Type::String).pattern(Some(TIME));
        let seconds = ObjectBuilder::new().schema_type(Type::Number);
        OneOfBuilder::new().item(seconds).item(text).description(Some(description)).into()
    }
}

impl ToSchema for KeepAliveTime {
    fn name() -> Cow<'static, str> {
        "OllamaKeepAlive".into()
    }
}

/// Parses the body of `POST /api/chat`.
pub fn parse_ollama_chat(bytes: &[u8]) -> Result<OllamaGeneration, WireError> {
    generation(bytes, Endpoint::Chat)
}

/// Parses the body of `POST /api/generate`.
pub fn parse_ollama_generate(bytes: &[u8]) -> Result<OllamaGeneration, WireError> {
    generation(bytes, Endpoint::Generate)
}

/// Parses the body of `POST /api/embed`.
pub fn parse_ollama_embed(bytes: &[u8]) -> Result<OllamaVectors, WireError> {
    let OllamaEmbedRequest { model, input, dimensions, keep_alive } = read(bytes)?;
    let texts = input.ok_or_else(|| missing("input"))?.0;
    vectors(model.as_deref(), Input { embed: Some(texts), dimensions, ..Input::default() }, keep_alive, "input")
}

/// Parses the body of `POST /api/embeddings`.
pub fn parse_ollama_embedding(bytes: &[u8]) -> Result<OllamaVectors, WireError> {
    let OllamaEmbeddingRequest { model, prompt, keep_alive } = read(bytes)?;
    let text = prompt.ok_or_else(|| missing("prompt"))?;
    let input = Input { embed: Some(vec![protocol::infer::EmbedInput::Text(text)]), ..Input::default() };
    vectors(model.as_deref(), input, keep_alive, "prompt")
}

/// Parses a request about one model.
pub(crate) fn parse_model(bytes: &[u8]) -> Result<NamedModel, WireError> {
    let OllamaModelRequest { model, name, stream } = read(bytes)?;
    let (model, name) = named(model.or(name).as_deref())?;
    Ok(NamedModel { model, name, stream: stream.unwrap_or(true) })
}

/// Parses a model's name, which is required. Ollama's clients add `:latest` to names without a tag.
fn named(name: Option<&str>) -> Result<(ModelRef, String), WireError> {
    let name = name.unwrap_or_default();
    let (model, _) = catalog::parse_named(Some(name.strip_suffix(":latest").unwrap_or(name)))?;
    Ok((model, name.to_owned()))
}

fn vectors(
    model: Option<&str>,
    input: Input,
    keep_alive: Option<KeepAlive>,
    param: &str,
) -> Result<OllamaVectors, WireError> {
    let (model, name) = named(model)?;
    let input = Input { keep_alive_secs: keep_alive.map(|KeepAlive(secs)| secs), ..input };
    input.check().map_err(|problem| renamed(problem.into(), "embed", param))?;
    Ok(OllamaVectors { job: Job::new(model, input), model: name })
}

fn generation(bytes: &[u8], endpoint: Endpoint) -> Result<OllamaGeneration, WireError> {
    let mut request: OllamaRequest = read(bytes)?;
    let (model, name) = named(request.model.as_deref())?;
    request.check_supported()?;
    let (stream, own) = (request.stream.unwrap_or(true), request.own_input(endpoint)?);
    let only_loads = own.is_none();
    let input = request.settings(own.unwrap_or_else(no_prompt))?;
    input.check()?;
    Ok(OllamaGeneration { job: Job::new(model, input), model: name, stream, only_loads })
}

/// Returns the input of a job that only loads its model: its tokens are counted.
fn no_prompt() -> Input {
    Input { prompt: Some(" ".to_owned()), count_only: true, ..Input::default() }
}

impl OllamaRequest {
    fn check_supported(&self) -> Result<(), WireError> {
        let is_none = |value: &Option<Value>| value.as_ref().is_none_or(is_empty);
        if !is_none(&self.images) {
            return Err(message::no_images("images"));
        }
        refuse_unless(is_none(&self.context), "context")?;
        refuse_unless(self.template.as_ref().is_none_or(String::is_empty), "template")
    }

    /// Converts the fields that only one endpoint has. Returns `None` if there is nothing to answer.
    fn own_input(&mut self, endpoint: Endpoint) -> Result<Option<Input>, WireError> {
        match endpoint {
            Endpoint::Chat => self.conversation(),
            Endpoint::Generate => Ok(self.text()),
        }
    }

    fn conversation(&mut self) -> Result<Option<Input>, WireError> {
        let messages = self.messages.take().unwrap_or_default();
        if messages.is_empty() {
            return Ok(None);
        }
        let tools = tools(self.tools.take().unwrap_or_default())?;
        let messages = Some(message::convert(messages)?);
        Ok(Some(Input { messages, tools, template_options: self.template_options(), ..Input::default() }))
    }

    fn text(&mut self) -> Option<Input> {
        let prompt = self.prompt.take().filter(|prompt| !prompt.is_empty())?;
        let suffix = self.suffix.take().filter(|suffix| !suffix.is_empty());
        if suffix.is_some() || self.raw.unwrap_or(false) {
            return Some(Input { prompt: Some(prompt), suffix, ..Input::default() });
        }
        let system = self.system.take().filter(|system| !system.is_empty());
        let system = system.map(|system| Message::new(Role::System, system));
        let messages = system.into_iter().chain([Message::new(Role::User, prompt)]).collect();
        Some(Input { messages: Some(messages), template_options: self.template_options(), ..Input::default() })
    }

    /// Returns the variables for the chat template. Some templates know an effort, others can only switch thinking on
    /// or off.
    fn template_options(&self) -> Map<String, Value> {
        let options = match &self.think {
            None => json!({}),
            Some(Think::Switch(true)) => json!({ "enable_thinking": true }),
            Some(Think::Switch(false)) => json!({ "enable_thinking": false, "reasoning_effort": "none" }),
            Some(Think::Effort(effort)) => json!({ "enable_thinking": true, "reasoning_effort": effort }),
        };
        options.as_object().cloned().unwrap_or_default()
    }

    /// Adds the settings of both endpoints.
    fn settings(self, own: Input) -> Result<Input, WireError> {
        let options = self.options.unwrap_or_default();
        let logprobs = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => return Err(invalid("top_logprobs", "is only allowed when logprobs is true")),
        };
        Ok(Input {
            format: self.format.map(Format::convert).unwrap_or_default(),
            max_tokens: options.token_limit()?,
            logprobs: logprobs.filter(|_| !own.count_only),
            temperature: options.temperature,
            top_k: options.top_k.map(|count| u32::try_from(count.max(0)).unwrap_or(u32::MAX)),
            top_p: options.top_p,
            min_p: options.min_p,
            repetition_penalty: options.repeat_penalty,
            presence_penalty: options.presence_penalty,
            frequency_penalty: options.frequency_penalty,
            seed: options.seed.filter(|seed| *seed != -1).map(|seed| seed as u64),
            stop: options.stop.map(|stop| stop.0).unwrap_or_default(),
            keep_alive_secs: self.keep_alive.map(|KeepAlive(secs)| secs),
            ..own
        })
    }
}

impl Options {
    fn token_limit(&self) -> Result<Option<u32>, WireError> {
        match self.num_predict {
            None | Some(-2 | -1) => Ok(None),
            Some(count) => match u32::try_from(count) {
                Ok(count) if count > 0 => Ok(Some(count)),
                _ => Err(invalid("options.num_predict", "must be at least 1, or -1 for as many as fit")),
            },
        }
    }
}

impl Format {
    fn convert(self) -> OutputFormat {
        match self {
            Self::Named(FormatName::Text) => OutputFormat::Text,
            Self::Named(FormatName::Json) => OutputFormat::Json,
            Self::Schema(schema) if schema.is_empty() => OutputFormat::Text,
            Self::Schema(mut schema) => {
                // Ollama leaves out what its grammars cannot say.
                schema.insert("x-guidance".into(), json!({ "lenient": true }));
                OutputFormat::JsonSchema(Value::Object(schema))
            }
        }
    }
}

#[cfg(test)]
mod tests;

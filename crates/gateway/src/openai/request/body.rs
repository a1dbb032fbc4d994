//! The request body of OpenAI's chat and text completions, which share most fields.

use std::collections::BTreeMap;
use std::fmt;

use protocol::AdapterName;
use protocol::WireError;
use protocol::infer::{Input, OutputFormat, Tool, ToolChoice};
use protocol::keep_alive::KeepAlive;
use protocol::model::ModelRef;
use serde::{Deserialize, Deserializer, de};
use serde_json::{Map, Value};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::format::{self, ResponseFormat, StructuredOutputs};
use super::message::{self, ChatMessage, Prediction};
use super::texts::{Stop, Texts};
use super::tools::{OfferedFunction, OfferedTool, function_call, functions, tool_choice, tools};
use super::{COMPLETION_TOKENS, Generation};
use crate::catalog;
use crate::class;
use crate::job::Job;
use crate::json_body::{invalid, is_empty, missing, refuse_unless};
use crate::published;

/// Fields that only text completions have.
pub(super) const TEXTS_ALONE: [&str; 3] = ["prompt", "suffix", "echo"];
/// Fields that only chat completions have.
pub(super) const CHATS_ALONE: [&str; 12] = [
    "messages",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "prediction",
    "reasoning_effort",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
];

/// The body of `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct ChatCompletionRequest(pub(super) Body);

/// The body of `POST /v1/completions`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct CompletionRequest(pub(super) Body);

impl PartialSchema for ChatCompletionRequest {
    fn schema() -> RefOr<Schema> {
        let description = "A conversation to answer. Unknown fields are ignored. Known fields of OpenAI's API that are \
                           not supported are refused with `unsupported_parameter`.";
        Body::schema_without(&TEXTS_ALONE, description)
    }
}

impl ToSchema for ChatCompletionRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Body::schemas(schemas);
    }
}

impl PartialSchema for CompletionRequest {
    fn schema() -> RefOr<Schema> {
        Body::schema_without(&CHATS_ALONE, "A text to continue.")
    }
}

impl ToSchema for CompletionRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Body::schemas(schemas);
    }
}

/// The fields of both endpoints. They are in one type, because `flatten` would read everything twice.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Body {
    /// `name[@MAJOR.MINOR][:adapter]`. Without a version it is the newest.
    #[schema(value_type = String)]
    model: Option<String>,
    /// The conversation so far.
    #[schema(value_type = Vec<ChatMessage>, min_items = 1)]
    pub(super) messages: Option<Vec<ChatMessage>>,
    /// A text or its tokens, or an array of them. Several are answered independently, with at most 128 answers in all.
    #[schema(value_type = Texts)]
    pub(super) prompt: Option<Texts>,
    /// Adapter of the model, if `model` does not name one. Not in OpenAI's API.
    #[schema(value_type = Option<published::AdapterName>)]
    adapter: Option<AdapterName>,
    /// Maximum number of tokens to generate; -1 for as many as fit. Without this and `max_tokens`, a chat's answer may
    /// fill the context.
    #[schema(value_type = Option<i64>, minimum = -1)]
    max_completion_tokens: Option<MaxTokens>,
    /// The older name of `max_completion_tokens`, and the only one in OpenAI's text completions. The default of text
    /// completions is 16. 0 generates nothing and is allowed in text completions with `echo`.
    #[schema(value_type = Option<i64>, minimum = -1)]
    max_tokens: Option<MaxTokens>,
    /// Whether to stream the answer as server-sent events.
    #[schema(default = false)]
    stream: Option<bool>,
    /// Allowed with `stream` only.
    stream_options: Option<StreamOptions>,
    /// Number of answers to each prompt.
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 16, default = 1)]
    n: Option<Count>,
    /// Sampling temperature. 0 chooses the most likely token; 1 leaves the distribution unchanged. The defaults of
    /// `temperature`, `top_p`, `top_k` and `min_p` are those in the model's file (`general.sampling.…` in a GGUF), or
    /// else llama.cpp's: 0.8, 0.95, 40 and 0.05.
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities sum to this.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Keeps this many of the most likely tokens; -1 or 0 keeps all. Not in OpenAI's API.
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    /// Keeps tokens whose probability is at least this fraction of the highest. Not in OpenAI's API.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// Factor by which tokens of the prompt and the answer become less likely. Not in OpenAI's API.
    #[schema(exclusive_minimum = 0, maximum = 2)]
    repetition_penalty: Option<f32>,
    /// Subtracted from the logit of each token that occurs in the answer.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    /// Subtracted from the logit of a token for each time that it occurs in the answer.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Added to the logits of tokens, by token id.
    logit_bias: Option<BTreeMap<String, f32>>,
    /// Returns the log-probability of each token. In chat completions this is true or false, together with
    /// `top_logprobs`. In text completions it is the number of most likely tokens to return at each position, at most
    /// 20.
    #[schema(inline)]
    logprobs: Option<Logprobs>,
    /// Number of most likely tokens to return at each position, if `logprobs` is true.
    #[schema(value_type = Option<u32>, maximum = 20)]
    top_logprobs: Option<Count>,
    /// Seed of the sampler. The same seed draws the same tokens from the same logits.
    #[serde(default, deserialize_with = "seed")]
    #[schema(value_type = Option<i64>)]
    seed: Option<u64>,
    /// Stop sequences, at most 16.
    stop: Option<Stop>,
    /// Continues after the end-of-turn token. It has no effect on an answer with a constraint. Not in OpenAI's API.
    ignore_eos: Option<bool>,
    /// Format that the answer must have.
    response_format: Option<ResponseFormat>,
    /// The format as vLLM's clients send it. Not in OpenAI's API.
    structured_outputs: Option<StructuredOutputs>,
    /// The older name of `structured_outputs.json`.
    guided_json: Option<Value>,
    /// The older name of `structured_outputs.regex`.
    guided_regex: Option<String>,
    /// The older name of `structured_outputs.choice`.
    guided_choice: Option<Vec<String>>,
    /// The older name of `structured_outputs.grammar`.
    guided_grammar: Option<String>,
    /// Functions that the model may call.
    #[schema(max_items = 128)]
    tools: Option<Vec<OfferedTool>>,
    /// `auto`, `none`, `required`, or `{"type":"function","function":{"name":…}}`.
    tool_choice: Option<Value>,
    /// If false, the answer ends after its first function call. The default is true, or false if `tool_choice` is
    /// `required`.
    parallel_tool_calls: Option<bool>,
    /// The older form of `tools`, and not allowed together with it. The answer calls at most one function, in
    /// `function_call`.
    #[schema(max_items = 128)]
    functions: Option<Vec<OfferedFunction>>,
    /// The older form of `tool_choice`: `auto`, `none`, or `{"name":…}`.
    function_call: Option<Value>,
    /// Predicted answer. Generation is faster where the prediction is right.
    prediction: Option<Prediction>,
    /// How long a model reasons that can: `none`, `minimal`, `low`, `medium`, `high` or `xhigh`.
    reasoning_effort: Option<String>,
    /// Variables for the model's chat template. Not in OpenAI's API.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Continues the last message, which must be an assistant's. The answer contains only the continuation. Not in
    /// OpenAI's API.
    continue_final_message: Option<bool>,
    /// Must not be true if `continue_final_message` is true. Not in OpenAI's API.
    add_generation_prompt: Option<bool>,
    /// Evaluates the request alone instead of in a batch. This is slower, and the same build of the engine repeats the
    /// answer bit for bit. Not in OpenAI's API.
    deterministic: Option<bool>,
    /// How long the model stays in memory without work after this request: seconds, or a time such as `5m`; -1 for
    /// ever, and 0 for not at all. Workers may limit it. From Ollama's API, not in OpenAI's.
    #[schema(value_type = Option<Value>)]
    keep_alive: Option<KeepAlive>,
    /// How urgent the request is: `priority`, `default` (also `auto`), or `flex` for one that may wait. The response
    /// names the tier that was used.
    service_tier: Option<String>,
    /// Returns the prompt before the answer, and its log-probabilities before those of the answer.
    #[schema(default = false)]
    echo: Option<bool>,
    /// Text after the answer. The model fills in the text between the prompt and this suffix. Not every model can.
    suffix: Option<String>,
    // Fields that are not supported: refused unless their value has no effect.
    /// Refused unless it is equal to `n`.
    #[schema(value_type = Option<u32>)]
    best_of: Option<Count>,
    /// Refused unless it is 0.
    #[schema(value_type = Option<u32>)]
    min_tokens: Option<Count>,
    /// Refused if it names anything but `text`.
    modalities: Option<Value>,
    /// Refused unless it is empty.
    audio: Option<Value>,
    /// Refused unless it is empty.
    web_search_options: Option<Value>,
    /// Refused unless it is empty. Use `stop`.
    stop_token_ids: Option<Value>,
    /// Refused unless it is empty. A model has its own.
    chat_template: Option<Value>,
}

/// What the model may call, and how.
struct Calls {
    tools: Vec<Tool>,
    tool_choice: ToolChoice,
    one_call: bool,
}

#[derive(Debug, Deserialize, ToSchema)]
struct StreamOptions {
    /// Whether a chunk with the usage comes before `[DONE]`.
    include_usage: Option<bool>,
}

/// `logprobs`: a switch for chats, a count for texts.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected true, false or a count")]
enum Logprobs {
    Switch(bool),
    Count(u32),
}

/// A whole number. Some clients write it as a float such as `1.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count(pub(crate) u32);

/// Maximum tokens of an answer: a count, or -1 for as many as fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MaxTokens {
    Tokens(u32),
    Unlimited,
}

impl MaxTokens {
    fn tokens(self) -> Option<u32> {
        match self {
            Self::Tokens(count) => Some(count),
            Self::Unlimited => None,
        }
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match whole(deserializer)? {
            -1 => Err(de::Error::custom("must not be negative")),
            count => Ok(Self(count as u32)),
        }
    }
}

impl<'de> Deserialize<'de> for MaxTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match whole(deserializer)? {
            -1 => Self::Unlimited,
            count => Self::Tokens(count as u32),
        })
    }
}

/// Parses an unsigned 32-bit integer, or -1.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    struct Whole;

    impl de::Visitor<'_> for Whole {
        type Value = i64;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a whole number")
        }

        fn visit_u64<E: de::Error>(self, value: u64) -> Result<i64, E> {
            u32::try_from(value).map(i64::from).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
        }

        fn visit_i64<E: de::Error>(self, value: i64) -> Result<i64, E> {
            if value == -1 { Ok(value) } else { Err(E::invalid_value(de::Unexpected::Signed(value), &self)) }
        }

        fn visit_f64<E: de::Error>(self, value: f64) -> Result<i64, E> {
            let is_whole = value.fract() == 0.0 && (-1.0..=f64::from(u32::MAX)).contains(&value);
            if is_whole { Ok(value as i64) } else { Err(E::invalid_value(de::Unexpected::Float(value), &self)) }
        }
    }

    deserializer.deserialize_any(Whole)
}

impl Body {
    /// Returns the schema of one endpoint's body, without the fields that only the other endpoint has.
    fn schema_without(theirs: &[&str], description: &str) -> RefOr<Schema> {
        let mut schema = Self::schema();
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            object.description = Some(description.to_owned());
            object.properties.retain(|name, _| !theirs.contains(&name.as_str()));
            object.required.retain(|name| !theirs.contains(&name.as_str()));
        }
        schema
    }

    pub(super) fn model(&self) -> Result<(ModelRef, String), WireError> {
        catalog::parse_named(self.model.as_deref())
    }

    /// Converts the fields that only chat completions have.
    pub(super) fn chat_input(&mut self) -> Result<Input, WireError> {
        let messages = self.messages.take().ok_or_else(|| missing("messages"))?;
        let logprobs = match (self.logprobs, self.top_logprobs) {
            (Some(Logprobs::Switch(true)), top) => Some(top.map_or(0, |count| count.0)),
            (None | Some(Logprobs::Switch(false)), None | Some(Count(0))) => None,
            (None | Some(Logprobs::Switch(false)), Some(_)) => {
                return Err(invalid("top_logprobs", "is only allowed when logprobs is true"));
            }
            (Some(Logprobs::Count(_)), _) => return Err(invalid("logprobs", "must be true or false")),
        };
        refuse_unless(!self.echo.unwrap_or(false), "echo")?;
        refuse_unless(self.suffix.as_ref().is_none_or(String::is_empty), "suffix")?;
        let Calls { tools, tool_choice, one_call } = self.calls()?;
        let continue_last = self.continue_final_message.unwrap_or(false);
        if continue_last && self.add_generation_prompt == Some(true) {
            return Err(invalid("add_generation_prompt", "must be false where continue_final_message is true"));
        }
        Ok(Input {
            messages: Some(message::convert(messages)?),
            max_tokens: self.token_limit()?.and_then(MaxTokens::tokens),
            logprobs,
            tools,
            tool_choice,
            one_call,
            continue_last,
            prediction: self.prediction.take().map(Prediction::text).transpose()?,
            template_options: self.template_options()?,
            ..Input::default()
        })
    }

    /// Returns whether functions are offered in the older form, so that the answer calls them in it too.
    pub(super) fn offers_functions(&self) -> bool {
        self.functions.as_ref().is_some_and(|functions| !functions.is_empty())
    }

    fn calls(&mut self) -> Result<Calls, WireError> {
        let mut tools = tools(self.tools.take().unwrap_or_default())?;
        if self.offers_functions() {
            if !tools.is_empty() {
                return Err(invalid("functions", "is the older form of tools; only one of the two is allowed"));
            }
            tools = functions(self.functions.take().unwrap_or_default())?;
            let tool_choice = function_call(self.function_call.as_ref())?;
            return Ok(Calls { tools, tool_choice, one_call: true });
        }
        self.refuse_function_call()?;
        let tool_choice = tool_choice(self.tool_choice.as_ref())?;
        // A weak model that is forced to call tools may repeat its call endlessly, so several calls must be requested.
        let one_call = match self.parallel_tool_calls {
            Some(several) => !several,
            None => tool_choice == ToolChoice::Required,
        };
        Ok(Calls { tools, tool_choice, one_call })
    }

    /// Refuses a `function_call` without functions to call.
    fn refuse_function_call(&self) -> Result<(), WireError> {
        match function_call(self.function_call.as_ref())? {
            ToolChoice::Function(_) => Err(invalid("function_call", "is only allowed together with functions")),
            _ => Ok(()),
        }
    }

    /// Converts the fields that only text completions have.
    pub(super) fn text_input(&mut self) -> Result<Input, WireError> {
        let prompt = self.prompt.take().ok_or_else(|| missing("prompt"))?.into_prompt()?;
        let logprobs = match self.logprobs {
            None => None,
            // Here 0 has a meaning as well: it requests the log-probability of the chosen token only.
            Some(Logprobs::Count(count)) => Some(count),
            Some(Logprobs::Switch(_)) => return Err(invalid("logprobs", "must be a count")),
        };
        refuse_unless(self.tools.as_ref().is_none_or(Vec::is_empty), "tools")?;
        refuse_unless(!self.offers_functions(), "functions")?;
        self.refuse_function_call()?;
        refuse_unless(self.prediction.is_none(), "prediction")?;
        refuse_unless(self.reasoning_effort.is_none(), "reasoning_effort")?;
        refuse_unless(self.chat_template_kwargs.as_ref().is_none_or(Map::is_empty), "chat_template_kwargs")?;
        refuse_unless(self.top_logprobs.is_none_or(|top| top.0 == 0), "top_logprobs")?;
        refuse_unless(!self.continue_final_message.unwrap_or(false), "continue_final_message")?;
        let max_tokens = self.token_limit()?.unwrap_or(MaxTokens::Tokens(COMPLETION_TOKENS)).tokens();
        let suffix = self.suffix.take().filter(|suffix| !suffix.is_empty());
        Ok(Input { max_tokens, logprobs, echo: self.echo.unwrap_or(false), suffix, ..prompt })
    }

    /// Returns the limit on the answer's tokens, if the request has one.
    fn token_limit(&self) -> Result<Option<MaxTokens>, WireError> {
        let given = [("max_completion_tokens", self.max_completion_tokens), ("max_tokens", self.max_tokens)];
        match given.into_iter().find_map(|(name, limit)| Some((name, limit?))) {
            Some((name, MaxTokens::Tokens(0))) if !self.echo.unwrap_or(false) => {
                Err(invalid(name, "must be at least 1, or -1 for as many as fit"))
            }
            given => Ok(given.map(|(_, limit)| limit)),
        }
    }

    /// Returns the variables for the chat template. Some templates know `reasoning_effort`, others can only switch
    /// thinking on or off.
    fn template_options(&mut self) -> Result<Map<String, Value>, WireError> {
        let mut options = Map::new();
        if let Some(effort) = self.reasoning_effort.take() {
            options = reasoning_options(&effort, "reasoning_effort")?;
        }
        options.extend(self.chat_template_kwargs.take().unwrap_or_default());
        Ok(options)
    }

    fn format(&mut self) -> Result<OutputFormat, WireError> {
        let guided = StructuredOutputs {
            json: self.guided_json.take(),
            regex: self.guided_regex.take(),
            choice: self.guided_choice.take(),
            grammar: self.guided_grammar.take(),
            ..StructuredOutputs::default()
        };
        let formats = [
            self.response_format.take().map(ResponseFormat::convert).transpose()?,
            self.structured_outputs.take().map(|outputs| outputs.convert("structured_outputs.")).transpose()?,
            Some(guided.convert("guided_")?),
        ];
        format::one(formats.into_iter().flatten(), "response_format")
    }

    fn check_supported(&self) -> Result<(), WireError> {
        refuse_unless(self.best_of.is_none_or(|best| best == self.n.unwrap_or(Count(1))), "best_of")?;
        refuse_unless(self.min_tokens.is_none_or(|count| count.0 == 0), "min_tokens")?;
        let only_text =
            |modalities: &Value| modalities.as_array().is_some_and(|all| all.iter().all(|one| one == "text"));
        refuse_unless(self.modalities.as_ref().is_none_or(only_text), "modalities")?;
        for (value, param) in [
            (&self.audio, "audio"),
            (&self.web_search_options, "web_search_options"),
            (&self.stop_token_ids, "stop_token_ids"),
            (&self.chat_template, "chat_template"),
        ] {
            refuse_unless(value.as_ref().is_none_or(is_empty), param)?;
        }
        Ok(())
    }

    /// Builds the job from the shared fields and from `own`, the fields that only one endpoint has.
    pub(super) fn generation(mut self, model: ModelRef, name: String, own: Input) -> Result<Generation, WireError> {
        self.check_supported()?;
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(invalid("stream_options", "is only allowed when stream is true"));
        }
        let top_k = match self.top_k {
            // Other servers with `top_k` take both -1 and 0 for "all".
            None => None,
            Some(-1) => Some(0),
            Some(count) => Some(u32::try_from(count).map_err(|_| invalid("top_k", "must be -1 or a count"))?),
        };
        let format = self.format()?;
        let input = Input {
            adapter: self.adapter,
            format,
            n: self.n.map(|count| count.0),
            temperature: self.temperature,
            top_p: self.top_p,
            top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: biases(self.logit_bias.unwrap_or_default())?,
            seed: self.seed,
            stop: self.stop.map(|stop| stop.0).unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            deterministic: self.deterministic.unwrap_or(false),
            keep_alive_secs: self.keep_alive.map(|KeepAlive(secs)| secs),
            ..own
        };
        input.check()?;
        let include_usage = self.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
        let class = self.service_tier.as_deref().map(class::of_tier).transpose()?;
        let names_tier = class.is_some();
        let job = Job { class: class.flatten(), ..Job::new(model, input) };
        Ok(Generation { job, model: name, stream, include_usage, names_tier, calls_functions: false })
    }
}

/// Returns the variables for the chat template that say how long the model reasons.
pub(crate) fn reasoning_options(effort: &str, param: &str) -> Result<Map<String, Value>, WireError> {
    if !["none", "minimal", "low", "medium", "high", "xhigh"].contains(&effort) {
        return Err(invalid(param, "must be none, minimal, low, medium, high or xhigh"));
    }
    let mut options = Map::new();
    if effort == "none" {
        options.insert("enable_thinking".into(), false.into());
    }
    options.insert("reasoning_effort".into(), effort.into());
    Ok(options)
}

/// Parses the token ids of `logit_bias`, which are strings in JSON.
fn biases(given: BTreeMap<String, f32>) -> Result<BTreeMap<u32, f32>, WireError> {
    let read = |(token, bias): (String, f32)| match token.parse() {
        Ok(token) => Ok((token, bias)),
        Err(_) => {
            Err(invalid("logit_bias", &format!("must have numbers of tokens as names, and {token:?} is not one")))
        }
    };
    given.into_iter().map(read).collect()
}

/// Parses a seed: any 64-bit integer. Negative ones are reinterpreted as unsigned.
fn seed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    struct Seed;

    impl de::Visitor<'_> for Seed {
        type Value = u64;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("an integer of 64 bits")
        }

        fn visit_u64<E>(self, value: u64) -> Result<u64, E> {
            Ok(value)
        }

        fn visit_i64<E>(self, value: i64) -> Result<u64, E> {
            Ok(value as u64)
        }
    }

    struct Optional;

    impl<'de> de::Visitor<'de> for Optional {
        type Value = Option<u64>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            Seed.expecting(formatter)
        }

        fn visit_none<E>(self) -> Result<Option<u64>, E> {
            Ok(None)
        }

        fn visit_unit<E>(self) -> Result<Option<u64>, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<u64>, D::Error> {
            deserializer.deserialize_any(Seed).map(Some)
        }
    }

    deserializer.deserialize_option(Optional)
}

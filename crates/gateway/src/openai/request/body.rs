//! What OpenAI's two endpoints for answers take together.

use std::collections::BTreeMap;
use std::fmt;

use protocol::AdapterName;
use protocol::infer::{Input, OutputFormat, ToolChoice};
use protocol::keep_alive::KeepAlive;
use protocol::model::ModelRef;
use protocol::{ErrorCode, WireError};
use serde::{Deserialize, Deserializer, de};
use serde_json::{Map, Value};

use super::format::{self, ResponseFormat, StructuredOutputs};
use super::message::{ChatMessage, Prediction};
use super::texts::{Stop, Texts};
use super::tools::{OfferedTool, tool_choice, tools};
use super::{COMPLETION_TOKENS, Generation, job};
use crate::catalog;
use crate::json_body::{invalid, is_empty, missing, refuse_unless};

/// One type without `flatten`, which would read everything twice.
#[derive(Debug, Deserialize)]
pub(super) struct Body {
    model: Option<String>,
    pub(super) messages: Option<Vec<ChatMessage>>,
    pub(super) prompt: Option<Texts>,
    adapter: Option<AdapterName>,
    max_completion_tokens: Option<Limit>,
    max_tokens: Option<Limit>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<Count>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    logprobs: Option<Logprobs>,
    top_logprobs: Option<Count>,
    #[serde(default, deserialize_with = "seed")]
    seed: Option<u64>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<StructuredOutputs>,
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
    tools: Option<Vec<OfferedTool>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    prediction: Option<Prediction>,
    reasoning_effort: Option<String>,
    chat_template_kwargs: Option<Map<String, Value>>,
    continue_final_message: Option<bool>,
    add_generation_prompt: Option<bool>,
    deterministic: Option<bool>,
    keep_alive: Option<KeepAlive>,
    echo: Option<bool>,
    suffix: Option<String>,
    // Means something, and is not done here unless it says to change nothing.
    best_of: Option<Count>,
    min_tokens: Option<Count>,
    functions: Option<Value>,
    function_call: Option<Value>,
    modalities: Option<Value>,
    audio: Option<Value>,
    web_search_options: Option<Value>,
    stop_token_ids: Option<Value>,
    chat_template: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// `logprobs`: a switch for chats, a count for texts.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "expected true, false or a count")]
enum Logprobs {
    Switch(bool),
    Count(u32),
}

/// A whole number, which some clients write with a fraction of zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count(u32);

/// The most tokens of an answer: a count, or -1 for as many as fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    Tokens(u32),
    Unlimited,
}

impl Limit {
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

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match whole(deserializer)? {
            -1 => Self::Unlimited,
            count => Self::Tokens(count as u32),
        })
    }
}

/// Reads a whole number of 32 bits, or -1.
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
    pub(super) fn model(&self) -> Result<(ModelRef, String), WireError> {
        named_model(self.model.as_deref())
    }

    /// Reads what only conversations have.
    pub(super) fn chat_input(&mut self) -> Result<Input, WireError> {
        let messages = self.messages.take().ok_or_else(|| missing("messages"))?;
        let messages = messages.into_iter().enumerate().map(|(index, message)| message.convert(index));
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
        let tools = tools(self.tools.take().unwrap_or_default())?;
        let tool_choice = tool_choice(self.tool_choice.as_ref())?;
        // A weak model that must call repeats its call without an end, so several are for those who ask for them.
        let one_call = match self.parallel_tool_calls {
            Some(several) => !several,
            None => tool_choice == ToolChoice::Required,
        };
        let continue_last = self.continue_final_message.unwrap_or(false);
        if continue_last && self.add_generation_prompt == Some(true) {
            return Err(invalid("add_generation_prompt", "must be false where continue_final_message is true"));
        }
        Ok(Input {
            messages: Some(messages.collect::<Result<_, _>>()?),
            max_tokens: self.limit()?.and_then(Limit::tokens),
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

    /// Reads what only texts have.
    pub(super) fn text_input(&mut self) -> Result<Input, WireError> {
        let prompt = self.prompt.take().ok_or_else(|| missing("prompt"))?.into_prompt()?;
        let logprobs = match self.logprobs {
            None => None,
            // Here 0 means something too: the probability of the token chosen.
            Some(Logprobs::Count(count)) => Some(count),
            Some(Logprobs::Switch(_)) => return Err(invalid("logprobs", "must be a count")),
        };
        refuse_unless(self.tools.as_ref().is_none_or(Vec::is_empty), "tools")?;
        refuse_unless(self.prediction.is_none(), "prediction")?;
        refuse_unless(self.reasoning_effort.is_none(), "reasoning_effort")?;
        refuse_unless(self.chat_template_kwargs.as_ref().is_none_or(Map::is_empty), "chat_template_kwargs")?;
        refuse_unless(self.top_logprobs.is_none_or(|top| top.0 == 0), "top_logprobs")?;
        refuse_unless(!self.continue_final_message.unwrap_or(false), "continue_final_message")?;
        let max_tokens = self.limit()?.unwrap_or(Limit::Tokens(COMPLETION_TOKENS)).tokens();
        let suffix = self.suffix.take().filter(|suffix| !suffix.is_empty());
        Ok(Input { max_tokens, logprobs, echo: self.echo.unwrap_or(false), suffix, ..prompt })
    }

    /// Returns the most tokens of the answer, where the request says.
    fn limit(&self) -> Result<Option<Limit>, WireError> {
        let given = [("max_completion_tokens", self.max_completion_tokens), ("max_tokens", self.max_tokens)];
        match given.into_iter().find_map(|(name, limit)| Some((name, limit?))) {
            Some((name, Limit::Tokens(0))) if !self.echo.unwrap_or(false) => {
                Err(invalid(name, "must be at least 1, or -1 for as many as fit"))
            }
            given => Ok(given.map(|(_, limit)| limit)),
        }
    }

    /// Returns what the model's template is told: templates know an effort by the same name, or only how to think
    /// or not to.
    fn template_options(&mut self) -> Result<Map<String, Value>, WireError> {
        let mut options = Map::new();
        if let Some(effort) = self.reasoning_effort.take() {
            if !["none", "minimal", "low", "medium", "high", "xhigh"].contains(&effort.as_str()) {
                return Err(invalid("reasoning_effort", "must be none, minimal, low, medium, high or xhigh"));
            }
            if effort == "none" {
                options.insert("enable_thinking".into(), false.into());
            }
            options.insert("reasoning_effort".into(), effort.into());
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
        let no_call = |choice: &Value| choice == "none" || choice == "auto";
        refuse_unless(self.function_call.as_ref().is_none_or(no_call), "function_call")?;
        let only_text =
            |modalities: &Value| modalities.as_array().is_some_and(|all| all.iter().all(|one| one == "text"));
        refuse_unless(self.modalities.as_ref().is_none_or(only_text), "modalities")?;
        for (value, param) in [
            (&self.functions, "functions"),
            (&self.audio, "audio"),
            (&self.web_search_options, "web_search_options"),
            (&self.stop_token_ids, "stop_token_ids"),
            (&self.chat_template, "chat_template"),
        ] {
            refuse_unless(value.as_ref().is_none_or(is_empty), param)?;
        }
        Ok(())
    }

    /// Makes the job of what both endpoints have, and of what only one has.
    pub(super) fn generation(mut self, model: ModelRef, name: String, own: Input) -> Result<Generation, WireError> {
        self.check_supported()?;
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(invalid("stream_options", "is only allowed when stream is true"));
        }
        let top_k = match self.top_k {
            // Servers that know top_k take -1 and 0 for "all".
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
        Ok(Generation { job: job(model, input), model: name, stream, include_usage })
    }
}

/// Reads the tokens whose logits are biased; JSON has them as texts.
fn biases(told: BTreeMap<String, f32>) -> Result<BTreeMap<u32, f32>, WireError> {
    let read = |(token, bias): (String, f32)| match token.parse() {
        Ok(token) => Ok((token, bias)),
        Err(_) => {
            Err(invalid("logit_bias", &format!("must have numbers of tokens as names, and {token:?} is not one")))
        }
    };
    told.into_iter().map(read).collect()
}

/// Reads a model's name, which has to be there.
pub(super) fn named_model(name: Option<&str>) -> Result<(ModelRef, String), WireError> {
    let name = name.unwrap_or_default();
    if name.is_empty() {
        let message = "model is missing; GET /v1/models lists those that can be named";
        return Err(WireError::new(ErrorCode::MissingModel, message).with_param("model"));
    }
    Ok((catalog::parse_ref(name)?, name.to_owned()))
}

/// Reads a seed: any integer of 64 bits. Negative ones are taken by their bits.
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

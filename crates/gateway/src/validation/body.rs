//! What OpenAI's two endpoints for answers take together.

use std::collections::BTreeMap;
use std::fmt;

use protocol::AdapterName;
use protocol::infer::{Input, OutputFormat};
use protocol::model::ModelRef;
use protocol::{ErrorCode, WireError};
use serde::{Deserialize, Deserializer, de};
use serde_json::{Map, Value};

use super::format::{self, ResponseFormat, StructuredOutputs};
use super::message::{ChatMessage, Prediction};
use super::texts::{Stop, Texts};
use super::tools::{OfferedTool, tool_choice, tools};
use super::{Generation, invalid, is_empty, job, missing, refuse_unless};
use crate::catalog;

/// One type without `flatten`, which would read everything twice.
#[derive(Debug, Deserialize)]
pub(super) struct Body {
    model: Option<String>,
    pub(super) messages: Option<Vec<ChatMessage>>,
    pub(super) prompt: Option<Texts>,
    adapter: Option<AdapterName>,
    max_completion_tokens: Option<u32>,
    max_tokens: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<u32, f32>>,
    logprobs: Option<Logprobs>,
    top_logprobs: Option<u32>,
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
    // Means something, and is not done here unless it says to change nothing.
    best_of: Option<u32>,
    echo: Option<bool>,
    suffix: Option<String>,
    min_tokens: Option<u32>,
    functions: Option<Value>,
    function_call: Option<Value>,
    modalities: Option<Value>,
    audio: Option<Value>,
    verbosity: Option<Value>,
    web_search_options: Option<Value>,
    stop_token_ids: Option<Value>,
    chat_template: Option<Value>,
    continue_final_message: Option<bool>,
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

impl Body {
    pub(super) fn model(&self) -> Result<(ModelRef, String), WireError> {
        named_model(self.model.as_deref())
    }

    /// Reads what only conversations have.
    pub(super) fn chat_input(&mut self) -> Result<Input, WireError> {
        let messages = self.messages.take().ok_or_else(|| missing("messages"))?;
        let messages = messages.into_iter().enumerate().map(|(index, message)| message.convert(index));
        let logprobs = match (self.logprobs, self.top_logprobs) {
            (Some(Logprobs::Switch(true)), top) => Some(top.unwrap_or(0)),
            (None | Some(Logprobs::Switch(false)), None | Some(0)) => None,
            (None | Some(Logprobs::Switch(false)), Some(_)) => {
                return Err(invalid("top_logprobs", "is only allowed when logprobs is true"));
            }
            (Some(Logprobs::Count(_)), _) => return Err(invalid("logprobs", "must be true or false")),
        };
        let tools = tools(self.tools.take().unwrap_or_default())?;
        let tool_choice = tool_choice(self.tool_choice.as_ref())?;
        Ok(Input {
            messages: Some(messages.collect::<Result<_, _>>()?),
            max_tokens: self.max_completion_tokens.or(self.max_tokens),
            logprobs,
            tools,
            tool_choice,
            one_call: self.parallel_tool_calls == Some(false),
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
        refuse_unless(self.top_logprobs.is_none_or(|top| top == 0), "top_logprobs")?;
        Ok(Input { max_tokens: self.max_tokens, logprobs, ..prompt })
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
        refuse_unless(self.best_of.is_none_or(|best| best == self.n.unwrap_or(1)), "best_of")?;
        refuse_unless(!self.echo.unwrap_or(false), "echo")?;
        refuse_unless(self.suffix.as_ref().is_none_or(String::is_empty), "suffix")?;
        refuse_unless(self.min_tokens.is_none_or(|count| count == 0), "min_tokens")?;
        refuse_unless(!self.continue_final_message.unwrap_or(false), "continue_final_message")?;
        let no_call = |choice: &Value| choice == "none" || choice == "auto";
        refuse_unless(self.function_call.as_ref().is_none_or(no_call), "function_call")?;
        let only_text =
            |modalities: &Value| modalities.as_array().is_some_and(|all| all.iter().all(|one| one == "text"));
        refuse_unless(self.modalities.as_ref().is_none_or(only_text), "modalities")?;
        for (value, param) in [
            (&self.functions, "functions"),
            (&self.audio, "audio"),
            (&self.verbosity, "verbosity"),
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
            None | Some(-1 | 0) => None,
            Some(count) => Some(u32::try_from(count).map_err(|_| invalid("top_k", "must be -1 or a count"))?),
        };
        let format = self.format()?;
        let input = Input {
            adapter: self.adapter,
            format,
            n: self.n,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.unwrap_or_default(),
            seed: self.seed,
            stop: self.stop.map(|stop| stop.0).unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            ..own
        };
        input.check()?;
        let include_usage = self.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
        Ok(Generation { job: job(model, input), model: name, stream, include_usage })
    }
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

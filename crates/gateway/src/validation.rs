//! Reads the bodies of requests: OpenAI's JSON and our own, as jobs. Pure functions; bytes never make them panic.
//!
//! Fields that are unknown are passed over. Fields that mean something and are not done here are refused, never
//! silently ignored.

use std::fmt;
use std::time::Duration;

use protocol::codec::decode_within;
use protocol::infer::{InferSubmission, Input, Message, Role};
use protocol::model::ModelRef;
use protocol::{ErrorCode, WireError};
use serde::de::{self, DeserializeOwned};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::catalog;
use crate::gateway::Job;

pub mod submission;

/// The tokens of a text completion that names no limit: OpenAI's default.
const COMPLETION_TOKENS: u32 = 16;

/// A request for an answer, as one of OpenAI's two endpoints takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The job to run.
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
    /// Whether the answer comes piece by piece.
    pub stream: bool,
    /// Whether a streamed answer ends with its usage.
    pub include_usage: bool,
}

/// Reads the body of `POST /v1/chat/completions`.
pub fn parse_chat(bytes: &[u8]) -> Result<Generation, WireError> {
    let mut body: Body = read(bytes)?;
    let (model, name) = body.model()?;
    let messages = body.messages.take().ok_or_else(|| missing("messages"))?;
    let messages = messages.into_iter().enumerate().map(|(index, message)| message.convert(index));
    let messages = messages.collect::<Result<_, _>>()?;
    refuse_unless(body.prompt.is_none(), "prompt")?;
    refuse_unless(body.logprobs.as_ref().is_none_or(|logprobs| logprobs == false), "logprobs")?;
    let max_tokens = body.max_completion_tokens.or(body.max_tokens);
    body.generation(model, name, Input { messages: Some(messages), max_tokens, ..Input::default() })
}

/// Reads the body of `POST /v1/completions`.
pub fn parse_completion(bytes: &[u8]) -> Result<Generation, WireError> {
    let mut body: Body = read(bytes)?;
    let (model, name) = body.model()?;
    let prompt = body.prompt.take().ok_or_else(|| missing("prompt"))?.text()?;
    refuse_unless(body.messages.is_none(), "messages")?;
    // Here 0 means something too: the probability of the token chosen.
    refuse_unless(body.logprobs.is_none(), "logprobs")?;
    let max_tokens = Some(body.max_tokens.unwrap_or(COMPLETION_TOKENS));
    body.generation(model, name, Input { prompt: Some(prompt), max_tokens, ..Input::default() })
}

/// Reads the body of `POST /infer`.
pub fn parse_infer(bytes: &[u8]) -> Result<Job, WireError> {
    let submission: InferSubmission = read(bytes).map_err(native_missing_model)?;
    submission.input.check().map_err(native)?;
    if submission.deadline_ms == Some(0) {
        return Err(invalid("deadlineMs", "must be at least 1"));
    }
    Ok(Job {
        model: ModelRef { name: submission.model_id, version: submission.version, adapter: None },
        input: submission.input,
        tenant_id: submission.tenant_id,
        correlation_id: submission.correlation_id,
        retry_token: submission.retry_token,
        trace_id: submission.trace_id,
        deadline: submission.deadline_ms.map(Duration::from_millis),
    })
}

/// Renames the field at fault from OpenAI's name to ours.
pub(crate) fn native(mut error: WireError) -> WireError {
    error.param = error.param.map(|param| match param.as_str() {
        "model" => "modelId".to_owned(),
        "tenantId" | "input" => param,
        "max_tokens" => "input.maxTokens".to_owned(),
        "top_p" => "input.topP".to_owned(),
        "top_k" => "input.topK".to_owned(),
        "min_p" => "input.minP".to_owned(),
        _ => format!("input.{param}"),
    });
    error
}

fn native_missing_model(error: WireError) -> WireError {
    if error.code == ErrorCode::InvalidValue && error.message.contains("missing field `modelId`") {
        return WireError::new(ErrorCode::MissingModel, "modelId is missing").with_param("modelId");
    }
    error
}

/// Reads a JSON object. The limit on its length was kept while it was received.
fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    // Fields that are passed over are not looked into, so the whole is checked first.
    if let Err(error) = std::str::from_utf8(bytes) {
        return Err(not_json("invalid UTF-8", &bytes[..error.valid_up_to()]));
    }
    // An array would be taken for the fields of an object, in their order.
    let start = bytes.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(bytes.len());
    if bytes.get(start) != Some(&b'{') {
        return Err(not_json("expected an object", &bytes[..start]));
    }
    Ok(decode_within(bytes, usize::MAX)?)
}

/// Says what is wrong right after the bytes that were good.
fn not_json(what: &str, good: &[u8]) -> WireError {
    let line = good.split(|byte| *byte == b'\n').count();
    let column = good.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
    WireError::new(ErrorCode::InvalidJson, format!("not valid JSON: {what} at line {line} column {column}"))
}

fn invalid(param: &str, what: &str) -> WireError {
    WireError::new(ErrorCode::InvalidValue, format!("{param} {what}")).with_param(param)
}

fn missing(param: &str) -> WireError {
    invalid(param, "is missing")
}

fn unsupported(param: impl Into<String>) -> WireError {
    let param = param.into();
    let message = format!("{param} is not supported here; leave it out");
    WireError::new(ErrorCode::UnsupportedParameter, message).with_param(param)
}

fn refuse_unless(harmless: bool, param: &str) -> Result<(), WireError> {
    if harmless { Ok(()) } else { Err(unsupported(param)) }
}

/// What OpenAI's two endpoints take together. One type without `flatten`, which would read everything twice.
#[derive(Debug, Deserialize)]
struct Body {
    model: Option<String>,
    messages: Option<Vec<ChatMessage>>,
    prompt: Option<Prompt>,
    max_completion_tokens: Option<u32>,
    max_tokens: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    #[serde(default, deserialize_with = "seed")]
    seed: Option<u64>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    // Means something, and is not done here unless it says to change nothing.
    n: Option<u32>,
    best_of: Option<u32>,
    echo: Option<bool>,
    suffix: Option<String>,
    logprobs: Option<Value>,
    top_logprobs: Option<u32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    min_tokens: Option<u32>,
    logit_bias: Option<Value>,
    response_format: Option<Value>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    functions: Option<Value>,
    function_call: Option<Value>,
    modalities: Option<Value>,
    audio: Option<Value>,
    prediction: Option<Value>,
    reasoning_effort: Option<Value>,
    verbosity: Option<Value>,
    web_search_options: Option<Value>,
    guided_json: Option<Value>,
    guided_regex: Option<Value>,
    guided_choice: Option<Value>,
    guided_grammar: Option<Value>,
    structured_outputs: Option<Value>,
    stop_token_ids: Option<Value>,
    chat_template: Option<Value>,
    chat_template_kwargs: Option<Value>,
    continue_final_message: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl Body {
    fn model(&self) -> Result<(ModelRef, String), WireError> {
        let name = self.model.as_deref().unwrap_or_default();
        if name.is_empty() {
            let message = "model is missing; GET /v1/models lists those that can be named";
            return Err(WireError::new(ErrorCode::MissingModel, message).with_param("model"));
        }
        Ok((catalog::parse_ref(name)?, name.to_owned()))
    }

    fn check_supported(&self) -> Result<(), WireError> {
        let neutral =
            |value: Option<f32>, neutral: f32| value.is_none_or(|value| (value - neutral).abs() < f32::EPSILON);
        refuse_unless(self.n.is_none_or(|count| count == 1), "n")?;
        refuse_unless(self.best_of.is_none_or(|best| best == 1), "best_of")?;
        refuse_unless(!self.echo.unwrap_or(false), "echo")?;
        refuse_unless(self.suffix.as_ref().is_none_or(String::is_empty), "suffix")?;
        refuse_unless(self.top_logprobs.is_none_or(|top| top == 0), "top_logprobs")?;
        refuse_unless(neutral(self.presence_penalty, 0.0), "presence_penalty")?;
        refuse_unless(neutral(self.frequency_penalty, 0.0), "frequency_penalty")?;
        refuse_unless(neutral(self.repetition_penalty, 1.0), "repetition_penalty")?;
        refuse_unless(self.min_tokens.is_none_or(|count| count == 0), "min_tokens")?;
        refuse_unless(!self.continue_final_message.unwrap_or(false), "continue_final_message")?;
        let format = self.response_format.as_ref();
        let text = |format: &Value| format.get("type").is_some_and(|kind| kind == "text");
        refuse_unless(format.is_none_or(text), "response_format")?;
        let no_tool = |choice: &Value| choice == "none" || choice == "auto";
        refuse_unless(self.tool_choice.as_ref().is_none_or(no_tool), "tool_choice")?;
        refuse_unless(self.function_call.as_ref().is_none_or(no_tool), "function_call")?;
        let only_text =
            |modalities: &Value| modalities.as_array().is_some_and(|all| all.iter().all(|one| one == "text"));
        refuse_unless(self.modalities.as_ref().is_none_or(only_text), "modalities")?;
        for (value, param) in [
            (&self.tools, "tools"),
            (&self.functions, "functions"),
            (&self.logit_bias, "logit_bias"),
            (&self.audio, "audio"),
            (&self.prediction, "prediction"),
            (&self.reasoning_effort, "reasoning_effort"),
            (&self.verbosity, "verbosity"),
            (&self.web_search_options, "web_search_options"),
            (&self.guided_json, "guided_json"),
            (&self.guided_regex, "guided_regex"),
            (&self.guided_choice, "guided_choice"),
            (&self.guided_grammar, "guided_grammar"),
            (&self.structured_outputs, "structured_outputs"),
            (&self.stop_token_ids, "stop_token_ids"),
            (&self.chat_template, "chat_template"),
            (&self.chat_template_kwargs, "chat_template_kwargs"),
        ] {
            refuse_unless(value.as_ref().is_none_or(is_empty), param)?;
        }
        Ok(())
    }

    fn generation(self, model: ModelRef, name: String, prompt: Input) -> Result<Generation, WireError> {
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
        let input = Input {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k,
            min_p: self.min_p,
            seed: self.seed,
            stop: self.stop.map(|stop| stop.0).unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            ..prompt
        };
        input.check()?;
        let job = Job {
            model,
            input,
            tenant_id: None,
            correlation_id: None,
            retry_token: None,
            trace_id: None,
            deadline: None,
        };
        let include_usage = self.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
        Ok(Generation { job, model: name, stream, include_usage })
    }
}

/// Says whether a value asks for nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
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

/// `stop`: a text or several.
#[derive(Debug)]
struct Stop(Vec<String>);

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;

        impl<'de> de::Visitor<'de> for Texts {
            type Value = Stop;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text or an array of texts")
            }

            fn visit_str<E>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.to_owned()]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut texts: A) -> Result<Stop, A::Error> {
                let mut all = vec![];
                while let Some(text) = texts.next_element()? {
                    all.push(text);
                }
                Ok(Stop(all))
            }
        }

        deserializer.deserialize_any(Texts)
    }
}

/// A message of a conversation, as OpenAI's clients write it.
#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: ChatRole,
    content: Option<Content>,
    tool_calls: Option<Value>,
    function_call: Option<Value>,
    audio: Option<Value>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ChatRole {
    System,
    Developer,
    User,
    Assistant,
    Tool,
    Function,
}

impl ChatMessage {
    fn convert(self, index: usize) -> Result<Message, WireError> {
        let path = |field: &str| format!("messages[{index}].{field}");
        let role = match self.role {
            ChatRole::System | ChatRole::Developer => Role::System,
            ChatRole::User => Role::User,
            ChatRole::Assistant => Role::Assistant,
            ChatRole::Tool | ChatRole::Function => return Err(unsupported(path("role"))),
        };
        for (value, field) in
            [(&self.tool_calls, "tool_calls"), (&self.function_call, "function_call"), (&self.audio, "audio")]
        {
            refuse_unless(value.as_ref().is_none_or(is_empty), &path(field))?;
        }
        let content = match self.content.ok_or_else(|| missing(&path("content")))? {
            Content::Text(text) => text,
            Content::Parts(parts) => join(parts, &path("content"))?,
        };
        Ok(Message::new(role, content))
    }
}

/// Joins the text of parts as OpenAI's servers do: without anything between them.
fn join(parts: Vec<Part>, path: &str) -> Result<String, WireError> {
    let mut whole = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        if part.kind != "text" {
            return Err(unsupported(format!("{path}[{index}].type")));
        }
        whole += &part.text.ok_or_else(|| missing(&format!("{path}[{index}].text")))?;
    }
    Ok(whole)
}

#[derive(Debug)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A visitor instead of an untagged enum, which would hide where in the message an error lies.
        struct TextOrParts;

        impl<'de> de::Visitor<'de> for TextOrParts {
            type Value = Content;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text or an array of parts")
            }

            fn visit_str<E>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
                let mut all = vec![];
                while let Some(part) = parts.next_element()? {
                    all.push(part);
                }
                Ok(Content::Parts(all))
            }
        }

        deserializer.deserialize_any(TextOrParts)
    }
}

/// `prompt`: a text, or an array that holds one.
#[derive(Debug)]
enum Prompt {
    Texts(Vec<String>),
    Tokens,
}

impl Prompt {
    fn text(self) -> Result<String, WireError> {
        match self {
            Self::Texts(mut texts) if texts.len() == 1 => Ok(texts.remove(0)),
            Self::Texts(texts) if texts.is_empty() => Err(invalid("prompt", "must not be empty")),
            Self::Texts(_) => Err(one_prompt("prompt takes one text at a time here")),
            Self::Tokens => Err(one_prompt("prompt takes text here, not tokens")),
        }
    }
}

fn one_prompt(message: &str) -> WireError {
    WireError::new(ErrorCode::UnsupportedParameter, message).with_param("prompt")
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrTexts;

        impl<'de> de::Visitor<'de> for TextOrTexts {
            type Value = Prompt;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text")
            }

            fn visit_str<E>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Texts(vec![text.to_owned()]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Prompt, A::Error> {
                let mut prompt = Prompt::Texts(vec![]);
                while let Some(item) = items.next_element::<PromptItem>()? {
                    match (item, &mut prompt) {
                        (PromptItem::Text(text), Prompt::Texts(texts)) => texts.push(text),
                        _ => prompt = Prompt::Tokens,
                    }
                }
                Ok(prompt)
            }
        }

        deserializer.deserialize_any(TextOrTexts)
    }
}

/// An item of a prompt: a text, a token, or an array of tokens.
enum PromptItem {
    Text(String),
    Tokens,
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Item;

        impl<'de> de::Visitor<'de> for Item {
            type Value = PromptItem;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text")
            }

            fn visit_str<E>(self, text: &str) -> Result<PromptItem, E> {
                Ok(PromptItem::Text(text.to_owned()))
            }

            fn visit_u64<E>(self, _: u64) -> Result<PromptItem, E> {
                Ok(PromptItem::Tokens)
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut tokens: A) -> Result<PromptItem, A::Error> {
                while tokens.next_element::<u64>()?.is_some() {}
                Ok(PromptItem::Tokens)
            }
        }

        deserializer.deserialize_any(Item)
    }
}

#[cfg(test)]
mod tests;

//! What is asked of a model: a conversation or a text to go on with, or texts to make vectors of.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::constraint::OutputFormat;
use crate::message::Message;
use crate::name::AdapterName;
use crate::tool::{Tool, ToolChoice};

/// What to answer, and how. A bare string is a prompt with all else at its default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", remote = "Self")]
pub struct Input {
    /// A conversation to go on with. Exactly one of `messages`, `prompt`, `promptTokens`, `prompts` and `embed` is
    /// given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// Text to go on with, as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Tokens of the model to go on with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<Vec<u32>>,
    /// Several texts to go on with, each by itself. The answers to the first come first, `n` to each, and there are at
    /// most 128 in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompts: Option<Vec<EmbedInput>>,
    /// The text that follows the answer, where the model is to fill in what stands between it and the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    /// Texts to make vectors of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embed: Option<Vec<EmbedInput>>,
    /// Counts the tokens that the model would read, answers with their number, and generates nothing. It costs nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub count_only: bool,
    /// The length the vectors must have; a model whose vectors have another refuses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<u32>,
    /// A LoRA adapter of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterName>,
    /// The functions the model may call; with `messages` only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Tool>,
    /// Whether it calls them.
    #[serde(default, skip_serializing_if = "ToolChoice::is_auto")]
    pub tool_choice: ToolChoice,
    /// Ends the answer behind its first call.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub one_call: bool,
    /// Goes on with the last message, which must be an assistant's, instead of a message of its own. The answer is what
    /// follows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continue_last: bool,
    /// What the answer will probably be, such as the text that it changes in a few places: where that is right, the
    /// answer comes faster. It has no influence on what the answer is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<String>,
    /// Variables for the model's chat template, such as `enable_thinking`; with `messages` only.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub template_options: serde_json::Map<String, Value>,
    /// What form the answer must have.
    #[serde(default, skip_serializing_if = "OutputFormat::is_text")]
    pub format: OutputFormat,
    /// How many answers, 1 to 16; they share the prompt and differ in their seeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// Puts the prompt before each answer to it, and its log-probabilities before those of the answer where they are
    /// asked for; that of its first token, which nothing comes before, is told as 0. For texts only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub echo: bool,
    /// The most tokens to generate; 0 is for `echo` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// 0 takes the likeliest token; 1 leaves the distribution as it is. At most 2. Like `topP`, `topK`, `minP` and
    /// `repetitionPenalty` it is the model's own where it is missing, and else llama.cpp's: 0.8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities sum to this; above 0, at most 1, which keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Keeps tokens at least this share as likely as the likeliest; 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Makes tokens of prompt and answer less likely by a factor; above 0, at most 2, and 1 changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Makes tokens that the answer has less likely; -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// The same, for each time that the answer has them; -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of tokens by number; -100, which bans a token, to 100.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Tells the log-probability of each token, and of so many of the likeliest in its place, 0 to 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// The same seed draws the same tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Up to 16 texts that end the answer; they are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Goes on past the end-of-turn token, for benchmarks. An answer that must have a form ends with it all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_eos: bool,
    /// Evaluates the answer by itself, slower, so that the same build of the engine gives it again to the bit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deterministic: bool,
    /// Seconds without work for which the model stays in memory after this; -1 for ever. A worker may bound it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
}

impl Input {
    /// Returns how many answers are asked for.
    pub fn answers(&self) -> u32 {
        self.answers_each().saturating_mul(self.prompts.as_ref().map_or(1, |prompts| prompts.len() as u32))
    }

    /// Returns how many of them are to the same prompt.
    pub fn answers_each(&self) -> u32 {
        self.n.unwrap_or(1)
    }
}

/// A text to go on with or to make a vector of, or its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum EmbedInput {
    /// One text.
    Text(String),
    /// Tokens of the model.
    Tokens(Vec<u32>),
}

impl EmbedInput {
    /// Returns whether there is nothing to make a vector of.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Tokens(tokens) => tokens.is_empty(),
        }
    }
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A visitor instead of an untagged enum, which would hide where in the input an error lies.
        struct TextOrMap;

        impl<'de> serde::de::Visitor<'de> for TextOrMap {
            type Value = Input;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a prompt, or an object with `messages` or `prompt`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Input, E> {
                Ok(Input { prompt: Some(text.to_owned()), ..Input::default() })
            }

            fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Input, E> {
                Ok(Input { prompt: Some(text), ..Input::default() })
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Input, A::Error> {
                // The one that the derivation made, which reads objects only.
                Input::deserialize(serde::de::value::MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_any(TextOrMap)
    }
}

impl Serialize for Input {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Input::serialize(self, serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_string_is_a_prompt() {
        let input: Input = serde_json::from_str("\"hello\"").expect("a string is an input");
        assert_eq!(input.prompt.as_deref(), Some("hello"));
        input.check().expect("a prompt is enough");
    }
}

//! The input of a model: a conversation or a text to continue, or texts to embed.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::constraint::OutputFormat;
use crate::message::Message;
use crate::name::AdapterName;
use crate::tool::{Tool, ToolChoice};

/// Input and settings of a job. A bare string is a prompt with default settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", remote = "Self")]
pub struct Input {
    /// A conversation to continue. Exactly one of `messages`, `prompt`, `promptTokens`, `prompts` and `embed` must be
    /// given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// Text to continue, without a chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Ids of the tokens to continue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<Vec<u32>>,
    /// Several texts to continue independently of each other, with `n` answers to each and at most 128 in all. The
    /// answers are ordered by prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompts: Option<Vec<EmbedInput>>,
    /// Text after the answer. The model fills in the text between the prompt and this suffix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    /// Texts to embed, 1 to 2048.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embed: Option<Vec<EmbedInput>>,
    /// Scores the texts of `embed` by their relevance to this query, instead of making vectors. Each score is a vector
    /// of length 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// Returns the number of input tokens and generates nothing. Such a request costs nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub count_only: bool,
    /// Lists the input tokens as well. Allowed with `countOnly` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list_tokens: Option<TokenListing>,
    /// Required length of the vectors. A model whose vectors have another length rejects the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<u32>,
    /// LoRA adapter of the model to apply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterName>,
    /// Functions that the model may call. Allowed with `messages` only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Tool>,
    /// Whether the model calls functions.
    #[serde(default, skip_serializing_if = "ToolChoice::is_auto")]
    pub tool_choice: ToolChoice,
    /// Ends the answer after its first function call.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub one_call: bool,
    /// Continues the last message, which must be an assistant's, instead of beginning a new one. The answer contains
    /// only the continuation.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continue_last: bool,
    /// Predicted answer, such as a text in which the model changes a few words. Generation is faster where the
    /// prediction is right. The prediction does not change the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<String>,
    /// Variables for the model's chat template, such as `enable_thinking`. Allowed with `messages` only.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub template_options: serde_json::Map<String, Value>,
    /// Format that the answer must have.
    #[serde(default, skip_serializing_if = "OutputFormat::is_text")]
    pub format: OutputFormat,
    /// Number of answers to each prompt, 1 to 16; 1 if omitted. The answers have different seeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// Returns the prompt before each answer, with its log-probabilities if they are requested. The first token has no
    /// predecessor, so its log-probability is 0. Not allowed with `messages` and `embed`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub echo: bool,
    /// Maximum number of tokens to generate. 0 is allowed with `echo` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Sampling temperature, 0 to 2. 0 chooses the most likely token; 1 leaves the distribution unchanged. If
    /// `temperature`, `topP`, `topK`, `minP` or `repetitionPenalty` is omitted, the model's own default applies, or
    /// else llama.cpp's, which is 0.8 for the temperature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities sum to this; above 0 and at most 1. 1 keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Keeps tokens whose probability is at least this fraction of the highest; 0 to 1. 0 keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Factor by which tokens of the prompt and the answer become less likely; above 0 and at most 2. 1 changes
    /// nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logit of each token that occurs in the answer; -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// Subtracted from the logit of a token for each time that it occurs in the answer; -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of tokens, by token id; -100 to 100. -100 bans a token.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Returns the log-probability of each token, and of this many of the most likely tokens at its position, 0 to 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// Seed of the sampler. The same seed draws the same random number at each position of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Stop sequences, at most 16. Generation ends at the first one, which the answer does not contain.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Continues after the end-of-turn token, for benchmarks. It has no effect on an answer with a constraint, such as
    /// `format`, which ends where the constraint is satisfied.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_eos: bool,
    /// Evaluates the request alone instead of in a batch. This is slower, and the same build of the engine repeats the
    /// answer bit for bit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deterministic: bool,
    /// Seconds for which the model stays in memory without work after this job; -1 for ever. A worker may limit it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
}

impl Input {
    /// Returns the number of requested answers.
    pub fn answers(&self) -> u32 {
        self.answers_each().saturating_mul(self.prompts.as_ref().map_or(1, |prompts| prompts.len() as u32))
    }

    /// Returns the number of requested answers to each prompt.
    pub fn answers_each(&self) -> u32 {
        self.n.unwrap_or(1)
    }
}

/// How the tokens of a text are listed. Both settings concern `prompt` only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenListing {
    /// Whether to add the tokens that the tokenizer puts before a text, such as BOS.
    pub add_special: bool,
    /// Whether the text of a special token becomes that token.
    pub parse_special: bool,
}

/// A text to continue or to embed, or its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum EmbedInput {
    /// One text.
    Text(String),
    /// Token ids of the model's vocabulary.
    Tokens(Vec<u32>),
}

impl EmbedInput {
    /// Returns whether there are no characters or tokens.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Tokens(tokens) => tokens.is_empty(),
        }
    }
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A visitor, because an untagged enum would hide the position of an error in the input.
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
                // The derived implementation, which reads objects only.
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

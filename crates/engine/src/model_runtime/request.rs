//! The requests to a model: to generate a continuation of a prompt, or to embed texts.

use inference::{EmbedInput, LeftToModel, Message, OutputFormat, Sampling, Tool, ToolChoice};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AdapterId, ModelId};

/// A conversation to go on with. An [`Input`](inference::Input) has these fields too, beside those of other prompts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chat {
    /// What was said, the oldest first.
    pub messages: Vec<Message>,
    /// The functions the model may call.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Tool>,
    /// Whether it calls them.
    #[serde(default)]
    pub tool_choice: ToolChoice,
    /// Ends the answer behind its first call.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub one_call: bool,
    /// Goes on with the last message, an assistant's, instead of a message of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continue_last: bool,
    /// Variables for the template beside those it always gets, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub template_options: serde_json::Map<String, Value>,
}

impl From<Vec<Message>> for Chat {
    fn from(messages: Vec<Message>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// What to continue. An [`Input`](inference::Input) may have several prompts; a generation has one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptInput {
    /// A conversation; the model's own chat template makes a prompt of it.
    ///
    /// What the messages say is never read as special tokens, so nobody forges another's turn.
    Chat(Chat),
    /// Text, taken as it is.
    ///
    /// The texts of special tokens in it are read as those tokens, as llama-server does: whoever sends a raw prompt
    /// writes the turns as well. What comes from people belongs in a conversation.
    Text(String),
    /// Tokens of the model's own vocabulary.
    Tokens(Vec<u32>),
}

impl From<EmbedInput> for PromptInput {
    fn from(input: EmbedInput) -> Self {
        match input {
            EmbedInput::Text(text) => Self::Text(text),
            EmbedInput::Tokens(tokens) => Self::Tokens(tokens),
        }
    }
}

/// One generation. Unlike an [`Input`](inference::Input) it has one prompt and one answer, the numbers of a loaded
/// model and adapter, and a value for each setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// The model to use.
    pub model: ModelId,
    /// The adapter to use it with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterId>,
    /// What to continue. An [`Input`](inference::Input) may have several prompts; a generation has one.
    pub input: PromptInput,
    /// How to draw tokens.
    #[serde(default)]
    pub sampling: Sampling,
    /// What of that the model decides.
    #[serde(default)]
    pub left_to_model: LeftToModel,
    /// Texts that end the answer; they are not part of it.
    #[serde(default)]
    pub stop: Vec<String>,
    /// The most tokens to generate, 0 included; `None` goes on to the end of the context.
    #[serde(default)]
    pub max_tokens: Option<u32>,
    /// Goes on past the end-of-turn token, for benchmarks. A constrained answer still ends with its constraint.
    #[serde(default)]
    pub ignore_eos: bool,
    /// Tells the log-probability of each token, and of so many of the likeliest in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// The text that follows the answer: the model fills in what stands between the prompt and it. For texts and
    /// tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    /// Puts the text of the prompt before the answer, and its log-probabilities where they are asked for before those
    /// of the answer; that of the first token is told as 0. Conversations have no such text.
    #[serde(default)]
    pub echo: bool,
    /// The constraint on the answer (structured output).
    #[serde(default)]
    pub format: OutputFormat,
    /// The answer that the caller expects, as text or tokens: where it is right, the answer comes faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<PromptInput>,
    /// The tokens of the answer that its reader has already, from another try: it goes on after them, and they count
    /// towards `max_tokens`, but are not told again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub continued: Vec<u32>,
    /// Evaluates this sequence in batches of its own, so that the same engine build gives the same logits to the bit
    /// whatever else runs.
    #[serde(default)]
    pub deterministic: bool,
}

impl GenerateRequest {
    /// Returns a request that leaves everything else at its default.
    pub fn new(model: ModelId, input: PromptInput) -> Self {
        Self {
            model,
            adapter: None,
            input,
            sampling: Sampling::default(),
            left_to_model: LeftToModel::default(),
            stop: Vec::new(),
            max_tokens: None,
            ignore_eos: false,
            logprobs: None,
            suffix: None,
            echo: false,
            format: OutputFormat::Text,
            prediction: None,
            continued: Vec::new(),
            deterministic: false,
        }
    }
}

/// Texts to make vectors of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmbedRequest {
    /// The model to use.
    pub model: ModelId,
    /// The texts, or their tokens; one vector each. A conversation is not supported.
    pub inputs: Vec<PromptInput>,
}

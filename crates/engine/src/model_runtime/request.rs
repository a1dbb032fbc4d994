//! The requests to a model: to generate a continuation of a prompt, or to embed texts.

use inference::{EmbedInput, LeftToModel, Message, OutputFormat, Sampling, Tool, ToolChoice};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AdapterId, ModelId};

/// A conversation to continue. An [`Input`](inference::Input) has these fields too, next to those of other prompts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chat {
    /// The messages, the oldest first.
    pub messages: Vec<Message>,
    /// The functions the model may call.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Tool>,
    /// Whether the model may or must call them.
    #[serde(default)]
    pub tool_choice: ToolChoice,
    /// Ends the answer after its first call.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub one_call: bool,
    /// Continues the last message, which is the assistant's, instead of starting a new one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continue_last: bool,
    /// Additional template variables, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub template_options: serde_json::Map<String, Value>,
}

impl From<Vec<Message>> for Chat {
    fn from(messages: Vec<Message>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// A prompt. An [`Input`](inference::Input) may have several prompts; a generation has one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptInput {
    /// A conversation, which the model's own chat template renders into a prompt.
    ///
    /// Text in messages is never tokenised as special tokens, so nobody can forge another participant's turn.
    Chat(Chat),
    /// A raw text prompt.
    ///
    /// Special tokens in it are parsed as such, as in llama-server: the author of a raw prompt writes the turns too.
    /// Text from users belongs in a conversation.
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

/// The text of an answer that an earlier attempt already sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContinuedText {
    pub text: String,
    /// An estimate of its tokens, for servers that do not count them.
    pub tokens: u32,
}

/// One generation. Unlike an [`Input`](inference::Input), it has one prompt and one answer, the ids of a loaded model
/// and adapter, and a value for each setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    pub model: ModelId,
    /// The adapter to use with the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterId>,
    pub input: PromptInput,
    #[serde(default)]
    pub sampling: Sampling,
    /// The sampling parameters that are left to the model's defaults.
    #[serde(default)]
    pub left_to_model: LeftToModel,
    /// Stop sequences, which end the answer and are not part of it.
    #[serde(default)]
    pub stop: Vec<String>,
    /// The maximum number of tokens to generate, which may be 0. `None` means up to the end of the context.
    #[serde(default)]
    pub max_tokens: Option<u32>,
    /// Continues past the end-of-generation token, for benchmarks. A constrained answer still ends with its
    /// constraint.
    #[serde(default)]
    pub ignore_eos: bool,
    /// Returns the log-probability of each token, and of this many most likely alternatives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// The text after the answer: the model fills in the middle between the prompt and the suffix. Only for prompts
    /// of text or tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    /// Returns the text of the prompt before the answer. If log-probabilities are requested, those of the prompt come
    /// first; that of the first token is 0. Not supported for conversations.
    #[serde(default)]
    pub echo: bool,
    /// The constraint on the answer (structured output).
    #[serde(default)]
    pub format: OutputFormat,
    /// The answer that the caller expects, as text or tokens. The more of it is right, the faster the answer comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<PromptInput>,
    /// Tokens of the answer that an earlier attempt already sent. The answer continues after them. They count towards
    /// `max_tokens`, but are not sent again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub continued: Vec<u32>,
    /// The text of the answer that an earlier attempt already sent, if its tokens are not known. Only servers continue
    /// it, see [`crate::RemoteRuntime`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continued_text: Option<ContinuedText>,
    /// Evaluates this sequence in batches of its own, so that the same engine build gives bit-identical logits
    /// whatever else runs.
    #[serde(default)]
    pub deterministic: bool,
    /// Lets other generations go first: it pauses while one that does not yield runs, but for one step in twenty, and
    /// gives up its slot to one that waits. It goes on where it was.
    #[serde(default)]
    pub yields: bool,
}

impl GenerateRequest {
    /// Returns a request with default values for everything else.
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
            continued_text: None,
            deterministic: false,
            yields: false,
        }
    }
}

/// Texts to score by their relevance to a query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RerankRequest {
    pub model: ModelId,
    pub query: String,
    pub texts: Vec<String>,
}

/// The relevance of texts to a query: the higher the score, the more relevant.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// In the order of the texts.
    pub scores: Vec<f32>,
    /// Tokens of all pairs of the query and a text.
    pub prompt_tokens: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmbedRequest {
    pub model: ModelId,
    /// The texts, or their tokens, with one vector for each. Conversations are not supported.
    pub inputs: Vec<PromptInput>,
}

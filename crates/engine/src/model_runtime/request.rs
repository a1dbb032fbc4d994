//! What is asked of a model: a continuation of a prompt, or vectors of texts.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AdapterId, ModelId};

/// One message of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Plain text.
    pub content: String,
    /// What an assistant thought before it spoke; templates that keep it show it to the model again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// The functions an assistant called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool's message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The name of who speaks, or of the tool that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl ChatMessage {
    /// Returns a message of plain text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), ..Self::default() }
    }
}

/// A function that an assistant called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The call's name within the conversation.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// Its arguments as JSON text; a model may write text that is not JSON.
    pub arguments: String,
}

/// A function that a model may call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does, for the model to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The JSON schema of its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
}

/// Whether a model calls functions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    /// As it sees fit.
    #[default]
    Auto,
    /// Never.
    None,
    /// At least one.
    Required,
    /// This one.
    Function(String),
}

/// A conversation to go on with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chat {
    /// What was said, the oldest first.
    pub messages: Vec<ChatMessage>,
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

impl From<Vec<ChatMessage>> for Chat {
    fn from(messages: Vec<ChatMessage>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// What to continue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptInput {
    /// A conversation; the model's own chat template makes a prompt of it.
    ///
    /// What the messages say is never read as control tokens, so nobody forges another's turn.
    Chat(Chat),
    /// Text, taken as it is.
    ///
    /// The texts of control tokens in it are read as those tokens, as llama-server does: whoever sends a raw prompt
    /// writes the turns as well. What comes from people belongs in a conversation.
    Text(String),
    /// Tokens of the model's own vocabulary.
    Tokens(Vec<u32>),
}

/// How the next token is drawn. `temperature` 0 takes the likeliest.
///
/// Bias and penalties change the logits first, in this order; then the filters apply, then the temperature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 and above; 1 leaves the distribution as it is.
    pub temperature: f32,
    /// Keeps the smallest set of tokens whose probabilities sum to this, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps tokens at least this share as likely as the likeliest, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Divides the positive logits, and multiplies the negative ones, of tokens seen in prompt or answer; 1 leaves
    /// them, in (0, 2].
    #[serde(default = "one")]
    pub repetition_penalty: f32,
    /// Taken off the logit of each token that the answer has, in [-2, 2].
    #[serde(default)]
    pub presence_penalty: f32,
    /// Taken off the logit of a token for each time that the answer has it, in [-2, 2].
    #[serde(default)]
    pub frequency_penalty: f32,
    /// Added to the logits of tokens by number, in [-100, 100]; -100 bans a token.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed, model and input give the same draws.
    pub seed: u64,
}

fn one() -> f32 {
    1.0
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// Which settings of sampling a request leaves to its model. A runtime fills them in with [`SamplingDefaults`], or has
/// the server that runs the model do so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeftToModel {
    /// [`Sampling::temperature`].
    pub temperature: bool,
    /// [`Sampling::top_p`].
    pub top_p: bool,
    /// [`Sampling::top_k`].
    pub top_k: bool,
    /// [`Sampling::min_p`].
    pub min_p: bool,
    /// [`Sampling::repetition_penalty`].
    pub repetition_penalty: bool,
}

/// How a model samples where a request leaves it open.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// [`Sampling::temperature`].
    pub temperature: f32,
    /// [`Sampling::top_p`].
    pub top_p: f32,
    /// [`Sampling::top_k`].
    pub top_k: u32,
    /// [`Sampling::min_p`].
    pub min_p: f32,
    /// [`Sampling::repetition_penalty`].
    pub repetition_penalty: f32,
}

/// Those of llama.cpp.
impl Default for SamplingDefaults {
    fn default() -> Self {
        Self { temperature: 0.8, top_p: 0.95, top_k: 40, min_p: 0.05, repetition_penalty: 1.0 }
    }
}

impl SamplingDefaults {
    /// Fills in what a request leaves open.
    pub fn fill(&self, sampling: &mut Sampling, left: LeftToModel) {
        let set = |value: &mut f32, left: bool, default: f32| {
            if left {
                *value = default;
            }
        };
        set(&mut sampling.temperature, left.temperature, self.temperature);
        set(&mut sampling.top_p, left.top_p, self.top_p);
        set(&mut sampling.min_p, left.min_p, self.min_p);
        set(&mut sampling.repetition_penalty, left.repetition_penalty, self.repetition_penalty);
        if left.top_k {
            sampling.top_k = self.top_k;
        }
    }
}

/// What form an answer must have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputFormat {
    /// Any.
    #[default]
    Text,
    /// A JSON object.
    Json,
    /// JSON that the schema allows.
    JsonSchema(Value),
    /// Text that the whole regular expression matches.
    Regex(String),
    /// Text of a grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// One generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// The model to use.
    pub model: ModelId,
    /// The adapter to use it with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterId>,
    /// What to continue.
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
    /// Goes on past the end-of-turn token, for benchmarks. An answer that must have a form ends with it all the same.
    #[serde(default)]
    pub ignore_eos: bool,
    /// Tells the log-probability of each token, and of so many of the likeliest in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// The text that follows the answer: the model fills in what stands between the prompt and it. For texts and tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    /// Puts the text of the prompt before the answer, and its log-probabilities where they are asked for before those of
    /// the answer; that of the first token is told as 0. Conversations have no such text.
    #[serde(default)]
    pub echo: bool,
    /// What form the answer must have.
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

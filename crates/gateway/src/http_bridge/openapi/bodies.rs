//! What OpenAI's endpoints take and answer, for the document only.

use std::collections::BTreeMap;

use serde_json::Value;
use utoipa::ToSchema;

/// A conversation to answer. Unknown fields are passed over; fields of OpenAI's that mean something and are not done
/// here are refused with `unsupported_parameter`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
pub(crate) struct ChatCompletionRequest {
    /// `name[@MAJOR.MINOR][:adapter]`; no version means the newest.
    model: String,
    /// The conversation so far.
    #[schema(min_items = 1)]
    messages: Vec<ChatMessage>,
    /// The most tokens to generate; up to the context's end where it is missing, or -1.
    #[schema(minimum = -1)]
    max_completion_tokens: Option<i64>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = -1)]
    max_tokens: Option<i64>,
    /// Tells the log-probability of each token.
    logprobs: Option<bool>,
    /// And of so many of the likeliest in its place.
    #[schema(maximum = 20)]
    top_logprobs: Option<u32>,
    /// The functions the model may call.
    #[schema(max_items = 128)]
    tools: Option<Vec<ToolOffer>>,
    /// `auto`, `none`, `required`, or `{"type":"function","function":{"name":…}}`.
    #[schema(value_type = Option<Value>)]
    tool_choice: Option<Value>,
    /// False ends the answer behind its first call. It is false where it is missing and `tool_choice` is `required`.
    parallel_tool_calls: Option<bool>,
    /// What the answer will probably be: `{"type":"content","content":…}`. Where it is right, the answer comes faster.
    #[schema(value_type = Option<Object>)]
    prediction: Option<Value>,
    /// How long a model thinks that can: `none`, `minimal`, `low`, `medium`, `high` or `xhigh`.
    reasoning_effort: Option<String>,
    /// Goes on with the last message, which must be an assistant's; the answer is what follows. Not OpenAI's.
    continue_final_message: Option<bool>,
    /// Variables for the model's chat template. Not OpenAI's.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Value>,
    #[schema(inline)]
    #[serde(flatten)]
    sampling: Sampling,
}

/// How long workers keep a model in memory.
#[derive(ToSchema)]
#[schema(rename_all = "camelCase")]
#[expect(dead_code, reason = "described, never made")]
pub(crate) struct ModelKept {
    /// Whether they keep it whatever happens. `load` does not change that.
    pin: Option<bool>,
    /// Seconds without work after which they unload it; -1 for never.
    #[schema(minimum = -1)]
    keep_alive_secs: Option<i64>,
}

/// A function the model may call.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct ToolOffer {
    /// Always `function`.
    r#type: String,
    function: FunctionOffer,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct FunctionOffer {
    /// 1 to 64 letters, digits, `_` and `-`.
    name: String,
    /// What it does, for the model to read.
    description: Option<String>,
    /// The JSON schema of its arguments.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Value>,
}

/// A text to go on with.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
pub(crate) struct CompletionRequest {
    /// `name[@MAJOR.MINOR][:adapter]`; no version means the newest.
    model: String,
    /// The text or its tokens, alone or in an array; several are answered each by itself, at most 128 in all.
    prompt: TextsOrTokens,
    /// The text that follows the answer: the model fills in what stands between. Not every model can.
    suffix: Option<String>,
    /// Puts the prompt before the answer, and its log-probabilities before those of the answer.
    #[schema(default = false)]
    echo: Option<bool>,
    /// The most tokens to generate; -1 for as many as fit, and 0 for none beside `echo`.
    #[schema(minimum = -1, default = 16)]
    max_tokens: Option<i64>,
    /// Tells the log-probability of each token, and of so many of the likeliest in its place.
    #[schema(maximum = 20)]
    logprobs: Option<u32>,
    #[schema(inline)]
    #[serde(flatten)]
    sampling: Sampling,
}

/// How the answer is drawn and sent.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct Sampling {
    /// Whether the answer comes as server-sent events.
    #[schema(default = false)]
    stream: Option<bool>,
    /// Only with `stream`.
    stream_options: Option<StreamOptions>,
    /// How many answers; they share the prompt.
    #[schema(minimum = 1, maximum = 16, default = 1)]
    n: Option<u32>,
    /// 0 takes the likeliest token, and 1 leaves the distribution as it is. Where this and the next three are missing, they
    /// are what the model's file says (`general.sampling.…` in a GGUF), and else llama.cpp's: 0.8, 0.95, 40 and 0.05.
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities sum to this.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Keeps this many of the likeliest tokens; -1 or 0 keeps all. Not OpenAI's.
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    /// Keeps tokens at least this share as likely as the likeliest. Not OpenAI's.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// The same seed draws the same tokens of the same logits.
    seed: Option<i64>,
    /// Evaluates the answer by itself, slower, so that the same build of the engine gives it again to the bit. Not OpenAI's.
    deterministic: Option<bool>,
    /// Texts that end the answer, at most 16.
    stop: Option<OneOrMany>,
    /// Goes on past the end-of-turn token. Not OpenAI's. An answer that must have a form ends all the same.
    ignore_eos: Option<bool>,
    /// Makes tokens of prompt and answer less likely by a factor. Not OpenAI's.
    #[schema(exclusive_minimum = 0, maximum = 2)]
    repetition_penalty: Option<f32>,
    /// Makes tokens that the answer has less likely.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    /// The same, for each time that the answer has them.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Added to the logits of tokens by number.
    logit_bias: Option<BTreeMap<String, f32>>,
    /// What form the answer must have.
    response_format: Option<ResponseFormat>,
    /// The same in vLLM's words: `json`, `json_object`, `regex`, `choice` or `grammar`. Not OpenAI's.
    #[schema(value_type = Option<Object>)]
    structured_outputs: Option<Value>,
    /// An adapter of the model, where its name does not say one. Not OpenAI's.
    adapter: Option<String>,
    /// How long the model stays in memory without work after this: seconds, or a time such as `5m`; -1 for ever, and 0 not at
    /// all. Workers may bound it. Ollama's, and not OpenAI's.
    #[schema(value_type = Option<Value>)]
    keep_alive: Option<Value>,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    r#type: String,
    /// With `json_schema`: `name`, and the `schema` that the answer keeps to. What cannot be kept of it is refused where
    /// `strict` is true, and left out otherwise.
    #[schema(value_type = Option<Object>)]
    json_schema: Option<Value>,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct StreamOptions {
    /// Whether a chunk with the usage comes before `[DONE]`.
    include_usage: Option<bool>,
}

/// A text, or several.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "described, never made")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// A text or several, or tokens of one text or of each of several.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "described, never made")]
enum TextsOrTokens {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

/// Texts to make vectors of.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
pub(crate) struct EmbeddingRequest {
    /// `name[@MAJOR.MINOR][:adapter]`; no version means the newest.
    model: String,
    /// At most 2048 texts.
    input: TextsOrTokens,
    /// `float`, or `base64` for the bytes of little-endian 32-bit floats.
    #[schema(default = "float")]
    encoding_format: Option<String>,
    /// Refused unless it is the length of the model's vectors.
    #[schema(minimum = 1)]
    dimensions: Option<u32>,
    /// As for completions. Not OpenAI's.
    #[schema(value_type = Option<Value>)]
    keep_alive: Option<Value>,
}

/// Vectors, of length 1.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
pub(crate) struct EmbeddingList {
    /// `list`.
    object: String,
    data: Vec<EmbeddingItem>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct EmbeddingItem {
    /// `embedding`.
    object: String,
    /// Which text it is of.
    index: u32,
    embedding: EmbeddingVector,
}

#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "described, never made")]
enum EmbeddingVector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct EmbeddingUsage {
    prompt_tokens: u32,
    total_tokens: u32,
}

/// One message of a conversation.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct ChatMessage {
    role: ChatRole,
    /// May be null where an assistant only calls functions.
    content: Option<ChatContent>,
    /// What an assistant thought before it spoke. Not OpenAI's.
    reasoning_content: Option<String>,
    /// The functions an assistant called.
    tool_calls: Option<Vec<ToolCall>>,
    /// The call that a tool's message answers.
    tool_call_id: Option<String>,
    /// Who speaks, by name.
    name: Option<String>,
}

/// A function that was called.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct ToolCall {
    id: String,
    /// Always `function`.
    r#type: String,
    function: CalledFunction,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct CalledFunction {
    name: String,
    /// JSON, as text. A model may write text that is not JSON.
    arguments: String,
}

/// Who speaks.
#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "described, never made")]
enum ChatRole {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// A text, or parts of one.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "described, never made")]
enum ChatContent {
    Text(String),
    Parts(Vec<TextPart>),
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct TextPart {
    /// Always `text`.
    r#type: String,
    text: String,
}

/// An answer to a conversation.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
pub(crate) struct ChatCompletion {
    id: String,
    /// `chat.completion`.
    object: String,
    /// Seconds since 1970.
    created: u64,
    model: String,
    /// The beginning of the model's digest.
    system_fingerprint: String,
    choices: Vec<ChatChoice>,
    usage: CompletionUsage,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct ChatChoice {
    index: u32,
    message: AssistantMessage,
    /// `content`, with an entry for each token; null unless asked for.
    #[schema(value_type = Option<Object>)]
    logprobs: Option<Value>,
    finish_reason: FinishReason,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct AssistantMessage {
    /// Always `assistant`.
    role: String,
    /// Null where the model only calls functions.
    content: Option<String>,
    /// What the model thought before it spoke; missing where it did not. Not OpenAI's.
    reasoning_content: Option<String>,
    /// The functions it calls; missing where it calls none.
    tool_calls: Option<Vec<ToolCall>>,
    /// Always null.
    refusal: Option<String>,
}

/// A text that was gone on with.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
pub(crate) struct Completion {
    id: String,
    /// `text_completion`.
    object: String,
    /// Seconds since 1970.
    created: u64,
    model: String,
    /// The beginning of the model's digest.
    system_fingerprint: String,
    choices: Vec<TextChoice>,
    usage: CompletionUsage,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct TextChoice {
    index: u32,
    text: String,
    /// `tokens`, `token_logprobs`, `top_logprobs` and `text_offset`; null unless asked for.
    #[schema(value_type = Option<Object>)]
    logprobs: Option<Value>,
    finish_reason: FinishReason,
}

/// Why an answer ended.
#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "described, never made")]
enum FinishReason {
    Stop,
    Length,
    ToolCalls,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct CompletionUsage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
    /// Missing where the model did not think.
    completion_tokens_details: Option<CompletionTokensDetails>,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct PromptTokensDetails {
    /// Prompt tokens that were at hand and not evaluated again.
    cached_tokens: u32,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct CompletionTokensDetails {
    /// Tokens that the model thought with; they are among `completion_tokens`.
    reasoning_tokens: u32,
}

//! The OpenAPI document. Contracts of ours are shown by the schemas that `protocol` publishes; the types below show
//! what `validation` reads.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderValue, Response, header};
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{IntoResponses, Modify, OpenApi, ToSchema};

use super::{chat, completions, embeddings, health, infer, models};
use crate::admin;

static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(build().to_string()));

/// Tells what there is: this document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "operations", operation_id = "openapi",
    responses((status = 200, description = "This document", body = Object)),
)]
pub(super) async fn document() -> Response<Body> {
    let mut response = Response::new(Body::from(DOCUMENT.clone()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Tether", description = "One address for the models of a peer-to-peer network."),
    paths(
        chat::create,
        completions::create,
        embeddings::create,
        models::list,
        models::get,
        infer::create,
        health::live,
        health::alias,
        health::ready,
        health::metrics,
        health::version,
        document,
        admin::nodes,
        admin::decision,
        admin::create_token,
        admin::tokens,
        admin::revoke_token,
    ),
    modifiers(&Bearer),
)]
struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("tth_live_…").build();
        document.components.get_or_insert_default().add_security_scheme("bearer", SecurityScheme::Http(scheme));
    }
}

fn build() -> Value {
    let mut document = serde_json::to_value(Document::openapi()).expect("the document is plain JSON");
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let contracts = [
        ("InferSubmission", generator.subschema_for::<protocol::infer::InferSubmission>()),
        ("InferChunk", generator.subschema_for::<protocol::infer::InferChunk>()),
        ("Fleet", generator.subschema_for::<protocol::control::Fleet>()),
        ("Decision", generator.subschema_for::<protocol::control::Decision>()),
        ("TokenCreate", generator.subschema_for::<protocol::control::TokenCreate>()),
        ("TokenCreated", generator.subschema_for::<protocol::control::TokenCreated>()),
        ("TokenList", generator.subschema_for::<protocol::control::TokenList>()),
        ("TokenRevoked", generator.subschema_for::<protocol::control::TokenRevoked>()),
    ];
    if let Some(schemas) = document.pointer_mut("/components/schemas").and_then(Value::as_object_mut) {
        for (name, schema) in contracts {
            schemas.insert(name.to_owned(), schema.to_value());
        }
        // After the placeholders, so that a contract of the same name takes its place.
        let definitions: Map<String, Value> = generator.take_definitions(true);
        schemas.extend(definitions);
    }
    document
}

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct InferSubmission;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct InferChunk;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct Fleet;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct Decision;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct TokenCreate;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct TokenCreated;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct TokenList;

/// Stands for the contract of this name.
#[derive(ToSchema)]
pub(crate) struct TokenRevoked;

/// Every error has this form.
#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Serialize, ToSchema)]
struct ErrorDetail {
    /// What went wrong and what to do, for people.
    message: String,
    /// OpenAI's kind of error.
    r#type: String,
    /// The field at fault.
    param: Option<String>,
    /// What went wrong, for programs.
    code: String,
}

/// The errors of requests that need an API key.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "described, never made")]
pub(crate) enum Errors {
    /// The request makes no sense, or asks for what is not done here; `param` names the field.
    #[response(status = 400)]
    BadRequest(ErrorBody),
    /// No API key, or a wrong, revoked or expired one.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// The API key does not allow it.
    #[response(status = 403)]
    Forbidden(ErrorBody),
    /// There is no such model or job.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The body came too slowly.
    #[response(status = 408)]
    Timeout(ErrorBody),
    /// A job of this retry token exists already.
    #[response(status = 409)]
    Conflict(ErrorBody),
    /// The body is over the limit.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The body is not JSON.
    #[response(status = 415)]
    MediaType(ErrorBody),
    /// Too many requests; `Retry-After` tells when the next may come.
    #[response(status = 429)]
    TooMany(ErrorBody),
    /// A defect of ours.
    #[response(status = 500)]
    Internal(ErrorBody),
    /// The workers that tried failed.
    #[response(status = 502)]
    Worker(ErrorBody),
    /// No room, or a part of the network is away; `Retry-After` tells when to try again.
    #[response(status = 503)]
    Unavailable(ErrorBody),
    /// The deadline passed.
    #[response(status = 504)]
    Deadline(ErrorBody),
}

/// A conversation to answer. Unknown fields are passed over; fields of OpenAI's that mean something and are not done
/// here are refused with `unsupported_parameter`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
pub(super) struct ChatCompletionRequest {
    /// `name[@MAJOR.MINOR][:adapter]`; no version means the newest.
    model: String,
    /// The conversation so far.
    #[schema(min_items = 1)]
    messages: Vec<ChatMessage>,
    /// The most tokens to generate; up to the context's end where it is missing.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u32>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = 1)]
    max_tokens: Option<u32>,
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
    /// How long a model thinks that can: `none`, `minimal`, `low`, `medium`, `high` or `xhigh`.
    reasoning_effort: Option<String>,
    /// Variables for the model's chat template. Not OpenAI's.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Value>,
    #[schema(inline)]
    #[serde(flatten)]
    sampling: Sampling,
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
pub(super) struct CompletionRequest {
    /// `name[@MAJOR.MINOR][:adapter]`; no version means the newest.
    model: String,
    /// The text or its tokens, alone or in an array.
    prompt: TextsOrTokens,
    /// The most tokens to generate.
    #[schema(minimum = 1, default = 16)]
    max_tokens: Option<u32>,
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
    /// 0 takes the likeliest token.
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
    /// The same seed draws the same tokens.
    seed: Option<i64>,
    /// Texts that end the answer, at most 16.
    stop: Option<OneOrMany>,
    /// Goes on past the end-of-turn token. Not OpenAI's.
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
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    r#type: String,
    /// With `json_schema`: `name`, and the `schema` that the answer keeps to.
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
pub(super) struct EmbeddingRequest {
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
}

/// Vectors, of length 1.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
pub(super) struct EmbeddingList {
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
pub(super) struct ChatCompletion {
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
pub(super) struct Completion {
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
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "described, never made")]
struct PromptTokensDetails {
    /// Prompt tokens that were at hand and not evaluated again.
    cached_tokens: u32,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_route_is_in_the_document() {
        let router = include_str!("router.rs");
        let routed: BTreeSet<String> = router
            .match_indices(".route(\"")
            .map(|(at, found)| router[at + found.len()..].split('"').next().unwrap_or_default())
            .map(|path| path.replace("{correlation_id}", "{correlationId}").replace("{key_id}", "{keyId}"))
            .collect();
        let document = build();
        let described: BTreeSet<String> = document["paths"].as_object().expect("paths").keys().cloned().collect();
        assert_eq!(routed, described);
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document = build();
        let mut references = vec![];
        collect(&document, &mut references);
        assert!(references.len() > 20);
        for reference in references {
            let pointer = reference.strip_prefix('#').expect("a local reference");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }

    fn collect(value: &Value, references: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                references.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|field| collect(field, references));
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, references)),
            _ => {}
        }
    }

    #[test]
    fn operations_have_names_of_their_own() {
        let document = build();
        let operations = document["paths"]
            .as_object()
            .expect("paths")
            .values()
            .flat_map(|path| path.as_object().expect("operations").values());
        let names: Vec<_> =
            operations.map(|operation| operation["operationId"].as_str().expect("named").to_owned()).collect();
        let distinct: BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }
}

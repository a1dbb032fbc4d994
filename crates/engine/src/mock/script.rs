//! The text that the mock generates, token by token.

use serde_json::{Map, Value, json};

use crate::model_runtime::{
    Chat, EngineError, FinishReason, GenerateRequest, OutputFormat, Piece, PromptInput, Role, TokenLogprob, Tool,
    ToolCallDelta, ToolChoice, unsupported,
};

/// The log-probability of each token. Each alternative's is one less than that of the one before.
const LOGPROB: f32 = -0.5;
/// The depth at which recursive schemas are cut off.
const DEPTH_MAX: u32 = 16;

/// The answer to one request.
pub(super) struct Script {
    /// Whether the answer begins with reasoning.
    thinks: bool,
    body: Body,
    logprobs: Option<u32>,
}

enum Body {
    /// This many words, one token each.
    Words(u32),
    /// A text that is a single token.
    Text(String),
    /// A call: one token for its name, and one for each word of its arguments.
    Call { name: String, arguments: Vec<String> },
}

impl Script {
    /// Returns the answer to a request. `words` is the length of an unconstrained answer.
    pub(super) fn of(request: &GenerateRequest, words: u32) -> Result<Self, EngineError> {
        let chat = match &request.input {
            PromptInput::Chat(chat) => Some(chat),
            PromptInput::Text(_) | PromptInput::Tokens(_) => None,
        };
        let body = match (chat.and_then(call), &request.format) {
            (Some(call), _) => call,
            (None, OutputFormat::Text) => Body::Words(words),
            (None, OutputFormat::Json) => Body::Text("{}".into()),
            (None, OutputFormat::JsonSchema(schema)) => Body::Text(instance(schema, schema, DEPTH_MAX).to_string()),
            (None, OutputFormat::Regex(_) | OutputFormat::Lark(_)) => {
                return Err(unsupported("response_format", "the mock writes nothing but JSON"));
            }
        };
        let thinks = chat.and_then(|chat| chat.template_options.get("enable_thinking")) == Some(&Value::Bool(true));
        Ok(Self { thinks, body, logprobs: request.logprobs })
    }

    pub(super) fn len(&self) -> u32 {
        let body = match &self.body {
            Body::Words(count) => *count,
            Body::Text(_) => 1,
            Body::Call { arguments, .. } => u32::try_from(arguments.len()).unwrap_or(u32::MAX).saturating_add(1),
        };
        body.saturating_add(self.thinks.into())
    }

    /// Returns the number of reasoning tokens.
    pub(super) fn thoughts(&self) -> u32 {
        self.thinks.into()
    }

    /// Returns the finish reason, unless the answer is cut short.
    pub(super) fn reason(&self) -> FinishReason {
        match self.body {
            Body::Words(_) | Body::Text(_) => FinishReason::Stop,
            Body::Call { .. } => FinishReason::ToolCalls,
        }
    }

    /// Returns the piece of a token, counted from 0.
    pub(super) fn piece(&self, token: u32) -> Piece {
        let piece = match (token.checked_sub(self.thinks.into()), &self.body) {
            (None, _) => Piece { reasoning: "hm".into(), ..Piece::default() },
            (Some(index), Body::Words(_)) => Piece { text: word(index), ..Piece::default() },
            (Some(_), Body::Text(text)) => Piece { text: text.clone(), ..Piece::default() },
            (Some(0), Body::Call { name, .. }) => {
                let (id, name) = (Some(format!("call_{name}")), Some(name.clone()));
                calls(ToolCallDelta { id, name, ..ToolCallDelta::default() })
            }
            (Some(index), Body::Call { arguments, .. }) => {
                let arguments = arguments.get(index as usize - 1).cloned().unwrap_or_default();
                calls(ToolCallDelta { arguments, ..ToolCallDelta::default() })
            }
        };
        let logprobs = self.logprobs.map(|count| logprob(token, &piece, count)).into_iter().collect();
        Piece { tokens: vec![token], logprobs, ..piece }
    }
}

/// Returns a word of an unconstrained answer.
pub(super) fn word(index: u32) -> String {
    if index == 0 { "tok0".into() } else { format!(" tok{index}") }
}

fn call(chat: &Chat) -> Option<Body> {
    let is_allowed = |tool: &&Tool| match &chat.tool_choice {
        ToolChoice::Auto | ToolChoice::Required => true,
        ToolChoice::Function(name) => tool.name == *name,
        ToolChoice::None => false,
    };
    let mut tools = chat.tools.iter().filter(is_allowed);
    if let Some(call) = tools.clone().find_map(|tool| Some(body(tool, &written_arguments(chat, tool)?))) {
        return Some(call);
    }
    let tool = tools.next().filter(|_| chat.tool_choice != ToolChoice::Auto)?;
    let arguments = tool.parameters.as_ref().map_or_else(|| json!({}), |schema| instance(schema, schema, DEPTH_MAX));
    Some(body(tool, &arguments))
}

fn body(tool: &Tool, arguments: &Value) -> Body {
    let arguments = arguments.to_string().split_inclusive(' ').map(str::to_owned).collect();
    Body::Call { name: tool.name.clone(), arguments }
}

/// Returns the arguments of a call of this tool that a user wrote out, such as `add(2, 3)` or `add({"a": 2, "b": 3})`,
/// and whose result is not there yet.
fn written_arguments(chat: &Chat, tool: &Tool) -> Option<Value> {
    let unanswered = chat.messages.iter().rev().take_while(|message| message.role != Role::Tool);
    let call = format!("{}(", tool.name);
    unanswered
        .filter(|message| message.role == Role::User)
        .flat_map(|message| message.content.match_indices(&call).map(|(at, _)| &message.content[at + call.len()..]))
        .find_map(|rest| parse_arguments(rest, tool))
}

/// Parses the arguments at the beginning of a text: an object, or values in the order of the tool's parameters.
fn parse_arguments(rest: &str, tool: &Tool) -> Option<Value> {
    if rest.starts_with('{') {
        return serde_json::Deserializer::from_str(rest).into_iter::<Value>().next()?.ok();
    }
    let (values, _) = rest.split_once(')')?;
    let values: Vec<Value> = serde_json::from_str(&format!("[{values}]")).ok()?;
    let properties = tool.parameters.as_ref().and_then(|schema| schema.get("properties")).and_then(Value::as_object);
    let names = properties.into_iter().flat_map(Map::keys).cloned();
    Some(Value::Object(names.zip(values).collect()))
}

fn calls(delta: ToolCallDelta) -> Piece {
    Piece { tool_calls: vec![delta], ..Piece::default() }
}

fn logprob(token: u32, piece: &Piece, count: u32) -> TokenLogprob {
    let bytes = |text: &str| text.as_bytes().to_vec();
    let of = |rank: u32| TokenLogprob {
        token: token.saturating_add(rank),
        bytes: if rank == 0 { bytes(&piece.text) } else { bytes(&word(token.saturating_add(rank))) },
        logprob: LOGPROB - rank as f32,
        top: Vec::new(),
    };
    TokenLogprob { top: (0..count).map(of).collect(), ..of(0) }
}

/// Returns the simplest value that a schema allows, considering only its types.
fn instance(schema: &Value, root: &Value, depth: u32) -> Value {
    let Some(below) = depth.checked_sub(1) else { return Value::Null };
    let inner = |schema: &Value| instance(schema, root, below);
    let first = |name: &str| schema.get(name).and_then(Value::as_array).and_then(|all| all.first());
    if let Some(pointer) = schema.get("$ref").and_then(Value::as_str) {
        let referred = pointer.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
        return referred.map_or(Value::Null, inner);
    }
    if let Some(value) = schema.get("const").or_else(|| first("enum")) {
        return value.clone();
    }
    if let Some(schema) = first("anyOf").or_else(|| first("oneOf")).or_else(|| first("allOf")) {
        return inner(schema);
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("string") => word(0).into(),
        Some("integer" | "number") => 0.into(),
        Some("boolean") => false.into(),
        Some("array") => json!([]),
        Some("object") => {
            let properties = schema.get("properties").and_then(Value::as_object);
            let fields = properties.into_iter().flatten().map(|(name, schema)| (name.clone(), inner(schema)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
        _ => Value::Null,
    }
}

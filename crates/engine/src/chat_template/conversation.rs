//! A conversation as a template sees it: OpenAI's JSON, in the dialect that the template expects.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::model_runtime::{Chat, Message, Role, Tool, ToolCall, ToolChoice};
use crate::sampler;

/// The length of the ids that Mistral's templates accept.
const SHORT_ID_LENGTH: usize = 9;

/// The form in which a template expects the parts of a conversation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Dialect {
    /// Message content is a list of parts.
    content_parts: bool,
    /// The arguments of calls are JSON text, not an object.
    argument_text: bool,
    /// The template tells the model about tools.
    pub(super) takes_tools: bool,
    /// The ids of calls are nine letters and digits, as in Mistral's templates.
    short_ids: bool,
}

impl Dialect {
    /// Detects the dialect by rendering words that are easy to find in the output. `render` returns an empty string
    /// on failure.
    pub(super) fn find(render: impl Fn(Map<String, Value>) -> String) -> Self {
        const SAID: &str = "needle-said";
        const LONG_ID: &str = "call_0123456789abcdef";
        let asks = Message::new(Role::User, SAID);
        let chat = |messages: Vec<Message>| Chat {
            messages,
            tools: vec![Tool { name: "needle_tool".into(), description: Some("finds".into()), parameters: None }],
            ..Chat::default()
        };
        let shows = |dialect: Self| render(dialect.variables(&Chat::from(vec![asks.clone()]))).contains(SAID);
        let in_parts = Self { content_parts: true, ..Self::default() };
        let mut found = if !shows(Self::default()) && shows(in_parts) { in_parts } else { Self::default() };

        let call = ToolCall {
            id: "needle001".into(),
            name: "needle_tool".into(),
            arguments: r#"{"needle_key":"needle_value"}"#.into(),
        };
        let calls = Message { tool_calls: vec![call.clone()], ..Message::new(Role::Assistant, "") };
        let answers =
            Message { tool_call_id: Some(call.id), name: Some(call.name), ..Message::new(Role::Tool, "needle-result") };
        let called = chat(vec![asks.clone(), calls, answers]);
        // A model should see neither Python's notation of an object nor JSON inside JSON.
        let shows_call = |dialect: Self, unwanted: &str| {
            let prompt = render(dialect.variables(&called));
            prompt.contains("needle_key") && prompt.contains("needle_value") && !prompt.contains(unwanted)
        };
        let as_text = Self { argument_text: true, ..found };
        found.argument_text = !shows_call(found, "'needle_key'") && shows_call(as_text, r#"\"needle_key"#);
        found.takes_tools = render(found.variables(&chat(vec![asks]))).contains("needle_tool");
        let mut long = called.clone();
        for message in &mut long.messages {
            message.tool_calls.iter_mut().for_each(|call| call.id = LONG_ID.into());
            message.tool_call_id = message.tool_call_id.take().map(|_| LONG_ID.into());
        }
        let shows = |chat: &Chat| render(found.variables(chat)).contains("needle_value");
        found.short_ids = shows(&called) && !shows(&long);
        found
    }

    /// Returns the variables of a template.
    pub(super) fn variables(self, chat: &Chat) -> Map<String, Value> {
        let mut variables = chat.template_options.clone();
        // Hugging Face always defines these.
        variables.insert("documents".into(), Value::Null);
        let tools = if offers_tools(chat) { chat.tools.iter().map(tool).collect() } else { Value::Null };
        variables.insert("tools".into(), tools);
        let shortened = if self.short_ids { shortened_ids(chat) } else { BTreeMap::new() };
        let id = |id: &str| shortened.get(id).cloned().unwrap_or_else(|| id.to_owned());
        variables.insert("messages".into(), chat.messages.iter().map(|said| self.message(said, &id)).collect());
        variables.insert("add_generation_prompt".into(), (!chat.continue_last).into());
        variables
    }

    /// A missing field is left undefined, since templates check for that.
    fn message(self, message: &Message, id: &dyn Fn(&str) -> String) -> Value {
        let mut fields = Map::new();
        fields.insert("role".into(), message.role.as_str().into());
        let content = message.content.as_str();
        let content = if self.content_parts { json!([{ "type": "text", "text": content }]) } else { content.into() };
        fields.insert("content".into(), content);
        if let Some(reasoning) = &message.reasoning {
            // `reasoning_content` is the name in most templates, `thinking` the one in gpt-oss.
            fields.insert("reasoning_content".into(), reasoning.as_str().into());
            fields.insert("thinking".into(), reasoning.as_str().into());
        }
        if !message.tool_calls.is_empty() {
            fields.insert("tool_calls".into(), message.tool_calls.iter().map(|call| self.call(call, id)).collect());
        }
        if let Some(answered) = &message.tool_call_id {
            fields.insert("tool_call_id".into(), id(answered).into());
        }
        if let Some(name) = &message.name {
            fields.insert("name".into(), name.as_str().into());
        }
        Value::Object(fields)
    }

    fn call(self, call: &ToolCall, id: &dyn Fn(&str) -> String) -> Value {
        let as_text = || Value::from(call.arguments.as_str());
        let arguments = match serde_json::from_str(&call.arguments) {
            Ok(Value::Object(object)) if !self.argument_text => Value::Object(object),
            _ => as_text(),
        };
        json!({ "id": id(&call.id), "type": "function", "function": { "name": call.name, "arguments": arguments } })
    }
}

/// Returns whether the model is told about tools.
pub(super) fn offers_tools(chat: &Chat) -> bool {
    !chat.tools.is_empty() && chat.tool_choice != ToolChoice::None
}

/// Returns the conversation with an empty description and empty properties for tools that lack them. OpenAI's clients
/// may omit these, but some templates read them anyway.
pub(super) fn with_whole_tools(chat: &Chat) -> Chat {
    let mut chat = chat.clone();
    for tool in &mut chat.tools {
        tool.description.get_or_insert_default();
        if let Some(Value::Object(schema)) = &mut tool.parameters {
            schema.entry("type").or_insert_with(|| "object".into());
            schema.entry("properties").or_insert_with(|| json!({}));
        }
    }
    chat
}

/// Maps the ids of a conversation that are not nine letters and digits to ids that are. Like vLLM, it takes the end
/// of each id, or a hash if the end is too short or already taken.
fn shortened_ids(chat: &Chat) -> BTreeMap<String, String> {
    let is_short = |id: &str| id.len() == SHORT_ID_LENGTH && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let called = chat.messages.iter().flat_map(|message| message.tool_calls.iter().map(|call| &call.id));
    let ids: BTreeSet<&String> =
        called.chain(chat.messages.iter().filter_map(|message| message.tool_call_id.as_ref())).collect();
    let mut used: BTreeSet<String> = ids.iter().filter(|id| is_short(id)).map(|id| (*id).clone()).collect();
    let mut shortened = BTreeMap::new();
    for id in ids.into_iter().filter(|id| !is_short(id)) {
        let letters: String = id.chars().filter(char::is_ascii_alphanumeric).collect();
        let mut short = letters[letters.len().saturating_sub(SHORT_ID_LENGTH)..].to_owned();
        let seed = id.bytes().fold(0, |seed, byte| sampler::hash(seed, byte.into()));
        let mut tries = 0;
        while short.len() < SHORT_ID_LENGTH || !used.insert(short.clone()) {
            short = format!("{:09x}", sampler::hash(seed, tries) >> 28);
            tries += 1;
        }
        shortened.insert(id.clone(), short);
    }
    shortened
}

fn tool(tool: &Tool) -> Value {
    let mut function = Map::new();
    function.insert("name".into(), tool.name.as_str().into());
    if let Some(description) = &tool.description {
        function.insert("description".into(), description.as_str().into());
    }
    // Templates iterate over the properties without checking that there are any.
    let parameters = tool.parameters.clone().unwrap_or_else(|| json!({ "type": "object", "properties": {} }));
    function.insert("parameters".into(), parameters);
    json!({ "type": "function", "function": function })
}

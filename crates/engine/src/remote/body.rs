//! Builds the request body for a server.
//!
//! Parameters that a request leaves unset are left to the server, which knows the defaults of its models. Parameters
//! that the server does not support are refused, not dropped.

use serde_json::{Map, Value, json};

use super::dialect::Dialect;
use crate::json_form;
use crate::model_runtime::{
    Chat, EngineError, GenerateRequest, LeftToModel, Message, OutputFormat, PromptInput, Sampling, Tool, ToolChoice,
    unsupported,
};

/// A request to a server.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    /// The path, relative to the server's address.
    pub(super) path: &'static str,
    pub(super) body: Value,
}

/// Builds the request for a generation.
pub(super) fn generation(
    dialect: Dialect,
    model: &str,
    context_length: u32,
    request: &GenerateRequest,
) -> Result<Call, EngineError> {
    if request.adapter.is_some() {
        return Err(unsupported("adapter", "a remote server has none; it lists them as models"));
    }
    if !request.continued.is_empty() {
        return Err(unsupported("continued", "a remote server cannot go on with another's answer"));
    }
    if request.deterministic {
        return Err(unsupported("deterministic", "a remote server does not promise it"));
    }
    let mut body = Map::new();
    body.insert("model".into(), model.into());
    body.insert("stream".into(), true.into());
    let mut stream_options = json!({"include_usage": true});
    // With these options, servers report the prompt's length in the first chunk, so that callers who leave early are
    // billed for it.
    match dialect {
        Dialect::Vllm | Dialect::Sglang => stream_options["continuous_usage_stats"] = true.into(),
        Dialect::LlamaServer => {
            body.insert("return_progress".into(), true.into());
        }
        _ => {}
    }
    body.insert("stream_options".into(), stream_options);
    add_sampling(&mut body, dialect, context_length, &request.sampling, request.left_to_model)?;
    if !request.stop.is_empty() {
        body.insert("stop".into(), json!(request.stop));
    }
    if request.echo {
        return Err(unsupported("echo", "the server that runs this model is not asked to repeat its prompt"));
    }
    if request.suffix.is_some() {
        return Err(unsupported("suffix", "the server that runs this model is not asked to fill in texts"));
    }
    // A constrained answer ends with its constraint.
    if request.ignore_eos && !has_form(request) {
        match dialect {
            Dialect::Vllm | Dialect::Sglang | Dialect::LlamaServer => body.insert("ignore_eos".into(), true.into()),
            _ => return Err(unknown("ignore_eos", dialect)),
        };
    }
    let path = match &request.input {
        PromptInput::Chat(chat) => {
            add_chat(&mut body, dialect, chat)?;
            if let Some(most) = request.max_tokens {
                body.insert("max_tokens".into(), most.into());
            }
            if let Some(top) = request.logprobs {
                body.insert("logprobs".into(), true.into());
                body.insert("top_logprobs".into(), top.into());
            }
            "/v1/chat/completions"
        }
        PromptInput::Text(_) | PromptInput::Tokens(_) => {
            add_prompt(&mut body, dialect, request)?;
            "/v1/completions"
        }
    };
    add_format(&mut body, dialect, &request.format, path)?;
    Ok(Call { path, body: body.into() })
}

/// Returns whether the answer is constrained and so ends with its constraint.
fn has_form(request: &GenerateRequest) -> bool {
    let must_call = |chat: &Chat| matches!(chat.tool_choice, ToolChoice::Required | ToolChoice::Function(_));
    request.format != OutputFormat::Text || matches!(&request.input, PromptInput::Chat(chat) if must_call(chat))
}

fn add_prompt(body: &mut Map<String, Value>, dialect: Dialect, request: &GenerateRequest) -> Result<(), EngineError> {
    let prompt = match &request.input {
        PromptInput::Tokens(_) if matches!(dialect, Dialect::Ollama | Dialect::LmStudio) => {
            return Err(unsupported("prompt", format!("{} takes no tokens", dialect.as_str())));
        }
        PromptInput::Tokens(tokens) => json!(tokens),
        PromptInput::Text(text) => json!(text),
        PromptInput::Chat(_) => Value::Null,
    };
    body.insert("prompt".into(), prompt);
    match (request.max_tokens, dialect) {
        (Some(most), _) => body.insert("max_tokens".into(), most.into()),
        // If the field is missing, servers use OpenAI's default of 16.
        (None, Dialect::Vllm | Dialect::Sglang | Dialect::Other) => body.insert("max_tokens".into(), Value::Null),
        (None, _) => None,
    };
    if let Some(top) = request.logprobs {
        body.insert("logprobs".into(), top.into());
    }
    Ok(())
}

fn add_sampling(
    body: &mut Map<String, Value>,
    dialect: Dialect,
    context_length: u32,
    sampling: &Sampling,
    left: LeftToModel,
) -> Result<(), EngineError> {
    let mut set = |name: &str, is_left: bool, value: Value| {
        if !is_left {
            body.insert(name.into(), value);
        }
    };
    set("temperature", left.temperature, sampling.temperature.into());
    set("top_p", left.top_p, sampling.top_p.into());
    let top_k = i64::from(sampling.top_k);
    match dialect {
        Dialect::Vllm | Dialect::Sglang => {
            set("top_k", left.top_k, if top_k == 0 { -1 } else { top_k }.into());
            set("min_p", left.min_p, sampling.min_p.into());
            set("repetition_penalty", left.repetition_penalty, sampling.repetition_penalty.into());
        }
        Dialect::LlamaServer | Dialect::LmStudio => {
            set("top_k", left.top_k, top_k.into());
            set("min_p", left.min_p, sampling.min_p.into());
            set("repeat_penalty", left.repetition_penalty, sampling.repetition_penalty.into());
            // Penalties apply to the whole prompt and answer.
            let last_n = context_length.into();
            set("repeat_last_n", left.repetition_penalty || dialect == Dialect::LmStudio, last_n);
        }
        Dialect::Ollama | Dialect::Other => {
            for (parameter, is_neutral) in [
                ("top_k", left.top_k || top_k == 0),
                ("min_p", left.min_p || sampling.min_p <= 0.0),
                (
                    "repetition_penalty",
                    left.repetition_penalty || (sampling.repetition_penalty - 1.0).abs() < f32::EPSILON,
                ),
            ] {
                if !is_neutral {
                    return Err(unknown(parameter, dialect));
                }
            }
        }
    }
    body.insert("presence_penalty".into(), sampling.presence_penalty.into());
    body.insert("frequency_penalty".into(), sampling.frequency_penalty.into());
    // Servers accept seeds of 31 to 64 bits. Small seeds, which people write, are passed unchanged.
    body.insert("seed".into(), ((sampling.seed ^ (sampling.seed >> 32)) & 0x7fff_ffff).into());
    if !sampling.logit_bias.is_empty() {
        if dialect == Dialect::Ollama {
            return Err(unknown("logit_bias", dialect));
        }
        let biases: Map<_, _> =
            sampling.logit_bias.iter().map(|(token, bias)| (token.to_string(), (*bias).into())).collect();
        body.insert("logit_bias".into(), biases.into());
    }
    Ok(())
}

fn add_chat(body: &mut Map<String, Value>, dialect: Dialect, chat: &Chat) -> Result<(), EngineError> {
    body.insert("messages".into(), chat.messages.iter().map(message).collect());
    if !chat.tools.is_empty() && !matches!(chat.tool_choice, ToolChoice::None) {
        body.insert("tools".into(), chat.tools.iter().map(tool).collect());
        let choice = match &chat.tool_choice {
            ToolChoice::Auto | ToolChoice::None => json!("auto"),
            ToolChoice::Required => json!("required"),
            ToolChoice::Function(name) => json!({"type": "function", "function": {"name": name}}),
        };
        body.insert("tool_choice".into(), choice);
        if chat.one_call {
            body.insert("parallel_tool_calls".into(), false.into());
        }
    }
    if chat.continue_last {
        match dialect {
            Dialect::Vllm | Dialect::Sglang => {
                body.insert("continue_final_message".into(), true.into());
                body.insert("add_generation_prompt".into(), false.into());
            }
            // llama-server continues an assistant's last message by default.
            Dialect::LlamaServer => {}
            _ => return Err(unknown("continue_final_message", dialect)),
        }
    }
    template_options(chat.template_options.clone(), dialect, body)
}

/// Writes what the prompt of a conversation consists of, for servers that count its tokens.
pub(super) fn prompt(chat: &Chat, dialect: Dialect) -> Result<Map<String, Value>, EngineError> {
    let mut body = Map::new();
    add_chat(&mut body, dialect, chat)?;
    body.retain(|name, _| !["tool_choice", "parallel_tool_calls"].contains(&name.as_str()));
    Ok(body)
}

/// Writes the variables for the chat template. Other servers have a word for the effort alone. Whether the model
/// reasons at all is a wish, which our own engine too grants only if the template knows of it.
fn template_options(
    mut options: Map<String, Value>,
    dialect: Dialect,
    body: &mut Map<String, Value>,
) -> Result<(), EngineError> {
    if !matches!(dialect, Dialect::Vllm | Dialect::Sglang | Dialect::LlamaServer) {
        options.remove("enable_thinking");
        body.extend(options.remove("reasoning_effort").map(|effort| ("reasoning_effort".to_owned(), effort)));
        return if options.is_empty() { Ok(()) } else { Err(unknown("chat_template_kwargs", dialect)) };
    }
    if !options.is_empty() {
        body.insert("chat_template_kwargs".into(), options.into());
    }
    Ok(())
}

/// Writes a message in the form of OpenAI's API. Reasoning is written under both names that are in use.
pub(super) fn message(message: &Message) -> Value {
    let Message { role, content, reasoning, tool_calls, tool_call_id, name } = message;
    let mut written = Map::new();
    written.insert("role".into(), role.as_str().into());
    written.insert("content".into(), content.as_str().into());
    if let Some(reasoning) = reasoning {
        written.insert("reasoning_content".into(), reasoning.as_str().into());
        written.insert("reasoning".into(), reasoning.as_str().into());
    }
    if !tool_calls.is_empty() {
        let calls = tool_calls.iter().map(|call| {
            let function = json!({"name": call.name, "arguments": call.arguments});
            json!({"id": call.id, "type": "function", "function": function})
        });
        written.insert("tool_calls".into(), calls.collect());
    }
    for (field, text) in [("tool_call_id", tool_call_id), ("name", name)] {
        if let Some(text) = text {
            written.insert(field.into(), text.as_str().into());
        }
    }
    written.into()
}

fn tool(tool: &Tool) -> Value {
    let Tool { name, description, parameters } = tool;
    let mut function = Map::new();
    function.insert("name".into(), name.as_str().into());
    if let Some(description) = description {
        function.insert("description".into(), description.as_str().into());
    }
    if let Some(parameters) = parameters {
        function.insert("parameters".into(), parameters.clone());
    }
    json!({"type": "function", "function": function})
}

fn add_format(
    body: &mut Map<String, Value>,
    dialect: Dialect,
    format: &OutputFormat,
    path: &str,
) -> Result<(), EngineError> {
    let is_chat = path == "/v1/chat/completions";
    let read = |schema: &Value| {
        let mut schema = schema.clone();
        let strict = !json_form::take_lenient(&mut schema);
        (schema, strict)
    };
    let field = match (format, dialect) {
        (OutputFormat::Text, _) => return Ok(()),
        // llama-server supports its own field only for text prompts.
        (OutputFormat::Json, Dialect::LlamaServer) if !is_chat => ("json_schema", json!({"type": "object"})),
        (OutputFormat::JsonSchema(schema), Dialect::LlamaServer) if !is_chat => ("json_schema", read(schema).0),
        (OutputFormat::Json | OutputFormat::JsonSchema(_), Dialect::Ollama | Dialect::LmStudio | Dialect::Other)
            if !is_chat =>
        {
            return Err(unsupported("response_format", format!("{} takes it with messages only", dialect.as_str())));
        }
        (OutputFormat::Json, _) => ("response_format", json!({"type": "json_object"})),
        (OutputFormat::JsonSchema(schema), _) => {
            let (schema, strict) = read(schema);
            let named = json!({"name": "answer", "schema": schema, "strict": strict});
            ("response_format", json!({"type": "json_schema", "json_schema": named}))
        }
        (OutputFormat::Regex(expression), Dialect::Vllm) => ("structured_outputs", json!({"regex": expression})),
        (OutputFormat::Regex(expression), Dialect::Sglang) => ("regex", json!(expression)),
        (OutputFormat::Regex(_) | OutputFormat::Lark(_), _) => return Err(unknown("response_format", dialect)),
    };
    body.insert(field.0.into(), field.1);
    Ok(())
}

fn unknown(parameter: &str, dialect: Dialect) -> EngineError {
    unsupported(parameter, format!("{} has no word for it", dialect.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_runtime::{ModelId, Role, ToolCall};

    const ALL: [Dialect; 6] =
        [Dialect::Vllm, Dialect::Sglang, Dialect::LlamaServer, Dialect::Ollama, Dialect::LmStudio, Dialect::Other];

    fn chat() -> GenerateRequest {
        let chat = Chat::from(vec![Message::new(Role::User, "hi")]);
        GenerateRequest::new(ModelId(1), PromptInput::Chat(chat))
    }

    fn prompt() -> GenerateRequest {
        GenerateRequest::new(ModelId(1), PromptInput::Text("once".into()))
    }

    fn said(dialect: Dialect, request: &GenerateRequest) -> Result<Value, EngineError> {
        generation(dialect, "m", 512, request).map(|call| call.body)
    }

    fn refused(dialect: Dialect, request: &GenerateRequest) -> String {
        match said(dialect, request) {
            Err(EngineError::Unsupported { parameter, .. }) => parameter,
            other => panic!("a refusal was expected of {dialect:?}: {other:?}"),
        }
    }

    #[test]
    fn what_is_left_to_the_model_is_left_to_the_server() {
        let left = LeftToModel { temperature: true, top_p: true, top_k: true, min_p: true, repetition_penalty: true };
        for dialect in ALL {
            let body = said(dialect, &GenerateRequest { left_to_model: left, ..chat() }).expect("said");
            for word in
                ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "repeat_penalty", "repeat_last_n"]
            {
                assert_eq!(body.get(word), None, "{word} in {dialect:?}");
            }
        }
    }

    #[test]
    fn a_schema_that_need_not_be_kept_wholly_is_not_strict() {
        let mut schema = json!({"type": "object"});
        json_form::make_lenient(&mut schema);
        let body = said(Dialect::Vllm, &GenerateRequest { format: OutputFormat::JsonSchema(schema), ..chat() });
        let expected = json!({"name": "answer", "schema": {"type": "object"}, "strict": false});
        assert_eq!(body.expect("said")["response_format"]["json_schema"], expected);
    }

    #[test]
    fn a_last_message_is_continued_where_a_server_can() {
        let last = Chat { continue_last: true, ..vec![Message::new(Role::Assistant, "Well, ")].into() };
        let request = GenerateRequest { input: PromptInput::Chat(last), ..chat() };
        let body = said(Dialect::Vllm, &request).expect("said");
        assert_eq!((&body["continue_final_message"], &body["add_generation_prompt"]), (&json!(true), &json!(false)));
        assert!(said(Dialect::LlamaServer, &request).is_ok());
        assert_eq!(refused(Dialect::Ollama, &request), "continue_final_message");
    }

    #[test]
    fn variables_of_templates_are_said_where_they_are_known_and_wishes_nowhere_refused() {
        let with = |options: Value| {
            let Value::Object(template_options) = options else { panic!("an object") };
            let said = Chat { template_options, ..vec![Message::new(Role::User, "hi")].into() };
            GenerateRequest { input: PromptInput::Chat(said), ..chat() }
        };
        let wishes = json!({"enable_thinking": false, "reasoning_effort": "low"});
        let body = said(Dialect::Vllm, &with(wishes.clone())).expect("said");
        assert_eq!(body["chat_template_kwargs"], wishes);
        let body = said(Dialect::Ollama, &with(wishes)).expect("said");
        assert_eq!((&body["reasoning_effort"], body.get("chat_template_kwargs")), (&json!("low"), None));
        assert_eq!(refused(Dialect::Ollama, &with(json!({"other": 1}))), "chat_template_kwargs");
    }

    #[test]
    fn what_is_neutral_is_said_so_in_each_dialect() {
        let stream_options = json!({"include_usage": true, "continuous_usage_stats": true});
        let continuous =
            json!({"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stream_options": stream_options});
        for (dialect, own) in [
            (Dialect::Vllm, continuous.clone()),
            (Dialect::Sglang, continuous),
            (
                Dialect::LlamaServer,
                json!({"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repeat_last_n": 512, "return_progress": true}),
            ),
            (Dialect::LmStudio, json!({"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0})),
            (Dialect::Ollama, json!({})),
            (Dialect::Other, json!({})),
        ] {
            let mut expected = json!({
                "model": "m", "stream": true, "stream_options": {"include_usage": true},
                "temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 0,
                "messages": [{"role": "user", "content": "hi"}],
            });
            expected.as_object_mut().expect("an object").extend(own.as_object().expect("an object").clone());
            assert_eq!(said(dialect, &chat()), Ok(expected), "{dialect:?}");
        }
    }

    #[test]
    fn what_a_server_has_no_word_for_is_refused_by_name() {
        let top_k = GenerateRequest { sampling: Sampling { top_k: 5, ..Sampling::default() }, ..chat() };
        let bias =
            GenerateRequest { sampling: Sampling { logit_bias: vec![(7, 1.0)], ..Sampling::default() }, ..chat() };
        let regex = GenerateRequest { format: OutputFormat::Regex("a+".into()), ..chat() };
        let tokens = GenerateRequest { input: PromptInput::Tokens(vec![1]), ..prompt() };
        assert_eq!(refused(Dialect::Other, &top_k), "top_k");
        assert_eq!(refused(Dialect::Ollama, &bias), "logit_bias");
        assert_eq!(refused(Dialect::LlamaServer, &regex), "response_format");
        assert_eq!(refused(Dialect::LmStudio, &tokens), "prompt");
        for dialect in ALL {
            assert_eq!(refused(dialect, &GenerateRequest { deterministic: true, ..chat() }), "deterministic");
            assert_eq!(refused(dialect, &GenerateRequest { continued: vec![1], ..chat() }), "continued");
        }
    }

    #[test]
    fn a_prompt_is_continued_without_openais_limit_of_16_tokens() {
        let call = generation(Dialect::Vllm, "m", 512, &prompt()).expect("said");
        assert_eq!((call.path, call.body.get("max_tokens")), ("/v1/completions", Some(&Value::Null)));
        let limited = GenerateRequest { max_tokens: Some(3), logprobs: Some(2), ..prompt() };
        let body = said(Dialect::Ollama, &limited).expect("said");
        assert_eq!((&body["prompt"], &body["max_tokens"], &body["logprobs"]), (&json!("once"), &json!(3), &json!(2)));
    }

    #[test]
    fn calls_answers_and_thoughts_are_told_as_openai_writes_them() {
        let call = ToolCall { id: "c1".into(), name: "add".into(), arguments: "{}".into() };
        let asked =
            Message { tool_calls: vec![call], reasoning: Some("hm".into()), ..Message::new(Role::Assistant, "") };
        let answered = Message { tool_call_id: Some("c1".into()), ..Message::new(Role::Tool, "3") };
        let conversation = Chat {
            messages: vec![asked, answered],
            tools: vec![Tool { name: "add".into(), description: None, parameters: Some(json!({"type": "object"})) }],
            tool_choice: ToolChoice::Function("add".into()),
            ..Chat::default()
        };
        let request = GenerateRequest::new(ModelId(1), PromptInput::Chat(conversation));
        let body = said(Dialect::Vllm, &request).expect("said");
        let function = json!({"name": "add", "arguments": "{}"});
        let calls = json!([{"id": "c1", "type": "function", "function": function}]);
        let first = json!({"role": "assistant", "content": "", "reasoning_content": "hm", "reasoning": "hm", "tool_calls": calls});
        assert_eq!(body["messages"], json!([first, {"role": "tool", "content": "3", "tool_call_id": "c1"}]));
        assert_eq!(
            body["tools"],
            json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}])
        );
        assert_eq!(body["tool_choice"], json!({"type": "function", "function": {"name": "add"}}));
    }

    #[test]
    fn forms_are_asked_for_in_the_servers_own_field() {
        let schema = json!({"type": "object"});
        let formed = |format: &OutputFormat, request| GenerateRequest { format: format.clone(), ..request };
        let (regex, shaped) = (OutputFormat::Regex("a+".into()), OutputFormat::JsonSchema(schema.clone()));
        let field =
            |dialect, request: GenerateRequest, field: &str| said(dialect, &request).expect("said")[field].clone();
        assert_eq!(field(Dialect::Vllm, formed(&regex, chat()), "structured_outputs"), json!({"regex": "a+"}));
        assert_eq!(field(Dialect::Sglang, formed(&regex, chat()), "regex"), json!("a+"));
        assert_eq!(field(Dialect::LlamaServer, formed(&shaped, prompt()), "json_schema"), schema);
        let named = json!({"name": "answer", "schema": schema, "strict": true});
        let expected = json!({"type": "json_schema", "json_schema": named});
        assert_eq!(field(Dialect::Ollama, formed(&shaped, chat()), "response_format"), expected);
    }

    #[test]
    fn seeds_keep_to_31_bits_and_small_ones_stay() {
        for (seed, sent) in [(42, 42), (u64::MAX, 0), (1 << 40, 1 << 8)] {
            let request = GenerateRequest { sampling: Sampling { seed, ..Sampling::default() }, ..chat() };
            assert_eq!(said(Dialect::Vllm, &request).expect("said")["seed"], json!(sent));
        }
    }
}

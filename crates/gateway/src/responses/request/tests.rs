use proptest::prelude::*;
use protocol::ErrorCode;
use protocol::infer::{Message, OutputFormat, Role, ToolCall, ToolChoice};
use protocol::policy::ServiceClass;
use serde_json::{Value, json};

use super::*;

fn parse(change: Value) -> Result<ResponseRequest, WireError> {
    let mut body = json!({"model": "m", "input": "hi"});
    let Value::Object(change) = change else { panic!("an object") };
    body.as_object_mut().expect("an object").extend(change);
    parse_response(body.to_string().as_bytes())
}

#[track_caller]
fn refused(change: Value, code: ErrorCode, param: &str) {
    let error = parse(change).expect_err(param);
    assert_eq!((error.code, error.param.as_deref()), (code, Some(param)), "{error}");
}

fn messages(change: Value) -> Vec<Message> {
    parse(change).expect("well formed").job.input.messages.expect("messages")
}

fn assistant(content: &str, reasoning: Option<&str>, calls: &[(&str, &str, &str)]) -> Message {
    let call = |(id, name, arguments): &(&str, &str, &str)| ToolCall {
        id: (*id).into(),
        name: (*name).into(),
        arguments: (*arguments).into(),
    };
    let (reasoning, tool_calls) = (reasoning.map(str::to_owned), calls.iter().map(call).collect());
    Message { reasoning, tool_calls, ..Message::new(Role::Assistant, content) }
}

fn result(id: &str, content: &str) -> Message {
    Message { tool_call_id: Some(id.into()), ..Message::new(Role::Tool, content) }
}

#[test]
fn a_plain_request_is_read() {
    let request = parse(json!({
        "stream": true, "stream_options": {"include_obfuscation": false}, "max_output_tokens": 5, "temperature": 0,
        "top_p": 0.5, "reasoning": {"effort": "low", "summary": "auto"}, "service_tier": "flex",
        "include": ["reasoning.encrypted_content", "message.output_text.logprobs"], "top_logprobs": 2,
        "text": {"verbosity": "low"}, "parallel_tool_calls": false, "prompt_cache_key": "k", "store": false,
        "client_metadata": {"any": "thing"}, "truncation": "disabled", "user": "u", "safety_identifier": "s",
    }));
    let request = request.expect("well formed");
    assert_eq!((request.stream, &*request.model, request.job.class), (true, "m", Some(ServiceClass::Batch)));
    let input = request.job.input;
    assert_eq!(input.messages, Some(vec![Message::new(Role::User, "hi")]));
    assert_eq!((input.max_tokens, input.temperature, input.top_p), (Some(5), Some(0.0), Some(0.5)));
    assert_eq!((input.logprobs, input.one_call), (Some(2), true));
    assert_eq!(input.template_options["reasoning_effort"], "low");
    let echo = serde_json::to_value(request.echo).expect("JSON");
    assert_eq!(echo["reasoning"], json!({"effort": "low", "summary": "auto"}));
    assert_eq!(echo["text"], json!({"format": {"type": "text"}, "verbosity": "low"}));
    assert_eq!((&echo["user"], &echo["prompt_cache_key"]), (&json!("u"), &json!("k")));
}

#[test]
fn items_become_the_messages_of_a_conversation() {
    let read = messages(json!({"instructions": "be brief", "input": [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}], "content": null},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "2", "name": "patch", "input": "x\n"},
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "now"}]},
        {"type": "function_call", "call_id": "3", "namespace": "mcp__n__", "name": "g", "arguments": "{\"a\":1}"},
        {"role": "system", "content": "go on"},
    ]}));
    let expected = [
        Message::new(Role::System, "be brief\n\nbe kind"),
        Message::new(Role::User, "ab"),
        assistant("c", Some("hm"), &[("1", "f", "{}"), ("2", "patch", r#"{"input":"x\n"}"#)]),
        result("1", "one"),
        result("2", "two"),
        assistant("", Some("now"), &[("3", "mcp__n__g", r#"{"a":1}"#)]),
        Message::new(Role::System, "go on"),
    ];
    assert_eq!(read, expected);
}

#[test]
fn functions_custom_tools_and_namespaces_are_offered_and_other_tools_are_skipped() {
    let request = parse(json!({"tools": [
        {"type": "web_search", "filters": {}},
        {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true},
        {"type": "custom", "name": "patch", "description": "p",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}},
        {"type": "namespace", "name": "crm", "description": "n", "tools": [
            {"type": "function", "name": "find", "parameters": null}, {"type": "tool_search"}]},
        {"type": "mcp", "name": 7},
    ]}));
    let request = request.expect("well formed");
    let tools = request.job.input.tools;
    let names: Vec<&str> = tools.iter().map(|tool| &*tool.name).collect();
    assert_eq!(names, ["f", "patch", "crm__find"]);
    assert!(tools[1].description.as_deref().is_some_and(|text| text.starts_with("p\n") && text.contains("start: X")));
    assert_eq!(tools[1].parameters.as_ref().expect("schema")["required"], json!(["input"]));
    assert!(request.names.of("patch").is_custom);
    assert_eq!(request.names.of("crm__find").namespace.as_deref(), Some("crm"));
    assert_eq!(serde_json::to_value(&request.echo).expect("JSON")["tools"].as_array().map(Vec::len), Some(5));
}

#[test]
fn a_choice_of_tools_has_many_forms() {
    let tools = json!([
        {"type": "function", "name": "f"}, {"type": "custom", "name": "patch"},
        {"type": "namespace", "name": "crm", "tools": [{"type": "function", "name": "find"}]},
    ]);
    let choose = |choice: Value| {
        let input = parse(json!({"tools": tools, "tool_choice": choice})).expect("well formed").job.input;
        let names: Vec<String> = input.tools.into_iter().map(|tool| tool.name).collect();
        (input.tool_choice, names.join(" "), input.one_call)
    };
    let all = || "f patch crm__find".to_owned();
    let function = |name: &str| ToolChoice::Function(name.into());
    for (choice, expected) in [
        (json!(null), (ToolChoice::Auto, all(), false)),
        (json!("none"), (ToolChoice::None, all(), false)),
        (json!("required"), (ToolChoice::Required, all(), true)),
        (json!({"type": "function", "name": "f"}), (function("f"), all(), false)),
        (json!({"type": "custom", "name": "patch"}), (function("patch"), all(), false)),
        (json!({"type": "function", "namespace": "crm", "name": "find"}), (function("crm__find"), all(), false)),
        (
            json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}),
            (ToolChoice::Required, "f".into(), true),
        ),
    ] {
        assert_eq!(choose(choice.clone()), expected, "{choice}");
    }
}

#[test]
fn the_format_of_the_answer_is_a_constraint() {
    let format = |format: Value| parse(json!({"text": {"format": format}})).map(|request| request.job.input.format);
    let schema = json!({"type": "object"});
    assert_eq!(format(json!({"type": "text"})), Ok(OutputFormat::Text));
    assert_eq!(format(json!({"type": "json_object"})), Ok(OutputFormat::Json));
    let strict = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    assert_eq!(format(strict), Ok(OutputFormat::JsonSchema(schema)));
}

#[test]
fn each_response_is_read_once_and_blamed_where_it_is_first_referred_to() {
    let reference =
        |job: u128, item: usize| json!({"type": "item_reference", "id": format!("msg_{job:032x}{item:02}")});
    let input = json!([reference(9, 0), reference(7, 0), reference(9, 1)]);
    let referred = parse(json!({"input": input})).expect("well formed").referred().expect("jobs");
    let referred: Vec<_> = referred.into_iter().map(|(job, index)| (job.0.as_u128(), id_param(index))).collect();
    assert_eq!(referred, [(7, "input[1].id".to_owned()), (9, "input[0].id".to_owned())]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    use ErrorCode::{InvalidValue, UnsupportedParameter};
    let item = |item: Value| json!({ "input": [item] });
    for (change, code, param) in [
        (json!({"model": ""}), ErrorCode::MissingModel, "model"),
        (json!({"input": null}), InvalidValue, "input"),
        (json!({"input": []}), InvalidValue, "input"),
        (json!({"background": true, "store": false}), InvalidValue, "background"),
        (json!({"conversation": "conv_1"}), UnsupportedParameter, "conversation"),
        (json!({"prompt": {"id": "p"}}), UnsupportedParameter, "prompt"),
        (json!({"truncation": "auto"}), UnsupportedParameter, "truncation"),
        (json!({"max_output_tokens": 0}), InvalidValue, "max_output_tokens"),
        (json!({"temperature": 3}), InvalidValue, "temperature"),
        (json!({"top_logprobs": 2}), InvalidValue, "top_logprobs"),
        (json!({"stream_options": {}}), InvalidValue, "stream_options"),
        (json!({"text": {"verbosity": "loud"}}), InvalidValue, "text.verbosity"),
        (json!({"text": {"format": {"type": "json_schema"}}}), InvalidValue, "text.format.schema"),
        (json!({"text": {"format": {"type": "yaml"}}}), UnsupportedParameter, "text.format.type"),
        (json!({"reasoning": {"effort": "huge"}}), InvalidValue, "reasoning.effort"),
        (json!({"metadata": {"a": 1}}), InvalidValue, "metadata"),
        (json!({"service_tier": "scale"}), InvalidValue, "service_tier"),
        (json!({"tool_choice": {"type": "web_search"}}), UnsupportedParameter, "tool_choice.type"),
        (json!({"tool_choice": {"type": "function"}}), InvalidValue, "tool_choice.name"),
        (json!({"tool_choice": 7}), InvalidValue, "tool_choice"),
        (json!({"tools": [{"name": "f"}]}), InvalidValue, "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), InvalidValue, "tools[0].name"),
        (json!({"tools": [{"type": "function", "name": 7}]}), InvalidValue, "tools[0]"),
        (
            json!({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]}),
            InvalidValue,
            "tools[0].tools[0].name",
        ),
        (
            json!({"tools": [{"type": "function", "name": "f", "parameters": {"type": "string"}}]}),
            InvalidValue,
            "tools[0].parameters",
        ),
        (item(json!({"type": "item_reference"})), InvalidValue, "input[0].id"),
        (item(json!({"type": "web_search_call"})), UnsupportedParameter, "input[0].type"),
        (item(json!({"content": "x"})), InvalidValue, "input[0].role"),
        (item(json!({"role": "user"})), InvalidValue, "input[0].content"),
        (item(json!({"role": "tool", "content": "x"})), InvalidValue, "input[0].role"),
        (
            item(json!({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]})),
            UnsupportedParameter,
            "input[0].content[0]",
        ),
        (item(json!({"type": "function_call", "name": "f", "arguments": "{}"})), InvalidValue, "input[0].call_id"),
        (item(json!({"type": "function_call", "call_id": "1", "name": "f"})), InvalidValue, "input[0].arguments"),
        (item(json!({"type": "custom_tool_call", "call_id": "1", "name": "f"})), InvalidValue, "input[0].input"),
        (item(json!({"type": "function_call_output", "call_id": "1"})), InvalidValue, "input[0].output"),
        (item(json!({"type": "reasoning", "content": [{"type": "x"}]})), InvalidValue, "input[0].content[0].text"),
    ] {
        refused(change, code, param);
    }
}

#[test]
fn deep_bodies_are_errors() {
    for opening in [r#"{"model":"m","input":"#, r#"{"model":"m","input":"hi","tools":"#, r#"{"model":"m","x":"#] {
        let deep = format!("{opening}{}", "[".repeat(100_000));
        let code = parse_response(deep.as_bytes()).expect_err("deep").code;
        assert!(matches!(code, ErrorCode::InvalidJson | ErrorCode::InvalidValue), "{opening}: {code}");
    }
    let mut nested = json!({"type": "function", "name": "f"});
    for _ in 0..50 {
        nested = json!({"type": "namespace", "name": "n", "tools": [nested]});
    }
    assert!(parse(json!({"tools": [nested]})).expect("read").job.input.tools.is_empty());
}

proptest! {
    #[test]
    fn nothing_panics(bytes: Vec<u8>, text in r#"\{"model":"m","input":[\[{"a-z:,}\]]{0,60}\}"#) {
        let _ = parse_response(&bytes);
        let _ = parse_response(text.as_bytes());
    }
}

use proptest::prelude::*;
use protocol::ErrorCode;
use protocol::infer::{Input, Message, OutputFormat, Role, Tool, ToolCall, ToolChoice};
use protocol::policy::ServiceClass;
use serde_json::{Value, json};

use super::*;

fn order(change: Value) -> Result<MessageOrder, WireError> {
    let mut body = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]});
    let Value::Object(change) = change else { panic!("an object") };
    body.as_object_mut().expect("an object").extend(change);
    parse_messages(body.to_string().as_bytes())
}

#[track_caller]
fn input(change: Value) -> Input {
    order(change).expect("well formed").job.input
}

#[track_caller]
fn messages(messages: Value) -> Vec<Message> {
    input(json!({ "messages": messages })).messages.expect("given")
}

fn said(role: Role, text: &str) -> Message {
    Message::new(role, text)
}

/// Returns code, parameter and message of a refusal.
#[track_caller]
fn refusal(change: Value) -> (ErrorCode, Option<String>, String) {
    let error = order(change.clone()).expect_err(&change.to_string());
    (error.code, error.param, error.message)
}

#[test]
fn a_plain_request_is_read() {
    let order = order(json!({
        "model": "tether-tiny@1.0", "stream": true, "temperature": 0.5, "top_p": 0.5, "top_k": 40,
        "stop_sequences": ["END"], "service_tier": "standard_only", "metadata": {"user_id": "ada"}
    }))
    .expect("well formed");
    assert!(order.stream);
    assert_eq!((order.model.as_str(), order.job.class), ("tether-tiny@1.0", Some(ServiceClass::Standard)));
    let input = order.job.input;
    assert_eq!(input.messages, Some(vec![said(Role::User, "hi")]));
    assert_eq!(
        (input.max_tokens, input.temperature, input.top_p, input.top_k),
        (Some(9), Some(0.5), Some(0.5), Some(40))
    );
    assert_eq!((input.stop, input.continue_last), (vec!["END".to_owned()], false));
}

#[test]
fn unknown_fields_and_types_of_tools_have_no_effect() {
    let plain = input(json!({}));
    for change in [
        json!({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}, "container": "c", "speed": "fast"}),
        json!({"cache_control": {"type": "ephemeral"}, "mcp_servers": [], "inference_geo": "us"}),
        json!({"tools": [{"type": "bash_20250124", "name": "bash"}, {"type": "web_search_20250305", "max_uses": 5}]}),
        json!({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral", "ttl": "1h"}, "citations": null}
        ]}]}),
        json!({"system": "", "tools": null, "thinking": null, "output_config": {"format": null}}),
    ] {
        assert_eq!(input(change.clone()), plain, "{change}");
    }
}

#[test]
fn instructions_come_as_a_text_in_blocks_or_among_the_messages() {
    let hi = json!({"role": "user", "content": "hi"});
    let blocks = json!([{"type": "text", "text": "be brief"}, {"type": "text", "text": "be kind"}]);
    let both = [said(Role::System, "be brief\nbe kind"), said(Role::User, "hi")];
    for change in [
        json!({"system": "be brief\nbe kind"}),
        json!({ "system": blocks }),
        json!({"messages": [{"role": "system", "content": blocks}, hi]}),
        json!({"system": "be brief", "messages": [{"role": "system", "content": "be kind"}, hi]}),
    ] {
        assert_eq!(input(change.clone()).messages.expect("given"), both, "{change}");
    }
}

#[test]
fn later_instructions_are_marked_in_a_users_message() {
    let read = messages(json!([
        {"role": "user", "content": "hi"},
        {"role": "system", "content": [
            {"type": "text", "text": "be kind"},
            {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "f"}},
        ]},
        {"role": "system", "output_config": {"effort": "low"}},
    ]));
    assert_eq!(read, [said(Role::User, "hi\n<system-reminder>\nbe kind\n</system-reminder>")]);
}

#[test]
fn whom_claude_code_wants_billed_is_no_instruction() {
    let blocks = json!([
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1.2.3;"}, {"type": "text", "text": "be brief"}
    ]);
    let read = input(json!({ "system": blocks })).messages.expect("given");
    assert_eq!(read, [said(Role::System, "be brief"), said(Role::User, "hi")]);
}

#[test]
fn messages_of_one_author_in_a_row_are_one() {
    let read = messages(json!([
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": "x"},
        {"role": "assistant", "content": [{"type": "text", "text": "y"}]},
        {"role": "user", "content": "d"},
    ]));
    let expected = [said(Role::User, "a\nb\nc"), said(Role::Assistant, "xy"), said(Role::User, "d")];
    assert_eq!(read, expected);
}

#[test]
fn calls_and_their_results_are_read() {
    let read = messages(json!([
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "look"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "warm"},
            {"type": "tool_result", "tool_use_id": "c2", "is_error": true, "content": [
                {"type": "text", "text": "gone"}, {"type": "tool_reference", "tool_name": "h"}
            ]},
            {"type": "tool_result", "tool_use_id": "c3"},
            {"type": "text", "text": "and now?"},
        ]},
    ]));
    let call = |id: &str, name: &str, arguments: &str| ToolCall {
        id: id.into(),
        name: name.into(),
        arguments: arguments.into(),
    };
    let result = |id: &str, text: &str| Message { tool_call_id: Some(id.into()), ..said(Role::Tool, text) };
    let called = Message {
        reasoning: Some("hm".into()),
        tool_calls: vec![call("c1", "f", r#"{"a":1}"#), call("c2", "g", "{}")],
        ..said(Role::Assistant, "look")
    };
    let expected = [
        said(Role::User, "weather?"),
        called,
        result("c1", "warm"),
        result("c2", "Error: gone\nh"),
        result("c3", ""),
        said(Role::User, "and now?"),
    ];
    assert_eq!(read, expected);
}

#[test]
fn documents_of_text_are_read_as_text() {
    let read = messages(json!([{"role": "user", "content": [
        {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "one"}},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "two"}]}},
        {"type": "search_result", "title": "S", "source": "url", "content": [{"type": "text", "text": "three"}]},
    ]}]));
    assert_eq!(read, [said(Role::User, "T\none\ntwo\nS\nurl\nthree")]);
}

#[test]
fn what_no_model_here_can_read_is_refused_by_name() {
    let picture = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}});
    let pdf = json!({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA"}});
    let nested = json!({"type": "tool_result", "tool_use_id": "c", "content": [picture]});
    for (block, param, words) in [
        (picture.clone(), "messages[0].content[0]", "images are not supported"),
        (pdf, "messages[0].content[0]", "documents other than plain text are not supported"),
        (nested, "messages[0].content[0].content[0]", "images are not supported"),
        (json!({"type": "container_upload", "file_id": "f"}), "messages[0].content[0]", "not supported"),
        (
            json!({"type": "tool_use", "id": "c", "name": "f", "input": {}}),
            "messages[0].content[0].type",
            "not allowed",
        ),
    ] {
        let (_, named, message) = refusal(json!({"messages": [{"role": "user", "content": [block]}]}));
        assert_eq!(named.as_deref(), Some(param));
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn blocks_of_other_servers_in_an_answer_are_left_out() {
    let read = messages(json!([
        {"role": "user", "content": "find"},
        {"role": "assistant", "content": [
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s", "content": {"type": "error"}},
            {"type": "text", "text": "found"},
        ]},
        {"role": "user", "content": "where?"},
    ]));
    assert_eq!(read, [said(Role::User, "find"), said(Role::Assistant, "found"), said(Role::User, "where?")]);
}

#[test]
fn an_assistants_last_text_is_continued() {
    let begun = |content: Value| {
        let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]);
        order(json!({ "messages": messages })).map(|order| order.job.input)
    };
    assert!(begun(json!("Well, ")).expect("well formed").continue_last);
    for nothing in [json!(""), json!([])] {
        let input = begun(nothing).expect("well formed");
        assert_eq!((input.continue_last, input.messages.map(|messages| messages.len())), (false, Some(1)));
    }
    for unfinished in [
        json!([{"type": "tool_use", "id": "c", "name": "f", "input": {}}]),
        json!([{"type": "thinking", "thinking": "hm", "signature": "s"}]),
    ] {
        assert_eq!(begun(unfinished).expect_err("no text").param.as_deref(), Some("messages"));
    }
}

#[test]
fn tools_and_the_choice_among_them_reach_the_job() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let tools = json!([
        {"name": "f", "description": "finds", "input_schema": schema, "strict": true, "cache_control": null},
        {"type": "custom", "name": "g", "input_schema": {}},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
    ]);
    let offered = input(json!({ "tools": tools })).tools;
    let tool = |name: &str, description: Option<&str>, schema| Tool {
        name: name.into(),
        description: description.map(str::to_owned),
        parameters: Some(schema),
    };
    assert_eq!(offered, [tool("f", Some("finds"), schema), tool("g", None, json!({}))]);
    for (choice, expected, one_call) in [
        (json!(null), ToolChoice::Auto, false),
        (json!({"type": "auto"}), ToolChoice::Auto, false),
        (json!({"type": "auto", "disable_parallel_tool_use": true}), ToolChoice::Auto, true),
        (json!({"type": "any"}), ToolChoice::Required, true),
        (json!({"type": "any", "disable_parallel_tool_use": false}), ToolChoice::Required, false),
        (json!({"type": "tool", "name": "f"}), ToolChoice::Function("f".into()), true),
        (json!({"type": "none"}), ToolChoice::None, false),
    ] {
        let input = input(json!({"tools": tools, "tool_choice": choice}));
        assert_eq!((input.tool_choice, input.one_call), (expected, one_call), "{choice}");
    }
}

#[test]
fn thinking_and_effort_are_the_templates_variables() {
    let options = |change| Value::Object(input(change).template_options);
    for (change, expected) in [
        (json!({}), json!({"enable_thinking": false})),
        (json!({"thinking": {"type": "disabled"}}), json!({"enable_thinking": false})),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}), json!({"enable_thinking": true})),
        (json!({"thinking": {"type": "adaptive", "display": "omitted"}}), json!({})),
        (
            json!({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}),
            json!({"reasoning_effort": "xhigh"}),
        ),
    ] {
        assert_eq!(options(change.clone()), expected, "{change}");
    }
}

#[test]
fn a_format_is_a_schema_to_keep() {
    let schema = json!({"type": "object"});
    let format = json!({"type": "json_schema", "schema": schema});
    for body in [json!({"output_config": {"format": format}}), json!({"output_format": format})] {
        assert_eq!(input(body).format, OutputFormat::JsonSchema(schema.clone()));
    }
}

#[test]
fn a_count_needs_no_limit_and_generates_nothing() {
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let job = parse_message_count(body.to_string().as_bytes()).expect("well formed");
    assert_eq!((job.input.count_only, job.input.max_tokens), (true, None));
}

#[test]
fn invalid_values_name_their_field() {
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let tool = |tool: Value| json!({"tools": [tool]});
    use ErrorCode::{InvalidValue, MissingModel};
    for (change, code, param) in [
        (json!({"max_tokens": null}), InvalidValue, Some("max_tokens")),
        (json!({"max_tokens": 0}), InvalidValue, Some("max_tokens")),
        (json!({"model": null}), MissingModel, Some("model")),
        (json!({"messages": null}), InvalidValue, Some("messages")),
        (json!({"messages": []}), InvalidValue, Some("messages")),
        (json!({"messages": [{"role": "user"}]}), InvalidValue, Some("messages[0].content")),
        (json!({"temperature": 1.5}), InvalidValue, Some("temperature")),
        (json!({"temperature": -1}), InvalidValue, Some("temperature")),
        (json!({"stop_sequences": [""]}), InvalidValue, Some("stop")),
        (json!({"thread": {"type": "create"}}), ErrorCode::UnsupportedParameter, Some("thread")),
        (json!({"tool_choice": {"type": "any"}}), InvalidValue, Some("tool_choice")),
        (json!({"tool_choice": {"type": "tool", "name": "f"}}), InvalidValue, Some("tool_choice")),
        (tool(json!({"input_schema": {}})), InvalidValue, Some("tools[0].name")),
        (tool(json!({"name": "f"})), InvalidValue, Some("tools[0].input_schema")),
        (tool(json!({"name": "f", "input_schema": {"type": "string"}})), InvalidValue, Some("tools")),
        (
            json!({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "c"}]}]}),
            InvalidValue,
            Some("messages[0].content[0].type"),
        ),
    ] {
        let (found, named, _) = refusal(change.clone());
        assert_eq!((found, named.as_deref()), (code, param), "{change}");
    }
    for change in [
        json!({"max_tokens": "9"}),
        json!({"stream": 1}),
        json!({"service_tier": "fast"}),
        json!({"thinking": {"type": "deep"}}),
        json!({"tool_choice": "auto"}),
        json!({"output_config": {"format": {"type": "text"}}}),
        json!({"messages": [{"role": "tool", "content": "x"}]}),
        json!({"messages": [7]}),
        user(json!(7)),
        user(json!(["x"])),
        user(json!([{"text": "x"}])),
        user(json!([{"type": "text"}])),
        user(json!([{"type": "tool_result"}])),
    ] {
        assert_eq!(refusal(change.clone()).0.http_status(), 400, "{change}");
    }
}

#[test]
fn an_error_says_where_it_is_in_the_words_of_json() {
    let (_, _, message) = refusal(json!({"messages": [{"role": "user", "content": ["x"]}]}));
    assert!(message.contains("messages[0].content[0]") && message.contains("expected an object"), "{message}");
}

#[test]
fn hostile_bodies_are_refused_and_harm_nobody() {
    let deep = |depth: usize, open: &str, close: &str| format!("{}{}", open.repeat(depth), close.repeat(depth));
    let with = |messages: String| format!(r#"{{"model":"m","max_tokens":9,"messages":{messages}}}"#);
    let result = r#"{"type":"tool_result","tool_use_id":"c","content":["#;
    let nested = format!(r#"[{{"role":"user","content":[{}]}}]"#, deep(100_000, result, "]}"));
    let input = format!(
        r#"[{{"role":"assistant","content":[{{"type":"tool_use","id":"c","name":"f","input":{{"a":{}}}}}]}}]"#,
        deep(100_000, "[", "]")
    );
    for body in [with(nested), with(input), with(deep(100_000, "[", "]")), deep(100_000, r#"{"system":"#, "}")] {
        assert_eq!(parse_messages(body.as_bytes()).expect_err("too deep").code.http_status(), 400);
    }
    let many = format!("[{}]", vec![r#"{"role":"user","content":[]}"#; 100_000].join(","));
    assert_eq!(parse_messages(with(many).as_bytes()).expect_err("nothing was said").param.as_deref(), Some("messages"));
}

proptest! {
    #[test]
    fn no_bytes_make_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = (parse_messages(&bytes), parse_message_count(&bytes));
    }
}

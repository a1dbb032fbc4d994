use protocol::infer::TokenLogprob;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, UnixMillis};
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::responses::request::parse_response;

fn events_of(change: Value) -> Events {
    let mut body = json!({"model": "m", "input": "hi", "store": false});
    let Value::Object(change) = change else { panic!("an object") };
    body.as_object_mut().expect("an object").extend(change);
    let request = parse_response(body.to_string().as_bytes()).expect("well formed");
    let job = CorrelationId(Uuid::from_u128(7));
    Events::new(Heading::new(job, request.model, request.echo, request.names, UnixMillis(9_000)).with_tier(None))
}

fn text(text: &str) -> Content {
    Content { text: text.into(), ..Content::default() }
}

fn reasoning(text: &str) -> Content {
    Content { reasoning: text.into(), ..Content::default() }
}

fn call(index: u32, name: Option<&str>, arguments: &str) -> Content {
    let (id, name) = (name.map(|name| format!("call_{name}")), name.map(str::to_owned));
    Content { tool_calls: vec![ToolCallDelta { index, id, name, arguments: arguments.into() }], ..Content::default() }
}

const USAGE: TokenUsage = TokenUsage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 1, reasoning_tokens: 0 };

fn write(events: &mut Events, contents: Vec<Content>, reason: FinishReason) -> Vec<Value> {
    let mut out = BytesMut::new();
    let count = contents.len() as u64;
    for (seq, content) in (0..).zip(contents) {
        events.piece(&piece(seq, content, None), &mut out);
    }
    events.piece(&piece(count, Content::default(), Some(End { reason, usage: USAGE })), &mut out);
    read(&out)
}

fn piece(seq: u64, content: Content, end: Option<End>) -> Piece {
    Piece { raw: Bytes::new(), seq, attempt: 1, model: None, content, end }
}

/// Reads events, and checks that each has its name and its number.
fn read(out: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(out).expect("text");
    let events: Vec<Value> = text
        .split_terminator("\n\n")
        .map(|event| {
            let (name, data) = event.split_once("\ndata: ").expect("an event");
            let data: Value = serde_json::from_str(data).expect("JSON");
            assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
            data
        })
        .collect();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number, "{event}");
    }
    events
}

/// Returns the events without what all have, and with only the output of responses.
fn short(events: &[Value]) -> Vec<Value> {
    let short = |event: &Value| {
        let mut event = event.clone();
        let fields = event.as_object_mut().expect("an object");
        fields.remove("sequence_number");
        if let Some(response) = fields.remove("response") {
            fields.insert("status".into(), response["status"].clone());
            fields.insert("output".into(), response["output"].clone());
        }
        event
    };
    events.iter().map(short).collect()
}

#[test]
fn a_text_has_the_events_that_openai_sends() {
    let mut events = events_of(json!({}));
    let written = write(&mut events, vec![text("He\n"), text(""), text("y")], FinishReason::Stop);
    let id = "msg_0000000000000000000000000000000700";
    let part = |text: &str| json!({"type": "output_text", "annotations": [], "logprobs": [], "text": text});
    let item = |status: &str, content: Value| json!({"type": "message", "id": id, "status": status, "role": "assistant", "content": content});
    let delta = |text: &str| {
        json!({"type": "response.output_text.delta", "item_id": id, "output_index": 0, "content_index": 0, "delta": text,
               "logprobs": []})
    };
    let expected = [
        json!({"type": "response.created", "status": "in_progress", "output": []}),
        json!({"type": "response.in_progress", "status": "in_progress", "output": []}),
        json!({"type": "response.output_item.added", "output_index": 0, "item": item("in_progress", json!([]))}),
        json!({"type": "response.content_part.added", "item_id": id, "output_index": 0, "content_index": 0, "part": part("")}),
        delta("He\n"),
        delta("y"),
        json!({"type": "response.output_text.done", "item_id": id, "output_index": 0, "content_index": 0, "text": "He\ny",
               "logprobs": []}),
        json!({"type": "response.content_part.done", "item_id": id, "output_index": 0, "content_index": 0,
               "part": part("He\ny")}),
        json!({"type": "response.output_item.done", "output_index": 0, "item": item("completed", json!([part("He\ny")]))}),
        json!({"type": "response.completed", "status": "completed", "output": [item("completed", json!([part("He\ny")]))]}),
    ];
    assert_eq!(short(&written), expected);
}

#[test]
fn a_response_repeats_its_request_and_tells_its_usage() {
    let change = json!({"metadata": {"a": "b"}, "instructions": "be brief", "temperature": 0.5});
    let written = write(&mut events_of(change), vec![text("x")], FinishReason::Length);
    let last = written.last().expect("an event");
    assert_eq!(last["type"], "response.incomplete");
    let mut response = last["response"].clone();
    response.as_object_mut().expect("an object").remove("output");
    let expected = json!({
        "id": "resp_00000000000000000000000000000007", "object": "response", "created_at": 9, "status": "incomplete",
        "error": null, "incomplete_details": {"reason": "max_output_tokens"}, "model": "m",
        "usage": {
            "input_tokens": 3, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 5
        },
        "background": false, "instructions": "be brief", "max_output_tokens": null, "max_tool_calls": null,
        "metadata": {"a": "b"}, "parallel_tool_calls": true, "previous_response_id": null, "prompt_cache_key": null,
        "reasoning": {"effort": null, "summary": null}, "safety_identifier": null, "service_tier": "default",
        "store": false, "temperature": 0.5, "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": null, "truncation": "disabled", "user": null,
    });
    assert_eq!(response, expected);
    assert_eq!(last["response"]["output"][0]["status"], "incomplete");
}

/// Returns the type of each event, and its text if it has one.
fn outline(events: &[Value]) -> Vec<String> {
    let line = |event: &Value| {
        let name = event["type"].as_str().expect("a type").trim_start_matches("response.").to_owned();
        let text = ["delta", "text", "arguments", "input"].iter().find_map(|field| event[field].as_str());
        let index = event["output_index"].as_u64().map(|index| format!(" {index}")).unwrap_or_default();
        text.map_or(format!("{name}{index}"), |text| format!("{name}{index} {text}"))
    };
    events.iter().map(line).filter(|line| !["created", "in_progress"].contains(&&**line)).collect()
}

#[test]
fn reasoning_and_parallel_calls_are_items_of_their_own() {
    let mut events = events_of(json!({}));
    let contents = vec![
        reasoning("h"),
        reasoning("m"),
        text("ok"),
        call(0, Some("f"), "{"),
        call(1, Some("g"), ""),
        call(0, None, "}"),
        call(1, None, "[]"),
    ];
    let written = write(&mut events, contents, FinishReason::ToolCalls);
    let expected = [
        "output_item.added 0",
        "content_part.added 0",
        "reasoning_text.delta 0 h",
        "reasoning_text.delta 0 m",
        "reasoning_text.done 0 hm",
        "content_part.done 0",
        "output_item.done 0",
        "output_item.added 1",
        "content_part.added 1",
        "output_text.delta 1 ok",
        "output_text.done 1 ok",
        "content_part.done 1",
        "output_item.done 1",
        "output_item.added 2",
        "function_call_arguments.delta 2 {",
        "output_item.added 3",
        "function_call_arguments.delta 2 }",
        "function_call_arguments.delta 3 []",
        "function_call_arguments.done 2 {}",
        "output_item.done 2",
        "function_call_arguments.done 3 []",
        "output_item.done 3",
        "completed",
    ];
    let outline = outline(&written);
    let without_opening: Vec<_> = outline.iter().filter(|line| !line.is_empty()).collect();
    assert_eq!(without_opening, expected.iter().collect::<Vec<_>>());
    let call = &written.last().expect("an event")["response"]["output"][2];
    assert_eq!(
        (&call["type"], &call["call_id"], &call["name"], &call["arguments"]),
        (&json!("function_call"), &json!("call_f"), &json!("f"), &json!("{}"))
    );
}

#[test]
fn custom_and_namespaced_tools_are_called_by_the_clients_names() {
    let tools = json!({"tools": [
        {"type": "custom", "name": "patch"},
        {"type": "namespace", "name": "crm", "tools": [{"type": "function", "name": "find"}]},
    ]});
    let contents = vec![
        call(0, Some("patch"), ""),
        call(0, None, r#"{"inp"#),
        call(0, None, r#"ut":"a\"#),
        call(0, None, r#"nb"}"#),
        call(1, Some("crm__find"), "{}"),
    ];
    let written = write(&mut events_of(tools), contents, FinishReason::ToolCalls);
    let deltas: Vec<_> = outline(&written).into_iter().filter(|line| line.contains("input.d")).collect();
    let expected = [
        "custom_tool_call_input.delta 0 a",
        "custom_tool_call_input.delta 0 \nb",
        "custom_tool_call_input.done 0 a\nb",
    ];
    assert_eq!(deltas, expected);
    let output = &written.last().expect("an event")["response"]["output"];
    let id = |prefix: &str, index: u32| format!("{prefix}_{:032x}{index:02}", 7);
    let expected = json!([
        {"type": "custom_tool_call", "id": id("ctc", 0), "status": "completed", "call_id": "call_patch", "name": "patch",
         "input": "a\nb"},
        {"type": "function_call", "id": id("fc", 1), "status": "completed", "call_id": "call_crm__find", "name": "find",
         "namespace": "crm", "arguments": "{}"},
    ]);
    assert_eq!(*output, expected);
}

#[test]
fn a_custom_call_in_another_form_comes_whole_at_its_end() {
    let tools = json!({"tools": [{"type": "custom", "name": "patch"}]});
    let contents = vec![call(0, Some("patch"), "pl"), call(0, None, "ain")];
    let written = write(&mut events_of(tools), contents, FinishReason::ToolCalls);
    let texts: Vec<_> = outline(&written).into_iter().filter(|line| line.contains("plain")).collect();
    assert_eq!(texts, ["custom_tool_call_input.delta 0 plain", "custom_tool_call_input.done 0 plain"]);
}

#[test]
fn log_probabilities_come_with_their_text() {
    let change = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 1});
    let token = |bytes: &[u8], top| TokenLogprob { token: 1, bytes: bytes.to_vec(), logprob: -0.5, top };
    let content = Content { logprobs: vec![token(b"x", vec![token(b"y", vec![])])], ..text("x") };
    let written = write(&mut events_of(change), vec![content], FinishReason::Stop);
    let expected = json!([{"token": "x", "logprob": -0.5, "bytes": [120],
        "top_logprobs": [{"token": "y", "logprob": -0.5, "bytes": [121]}]}]);
    for event in written.iter().filter(|event| event["type"].as_str().is_some_and(|name| name.contains("output_text")))
    {
        assert_eq!(event["logprobs"], expected, "{event}");
    }
    assert_eq!(written.last().expect("an event")["response"]["output"][0]["content"][0]["logprobs"], expected);
}

#[test]
fn an_empty_answer_has_an_empty_message() {
    let written = write(&mut events_of(json!({})), vec![], FinishReason::Stop);
    assert_eq!(written.last().expect("an event")["response"]["output"][0]["content"][0]["text"], "");
}

#[test]
fn a_failure_ends_the_response_or_is_an_event_of_its_own() {
    let failure = WireError::new(ErrorCode::WorkerFailed, "gone").with_param("model");
    let mut events = events_of(json!({}));
    let mut out = BytesMut::new();
    events.piece(&piece(0, text("x"), None), &mut out);
    events.failure(&failure, &mut out);
    let written = read(&out);
    let last = written.last().expect("an event");
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(last["response"]["error"], json!({"code": "server_error", "message": "gone"}));
    let mut out = BytesMut::new();
    events_of(json!({})).failure(&failure, &mut out);
    let expected = json!({"type": "error", "sequence_number": 0, "code": "worker_failed", "message": "gone",
                          "param": "model"});
    assert_eq!(read(&out), [expected]);
}

#[test]
fn a_client_that_claims_to_have_every_event_is_still_told_of_the_failure() {
    let failure = WireError::new(ErrorCode::WorkerFailed, "gone");
    for (after, number) in [(1, 2), (70, 71), (u64::MAX, u64::MAX)] {
        let unanswered = events_of(json!({})).after(Some(after)).unanswered(KeptStatus::Failed, Some(&failure));
        let mut events = events_of(json!({})).after(Some(after));
        let mut cut_off = BytesMut::new();
        events.begin_response(&mut cut_off);
        events.failure(&failure, &mut cut_off);
        for written in [&unanswered[..], &cut_off[..]] {
            let text = std::str::from_utf8(written).expect("text");
            let data = text.strip_prefix("event: response.failed\ndata: ").expect("one event");
            let event: Value = serde_json::from_str(data).expect("JSON");
            assert_eq!(event["sequence_number"], number, "after {after}");
        }
    }
}

#[test]
fn a_whole_answer_has_the_items_of_its_stream() {
    let tools = json!({"tools": [{"type": "custom", "name": "patch"}]});
    let contents = || vec![reasoning("r"), text("t"), call(0, Some("patch"), r#"{"input":"i"}"#)];
    let mut events = events_of(tools.clone());
    let choice = protocol::gateway::Choice {
        text: "t".into(),
        reasoning: "r".into(),
        tool_calls: vec![protocol::infer::ToolCall {
            id: "call_patch".into(),
            name: "patch".into(),
            arguments: r#"{"input":"i"}"#.into(),
        }],
        logprobs: vec![],
        finish_reason: FinishReason::ToolCalls,
        stop_sequence: None,
    };
    let whole = serde_json::to_value(super::super::output::items(&events.heading, &choice)).expect("JSON");
    let written = write(&mut events, contents(), FinishReason::ToolCalls);
    assert_eq!(written.last().expect("an event")["response"]["output"], whole);
}

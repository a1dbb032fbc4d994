use bytes::Bytes;
use protocol::ErrorCode;
use protocol::infer::FinishReason;
use serde_json::{Value, json};

use super::*;
use crate::answer::Content;

const USAGE: TokenUsage = TokenUsage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 3, reasoning_tokens: 0 };

fn events() -> Events {
    Events::new(Heading { id: "msg_1".into(), model: "m\"".into(), service_tier: "standard" })
}

fn piece(content: Content) -> Piece {
    Piece { raw: Bytes::new(), seq: 0, attempt: 1, model: None, content, end: None }
}

fn text(text: &str) -> Piece {
    piece(Content { text: text.into(), ..Content::default() })
}

fn reasoning(text: &str) -> Piece {
    piece(Content { reasoning: text.into(), ..Content::default() })
}

fn calls(deltas: &[(u32, Option<&str>, &str)]) -> Piece {
    let delta = |(index, name, arguments): &(u32, Option<&str>, &str)| ToolCallDelta {
        index: *index,
        id: name.map(|name| format!("id of {name}")),
        name: name.map(str::to_owned),
        arguments: (*arguments).to_owned(),
    };
    piece(Content { tool_calls: deltas.iter().map(delta).collect(), ..Content::default() })
}

fn end(reason: FinishReason, content: Content) -> Piece {
    Piece { end: Some(End { reason, usage: USAGE }), ..piece(content) }
}

fn written(pieces: &[Piece]) -> String {
    let (mut events, mut out) = (events(), BytesMut::new());
    for piece in pieces {
        events.piece(piece, &mut out);
    }
    String::from_utf8(out.to_vec()).expect("text")
}

/// Returns the data of each event, after checking that its name is its type.
fn data(written: &str) -> Vec<Value> {
    let event = |event: &str| {
        let (name, data) = event.split_once("\ndata: ").expect("two lines");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
        data
    };
    written.split_terminator("\n\n").map(event).collect()
}

/// Returns the events between the beginning and the end of a message.
fn blocks(pieces: &[Piece]) -> Vec<Value> {
    let all = data(&written(pieces));
    let types: Vec<_> = all.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    assert_eq!((types[0], &types[types.len() - 2..]), ("message_start", &["message_delta", "message_stop"][..]));
    all[1..all.len() - 2].to_vec()
}

fn start(index: u32, content_block: Value) -> Value {
    json!({"type": "content_block_start", "index": index, "content_block": content_block})
}

fn delta(index: u32, delta: Value) -> Value {
    json!({"type": "content_block_delta", "index": index, "delta": delta})
}

fn stopped(index: u32) -> Value {
    json!({"type": "content_block_stop", "index": index})
}

#[test]
fn a_text_is_written_as_anthropic_writes_it() {
    let first = piece(Content {
        text: "He\n".into(),
        usage: Some(TokenUsage { completion_tokens: 0, ..USAGE }),
        ..Content::default()
    });
    let expected = r#"event: message_start
data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"m\"","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":2,"cache_creation_input_tokens":0,"cache_read_input_tokens":3,"output_tokens":0,"service_tier":"standard"}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"He\n"}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"llo"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"input_tokens":2,"cache_creation_input_tokens":0,"cache_read_input_tokens":3,"output_tokens":2,"service_tier":"standard"}}

event: message_stop
data: {"type":"message_stop"}

"#;
    let pieces = [first, text(""), text("llo"), end(FinishReason::Stop, Content::default())];
    assert_eq!(written(&pieces), expected);
}

#[test]
fn reasoning_is_a_block_with_a_signature_before_the_text() {
    let pieces = [reasoning("h"), reasoning("m"), text("so"), end(FinishReason::Stop, Content::default())];
    let expected = [
        start(0, json!({"type": "thinking", "thinking": "", "signature": ""})),
        delta(0, json!({"type": "thinking_delta", "thinking": "h"})),
        delta(0, json!({"type": "thinking_delta", "thinking": "m"})),
        delta(0, json!({"type": "signature_delta", "signature": "msg_1"})),
        stopped(0),
        start(1, json!({"type": "text", "text": ""})),
        delta(1, json!({"type": "text_delta", "text": "so"})),
        stopped(1),
    ];
    assert_eq!(blocks(&pieces), expected);
}

#[test]
fn each_call_is_a_block_of_its_own_with_its_input_in_parts() {
    let pieces = [
        text("look"),
        calls(&[(0, Some("f"), "")]),
        calls(&[(0, None, r#"{"a""#)]),
        calls(&[(0, None, ":1}")]),
        calls(&[(1, Some("g"), "{}")]),
        end(FinishReason::ToolCalls, Content::default()),
    ];
    let call = |name: &str| json!({"type": "tool_use", "id": format!("id of {name}"), "name": name, "input": {}});
    let part = |json: &str| json!({"type": "input_json_delta", "partial_json": json});
    let expected = [
        start(0, json!({"type": "text", "text": ""})),
        delta(0, json!({"type": "text_delta", "text": "look"})),
        stopped(0),
        start(1, call("f")),
        delta(1, part(r#"{"a""#)),
        delta(1, part(":1}")),
        stopped(1),
        start(2, call("g")),
        delta(2, part("{}")),
        stopped(2),
    ];
    assert_eq!(blocks(&pieces), expected);
}

#[test]
fn parts_of_several_calls_that_come_mixed_are_put_in_order() {
    let mixed = calls(&[(0, Some("f"), "{"), (1, Some("g"), "{"), (0, None, "}"), (1, None, "}")]);
    let pieces = [mixed, end(FinishReason::ToolCalls, Content::default())];
    let types = blocks(&pieces).into_iter().map(|event| (event["index"].clone(), event["type"].clone()));
    let of = |index: u32| {
        let types = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"];
        types.map(|kind| (json!(index), json!(kind)))
    };
    assert_eq!(types.collect::<Vec<_>>(), [of(0), of(1)].concat());
}

#[test]
fn a_call_that_repeats_its_name_stays_one_block() {
    let repeated = calls(&[(1, Some("f"), "{"), (1, Some("f"), "}")]);
    let types = blocks(&[repeated, end(FinishReason::ToolCalls, Content::default())]);
    let types: Vec<_> = types.iter().map(|event| event["type"].as_str().expect("a type").to_owned()).collect();
    let expected = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"];
    assert_eq!(types, expected);
}

#[test]
fn the_last_piece_may_have_text_and_names_the_stop_sequence() {
    let last = Content { text: "x".into(), stop_sequence: Some("END".into()), ..Content::default() };
    let all = data(&written(&[end(FinishReason::Stop, last)]));
    assert_eq!(all[2]["delta"]["text"], "x");
    assert_eq!(all[4]["delta"], json!({"stop_reason": "stop_sequence", "stop_sequence": "END"}));
}

#[test]
fn an_answer_of_nothing_has_no_blocks() {
    assert!(blocks(&[text(""), end(FinishReason::Length, Content::default())]).is_empty());
}

#[test]
fn a_part_of_a_call_that_never_began_is_left_out() {
    assert!(blocks(&[calls(&[(7, None, "}")]), end(FinishReason::Stop, Content::default())]).is_empty());
}

#[test]
fn a_failure_is_an_event_and_a_wait_is_a_ping() {
    let mut out = BytesMut::new();
    events().failure(&WireError::new(ErrorCode::WorkerFailed, "gone"), &mut out);
    let expected = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"gone\"},\"request_id\":null}\n\n";
    assert_eq!(out, expected.as_bytes());
    assert_eq!(&events().keep_alive()[..], b"event: ping\ndata: {\"type\":\"ping\"}\n\n");
}

use protocol::ErrorCode;
use protocol::infer::{TokenLogprob, ToolCallDelta};
use serde_json::{Value, json};

use super::*;
use crate::answer;

const USAGE: TokenUsage = TokenUsage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 1, reasoning_tokens: 0 };

fn heading(endpoint: Endpoint) -> Heading {
    Heading::new(endpoint, "tiny".into(), UnixMillis(1_700_000_000_123), Instant::now())
}

fn piece(content: Content, end: Option<FinishReason>) -> Piece {
    let end = end.map(|reason| answer::End { reason, usage: USAGE });
    Piece { raw: Bytes::new(), seq: 0, attempt: 1, model: None, content, end }
}

fn text(text: &str) -> Piece {
    piece(Content { text: text.into(), ..Content::default() }, None)
}

fn end(reason: FinishReason) -> Piece {
    piece(Content { finish_reason: Some(reason), ..Content::default() }, Some(reason))
}

fn call(index: u32, name: Option<&str>, arguments: &str) -> Piece {
    let (id, name) = (name.map(|name| format!("id of {name}")), name.map(str::to_owned));
    let delta = ToolCallDelta { index, id, name, arguments: arguments.into() };
    piece(Content { tool_calls: vec![delta], ..Content::default() }, None)
}

/// Returns the lines of an answer, without the times that differ from run to run.
fn lines(endpoint: Endpoint, pieces: &[Piece]) -> Vec<Value> {
    let (mut lines, mut out) = (Lines::new(heading(endpoint)), BytesMut::new());
    for piece in pieces {
        lines.piece(piece, &mut out);
    }
    let text = String::from_utf8(out.to_vec()).expect("text");
    assert!(text.ends_with('\n'), "{text}");
    text.lines().map(|line| timeless(serde_json::from_str(line).expect("each line is JSON"))).collect()
}

fn timeless(mut line: Value) -> Value {
    let fields = line.as_object_mut().expect("an object");
    assert_eq!(fields.remove("created_at"), Some(json!("2023-11-14T22:13:20.123Z")));
    for name in ["total_duration", "prompt_eval_duration", "eval_duration", "load_duration"] {
        assert_eq!(fields.remove(name).is_some(), fields["done"] == true, "{name}");
    }
    line
}

fn message(message: &Value) -> Value {
    json!({"model": "tiny", "message": message, "done": false})
}

fn last(reason: &str) -> Value {
    json!({
        "model": "tiny", "message": {"role": "assistant", "content": ""}, "done": true, "done_reason": reason,
        "prompt_eval_count": 3, "eval_count": 2,
    })
}

#[test]
fn a_conversations_answer_is_written_as_ollama_writes_it() {
    let thought = piece(Content { reasoning: "hm".into(), ..Content::default() }, None);
    let written = lines(Endpoint::Chat, &[thought, text("He\n"), text(""), text("llo"), end(FinishReason::Stop)]);
    let expected = [
        message(&json!({"role": "assistant", "content": "", "thinking": "hm"})),
        message(&json!({"role": "assistant", "content": "He\n"})),
        message(&json!({"role": "assistant", "content": "llo"})),
        last("stop"),
    ];
    assert_eq!(written, expected);
}

#[test]
fn a_texts_answer_has_no_message() {
    let thought = piece(Content { reasoning: "hm".into(), ..Content::default() }, None);
    let written = lines(Endpoint::Generate, &[thought, text("a"), end(FinishReason::Length)]);
    let expected = [
        json!({"model": "tiny", "response": "", "thinking": "hm", "done": false}),
        json!({"model": "tiny", "response": "a", "done": false}),
        json!({
            "model": "tiny", "response": "", "done": true, "done_reason": "length",
            "prompt_eval_count": 3, "eval_count": 2,
        }),
    ];
    assert_eq!(written, expected);
}

#[test]
fn calls_come_whole_and_cut_ones_not_at_all() {
    let pieces = [
        call(0, Some("f"), "{\n\"a\":"),
        call(1, Some("g"), ""),
        call(0, None, "1}"),
        call(2, Some("h"), "{\"b\""),
        end(FinishReason::Length),
    ];
    let written = lines(Endpoint::Chat, &pieces);
    let one = |index: u32, name: &str, arguments: Value| json!({"id": format!("id of {name}"), "function": {"index": index, "name": name, "arguments": arguments}});
    let calls = [one(0, "f", json!({"a": 1})), one(1, "g", json!({}))];
    let message = message(&json!({"role": "assistant", "content": "", "tool_calls": calls}));
    assert_eq!(written, [message, last("length")]);
}

#[test]
fn log_probabilities_stand_beside_their_text() {
    let token = TokenLogprob { token: 1, bytes: b"a".to_vec(), logprob: -0.5, top: vec![] };
    let said = piece(Content { text: "a".into(), logprobs: vec![token], ..Content::default() }, None);
    let written = lines(Endpoint::Chat, &[said, end(FinishReason::Stop)]);
    let expected = json!([{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]);
    assert_eq!(written[0]["logprobs"], expected);
}

#[test]
fn a_silent_stream_sends_lines_that_say_nothing() {
    let line = Lines::new(heading(Endpoint::Chat)).keep_alive();
    let line = serde_json::from_slice(&line).expect("JSON");
    assert_eq!(timeless(line), message(&json!({"role": "assistant", "content": ""})));
}

#[test]
fn an_error_is_a_line_with_its_message() {
    let mut out = BytesMut::new();
    Lines::new(heading(Endpoint::Chat)).failure(&WireError::new(ErrorCode::NoCapacity, "say \"when\""), &mut out);
    assert_eq!(out, b"{\"error\":\"say \\\"when\\\"\"}\n".as_slice());
}

#[test]
fn a_whole_answer_is_one_object() {
    let choice = Choice {
        text: "a".into(),
        reasoning: String::new(),
        tool_calls: vec![],
        logprobs: vec![],
        finish_reason: FinishReason::Stop,
        stop_sequence: None,
    };
    let heading = heading(Endpoint::Chat);
    let written = serde_json::to_value(whole(&heading, &choice, USAGE)).expect("JSON");
    let mut expected = last("stop");
    expected["message"]["content"] = json!("a");
    assert_eq!(timeless(written), expected);
    for (is_kept, reason) in [(true, "load"), (false, "unload")] {
        assert_eq!(serde_json::to_value(loaded(&heading, is_kept)).expect("JSON")["done_reason"], reason);
    }
}

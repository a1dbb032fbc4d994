use bytes::Bytes;
use protocol::ErrorCode;
use protocol::infer::{FinishReason, TokenLogprob, ToolCallDelta};
use serde_json::{Value, json};

use super::*;
use crate::answer::End;

fn sse(endpoint: Endpoint, include_usage: bool) -> Sse {
    of_several(endpoint, 1, include_usage)
}

fn of_several(endpoint: Endpoint, choices: usize, include_usage: bool) -> Sse {
    let mut sse = Sse::new(Heading {
        endpoint,
        id: format!("{}1", endpoint.id_prefix()),
        created: 7,
        model: "m\"".into(),
        prompt_chars: vec![3; choices],
        echo: false,
        include_usage,
        service_tier: None,
        calls_functions: false,
    });
    sse.set_head(7, "fp_abc");
    sse
}

fn piece(seq: u64, text: &str, end: Option<End>) -> Piece {
    let finish_reason = end.map(|end| end.reason);
    let content = Content { text: text.into(), finish_reason, ..Content::default() };
    Piece { raw: Bytes::new(), seq, attempt: 1, model: None, content, end }
}

const END: End = End {
    reason: FinishReason::Stop,
    usage: TokenUsage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 1, reasoning_tokens: 0 },
};

fn written(sse: &mut Sse, pieces: &[Piece]) -> String {
    let mut out = BytesMut::new();
    for piece in pieces {
        sse.piece(piece, &mut out);
    }
    String::from_utf8(out.to_vec()).expect("text")
}

#[test]
fn a_chat_answer_is_written_as_openai_writes_it() {
    let pieces = [piece(0, "He\n", None), piece(1, "", None), piece(2, "llo", None), piece(3, "", Some(END))];
    let head = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m\"","system_fingerprint":"fp_abc","choices":["#;
    let expected = format!(
        "id: 0\ndata: {head}{{\"index\":0,\"delta\":{{\"role\":\"assistant\",\"content\":\"He\\n\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n\
         id: 2\ndata: {head}{{\"index\":0,\"delta\":{{\"content\":\"llo\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n\
         id: 3\ndata: {head}{{\"index\":0,\"delta\":{{}},\"logprobs\":null,\"finish_reason\":\"stop\"}}]}}\n\n\
         data: [DONE]\n\n"
    );
    assert_eq!(written(&mut sse(Endpoint::Chat, false), &pieces), expected);
}

#[test]
fn a_resumed_stream_has_the_events_after_the_last_one_that_its_client_has() {
    let pieces = [piece(0, "He", None), piece(1, "", None), piece(2, "llo", None), piece(3, "", Some(END))];
    let whole = written(&mut sse(Endpoint::Chat, true), &pieces);
    let events: Vec<&str> = whole.split_inclusive("\n\n").collect();
    for (last, missing) in [(0, 1), (1, 1), (2, 2), (3, 3), (9, 3)] {
        let rest = written(
            &mut sse(Endpoint::Chat, true).after(Some(EventId { created_at: UnixMillis(5), seq: last })),
            &pieces,
        );
        assert_eq!(rest, events[missing..].concat(), "after {last}");
    }
}

#[test]
fn usage_comes_in_a_chunk_of_its_own_before_the_end() {
    let head = r#"{"id":"cmpl-1","object":"text_completion","created":7,"model":"m\"","system_fingerprint":"fp_abc","choices":["#;
    let expected = format!(
        "id: 0\ndata: {head}{{\"index\":0,\"text\":\"x\",\"logprobs\":null,\"finish_reason\":\"stop\"}}],\"usage\":null}}\n\n\
         data: {head}],\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5,\"prompt_tokens_details\":{{\"cached_tokens\":1}}}}}}\n\n\
         data: [DONE]\n\n"
    );
    assert_eq!(written(&mut sse(Endpoint::Completion, true), &[piece(0, "x", Some(END))]), expected);
}

#[test]
fn the_last_chunk_says_that_another_worker_continued_the_answer() {
    for include_usage in [false, true] {
        let content = Content { continued: 2, ..piece(1, "x", Some(END)).content };
        let pieces = [piece(0, "H", None), Piece { content, ..piece(1, "x", Some(END)) }];
        let written = written(&mut sse(Endpoint::Chat, include_usage), &pieces);
        let events: Vec<_> = written.lines().filter_map(|line| line.strip_prefix("data: {")).collect();
        let [first, .., last] = &events[..] else { panic!("{written}") };
        assert!(!first.contains("tether"), "{first}");
        assert!(last.ends_with(r#","tether":{"continued":2}}"#), "{last}");
    }
}

#[test]
fn a_failure_ends_the_stream_without_done() {
    let mut out = BytesMut::new();
    sse(Endpoint::Chat, true).failure(&WireError::new(ErrorCode::WorkerFailed, "gone"), &mut out);
    let expected = "data: {\"error\":{\"message\":\"gone\",\"type\":\"server_error\",\"param\":null,\"code\":\"worker_failed\"}}\n\n";
    assert_eq!(out, expected.as_bytes());
}

/// Returns the choices of all events, in their order.
fn choices(written: &str) -> Vec<Value> {
    let events = written.lines().filter_map(|line| line.strip_prefix("data: {"));
    let events = events.map(|event| serde_json::from_str::<Value>(&format!("{{{event}")).expect("JSON"));
    events.flat_map(|event| event["choices"].as_array().expect("choices").clone()).collect()
}

fn of(seq: u64, content: Content) -> Piece {
    Piece { content, ..piece(seq, "", None) }
}

#[test]
fn several_answers_are_told_apart_and_each_ends_once() {
    let some = |index, text: &str| Content { index, text: text.into(), ..Content::default() };
    let ended = |index, reason| Content { index, finish_reason: Some(reason), ..Content::default() };
    let pieces = [
        of(0, some(0, "a")),
        of(1, some(1, "x")),
        of(2, ended(0, FinishReason::Stop)),
        of(3, some(1, "y")),
        of(4, ended(1, FinishReason::Length)),
        Piece { end: Some(END), ..of(5, Content::default()) },
    ];
    let text = written(&mut of_several(Endpoint::Chat, 2, true), &pieces);
    let expected = [
        json!({"index": 0, "delta": {"role": "assistant", "content": "a"}, "logprobs": null, "finish_reason": null}),
        json!({"index": 1, "delta": {"role": "assistant", "content": "x"}, "logprobs": null, "finish_reason": null}),
        json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop"}),
        json!({"index": 1, "delta": {"content": "y"}, "logprobs": null, "finish_reason": null}),
        json!({"index": 1, "delta": {}, "logprobs": null, "finish_reason": "length"}),
    ];
    assert_eq!(choices(&text), expected);
    assert!(text.contains(r#""choices":[],"usage":{"#) && text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[test]
fn thoughts_and_calls_come_in_fields_of_their_own() {
    let call = |id: Option<&str>, name: Option<&str>, arguments: &str| {
        let (id, name, arguments) = (id.map(str::to_owned), name.map(str::to_owned), arguments.to_owned());
        Content { tool_calls: vec![ToolCallDelta { index: 0, id, name, arguments }], ..Content::default() }
    };
    let pieces = [
        of(0, Content { reasoning: "hm".into(), ..Content::default() }),
        of(1, call(Some("c1"), Some("f"), "")),
        of(2, call(None, None, "{}")),
        of(3, Content { finish_reason: Some(FinishReason::ToolCalls), ..Content::default() }),
    ];
    let choices_written = choices(&written(&mut sse(Endpoint::Chat, false), &pieces));
    let deltas: Vec<_> = choices_written.iter().map(|choice| choice["delta"].clone()).collect();
    let expected = [
        json!({"role": "assistant", "content": null, "reasoning_content": "hm", "reasoning": "hm"}),
        json!({"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
        json!({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}),
        json!({}),
    ];
    assert_eq!(deltas, expected);
    assert_eq!(choices_written[3]["finish_reason"], "tool_calls");
}

#[test]
fn a_call_in_the_older_form_is_the_first_one_alone() {
    let delta = |index, name: Option<&str>, arguments: &str| ToolCallDelta {
        index,
        id: name.map(|_| format!("c{index}")),
        name: name.map(str::to_owned),
        arguments: arguments.to_owned(),
    };
    let calls = |tool_calls| Content { tool_calls, ..Content::default() };
    let pieces = [
        of(0, calls(vec![delta(0, Some("f"), ""), delta(0, None, "{")])),
        of(1, calls(vec![delta(0, None, "}"), delta(1, Some("g"), "{}")])),
        of(2, Content { finish_reason: Some(FinishReason::ToolCalls), ..Content::default() }),
    ];
    let mut sse = sse(Endpoint::Chat, false);
    sse.heading.calls_functions = true;
    let written = choices(&written(&mut sse, &pieces));
    let deltas: Vec<_> = written.iter().map(|choice| choice["delta"].clone()).collect();
    let expected = [
        json!({"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{"}}),
        json!({"function_call": {"arguments": "}"}}),
        json!({}),
    ];
    assert_eq!(deltas, expected);
    assert_eq!(written[2]["finish_reason"], "function_call");
}

#[test]
fn log_probabilities_come_though_their_tokens_bring_no_text_yet() {
    let half = TokenLogprob { token: 1, bytes: vec![0xc3], logprob: -1.0, top: vec![] };
    let pieces = [of(0, Content { logprobs: vec![half], ..Content::default() })];
    let chat = choices(&written(&mut sse(Endpoint::Chat, false), &pieces));
    assert_eq!(chat[0]["logprobs"]["content"][0]["bytes"], json!([0xc3]));
    let text = choices(&written(&mut sse(Endpoint::Completion, false), &pieces));
    assert_eq!(text[0]["logprobs"]["token_logprobs"], json!([-1.0]));
}

/// An event as a client's decoder dispatches it.
#[derive(Debug, PartialEq, Eq)]
struct Decoded {
    last_event_id: String,
    data: String,
}

/// Decodes as the WHATWG specifies: an empty line dispatches an event, unless it has no data.
fn decode(stream: &str) -> Vec<Decoded> {
    decode_lines(stream, |data, _| !data.is_empty())
}

/// Decodes as openai-python does: once an id was seen, an empty line dispatches an event even without data.
fn decode_like_openai_python(stream: &str) -> Vec<Decoded> {
    decode_lines(stream, |data, id| !data.is_empty() || !id.is_empty())
}

fn decode_lines(stream: &str, dispatches: fn(data: &str, id: &str) -> bool) -> Vec<Decoded> {
    let (mut events, mut id, mut data) = (vec![], String::new(), String::new());
    for line in stream.split_terminator('\n') {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" if line.is_empty() => {
                if dispatches(&data, &id) {
                    let data = data.strip_suffix('\n').unwrap_or(&data).to_owned();
                    events.push(Decoded { last_event_id: id.clone(), data });
                }
                data.clear();
            }
            "id" => value.clone_into(&mut id),
            "data" => data = data + value + "\n",
            // A comment, or an unknown field.
            _ => {}
        }
    }
    events
}

/// Returns the writes of an answer, each as a client may receive it between two pauses.
fn writes(endpoint: Endpoint, fails: bool) -> Vec<String> {
    let mut sse = sse(endpoint, true);
    let end = (!fails).then_some(END);
    let mut writes: Vec<_> = [piece(0, "a", None), piece(1, "", None), piece(2, "b\n\nc", None), piece(3, "", end)]
        .iter()
        .map(|piece| written(&mut sse, std::slice::from_ref(piece)))
        .collect();
    if fails {
        let mut out = BytesMut::new();
        sse.failure(&WireError::new(ErrorCode::WorkerFailed, "gone"), &mut out);
        writes.push(String::from_utf8(out.to_vec()).expect("text"));
    }
    writes
}

#[test]
fn a_pause_at_any_place_of_a_stream_changes_nothing_for_any_decoder() {
    for (endpoint, fails) in [Endpoint::Chat, Endpoint::Completion].into_iter().flat_map(|e| [(e, false), (e, true)]) {
        let writes = writes(endpoint, fails);
        let expected = decode(&writes.concat());
        assert!(expected.len() >= 3 && expected.iter().all(|event| event.data.starts_with(['{', '['])), "{expected:?}");
        assert!(expected[1].last_event_id > expected[0].last_event_id, "{expected:?}");
        let keep_alive = sse(endpoint, true).keep_alive();
        let keep_alive = std::str::from_utf8(&keep_alive).expect("text");
        for offset in 0..=writes.len() {
            for pauses in 1..=2 {
                let (before, after) = writes.split_at(offset);
                let stream = before.concat() + &keep_alive.repeat(pauses) + &after.concat();
                assert_eq!(decode(&stream), expected, "{pauses} pauses at {offset}");
                assert_eq!(decode_like_openai_python(&stream), expected, "{pauses} pauses at {offset}");
            }
        }
    }
}

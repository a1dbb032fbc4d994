use proptest::prelude::*;
use serde_json::json;

use super::*;

fn chat(change: Value) -> Result<Generation, WireError> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    merge(&mut body, change);
    parse_chat(body.to_string().as_bytes())
}

fn completion(change: Value) -> Result<Generation, WireError> {
    let mut body = json!({"model": "m", "prompt": "once"});
    merge(&mut body, change);
    parse_completion(body.to_string().as_bytes())
}

fn merge(body: &mut Value, change: Value) {
    let Value::Object(change) = change else { panic!("an object") };
    body.as_object_mut().expect("an object").extend(change);
}

#[track_caller]
fn refused(outcome: Result<Generation, WireError>, code: ErrorCode, param: &str) {
    let error = outcome.expect_err(param);
    assert_eq!((error.code, error.param.as_deref()), (code, Some(param)), "{error}");
}

#[test]
fn a_plain_chat_request_is_read() {
    let generation = chat(json!({
        "model": "tether-tiny@1.0", "stream": true, "stream_options": {"include_usage": true}, "max_tokens": 5,
        "temperature": 0, "top_p": 0.5, "top_k": 40, "min_p": 0.1, "seed": 7, "stop": "end", "ignore_eos": true
    }))
    .expect("well formed");
    assert!(generation.stream && generation.include_usage);
    assert_eq!(generation.model, "tether-tiny@1.0");
    assert_eq!(generation.job.model.version.expect("given").to_string(), "1.0");
    let input = generation.job.input;
    assert_eq!(input.messages.expect("given")[0], Message::new(Role::User, "hi"));
    assert_eq!((input.max_tokens, input.temperature, input.top_p), (Some(5), Some(0.0), Some(0.5)));
    assert_eq!((input.top_k, input.min_p, input.seed, input.ignore_eos), (Some(40), Some(0.1), Some(7), true));
    assert_eq!(input.stop, ["end"]);
}

#[test]
fn content_may_come_in_parts_and_under_four_roles() {
    let messages = json!([
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "hi", "name": "ada"},
        {"role": "assistant", "content": "hello", "refusal": null, "tool_calls": []},
    ]);
    let generation = chat(json!({"messages": messages})).expect("well formed");
    let read: Vec<_> = generation.job.input.messages.expect("given").into_iter().map(|m| (m.role, m.content)).collect();
    let expected =
        [(Role::System, "be brief"), (Role::System, "be kind"), (Role::User, "hi"), (Role::Assistant, "hello")];
    assert_eq!(read, expected.map(|(role, text)| (role, text.to_owned())));
}

#[test]
fn max_completion_tokens_goes_before_max_tokens() {
    let tokens = |change| chat(change).expect("well formed").job.input.max_tokens;
    assert_eq!(tokens(json!({"max_completion_tokens": 3, "max_tokens": 9})), Some(3));
    assert_eq!(tokens(json!({"max_completion_tokens": null, "max_tokens": 9})), Some(9));
    assert_eq!(tokens(json!({})), None);
}

#[test]
fn harmless_and_unknown_fields_pass() {
    chat(json!({
        "user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "p", "parallel_tool_calls": true, "a_field_of_tomorrow": {"x": [1]},
        "n": 1, "tools": [], "tool_choice": "auto", "logprobs": false, "top_logprobs": 0, "logit_bias": {},
        "response_format": {"type": "text"}, "presence_penalty": 0, "frequency_penalty": 0.0, "modalities": ["text"],
        "stop": null, "seed": null, "temperature": null, "stream_options": null, "top_k": -1
    }))
    .expect("nothing asks for what is not done");
}

#[test]
fn what_means_something_and_is_not_done_is_refused_by_name() {
    for (field, value) in [
        ("n", json!(2)),
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("functions", json!([{}])),
        ("logprobs", json!(true)),
        ("top_logprobs", json!(3)),
        ("response_format", json!({"type": "json_object"})),
        ("logit_bias", json!({"50256": -100})),
        ("presence_penalty", json!(0.5)),
        ("frequency_penalty", json!(-1)),
        ("modalities", json!(["text", "audio"])),
        ("reasoning_effort", json!("high")),
        ("echo", json!(true)),
        ("suffix", json!("x")),
        ("best_of", json!(2)),
        ("prompt", json!("x")),
    ] {
        refused(chat(json!({field: value})), ErrorCode::UnsupportedParameter, field);
    }
    refused(completion(json!({"logprobs": 0})), ErrorCode::UnsupportedParameter, "logprobs");
    refused(completion(json!({"messages": []})), ErrorCode::UnsupportedParameter, "messages");
}

#[test]
fn an_error_in_a_message_names_its_place() {
    let message = |message: Value| chat(json!({"messages": [{"role": "user", "content": "a"}, message]}));
    refused(message(json!({"role": "wizard", "content": "b"})), ErrorCode::InvalidValue, "messages[1].role");
    refused(message(json!({"role": "tool", "content": "b"})), ErrorCode::UnsupportedParameter, "messages[1].role");
    refused(message(json!({"role": "user"})), ErrorCode::InvalidValue, "messages[1].content");
    refused(message(json!({"role": "user", "content": 7})), ErrorCode::InvalidValue, "messages[1].content");
    let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
    refused(message(image), ErrorCode::UnsupportedParameter, "messages[1].content[0].type");
    let bare = json!({"role": "user", "content": [{"type": "text"}]});
    refused(message(bare), ErrorCode::InvalidValue, "messages[1].content[0].text");
    let calls = json!({"role": "assistant", "content": null, "tool_calls": [{}]});
    refused(message(calls), ErrorCode::UnsupportedParameter, "messages[1].tool_calls");
}

#[test]
fn values_of_the_wrong_type_or_range_name_their_field() {
    for (field, value) in [
        ("model", json!(7)),
        ("messages", json!("hi")),
        ("messages", json!([])),
        ("messages", Value::Null),
        ("temperature", json!("warm")),
        ("temperature", json!(2.1)),
        ("temperature", json!(1e39)),
        ("top_p", json!(0)),
        ("top_k", json!(-2)),
        ("top_k", json!(5_000_000_000_u64)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(1.5)),
        ("seed", json!("x")),
        ("seed", json!(0.5)),
        ("stop", json!(7)),
        ("stop", json!([""])),
        ("stream", json!("yes")),
        ("stream_options", json!({"include_usage": true})),
    ] {
        refused(chat(json!({field: value})), ErrorCode::InvalidValue, field);
    }
    refused(chat(json!({"stop": ["a", 7]})), ErrorCode::InvalidValue, "stop[1]");
}

#[test]
fn a_negative_seed_is_a_seed() {
    assert_eq!(chat(json!({"seed": -1})).expect("well formed").job.input.seed, Some(u64::MAX));
    assert_eq!(chat(json!({"seed": u64::MAX})).expect("well formed").job.input.seed, Some(u64::MAX));
}

#[test]
fn a_missing_model_and_an_impossible_one_are_told_apart() {
    for model in [Value::Null, json!("")] {
        refused(chat(json!({"model": model})), ErrorCode::MissingModel, "model");
        refused(completion(json!({"model": model})), ErrorCode::MissingModel, "model");
    }
    refused(chat(json!({"model": "org/Model"})), ErrorCode::ModelNotFound, "model");
    let native = parse_infer(br#"{"input":"hi"}"#).expect_err("no model");
    assert_eq!((native.code, native.param.as_deref()), (ErrorCode::MissingModel, Some("modelId")));
}

#[test]
fn a_text_prompt_may_stand_alone_or_in_an_array() {
    for prompt in [json!("once"), json!(["once"])] {
        let input = completion(json!({"prompt": prompt})).expect("well formed").job.input;
        assert_eq!(input.prompt.as_deref(), Some("once"));
        assert_eq!(input.max_tokens, Some(16), "OpenAI's default");
    }
    for prompt in [json!(["a", "b"]), json!([1, 2]), json!([[1, 2], [3]])] {
        refused(completion(json!({"prompt": prompt})), ErrorCode::UnsupportedParameter, "prompt");
    }
    refused(completion(json!({"prompt": []})), ErrorCode::InvalidValue, "prompt");
    refused(completion(json!({"prompt": null})), ErrorCode::InvalidValue, "prompt");
    refused(completion(json!({"prompt": {"a": 1}})), ErrorCode::InvalidValue, "prompt");
}

#[test]
fn a_native_error_names_the_native_field() {
    let param = |body: &str| parse_infer(body.as_bytes()).expect_err(body).param;
    let out_of_range = r#"{"modelId":"m","input":{"prompt":"x","topP":2}}"#;
    assert_eq!(param(out_of_range).as_deref(), Some("input.topP"));
    assert_eq!(param(r#"{"modelId":"m","input":{}}"#).as_deref(), Some("input"));
    assert_eq!(param(r#"{"modelId":"M","input":"x"}"#).as_deref(), Some("modelId"));
    assert_eq!(param(r#"{"modelId":"m","input":"x","deadlineMs":0}"#).as_deref(), Some("deadlineMs"));
}

#[test]
fn what_is_not_json_says_where() {
    for body in [&b"{"[..], b"", b"\xff\xfe", b"{\"model\": \"\xff\"}", b"{\"model\": \"\\ud800\"}", b"{}{}"] {
        let error = parse_chat(body).expect_err("not JSON");
        assert_eq!(error.code, ErrorCode::InvalidJson, "{error}");
        assert!(error.message.contains("line 1 column"), "{error}");
    }
    let deep = ["[".repeat(100_000), "]".repeat(100_000)].concat();
    assert_eq!(parse_chat(deep.as_bytes()).expect_err("deep").code, ErrorCode::InvalidJson);
    let hidden = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"x"}}],"tools":{deep}}}"#);
    assert_eq!(parse_chat(hidden.as_bytes()).expect_err("deep").code, ErrorCode::InvalidJson);
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_chat(&bytes);
        let _ = parse_completion(&bytes);
        let _ = parse_infer(&bytes);
    }

    #[test]
    fn a_body_bent_in_one_byte_is_read_or_refused(position in 0usize..300, byte: u8) {
        let body = json!({"model": "m@1.0", "stream": true, "stop": ["a"], "seed": 1, "temperature": 0.5,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "prompt": ["x"]});
        let mut bytes = body.to_string().into_bytes();
        let length = bytes.len();
        bytes[position % length] = byte;
        let _ = parse_chat(&bytes);
        let _ = parse_completion(&bytes);
        let _ = parse_infer(&bytes);
    }
}

use protocol::ErrorCode;
use protocol::infer::ToolCall;
use serde_json::json;

use super::*;

fn chat(body: &Value) -> Result<OllamaGeneration, WireError> {
    parse_ollama_chat(body.to_string().as_bytes())
}

fn chat_with(field: &str, value: &Value) -> Result<OllamaGeneration, WireError> {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    body[field] = value.clone();
    chat(&body)
}

fn options(options: &Value) -> Result<Input, WireError> {
    chat_with("options", options).map(|generation| generation.job.input)
}

#[test]
fn a_conversation_is_streamed_unless_the_client_says_otherwise() {
    let asked = chat_with("think", &json!(false)).expect("sound");
    assert!(asked.stream && !asked.only_loads);
    assert_eq!(asked.job.input.messages, Some(vec![Message::new(Role::User, "hi")]));
    assert_eq!(asked.job.input.template_options["enable_thinking"], false);
    assert!(!chat_with("stream", &json!(false)).expect("sound").stream);
}

#[test]
fn the_tag_latest_means_nothing_and_another_one_is_an_adapter() {
    for (name, meant) in [("tiny", "tiny"), ("tiny:latest", "tiny"), ("tiny@1.0:latest", "tiny@1.0"), ("a:b", "a:b")] {
        let asked = chat_with("model", &json!(name)).expect(name);
        assert_eq!((asked.job.model.to_string().as_str(), asked.model.as_str()), (meant, name));
    }
    for name in [json!(null), json!(""), json!(":latest"), json!("a b")] {
        chat_with("model", &name).expect_err("no model");
    }
}

#[test]
fn options_have_the_meaning_they_have_in_ollama() {
    let input = options(&json!({
        "num_predict": 5, "temperature": 0.5, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1,
        "presence_penalty": 1, "frequency_penalty": -1, "seed": 7, "stop": ["x"], "num_ctx": 4096, "mirostat": 1,
    }));
    let input = input.expect("sound");
    assert_eq!(
        (input.max_tokens, input.temperature, input.top_k, input.top_p),
        (Some(5), Some(0.5), Some(0), Some(0.9))
    );
    assert_eq!((input.repetition_penalty, input.seed, input.stop), (Some(1.1), Some(7), vec!["x".to_owned()]));
    let open = options(&json!({"num_predict": -1, "seed": -1, "stop": "y"})).expect("sound");
    assert_eq!((open.max_tokens, open.seed, open.stop), (None, None, vec!["y".to_owned()]));
    for bad in [json!({"num_predict": 0}), json!({"num_predict": -3}), json!({"temperature": 3}), json!({"top_k": "x"})]
    {
        options(&bad).expect_err("out of range");
    }
}

#[test]
fn an_answer_may_have_to_be_json_or_follow_a_schema() {
    let format = |value: Value| chat_with("format", &value).map(|asked| asked.job.input.format);
    assert_eq!(format(json!("json")), Ok(OutputFormat::Json));
    assert_eq!(format(json!("")), Ok(OutputFormat::Text));
    let schema = json!({"type": "object", "x-guidance": {"lenient": true}});
    assert_eq!(format(json!({"type": "object"})), Ok(OutputFormat::JsonSchema(schema)));
    for bad in [json!("xml"), json!(1), json!([])] {
        assert_eq!(format(bad).expect_err("no format").code, ErrorCode::InvalidValue);
    }
}

#[test]
fn results_refer_to_the_calls_before_them() {
    let call = |name: &str| json!({"function": {"name": name, "arguments": {"city": "Paris"}}});
    let asked = chat(&json!({"model": "tiny", "messages": [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call("weather"), call("time")]},
        {"role": "tool", "tool_name": "time", "content": "noon"},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "of nothing", "tool_call_id": "own"},
    ]}));
    let messages = asked.expect("sound").job.input.messages.expect("messages");
    let calls = &messages[1].tool_calls;
    let expected = ToolCall { id: "call_0".into(), name: "weather".into(), arguments: r#"{"city":"Paris"}"#.into() };
    assert_eq!((calls.len(), &calls[0]), (2, &expected));
    let answered: Vec<_> = messages[2..].iter().map(|message| message.tool_call_id.as_deref()).collect();
    assert_eq!(answered, [Some("call_1"), Some("call_0"), Some("own")]);
}

#[test]
fn without_a_prompt_the_model_is_only_loaded() {
    let asked = [
        parse_ollama_generate(br#"{"model": "tiny", "keep_alive": "10m"}"#),
        parse_ollama_generate(br#"{"model": "tiny", "prompt": "", "keep_alive": 600}"#),
        parse_ollama_chat(br#"{"model": "tiny", "messages": [], "keep_alive": 600}"#),
    ];
    for asked in asked {
        let asked = asked.expect("sound");
        assert!(asked.only_loads && asked.job.input.count_only);
        assert_eq!(asked.job.input.keep_alive_secs, Some(600));
    }
}

#[test]
fn a_text_is_a_users_message_unless_it_is_raw_or_has_a_suffix() {
    let input = |body: Value| parse_ollama_generate(body.to_string().as_bytes()).expect("sound").job.input;
    let asked = input(json!({"model": "tiny", "prompt": "hi", "system": "be short"}));
    assert_eq!(asked.messages, Some(vec![Message::new(Role::System, "be short"), Message::new(Role::User, "hi")]));
    let raw = input(json!({"model": "tiny", "prompt": "hi", "raw": true}));
    assert_eq!((raw.prompt.as_deref(), raw.messages), (Some("hi"), None));
    let between = input(json!({"model": "tiny", "prompt": "a", "suffix": "c"}));
    assert_eq!((between.prompt.as_deref(), between.suffix.as_deref()), (Some("a"), Some("c")));
}

#[test]
fn what_is_not_supported_is_refused_by_its_name() {
    for (field, value, param) in [
        ("images", json!(["aGk="]), "images"),
        ("context", json!([1]), "context"),
        ("template", json!("x"), "template"),
        ("messages", json!([{"role": "user", "content": "?", "images": ["aGk="]}]), "messages[0].images"),
        ("messages", json!([{"role": "user"}]), "messages[0].content"),
        ("top_logprobs", json!(2), "top_logprobs"),
    ] {
        let error = chat_with(field, &value).expect_err(field);
        assert_eq!(error.param.as_deref(), Some(param), "{error:?}");
    }
}

#[test]
fn texts_to_embed_come_as_one_or_several() {
    let asked = |body: &str| parse_ollama_embed(body.as_bytes());
    let one = asked(r#"{"model": "tiny:latest", "input": "a", "truncate": true}"#).expect("sound");
    assert_eq!((one.model.as_str(), one.job.input.embed.map(|texts| texts.len())), ("tiny:latest", Some(1)));
    let two = asked(r#"{"model": "tiny", "input": ["a", "b"]}"#).expect("sound");
    assert_eq!(two.job.input.embed.map(|texts| texts.len()), Some(2));
    assert_eq!(asked(r#"{"model": "tiny", "input": ""}"#).expect_err("empty").param.as_deref(), Some("input"));
    let empty = parse_ollama_embedding(br#"{"model": "tiny", "prompt": ""}"#).expect_err("empty");
    assert_eq!(empty.param.as_deref(), Some("prompt"));
}

use proptest::prelude::*;
use protocol::ErrorCode;
use protocol::infer::{EmbedInput, Message, OutputFormat, Role, Tool, ToolCall, ToolChoice};
use serde_json::{Value, json};

use super::*;
use crate::infer_request::parse_infer;

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
fn a_request_says_in_ollamas_form_how_long_the_model_stays() {
    for (value, expected) in [
        (json!("5m"), Some(300)),
        (json!(60), Some(60)),
        (json!(-1), Some(-1)),
        (json!(0), Some(0)),
        (json!(null), None),
    ] {
        let field = json!({"keep_alive": value});
        assert_eq!(chat(field.clone()).expect("well formed").job.input.keep_alive_secs, expected);
        assert_eq!(completion(field).expect("well formed").job.input.keep_alive_secs, expected);
        let body = json!({"model": "m", "input": "x", "keep_alive": value}).to_string();
        assert_eq!(parse_embeddings(body.as_bytes()).expect("well formed").job.input.keep_alive_secs, expected);
    }
    let error = chat(json!({"keep_alive": "soon"})).expect_err("no time");
    assert!(error.message.contains("30s") && error.param.as_deref() == Some("keep_alive"), "{error:?}");
}

#[test]
fn harmless_and_unknown_fields_pass() {
    chat(json!({
        "user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "p", "parallel_tool_calls": true, "a_field_of_tomorrow": {"x": [1]},
        "n": 1, "tools": [], "tool_choice": "auto", "logprobs": false, "top_logprobs": 0, "logit_bias": {},
        "response_format": {"type": "text"}, "presence_penalty": 0, "frequency_penalty": 0.0, "modalities": ["text"],
        "best_of": 1, "function_call": "none", "guided_choice": null, "structured_outputs": {},
        "stop": null, "seed": null, "temperature": null, "stream_options": null, "top_k": -1, "verbosity": "low",
        "continue_final_message": false, "add_generation_prompt": true, "deterministic": false
    }))
    .expect("nothing asks for what is not done");
}

#[test]
fn what_means_something_and_is_not_done_is_refused_by_name() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for (field, value) in [
        ("modalities", json!(["text", "audio"])),
        ("echo", json!(true)),
        ("suffix", json!("x")),
        ("best_of", json!(2)),
        ("min_tokens", json!(3)),
        ("stop_token_ids", json!([7])),
        ("chat_template", json!("{{ x }}")),
        ("prompt", json!("x")),
    ] {
        refused(chat(json!({field: value})), ErrorCode::UnsupportedParameter, field);
    }
    for (field, value) in [
        ("messages", json!([])),
        ("tools", tools),
        ("functions", json!([{"name": "f"}])),
        ("top_logprobs", json!(3)),
        ("prediction", json!({"type": "content", "content": "x"})),
        ("reasoning_effort", json!("high")),
        ("chat_template_kwargs", json!({"a": 1})),
        ("continue_final_message", json!(true)),
    ] {
        refused(completion(json!({field: value})), ErrorCode::UnsupportedParameter, field);
    }
}

#[test]
fn a_predicted_answer_reaches_the_job() {
    let predicted = |prediction| chat(json!({"prediction": prediction})).map(|chat| chat.job.input.prediction);
    let parts = json!([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]);
    for (content, expected) in [(json!("one two"), "one two"), (parts, "one two")] {
        let prediction = predicted(json!({"type": "content", "content": content})).expect("well formed");
        assert_eq!(prediction.as_deref(), Some(expected));
    }
    let of_image = json!({"type": "content", "content": [{"type": "image_url"}]});
    for (prediction, code, param) in [
        (json!({"type": "diff", "content": "x"}), ErrorCode::UnsupportedParameter, "prediction.type"),
        (of_image, ErrorCode::UnsupportedParameter, "prediction.content[0]"),
        (json!({"type": "content"}), ErrorCode::InvalidValue, "prediction.content"),
        (json!("x"), ErrorCode::InvalidValue, "prediction"),
    ] {
        let error = predicted(prediction).expect_err(param);
        assert_eq!((error.code, error.param.as_deref()), (code, Some(param)));
    }
}

#[test]
fn how_tokens_are_drawn_reaches_the_job() {
    let fields = json!({
        "n": 3, "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.5,
        "logit_bias": {"50256": -100, "7": 2.5}, "best_of": 3, "adapter": "pirate"
    });
    for generation in [chat(fields.clone()), completion(fields)] {
        let input = generation.expect("well formed").job.input;
        assert_eq!((input.n, input.presence_penalty, input.frequency_penalty), (Some(3), Some(0.5), Some(-1.0)));
        assert_eq!(input.repetition_penalty, Some(1.5));
        assert_eq!(input.logit_bias, [(7, 2.5), (50_256, -100.0)].into());
        assert_eq!(input.adapter.expect("given").as_str(), "pirate");
    }
}

#[test]
fn log_probabilities_are_a_switch_for_chats_and_a_count_for_texts() {
    let of_chat = |change| chat(change).expect("well formed").job.input.logprobs;
    assert_eq!(of_chat(json!({"logprobs": true})), Some(0));
    assert_eq!(of_chat(json!({"logprobs": true, "top_logprobs": 20})), Some(20));
    assert_eq!(of_chat(json!({"logprobs": false, "top_logprobs": 0})), None);
    let of_text = |change| completion(change).expect("well formed").job.input.logprobs;
    assert_eq!((of_text(json!({"logprobs": 0})), of_text(json!({"logprobs": null}))), (Some(0), None));
    for (change, param) in [
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"logprobs": "yes"}), "logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "logprobs"),
    ] {
        refused(chat(change), ErrorCode::InvalidValue, param);
    }
    refused(completion(json!({"logprobs": true})), ErrorCode::InvalidValue, "logprobs");
}

#[test]
fn functions_that_may_be_called_reach_the_job() {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    let function = json!({"name": "weather", "description": "d", "parameters": schema, "strict": true});
    let with = |choice: Value| {
        let tools =
            json!([{"type": "function", "function": function}, {"type": "function", "function": {"name": "g"}}]);
        chat(json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": choice != "none"}))
    };
    let one_call = |choice| with(choice).expect("well formed").job.input.one_call;
    assert_eq!((one_call(json!("auto")), one_call(json!("none"))), (false, true));
    let input = with(Value::Null).expect("well formed").job.input;
    let tool = Tool { name: "weather".into(), description: Some("d".into()), parameters: Some(schema.clone()) };
    assert_eq!((input.tools.len(), &input.tools[0]), (2, &tool));
    for (choice, expected) in [
        (Value::Null, ToolChoice::Auto),
        (json!("auto"), ToolChoice::Auto),
        (json!("none"), ToolChoice::None),
        (json!("required"), ToolChoice::Required),
        (json!({"type": "function", "function": {"name": "g"}}), ToolChoice::Function("g".into())),
    ] {
        assert_eq!(with(choice).expect("well formed").job.input.tool_choice, expected);
    }
    refused(with(json!("sometimes")), ErrorCode::InvalidValue, "tool_choice");
    refused(with(json!({"type": "function"})), ErrorCode::InvalidValue, "tool_choice.function.name");
    refused(with(json!({"type": "allowed_tools"})), ErrorCode::UnsupportedParameter, "tool_choice.type");
    let unknown = json!({"type": "function", "function": {"name": "h"}});
    refused(with(unknown), ErrorCode::InvalidValue, "tool_choice");
    refused(chat(json!({"tool_choice": "required"})), ErrorCode::InvalidValue, "tool_choice");
    for (tool, code, param) in [
        (json!({"type": "code_interpreter"}), ErrorCode::UnsupportedParameter, "tools[0].type"),
        (json!({"type": "function"}), ErrorCode::InvalidValue, "tools[0].function"),
        (json!({"type": "function", "function": {}}), ErrorCode::InvalidValue, "tools[0].function"),
        (json!({"type": "function", "function": {"name": "a b"}}), ErrorCode::InvalidValue, "tools"),
        (
            json!({"type": "function", "function": {"name": "f", "parameters": "{}"}}),
            ErrorCode::InvalidValue,
            "tools[0].function.parameters",
        ),
        (
            json!({"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}),
            ErrorCode::InvalidValue,
            "tools[0].function.parameters",
        ),
    ] {
        refused(chat(json!({"tools": [tool]})), code, param);
    }
}

#[test]
fn functions_in_the_older_form_are_tools_of_which_one_is_called() {
    let functions = json!([{"name": "weather", "description": "d", "parameters": {"type": "object"}}, {"name": "g"}]);
    let read = |choice: Value| chat(json!({"functions": functions, "function_call": choice}));
    for (choice, expected) in [
        (Value::Null, ToolChoice::Auto),
        (json!("auto"), ToolChoice::Auto),
        (json!("none"), ToolChoice::None),
        (json!({"name": "g"}), ToolChoice::Function("g".into())),
    ] {
        let generation = read(choice).expect("well formed");
        let input = generation.job.input;
        assert!(generation.calls_functions && input.one_call);
        assert_eq!((input.tools.len(), input.tools[0].name.as_str(), input.tool_choice), (2, "weather", expected));
    }
    assert!(!chat(json!({"functions": []})).expect("none are offered").calls_functions);
    refused(read(json!("required")), ErrorCode::InvalidValue, "function_call");
    refused(read(json!({"name": "h"})), ErrorCode::InvalidValue, "function_call");
    refused(chat(json!({"function_call": {"name": "f"}})), ErrorCode::InvalidValue, "function_call");
    refused(chat(json!({"functions": [{"name": "a b"}]})), ErrorCode::InvalidValue, "functions");
    refused(chat(json!({"functions": [{}]})), ErrorCode::InvalidValue, "functions[0]");
    let bad = json!([{"name": "f", "parameters": {"type": "string"}}]);
    refused(chat(json!({"functions": bad})), ErrorCode::InvalidValue, "functions[0].parameters");
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    refused(chat(json!({"functions": functions, "tools": tools})), ErrorCode::InvalidValue, "functions");
}

#[test]
fn results_of_functions_belong_to_the_call_before_them() {
    let call =
        |name: &str| json!({"role": "assistant", "content": null, "function_call": {"name": name, "arguments": "{}"}});
    let result = |name: &str, content: Value| json!({"role": "function", "name": name, "content": content});
    let messages = json!([call("f"), result("f", json!("42")), call("g"), result("g", Value::Null)]);
    let read = chat(json!({"messages": messages})).expect("well formed").job.input.messages.expect("given");
    let ids: Vec<_> = read.iter().map(|message| message.tool_call_id.as_deref()).collect();
    assert_eq!(ids, [None, Some("call_0"), None, Some("call_2")]);
    assert_eq!((&*read[0].tool_calls[0].id, &*read[2].tool_calls[0].id), ("call_0", "call_2"));
    assert_eq!((read[1].role, read[3].content.as_str()), (Role::Tool, ""));
    let user = json!([{"role": "user", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}]);
    refused(chat(json!({"messages": user})), ErrorCode::UnsupportedParameter, "messages[0].function_call");
}

#[test]
fn one_call_is_made_where_calls_are_required_and_several_are_not_asked_for() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let one_call = |choice: &str, several: Value| {
        let change = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": several});
        chat(change).expect("well formed").job.input.one_call
    };
    for (choice, several, expected) in [
        ("required", Value::Null, true),
        ("required", json!(true), false),
        ("required", json!(false), true),
        ("auto", Value::Null, false),
        ("auto", json!(false), true),
    ] {
        assert_eq!(one_call(choice, several.clone()), expected, "{choice} {several}");
    }
}

#[test]
fn a_limit_may_have_a_fraction_of_zero_and_minus_one_is_none() {
    let of_chat = |limit: Value| chat(json!({"max_tokens": limit})).expect("well formed").job.input.max_tokens;
    assert_eq!((of_chat(json!(8.0)), of_chat(json!(-1)), of_chat(Value::Null)), (Some(8), None, None));
    let of_text = |limit: Value| completion(json!({"max_tokens": limit})).expect("well formed").job.input.max_tokens;
    assert_eq!((of_text(json!(-1)), of_text(Value::Null)), (None, Some(16)));
    assert_eq!(chat(json!({"n": 2.0})).expect("well formed").job.input.n, Some(2));
}

#[test]
fn what_is_said_outright_goes_before_the_models_own_sampling() {
    let said = json!({"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1});
    let input = chat(said).expect("well formed").job.input;
    assert_eq!((input.temperature, input.top_p, input.top_k, input.min_p), (Some(1.0), Some(1.0), Some(0), Some(0.0)));
    assert_eq!(chat(json!({"top_k": -1})).expect("well formed").job.input.top_k, Some(0));
    let left = chat(json!({})).expect("well formed").job.input;
    assert_eq!((left.temperature, left.top_p, left.top_k, left.min_p), (None, None, None, None));
}

#[test]
fn deterministic_is_a_field_of_both_endpoints_and_no_seed_switches_it_on() {
    for read in [chat, completion] {
        let deterministic = |change| read(change).expect("well formed").job.input.deterministic;
        assert!(deterministic(json!({"deterministic": true})));
        assert!(!deterministic(json!({"seed": 7, "temperature": 0})));
    }
}

#[test]
fn a_last_message_of_the_assistant_may_be_continued() {
    let last = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]);
    let asked = json!({"messages": last, "continue_final_message": true, "add_generation_prompt": false});
    assert!(chat(asked.clone()).expect("well formed").job.input.continue_last);
    refused(chat(json!({"continue_final_message": true})), ErrorCode::InvalidValue, "continue_final_message");
    let mut both = asked;
    both["add_generation_prompt"] = true.into();
    refused(chat(both), ErrorCode::InvalidValue, "add_generation_prompt");
}

#[test]
fn what_is_no_text_is_refused_by_the_word_people_have_for_it() {
    for (kind, word) in [("image_url", "images"), ("input_audio", "audio"), ("file", "files"), ("video_url", "video")] {
        let messages = json!([{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": kind}]}]);
        let error = chat(json!({"messages": messages})).expect_err(kind);
        assert!(error.message.starts_with(word) && error.message.contains("messages[0].content[1]"), "{error}");
    }
    let refusal = json!([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]);
    let read = chat(json!({"messages": refusal})).expect("well formed").job.input.messages.expect("given");
    assert_eq!(read[0].content, "No.");
}

#[test]
fn errors_speak_of_json_and_not_of_rust() {
    for (change, expected) in [
        (json!({"seed": [1]}), "seed: invalid type: array, expected an integer of 64 bits"),
        (json!({"max_tokens": "x"}), "max_tokens: invalid type: string \"x\", expected a whole number"),
        (json!({"messages": ["x"]}), "messages[0]: invalid type: string \"x\", expected an object"),
        (json!({"messages": {}}), "messages: invalid type: object, expected an array"),
        (
            json!({"messages": [{"role": "boss"}]}),
            "messages[0].role: unknown value `boss`, expected one of `system`, `developer`, `user`, `assistant`, `tool`, \
             `function`",
        ),
        (json!({"temperature": true}), "temperature: invalid type: boolean `true`, expected a number"),
        (json!({"stream_options": 3}), "stream_options: invalid type: integer `3`, expected an object"),
        (
            json!({"prompt": [1.5]}),
            "prompt[0]: invalid type: number `1.5`, expected a text, a token, or an array of tokens",
        ),
    ] {
        assert_eq!(chat(change).expect_err(expected).message, expected);
    }
    let doubled = parse_chat(br#"{"model":"m","model":"n","messages":[]}"#).expect_err("a field comes twice");
    assert_eq!((doubled.message.as_str(), doubled.param.as_deref()), ("model is given more than once", Some("model")));
    let nested = parse_chat(br#"{"model":"m","messages":[{"role":"user","role":"user","content":"a"}]}"#);
    assert_eq!(nested.expect_err("a field comes twice").param.as_deref(), Some("messages[0].role"));
}

#[test]
fn a_form_may_be_asked_for_in_openais_words_or_in_vllms() {
    let schema = json!({"type": "object"});
    let as_schema = || OutputFormat::JsonSchema(schema.clone());
    let named = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}});
    let loose = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let read_loosely = json!({"type": "object", "x-guidance": {"lenient": true}});
    for (change, expected) in [
        (json!({"response_format": {"type": "json_object"}}), OutputFormat::Json),
        (json!({"response_format": named}), as_schema()),
        (json!({"response_format": loose}), OutputFormat::JsonSchema(read_loosely)),
        (json!({"guided_json": schema}), as_schema()),
        (json!({"guided_json": schema.to_string()}), as_schema()),
        (json!({"guided_regex": "[ab]+"}), OutputFormat::Regex("[ab]+".into())),
        (json!({"guided_choice": ["yes", "no."]}), OutputFormat::Regex(r"(yes|no\.)".into())),
        (json!({"guided_grammar": "start: \"a\""}), OutputFormat::Lark("start: \"a\"".into())),
        (json!({"structured_outputs": {"json": schema}}), as_schema()),
        (json!({"structured_outputs": {"json_object": true}}), OutputFormat::Json),
        (json!({"structured_outputs": {"choice": ["a"]}}), OutputFormat::Regex("(a)".into())),
        (
            json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}),
            OutputFormat::Regex("a".into()),
        ),
        (json!({}), OutputFormat::Text),
    ] {
        for generation in [chat(change.clone()), completion(change.clone())] {
            assert_eq!(generation.expect("well formed").job.input.format, expected, "{change}");
        }
    }
}

#[test]
fn a_form_that_is_unknown_incomplete_or_one_too_many_is_refused_by_name() {
    let incomplete = json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}});
    refused(chat(incomplete), ErrorCode::InvalidValue, "response_format.json_schema.schema");
    for (change, code, param) in [
        (json!({"response_format": {}}), ErrorCode::InvalidValue, "response_format"),
        (json!({"response_format": {"type": "xml"}}), ErrorCode::UnsupportedParameter, "response_format.type"),
        (json!({"guided_json": "{"}), ErrorCode::InvalidValue, "guided_json"),
        (json!({"guided_choice": []}), ErrorCode::InvalidValue, "guided_choice"),
        (json!({"guided_regex": "a", "guided_grammar": "b"}), ErrorCode::InvalidValue, "guided"),
        (
            json!({"structured_outputs": {"regex": "a", "json_object": true}}),
            ErrorCode::InvalidValue,
            "structured_outputs",
        ),
        (
            json!({"guided_regex": "a", "response_format": {"type": "json_object"}}),
            ErrorCode::InvalidValue,
            "response_format",
        ),
        (
            json!({"structured_outputs": {"structural_tag": {"a": 1}}}),
            ErrorCode::UnsupportedParameter,
            "structured_outputs.structural_tag",
        ),
        (json!({"guided_regex": "x".repeat(300_000)}), ErrorCode::InvalidValue, "response_format"),
    ] {
        refused(chat(change), code, param);
    }
}

#[test]
fn an_effort_is_told_to_the_template_and_what_is_told_outright_goes_before() {
    let options = |change| Value::Object(chat(change).expect("well formed").job.input.template_options);
    assert_eq!(options(json!({"reasoning_effort": "high"})), json!({"reasoning_effort": "high"}));
    let without = json!({"reasoning_effort": "none", "enable_thinking": false});
    assert_eq!(options(json!({"reasoning_effort": "none"})), without);
    let both = json!({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": true, "x": [1]}});
    assert_eq!(options(both), json!({"reasoning_effort": "none", "enable_thinking": true, "x": [1]}));
    refused(chat(json!({"reasoning_effort": "great"})), ErrorCode::InvalidValue, "reasoning_effort");
}

#[test]
fn calls_and_their_results_stand_in_a_conversation() {
    let call = json!({"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let messages = json!([
        {"role": "user", "content": "hi", "name": "ada"},
        {"role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": [{"type": "text", "text": "42"}], "tool_call_id": "c1"},
    ]);
    let read = chat(json!({"messages": messages})).expect("well formed").job.input.messages.expect("given");
    let call = ToolCall { id: "c1".into(), name: "f".into(), arguments: "{}".into() };
    let expected = [
        Message { name: Some("ada".into()), ..Message::new(Role::User, "hi") },
        Message { tool_calls: vec![call], reasoning: Some("hm".into()), ..Message::new(Role::Assistant, "") },
        Message { tool_call_id: Some("c1".into()), ..Message::new(Role::Tool, "42") },
    ];
    assert_eq!(read, expected);
}

#[test]
fn an_error_in_a_message_names_its_place() {
    let message = |message: Value| chat(json!({"messages": [{"role": "user", "content": "a"}, message]}));
    refused(message(json!({"role": "wizard", "content": "b"})), ErrorCode::InvalidValue, "messages[1].role");
    refused(message(json!({"role": "function", "content": "b"})), ErrorCode::InvalidValue, "messages[1].name");
    refused(message(json!({"role": "tool", "content": "b"})), ErrorCode::InvalidValue, "messages[1].tool_call_id");
    refused(message(json!({"role": "assistant"})), ErrorCode::InvalidValue, "messages[1].content");
    refused(message(json!({"role": "user"})), ErrorCode::InvalidValue, "messages[1].content");
    refused(message(json!({"role": "user", "content": 7})), ErrorCode::InvalidValue, "messages[1].content");
    let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
    refused(message(image), ErrorCode::UnsupportedParameter, "messages[1].content[0]");
    let unknown = json!({"role": "user", "content": [{"type": "smell"}]});
    refused(message(unknown), ErrorCode::UnsupportedParameter, "messages[1].content[0].type");
    let bare = json!({"role": "user", "content": [{"type": "text"}]});
    refused(message(bare), ErrorCode::InvalidValue, "messages[1].content[0].text");
    let calls = |role: &str, call: Value| message(json!({"role": role, "content": "x", "tool_calls": [call]}));
    refused(calls("assistant", json!({})), ErrorCode::InvalidValue, "messages[1].tool_calls[0]");
    let custom = json!({"id": "c", "type": "custom"});
    refused(calls("assistant", custom), ErrorCode::UnsupportedParameter, "messages[1].tool_calls[0].type");
    let bare = json!({"id": "c", "type": "function"});
    refused(calls("assistant", bare.clone()), ErrorCode::InvalidValue, "messages[1].tool_calls[0].function");
    refused(calls("user", bare), ErrorCode::UnsupportedParameter, "messages[1].tool_calls");
    let object = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}});
    let field = "messages[1].tool_calls[0].function.arguments";
    refused(calls("assistant", object), ErrorCode::InvalidValue, field);
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
        ("max_tokens", json!(-2)),
        ("max_tokens", json!("8")),
        ("max_completion_tokens", json!(0)),
        ("max_completion_tokens", json!(5_000_000_000_u64)),
        ("n", json!(-1)),
        ("n", json!(1.5)),
        ("logit_bias", json!({"abc": 5})),
        ("logit_bias", json!([1])),
        ("deterministic", json!("yes")),
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
fn a_prompt_may_be_text_or_tokens_and_stand_alone_or_in_an_array() {
    for prompt in [json!("once"), json!(["once"])] {
        let input = completion(json!({"prompt": prompt})).expect("well formed").job.input;
        assert_eq!(input.prompt.as_deref(), Some("once"));
        assert_eq!(input.max_tokens, Some(16), "OpenAI's default");
    }
    for prompt in [json!([1, 2]), json!([[1, 2]])] {
        let input = completion(json!({"prompt": prompt})).expect("well formed").job.input;
        assert_eq!((input.prompt, input.prompt_tokens), (None, Some(vec![1, 2])));
    }
    for prompt in [json!(["a", "b"]), json!([[1, 2], [3]]), json!(["a", [1]])] {
        let input = completion(json!({"prompt": prompt, "n": 3})).expect("well formed").job.input;
        assert_eq!((input.prompts.as_ref().map(Vec::len), input.answers()), (Some(2), 6));
        assert_eq!((input.prompt, input.prompt_tokens), (None, None));
    }
    let echo = completion(json!({"prompt": "a", "echo": true, "max_tokens": 0})).expect("well formed").job.input;
    assert_eq!((echo.echo, echo.max_tokens), (true, Some(0)));
    refused(completion(json!({"prompt": "a", "max_tokens": 0})), ErrorCode::InvalidValue, "max_tokens");
    refused(chat(json!({"echo": true})), ErrorCode::UnsupportedParameter, "echo");
    for (suffix, expected) in [(json!("}"), Some("}")), (json!(""), None), (json!(null), None)] {
        let input = completion(json!({"prompt": "{", "suffix": suffix})).expect("well formed").job.input;
        assert_eq!(input.suffix.as_deref(), expected);
    }
    for prompt in [json!([]), json!(null), json!({"a": 1}), json!(["a", 1]), json!([[]])] {
        refused(completion(json!({"prompt": prompt})), ErrorCode::InvalidValue, "prompt");
    }
    refused(completion(json!({"prompt": [1, -2]})), ErrorCode::InvalidValue, "prompt[1]");
    refused(completion(json!({"prompt": [5_000_000_000_u64]})), ErrorCode::InvalidValue, "prompt[0]");
}

#[test]
fn texts_to_make_vectors_of_come_in_four_forms() {
    let read = |change: Value| {
        let mut body = json!({"model": "m", "input": "a"});
        merge(&mut body, change);
        parse_embeddings(body.to_string().as_bytes())
    };
    let text = |text: &str| EmbedInput::Text(text.into());
    for (input, expected) in [
        (json!("a"), vec![text("a")]),
        (json!(["a", "b"]), vec![text("a"), text("b")]),
        (json!([1, 2]), vec![EmbedInput::Tokens(vec![1, 2])]),
        (json!([[1], [2, 3]]), vec![EmbedInput::Tokens(vec![1]), EmbedInput::Tokens(vec![2, 3])]),
    ] {
        let vectors = read(json!({"input": input, "user": "u"})).expect("well formed");
        assert_eq!((vectors.job.input.embed, vectors.encoding), (Some(expected), Encoding::Float));
    }
    let vectors = read(json!({"encoding_format": "base64", "dimensions": 384})).expect("well formed");
    assert_eq!((vectors.encoding, vectors.job.input.dimensions), (Encoding::Base64, Some(384)));
    for (change, param) in [
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": ""}), "input"),
        (json!({"input": ["a", ""]}), "input"),
        (json!({"input": [[]]}), "input"),
        (json!({"input": vec!["x"; 2_049]}), "input"),
        (json!({"encoding_format": "hex"}), "encoding_format"),
        (json!({"dimensions": 0}), "dimensions"),
    ] {
        let error = read(change).expect_err(param);
        assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidValue, Some(param)), "{error}");
    }
    assert_eq!(read(json!({"model": null})).expect_err("no model").code, ErrorCode::MissingModel);
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
    let hidden = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"x"}}],"tool_choice":{deep}}}"#);
    assert_eq!(parse_chat(hidden.as_bytes()).expect_err("deep").code, ErrorCode::InvalidJson);
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_chat(&bytes);
        let _ = parse_completion(&bytes);
        let _ = parse_infer(&bytes);
        let _ = parse_embeddings(&bytes);
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
        let _ = parse_embeddings(&bytes);
    }
}

#[test]
fn a_field_that_one_endpoint_has_alone_does_nothing_in_the_other() {
    let plain = (chat(json!({})).expect("sound"), completion(json!({})).expect("sound"));
    let check = |field: &str, outcome: Result<Generation, WireError>, plain: &Generation| match outcome {
        Ok(generation) => assert_eq!(generation, *plain, "{field}"),
        Err(error) => assert_eq!((error.code, error.param.as_deref()), (ErrorCode::UnsupportedParameter, Some(field))),
    };
    let texts = [json!("x"), json!("x"), json!(true)];
    for (field, value) in body::TEXTS_ALONE.into_iter().zip(texts) {
        check(field, chat(json!({field: value})), &plain.0);
    }
    let chats = json!({
        "messages": [{"role": "user", "content": "x"}], "top_logprobs": 1, "tool_choice": "required",
        "tools": [{"type": "function", "function": {"name": "f"}}], "parallel_tool_calls": true,
        "prediction": {"type": "content", "content": "x"}, "reasoning_effort": "low",
        "chat_template_kwargs": {"x": 1}, "continue_final_message": true, "add_generation_prompt": true,
    });
    for field in body::CHATS_ALONE {
        check(field, completion(json!({field: chats[field]})), &plain.1);
    }
}

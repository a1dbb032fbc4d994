//! What a request may ask for beside a text.

use protocol::infer::{EmbedInput, InferChunk, Role, ToolChoice};
use serde_json::{Value, json};

use crate::{Network, chat_body, expect_error};

async fn whole(network: &Network, body: &Value) -> Value {
    let response = network.post("/v1/chat/completions", body).send().await.expect("answered");
    assert_eq!(response.status(), 200);
    response.json().await.expect("JSON")
}

/// Returns the events of a streamed answer but its `[DONE]`.
async fn events(network: &Network, path: &str, body: &Value) -> Vec<Value> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let text = network.post(path, &body).send().await.expect("answered").text().await.expect("text");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let events = text.lines().filter_map(|line| line.strip_prefix("data: {"));
    events.map(|event| serde_json::from_str(&format!("{{{event}")).expect("JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn several_answers_come_with_their_index_whole_and_streamed() {
    let network = Network::start().await;
    let mut body = chat_body("several");
    body["n"] = json!(2);
    let answer = whole(&network, &body).await;
    let choices: Vec<_> = answer["choices"].as_array().expect("choices").iter().collect();
    let expected = [(0, "ab", "stop"), (1, "x", "length")];
    assert_eq!(choices.len(), 2);
    for (choice, (index, text, reason)) in choices.into_iter().zip(expected) {
        assert_eq!(choice["index"], index);
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(text), &json!(reason)));
    }
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    let events = events(&network, "/v1/chat/completions", &body).await;
    let choices = events.iter().map(|event| &event["choices"][0]);
    let choices: Vec<_> = choices.map(|choice| (choice["index"].clone(), choice["finish_reason"].clone())).collect();
    let expected = [(0, None), (1, None), (1, Some("length")), (0, None), (0, Some("stop"))];
    assert_eq!(choices, expected.map(|(index, reason)| (json!(index), json!(reason))));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_not_asked_for_is_a_breach() {
    let network = Network::start().await;
    expect_error(network.chat("several").await, 500, "internal_error", None).await;
    expect_error(network.chat("vectors").await, 500, "internal_error", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thoughts_and_calls_are_kept_apart_from_the_text() {
    let network = Network::start().await;
    let mut body = chat_body("call");
    body["tools"] = json!([{"type": "function", "function": {"name": "weather"}}]);
    let answer = whole(&network, &body).await;
    let call = json!({"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}});
    let message = json!({
        "role": "assistant", "content": null, "reasoning_content": "hm", "reasoning": "hm", "tool_calls": [call],
        "refusal": null
    });
    assert_eq!(answer["choices"][0]["message"], message);
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    let details = json!({"reasoning_tokens": 1});
    assert_eq!(answer["usage"]["completion_tokens_details"], details);
    let mut counted = body.clone();
    counted["stream_options"] = json!({"include_usage": true});
    let streamed = events(&network, "/v1/chat/completions", &counted).await;
    assert_eq!(streamed.last().expect("events")["usage"]["completion_tokens_details"], details);
    let plain = whole(&network, &chat_body("hi")).await;
    assert_eq!(plain["usage"].get("completion_tokens_details"), None);
    let events = events(&network, "/v1/chat/completions", &body).await;
    let deltas: Vec<_> = events.iter().map(|event| event["choices"][0]["delta"].clone()).collect();
    let begin = json!({"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{"}});
    let expected = [
        json!({"role": "assistant", "content": null, "reasoning_content": "hm", "reasoning": "hm"}),
        json!({"tool_calls": [begin]}),
        json!({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}),
        json!({}),
    ];
    assert_eq!(deltas, expected);
    let job = network.fake.jobs.lock()[0].clone();
    assert_eq!(job.input.tools[0].name, "weather");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_in_the_older_form_are_offered_called_and_answered_in_it() {
    let network = Network::start().await;
    let mut body = chat_body("call");
    body["functions"] = json!([{"name": "weather", "parameters": {"type": "object"}}]);
    body["function_call"] = json!({"name": "weather"});
    let answer = whole(&network, &body).await;
    let call = json!({"name": "weather", "arguments": "{}"});
    let message = json!({
        "role": "assistant", "content": null, "reasoning_content": "hm", "reasoning": "hm", "function_call": call,
        "refusal": null
    });
    assert_eq!(answer["choices"][0]["message"], message);
    assert_eq!(answer["choices"][0]["finish_reason"], "function_call");
    let events = events(&network, "/v1/chat/completions", &body).await;
    let calls: Vec<_> = events.iter().filter_map(|event| event["choices"][0]["delta"].get("function_call")).collect();
    assert_eq!(calls, [&json!({"name": "weather", "arguments": "{"}), &json!({"arguments": "}"})]);
    assert_eq!(events.last().expect("events")["choices"][0]["finish_reason"], "function_call");
    body["messages"] = json!([
        {"role": "user", "content": "hi"}, message, {"role": "function", "name": "weather", "content": "sunny"}
    ]);
    whole(&network, &body).await;
    let job = network.fake.jobs.lock().last().expect("a job").clone();
    let asked = (job.input.tools[0].name.as_str(), job.input.tool_choice, job.input.one_call);
    assert_eq!(asked, ("weather", ToolChoice::Function("weather".into()), true));
    let messages = job.input.messages.expect("a chat");
    assert_eq!(messages[2].tool_call_id.as_ref(), Some(&messages[1].tool_calls[0].id));
    assert_eq!((messages[2].role, messages[1].reasoning.as_deref()), (Role::Tool, Some("hm")));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_have_the_form_of_their_endpoint() {
    let network = Network::start().await;
    let mut body = chat_body("likely");
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    let token = |text: &str| json!({"token": text, "logprob": -0.5, "bytes": text.as_bytes()});
    let mut first = token("Hi");
    first["top_logprobs"] = json!([token("Hi"), token("Ho")]);
    let expected = json!({"content": [first], "refusal": null});
    assert_eq!(whole(&network, &body).await["choices"][0]["logprobs"], expected);
    assert_eq!(events(&network, "/v1/chat/completions", &body).await[0]["choices"][0]["logprobs"], expected);
    let body = json!({"model": "tiny", "prompt": "likely", "logprobs": 2});
    let expected = json!({
        "tokens": ["Hi"], "token_logprobs": [-0.5], "top_logprobs": [{"Hi": -0.5, "Ho": -0.5}], "text_offset": [6]
    });
    let answer = network.post("/v1/completions", &body).send().await.expect("answered");
    let answer: Value = answer.json().await.expect("JSON");
    assert_eq!(answer["choices"][0]["logprobs"], expected);
    assert_eq!(events(&network, "/v1/completions", &body).await[0]["choices"][0]["logprobs"], expected);
    let job = network.fake.jobs.lock()[0].clone();
    assert_eq!(job.input.logprobs, Some(2));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_are_one_job_with_their_answers_in_order() {
    let network = Network::start().await;
    let body = json!({"model": "tiny", "prompt": ["several", [1, 2]], "logprobs": 0});
    let answer = network.post("/v1/completions", &body).send().await.expect("answered");
    let answer: Value = answer.json().await.expect("JSON");
    let texts: Vec<_> = answer["choices"].as_array().expect("choices").iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["ab", "x"]);
    let jobs = network.fake.jobs.lock().clone();
    let prompts = vec![EmbedInput::Text("several".into()), EmbedInput::Tokens(vec![1, 2])];
    assert_eq!((jobs.len(), &jobs[0].input.prompts), (1, &Some(prompts)));
    // One in an array is one.
    let body = json!({"model": "tiny", "prompt": ["hi"]});
    network.post("/v1/completions", &body).send().await.expect("answered");
    assert_eq!(network.fake.jobs.lock()[1].input.prompt.as_deref(), Some("hi"));
    for (prompt, n) in [(json!(vec!["x"; 129]), 1), (json!(vec!["x"; 9]), 15), (json!([[1], []]), 1)] {
        let body = json!({"model": "tiny", "prompt": prompt, "n": n});
        let refused = network.post("/v1/completions", &body).send().await.expect("answered");
        expect_error(refused, 400, "invalid_value", Some("prompt")).await;
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_named_by_the_model_or_by_a_field_of_its_own() {
    let network = Network::start().await;
    let ask = |model: &str, adapter: Option<&str>| {
        let mut body = chat_body("hi");
        body["model"] = json!(model);
        body["adapter"] = json!(adapter);
        let request = network.post("/v1/chat/completions", &body);
        async { request.send().await.expect("answered") }
    };
    for (model, adapter) in [("tiny:pirate", None), ("tiny", Some("pirate")), ("tiny@1.1:pirate", Some("pirate"))] {
        let answer: Value = ask(model, adapter).await.json().await.expect("JSON");
        assert_eq!(answer["model"], model);
    }
    let jobs = network.fake.jobs.lock().clone();
    assert!(jobs.iter().all(|job| job.input.adapter.as_ref().is_some_and(|name| name.as_str() == "pirate")));
    expect_error(ask("tiny:pirate", Some("poet")).await, 400, "invalid_value", Some("adapter")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_api_carries_it_all() {
    let network = Network::start().await;
    let body = json!({"modelId": "tiny", "input": {"embed": ["vectors", [1, 2]]}});
    let text = network.post("/infer", &body).send().await.expect("answered").text().await.expect("text");
    let chunks: Vec<InferChunk> = text.lines().map(|line| serde_json::from_str(line).expect("a chunk")).collect();
    assert_eq!(chunks[1].payload.embeddings[0].vector(), Some(vec![1.0, 0.5]));
    let body = json!({"modelId": "tiny", "input": {"prompt": "several", "n": 2, "format": "json", "logprobs": 1}});
    let text = network.post("/infer", &body).send().await.expect("answered").text().await.expect("text");
    assert_eq!(text.lines().count(), 6);
    let job = network.fake.jobs.lock()[1].clone();
    assert_eq!((job.input.n, job.input.format), (Some(2), protocol::infer::OutputFormat::Json));
    let body = json!({"modelId": "tiny", "input": {"prompt": "x", "n": 17}});
    let refused = network.post("/infer", &body).send().await.expect("answered");
    expect_error(refused, 400, "invalid_value", Some("input.n")).await;
    network.end().await;
}

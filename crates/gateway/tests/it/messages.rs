//! Anthropic's Messages API, as its SDKs and Claude Code use it.

use protocol::infer::Role;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tether_gateway::Config;

use crate::{Network, config, fake};

fn body(prompt: &str) -> Value {
    json!({"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": prompt}]})
}

async fn ask(network: &Network, body: &Value) -> Response {
    network.post("/v1/messages", body).send().await.expect("answered")
}

async fn whole(network: &Network, body: &Value) -> Value {
    let response = ask(network, body).await;
    assert_eq!(response.status(), 200);
    response.json().await.expect("JSON")
}

/// Returns the text of a stream.
async fn streamed(network: &Network, prompt: &str) -> String {
    let mut body = body(prompt);
    body["stream"] = json!(true);
    let response = ask(network, &body).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    response.text().await.expect("text")
}

/// Returns the data of each event.
fn data(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

fn types(text: &str) -> Vec<String> {
    data(text).iter().map(|event| event["type"].as_str().expect("a type").to_owned()).collect()
}

/// Checks status and type of an error in Anthropic's shape, and returns its message.
async fn expect_refusal(response: Response, status: u16, kind: &str) -> String {
    let (got, headers) = (response.status().as_u16(), response.headers().clone());
    let body: Value = response.json().await.expect("an error is JSON");
    assert_eq!((got, &body["type"], &body["error"]["type"]), (status, &json!("error"), &json!(kind)), "{body}");
    assert_eq!(body["request_id"], headers["request-id"].to_str().expect("text"));
    body["error"]["message"].as_str().expect("a text").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_comes_whole() {
    let network = Network::start().await;
    let response = ask(&network, &body("hi")).await;
    let id = response.headers()["request-id"].to_str().expect("text").to_owned();
    assert_eq!(response.headers()["x-request-id"], id.as_str());
    let answer: Value = response.json().await.expect("JSON");
    let expected = json!({
        "id": format!("msg_{}", id.replace('-', "")), "type": "message", "role": "assistant", "model": "tiny",
        "content": [{"type": "text", "text": "Hello"}], "stop_reason": "end_turn", "stop_sequence": null,
        "usage": {
            "input_tokens": 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 2,
            "service_tier": "standard",
        },
    });
    assert_eq!(answer, expected);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_streams_in_anthropics_events() {
    let network = Network::start().await;
    let text = streamed(&network, "hi").await;
    let expected = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(types(&text), expected);
    let said: String = data(&text).iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(said, "Hello");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thoughts_and_calls_are_blocks_of_their_own() {
    let network = Network::start().await;
    let mut asked = body("call");
    asked["tools"] = json!([{"name": "weather", "input_schema": {"type": "object"}}]);
    let answer = whole(&network, &asked).await;
    let thought = &answer["content"][0];
    assert_eq!((&thought["type"], &thought["thinking"]), (&json!("thinking"), &json!("hm")));
    assert!(!thought["signature"].as_str().expect("a text").is_empty());
    let call = json!({"type": "tool_use", "id": "c1", "name": "weather", "input": {}});
    assert_eq!((&answer["content"][1], &answer["stop_reason"]), (&call, &json!("tool_use")));
    assert_eq!(answer["usage"]["output_tokens_details"], json!({"thinking_tokens": 1}));
    let events = data(&streamed(&network, "call").await);
    let json: String = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
    assert_eq!(json, "{}");
    assert_eq!(network.fake.jobs.lock()[0].input.tools[0].name, "weather");
    // The thought is taken back with its signature.
    let mut next = body("call");
    let results = json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "warm"}]});
    next["messages"] =
        json!([body("call")["messages"][0], {"role": "assistant", "content": answer["content"]}, results]);
    assert_eq!(ask(&network, &next).await.status(), 200);
    let roles: Vec<_> = network.fake.jobs.lock()[2].input.messages.iter().flatten().map(|said| said.role).collect();
    assert_eq!(roles, [Role::User, Role::Assistant, Role::Tool]);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stop_sequence_that_ended_an_answer_is_named() {
    let network = Network::start().await;
    let answer = whole(&network, &body("stopped")).await;
    assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!("stop_sequence"), &json!("END")));
    let text = streamed(&network, "stopped").await;
    assert!(text.contains(r#""delta":{"stop_reason":"stop_sequence","stop_sequence":"END"}"#), "{text}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_counted_without_a_limit_and_without_cost() {
    let network = Network::start().await;
    let asked = json!({"model": "tiny", "messages": [{"role": "user", "content": "count"}]});
    let response = network.post("/v1/messages/count_tokens", &asked).send().await.expect("answered");
    assert_eq!(response.json::<Value>().await.expect("JSON"), json!({"input_tokens": 7}));
    assert!(network.fake.jobs.lock()[0].input.count_only);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_anthropics_shape_wherever_they_come_from() {
    let network = Network::start_with(Config { body_bytes_max: 100_000, ..config() }).await;
    let refuse = |code: &str| body(&format!("refuse {code}"));
    for (asked, status, kind) in [
        (json!({"model": "tiny"}), 400, "invalid_request_error"),
        (refuse("context_length_exceeded"), 400, "invalid_request_error"),
        (json!({"model": "nothing", "max_tokens": 9, "messages": []}), 400, "invalid_request_error"),
        (refuse("residency_mismatch"), 403, "permission_error"),
        (refuse("model_not_found"), 404, "not_found_error"),
        (body(&"x".repeat(200_000)), 413, "request_too_large"),
        (refuse("rate_limit_exceeded"), 429, "rate_limit_error"),
        (refuse("worker_failed"), 502, "api_error"),
        (refuse("no_capacity"), 529, "overloaded_error"),
        (refuse("breaker_open"), 529, "overloaded_error"),
    ] {
        for path in ["/v1/messages", "/v1/messages/count_tokens"] {
            let response = network.post(path, &asked).send().await.expect("answered");
            expect_refusal(response, status, kind).await;
        }
    }
    let keyless = network.request(Method::POST, "/v1/messages").json(&body("hi"));
    expect_refusal(keyless.send().await.expect("answered"), 401, "authentication_error").await;
    expect_refusal(network.get("/v1/messages").await, 405, "invalid_request_error").await;
    expect_refusal(network.get("/v1/messages/batches").await, 404, "not_found_error").await;
    let elsewhere = network.request(Method::GET, "/v1/assistants").header("anthropic-version", "2023-06-01");
    expect_refusal(elsewhere.send().await.expect("answered"), 404, "not_found_error").await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_comes_is_refused_in_anthropics_shape() {
    let network = Network::start().await;
    let silent = reqwest::Body::wrap_stream(futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let request = network.request(Method::POST, "/v1/messages").bearer_auth(fake::token(1)).body(silent);
    expect_refusal(request.send().await.expect("answered"), 408, "invalid_request_error").await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_in_mid_stream_is_an_event_and_the_message_does_not_stop() {
    let network = Network::start().await;
    let text = streamed(&network, "break").await;
    let types = types(&text);
    assert_eq!((types[0].as_str(), types.last().map(String::as_str)), ("message_start", Some("error")));
    assert!(!text.contains("message_stop"), "{text}");
    assert_eq!(data(&text).last().expect("events")["error"]["type"], "api_error");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_is_filled_with_pings() {
    let network = Network::start_with(Config { keep_alive_ms: 10, ..config() }).await;
    let mut body = body("held");
    body["stream"] = json!(true);
    let mut response = ask(&network, &body).await;
    let first = response.chunk().await.expect("a chunk").expect("before the end");
    assert_eq!(first, "event: ping\ndata: {\"type\":\"ping\"}\n\n");
    network.fake.release.notify_one();
    let rest = types(&response.text().await.expect("text"));
    let message: Vec<_> = rest.iter().skip_while(|kind| *kind == "ping").collect();
    assert_eq!((message[0].as_str(), message[message.len() - 1].as_str()), ("message_start", "message_stop"));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_come_in_the_shape_of_the_clients_api() {
    let network = Network::start().await;
    let get = |path: &'static str| {
        let request = network.request(Method::GET, path).header("anthropic-version", "2023-06-01");
        async { request.header("x-api-key", fake::token(1)).send().await.expect("answered") }
    };
    let list: Value = get("/v1/models").await.json().await.expect("JSON");
    let all = list["data"].as_array().expect("a list");
    assert!(!all.is_empty() && list["has_more"] == json!(false));
    assert_eq!((&list["first_id"], &list["last_id"]), (&all[0]["id"], &all[all.len() - 1]["id"]));
    let page: Value = get("/v1/models?limit=1").await.json().await.expect("JSON");
    assert_eq!((page["data"].as_array().map(Vec::len), &page["last_id"]), (Some(1), &all[0]["id"]));
    assert_eq!(page["has_more"], json!(all.len() > 1));
    expect_refusal(get("/v1/models?after_id=nothing").await, 400, "invalid_request_error").await;
    let tiny: Value = get("/v1/models/tiny").await.json().await.expect("JSON");
    assert_eq!((&tiny["type"], &tiny["id"], &tiny["display_name"]), (&json!("model"), &json!("tiny"), &json!("tiny")));
    expect_refusal(get("/v1/models/nothing").await, 404, "not_found_error").await;
    let openais: Value = network.get("/v1/models/tiny").await.json().await.expect("JSON");
    assert_eq!(openais["object"], "model");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_for_the_root_finds_somebody() {
    let network = Network::start().await;
    let head = network.request(Method::HEAD, "/").send().await.expect("answered");
    assert_eq!(head.status(), 200);
    let get = network.request(Method::GET, "/").send().await.expect("answered");
    assert_eq!(get.text().await.expect("text"), "Tether is running\n");
    network.end().await;
}

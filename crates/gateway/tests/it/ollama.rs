//! Ollama's API, on the gateway's address and on a port of its own.

use std::sync::Arc;

use protocol::signature::NodeKey;
use reqwest::Method;
use rpc::{Membership, MemoryNetwork, SystemClock};
use serde_json::{Value, json};
use tether_gateway::{Config, Gateway, GatewayParts};

use crate::{Network, config, fake, metrics};

fn chat(prompt: &str) -> Value {
    json!({"model": "tiny:latest", "messages": [{"role": "user", "content": prompt}]})
}

async fn lines(network: &Network, path: &str, body: &Value) -> Vec<Value> {
    let response = network.post(path, body).send().await.expect("answered");
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let text = response.text().await.expect("text");
    text.lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect()
}

async fn whole(network: &Network, path: &str, body: &Value) -> Value {
    let mut body = body.clone();
    body["stream"] = json!(false);
    let response = network.post(path, &body).send().await.expect("answered");
    assert_eq!(response.status(), 200);
    response.json().await.expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_comes_in_lines_or_whole() {
    let network = Network::start().await;
    let streamed = lines(&network, "/api/chat", &chat("hi")).await;
    let text: String = streamed.iter().map(|line| line["message"]["content"].as_str().expect("a text")).collect();
    let last = streamed.last().expect("lines");
    assert_eq!(
        (&last["done"], &last["done_reason"], &last["model"]),
        (&json!(true), &json!("stop"), &json!("tiny:latest"))
    );
    assert_eq!((&last["prompt_eval_count"], &last["eval_count"]), (&json!(5), &json!(2)));
    let same = whole(&network, "/api/chat", &chat("hi")).await;
    assert_eq!(same["message"], json!({"role": "assistant", "content": text}));
    let generated = whole(&network, "/api/generate", &json!({"model": "tiny", "prompt": "hi"})).await;
    assert_eq!((&generated["response"], &generated["done"]), (&json!(text), &json!(true)));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_comes_whole() {
    let network = Network::start().await;
    let mut body = chat("call");
    body["tools"] = json!([{"type": "function", "function": {"name": "weather"}}]);
    let call = json!([{"id": "c1", "function": {"index": 0, "name": "weather", "arguments": {}}}]);
    let streamed = lines(&network, "/api/chat", &body).await;
    assert!(streamed.iter().any(|line| line["message"]["tool_calls"] == call), "{streamed:?}");
    assert_eq!(whole(&network, "/api/chat", &body).await["message"]["tool_calls"], call);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_prompt_a_model_is_loaded_also_where_its_server_counts_no_tokens() {
    let network = Network::start().await;
    for (model, keep_alive, reason) in
        [("tiny", json!("5m"), "load"), ("tiny", json!(0), "unload"), ("other", json!(-1), "load")]
    {
        let body = json!({"model": model, "keep_alive": keep_alive});
        let loaded = whole(&network, "/api/generate", &body).await;
        assert_eq!((&loaded["response"], &loaded["done_reason"]), (&json!(""), &json!(reason)), "{model}");
    }
    assert!(network.fake.jobs.lock().iter().all(|job| job.input.count_only));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_come_in_both_forms() {
    let network = Network::start().await;
    let several = whole(&network, "/api/embed", &json!({"model": "tiny", "input": ["vectors", "b"]})).await;
    assert_eq!(several["embeddings"], json!([[0.0, 0.5], [1.0, 0.5]]));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_and_shown() {
    let network = Network::start().await;
    let tags: Value = network.get("/api/tags").await.json().await.expect("JSON");
    let names = |list: &Value| {
        let models = list["models"].as_array().expect("models").iter();
        models.map(|model| model["name"].as_str().expect("named").to_owned()).collect::<Vec<_>>()
    };
    assert!(names(&tags).contains(&"tiny:latest".to_owned()) && names(&tags).contains(&"tiny:pirate".to_owned()));
    let held: Value = network.get("/api/ps").await.json().await.expect("JSON");
    assert!(names(&held).contains(&"tiny:latest".to_owned()) && !names(&held).contains(&"other:latest".to_owned()));
    for name in names(&tags) {
        let shown = whole(&network, "/api/show", &json!({"model": name})).await;
        assert_eq!(shown["model_info"]["unknown.context_length"], 2048, "{name}");
    }
    let pulled = lines(&network, "/api/pull", &json!({"name": "tiny"})).await;
    assert_eq!(pulled.last(), Some(&json!({"status": "success"})));
    let absent = network.post("/api/pull", &json!({"model": "absent"})).send().await.expect("answered");
    assert_eq!(absent.status(), 404);
    let body: Value = absent.json().await.expect("JSON");
    assert!(body["error"].as_str().expect("a text").contains("tether model add"), "{body}");
    let version: Value = network.get("/api/version").await.json().await.expect("JSON");
    assert!(version["version"].is_string());
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_a_text() {
    let network = Network::start().await;
    for (path, body, status) in [
        ("/api/chat", chat("refuse no_capacity"), 503),
        ("/api/chat", json!({"model": "absent", "messages": [{"role": "user", "content": "hi"}]}), 404),
        ("/api/chat", json!({"messages": 1}), 400),
        ("/api/generate", json!({"model": "tiny", "prompt": "refuse no_capacity"}), 503),
        ("/api/embed", json!({"model": "tiny", "input": ""}), 400),
        ("/api/show", json!({"model": "absent"}), 404),
        ("/api/copy", json!({}), 404),
    ] {
        let response = network.post(path, &body).send().await.expect("answered");
        assert_eq!(response.status(), status, "{path} {body}");
        let error: Value = response.json().await.expect("JSON");
        assert!(error["error"].is_string(), "{path}: {error}");
    }
    let streamed = lines(&network, "/api/chat", &chat("break")).await;
    assert!(streamed.last().expect("lines")["error"].is_string(), "{streamed:?}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_asked_for_before_a_body_is_read() {
    let network = Network::start().await;
    for path in ["/api/show", "/api/pull"] {
        let request = network.request(Method::POST, path).header("content-type", "application/json").body("no JSON");
        assert_eq!(request.send().await.expect("answered").status(), 401, "{path}");
    }
    network.end().await;
}

/// A file with an API key, as a data folder has.
fn key_file(seed: u8) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), fake::token(seed) + "\n").expect("written");
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_of_its_own_may_need_no_key() {
    let key = key_file(1);
    let port = ([127, 0, 0, 1], 0).into();
    let config = Config { ollama_bind: Some(port), ollama_needs_key: false, ..config() };
    let network = Network::start_with_key_file(config, key.path().to_owned()).await;
    let client = &network.client;
    let url = |path: &str| format!("http://{}{path}", network.ollama.expect("bound"));
    let greeting = client.get(url("/")).send().await.expect("answered").text().await.expect("text");
    assert_eq!(greeting, "Ollama is running");
    let tags = client.get(url("/api/tags")).send().await.expect("answered");
    assert_eq!(tags.status(), 200);
    let answered =
        client.post(url("/api/chat")).bearer_auth("ollama").json(&chat("hi")).send().await.expect("answered");
    assert_eq!(answered.status(), 200);
    assert_eq!(network.fake.jobs.lock()[0].tenant_id.as_str(), "acme");
    let page = client.get(url("/api/tags")).header("origin", "https://evil.example.com");
    let renamed = client.get(url("/api/tags")).header("host", "evil.example.com");
    let wrong = client.get(url("/api/tags")).bearer_auth(fake::token(9));
    let passed_on = client.get(url("/api/tags")).header("x-forwarded-for", "203.0.113.9");
    let operator = client.get(url("/admin/v1/models"));
    for request in [page, renamed, wrong, passed_on, operator] {
        assert_eq!(request.send().await.expect("answered").status(), 401);
    }
    let main = network.request(Method::GET, "/api/tags").send().await.expect("answered");
    assert_eq!(main.status(), 401, "the other address needs a key");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_is_needed_on_this_machine_alone() {
    let open = Config { ollama_bind: Some(([0, 0, 0, 0], 0).into()), ollama_needs_key: false, ..config() };
    let network = MemoryNetwork::new();
    let (metrics, exposition) = metrics();
    let parts = GatewayParts {
        transport: network.node(&NodeKey::from_seed(&[9; 32])),
        clock: Arc::new(SystemClock),
        membership: Membership::unchecked(),
        metrics,
        exposition,
        folder_secret: None,
        api_key_file: None,
        version: "1.2.3".into(),
    };
    let Err(refused) = Gateway::new(open, parts).bind().await else { panic!("open to others") };
    assert!(refused.to_string().contains("loopback"), "{refused}");
}

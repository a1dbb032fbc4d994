//! What clients send stays out of logs and metrics, and tokens out of answers too, whatever becomes of a request.

use serde_json::{Value, json};

use crate::program::{Home, Up};

/// The word that marks every prompt.
const PROMPT: &str = "canaryprompt7f3a";
/// The word that marks the arguments and results of tools.
const ARGUMENT: &str = "canaryargument91bc";
/// The word that marks every invalid token.
const TOKEN: &str = "canarytoken5e2d";

/// Everything that this repository logs, and what others log of some use.
const FILTER: &str = "debug,tether_cli=trace,tether_gateway=trace,tether_orchestrator=trace,tether_registry=trace,\
                      tether_worker=trace,tether_engine=trace,tether_rpc=trace,tether_protocol=trace,\
                      tether_metadata_store=trace,tether_artifact_store=trace,tether_inference=trace";

struct Clients {
    url: String,
    http: reqwest::Client,
}

/// A response: its status, headers and body.
struct Answered {
    status: u16,
    text: String,
}

impl Clients {
    async fn send(&self, path: &str, key: &str, body: String) -> Answered {
        let request = self.http.post(format!("{}{path}", self.url)).header("authorization", format!("Bearer {key}"));
        let response = request.header("content-type", "application/json").body(body).send().await.expect("answered");
        let (status, headers) = (response.status().as_u16(), format!("{:?}", response.headers()));
        Answered { status, text: headers + &response.text().await.expect("a body") }
    }
}

/// A conversation with a prompt, a tool and a call of it.
fn conversation(more: &Value) -> String {
    let mut body = json!({
        "model": "tether-tiny",
        "max_tokens": 4,
        "messages": [
            { "role": "user", "content": PROMPT },
            { "role": "assistant", "tool_calls": [{
                "id": "c1", "type": "function",
                "function": { "name": "look", "arguments": json!({ "at": ARGUMENT }).to_string() },
            }]},
            { "role": "tool", "tool_call_id": "c1", "content": ARGUMENT },
        ],
        "tools": [{ "type": "function", "function": {
            "name": "look", "description": ARGUMENT,
            "parameters": { "type": "object", "properties": { "at": { "enum": [ARGUMENT] } } },
        }}],
    });
    for (name, value) in more.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body.to_string()
}

/// A prompt without tools.
fn plain(more: &Value) -> String {
    let mut body = json!({
        "model": "tether-tiny", "max_tokens": 3, "messages": [{ "role": "user", "content": PROMPT }],
    });
    for (name, value) in more.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body.to_string()
}

/// Requests that end in each way, by path, body and status.
fn requests() -> Vec<(&'static str, String, &'static [u16])> {
    let chat = "/v1/chat/completions";
    let text = |prompt: &str| json!([{ "role": "user", "content": prompt }]);
    vec![
        (chat, plain(&json!({})), &[200]),
        (chat, plain(&json!({ "stream": true })), &[200]),
        (chat, plain(&json!({ "stop": PROMPT, "user": ARGUMENT, "metadata": { "note": ARGUMENT } })), &[200]),
        // The demonstration model has no tools, so its worker refuses.
        (chat, conversation(&json!({})), &[400]),
        (chat, conversation(&json!({ "stream": true })), &[400]),
        ("/v1/completions", json!({ "model": "tether-tiny", "max_tokens": 3, "prompt": PROMPT }).to_string(), &[200]),
        (chat, conversation(&json!({ "model": "no-such-model" })), &[404]),
        (chat, conversation(&json!({ "temperature": PROMPT })), &[400]),
        (chat, conversation(&json!({ "audio": { "voice": PROMPT } })), &[400]),
        (
            chat,
            conversation(&json!({ "tool_choice": { "type": "function", "function": { "name": ARGUMENT } } })),
            &[400],
        ),
        (
            chat,
            conversation(&json!({ "response_format": { "type": "json_schema",
            "json_schema": { "name": "n", "schema": { "type": ARGUMENT } } } })),
            &[400],
        ),
        (chat, json!({ "model": "tether-tiny", "messages": text(&PROMPT.repeat(2_000)) }).to_string(), &[400]),
        (
            chat,
            json!({ "model": "tether-tiny", "messages": [{ "role": PROMPT, "content": ARGUMENT }] }).to_string(),
            &[400],
        ),
        (chat, format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"{PROMPT}"), &[400]),
        (chat, format!("{{\"model\": \"tether-tiny\", \"x\": \"{}\"}}", PROMPT.repeat(700_000)), &[413]),
        (
            "/infer",
            json!({ "modelId": "tether-tiny", "input": { "prompt": PROMPT, "maxTokens": 3 } }).to_string(),
            &[200, 400],
        ),
        ("/infer", json!({ "modelId": "tether-tiny", "input": PROMPT }).to_string(), &[200]),
        ("/v1/embeddings", json!({ "model": "tether-tiny", "input": PROMPT }).to_string(), &[200, 400]),
        ("/v1/nowhere", PROMPT.to_owned(), &[404]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_send_is_in_no_log_and_no_metric_and_no_token_is_in_an_answer() {
    let home = Home::new();
    let log = home.path().join("log");
    let up = home.up_logging_to(&log, &[("TETHER_LOG__FILTER", FILTER)]);
    let client = Clients { url: up.url.clone(), http: reqwest::Client::new() };
    for (path, body, expected) in requests() {
        let shown = body.chars().take(80).collect::<String>();
        let answered = client.send(path, &up.key, body).await;
        assert!(expected.contains(&answered.status), "{path} {shown}: {} {}", answered.status, answered.text);
        assert!(!answered.text.contains(secret(&up.key)), "{path} {shown}: {}", answered.text);
    }
    leave(&client, &up).await;
    refused_tokens(&client, &up).await;
    let metrics = client.http.get(format!("{}/metrics", up.url)).send().await.expect("answered");
    let metrics = metrics.text().await.expect("text");
    let key = up.key.clone();
    assert_eq!(up.end(), Some(0));
    let log = std::fs::read_to_string(log).expect("a log");
    assert!(log.contains("request finished") || log.contains("outcome"), "the log shows requests: {log}");
    for (place, text) in [("the log", log), ("the metrics", metrics)] {
        for canary in [PROMPT, ARGUMENT, TOKEN, secret(&key)] {
            assert!(!text.contains(canary), "{canary} is in {place}: {}", around(&text, canary));
        }
    }
}

/// The secret part of a well-formed token.
fn secret(token: &str) -> &str {
    &token[18..]
}

fn around<'a>(text: &'a str, canary: &str) -> &'a str {
    text.lines().find(|line| line.contains(canary)).unwrap_or_default()
}

/// Leaves while an answer is generated.
async fn leave(client: &Clients, up: &Up) {
    let body = plain(&json!({ "stream": true, "max_tokens": 200 }));
    let request = client.http.post(format!("{}/v1/chat/completions", up.url)).bearer_auth(&up.key);
    let mut response = request.header("content-type", "application/json").body(body).send().await.expect("answered");
    let _ = response.chunk().await.expect("a first piece");
}

/// Shows tokens that are malformed, of another scheme, and unknown.
async fn refused_tokens(client: &Clients, up: &Up) {
    let mut unknown = up.key.clone();
    unknown.replace_range(20..24, "zzzz");
    for token in [format!("tth_live_{TOKEN}"), TOKEN.to_owned(), unknown] {
        let answered = client.send("/v1/chat/completions", &token, conversation(&json!({}))).await;
        assert_eq!(answered.status, 401, "{}", answered.text);
        for part in [TOKEN, PROMPT, ARGUMENT] {
            assert!(!answered.text.contains(part), "{}", answered.text);
        }
    }
}

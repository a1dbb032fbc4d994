//! Which requests count as repeats of others, and what their clients are told.

use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use protocol::infer::InferRequest;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use tether_gateway::{Config, RateLimitConfig};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::{Network, chat_body, config, expect_error, fake};

const CHAT: &str = "/v1/chat/completions";

impl Network {
    /// Sends a chat request under a key. Returns its job, its headers and its answer.
    async fn keyed(&self, key: u8, idempotency_key: &str, body: &Value) -> (InferRequest, HeaderMap, Value) {
        let request = self.request(reqwest::Method::POST, CHAT).bearer_auth(fake::token(key)).json(body);
        let response = request.header("idempotency-key", idempotency_key).send().await.expect("answered");
        assert_eq!(response.status(), 200);
        let (headers, body) = (response.headers().clone(), response.json().await.expect("JSON"));
        (self.last_job(), headers, body)
    }

    fn last_job(&self) -> InferRequest {
        self.fake.jobs.lock().last().cloned().expect("a job")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_under_one_idempotency_key_are_one_job() {
    let network = Network::start().await;
    let (job, headers, body) = network.keyed(1, "order 17", &chat_body("hi")).await;
    let (repeat, again, _) = network.keyed(1, "order 17", &chat_body("hi")).await;
    let key = |job: &InferRequest| (job.correlation_id, job.retry_token.clone(), job.fingerprint);
    assert_eq!(key(&job), key(&repeat));
    assert_eq!(headers["x-request-id"], again["x-request-id"]);
    assert_eq!(headers["x-request-id"], job.correlation_id.to_string().as_str());
    assert_eq!(body["id"], format!("chatcmpl-{}", job.correlation_id.0.simple()));
    assert_eq!((job.linger_ms, job.keeps_answer), (Some(30_000), true));
    assert!(!job.retry_token.as_str().contains("order"), "the key stays here: {}", job.retry_token);
    let (other, ..) = network.keyed(1, "order 17", &chat_body("ho")).await;
    assert_eq!((other.correlation_id, &other.retry_token), (job.correlation_id, &job.retry_token));
    assert_ne!(other.fingerprint, job.fingerprint, "another request");
    assert_ne!(network.keyed(1, "order 18", &chat_body("hi")).await.0.retry_token, job.retry_token);
    assert_ne!(network.keyed(2, "order 17", &chat_body("hi")).await.0.correlation_id, job.correlation_id);
    network.chat("hi").await;
    let without = network.last_job();
    assert_eq!((without.fingerprint, without.linger_ms), (None, None));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_endpoint_takes_the_key() {
    let network = Network::start().await;
    let mut lengths = vec![];
    for (path, body) in [
        (CHAT, chat_body("hi")),
        ("/v1/completions", json!({"model": "tiny", "prompt": "hi"})),
        ("/v1/embeddings", json!({"model": "tiny", "input": "one"})),
        ("/infer", json!({"modelId": "tiny", "input": "hi"})),
    ] {
        let response = network.post(path, &body).header("idempotency-key", "k").send().await.expect("answered");
        let id = response.headers()["x-request-id"].to_str().expect("text").to_owned();
        response.bytes().await.expect("a body");
        let job = network.last_job();
        assert_eq!((id, job.linger_ms), (job.correlation_id.to_string(), Some(30_000)), "{path}");
        lengths.push(network.fake.jobs.lock().len());
    }
    assert!(lengths.is_sorted_by(|first, second| first < second), "{lengths:?}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_answer_says_so_and_is_as_old_as_the_first() {
    let network = Network::start().await;
    let (_, headers, body) = network.keyed(1, "k", &chat_body("replayed")).await;
    assert_eq!(
        (&headers["idempotency-replayed"], &body["created"]),
        (&"true".parse().expect("a value"), &json!(1_700_000_000))
    );
    let (_, headers, _) = network.keyed(1, "k", &chat_body("hi")).await;
    assert!(!headers.contains_key("idempotency-replayed"));
    let body = json!({"stream": true, "model": "tiny", "messages": [{"role": "user", "content": "replayed"}]});
    let response = network.post(CHAT, &body).header("idempotency-key", "k").send().await.expect("answered");
    assert_eq!(response.headers()["idempotency-replayed"], "true");
    assert!(response.text().await.expect("text").contains("\"created\":1700000000"));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_resumed_after_the_last_event_of_its_client() {
    let network = Network::start().await;
    let mut body = chat_body("replayed");
    body["stream"] = json!(true);
    let send = async |last: Option<&str>| {
        let request = network.post(CHAT, &body).header("idempotency-key", "k");
        let request = match last {
            Some(last) => request.header("last-event-id", last),
            None => request,
        };
        request.send().await.expect("answered").text().await.expect("text")
    };
    let whole = send(None).await;
    let ids: Vec<&str> = whole.lines().filter_map(|line| line.strip_prefix("id: ")).collect();
    assert_eq!(ids, ["1700000000000-0", "1700000000000-1"]);
    let rest = send(Some(ids[0])).await;
    let content = |text: &str| text.lines().filter(|line| line.starts_with("data: {")).count();
    assert_eq!(content(&rest) + 1, content(&whole));
    assert!(whole.ends_with(rest.split_once("\"choices\"").expect("a chunk").1), "{rest}");
    // The job failed meanwhile, and runs anew: what follows belongs to another answer.
    let request = network.post(CHAT, &body).header("idempotency-key", "k");
    let refused = request.header("last-event-id", "1600000000000-0").send().await.expect("answered");
    expect_error(refused, 422, "idempotency_key_reused", Some("Last-Event-ID")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_make_no_sense_are_refused_and_no_job_runs() {
    let network = Network::start().await;
    let chat = |pairs: &[(&str, &str)]| {
        let request = network.post(CHAT, &chat_body("hi"));
        pairs.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send()
    };
    let long = "x".repeat(256);
    for (pairs, param) in [
        (&[("idempotency-key", "")][..], "Idempotency-Key"),
        (&[("idempotency-key", &long)], "Idempotency-Key"),
        (&[("last-event-id", "1-3")], "Last-Event-ID"),
        (&[("idempotency-key", "k"), ("last-event-id", "three")], "Last-Event-ID"),
    ] {
        expect_error(chat(pairs).await.expect("answered"), 400, "invalid_value", Some(param)).await;
    }
    let both = network.post("/infer", &json!({"modelId": "tiny", "input": "hi", "retryToken": "t"}));
    let both = both.header("idempotency-key", "k").send().await.expect("answered");
    expect_error(both, 400, "invalid_value", Some("retryToken")).await;
    assert!(network.fake.jobs.lock().is_empty());
    let reused = chat_body("refuse idempotency_key_reused");
    let reused = network.post(CHAT, &reused).header("idempotency-key", "k").send().await.expect("answered");
    expect_error(reused, 422, "idempotency_key_reused", Some("Idempotency-Key")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_an_sdk_whose_answer_nobody_can_read_is_replaced() {
    let network = Network::start().await;
    for (code, status) in [("idempotency_key_reused", 422), ("idempotency_in_progress", 409)] {
        network.fake.jobs.lock().clear();
        let request = network.post(CHAT, &chat_body(&format!("refuse {code}")));
        let response = request.header("x-stainless-retry-count", "0").send().await.expect("answered");
        assert_eq!(response.status(), status);
        let jobs = network.fake.jobs.lock().clone();
        assert_eq!(jobs.len(), 2, "{code}");
        assert_ne!(jobs[0].retry_token, jobs[1].retry_token);
        assert_eq!(jobs[0].correlation_id, jobs[1].correlation_id);
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_of_an_sdk_whose_connection_is_gone_is_the_same_job() {
    let network = Network::start().await;
    let mut calls = JoinSet::new();
    let mut send = |prompt: &str, count: u32, stream: bool| {
        let mut body = chat_body(prompt);
        body["stream"] = json!(stream);
        // Each with a connection of its own.
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let request = client.post(format!("http://{}{CHAT}", network.address)).bearer_auth(fake::token(1));
        calls.spawn(request.header("x-stainless-retry-count", count).json(&body).send())
    };
    let first = send("queued", 0, false);
    network.fake.arrived.notified().await;
    let job = network.last_job();
    assert_eq!((job.linger_ms, job.keeps_answer), (Some(2_000), false));
    send("queued", 1, false);
    network.fake.arrived.notified().await;
    assert_ne!(network.last_job().retry_token, job.retry_token, "the first connection is there");
    first.abort();
    network.fake.cancelled.notified().await;
    send("queued", 1, false);
    network.fake.arrived.notified().await;
    let repeat = network.last_job();
    assert_eq!((&repeat.retry_token, repeat.correlation_id), (&job.retry_token, job.correlation_id));
    send("queued", 1, true);
    network.fake.arrived.notified().await;
    assert_eq!(network.last_job().linger_ms, None, "SDKs do not repeat what has begun to stream");
    calls.abort_all();
    tokio::time::timeout(Duration::from_secs(5), network.fake.cancelled.notified()).await.expect("cancelled");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_of_an_sdk_that_reset_its_stream_is_the_same_job() {
    let network = Network::start().await;
    let stream = TcpStream::connect(network.address).await.expect("connected");
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.expect("HTTP/2");
    network.tasks.spawn(async move { drop(connection.await) });
    let mut send = |count: u32| {
        let request = http::Request::post(format!("http://{}{CHAT}", network.address))
            .header("authorization", format!("Bearer {}", fake::token(1)))
            .header("content-type", "application/json")
            .header("x-stainless-retry-count", count)
            .body(chat_body("queued").to_string())
            .expect("a request");
        network.tasks.spawn(sender.send_request(request))
    };
    let first = send(0);
    network.fake.arrived.notified().await;
    let job = network.last_job();
    let beside = send(1);
    network.fake.arrived.notified().await;
    assert_ne!(network.last_job().retry_token, job.retry_token, "the first stream is there");
    first.abort();
    network.fake.cancelled.notified().await;
    let repeat = send(1);
    network.fake.arrived.notified().await;
    assert_eq!(network.last_job().retry_token, job.retry_token);
    beside.abort();
    repeat.abort();
    drop(sender);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeats_are_counted_by_source_and_measure_nothing() {
    let network = Network::start().await;
    network.keyed(1, "k", &chat_body("hi")).await;
    network.keyed(1, "k", &chat_body("replayed")).await;
    network.keyed(1, "l", &chat_body("attached")).await;
    let request = network.post(CHAT, &chat_body("attached")).header("x-stainless-retry-count", "1");
    request.send().await.expect("answered").bytes().await.expect("a body");
    let metrics = network.metrics.clone();
    network.end().await;
    let text = metrics.encode();
    for line in [
        r#"tether_idempotent_replays_total{source="key"} 2"#,
        r#"tether_idempotent_replays_total{source="sdk_retry"} 1"#,
        r#"tether_time_to_first_token_seconds_count{model="tiny"} 1"#,
        r#"tether_request_duration_seconds_count{model="tiny"} 1"#,
        r#"tether_requests_total{model="tiny",outcome="replayed",finish_reason="stop"} 3"#,
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_goes_to_the_orchestrator_that_has_its_job() {
    let rate_limit = RateLimitConfig { requests_per_minute: 0, ..RateLimitConfig::default() };
    let network = Network::start_with(Config { rate_limit, ..config() }).await;
    let keys: Vec<String> = (0..12).map(|number| number.to_string()).collect();
    for key in &keys {
        network.keyed(1, key, &chat_body("hi")).await;
    }
    let other = network.fake.orchestrator_without_jobs(&network.tasks, &network.stop).await;
    // Without a key, jobs take turns once the gateway has found it.
    while other.load(Ordering::SeqCst) == 0 {
        network.chat("hi").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = other.load(Ordering::SeqCst);
    for key in &keys {
        network.keyed(1, key, &chat_body("hi")).await;
    }
    assert_eq!(other.load(Ordering::SeqCst), before, "half of these keys are in its order first");
    // New keys are shared out.
    for key in 100..112 {
        network.keyed(1, &key.to_string(), &chat_body("hi")).await;
    }
    assert!(other.load(Ordering::SeqCst) > before);
    network.end().await;
}

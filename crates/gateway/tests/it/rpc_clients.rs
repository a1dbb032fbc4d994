//! Clients without HTTP: any key, with an API token in the message.

use std::time::Duration;

use protocol::codec::{decode, encode};
use protocol::control::{Empty, NODE_DESCRIBE, NodeInfo, NodeRole};
use protocol::gateway::{GatewayAnswer, GatewaySubmission, MODELS, ModelsRequest};
use protocol::infer::{InferChunk, InferSubmission, SUBMIT};
use protocol::signature::NodeKey;
use protocol::usage::TokenUsage;
use protocol::{ErrorCode, PublicKey, Topic, WireError};
use rpc::{CallError, Client, ResponseStream, StreamOptions};
use serde_json::{Value, json};
use tether_gateway::Config;
use tokio::time::Instant;

use crate::{Network, config, expect_error, fake};

const SECONDS: Duration = Duration::from_secs(5);

fn gateway() -> PublicKey {
    NodeKey::from_seed(&[9; 32]).public_key()
}

/// A client of a key that nobody knows.
fn stranger(network: &Network) -> Client {
    Client::new(network.fake.network.node(&NodeKey::from_seed(&[77; 32])))
}

fn submission(prompt: &str) -> GatewaySubmission {
    let request: InferSubmission =
        serde_json::from_value(json!({"modelId": "tiny", "input": prompt})).expect("well formed");
    GatewaySubmission::of(fake::token(1), request)
}

async fn open(client: &Client, submission: &impl serde::Serialize) -> Result<ResponseStream, CallError> {
    let options = StreamOptions { accept_within: SECONDS, deadline: Some(SECONDS), stall: SECONDS };
    client.open_stream(gateway(), SUBMIT, encode(submission).into(), options).await
}

async fn whole(client: &Client, submission: &impl serde::Serialize) -> Result<Value, WireError> {
    client.call(gateway(), SUBMIT, submission, SECONDS).await.map_err(refusal)
}

fn refusal(error: CallError) -> WireError {
    match error {
        CallError::Remote(error) => error,
        other => panic!("a refusal was expected: {other:?}"),
    }
}

async fn read(mut stream: ResponseStream) -> (Vec<InferChunk>, Option<WireError>) {
    let mut chunks = vec![];
    while let Some(message) = stream.next().await {
        match message {
            Ok(bytes) => chunks.push(decode(&bytes).expect("a chunk")),
            Err(error) => return (chunks, Some(refusal(error))),
        }
    }
    (chunks, None)
}

#[tokio::test(flavor = "multi_thread")]
async fn any_key_with_a_token_gets_the_chunks_as_they_come() {
    let network = Network::start().await;
    let mut asked = submission("hi");
    asked.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    let (chunks, error) = read(open(&stranger(&network), &asked).await.expect("accepted")).await;
    assert_eq!(error, None);
    let text: String = chunks.iter().map(|chunk| chunk.payload.text.as_str()).collect();
    assert_eq!((text.as_str(), chunks.len(), chunks[2].done), ("Hello", 3, true));
    let job = network.fake.jobs.lock()[0].clone();
    assert_eq!((job.tenant_id.as_str(), job.correlation_id), ("acme", chunks[0].correlation_id));
    assert_eq!(job.trace_id.to_string(), "0af7651916cd43dd8448eb211c80319c");
    let counted = r#"tether_requests_total{model="tiny",outcome="completed",finish_reason="stop"} 1"#;
    assert!(network.metrics.encode().contains(counted), "counted as what comes by HTTP is");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_call_gets_the_whole_answer_as_one_value() {
    let network = Network::start().await;
    let client = stranger(&network);
    let answer: GatewayAnswer =
        serde_json::from_value(whole(&client, &submission("hi")).await.expect("answered")).expect("an answer");
    assert_eq!(
        (answer.choice.text.as_str(), answer.choice.finish_reason.as_str(), answer.attempt),
        ("Hello", "stop", 2)
    );
    assert_eq!((answer.model_id.as_str(), answer.version.to_string().as_str()), ("tiny", "1.1"));
    assert_eq!(
        answer.usage,
        TokenUsage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 3, reasoning_tokens: 0 }
    );

    // In OpenAI's words it is what HTTP answers, but for what differs from one answer to the next.
    let body = crate::chat_body("hi");
    let comparable = |mut value: Value| {
        assert!(value["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")), "{value}");
        (value["id"], value["created"]) = (json!(null), json!(null));
        value
    };
    let by_rpc = whole(&client, &json!({"token": fake::token(1), "chat": body})).await.expect("answered");
    let by_http: Value = network.chat("hi").await.json().await.expect("JSON");
    assert_eq!(comparable(by_rpc), comparable(by_http));
    let completion = json!({"token": fake::token(1), "completion": {"model": "tiny", "prompt": "hi"}});
    let completion = whole(&client, &completion).await.expect("answered");
    assert_eq!(completion["choices"][0]["text"], "Hello");
    let vectors = json!({"token": fake::token(1), "embedding": {"model": "tiny", "input": "vectors"}});
    let vectors = whole(&client, &vectors).await.expect("answered");
    assert_eq!(vectors["data"][0]["embedding"], json!([0.0, 0.5]));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_call_gets_several_answers_and_vectors_in_our_words_too() {
    let network = Network::start().await;
    let client = stranger(&network);
    let ask = async |input: Value| -> GatewayAnswer {
        let request = json!({"token": fake::token(1), "request": {"modelId": "tiny", "input": input}});
        serde_json::from_value(whole(&client, &request).await.expect("answered")).expect("an answer")
    };
    let answer = ask(json!({"prompt": "several", "n": 2})).await;
    assert_eq!((answer.choice.text.as_str(), answer.further_choices[0].text.as_str()), ("ab", "x"));
    let answer = ask(json!({"embed": ["vectors", "b"]})).await;
    assert_eq!(answer.embeddings[1].vector(), Some(vec![1.0, 0.5]));
    assert_eq!(answer.degraded, None);
    let answer = ask(json!({"prompt": "degraded"})).await;
    let degraded = answer.degraded.expect("another model answered, and the caller has no header to read it from");
    assert_eq!((degraded.to_string().as_str(), answer.model_id.as_str()), ("model=other@0.1; reason=queue", "other"));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_http_refuses_rpc_refuses_with_the_same_words() {
    let network = Network::start().await;
    let client = stranger(&network);
    let hi = json!({"modelId": "tiny", "input": "hi"});
    for (token, request) in [
        (Some(fake::token(77)), hi.clone()),
        (Some("sk-wrong".to_owned()), hi.clone()),
        (Some(fake::token(4)), hi.clone()),
        (Some(fake::token(3)), hi.clone()),
        (None, hi.clone()),
        (Some(fake::token(1)), json!({"input": "hi"})),
        (Some(fake::token(1)), json!({"modelId": "nope", "input": "hi"})),
        (Some(fake::token(1)), json!({"modelId": "tiny", "version": "7.0", "input": "hi"})),
        (Some(fake::token(1)), json!({"modelId": "tiny", "input": {"prompt": "hi", "temperature": 3}})),
        (Some(fake::token(1)), json!({"modelId": "tiny", "input": {"prompt": "hi", "maxTokens": "many"}})),
        (Some(fake::token(1)), json!({"modelId": "tiny", "input": "hi", "tenantId": "other"})),
        (Some(fake::token(1)), json!({"modelId": "tiny", "input": "hi", "deadlineMs": 0})),
        (Some(fake::token(1)), json!({"modelId": "tiny", "input": "refuse context_length_exceeded"})),
        (Some(fake::token(1)), json!({"modelId": "tiny", "input": "refuse no_capacity"})),
        (Some(fake::token(1)), json!({"modelId": "tiny", "input": "refuse worker_full"})),
    ] {
        let mut by_http = network.request(reqwest::Method::POST, "/infer").json(&request);
        if let Some(token) = &token {
            by_http = by_http.bearer_auth(token);
        }
        let by_http: Value = by_http.send().await.expect("answered").json().await.expect("JSON");
        let mut body = json!({"request": request});
        if let Some(token) = token {
            body["token"] = token.into();
        }
        let by_whole = whole(&client, &body).await.expect_err("refused");
        let by_stream = refusal(open(&client, &body).await.expect_err("refused"));
        assert_eq!(by_whole, by_stream, "{body}");
        let expected = &by_http["error"];
        let got = json!([by_whole.code, by_whole.message, by_whole.param]);
        assert_eq!(got, json!([expected["code"], expected["message"], expected["param"]]), "{body}");
    }
    let text = network.metrics.encode();
    let counted = r#"tether_requests_total{model="unknown",outcome="model_not_found",finish_reason=""} 6"#;
    assert!(text.contains(counted), "two by HTTP, four by RPC\n{text}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_submission_is_refused_and_counted() {
    let network = Network::start().await;
    let client = stranger(&network);
    for (body, code, param) in [
        (json!([1]), ErrorCode::InvalidJson, None),
        (json!({"token": fake::token(1)}), ErrorCode::InvalidValue, Some("request")),
        (json!({"token": 7, "request": {}}), ErrorCode::InvalidValue, Some("token")),
        (
            json!({"token": fake::token(1), "chat": {"model": "tiny", "stream": true, "messages": []}}),
            ErrorCode::InvalidValue,
            Some("messages"),
        ),
    ] {
        let error = whole(&client, &body).await.expect_err("refused");
        assert_eq!((error.code, error.param.as_deref()), (code, param), "{body}");
    }
    let mut streamed = crate::chat_body("hi");
    streamed["stream"] = json!(true);
    let body = json!({"token": fake::token(1), "chat": streamed});
    let error = whole(&client, &body).await.expect_err("one value is no stream");
    assert_eq!((error.code, error.param.as_deref()), (ErrorCode::UnsupportedParameter, Some("stream")));
    let (chunks, error) = read(open(&client, &body).await.expect("a stream is one")).await;
    assert_eq!((chunks.len(), error), (3, None));
    assert!(network.metrics.encode().contains(r#"outcome="invalid_json",finish_reason=""} 1"#));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_and_rpc_take_from_one_bucket() {
    let network = Network::start().await;
    let client = stranger(&network);
    let by_http = network.request(reqwest::Method::POST, "/v1/chat/completions").bearer_auth(fake::token(2));
    let by_http = by_http.json(&crate::chat_body("hi")).send().await.expect("answered");
    assert_eq!(by_http.headers()["x-ratelimit-remaining-requests"], "1");
    let mut asked = submission("hi");
    asked.token = fake::token(2);
    whole(&client, &asked).await.expect("the second of two");
    let error = whole(&client, &asked).await.expect_err("the third");
    assert_eq!(error.code, ErrorCode::RateLimitExceeded);
    assert!(error.retry_after_ms.is_some_and(|wait| (29_000..=30_000).contains(&wait)), "{error:?}");
    assert!(network.metrics.encode().contains(r#"tether_throttled_total{tenant_class="unknown"} 1"#));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_cancels_its_job() {
    let network = Network::start().await;
    let client = stranger(&network);
    // In mid-answer, before its first chunk, and while it waits for the whole.
    let mut stream = open(&client, &submission("endless")).await.expect("accepted");
    stream.next().await.expect("a chunk").expect("no error");
    drop(stream);
    network.fake.cancelled.notified().await;
    for prompt in ["queued", "silent"] {
        let brief = Duration::from_millis(200);
        let late = client.call::<_, Value>(gateway(), SUBMIT, &submission(prompt), brief).await;
        assert_eq!(late, Err(CallError::Deadline));
        network.fake.cancelled.notified().await;
    }
    let options = StreamOptions { accept_within: SECONDS / 10, deadline: None, stall: SECONDS };
    let late = client.open_stream(gateway(), SUBMIT, encode(&submission("queued")).into(), options).await;
    assert_eq!(late.err(), Some(CallError::NotAccepted));
    network.fake.cancelled.notified().await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_is_an_error_in_the_stream() {
    let network = Network::start().await;
    let client = stranger(&network);
    for (prompt, code) in [("break", ErrorCode::WorkerFailed), ("gap", ErrorCode::InternalError)] {
        let (chunks, error) = read(open(&client, &submission(prompt)).await.expect("accepted")).await;
        assert_eq!((chunks.len(), error.map(|error| error.code)), (1, Some(code)), "{prompt}");
        assert_eq!(whole(&client, &submission(prompt)).await.expect_err("broken").code, code);
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_deadline_is_the_jobs() {
    let network = Network::start().await;
    let options = StreamOptions { accept_within: SECONDS, deadline: Some(SECONDS / 10), stall: SECONDS };
    let body = encode(&submission("wait 2000")).into();
    let late = stranger(&network).open_stream(gateway(), SUBMIT, body, options).await;
    assert_eq!(late.map(drop).map_err(refusal).expect_err("too late").code, ErrorCode::DeadlineExceeded);
    let deadline_ms = network.fake.jobs.lock()[0].deadline_ms;
    assert!(deadline_ms.is_some_and(|deadline_ms| deadline_ms <= 500), "{deadline_ms:?}");
    network.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_prompt_may_be_read_for_ten_minutes_and_an_answer_may_run_for_an_hour() {
    let network = Network::start_with(Config { request_deadline_secs: 900, ..config() }).await;
    let client = stranger(&network);
    let begun = Instant::now();
    let hours = SECONDS * 10_000;
    let options = StreamOptions { accept_within: hours, deadline: None, stall: hours };
    let stream = client.open_stream(gateway(), SUBMIT, encode(&submission("slow")).into(), options).await;
    let (chunks, error) = read(stream.expect("accepted")).await;
    assert_eq!((error, chunks.len()), (None, 61));
    assert!(chunks.iter().zip(0..).all(|(chunk, seq)| chunk.seq == seq && chunk.progress.is_none()));
    assert!(begun.elapsed() >= Duration::from_mins(70), "{:?}", begun.elapsed());
    assert!(network.fake.jobs.lock()[0].progress, "the gateway asked to be told");
    network.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_must_begin_before_its_deadline_and_silence_has_a_limit_of_its_own() {
    for (deadline_secs, stall_secs, code) in
        [(300, 1_000, ErrorCode::DeadlineExceeded), (1_000, 120, ErrorCode::Unavailable)]
    {
        let timeouts = Config { request_deadline_secs: deadline_secs, stall_timeout_secs: stall_secs, ..config() };
        let network = Network::start_with(timeouts).await;
        let begun = Instant::now();
        let hours = SECONDS * 10_000;
        let options = StreamOptions { accept_within: hours, deadline: None, stall: hours };
        let prompt = if code == ErrorCode::Unavailable { "stuck" } else { "slow" };
        let body = encode(&submission(prompt)).into();
        let refused = stranger(&network).open_stream(gateway(), SUBMIT, body, options).await;
        assert_eq!(refused.map(drop).map_err(refusal).expect_err("too late").code, code);
        // Three tries, because another orchestrator may do better than one that falls silent.
        let tries = if code == ErrorCode::Unavailable { 3 } else { 1 };
        assert_eq!(begun.elapsed().as_secs(), tries * deadline_secs.min(stall_secs));
        network.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_over_the_limit_is_refused_by_its_length() {
    let network = Network::start_with(Config { body_bytes_max: 100_000, ..config() }).await;
    let client = stranger(&network);
    let long = submission(&"x".repeat(200_000));
    assert_eq!(whole(&client, &long).await.expect_err("too long").code, ErrorCode::RequestTooLarge);
    assert_eq!(refusal(open(&client, &long).await.expect_err("too long")).code, ErrorCode::RequestTooLarge);
    whole(&client, &submission(&"x".repeat(50_000))).await.expect("answered");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_is_found_says_what_it_is_and_lists_its_models() {
    let network = Network::start().await;
    let client = stranger(&network);
    let info: NodeInfo = client.call(gateway(), NODE_DESCRIBE, &Empty {}, SECONDS).await.expect("answered");
    assert_eq!((info.roles, info.version.as_str()), (vec![NodeRole::Gateway], "1.2.3"));
    let node = network.fake.network.node(&NodeKey::from_seed(&[78; 32]));
    let found = node.lookup(&Topic::Control("local".parse().expect("region"))).await.expect("a lookup");
    assert!(found.contains(&gateway()));
    let request = ModelsRequest { token: fake::token(1) };
    let by_rpc: Value = client.call(gateway(), MODELS, &request, SECONDS).await.expect("answered");
    let by_http: Value = network.get("/v1/models").await.json().await.expect("JSON");
    assert_eq!(by_rpc, by_http);
    let request = ModelsRequest { token: fake::token(77) };
    let refused = client.call::<_, Value>(gateway(), MODELS, &request, SECONDS).await.map_err(refusal);
    assert_eq!(refused.expect_err("no such key").code, ErrorCode::InvalidApiKey);
    let http = network.request(reqwest::Method::GET, "/v1/models").send().await.expect("answered");
    expect_error(http, 401, "invalid_api_key", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_stops_ends_what_it_has_and_leaves() {
    let network = Network::start().await;
    let client = stranger(&network);
    let stream = open(&client, &submission("wait 300")).await.expect("accepted");
    network.stop.cancel();
    let (chunks, error) = read(stream).await;
    assert_eq!((chunks.len(), error), (3, None));
    let node = network.fake.network.node(&NodeKey::from_seed(&[78; 32]));
    let topic = Topic::Control("local".parse().expect("region"));
    let gone = async {
        while node.lookup(&topic).await.expect("a lookup").contains(&gateway()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), gone).await.expect("taken off its topic within a second");
    network.end().await;
}

use std::time::Duration;

use protocol::infer::InferChunk;
use reqwest::Method;
use serde_json::{Value, json};

use crate::{Network, chat_body, config, expect_error, fake};

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_completion_has_the_shape_clients_expect() {
    let network = Network::start().await;
    let response = network.chat("hi").await;
    assert_eq!(response.status(), 200);
    let headers = response.headers().clone();
    let body: Value = response.json().await.expect("JSON");
    let digest = fake::model("tiny", "1.1").digest.to_string();
    assert_eq!(
        body,
        json!({
            "id": body["id"], "object": "chat.completion", "created": body["created"], "model": "tiny",
            "system_fingerprint": format!("fp_{}", &digest[..12]),
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "Hello", "refusal": null},
                "logprobs": null, "finish_reason": "stop"
            }],
            "usage": {
                "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 3}
            }
        })
    );
    let job = network.fake.jobs.lock()[0].clone();
    let id = job.correlation_id.to_string();
    assert_eq!(body["id"], format!("chatcmpl-{}", id.replace('-', "")));
    assert_eq!(headers["x-request-id"], id.as_str());
    assert_eq!(headers["x-tether-decision"], id.as_str());
    assert_eq!(headers["x-tether-region"], "local");
    assert_eq!(headers["x-tether-attempts"], "2");
    assert_eq!(headers["x-tether-model-digest"], digest.as_str());
    assert_eq!(headers["x-ratelimit-limit-requests"], "600");
    assert_eq!(headers["x-ratelimit-remaining-requests"], "59");
    assert!(headers.contains_key("x-ratelimit-reset-requests") && headers.contains_key("openai-processing-ms"));
    assert_eq!(headers["x-content-type-options"], "nosniff");
    assert_eq!(headers["cache-control"], "no-store");
    assert_eq!((job.tenant_id.as_str(), job.version.to_string().as_str()), ("acme", "1.1"));
    assert_eq!(job.correlation_id.0.get_version_num(), 7);
    assert!(job.deadline_ms.is_some_and(|left| (19_000..=20_000).contains(&left)));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_answer_is_written_byte_by_byte_as_openai_writes_it() {
    let network = Network::start().await;
    let mut body = chat_body("hi");
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    body["model"] = json!("tiny@1.0");
    let response = network.post("/v1/chat/completions", &body).send().await.expect("answered");
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["x-tether-attempts"], "2");
    let text = response.text().await.expect("text");
    let first = text.lines().nth(1).and_then(|line| line.strip_prefix("data: ")).expect("a first event");
    let first: Value = serde_json::from_str(first).expect("JSON");
    let head = format!(
        r#"{{"id":"{}","object":"chat.completion.chunk","created":{},"model":"tiny@1.0","system_fingerprint":"fp_{}","choices":["#,
        first["id"].as_str().expect("an id"),
        first["created"],
        &fake::model("tiny", "1.0").digest.to_string()[..12],
    );
    let expected = [
        format!(r#"id: 0{NEW}data: {head}{{"index":0,"delta":{{"role":"assistant","content":"Hel"}},"logprobs":null,"finish_reason":null}}],"usage":null}}"#),
        format!(r#"id: 1{NEW}data: {head}{{"index":0,"delta":{{"content":"lo"}},"logprobs":null,"finish_reason":null}}],"usage":null}}"#),
        format!(r#"id: 2{NEW}data: {head}{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"stop"}}],"usage":null}}"#),
        format!(r#"data: {head}],"usage":{{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,"prompt_tokens_details":{{"cached_tokens":3}}}}}}"#),
        "data: [DONE]".to_owned(),
        String::new(),
    ]
    .join("\n\n");
    assert_eq!(text, expected);
    network.end().await;
}

const NEW: char = '\n';

#[tokio::test(flavor = "multi_thread")]
async fn a_text_completion_is_answered_whole_and_streamed() {
    let network = Network::start().await;
    let body = json!({"model": "tiny", "prompt": ["once"]});
    let whole: Value =
        network.post("/v1/completions", &body).send().await.expect("answered").json().await.expect("JSON");
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["choices"], json!([{"index": 0, "text": "Hello", "logprobs": null, "finish_reason": "stop"}]));
    assert!(whole["id"].as_str().expect("an id").starts_with("cmpl-"));
    let body = json!({"model": "tiny", "prompt": "once", "stream": true});
    let streamed = network.post("/v1/completions", &body).send().await.expect("answered").text().await.expect("text");
    let texts: Vec<Value> = streamed
        .lines()
        .filter_map(|line| line.strip_prefix("data: {"))
        .map(|line| serde_json::from_str::<Value>(&format!("{{{line}")).expect("JSON")["choices"][0]["text"].clone())
        .collect();
    assert_eq!(texts, [json!("Hel"), json!("lo"), json!("")]);
    assert!(streamed.ends_with("data: [DONE]\n\n"));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_native_api_streams_chunks_a_line_each_under_the_clients_names() {
    let network = Network::start().await;
    let id = "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f";
    let body = json!({
        "modelId": "tiny", "version": "1.0", "input": "hi", "correlationId": id, "retryToken": "again",
        "traceId": "4bf92f3577b34da6a3ce929d0e0e4736", "deadlineMs": 5000, "tenantId": "acme"
    });
    let response = network.post("/infer", &body).send().await.expect("answered");
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    assert_eq!(response.headers()["x-request-id"], id);
    let text = response.text().await.expect("text");
    let chunks: Vec<InferChunk> = text.lines().map(|line| serde_json::from_str(line).expect("a chunk")).collect();
    assert_eq!(chunks.iter().map(|chunk| chunk.seq).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(chunks[2].done && chunks[2].payload.usage.is_some());
    let job = network.fake.jobs.lock()[0].clone();
    assert_eq!((job.retry_token.as_str(), job.version.to_string().as_str()), ("again", "1.0"));
    assert_eq!(job.trace_id.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
    assert!(job.deadline_ms.is_some_and(|left| left <= 5000));
    let broken = json!({"modelId": "tiny", "input": "break"});
    let text = network.post("/infer", &broken).send().await.expect("answered").text().await.expect("text");
    let last: Value = serde_json::from_str(text.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["error"]["code"], "worker_failed");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_on_where_the_client_began_it() {
    let network = Network::start().await;
    let traced = network
        .post("/v1/chat/completions", &chat_body("hi"))
        .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    traced.send().await.expect("answered");
    let job = network.fake.jobs.lock()[0].clone();
    assert_eq!(job.trace_id.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_in_mid_stream_is_an_event_and_no_done_follows() {
    let network = Network::start().await;
    for (prompt, code) in [
        ("break", "worker_failed"),
        ("cut", "unavailable"),
        ("gap", "internal_error"),
        ("stale", "internal_error"),
        ("unfinished", "internal_error"),
    ] {
        let response = network.chat_streamed(prompt).await;
        assert_eq!(response.status(), 200);
        let text = response.text().await.expect("the body ends in good order");
        assert!(!text.contains("[DONE]"), "{prompt}: {text}");
        let last = text.lines().rfind(|line| !line.is_empty()).and_then(|line| line.strip_prefix("data: "));
        let error: Value = serde_json::from_str(last.expect("an event")).expect("JSON");
        assert_eq!(error["error"]["code"], code, "{prompt}");
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_in_mid_answer_has_a_status_where_nothing_was_sent_yet() {
    let network = Network::start().await;
    for (prompt, status, code) in
        [("break", 502, "worker_failed"), ("cut", 503, "unavailable"), ("gap", 500, "internal_error")]
    {
        crate::expect_error(network.chat(prompt).await, status, code, None).await;
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_its_job() {
    let network = Network::start().await;
    for streamed in [true, false] {
        for prompt in ["endless", "silent", "queued"] {
            let mut body = chat_body(prompt);
            body["stream"] = json!(streamed);
            let request = network.post("/v1/chat/completions", &body);
            let client = network.tasks.spawn(async { request.send().await?.text().await });
            network.fake.arrived.notified().await;
            client.abort();
            let cancelled = network.fake.cancelled.notified();
            tokio::time::timeout(Duration::from_mins(1), cancelled).await.expect("the orchestrator is told");
        }
    }
    let metrics = network.metrics.clone();
    // A request is counted when its task has ended.
    network.end().await;
    let text = metrics.encode();
    assert!(text.contains(r#"tether_requests_total{model="tiny",outcome="cancelled",finish_reason=""} 6"#), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_ended_well_cancels_nothing() {
    let network = Network::start().await;
    for _ in 0..20 {
        network.chat("hi").await.bytes().await.expect("answered");
        network.chat_streamed("hi").await.bytes().await.expect("answered");
    }
    let cancelled = tokio::time::timeout(Duration::from_millis(200), network.fake.cancelled.notified()).await;
    assert!(cancelled.is_err(), "no job was cancelled");
    let text = network.metrics.encode();
    let counted = r#"tether_requests_total{model="tiny",outcome="completed",finish_reason="stop"} 40"#;
    assert!(text.contains(counted), "{text}");
    assert!(text.contains(r#"tether_time_to_first_token_seconds_count{model="tiny"} 40"#), "{text}");
    assert!(text.contains(r#"tether_inter_token_latency_seconds_count{model="tiny"} 40"#), "{text}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_waits_long_gets_its_headers_and_signs_of_life() {
    let network = Network::start().await;
    let response = network.chat_streamed("wait 11000").await;
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key("x-tether-attempts"), "not known yet");
    let text = response.text().await.expect("text");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_holds_the_worker_back_and_not_our_memory() {
    let network = Network::start_with(tether_gateway::Config { write_timeout_secs: 1, ..config() }).await;
    let response = network.chat_streamed("flood").await;
    assert_eq!(response.status(), 200);
    // The client reads nothing: the connection is given up, and with it the job.
    tokio::time::timeout(Duration::from_secs(10), network.fake.cancelled.notified()).await.expect("cancelled");
    drop(response);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_lets_answers_end_and_takes_no_new_ones() {
    let network = Network::start_with(tether_gateway::Config { drain_secs: 5, ..config() }).await;
    let slow = network.post("/v1/chat/completions", &chat_body("held"));
    let stop = async {
        network.fake.arrived.notified().await;
        network.stop.cancel();
        while tokio::net::TcpStream::connect(network.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
        network.fake.release.notify_one();
    };
    let (answer, ()) = tokio::join!(slow.send(), stop);
    // The fakes stop too, so only the gateway's own part is certain: it answered, and did not cut the connection.
    assert!(answer.is_ok());
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_cuts_what_does_not_end_in_time() {
    let network = Network::start().await;
    let response = network.chat_streamed("silent").await;
    network.stop.cancel();
    // The worker says nothing for ever, so without the cut this would not end.
    let _ = response.text().await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_may_come_in_x_api_key() {
    let network = Network::start().await;
    let request = network.request(Method::POST, "/v1/chat/completions").json(&chat_body("hi"));
    let response = request.header("x-api-key", fake::token(1)).send().await.expect("answered");
    assert_eq!(response.status(), 200);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeats_with_only_a_retry_token_are_one_job_whatever_their_deadline() {
    let network = Network::start().await;
    let send = async |key: u8, body: Value| {
        let request = network.request(Method::POST, "/infer").bearer_auth(fake::token(key)).json(&body);
        let response = request.send().await.expect("answered");
        assert_eq!(response.status(), 200);
        let id = response.headers()["x-request-id"].to_str().expect("text").to_owned();
        response.text().await.expect("text");
        let job = network.fake.jobs.lock().last().cloned().expect("a job");
        assert_eq!(job.correlation_id.to_string(), id);
        job
    };
    let job = send(1, json!({"modelId": "tiny", "input": "hi", "retryToken": "again"})).await;
    let repeat = send(1, json!({"modelId": "tiny", "input": "hi", "retryToken": "again", "deadlineMs": 5000})).await;
    let key = |job: &protocol::infer::InferRequest| (job.correlation_id, job.retry_token.clone());
    assert_eq!((key(&job), job.fingerprint), (key(&repeat), repeat.fingerprint));
    assert!(job.fingerprint.is_some());
    let other = send(1, json!({"modelId": "tiny", "input": "ho", "retryToken": "again"})).await;
    assert_eq!(key(&job), key(&other));
    assert_ne!(job.fingerprint, other.fingerprint, "another request");
    let elsewhere = send(2, json!({"modelId": "tiny", "input": "hi", "retryToken": "again"})).await;
    assert_ne!(job.correlation_id, elsewhere.correlation_id, "another tenant");
    let named = "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f";
    let body = json!({"modelId": "tiny", "input": "hi", "retryToken": "again", "correlationId": named});
    assert_eq!(send(1, body).await.correlation_id.to_string(), named);
    let without = send(1, json!({"modelId": "tiny", "input": "hi"})).await;
    assert_eq!((without.fingerprint, without.correlation_id.0.get_version_num()), (None, 7));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_that_outlives_the_drain_of_its_gateway_is_an_error_with_a_response() {
    let network = Network::start().await;
    let stop = async {
        while network.fake.jobs.lock().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        network.gateway_stop.cancel();
    };
    let (begun, waiting, ()) = tokio::join!(network.chat("silent"), network.chat("queued"), stop);
    for response in [begun, waiting] {
        expect_error(response, 503, "unavailable", None).await;
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_outlives_the_drain_of_its_gateway_ends_with_an_error_and_no_end_of_the_answer() {
    let network = Network::start().await;
    let mut native =
        network.post("/infer", &json!({"modelId": "tiny", "input": "endless"})).send().await.expect("begun");
    let mut chat = network.chat_streamed("endless").await;
    for response in [&mut native, &mut chat] {
        response.chunk().await.expect("no error").expect("a chunk");
    }
    network.gateway_stop.cancel();
    let (native, chat) = (native.text().await.expect("whole"), chat.text().await.expect("whole"));
    for text in [native, chat] {
        let last = text.trim_end().lines().last().expect("a line").trim_start_matches("data: ");
        let error: Value = serde_json::from_str(last).expect("JSON");
        assert_eq!(error["error"]["code"], "unavailable", "{last}");
    }
    network.end().await;
}

use std::time::Duration;

use protocol::control::Scope;
use protocol::policy::TenantPolicy;
use reqwest::Method;
use serde_json::json;
use tether_gateway::{Config, RateLimitConfig};

use crate::{Network, chat_body, config, expect_error, fake};

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_good_key_is_refused() {
    let network = Network::start().await;
    let send = |token: Option<String>| {
        let request = network.request(Method::POST, "/v1/chat/completions").json(&chat_body("hi"));
        let request = match token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        async { request.send().await.expect("answered") }
    };
    for token in [None, Some("sk-wrong".into()), Some(fake::token(77))] {
        let headers = expect_error(send(token).await, 401, "invalid_api_key", None).await;
        assert_eq!(headers["www-authenticate"], "Bearer");
        assert!(headers.contains_key("x-request-id"));
    }
    let headers = expect_error(send(Some(fake::token(4))).await, 403, "insufficient_scope", None).await;
    assert_eq!(headers["x-should-retry"], "false");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_revoked_stops_working_once_its_check_is_old() {
    let network = Network::start_with(Config { token_cache_secs: 1, ..config() }).await;
    assert_eq!(network.chat("hi").await.status(), 200);
    network.fake.grants.lock().remove(&fake::token(1));
    assert_eq!(network.chat("hi").await.status(), 200, "believed for its second");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    expect_error(network.chat("hi").await, 401, "invalid_api_key", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_guesses_keys_is_told_to_wait() {
    let network = Network::start().await;
    let guess = || async {
        let request = network.request(Method::GET, "/v1/models").bearer_auth("tth_live_guess");
        request.send().await.expect("answered")
    };
    for _ in 0..10 {
        assert_eq!(guess().await.status(), 401);
    }
    let headers = expect_error(guess().await, 429, "rate_limit_exceeded", None).await;
    assert_eq!(headers["retry-after"], "6");
    assert_eq!(network.chat("hi").await.status(), 200, "a good key is not held up");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_named_with_its_model_and_must_be_one_of_it() {
    let network = Network::start().await;
    let ask = |model: &str| {
        let mut body = chat_body("hi");
        body["model"] = json!(model);
        let request = network.post("/v1/chat/completions", &body);
        async { request.send().await.expect("answered") }
    };
    assert_eq!(ask("tiny:pirate").await.status(), 200);
    let job = network.fake.jobs.lock().pop().expect("a job came");
    assert_eq!(job.input.adapter.map(|adapter| adapter.to_string()).as_deref(), Some("pirate"));
    for other in ["tiny:poet", "tiny@1.0:pirate", "other:pirate"] {
        expect_error(ask(other).await, 404, "model_not_found", Some("model")).await;
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_over_its_rate_is_told_when_to_come_back() {
    let network = Network::start().await;
    let send = || async {
        let request = network.request(Method::POST, "/v1/chat/completions").json(&chat_body("hi"));
        request.bearer_auth(fake::token(2)).send().await.expect("answered")
    };
    for left in ["1", "0"] {
        let response = send().await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-ratelimit-limit-requests"], "2");
        assert_eq!(response.headers()["x-ratelimit-remaining-requests"], left);
    }
    let headers = expect_error(send().await, 429, "rate_limit_exceeded", Some("requests_per_minute")).await;
    assert_eq!(headers["retry-after"], "30");
    let millis: u64 = headers["retry-after-ms"].to_str().expect("text").parse().expect("a number");
    assert!((29_000..=30_000).contains(&millis));
    assert_eq!(headers["x-ratelimit-remaining-requests"], "0");
    assert!(headers["x-ratelimit-reset-requests"].to_str().expect("text").ends_with('s'));
    assert_eq!(network.chat("hi").await.status(), 200, "another tenant is not held up");
    assert!(network.metrics.encode().contains(r#"tether_throttled_total{tenant_class="unknown"} 1"#));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_learn_what_is_left_of_their_tokens() {
    let network = Network::start().await;
    let headers = network.chat("quota").await.headers().clone();
    assert_eq!(headers["x-ratelimit-limit-tokens"], "1000");
    assert_eq!(headers["x-ratelimit-remaining-tokens"], "600");
    assert!(headers["x-ratelimit-reset-tokens"].to_str().expect("text").ends_with('s'));
    assert!(!network.chat("hi").await.headers().contains_key("x-ratelimit-limit-tokens"), "it has no such limit");

    let refused = network.chat("over quota").await;
    let headers = refused.headers().clone();
    let body: serde_json::Value = refused.json().await.expect("JSON");
    let error = &body["error"];
    assert_eq!((&error["param"], &error["message"].is_string()), (&json!("tokens_per_day"), &true));
    // Just before midnight the wait is short, and the client is asked to wait.
    if headers.contains_key("retry-after") {
        assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("rate_limit_exceeded")));
    } else {
        assert_eq!((&error["type"], &error["code"]), (&json!("insufficient_quota"), &json!("insufficient_quota")));
        assert_eq!(headers["x-should-retry"], "false");
    }
    // 100 of the 1,000 are reserved.
    assert_eq!(headers["x-ratelimit-remaining-tokens"], "0");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_waits_as_told_is_served_again() {
    let rate_limit = RateLimitConfig { requests_per_minute: 120, burst: 1 };
    let network = Network::start_with(Config { rate_limit, ..config() }).await;
    assert_eq!(network.chat("hi").await.status(), 200);
    let refused = network.chat("hi").await;
    assert_eq!(refused.status(), 429);
    let wait: u64 = refused.headers()["retry-after-ms"].to_str().expect("text").parse().expect("a number");
    tokio::time::sleep(Duration::from_millis(wait + 5)).await;
    assert_eq!(network.chat("hi").await.status(), 200);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_not_what_was_asked_for_is_refused() {
    let network = Network::start().await;
    let send = |kind: &'static str, body: Vec<u8>| {
        let request = network.request(Method::POST, "/v1/chat/completions").bearer_auth(fake::token(1));
        async move { request.header("content-type", kind).body(body).send().await.expect("answered") }
    };
    expect_error(send("text/plain", b"{}".to_vec()).await, 415, "unsupported_media_type", None).await;
    expect_error(send("application/json; charset=utf-8", b"{".to_vec()).await, 400, "invalid_json", None).await;
    expect_error(send("application/json", b"{\"a\":\"\xff\"}".to_vec()).await, 400, "invalid_json", None).await;
    expect_error(send("application/json", "[".repeat(1_000_000).into_bytes()).await, 400, "invalid_json", None).await;
    expect_error(send("application/json", b"[\"tiny\", []]".to_vec()).await, 400, "invalid_json", None).await;
    expect_error(send("application/json", vec![]).await, 400, "invalid_json", None).await;
    expect_error(send("application/json", b"{}".to_vec()).await, 400, "missing_model", Some("model")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_of_a_repeat_that_the_gateway_itself_made() {
    let network = Network::start().await;
    let headers = expect_error(network.chat("restart").await, 503, "unavailable", None).await;
    assert_eq!(headers["retry-after"], "1");
    assert_eq!(network.fake.jobs.lock().len(), 2);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_no_model_could_read_reaches_no_orchestrator() {
    let network = Network::start().await;
    // A quarter of a million messages, a few megabytes.
    let tiny = json!({"role": "user", "content": "a"});
    let many = json!({"model": "tiny", "messages": vec![tiny; 250_000]});
    let refused = network.post("/v1/chat/completions", &many).send().await.expect("answered");
    expect_error(refused, 400, "invalid_value", Some("messages")).await;
    let long = "x".repeat(3 * 1024 * 1024);
    expect_error(network.chat(&long).await, 400, "context_length_exceeded", Some("messages")).await;
    let native = network.post("/infer", &json!({"modelId": "tiny", "input": {"prompt": long}}));
    let refused = native.send().await.expect("answered");
    expect_error(refused, 400, "context_length_exceeded", Some("input.prompt")).await;
    assert!(network.fake.jobs.lock().is_empty());
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_field_says_wrong_is_told_by_its_name() {
    let network = Network::start().await;
    for (field, value, code, param) in [
        ("model", json!("nope"), "model_not_found", "model"),
        ("model", json!("tiny@7.0"), "model_not_found", "model"),
        ("n", json!(17), "invalid_value", "n"),
        ("echo", json!(true), "unsupported_parameter", "echo"),
        ("temperature", json!("hot"), "invalid_value", "temperature"),
        ("messages", json!([{"role": "user", "content": 7}]), "invalid_value", "messages[0].content"),
    ] {
        let mut body = chat_body("hi");
        body[field] = value;
        let response = network.post("/v1/chat/completions", &body).send().await.expect("answered");
        let status = if code == "model_not_found" { 404 } else { 400 };
        expect_error(response, status, code, Some(param)).await;
    }
    let text = network.metrics.encode();
    assert!(text.contains(r#"tether_requests_total{model="unknown",outcome="model_not_found",finish_reason=""} 2"#));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_just_published_is_found_within_a_second() {
    let network = Network::start().await;
    let mut body = chat_body("hi");
    body["model"] = json!("fresh");
    let send = || async { network.post("/v1/chat/completions", &body).send().await.expect("answered") };
    assert_eq!(send().await.status(), 404);
    network.fake.models.lock().push(fake::model("fresh", "1.0"));
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!(send().await.status(), 200);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_and_tenancy_are_kept() {
    let network = Network::start().await;
    let picky = network.request(Method::POST, "/v1/chat/completions").bearer_auth(fake::token(3));
    let response = picky.json(&chat_body("hi")).send().await.expect("answered");
    let headers = expect_error(response, 403, "model_not_allowed", Some("model")).await;
    assert_eq!(headers["x-should-retry"], "false");
    let foreign = json!({"modelId": "tiny", "input": "hi", "tenantId": "other"});
    let response = network.post("/infer", &foreign).send().await.expect("answered");
    expect_error(response, 403, "insufficient_scope", Some("tenantId")).await;
    let unknown = json!({"modelId": "nope", "input": "hi"});
    let response = network.post("/infer", &unknown).send().await.expect("answered");
    expect_error(response, 404, "model_not_found", Some("modelId")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_of_an_orchestrator_has_its_status_and_headers() {
    let network = Network::start().await;
    for (code, status, seen) in [
        ("context_length_exceeded", 400, "context_length_exceeded"),
        ("model_not_allowed", 403, "model_not_allowed"),
        ("idempotency_in_progress", 409, "idempotency_in_progress"),
        ("rate_limit_exceeded", 429, "rate_limit_exceeded"),
        ("internal_error", 500, "internal_error"),
        ("worker_failed", 502, "worker_failed"),
        ("no_capacity", 503, "no_capacity"),
        ("breaker_open", 503, "breaker_open"),
        ("model_loading", 503, "model_loading"),
        ("unavailable", 503, "unavailable"),
        ("deadline_exceeded", 504, "deadline_exceeded"),
        ("worker_full", 503, "no_capacity"),
        ("not_enrolled", 500, "internal_error"),
    ] {
        for response in
            [network.chat(&format!("refuse {code}")).await, network.chat_streamed(&format!("refuse {code}")).await]
        {
            let headers = expect_error(response, status, seen, None).await;
            assert_eq!(headers["retry-after"], "3");
            assert_eq!(headers["retry-after-ms"], "2500");
            assert!(headers.contains_key("x-tether-decision"));
        }
    }
    assert!(network.metrics.encode().contains(r#"tether_shed_total{reason="no_capacity"} 4"#));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_past_its_deadline_is_given_up() {
    let network = Network::start().await;
    let body = json!({"modelId": "tiny", "input": "wait 5000", "deadlineMs": 200});
    let response = network.post("/infer", &body).send().await.expect("answered");
    expect_error(response, 504, "deadline_exceeded", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orchestrator_that_vanishes_is_tried_again_and_then_told_of() {
    let network = Network::start().await;
    let headers = expect_error(network.chat("vanish").await, 503, "unavailable", None).await;
    assert!(headers.contains_key("retry-after"));
    assert_eq!(network.fake.jobs.lock().len(), 3);
    let jobs = network.fake.jobs.lock().clone();
    assert!(jobs.iter().all(|job| job.retry_token == jobs[0].retry_token), "one job, however often it is sent");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_an_orchestrator_that_restarts() {
    let network = Network::start().await;
    assert_eq!(network.chat("away 5").await.status(), 200);
    assert_eq!(network.fake.jobs.lock().len(), 6);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_full_says_so() {
    let network = Network::start_with(Config { jobs_max: 1, ..config() }).await;
    let held = network.chat_streamed("silent").await;
    let headers = expect_error(network.chat("hi").await, 503, "unavailable", None).await;
    assert_eq!(headers["retry-after"], "1");
    drop(held);
    network.fake.cancelled.notified().await;
    assert_eq!(network.chat("hi").await.status(), 200);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_and_methods_that_are_not_there_are_errors_too() {
    let network = Network::start().await;
    let response = network.request(Method::GET, "/v1/nothing").send().await.expect("answered");
    expect_error(response, 404, "not_found", None).await;
    let response = network.request(Method::GET, "/v1/chat/completions").send().await.expect("answered");
    let headers = expect_error(response, 405, "method_not_allowed", None).await;
    assert_eq!(headers["allow"], "POST");
    assert!(headers.contains_key("x-request-id"));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_routes_are_for_operators() {
    let network = Network::start().await;
    expect_error(network.get("/admin/v1/nodes").await, 403, "insufficient_scope", None).await;
    let admin = |path: &str| {
        let request = network.request(Method::GET, path).bearer_auth(fake::token(4));
        async { request.send().await.expect("answered") }
    };
    let fleet: serde_json::Value = admin("/admin/v1/nodes").await.json().await.expect("JSON");
    assert_eq!(fleet["workers"][0]["report"]["gpuClass"], "cpu");
    let id = "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f";
    let decision: serde_json::Value = admin(&format!("/admin/v1/jobs/{id}/decision")).await.json().await.expect("JSON");
    assert_eq!(decision["correlationId"], id);
    let nil = format!("/admin/v1/jobs/{}/decision", "00000000-0000-0000-0000-000000000000");
    expect_error(admin(&nil).await, 404, "not_found", None).await;
    let malformed = admin("/admin/v1/jobs/7/decision").await;
    expect_error(malformed, 400, "invalid_value", Some("correlationId")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_admin_route_is_for_operators() {
    let network = Network::start().await;
    let document: serde_json::Value = network.get("/openapi.json").await.json().await.expect("JSON");
    let mut routes = 0;
    for (path, item) in document["paths"].as_object().expect("paths") {
        if !path.starts_with("/admin/") {
            continue;
        }
        let path: Vec<&str> = path.split('/').map(|part| if part.starts_with('{') { "x" } else { part }).collect();
        for method in item.as_object().expect("operations").keys() {
            let method: Method = method.to_uppercase().parse().expect("a method");
            let request = network.request(method, &path.join("/")).bearer_auth(fake::token(1));
            expect_error(request.send().await.expect("answered"), 403, "insufficient_scope", None).await;
            routes += 1;
        }
    }
    assert!(routes > 25, "{routes} routes");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_jobs_says_which_orchestrators_are_missing_and_what_is_malformed() {
    let network = Network::start().await;
    let ask = |method: Method, path: &str| {
        let request = network.request(method, path).bearer_auth(fake::token(4));
        async { request.send().await.expect("answered") }
    };
    let list = async |query: &str| -> serde_json::Value {
        ask(Method::GET, &format!("/admin/v1/jobs{query}")).await.json().await.expect("JSON")
    };
    assert_eq!(list("").await, serde_json::json!({ "jobs": [] }));
    // Pages may be empty before the last one.
    let (mut after, mut pages) = (String::new(), 0);
    while let Some(next) = list(&format!("?limit=1{after}")).await["next"].as_str() {
        (after, pages) = (format!("&after={next}"), pages + 1);
        assert!(pages < 10);
    }
    assert_eq!(pages, 3);
    for (query, param) in [
        ("?limit=x", "limit"),
        ("?status=x", "status"),
        ("?tenant=A", "tenant"),
        ("?model=-", "model"),
        ("?after=x", "after"),
    ] {
        let refused = ask(Method::GET, &format!("/admin/v1/jobs{query}")).await;
        expect_error(refused, 400, "invalid_value", Some(param)).await;
    }
    let refused = ask(Method::DELETE, "/admin/v1/dead-letters").await;
    expect_error(refused, 400, "invalid_value", Some("before")).await;
    // One of an earlier version has no such call.
    network.fake.orchestrator_without_workers(&network.tasks, &network.stop).await;
    let other = protocol::signature::NodeKey::from_seed(&[3; 32]).public_key();
    let mut listed = list("").await;
    while listed.get("silent").is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        listed = list("").await;
    }
    assert_eq!(listed, serde_json::json!({ "jobs": [], "silent": [other] }));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_make_list_and_revoke_tokens() {
    let network = Network::start().await;
    let send = |method: Method, path: &str, token: String, body: &str| {
        let request = network.request(method, path).bearer_auth(token).body(body.to_owned());
        async { request.send().await.expect("answered") }
    };
    let new = r#"{"tenantId":"acme","name":"laptop","scopes":["infer"]}"#;
    let tokens = "/admin/v1/tokens";
    expect_error(send(Method::POST, tokens, fake::token(1), new).await, 403, "insufficient_scope", None).await;
    let created: serde_json::Value = send(Method::POST, tokens, fake::token(4), new).await.json().await.expect("JSON");
    assert_eq!((&created["token"], &created["tenantId"]), (&"token of laptop".into(), &"acme".into()));
    let malformed = send(Method::POST, tokens, fake::token(4), r#"{"tenantId":"A B","scopes":[]}"#).await;
    expect_error(malformed, 400, "invalid_value", Some("tenantId")).await;
    expect_error(send(Method::POST, tokens, fake::token(4), "{").await, 400, "invalid_json", None).await;
    let listed: serde_json::Value = send(Method::GET, tokens, fake::token(4), "").await.json().await.expect("JSON");
    assert_eq!(listed, serde_json::json!({ "tokens": [] }));
    for (key_id, found) in [("abcdefgh", true), ("nobody00", false)] {
        let path = format!("{tokens}/{key_id}");
        let revoked: serde_json::Value =
            send(Method::DELETE, &path, fake::token(4), "").await.json().await.expect("JSON");
        assert_eq!(revoked["found"], found);
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_away_is_told_apart_from_a_wrong_request() {
    let network = Network::start().await;
    assert_eq!(network.chat("hi").await.status(), 200);
    let registry = protocol::signature::NodeKey::from_seed(&[1; 32]).public_key();
    network.fake.network.cut(registry);
    assert_eq!(network.chat("hi").await.status(), 200, "token and catalogue are believed for a while");
    let grant = fake::grant("late", &[Scope::Infer], TenantPolicy::default());
    network.fake.grants.lock().insert(fake::token(50), grant);
    let request = network.request(Method::GET, "/v1/models").bearer_auth(fake::token(50));
    let headers = expect_error(request.send().await.expect("answered"), 503, "unavailable", None).await;
    assert!(headers.contains_key("retry-after"));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orchestrator_without_room_does_not_refuse_for_another_that_has_some() {
    let rate_limit = RateLimitConfig { requests_per_minute: 0, ..RateLimitConfig::default() };
    let network = Network::start_with(Config { rate_limit, ..config() }).await;
    let refused = network.fake.orchestrator_without_workers(&network.tasks, &network.stop).await;
    while refused.load(std::sync::atomic::Ordering::SeqCst) < 3 {
        assert_eq!(network.chat("hi").await.status(), 200);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = network.fake.jobs.lock().len();
    expect_error(network.chat("refuse no_capacity").await, 503, "no_capacity", None).await;
    assert_eq!(network.fake.jobs.lock().len(), before + 1, "each is asked once, and not again and again");
    network.end().await;
}

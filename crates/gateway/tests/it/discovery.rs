use std::time::Duration;

use protocol::UnixMillis;
use protocol::control::FleetWorker;
use protocol::health::ModelState;
use protocol::model::AliasEntry;
use reqwest::Method;
use serde_json::{Value, json};
use tether_gateway::Config;

use crate::{Network, config, expect_error, fake};

fn ids(list: &Value) -> Vec<&str> {
    list["data"].as_array().expect("a list").iter().map(|model| model["id"].as_str().expect("a name")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn served_models_are_listed_the_newest_under_its_plain_name() {
    let network = Network::start().await;
    let list: Value = network.get("/v1/models").await.json().await.expect("JSON");
    assert_eq!(list["object"], "list");
    assert_eq!(ids(&list), ["other", "tiny", "tiny:pirate"]);
    let tiny: Value = network.get("/v1/models/tiny").await.json().await.expect("JSON");
    assert_eq!(tiny, list["data"][1]);
    assert_eq!(
        tiny,
        json!({
            "id": "tiny", "object": "model", "created": 1_700_000_000, "owned_by": "tether", "version": "1.1",
            "state": "ready", "digest": fake::model("tiny", "1.1").digest.to_string(), "context_length": 2048,
            "regions": ["local"], "replicas": 1, "bytes": 1
        })
    );
    // A worker loads it at its first job.
    let other = &list["data"][0];
    assert_eq!((&other["id"], &other["state"], &other["replicas"]), (&json!("other"), &json!("idle"), &json!(0)));
    let adapted: Value = network.get("/v1/models/tiny:pirate").await.json().await.expect("JSON");
    assert_eq!(adapted, list["data"][2]);
    for missing in ["nope", "tiny:nope", "tiny@1.0:pirate"] {
        let answer = network.get(&format!("/v1/models/{missing}")).await;
        expect_error(answer, 404, "model_not_found", Some("model")).await;
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_nobody_serves_is_listed_to_operators_alone() {
    let network = Network::start().await;
    let registered = || async {
        let request = network.request(Method::GET, "/admin/v1/models").bearer_auth(fake::token(4));
        request.send().await.expect("answered").json::<Value>().await.expect("JSON")
    };
    let all = registered().await;
    assert_eq!(ids(&all), ["other", "tiny@1.0", "tiny", "tiny:pirate"]);
    assert_eq!((&all["data"][1]["state"], &all["data"][1]["regions"]), (&json!("unserved"), &json!([])));
    expect_error(network.get("/v1/models/tiny@1.0").await, 404, "model_not_found", Some("model")).await;
    expect_error(network.get("/admin/v1/models").await, 403, "insufficient_scope", None).await;

    // Neither who leaves nor who fails to load a model serves it.
    type Change = fn(&mut FleetWorker);
    let changes: [(Change, &[&str], &str); 4] = [
        (
            |worker| worker.report.model_cache[0].state = ModelState::Loading,
            &["other", "tiny", "tiny:pirate"],
            "loading",
        ),
        (|worker| worker.report.adapters.clear(), &["other", "tiny"], "loading"),
        (|worker| worker.report.model_cache[0].state = ModelState::Error, &["other"], "error"),
        (|worker| worker.report.draining = true, &[], "unserved"),
    ];
    for (change, served, state) in changes {
        network.fake.workers.lock().iter_mut().for_each(change);
        tokio::time::sleep(Duration::from_millis(1050)).await;
        let list: Value = network.get("/v1/models").await.json().await.expect("JSON");
        assert_eq!(ids(&list), served, "{state}");
        let one = network.get("/v1/models/tiny").await;
        assert_eq!(one.status().is_success(), served.contains(&"tiny"), "{state}: the list and one model agree");
        assert_eq!(registered().await["data"][2]["state"], state);
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alias_is_listed_and_answers_under_its_own_name() {
    let network = Network::start().await;
    network.get("/v1/models").await;
    let alias = |alias: &str, target: &str| AliasEntry {
        alias: alias.parse().expect("a name"),
        target: target.parse().expect("a model"),
        alternatives: vec![],
        created_at: UnixMillis(0),
    };
    let set = [("claude-sonnet-4", "tiny:pirate"), ("gone", "nobody"), ("gpt-4o", "tiny"), ("old", "tiny@1.0")];
    *network.fake.aliases.lock() = set.map(|(name, target)| alias(name, target)).to_vec();
    // A name that the catalogue has not told yet is asked for at once, and the list shows it a second later.
    tokio::time::sleep(Duration::from_millis(1050)).await;
    let one: Value = network.get("/v1/models/gpt-4o").await.json().await.expect("JSON");
    assert_eq!((&one["id"], &one["alias_of"], &one["version"]), (&json!("gpt-4o"), &json!("tiny"), &json!("1.1")));
    let list: Value = network.get("/v1/models").await.json().await.expect("JSON");
    assert_eq!(
        ids(&list),
        ["other", "tiny", "tiny:pirate", "claude-sonnet-4", "gpt-4o"],
        "what is served, and no more"
    );
    assert_eq!(list["data"][4], one);
    for missing in ["gone", "gpt-4o@1.1", "claude-sonnet-4:polite", "gpt-5"] {
        expect_error(network.get(&format!("/v1/models/{missing}")).await, 404, "model_not_found", Some("model")).await;
    }
    for name in ["gpt-4o", "claude-sonnet-4"] {
        let mut body = crate::chat_body("hi");
        body["model"] = json!(name);
        let answer: Value =
            network.post("/v1/chat/completions", &body).send().await.expect("answered").json().await.expect("JSON");
        assert_eq!(answer["model"], name);
    }
    let jobs = network.fake.jobs.lock().clone();
    let ran: Vec<_> = jobs.iter().map(|job| (job.model_id.to_string(), job.input.adapter.is_some())).collect();
    assert_eq!(ran, [("tiny".to_owned(), false), ("tiny".to_owned(), true)]);
    // What counts for a tenant is the model, and not the name.
    let picky = network.request(Method::POST, "/v1/chat/completions").bearer_auth(fake::token(3));
    let mut body = crate::chat_body("hi");
    body["model"] = json!("gpt-4o");
    expect_error(picky.json(&body).send().await.expect("answered"), 403, "model_not_allowed", Some("model")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_name_over_several_models_is_answered_by_any_of_them_and_the_answer_says_which() {
    let network = Network::start().await;
    let name = |name: &str, targets: [&str; 2]| AliasEntry {
        alias: name.parse().expect("a name"),
        target: targets[0].parse().expect("a model"),
        alternatives: vec![targets[1].parse().expect("a model")],
        created_at: UnixMillis(0),
    };
    let shared =
        [name("any", ["tiny", "other"]), name("gone", ["nobody", "nothing"]), name("other", ["other", "tiny"])];
    *network.fake.aliases.lock() = shared.to_vec();
    network.fake.models.lock()[1].context_length = 4;
    let list: Value = network.get("/v1/models").await.json().await.expect("JSON");
    assert_eq!(ids(&list), ["other@0.1", "tiny", "tiny:pirate", "any", "other"]);
    let one: Value = network.get("/v1/models/any").await.json().await.expect("JSON");
    assert_eq!(one, list["data"][3]);
    assert_eq!((&one["alias_of"], &one["alternatives"]), (&json!("tiny"), &json!(["other"])));
    assert_eq!((&one["state"], &one["context_length"]), (&json!("ready"), &json!(2048)), "the best that there is");
    let ask = async |model: &str, prompt: &str, token: u8| {
        let mut body = crate::chat_body(prompt);
        body["model"] = json!(model);
        let request = network.request(Method::POST, "/v1/chat/completions").bearer_auth(fake::token(token));
        request.json(&body).send().await.expect("answered")
    };
    for (prompt, version, digest) in [("as other", "other@0.1", "other@0.1"), ("as tiny", "tiny@1.1", "tiny@1.1")] {
        let answer = ask("any", prompt, 1).await;
        assert_eq!(answer.headers()["x-tether-model"], version);
        let digest = protocol::Digest::of(digest.as_bytes()).to_string();
        assert_eq!(answer.headers()["x-tether-model-digest"], digest.as_str());
        let body: Value = answer.json().await.expect("JSON");
        assert_eq!(body["model"], "any", "the name that was asked for");
        assert_eq!(body["system_fingerprint"], format!("fp_{}", &digest[..12]));
    }
    expect_error(ask("any", "as stranger", 1).await, 500, "internal_error", None).await;
    // A tenant that may use one of them has that one, and a prompt too long for one goes to the other alone.
    assert_eq!(ask("any", "as other", 3).await.status(), 200);
    assert_eq!(ask("any", &"a".repeat(5 * 1024), 1).await.status(), 200);
    assert_eq!(ask("any:pirate", "hi", 1).await.status(), 200, "one of them has the adapter");
    expect_error(ask("any", &"a".repeat(3 * 1024 * 1024), 1).await, 400, "context_length_exceeded", Some("messages"))
        .await;
    expect_error(ask("gone", "hi", 1).await, 404, "model_not_found", Some("model")).await;
    let jobs = network.fake.jobs.lock().clone();
    let sent = jobs.iter().map(|job| {
        let others: Vec<String> = job.alternatives.iter().map(ToString::to_string).collect();
        format!("{} {}", job.model(), others.join(" "))
    });
    let both = "tiny@1.1 other@0.1";
    assert_eq!(sent.collect::<Vec<_>>(), [both, both, both, "other@0.1 ", "other@0.1 ", "tiny@1.1 "]);
    let load = network.request(Method::POST, "/admin/v1/models/any/load").bearer_auth(fake::token(4));
    let refused: Value = load.send().await.expect("answered").json().await.expect("JSON");
    assert_eq!(refused["error"]["message"], "any stands for tiny, other: name one of them");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_in_memory_is_forgotten_only_by_force() {
    let network = Network::start().await;
    let remove = async |path: &str| {
        let request = network.request(Method::DELETE, &format!("/admin/v1/models/{path}"));
        request.bearer_auth(fake::token(4)).send().await.expect("answered")
    };
    expect_error(remove("tiny@1.1").await, 400, "invalid_value", Some("model")).await;
    expect_error(remove("tiny").await, 400, "invalid_value", Some("model")).await;
    expect_error(remove("tiny:pirate").await, 404, "model_not_found", Some("model")).await;
    assert_eq!(remove("tiny@1.0").await.json::<Value>().await.expect("JSON")["found"], false);
    assert_eq!(remove("tiny@1.1?force=true").await.json::<Value>().await.expect("JSON")["found"], true);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_is_no_text_gets_an_error_like_any_other() {
    let network = Network::start().await;
    expect_error(network.get("/v1/models/%ff").await, 404, "not_found", None).await;
    expect_error(network.get("/admin/v1/jobs/%ff/decision").await, 404, "not_found", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_sees_only_the_models_it_may_use() {
    let network = Network::start().await;
    let get = |path: &str| network.request(Method::GET, path).bearer_auth(fake::token(3)).send();
    let list: Value = get("/v1/models").await.expect("answered").json().await.expect("JSON");
    assert_eq!(list["data"].as_array().expect("a list").len(), 1);
    let hidden = get("/v1/models/tiny").await.expect("answered");
    expect_error(hidden, 404, "model_not_found", Some("model")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_endpoints_tell_alive_from_ready() {
    let network = Network::start().await;
    for path in ["/healthz", "/health", "/readyz"] {
        assert_eq!(network.request(Method::GET, path).send().await.expect("answered").status(), 200, "{path}");
    }
    network.fake.workers.lock().clear();
    tokio::time::sleep(Duration::from_millis(1050)).await;
    let unready = network.request(Method::GET, "/readyz").send().await.expect("answered");
    expect_error(unready, 503, "no_capacity", None).await;
    assert_eq!(network.get("/healthz").await.status(), 200);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_version_and_openapi_are_shown() {
    let network = Network::start().await;
    let metrics = network.get("/metrics").await;
    assert_eq!(metrics.headers()["content-type"], "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(metrics.text().await.expect("text").ends_with("# EOF\n"));
    let version: Value = network.get("/version").await.json().await.expect("JSON");
    assert_eq!(version, json!({"name": "tether", "version": "1.2.3"}));
    let document: Value = network.get("/openapi.json").await.json().await.expect("JSON");
    for path in document["paths"].as_object().expect("paths").keys() {
        let filled = path.replace("{id}", "tiny").replace("{correlationId}", "7");
        let status = network.request(Method::GET, &filled).send().await.expect("answered").status();
        assert_ne!(status, 404, "{path} is described and not there");
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_configured_origins_may_call_and_no_others() {
    let origin = "https://app.example.com";
    let network = Network::start_with(Config { cors_origins: vec![origin.into()], ..config() }).await;
    let preflight = |origin: &'static str| {
        network
            .request(Method::OPTIONS, "/admin/v1/aliases/fast")
            .header("origin", origin)
            .header("access-control-request-method", "DELETE")
            .header("access-control-request-headers", "authorization,content-type")
            .send()
    };
    let allowed = preflight(origin).await.expect("answered");
    assert_eq!(allowed.status(), 200);
    assert_eq!(allowed.headers()["access-control-allow-origin"], origin);
    assert_eq!(allowed.headers()["access-control-allow-headers"], "authorization,content-type");
    let methods = allowed.headers()["access-control-allow-methods"].to_str().expect("text");
    let methods: Vec<&str> = methods.split(',').map(str::trim).collect();
    assert!(["GET", "POST", "PATCH", "DELETE"].iter().all(|method| methods.contains(method)), "{methods:?}");
    let other = preflight("https://evil.example.com").await.expect("answered");
    assert!(!other.headers().contains_key("access-control-allow-origin"));
    let plain = network.request(Method::GET, "/v1/models").header("origin", origin).send().await.expect("answered");
    let exposed = plain.headers()["access-control-expose-headers"].to_str().expect("text").to_owned();
    assert!(exposed.contains("x-request-id") && exposed.contains("retry-after"), "{exposed}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_configured_origins_no_page_may_call() {
    let network = Network::start().await;
    let request = network.request(Method::GET, "/v1/models").header("origin", "https://app.example.com");
    let response = request.send().await.expect("answered");
    assert!(!response.headers().contains_key("access-control-allow-origin"));
    network.end().await;
}

//! How urgent a request is, and what is said of one that was made cheaper.

use http::Method;
use protocol::policy::{DegradePolicy, ServiceClass, TenantPolicy};
use serde_json::{Value, json};

use super::{Network, chat_body, expect_error};

impl Network {
    /// Asks with a service tier and a class, and returns the response and the class of the job.
    async fn ask(&self, tier: Option<&str>, class: Option<&str>) -> (reqwest::Response, Option<ServiceClass>) {
        let mut body = chat_body("hi");
        if let Some(tier) = tier {
            body["service_tier"] = json!(tier);
        }
        let mut request = self.post("/v1/chat/completions", &body);
        if let Some(class) = class {
            request = request.header("x-tether-class", class);
        }
        let response = request.send().await.expect("answered");
        (response, self.fake.jobs.lock().pop().map(|job| job.class))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_says_how_urgent_it_is_by_its_tier_or_by_a_header() {
    use ServiceClass::{Batch, Interactive, Standard};
    let network = Network::start().await;
    for (tier, class, expected, echoed) in [
        (None, None, Standard, json!(null)),
        (Some("auto"), None, Standard, json!("default")),
        (Some("flex"), None, Batch, json!("flex")),
        (Some("priority"), None, Interactive, json!("priority")),
        (None, Some("interactive"), Interactive, json!(null)),
        (Some("auto"), Some("batch"), Batch, json!("flex")),
    ] {
        let (response, sent) = network.ask(tier, class).await;
        assert_eq!(response.status(), 200);
        let body: Value = response.json().await.expect("JSON");
        assert_eq!((sent, &body["service_tier"]), (Some(expected), &echoed), "{tier:?} {class:?}");
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_and_contradicting_classes_are_refused() {
    let network = Network::start().await;
    let refused = |response| expect_error(response, 400, "invalid_value", Some("x-tether-class"));
    refused(network.ask(None, Some("urgent")).await.0).await;
    refused(network.ask(Some("flex"), Some("interactive")).await.0).await;
    expect_error(network.ask(Some("scale"), None).await.0, 400, "invalid_value", Some("service_tier")).await;
    let refused = network.post("/v1/chat/completions", &chat_body("refuse class_not_allowed")).send().await;
    expect_error(refused.expect("answered"), 403, "class_not_allowed", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_says_that_its_job_was_made_cheaper() {
    let network = Network::start().await;
    let whole = network.post("/v1/chat/completions", &chat_body("degraded")).send().await.expect("answered");
    assert_eq!(whole.headers()["x-tether-degraded"], "model=other@0.1; reason=queue");
    let body: Value = whole.json().await.expect("JSON");
    assert_eq!((&body["model"], &body["choices"][0]["message"]["content"]), (&json!("other"), &json!("short")));
    let mut streamed = chat_body("degraded");
    streamed["stream"] = json!(true);
    let request = network.request(Method::POST, "/v1/chat/completions").json(&streamed);
    let response = request.bearer_auth(super::fake::token(1)).send().await.expect("answered");
    assert_eq!(response.headers()["x-tether-degraded"], "model=other@0.1; reason=queue");
    let text = response.text().await.expect("text");
    let trailer = r#""tether":{"degraded":{"model":{"modelId":"other","version":"0.1"},"reason":"queue"}}"#;
    assert!(text.contains(trailer) && text.contains(r#""model":"other""#), "{text}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orchestrator_gets_the_files_of_the_models_to_which_a_policy_may_move_a_job() {
    let network = Network::start().await;
    let name = |name: &str| name.parse().expect("a name");
    let models = vec![name("other"), name("unlisted"), name("tiny")];
    let degrade = Some(DegradePolicy { models, ..DegradePolicy::default() });
    let allowed_models = Some(vec![name("tiny"), name("other"), name("unlisted")]);
    let policy = TenantPolicy { degrade, allowed_models, ..TenantPolicy::default() };
    network.fake.grants.lock().get_mut(&super::fake::token(1)).expect("a grant").policy = policy;
    network.ask(None, None).await;
    network.post("/v1/chat/completions", &chat_body("hi")).send().await.expect("answered");
    let sent = network.fake.jobs.lock().pop().expect("a job").digests;
    let sent: Vec<_> = sent.iter().map(|listed| (listed.key.to_string(), listed.digest)).collect();
    let listed = ["tiny@1.1", "other@0.1"].map(|key| (key.to_owned(), protocol::Digest::of(key.as_bytes())));
    assert_eq!(sent, listed);
    network.end().await;
}

//! The Responses API: what it answers, streams, stores and refuses.

use reqwest::Method;
use serde_json::{Value, json};

use crate::{Network, expect_error, fake};

const PATH: &str = "/v1/responses";

fn body(prompt: &str, change: Value) -> Value {
    let mut body = json!({"model": "tiny", "input": prompt});
    let Value::Object(change) = change else { panic!("an object") };
    body.as_object_mut().expect("an object").extend(change);
    body
}

impl Network {
    async fn respond(&self, prompt: &str, change: Value) -> Value {
        let response = self.post(PATH, &body(prompt, change)).send().await.expect("answered");
        assert_eq!(response.status(), 200);
        response.json().await.expect("JSON")
    }

    async fn stored(&self, method: Method, path: &str, key: u8) -> reqwest::Response {
        let request = self.request(method, &format!("{PATH}/{path}")).bearer_auth(fake::token(key));
        request.send().await.expect("answered")
    }
}

/// Returns the events of a stream, each with its name.
fn events(text: &str) -> Vec<Value> {
    let read = |event: &str| {
        let (name, data) = event.split_once("\ndata: ").expect("an event");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
        data
    };
    text.split_terminator("\n\n").map(read).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_is_answered_whole_with_its_headers() {
    let network = Network::start().await;
    let request = network.post(PATH, &body("hi", json!({"instructions": "be brief"})));
    let response = request.send().await.expect("answered");
    let headers = response.headers().clone();
    let whole: Value = response.json().await.expect("JSON");
    let job = network.fake.jobs.lock()[0].clone();
    assert_eq!(headers["x-request-id"], job.correlation_id.to_string().as_str());
    assert_eq!(headers["x-tether-model"], "tiny@1.1");
    assert_eq!(whole["id"], format!("resp_{}", job.correlation_id.0.simple()));
    assert_eq!((&whole["status"], &whole["model"]), (&json!("completed"), &json!("tiny")));
    assert_eq!(whole["output"][0]["content"][0]["text"], "Hello");
    assert_eq!(whole["usage"]["input_tokens"], 5);
    assert!(job.keeps_answer && job.note.is_some() && !job.detached, "it is stored");
    network.respond("hi", json!({"store": false})).await;
    let job = network.fake.jobs.lock()[1].clone();
    assert_eq!((job.keeps_answer, job.note, job.linger_ms), (false, None, None));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_numbered_events_and_no_done() {
    let network = Network::start().await;
    let response = network.post(PATH, &body("hi", json!({"stream": true}))).send().await.expect("answered");
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.expect("text");
    assert!(!text.contains("[DONE]"));
    let events = events(&text);
    let names: Vec<_> = events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(names, expected);
    assert!(events.iter().enumerate().all(|(number, event)| event["sequence_number"] == number));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_before_the_stream_have_a_status_and_later_ones_fail_the_response() {
    let network = Network::start().await;
    for (change, status, code, param) in [
        (json!({"model": "unknown"}), 404, "model_not_found", Some("model")),
        (json!({"conversation": "c"}), 400, "unsupported_parameter", Some("conversation")),
        (json!({"input": "refuse no_capacity", "stream": true}), 503, "no_capacity", None),
        (json!({"previous_response_id": "resp_1"}), 400, "invalid_value", Some("previous_response_id")),
    ] {
        let response = network.post(PATH, &body("hi", change)).send().await.expect("answered");
        expect_error(response, status, code, param).await;
    }
    let response = network.post(PATH, &body("break", json!({"stream": true}))).send().await.expect("answered");
    let events = events(&response.text().await.expect("text"));
    let last = events.last().expect("an event");
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_response_is_read_resumed_and_deleted_by_its_tenant_alone() {
    let network = Network::start().await;
    let created = network.respond("hi", json!({"metadata": {"a": "b"}})).await;
    let id = created["id"].as_str().expect("an id");
    let read: Value = network.stored(Method::GET, id, 1).await.json().await.expect("JSON");
    assert_eq!(
        (&read["id"], &read["metadata"], &read["output"]),
        (&created["id"], &json!({"a": "b"}), &created["output"])
    );
    let stream = async |after: u64| {
        let path = format!("{id}?stream=true&starting_after={after}");
        events(&network.stored(Method::GET, &path, 1).await.text().await.expect("text"))
    };
    let (all, rest) = (stream(0).await, stream(4).await);
    assert_eq!((rest[0]["sequence_number"].as_u64(), &all[4..]), (Some(5), &rest[..]));
    let items: Value = network.stored(Method::GET, &format!("{id}/input_items"), 1).await.json().await.expect("JSON");
    assert_eq!(items["data"][0]["content"], json!([{"type": "input_text", "text": "hi"}]));
    expect_error(network.stored(Method::GET, id, 2).await, 404, "not_found", None).await;
    expect_error(network.stored(Method::DELETE, id, 2).await, 404, "not_found", None).await;
    let cancelled = network.stored(Method::POST, &format!("{id}/cancel"), 1).await;
    expect_error(cancelled, 400, "invalid_value", None).await;
    let query = network.stored(Method::GET, &format!("{id}?starting_after=1"), 1).await;
    expect_error(query, 400, "invalid_value", Some("starting_after")).await;
    let deleted: Value = network.stored(Method::DELETE, id, 1).await.json().await.expect("JSON");
    assert_eq!(deleted, json!({"id": id, "object": "response", "deleted": true}));
    for method in [Method::GET, Method::DELETE] {
        expect_error(network.stored(method, id, 1).await, 404, "not_found", None).await;
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_goes_on_from_a_stored_response() {
    let network = Network::start().await;
    let first = network.respond("hi", json!({"instructions": "be brief"})).await;
    network.respond("go on", json!({"previous_response_id": first["id"], "instructions": "be kind"})).await;
    let job = network.fake.jobs.lock().last().cloned().expect("a job");
    let messages = job.input.messages.expect("messages");
    let read: Vec<_> = messages.iter().map(|message| (message.role.as_str(), &*message.content)).collect();
    assert_eq!(read, [("system", "be kind"), ("user", "hi"), ("assistant", "Hello"), ("user", "go on")]);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_of_a_stored_response_is_named_by_its_id() {
    let network = Network::start().await;
    let first = network.respond("hi", json!({})).await;
    let reference = json!({"type": "item_reference", "id": first["output"][0]["id"]});
    let user = |text: &str| json!({"role": "user", "content": text});
    network.respond("", json!({"input": [user("hi"), reference, user("go on")]})).await;
    let job = network.fake.jobs.lock().last().cloned().expect("a job");
    let messages = job.input.messages.expect("messages");
    let read: Vec<_> = messages.iter().map(|message| (message.role.as_str(), &*message.content)).collect();
    assert_eq!(read, [("user", "hi"), ("assistant", "Hello"), ("user", "go on")]);
    let kept: Value = serde_json::from_str(&job.note.expect("it is stored")).expect("JSON");
    assert_eq!(kept["items"][1]["type"], "message", "what is kept does not depend on the response before it");
    for (input, param) in [
        (json!([reference, reference]), "input[1].id"),
        (json!([{"type": "item_reference", "id": "msg_1"}]), "input[0].id"),
        (json!([{"type": "item_reference", "id": format!("msg_{:032}00", 7)}]), "input[0].id"),
    ] {
        let response = network.post(PATH, &body("", json!({"input": input}))).send().await.expect("answered");
        expect_error(response, 400, "invalid_value", Some(param)).await;
    }
    network.stored(Method::DELETE, first["id"].as_str().expect("an id"), 1).await;
    let gone = network.post(PATH, &body("", json!({"input": [user("hi"), reference]}))).send().await.expect("answered");
    expect_error(gone, 400, "invalid_value", Some("input[1].id")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_in_the_background_is_accepted_at_once_and_read_later() {
    let network = Network::start().await;
    let accepted = network.respond("hi", json!({"background": true})).await;
    let job = network.fake.jobs.lock().last().cloned().expect("a job");
    assert!(job.detached && job.keeps_answer);
    assert_eq!(accepted["background"], true);
    let refused = body("refuse invalid_value", json!({"background": true}));
    expect_error(network.post(PATH, &refused).send().await.expect("answered"), 400, "invalid_value", None).await;
    network.end().await;
}

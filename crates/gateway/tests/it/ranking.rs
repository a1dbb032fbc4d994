//! Ranked documents, and lists of tokens.

use protocol::infer::EmbedInput;
use serde_json::{Value, json};

use crate::{Network, expect_error};

async fn ask(network: &Network, path: &str, body: &Value) -> Value {
    let response = network.post(path, body).send().await.expect("answered");
    assert_eq!(response.status(), 200, "{path}");
    response.json().await.expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_ranked_under_each_path_that_clients_use() {
    let network = Network::start().await;
    let documents = json!(["scores", {"text": "b"}]);
    let body = json!({"model": "tiny", "query": "q", "documents": documents, "return_documents": true});
    let results = json!([
        {"index": 1, "relevance_score": 0.75, "document": {"text": "b"}},
        {"index": 0, "relevance_score": 0.25, "document": {"text": "scores"}},
    ]);
    for path in ["/v1/rerank", "/v2/rerank", "/rerank"] {
        let ranked = ask(&network, path, &body).await;
        assert_eq!((&ranked["results"], &ranked["model"]), (&results, &json!("tiny")));
        assert_eq!(ranked["usage"], json!({"prompt_tokens": 5, "total_tokens": 5}));
    }
    let job = network.fake.jobs.lock()[0].clone();
    let texts = ["scores", "b"].map(|text| EmbedInput::Text(text.into())).to_vec();
    assert_eq!((job.input.query.as_deref(), job.input.embed), (Some("q"), Some(texts)));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ranking_that_cannot_be_made_is_refused_and_vectors_are_none() {
    let network = Network::start().await;
    let body = |first: &str| json!({"model": "tiny", "query": "q", "documents": [first, "b"]});
    for (body, status, code, param) in [
        (json!({"model": "tiny", "query": "q"}), 400, "invalid_value", Some("documents")),
        (json!({"model": "absent", "query": "q", "documents": ["a"]}), 404, "model_not_found", Some("model")),
        (body("refuse unsupported_parameter"), 400, "unsupported_parameter", None),
        (body("vectors"), 500, "internal_error", None),
    ] {
        let response = network.post("/v1/rerank", &body).send().await.expect("answered");
        expect_error(response, status, code, param).await;
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_of_a_ranking_with_the_same_key_is_not_another_job() {
    let network = Network::start().await;
    let body = json!({"model": "tiny", "query": "q", "documents": ["scores", "b"]});
    let with_key = |body: &Value| network.post("/v1/rerank", body).header("idempotency-key", "once");
    assert_eq!(with_key(&body).send().await.expect("answered").status(), 200);
    let other = json!({"model": "tiny", "query": "other", "documents": ["scores", "b"]});
    with_key(&body).send().await.expect("answered");
    with_key(&other).send().await.expect("answered");
    let jobs = network.fake.jobs.lock().clone();
    assert_eq!(jobs[0].retry_token, jobs[1].retry_token);
    assert!(jobs[0].fingerprint == jobs[1].fingerprint && jobs[0].fingerprint != jobs[2].fingerprint);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_listed_as_vllm_and_llama_server_list_them() {
    let network = Network::start().await;
    let expected = json!({"tokens": [5, 6], "count": 2, "max_model_len": 2048});
    for path in ["/tokenize", "/v1/tokenize"] {
        assert_eq!(ask(&network, path, &json!({"model": "tiny", "prompt": "list"})).await, expected);
    }
    let pieces = ask(&network, "/tokenize", &json!({"model": "tiny", "content": "list", "with_pieces": true})).await;
    assert_eq!(pieces["tokens"], json!([{"id": 5, "piece": "Z"}, {"id": 6, "piece": [0xc3]}]));
    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "list"}]});
    assert_eq!(ask(&network, "/tokenize", &chat).await, expected);
    let job = network.fake.jobs.lock()[0].clone();
    assert!(job.input.count_only && job.input.list_tokens.is_some_and(|listing| listing.add_special));
    // An older worker counts and lists nothing.
    let counted = network.post("/tokenize", &json!({"model": "tiny", "prompt": "count"})).send().await;
    expect_error(counted.expect("answered"), 500, "internal_error", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_names_the_field_that_the_client_sent() {
    let network = Network::start().await;
    let long = "a".repeat(3 * 1024 * 1024);
    for (path, field, value) in [
        ("/detokenize", "tokens", json!(vec![1; 2049])),
        ("/tokenize", "content", json!(long)),
        ("/tokenize", "prompt", json!(long)),
    ] {
        let response = network.post(path, &json!({"model": "tiny", field: value})).send().await.expect("answered");
        expect_error(response, 400, "context_length_exceeded", Some(field)).await;
    }
    let body = json!({"model": "tiny", "query": long, "documents": ["a"]});
    let response = network.post("/v1/rerank", &body).send().await.expect("answered");
    expect_error(response, 400, "invalid_value", Some("query")).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_here_is_refused_by_name() {
    let network = Network::start().await;
    for path in ["/v1/moderations", "/v1/images/generations", "/v1/audio/transcriptions", "/v1/threads/t/runs"] {
        let response = network.post(path, &json!({})).send().await.expect("answered");
        let (status, body) = (response.status().as_u16(), response.json::<Value>().await.expect("JSON"));
        let message = body["error"]["message"].as_str().expect("a message");
        assert_eq!((status, &body["error"]["code"]), (404, &json!("not_found")));
        assert!(message.contains("is not supported here"), "{message}");
    }
    network.end().await;
}

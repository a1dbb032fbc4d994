use protocol::infer::EmbedInput;
use serde_json::{Value, json};

use crate::{Network, expect_error};

async fn ask(network: &Network, body: &Value) -> Value {
    let response = network.post("/v1/embeddings", body).send().await.expect("answered");
    assert_eq!(response.status(), 200);
    response.json().await.expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_have_the_shape_clients_expect() {
    let network = Network::start().await;
    let body = json!({"model": "tiny", "input": ["vectors", "b"]});
    let expected = json!({
        "object": "list", "model": "tiny",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.0, 0.5]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.5]},
        ],
        "usage": {"prompt_tokens": 5, "total_tokens": 5}
    });
    assert_eq!(ask(&network, &body).await, expected);
    let body = json!({"model": "tiny:pirate", "input": "vectors", "encoding_format": "base64", "dimensions": 2});
    assert_eq!(ask(&network, &body).await["data"][0]["embedding"], "AAAAAAAAAD8=");
    let job = network.fake.jobs.lock()[1].clone();
    assert_eq!(job.input.embed, Some(vec![EmbedInput::Text("vectors".into())]));
    assert_eq!((job.input.adapter.expect("named").as_str(), job.input.dimensions), ("pirate", Some(2)));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_vectors_fails_as_every_other_does() {
    let network = Network::start().await;
    for (input, status, code, param) in [
        (json!(""), 400, "invalid_value", Some("input")),
        (json!("refuse unsupported_parameter"), 400, "unsupported_parameter", None),
        (json!("refuse no_capacity"), 503, "no_capacity", None),
        (json!(["too few vectors", "b"]), 500, "internal_error", None),
    ] {
        let request = network.post("/v1/embeddings", &json!({"model": "tiny", "input": input}));
        expect_error(request.send().await.expect("answered"), status, code, param).await;
    }
    let unknown = network.post("/v1/embeddings", &json!({"model": "absent", "input": "x"}));
    expect_error(unknown.send().await.expect("answered"), 404, "model_not_found", Some("model")).await;
    let without_key = network.request(reqwest::Method::POST, "/v1/embeddings").json(&json!({}));
    expect_error(without_key.send().await.expect("answered"), 401, "invalid_api_key", None).await;
    network.end().await;
}

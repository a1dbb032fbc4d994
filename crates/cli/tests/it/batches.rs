//! Batches on a network of processes: from the upload to the results, while processes are killed.

#![cfg(feature = "llama")]

use std::collections::BTreeSet;
use std::time::Duration;

use protocol::jobs::JobList;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::time;

use crate::mesh::{LOOPBACK, Mesh, TIMEOUT};

/// A client of a batch, who knows no more than the API.
struct Client {
    url: String,
    key: String,
    http: reqwest::Client,
}

impl Client {
    fn of(mesh: &Mesh) -> Self {
        let key = mesh.processes.data("registry").api_key().expect("a key");
        let http = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { url: mesh.gateway.url().trim_end_matches('/').to_owned(), key, http }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key)
    }

    async fn json(&self, request: RequestBuilder) -> Value {
        let response = request.send().await.expect("answered");
        let (status, text) = (response.status(), response.text().await.expect("a body"));
        assert!(status.is_success(), "{status}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    async fn upload(&self, lines: &[Value]) -> Value {
        let file = lines.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
        let form = format!(
            "--edge\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
             --edge\r\nContent-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n{file}\r\n--edge--\r\n"
        );
        let request = self.request(Method::POST, "/v1/files").body(form);
        self.json(request.header("content-type", "multipart/form-data; boundary=edge")).await
    }

    async fn create(&self, lines: &[Value]) -> String {
        let file = self.upload(lines).await;
        let order = json!({
            "input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h",
            "metadata": {"run": "1"},
        });
        let batch = self.json(self.request(Method::POST, "/v1/batches").json(&order)).await;
        assert_eq!(batch["status"], "validating");
        batch["id"].as_str().expect("an id").to_owned()
    }

    /// Returns the batch once it is as `so` says. While the network is cut, it is not read.
    async fn until(&self, id: &str, so: impl Fn(&Value) -> bool) -> Value {
        let found = async {
            loop {
                let read = self.request(Method::GET, &format!("/v1/batches/{id}")).send().await;
                if let Ok(response) = read
                    && let Ok(batch) = response.json().await
                    && so(&batch)
                {
                    return batch;
                }
                // The limit of requests of a tenant holds for its questions, too.
                time::sleep(Duration::from_millis(250)).await;
            }
        };
        time::timeout(TIMEOUT * 2, found).await.expect("the batch goes on")
    }

    async fn lines(&self, file: &Value) -> Vec<Value> {
        let Some(id) = file.as_str() else { return vec![] };
        let read = self.request(Method::GET, &format!("/v1/files/{id}/content")).send().await.expect("answered");
        let text = read.text().await.expect("whole");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

fn line(number: usize, body: &Value) -> Value {
    json!({"custom_id": format!("line-{number}"), "method": "POST", "url": "/v1/chat/completions", "body": body})
}

fn question(number: usize) -> Value {
    let messages = json!([{"role": "user", "content": format!("Tell me about number {number}.")}]);
    json!({"model": "tether-tiny", "messages": messages, "max_tokens": 24, "ignore_eos": true})
}

fn completed(batch: &Value) -> u64 {
    batch["request_counts"]["completed"].as_u64().unwrap_or_default()
}

fn has_ended(batch: &Value) -> bool {
    ["completed", "failed", "expired", "cancelled"].iter().any(|status| batch["status"] == *status)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_goes_from_its_upload_to_its_results() {
    let mesh = Mesh::start(&["bootstrap-1"], &["worker-1"]).await;
    let client = Client::of(&mesh);
    let mut lines: Vec<Value> = (0..20).map(|number| line(number, &question(number))).collect();
    let refused = json!({"model": "tether-tiny", "messages": [], "max_tokens": 4});
    lines.push(line(20, &refused));
    let id = client.create(&lines).await;
    let batch = client.until(&id, has_ended).await;
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["request_counts"], json!({"total": 21, "completed": 20, "failed": 1}));
    let answers = client.lines(&batch["output_file_id"]).await;
    assert_eq!(answers.len(), 20);
    for answer in &answers {
        assert_eq!(answer["response"]["status_code"], 200);
        assert_eq!(answer["response"]["body"]["usage"]["completion_tokens"], 24, "{answer}");
    }
    let errors = client.lines(&batch["error_file_id"]).await;
    assert_eq!((&errors[0]["custom_id"], &errors[0]["response"]["status_code"]), (&json!("line-20"), &json!(400)));
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_line_of_a_batch_is_lost_or_billed_twice_whatever_is_killed() {
    const LINES: usize = 400;
    let mut mesh = Mesh::start(&["bootstrap-1"], &["worker-1"]).await;
    let client = Client::of(&mesh);
    let lines: Vec<Value> = (0..LINES).map(|number| line(number, &question(number))).collect();
    let id = client.create(&lines).await;

    client.until(&id, |batch| completed(batch) > 20).await;
    mesh.processes.kill("gateway").expect("killed");
    mesh.processes.start("gateway", &["gateway", "--listen", LOOPBACK, "--bind", LOOPBACK]).expect("started");
    mesh.find_gateway().await;
    let client = Client::of(&mesh);
    let before = completed(&client.until(&id, |batch| completed(batch) > 0).await);
    assert!((before as usize) < LINES, "the gateway was killed in the middle");

    // A fast machine may be at the end sooner.
    client.until(&id, |batch| completed(batch) > before + 20 || has_ended(batch)).await;
    mesh.processes.kill("orchestrator").expect("killed");
    mesh.processes.start("orchestrator", &["orchestrator", "--listen", LOOPBACK]).expect("started");
    client.until(&id, |batch| completed(batch) > before + 30 || has_ended(batch)).await;

    mesh.processes.kill("worker-1").expect("killed");
    mesh.processes.start("worker-1", &["worker", "--listen", LOOPBACK]).expect("started");
    let batch = client.until(&id, has_ended).await;
    assert_eq!(batch["request_counts"], json!({"total": LINES, "completed": LINES, "failed": 0}), "{batch}");
    let answers = client.lines(&batch["output_file_id"]).await;
    let ids: BTreeSet<&str> = answers.iter().map(|answer| answer["custom_id"].as_str().expect("an id")).collect();
    assert_eq!((answers.len(), ids.len()), (LINES, LINES));
    assert_eq!(billed(&mesh).await, shown(&answers));
    mesh.end().await;
}

/// Returns the tokens of all answers in a file.
fn shown(answers: &[Value]) -> u64 {
    let of = |answer: &Value| answer["response"]["body"]["usage"]["total_tokens"].as_u64().expect("usage");
    answers.iter().map(of).sum()
}

/// Returns the tokens that were billed, of all jobs.
async fn billed(mesh: &Mesh) -> u64 {
    let (mut tokens, mut before) = (0, String::new());
    loop {
        let page: JobList = mesh.gateway.get(&format!("/admin/v1/jobs?limit=500{before}")).await.expect("jobs");
        tokens += page.jobs.iter().filter_map(|job| Some(u64::from(job.usage?.total_tokens()))).sum::<u64>();
        match page.next {
            Some(next) => before = format!("&after={next}"),
            None => return tokens,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_batch_keeps_the_answers_that_it_has() {
    let mesh = Mesh::start(&["bootstrap-1"], &["worker-1"]).await;
    let client = Client::of(&mesh);
    let lines: Vec<Value> = (0..2_000).map(|number| line(number, &question(number))).collect();
    let id = client.create(&lines).await;
    client.until(&id, |batch| completed(batch) > 5).await;
    let cancelled = client.json(client.request(Method::POST, &format!("/v1/batches/{id}/cancel"))).await;
    assert_eq!(cancelled["status"], "cancelling");
    let batch = client.until(&id, has_ended).await;
    assert_eq!(batch["status"], "cancelled");
    let answers = client.lines(&batch["output_file_id"]).await;
    assert_eq!(answers.len() as u64, completed(&batch));
    assert!(answers.len() < lines.len());
    assert_eq!(batch["request_counts"]["failed"], 0, "{batch}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_file_fails_its_batch_with_the_numbers_of_its_lines() {
    let mesh = Mesh::start(&["bootstrap-1"], &["worker-1"]).await;
    let client = Client::of(&mesh);
    let mut lines = vec![line(0, &question(0)), line(0, &question(0)), line(2, &question(2))];
    lines[2]["method"] = json!("GET");
    let id = client.create(&lines).await;
    let batch = client.until(&id, has_ended).await;
    assert_eq!(batch["status"], "failed");
    let errors = batch["errors"]["data"].as_array().expect("errors");
    let told: Vec<_> = errors.iter().map(|error| (error["line"].as_u64(), error["code"].as_str())).collect();
    assert_eq!(told, [(Some(2), Some("duplicate_custom_id")), (Some(3), Some("invalid_method"))]);
    mesh.end().await;
}

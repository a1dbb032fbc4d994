//! `tether up --adopt`, where the server comes later.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::program::{Home, wait_for};

/// A server that answers one request a connection, until the test's process ends.
#[derive(Clone)]
struct Fake {
    /// What it says where.
    pages: Arc<Mutex<BTreeMap<String, String>>>,
    /// What its answers say.
    says: &'static str,
}

impl Fake {
    /// A server of vLLM's kind with a model.
    fn vllm(model: &str, says: &'static str) -> Self {
        let fake = Self { pages: Arc::default(), says };
        fake.lists(&[model]);
        fake
    }

    /// A server of Ollama's kind with a model that calls no tools.
    fn ollama(model: &str, says: &'static str) -> Self {
        let fake = Self { pages: Arc::default(), says };
        fake.page("/v1/models", &json!({"data": [{"id": model, "owned_by": "library"}]}));
        fake.page("/api/tags", &json!({"models": [{"name": model, "details": {"family": "llama"}}]}));
        let info = json!({"llama.context_length": 512});
        fake.page("/api/show", &json!({"capabilities": ["completion"], "model_info": info}));
        fake
    }

    fn page(&self, path: &str, body: &Value) {
        self.pages.lock().insert(path.to_owned(), body.to_string());
    }

    /// Has a server of vLLM's kind list these models.
    fn lists(&self, models: &[&str]) {
        let listed = models.iter().map(|model| json!({"id": model, "owned_by": "vllm", "max_model_len": 2048}));
        self.page("/v1/models", &json!({"data": listed.collect::<Vec<_>>()}));
    }

    /// Serves at an address.
    fn serve(&self, address: SocketAddr) {
        let listener = TcpListener::bind(address).expect("the port is free again");
        let fake = self.clone();
        thread::spawn(move || listener.incoming().flatten().for_each(|stream| fake.answer(stream)));
    }

    fn answer(&self, mut stream: TcpStream) {
        let mut request = String::new();
        let mut piece = [0; 4_096];
        // What is sent to it ends with a brace, or is a head without a body.
        while !(request.ends_with('}') || (request.starts_with("GET") && request.ends_with("\r\n\r\n"))) {
            match stream.read(&mut piece) {
                Ok(length) if length > 0 => request.push_str(&String::from_utf8_lossy(&piece[..length])),
                _ => return,
            }
        }
        let path = request.split(' ').nth(1).unwrap_or_default();
        let page = self.pages.lock().get(path).cloned();
        let (status, body) = match (path, page) {
            (_, Some(page)) => (200, page),
            ("/v1/chat/completions", None) if request.contains(&format!("{} cannot", self.says)) => {
                (400, json!({"error": {"message": "not this", "param": "messages"}}).to_string())
            }
            ("/v1/chat/completions", None) => (200, self.generation()),
            _ => (404, "{}".to_owned()),
        };
        let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        // A client that left needs no answer.
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
    }

    fn generation(&self) -> String {
        let events = [
            json!({"choices": [{"index": 0, "delta": {"content": self.says}}]}),
            json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
            json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
        ];
        let events = events.map(|event| format!("data: {event}\n\n")).concat();
        format!("{events}data: [DONE]\n\n")
    }
}

/// Returns an address where nobody listens.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound")
}

#[cfg(feature = "llama")]
#[test]
fn a_network_stands_at_once_and_adopts_a_server_that_comes_later() {
    let home = Home::new();
    let free = free_address();
    // Returns once the gateway answers and the shipped model is ready.
    let up = home.up_with(&["--adopt", &format!("http://{free}")], &[]);
    let absent = home.run(&["run", "late", "Well?"]);
    assert_eq!(absent.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("there is no model"));
    Fake::vllm("Org/Late", "better late").serve(free);
    wait_for("the server to be adopted", || home.well(&["list"]).contains("late"));
    wait_for("its model to be ready", || home.well(&["nodes"]).contains("late@1.0 ready"));
    assert_eq!(home.well(&["run", "late", "Well?"]).trim(), "better late");
    assert!(home.well(&["run", "tether-tiny", "What is 3 + 4?", "--temperature", "0"]).contains('7'));
    assert_eq!(up.end(), Some(0));
}

/// Two servers of different kinds have the same model under names that make one name of the network.
#[cfg(feature = "llama")]
#[tokio::test(flavor = "multi_thread")]
async fn two_servers_of_different_kinds_answer_under_one_name() {
    let (first, second) = (free_address(), free_address());
    let (vllm, ollama) = (Fake::vllm("Org/Twin", "vllm"), Fake::ollama("twin:latest", "ollama"));
    vllm.serve(first);
    ollama.serve(second);
    let home = Home::new();
    let up = home.up_with(&["--adopt", &format!("http://{first},http://{second}")], &[]);
    // The name is one of theirs already, so the second has its server's kind behind it.
    wait_for("both models", || home.well(&["nodes"]).contains("twin-ollama@1.0 ready"));
    home.well(&["model", "alias", "twin", "twin", "twin-ollama"]);
    let listed = || {
        let list = home.json(&["model", "list", "--json"]);
        list["data"].as_array().expect("rows").iter().find(|row| row["id"] == "twin").cloned()
    };
    let is_shared = |row: Value| row["alternatives"] == json!(["twin-ollama"]) && row["replicas"] == 2;
    wait_for("the name to be theirs", || listed().is_some_and(is_shared));
    let ask = async |text: &str, more: Value| {
        let mut body = json!({"model": "twin", "messages": [{"role": "user", "content": text}]});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let answer = reqwest::Client::new()
            .post(format!("{}/v1/chat/completions", up.url))
            .bearer_auth(&up.key)
            .json(&body)
            .send()
            .await
            .expect("answered");
        let model = answer.headers().get("x-tether-model").map(|model| model.to_str().expect("text").to_owned());
        let body: Value = answer.json().await.expect("JSON");
        (model.unwrap_or_default(), body["choices"][0]["message"]["content"].clone(), body["error"]["code"].clone())
    };
    let (by_vllm, by_ollama) = (("twin@1.0", json!("vllm")), ("twin-ollama@1.0", json!("ollama")));
    let is = |answer: &(String, Value, Value), expected: &(&str, Value)| {
        assert_eq!((answer.0.as_str(), &answer.1), (expected.0, &expected.1), "{answer:?}");
    };
    // What one refuses the other answers, whichever was asked first.
    is(&ask("vllm cannot", json!({})).await, &by_ollama);
    is(&ask("ollama cannot", json!({})).await, &by_vllm);
    let (_, _, code) = ask("vllm cannot, and ollama cannot", json!({})).await;
    assert_eq!(code, "unsupported_parameter", "none is left");
    // What is known beforehand is not tried: Ollama says that its model calls no tools, and has little context.
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for _ in 0..4 {
        is(&ask("hi", json!({"tools": tools})).await, &by_vllm);
        is(&ask("hi", json!({"max_tokens": 1_000})).await, &by_vllm);
    }
    // One is gone, and the name goes on with the other; a model that comes later is taken up.
    vllm.lists(&["Org/Newcomer"]);
    wait_for("the newcomer", || home.well(&["nodes"]).contains("newcomer@1.0 ready"));
    wait_for("the twin to leave", || !home.well(&["nodes"]).contains("twin@1.0"));
    is(&ask("hi", json!({})).await, &by_ollama);
    assert_eq!(up.end(), Some(0));
}

#[test]
fn a_network_that_waits_for_a_server_can_be_stopped_and_says_what_it_waits_for() {
    let home = Home::new();
    let free = free_address();
    let log = std::fs::File::create(home.path().join("out")).expect("a file");
    let mut up = home
        .command(&["up", "--bind", "127.0.0.1:0", "--workers", "0", "--adopt", &format!("http://{free}")])
        .stdout(log)
        .spawn()
        .expect("the program starts");
    let output = || std::fs::read_to_string(home.path().join("out")).unwrap_or_default();
    wait_for("the banner", || output().contains("Ctrl-C stops it"));
    assert!(output().contains(&format!("No server to adopt answers yet at http://{free}")), "{}", output());
    crate::program::signal(up.id(), rustix::process::Signal::TERM);
    assert!(up.wait().expect("ended").success());
}

//! A gateway over real HTTP, before a registry and an orchestrator that do as the prompt says.

mod addresses;
mod answers;
mod classes;
mod connections;
mod discovery;
mod embeddings;
mod fake;
mod framing;
mod membership;
mod messages;
mod ollama;
mod ranking;
mod refusals;
mod repeats;
mod responses;
mod rpc_clients;
mod surface;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use observability::Exposition;
use observability::metrics::register_shed;
use prometheus_client::registry::Registry;
use protocol::control::NodeRole;
use protocol::signature::NodeKey;
use reqwest::{Method, RequestBuilder, Response};
use rpc::{Membership, MemoryNetwork, SystemClock};
use serde_json::{Value, json};
use tether_gateway::{Config, Gateway, GatewayParts};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use fake::Fake;

/// A running gateway with its peers.
struct Network {
    address: SocketAddr,
    /// The address for Ollama's clients, if it has one.
    ollama: Option<SocketAddr>,
    fake: Fake,
    gateway: Gateway,
    metrics: Exposition,
    client: reqwest::Client,
    stop: CancellationToken,
    /// Stops the gateway alone.
    gateway_stop: CancellationToken,
    tasks: TaskTracker,
}

/// The configuration of tests: any port, and short timeouts.
fn config() -> Config {
    Config {
        bind: ([127, 0, 0, 1], 0).into(),
        header_timeout_secs: 1,
        body_idle_secs: 1,
        drain_secs: 1,
        request_deadline_secs: 20,
        ..Config::default()
    }
}

impl Network {
    async fn start() -> Self {
        Self::start_with(config()).await
    }

    async fn start_with(config: Config) -> Self {
        Self::start_as(config, Membership::unchecked(), |_, _| Membership::unchecked()).await
    }

    /// Starts a gateway with a membership, and peers with theirs.
    async fn start_as(
        config: Config,
        membership: Membership,
        admit: impl Fn(&NodeKey, NodeRole) -> Membership,
    ) -> Self {
        Self::start_all(config, membership, None, admit).await
    }

    /// Starts a gateway whose machine has an API key of its own.
    async fn start_with_key_file(config: Config, file: PathBuf) -> Self {
        Self::start_all(config, Membership::unchecked(), Some(file), |_, _| Membership::unchecked()).await
    }

    async fn start_all(
        config: Config,
        membership: Membership,
        api_key_file: Option<PathBuf>,
        admit: impl Fn(&NodeKey, NodeRole) -> Membership,
    ) -> Self {
        let network = MemoryNetwork::new();
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let fake = Fake::start_as(&network, &tasks, &stop, admit).await;
        let (metrics, exposition) = metrics();
        let parts = GatewayParts {
            transport: network.node(&NodeKey::from_seed(&[9; 32])),
            clock: Arc::new(SystemClock),
            membership,
            metrics,
            exposition: exposition.clone(),
            folder_secret: None,
            api_key_file,
            version: "1.2.3".into(),
        };
        let gateway = Gateway::new(config, parts);
        let bridge = gateway.clone().bind().await.expect("a free port");
        let (address, ollama) = (bridge.address(), bridge.ollama_address());
        let gateway_stop = stop.child_token();
        let running = gateway_stop.clone();
        tasks.spawn(async move { bridge.run(running).await.expect("runs until it is stopped") });
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { address, ollama, fake, gateway, metrics: exposition, client, stop, gateway_stop, tasks }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("http://{}{path}", self.address))
    }

    async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).bearer_auth(fake::token(1)).send().await.expect("answered")
    }

    fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.request(Method::POST, path).bearer_auth(fake::token(1)).json(body)
    }

    /// Sends a chat request with a prompt that tells the fake orchestrator what to do.
    async fn chat(&self, prompt: &str) -> Response {
        self.post("/v1/chat/completions", &chat_body(prompt)).send().await.expect("answered")
    }

    async fn chat_streamed(&self, prompt: &str) -> Response {
        let mut body = chat_body(prompt);
        body["stream"] = json!(true);
        self.post("/v1/chat/completions", &body).send().await.expect("answered")
    }

    /// Stops everything and waits for it.
    async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        tokio::time::timeout(Duration::from_secs(10), self.tasks.wait()).await.expect("every task ends");
    }
}

fn chat_body(prompt: &str) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": prompt}]})
}

/// Checks status, code and param of an error, and returns its headers.
#[track_caller]
fn expect_error(
    response: Response,
    status: u16,
    code: &str,
    param: Option<&str>,
) -> impl Future<Output = reqwest::header::HeaderMap> {
    let caller = std::panic::Location::caller();
    let (code, param) = (code.to_owned(), param.map(str::to_owned));
    async move {
        let (got, headers) = (response.status().as_u16(), response.headers().clone());
        let body: Value = response.json().await.expect("an error is JSON");
        assert_eq!(got, status, "{caller}: {body}");
        assert_eq!(body["error"]["code"], code.as_str(), "{caller}: {body}");
        assert_eq!(body["error"]["param"], json!(param), "{caller}: {body}");
        assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string(), "{caller}: {body}");
        headers
    }
}

/// Returns a gateway's metrics, and what exposes them.
fn metrics() -> (tether_gateway::Metrics, Exposition) {
    let mut registry = Registry::default();
    let shed = register_shed(&mut registry);
    let metrics = tether_gateway::Metrics::register(&mut registry, shed);
    (metrics, Exposition::new(registry))
}

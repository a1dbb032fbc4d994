//! Servers and clients of either world, asked in the same words.

use std::net::SocketAddrV4;
use std::time::Duration;

use serde_json::{Value, json};

use crate::failure::Failure;
use crate::node::Node;
use crate::rust::{RustClient, RustServer};

/// Which code a peer runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum World {
    Node,
    Rust,
}

/// A server with the methods of `rpc-server.js`.
pub(crate) enum Server {
    Node(Node),
    Rust(RustServer),
}

/// A client, and the connections that it holds by name.
pub(crate) enum Client {
    Node(Node),
    Rust(RustClient),
}

/// Where a server is, and who it is.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) key: [u8; 32],
    /// The node that is asked first. The server itself, or a proxy before it, makes the handshake direct.
    pub(crate) relay: Option<SocketAddrV4>,
}

impl Target {
    fn json(&self) -> Value {
        json!({ "to": hex::encode(self.key), "relay": self.relay })
    }
}

pub(crate) fn bytes_of(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap_or_default()).expect("hexadecimal")
}

pub(crate) fn key_of(text: &str) -> [u8; 32] {
    hex::decode(text).expect("hexadecimal").try_into().expect("32 bytes")
}

impl Server {
    /// Starts a server that listens on the DHT; `seed` makes its key.
    pub(crate) async fn start(world: World, bootstrap: &[String], seed: u8) -> Self {
        Self::start_behind(false, world, bootstrap, seed).await
    }

    /// Starts one that may be behind a firewall, as far as it knows.
    pub(crate) async fn start_behind(firewalled: bool, world: World, bootstrap: &[String], seed: u8) -> Self {
        match world {
            World::Node => {
                let options =
                    json!({ "bootstrap": bootstrap, "seed": hex::encode([seed; 32]), "firewalled": firewalled });
                Self::Node(Node::start("rpc-server.js", options).await)
            }
            World::Rust => Self::Rust(RustServer::start(bootstrap, [seed; 32], firewalled).await),
        }
    }

    /// Found by its key alone.
    pub(crate) fn target(&self) -> Target {
        let key = match self {
            Self::Node(node) => key_of(node.ready("key")),
            Self::Rust(server) => server.key(),
        };
        Target { key, relay: None }
    }

    pub(crate) fn address(&self) -> SocketAddrV4 {
        match self {
            Self::Node(node) => node.ready("address").parse().expect("an address"),
            Self::Rust(server) => server.address(),
        }
    }

    /// The events that came in since the last call.
    pub(crate) async fn events(&self) -> Vec<Vec<u8>> {
        match self {
            Self::Node(node) => {
                node.done("events", json!({})).await.as_array().expect("a list").iter().map(bytes_of).collect()
            }
            Self::Rust(server) => server.events(),
        }
    }

    /// Asks every client that is connected.
    pub(crate) async fn ask(&self, method: &str, value: &[u8]) -> Vec<Vec<u8>> {
        match self {
            Self::Node(node) => {
                let answers = node.done("ask", json!({ "method": method, "value": hex::encode(value) })).await;
                answers.as_array().expect("a list").iter().map(bytes_of).collect()
            }
            Self::Rust(server) => server.ask(method, value).await,
        }
    }

    /// Closes the listener and listens again with the same key.
    pub(crate) async fn listen_again(&self) {
        match self {
            Self::Node(node) => drop(node.done("listen_again", json!({})).await),
            Self::Rust(server) => server.listen_again().await,
        }
    }

    /// Ends every connection at once.
    pub(crate) async fn drop_connections(&self) {
        match self {
            Self::Node(node) => drop(node.done("drop_connections", json!({})).await),
            Self::Rust(server) => server.drop_connections(),
        }
    }

    /// How many connections are open, and how many there ever were.
    pub(crate) async fn connections(&self) -> (u64, u64) {
        match self {
            Self::Node(node) => {
                let counts = node.done("connections", json!({})).await;
                (counts["open"].as_u64().expect("a number"), counts["opened"].as_u64().expect("a number"))
            }
            Self::Rust(server) => server.connections(),
        }
    }

    pub(crate) async fn stop(self) {
        match self {
            Self::Node(node) => drop(node),
            Self::Rust(server) => server.stop().await,
        }
    }
}

impl Client {
    pub(crate) async fn start(world: World, bootstrap: &[String], seed: u8) -> Self {
        Self::start_behind(false, world, bootstrap, seed).await
    }

    /// Starts one that may be behind a firewall, as far as it knows.
    pub(crate) async fn start_behind(firewalled: bool, world: World, bootstrap: &[String], seed: u8) -> Self {
        match world {
            World::Node => {
                let options =
                    json!({ "bootstrap": bootstrap, "seed": hex::encode([seed; 32]), "firewalled": firewalled });
                Self::Node(Node::start("rpc-client.js", options).await)
            }
            World::Rust => Self::Rust(RustClient::start(bootstrap, [seed; 32], firewalled).await),
        }
    }

    pub(crate) async fn connect(&self, name: &str, target: &Target) -> Result<(), Failure> {
        match self {
            Self::Node(node) => {
                let mut call = target.json();
                call["name"] = json!(name);
                node.call("connect", call).await.map(drop)
            }
            Self::Rust(client) => client.connect(name, target).await,
        }
    }

    pub(crate) async fn request(&self, name: &str, method: &str, value: &[u8]) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Node(node) => {
                let call = json!({ "name": name, "method": method, "value": hex::encode(value) });
                node.call("request", call).await.map(|value| bytes_of(&value))
            }
            Self::Rust(client) => client.request(name, method, value).await,
        }
    }

    /// Sends patterned bytes and gets their hash back.
    pub(crate) async fn hash_of_pattern(&self, name: &str, length: usize) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Node(node) => {
                let answer = node.call("hash_pattern", json!({ "name": name, "length": length })).await?;
                Ok(bytes_of(&answer))
            }
            Self::Rust(client) => client.hash_of_pattern(name, length).await,
        }
    }

    /// Gets patterned bytes; says whether they are the right ones.
    pub(crate) async fn fetch_pattern(&self, name: &str, length: usize) -> Result<bool, Failure> {
        match self {
            Self::Node(node) => {
                let answer = node.call("fetch_pattern", json!({ "name": name, "length": length })).await?;
                Ok(answer["same"] == true)
            }
            Self::Rust(client) => client.fetch_pattern(name, length).await,
        }
    }

    /// Sends several requests in one batch; says whether all were answered rightly.
    pub(crate) async fn batch(&self, name: &str, count: usize) -> Result<bool, Failure> {
        match self {
            Self::Node(node) => Ok(node.call("batch", json!({ "name": name, "count": count })).await? == true),
            Self::Rust(client) => client.batch(name, count).await,
        }
    }

    /// Sends requests without waiting for answers in between.
    pub(crate) async fn concurrent(&self, name: &str, count: usize, value: &[u8]) -> Result<usize, Failure> {
        match self {
            Self::Node(node) => {
                let call = json!({ "name": name, "count": count, "method": "echo", "value": hex::encode(value) });
                Ok(node.call("concurrent", call).await?.as_u64().expect("a number") as usize)
            }
            Self::Rust(client) => client.concurrent(name, count, value).await,
        }
    }

    pub(crate) async fn event(&self, name: &str, value: &[u8]) -> Result<(), Failure> {
        match self {
            Self::Node(node) => {
                node.call("event", json!({ "name": name, "value": hex::encode(value) })).await.map(drop)
            }
            Self::Rust(client) => client.event(name, value).await,
        }
    }

    /// Connects, asks and leaves, many times; returns what went wrong.
    pub(crate) async fn visit(&self, target: &Target, times: usize, parallel: usize) -> Vec<String> {
        match self {
            Self::Node(node) => {
                let mut call = target.json();
                call["times"] = json!(times);
                call["parallel"] = json!(parallel);
                serde_json::from_value(node.done("many", call).await).expect("a list of texts")
            }
            Self::Rust(client) => client.visit(target, times, parallel).await,
        }
    }

    pub(crate) async fn is_open(&self, name: &str) -> bool {
        match self {
            Self::Node(node) => node.done("is_open", json!({ "name": name })).await == true,
            Self::Rust(client) => client.is_open(name),
        }
    }

    pub(crate) async fn disconnect(&self, name: &str) {
        match self {
            Self::Node(node) => drop(node.done("disconnect", json!({ "name": name })).await),
            Self::Rust(client) => client.disconnect(name).await,
        }
    }
}

/// What any node of the DHT can be asked to do.
pub(crate) trait Records {
    fn node(&self) -> Option<&Node>;
    fn rust(&self) -> Option<&crate::rust::RustNode>;

    async fn announce(&self, topic: [u8; 32]) {
        match (self.node(), self.rust()) {
            (Some(node), _) => drop(node.done("announce", json!({ "topic": hex::encode(topic) })).await),
            (_, Some(rust)) => rust.announce(topic).await,
            _ => unreachable!("one of both"),
        }
    }

    async fn unannounce(&self, topic: [u8; 32]) {
        match (self.node(), self.rust()) {
            (Some(node), _) => drop(node.done("unannounce", json!({ "topic": hex::encode(topic) })).await),
            (_, Some(rust)) => rust.unannounce(topic).await,
            _ => unreachable!("one of both"),
        }
    }

    /// The keys that are announced, in order.
    async fn lookup(&self, topic: [u8; 32]) -> Vec<[u8; 32]> {
        match (self.node(), self.rust()) {
            (Some(node), _) => {
                let keys = node.done("lookup", json!({ "topic": hex::encode(topic) })).await;
                keys.as_array().expect("a list").iter().map(|key| key_of(key.as_str().expect("a text"))).collect()
            }
            (_, Some(rust)) => rust.lookup(topic).await,
            _ => unreachable!("one of both"),
        }
    }

    async fn immutable_put(&self, value: &[u8]) -> [u8; 32] {
        match (self.node(), self.rust()) {
            (Some(node), _) => {
                let hash = node.done("immutable_put", json!({ "value": hex::encode(value) })).await;
                key_of(hash.as_str().expect("a text"))
            }
            (_, Some(rust)) => rust.immutable_put(value).await,
            _ => unreachable!("one of both"),
        }
    }

    async fn immutable_get(&self, hash: [u8; 32]) -> Option<Vec<u8>> {
        match (self.node(), self.rust()) {
            (Some(node), _) => {
                let value = node.done("immutable_get", json!({ "hash": hex::encode(hash) })).await;
                value.as_str().map(|text| hex::decode(text).expect("hexadecimal"))
            }
            (_, Some(rust)) => rust.immutable_get(hash).await,
            _ => unreachable!("one of both"),
        }
    }

    /// Puts a value under the peer's own key, which is returned.
    async fn mutable_put(&self, value: &[u8], seq: u64) -> Result<[u8; 32], Failure> {
        match (self.node(), self.rust()) {
            (Some(node), _) => {
                let key = node.call("mutable_put", json!({ "value": hex::encode(value), "seq": seq })).await?;
                Ok(key_of(key.as_str().expect("a text")))
            }
            (_, Some(rust)) => rust.mutable_put(value, seq).await,
            _ => unreachable!("one of both"),
        }
    }

    async fn mutable_get(&self, key: [u8; 32], seq: u64) -> Option<(u64, Vec<u8>)> {
        match (self.node(), self.rust()) {
            (Some(node), _) => {
                let found = node.done("mutable_get", json!({ "key": hex::encode(key), "seq": seq })).await;
                found.is_object().then(|| (found["seq"].as_u64().expect("a number"), bytes_of(&found["value"])))
            }
            (_, Some(rust)) => rust.mutable_get(key, seq).await,
            _ => unreachable!("one of both"),
        }
    }
}

impl Records for Server {
    fn node(&self) -> Option<&Node> {
        if let Self::Node(node) = self { Some(node) } else { None }
    }
    fn rust(&self) -> Option<&crate::rust::RustNode> {
        if let Self::Rust(server) = self { Some(server.node()) } else { None }
    }
}

impl Records for Client {
    fn node(&self) -> Option<&Node> {
        if let Self::Node(node) = self { Some(node) } else { None }
    }
    fn rust(&self) -> Option<&crate::rust::RustNode> {
        if let Self::Rust(client) = self { Some(client.node()) } else { None }
    }
}

/// Waits until something holds, and fails after a while.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..200 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what}: not within ten seconds");
}

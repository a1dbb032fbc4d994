//! A DHT to meet on: of Node peers, of Rust ones, or of both.

use serde_json::json;

use crate::node::Node;
use crate::rust::RustNode;

/// Who its persistent nodes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Node,
    Rust,
    Mixed,
}

/// Its nodes live as long as this.
pub(crate) struct Net {
    bootstrap: Vec<String>,
    node: Option<Node>,
    rust: Vec<RustNode>,
}

impl Net {
    pub(crate) async fn start(kind: Kind) -> Self {
        let mut net = Self { bootstrap: Vec::new(), node: None, rust: Vec::new() };
        match kind {
            Kind::Node => net.add_node(4).await,
            Kind::Rust => net.add_rust(4).await,
            Kind::Mixed => {
                net.add_node(2).await;
                net.add_rust(2).await;
            }
        }
        net
    }

    /// Where a peer joins: two addresses, so that one may fail.
    pub(crate) fn bootstrap(&self) -> Vec<String> {
        self.bootstrap.clone()
    }

    async fn add_node(&mut self, count: usize) {
        let node = Node::start("testnet.js", json!({ "nodes": count, "bootstrap": self.bootstrap })).await;
        self.bootstrap.extend(node.ready_list("nodes"));
        self.node = Some(node);
    }

    async fn add_rust(&mut self, count: usize) {
        for _ in 0..count {
            let node = RustNode::persistent(&self.bootstrap).await;
            self.bootstrap.push(node.address().to_string());
            self.rust.push(node);
        }
    }

    /// Ends the node that the others joined through, without a word to anybody.
    pub(crate) async fn kill_first(&mut self) {
        match &self.node {
            Some(node) => drop(node.done("kill", json!({ "index": 0 })).await),
            None => self.rust.remove(0).stop().await,
        }
    }
}

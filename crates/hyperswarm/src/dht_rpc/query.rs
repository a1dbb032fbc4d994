//! A walk through the DHT, as a stream of replies.

use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use super::DhtReply;
use super::message::{FIND_NODE, Id};
use super::node::{Node, Steps};
use super::routing_table::K;
use super::state::{Outbound, Step, Waiter};
use super::walk::{Progress, Walk};

/// A query to the nodes closest to a target.
#[derive(Debug, Clone)]
pub struct Query {
    /// The target of the walk.
    pub target: Id,
    /// The command.
    pub command: u64,
    /// The value to send with the command.
    pub value: Option<Bytes>,
    /// Nodes to start from.
    pub nodes: Vec<SocketAddrV4>,
    pub(super) internal: bool,
    pub(super) in_background: bool,
}

impl Query {
    /// Makes a query with a command of the layer above.
    pub fn new(target: Id, command: u64) -> Self {
        Self { target, command, value: None, nodes: Vec::new(), internal: false, in_background: false }
    }

    /// Starts from these nodes, such as those that were closest to the target some minutes ago.
    pub fn starting_at(self, nodes: Vec<SocketAddrV4>) -> Self {
        Self { nodes, ..self }
    }

    /// Sends a value with the command.
    pub fn with_value(self, value: Bytes) -> Self {
        Self { value: Some(value), ..self }
    }

    /// Makes a query that only asks for closer nodes.
    pub fn find_node(target: Id) -> Self {
        Self { internal: true, ..Self::new(target, FIND_NODE) }
    }
}

/// The replies of a query as they arrive. Requests are sent only while a caller waits for the next reply.
pub struct QueryStream {
    node: Arc<Node>,
    query: Query,
    walk: Walk,
    // Bounded by the walk: it visits a limited number of nodes, and each can miss a limited number of copies.
    heard: Steps,
    replies: VecDeque<DhtReply>,
    is_done: bool,
}

impl QueryStream {
    pub(super) fn new(node: Arc<Node>, query: Query) -> Self {
        let concurrency = node.concurrency(query.in_background);
        let mut walk = Walk::new(query.target, node.with(|state| state.id()), concurrency, query.nodes.len() >= K);
        query.nodes.iter().for_each(|address| walk.add(*address));
        if walk.pending() < K {
            add_known(&node, &mut walk, &query.target);
        }
        Self { heard: Steps::of(&node), node, query, walk, replies: VecDeque::new(), is_done: false }
    }

    /// Waits for the next reply that is not an error. Returns `None` when the walk is over. Cancel safe.
    pub async fn next(&mut self) -> Option<DhtReply> {
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return Some(reply);
            }
            if self.is_done || !self.ask() {
                return None;
            }
            let step = self.heard.steps.recv().await?;
            self.take(step);
            while let Ok(step) = self.heard.steps.try_recv() {
                self.take(step);
            }
        }
    }

    /// Completes the walk, and returns the closest nodes that responded, closest first: at most 20.
    pub async fn closest(mut self) -> Vec<DhtReply> {
        while self.next().await.is_some() {}
        self.walk.into_closest()
    }

    /// Returns the closest nodes that responded so far, closest first.
    pub fn into_closest(self) -> Vec<DhtReply> {
        self.walk.into_closest()
    }

    /// Sends the requests that are due. Returns whether the walk goes on.
    fn ask(&mut self) -> bool {
        let now = Instant::now();
        let Self { node, query, walk, heard, .. } = self;
        loop {
            let hints = walk.take_hints();
            node.with(|state| {
                if query.in_background {
                    walk.set_concurrency(node.concurrency(!state.is_quiet()));
                }
                state.hint(hints, now);
                while let Some(to) = walk.next() {
                    let is_suspect = state.failed_lately(to, now);
                    let outbound = Outbound {
                        to,
                        internal: query.internal,
                        command: query.command,
                        target: Some(query.target),
                        token: None,
                        value: query.value.as_deref(),
                        via: None,
                        retries: is_suspect.then_some(0),
                        timeout: None,
                        waiter: Waiter::Walk(heard.walk),
                    };
                    if state.request(outbound, now).is_err() {
                        walk.skipped(to);
                    } else if is_suspect {
                        walk.suspect(to);
                    }
                }
            });
            match walk.progress() {
                Progress::Waiting => return true,
                Progress::NeedsNodes => {
                    walk.widen();
                    add_known(node, walk, &query.target);
                }
                Progress::Done => {
                    self.is_done = true;
                    return false;
                }
            }
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Late(node) => self.walk.late(node),
            Step::Failed(node) => self.walk.failed(node),
            Step::Answered(node, reply) => {
                self.walk.answered(node, &reply);
                if reply.error == 0 {
                    self.replies.push_back(reply);
                }
            }
        }
    }
}

/// Adds the closest nodes of the routing table, and the entry nodes if there are too few.
fn add_known(node: &Arc<Node>, walk: &mut Walk, target: &Id) {
    node.with(|state| {
        let closest: Vec<_> = state.table.closest(target, K).into_iter().map(|node| node.address).collect();
        for address in closest {
            walk.add(address);
        }
        if walk.pending() < K {
            for address in state.entry_nodes() {
                walk.add(address);
            }
        }
    });
}

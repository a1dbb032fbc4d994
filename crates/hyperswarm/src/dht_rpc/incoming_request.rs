//! A request of another node, and the ways to answer it.

use std::net::SocketAddrV4;
use std::sync::Arc;

use bytes::Bytes;

use super::message::{Id, Request, Token};
use super::node::Node;
use super::state::{Answer, Via};
use crate::udx::Socket;

/// A request of another node that the table leaves to the [`Handler`](super::Handler). It may go without an answer.
#[derive(Clone)]
pub struct DhtRequest {
    /// What to do.
    pub command: u64,
    /// What it is about.
    pub target: Option<Id>,
    /// The token that came with it. It is one that this node gave to this host not long ago.
    pub token: Option<Token>,
    /// The rest, as the command wants it.
    pub value: Option<Bytes>,
    /// Where the datagram came from.
    pub from: SocketAddrV4,
    /// The sender's id, where it is a lasting part of the table.
    pub from_id: Option<Id>,
    /// This node's address as the sender sees it.
    pub to: SocketAddrV4,
    /// The number under which the sender expects the answer.
    pub tid: u16,
    /// This node's id, where it is a lasting part of the table.
    pub local_id: Option<Id>,
    /// The socket that it arrived at.
    pub socket: Socket,
    pub(super) via: Via,
    pub(super) node: Arc<Node>,
}

/// How an answer differs from a plain one, which goes back where the request came from.
#[derive(Clone, Default)]
pub struct ReplyOptions {
    /// Whom to answer instead of the sender.
    pub to: Option<SocketAddrV4>,
    /// The socket to answer from instead of the one that the request came to.
    pub socket: Option<Socket>,
    /// Whether the answer has no token.
    pub without_token: bool,
    /// Whether the answer names no closer nodes.
    pub without_closer_nodes: bool,
}

impl ReplyOptions {
    /// Neither token nor closer nodes.
    pub fn bare() -> Self {
        Self { without_token: true, without_closer_nodes: true, ..Self::default() }
    }
}

impl DhtRequest {
    /// Answers with a value, a token and closer nodes.
    pub fn reply(&self, value: Option<&[u8]>) {
        self.reply_with(value, &ReplyOptions::default());
    }

    /// Answers with a value.
    pub fn reply_with(&self, value: Option<&[u8]>, options: &ReplyOptions) {
        let answer =
            Answer { error: 0, value, token: !options.without_token, closer_nodes: !options.without_closer_nodes };
        self.answer(options, answer);
    }

    /// Refuses, and names closer nodes.
    pub fn error(&self, code: u64) {
        let answer = Answer { error: code, value: None, token: false, closer_nodes: true };
        self.answer(&ReplyOptions::default(), answer);
    }

    /// Sends the request on to another node with this value, under the same number, command and target.
    pub fn relay(&self, value: &[u8], to: SocketAddrV4) {
        self.forward(&self.via, value, to);
    }

    /// Does the same as [`relay`](Self::relay) from another socket.
    pub fn relay_via(&self, socket: &Socket, value: &[u8], to: SocketAddrV4) {
        self.forward(&self.node.via_of(socket), value, to);
    }

    fn answer(&self, options: &ReplyOptions, answer: Answer<'_>) {
        let other = options.socket.as_ref().map(|socket| self.node.via_of(socket));
        let via = other.as_ref().unwrap_or(&self.via);
        let to = options.to.unwrap_or(self.from);
        self.node.with(|state| state.answer(via, to, self.tid, self.target, answer));
    }

    fn forward(&self, via: &Via, value: &[u8], to: SocketAddrV4) {
        let request = Request {
            tid: self.tid,
            to,
            id: None,
            token: None,
            internal: false,
            command: self.command,
            target: self.target,
            value: Some(value),
        };
        self.node.with(|state| state.forward(via, request));
    }
}

impl std::fmt::Debug for DhtRequest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("DhtRequest")
            .field("command", &self.command)
            .field("from", &self.from)
            .field("tid", &self.tid)
            .finish_non_exhaustive()
    }
}

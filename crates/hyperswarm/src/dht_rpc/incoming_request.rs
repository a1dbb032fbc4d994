//! A request from another node, and the ways to respond to it.

use std::net::SocketAddrV4;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use super::message::{Id, Request, Token};
use super::node::Node;
use super::state::{Answer, Via};
use crate::udx::Socket;

/// A request from another node that goes to the [`Handler`](super::Handler). It need not get a response.
#[derive(Clone)]
pub struct DhtRequest {
    /// The command.
    pub command: u64,
    /// What the command is about.
    pub target: Option<Id>,
    /// The request's token, if it has one. This node issued it to the same host recently.
    pub token: Option<Token>,
    /// The value, in the command's format.
    pub value: Option<Bytes>,
    /// The source address of the datagram.
    pub from: SocketAddrV4,
    /// The sender's id, if the sender is persistent.
    pub from_id: Option<Id>,
    /// This node's address as the sender sees it.
    pub to: SocketAddrV4,
    /// The sender's transaction id, which the response must repeat.
    pub tid: u16,
    /// This node's id, if this node is persistent.
    pub local_id: Option<Id>,
    /// The socket at which the request arrived.
    pub socket: Socket,
    pub(super) via: Via,
    pub(super) node: Arc<Node>,
}

/// Options of a response. By default it goes back to the sender.
#[derive(Clone, Default)]
pub struct ReplyOptions {
    /// The address to respond to instead of the sender.
    pub to: Option<SocketAddrV4>,
    /// The socket to respond from instead of the one at which the request arrived.
    pub socket: Option<Socket>,
    /// Whether to omit the token.
    pub without_token: bool,
    /// Whether to omit closer nodes.
    pub without_closer_nodes: bool,
}

impl ReplyOptions {
    /// Returns options that omit both token and closer nodes.
    pub fn bare() -> Self {
        Self { without_token: true, without_closer_nodes: true, ..Self::default() }
    }
}

impl DhtRequest {
    /// Responds with a value, a token and closer nodes.
    pub fn reply(&self, value: Option<&[u8]>) {
        self.reply_with(value, &ReplyOptions::default());
    }

    /// Responds with a value and options.
    pub fn reply_with(&self, value: Option<&[u8]>, options: &ReplyOptions) {
        let (token, closer_nodes) = (!options.without_token, !options.without_closer_nodes);
        self.answer(options, Answer { value, token, closer_nodes, ..Answer::default() });
    }

    /// Responds with an error code and closer nodes.
    pub fn error(&self, code: u64) {
        self.answer(&ReplyOptions::default(), Answer { error: code, closer_nodes: true, ..Answer::default() });
    }

    /// Forwards the request to another node with this value, under the same transaction id, command and target.
    pub fn relay(&self, value: &[u8], to: SocketAddrV4) {
        self.forward(&self.via, value, to);
    }

    /// Like [`relay`](Self::relay), from another socket.
    pub fn relay_via(&self, socket: &Socket, value: &[u8], to: SocketAddrV4) {
        self.forward(&self.node.via_of(socket), value, to);
    }

    fn answer(&self, options: &ReplyOptions, answer: Answer<'_>) {
        let other = options.socket.as_ref().map(|socket| self.node.via_of(socket));
        let via = other.as_ref().unwrap_or(&self.via);
        let to = options.to.unwrap_or(self.from);
        let is_verified = self.token.is_some() && to.ip() == self.from.ip();
        let answer = Answer { is_verified, ..answer };
        self.node.with(|state| state.answer(via, to, self.tid, self.target, answer, Instant::now()));
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

//! What carries calls between nodes: the seam between the services and the network.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use protocol::{PublicKey, Topic, WireError};

pub mod hyperswarm;
pub mod memory;

/// A node's end of the network. Its public key is its address.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Returns this node's key.
    fn public_key(&self) -> PublicKey;

    /// Opens a connection to a peer. [`crate::Client`] shares it among calls.
    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError>;

    /// Returns the next connection that a peer opened, or `None` once the node is closed.
    async fn accept(&self) -> Option<Arc<dyn Connection>>;

    /// Makes this node findable under a topic until [`Transport::unannounce`] or the end of the node.
    async fn announce(&self, topic: &Topic) -> Result<(), TransportError>;

    /// Takes this node off a topic.
    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError>;

    /// Returns peers that announce a topic, in no order and perhaps not all of them.
    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError>;

    /// Returns peers that an earlier run of this node reached. They may be where no lookup finds them any more.
    fn remembered(&self) -> Vec<PublicKey> {
        vec![]
    }
}

/// One authenticated, encrypted connection between two nodes. One that is dropped closes once nothing is under way on
/// it.
#[async_trait]
pub trait Connection: Send + Sync + 'static {
    /// Returns the key of the node at the other end.
    fn remote_key(&self) -> PublicKey;

    /// Sends a request and waits for its reply. Callers bring the deadline.
    ///
    /// Where the connection has room the request is on its way when the future was polled once, ahead of whatever is
    /// sent later, so that an introduction comes first without anybody waiting for its reply.
    async fn request(&self, method: &str, body: Bytes) -> Result<Bytes, RequestError>;

    /// Opens a channel for one stream.
    async fn open_channel(&self) -> Result<Box<dyn Channel>, TransportError>;

    /// Returns the next request or channel that the peer opened, in the order in which it did, or `None` once the
    /// connection is closed. A network may carry none on a connection that this node opened. One reader at a time.
    async fn next(&self) -> Option<Incoming>;

    /// Returns whether the connection is closed.
    fn is_closed(&self) -> bool;

    /// Closes the connection: what is under way on it fails at both ends.
    fn close(&self);
}

/// An ordered, reliable pipe of messages, bounded in both directions. Dropping it closes it.
#[async_trait]
pub trait Channel: fmt::Debug + Send + Sync + 'static {
    /// Sends a message, waiting for room. Returns false where the peer is gone. Cancel safe: a message is sent whole
    /// or not at all.
    async fn send(&self, message: Bytes) -> bool;

    /// Sends a message. Returns false if the queue is full or the peer is gone.
    fn try_send(&self, message: Bytes) -> bool;

    /// Returns the next message, or `None` where the peer is gone. Cancel safe. One reader at a time.
    async fn receive(&self) -> Option<Bytes>;

    /// Returns the next message where one is there.
    fn try_receive(&self) -> Option<Bytes>;
}

/// What a peer opened.
pub enum Incoming {
    /// A unary call.
    Request {
        /// The method's name.
        method: String,
        /// Its argument, a JSON value.
        body: Bytes,
        /// Takes the reply.
        reply: Box<dyn Reply>,
    },
    /// A stream.
    Channel(Box<dyn Channel>),
}

/// Takes the reply to a request. Dropping it tells the peer that the call failed.
#[async_trait]
pub trait Reply: Send + 'static {
    /// Sends the reply. A caller that is gone needs none.
    fn send(self: Box<Self>, answer: Result<Bytes, WireError>);

    /// Waits until the caller is gone, as far as the network tells: at the latest when the connection closes. Cancel
    /// safe.
    async fn closed(&mut self);
}

/// Why the network did not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// Nobody answers under this key.
    #[error("peer {} does not answer", peer.short())]
    Unreachable {
        /// The key.
        peer: PublicKey,
    },
    /// The connection or the node is closed.
    #[error("the connection is closed")]
    Closed,
}

/// Why a request has no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The peer replied with an error.
    #[error(transparent)]
    Remote(#[from] WireError),
    /// The connection closed first.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

//! The transport that carries calls between nodes. It separates the services from the network.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use protocol::{PublicKey, Topic, WireError};

pub mod hyperswarm;
pub mod memory;

/// A node's interface to the network. Its public key is its address.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Returns this node's public key.
    fn public_key(&self) -> PublicKey;

    /// Opens a connection to a peer. [`crate::Client`] shares it among calls.
    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError>;

    /// Returns the next connection that a peer opened, or `None` once the transport is closed.
    async fn accept(&self) -> Option<Arc<dyn Connection>>;

    /// Announces this node under a topic until [`Transport::unannounce`] or until the transport is closed.
    async fn announce(&self, topic: &Topic) -> Result<(), TransportError>;

    /// Removes this node's announcement from a topic.
    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError>;

    /// Returns peers that announce a topic, unordered and possibly incomplete.
    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError>;

    /// Returns peers that an earlier run of this node reached. Some may no longer be found by a lookup.
    fn remembered(&self) -> Vec<PublicKey> {
        vec![]
    }
}

/// An authenticated, encrypted connection between two nodes. After it is dropped, it closes once no request or channel
/// is active on it.
#[async_trait]
pub trait Connection: Send + Sync + 'static {
    /// Returns the public key of the node at the other end.
    fn remote_key(&self) -> PublicKey;

    /// Returns a secret that only the two ends of this connection know. It binds introductions to the connection.
    fn secret(&self) -> [u8; 32];

    /// Sends a request and waits for its reply. The caller sets the deadline.
    ///
    /// If the send queue has space, the request is sent when the future is first polled, before anything sent later. So
    /// an introduction arrives first, without anyone waiting for its reply.
    async fn request(&self, method: &str, body: Bytes) -> Result<Bytes, RequestError>;

    /// Opens a channel for one stream.
    async fn open_channel(&self) -> Result<Box<dyn Channel>, TransportError>;

    /// Returns the next request or channel that the peer opened, in order, or `None` once the connection is closed. A
    /// transport may deliver none on a connection that this node opened. Only one task may read at a time.
    async fn next(&self) -> Option<Incoming>;

    /// Sets how long a request of a peer may be that has not proven that it is a member. A transport without memory
    /// limits need not do anything.
    fn allow_requests(&self, _bytes_max: usize) {}

    /// Lifts the limits for peers that have not proven that they are members. A transport without such limits need not
    /// do anything.
    fn trust(&self) {}

    /// Returns whether the connection is closed.
    fn is_closed(&self) -> bool;

    /// Returns whether the connection closed because the peer's process has ended, as far as the transport can tell.
    fn has_peer_ended(&self) -> bool {
        false
    }

    /// Closes the connection. Everything active on it fails at both ends.
    fn close(&self);
}

/// An ordered, reliable message channel, bounded in both directions. Dropping it closes it.
#[async_trait]
pub trait Channel: fmt::Debug + Send + Sync + 'static {
    /// Sends a message, waiting for space in the queue. Returns `false` if the peer is gone. Cancel safe: a message is
    /// sent completely or not at all.
    async fn send(&self, message: Bytes) -> bool;

    /// Sends a message without waiting. Returns `false` if the queue is full or the peer is gone.
    fn try_send(&self, message: Bytes) -> bool;

    /// Returns the next message, or `None` if the peer is gone. Cancel safe. Only one task may read at a time.
    async fn receive(&self) -> Option<Bytes>;

    /// Returns the next message if one has arrived.
    fn try_receive(&self) -> Option<Bytes>;
}

/// A request or channel that the peer opened.
pub enum Incoming {
    /// A unary call.
    Request {
        /// The method's name.
        method: String,
        /// The argument, a JSON value.
        body: Bytes,
        /// Sends the reply.
        reply: Box<dyn Reply>,
    },
    /// A stream.
    Channel(Box<dyn Channel>),
}

/// Sends the reply to a request. Dropping it tells the peer that the call failed.
#[async_trait]
pub trait Reply: Send + 'static {
    /// Sends the reply. If the caller is gone, it is discarded.
    fn send(self: Box<Self>, response: Result<Bytes, WireError>);

    /// Waits until the caller is gone, as far as the transport can tell: at the latest when the connection closes.
    /// Cancel safe.
    async fn closed(&mut self);
}

/// Why a transport operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// No peer responds under this key.
    #[error("peer {} does not answer", peer.short())]
    Unreachable {
        /// The peer's key.
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

//! Calls to peers. The client opens one connection per peer, by public key, and shares it among all calls.
//!
//! A node with a [`Membership`] introduces itself first on each connection, and again when its certificate changes.
//! Calls do not wait for the introduction: they follow it on the same connection.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use protocol::codec::{self, DecodeError, MESSAGE_BYTES_MAX};
use protocol::control::{Empty, NODE_PING};
use protocol::{ErrorCode, PublicKey, WireError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use self::introduction::introduce;
use self::links::{Link, Links};
use crate::membership::Membership;
use crate::transport::{RequestError, Transport, TransportError};

mod introduction;
mod links;
mod pauses;
mod response_stream;

pub use response_stream::{REQUEST_BYTES_PER_SEC, ResponseStream, StreamOptions};

/// The timeout of opening a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Makes calls. Clones share their connections.
#[derive(Clone)]
pub struct Client {
    links: Arc<Links>,
    membership: Membership,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The peer responded with an error.
    #[error(transparent)]
    Remote(#[from] WireError),
    /// No peer responds under this key.
    #[error("peer {} does not answer", peer.short())]
    Unreachable {
        /// The peer's key.
        peer: PublicKey,
    },
    /// The peer did not accept the stream in time.
    #[error("the call was not acknowledged in time")]
    NotAccepted,
    /// The deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// No message arrived within the stall time.
    #[error("the peer fell silent")]
    Stalled,
    /// The connection closed before the answer was complete.
    #[error("the connection closed")]
    Closed,
    /// The connection closed because the peer's process has ended.
    #[error("its process has ended: its port is closed")]
    PeerEnded,
    /// The peer sent something invalid.
    #[error("the peer broke the protocol")]
    Garbled,
    /// The peer's reply could not be decoded.
    #[error("the peer's reply could not be read: {0}")]
    BadReply(#[from] DecodeError),
    /// The request exceeds the size limit and was not sent.
    #[error("the request has {bytes} bytes, more than 16 MiB")]
    TooLarge {
        /// The length of the request.
        bytes: usize,
    },
}

impl From<CallError> for WireError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Remote(error) => error,
            CallError::Deadline => Self::new(ErrorCode::DeadlineExceeded, "the deadline passed"),
            CallError::TooLarge { .. } => Self::new(ErrorCode::RequestTooLarge, error.to_string()),
            // These messages name no peer, because clients may see them.
            CallError::Unreachable { .. }
            | CallError::NotAccepted
            | CallError::Stalled
            | CallError::Closed
            | CallError::PeerEnded => {
                Self::new(ErrorCode::Unavailable, "a part of the network does not answer, try again")
            }
            CallError::Garbled | CallError::BadReply(_) => {
                Self::new(ErrorCode::InternalError, "a part of the network sent an invalid answer")
            }
        }
    }
}

impl Client {
    /// Makes a client of a node.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self::connecting_within(transport, CONNECT_WITHIN)
    }

    /// Makes a client with this timeout for opening a connection.
    pub fn connecting_within(transport: Arc<dyn Transport>, connect_within: Duration) -> Self {
        Self { links: Arc::new(Links::new(transport, connect_within)), membership: Membership::unchecked() }
    }

    /// Introduces the node to its peers as a member of the pool.
    #[must_use]
    pub fn with_membership(mut self, membership: Membership) -> Self {
        self.membership = membership;
        self
    }

    /// Returns the pool membership as this client's node knows it.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// Returns the public key of the client's node.
    pub fn public_key(&self) -> PublicKey {
        self.links.public_key()
    }

    /// Waits until a peer and this node have introduced themselves, for at most `deadline`. After that,
    /// [`Client::membership`] knows the peer's permissions.
    pub async fn meet(&self, peer: PublicKey, deadline: Duration) -> Result<(), CallError> {
        let meeting = async {
            let link = self.linked(peer).await?;
            if !self.membership.is_checked() {
                return Ok(());
            }
            link.introduction.wait_for_response().await;
            if self.membership.standing(peer).is_err() {
                // The certificate that the peer showed has expired since, or the peer had none to show then.
                link.introduction.repeat();
                introduce(&link, &self.membership, &self.links);
                link.introduction.wait_for_response().await;
            }
            Ok(())
        };
        time::timeout(deadline, meeting).await.map_err(|_| CallError::Deadline)?
    }

    /// Calls a method and waits for its reply, for at most `deadline`, which includes opening a connection.
    pub async fn call<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        peer: PublicKey,
        method: &str,
        request: &Request,
        deadline: Duration,
    ) -> Result<Reply, CallError> {
        let body = Bytes::from(codec::encode(request));
        if body.len() > MESSAGE_BYTES_MAX {
            return Err(CallError::TooLarge { bytes: body.len() });
        }
        let until = Instant::now() + deadline;
        let link = self.link(peer, until).await?;
        match time::timeout_at(until, link.connection().request(method, body)).await {
            Ok(Ok(reply)) => Ok(codec::decode(&reply)?),
            Ok(Err(RequestError::Remote(error))) => {
                if error.code == ErrorCode::NotEnrolled {
                    // The peer may have forgotten this node, or the clocks differed. The next call shows the
                    // certificate again.
                    link.introduction.repeat();
                }
                Err(CallError::Remote(error))
            }
            Ok(Err(RequestError::Transport(error))) => Err(error.into()),
            Err(_) => {
                link.suspicion().raise();
                Err(CallError::Deadline)
            }
        }
    }

    /// Opens a stream and waits until the peer accepts it. If a connection has to be opened first, that does not count
    /// towards `accept_within`, only towards the deadline.
    pub async fn open_stream(
        &self,
        peer: PublicKey,
        method: &str,
        body: Bytes,
        mut options: StreamOptions,
    ) -> Result<ResponseStream, CallError> {
        let begun = Instant::now();
        let link = match options.deadline {
            Some(deadline) => self.link(peer, begun + deadline).await?,
            None => self.linked(peer).await?,
        };
        options.deadline = options.deadline.map(|deadline| deadline.saturating_sub(begun.elapsed()));
        if options.deadline.is_some_and(|left| left.is_zero()) {
            return Err(CallError::Deadline);
        }
        let accept_until = Instant::now() + options.accept_within;
        let opened = match time::timeout_at(accept_until, link.connection().open_channel()).await {
            Ok(Ok(channel)) => {
                options.accept_within = accept_until.saturating_duration_since(Instant::now());
                ResponseStream::open(channel, method, body, options, link.clone()).await
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(CallError::NotAccepted),
        };
        if matches!(opened, Err(CallError::NotAccepted)) {
            link.suspicion().raise();
        }
        opened
    }

    /// Opens a connection to a peer unless one is open, so that the next call does not wait for it.
    pub async fn connect(&self, peer: PublicKey) -> Result<(), CallError> {
        self.linked(peer).await.map(drop)
    }

    /// Pings a peer, on a new connection if it no longer responds on the present one. Returns when the connection on
    /// which it responds was opened.
    pub async fn check(&self, peer: PublicKey, deadline: Duration) -> Result<Instant, CallError> {
        let until = Instant::now() + deadline;
        let link = self.link(peer, until).await?;
        let ping = link.connection().request(NODE_PING, Bytes::from(codec::encode(&Empty {})));
        match time::timeout_at(until, ping).await {
            Ok(Ok(_) | Err(RequestError::Remote(_))) => Ok(link.opened_at()),
            Ok(Err(RequestError::Transport(error))) => Err(error.into()),
            Err(_) => {
                link.suspicion().raise();
                Err(CallError::Deadline)
            }
        }
    }

    /// Makes the next call to each peer ping it first, each time this process did not run for a while: its peers may
    /// have given up its connections. Runs until `stop`.
    pub async fn watch_for_pauses(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.links.watch_for_pauses()).await;
        self.links.watch_no_more();
    }

    /// Clears the backoff of a peer that has shown a sign of life, so that the next call dials it at once.
    pub fn forgive(&self, peer: PublicKey) {
        self.links.forgive(peer);
    }

    /// Closes the connection to a peer, if there is one.
    pub fn disconnect(&self, peer: PublicKey) {
        self.links.disconnect(peer);
    }

    /// Closes the connections to revoked peers.
    pub fn disconnect_revoked(&self) {
        for peer in self.membership.revoked() {
            self.links.disconnect(peer);
        }
    }

    async fn link(&self, peer: PublicKey, until: Instant) -> Result<Arc<Link>, CallError> {
        time::timeout_at(until, self.linked(peer)).await.map_err(|_| CallError::Deadline)?
    }

    /// Returns a connection to a peer on which this node has introduced itself.
    async fn linked(&self, peer: PublicKey) -> Result<Arc<Link>, CallError> {
        if self.membership.is_revoked(peer) {
            return Err(CallError::Unreachable { peer });
        }
        let link = self.links.get(peer).await?;
        introduce(&link, &self.membership, &self.links);
        Ok(link)
    }
}

impl From<TransportError> for CallError {
    fn from(error: TransportError) -> Self {
        match error {
            TransportError::Unreachable { peer } => Self::Unreachable { peer },
            TransportError::Closed => Self::Closed,
        }
    }
}

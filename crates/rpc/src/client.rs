//! Calls to peers. Connections are opened by public key, one a peer, and shared.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use protocol::codec::{self, DecodeError, MESSAGE_BYTES_MAX};
use protocol::{ErrorCode, PublicKey, WireError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::OnceCell;

use crate::stream::{AnswerStream, StreamOptions};
use crate::transport::{Connection, RequestError, Transport, TransportError};

/// Makes calls. Clones share their connections.
#[derive(Clone)]
pub struct Client {
    transport: Arc<dyn Transport>,
    connections: Arc<Mutex<HashMap<PublicKey, Slot>>>,
}

/// One peer's connection, opened by the first call that needs it while the others wait.
type Slot = Arc<OnceCell<Arc<dyn Connection>>>;

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The peer answered with an error.
    #[error(transparent)]
    Remote(#[from] WireError),
    /// Nobody answers under this key.
    #[error("peer {} does not answer", peer.short())]
    Unreachable {
        /// The key.
        peer: PublicKey,
    },
    /// The peer did not accept the stream in time.
    #[error("the call was not acknowledged in time")]
    NotAccepted,
    /// The deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// No message came for too long.
    #[error("the peer fell silent")]
    Stalled,
    /// The connection closed before the answer was complete.
    #[error("the connection closed")]
    Closed,
    /// The peer sent what makes no sense.
    #[error("the peer broke the protocol")]
    Garbled,
    /// The peer's reply could not be read.
    #[error("the peer's reply could not be read: {0}")]
    BadReply(#[from] DecodeError),
    /// The request is over the limit and was not sent.
    #[error("the request has {bytes} bytes, more than 16 MiB")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
}

impl From<CallError> for WireError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Remote(error) => error,
            CallError::Deadline => Self::new(ErrorCode::DeadlineExceeded, "the deadline passed"),
            CallError::TooLarge { .. } => Self::new(ErrorCode::RequestTooLarge, error.to_string()),
            // Messages of these name no peer: they may reach clients.
            CallError::Unreachable { .. } | CallError::NotAccepted | CallError::Stalled | CallError::Closed => {
                Self::new(ErrorCode::Unavailable, "a part of the network does not answer, try again")
            }
            CallError::Garbled | CallError::BadReply(_) => {
                Self::new(ErrorCode::InternalError, "a part of the network answered nonsense")
            }
        }
    }
}

impl Client {
    /// Makes a client of a node.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self { transport, connections: Arc::default() }
    }

    /// Calls a method and waits for its reply, at most `deadline`.
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
        let reply = async {
            let connection = self.connection(peer).await?;
            connection.request(method, body).await.map_err(|error| match error {
                RequestError::Remote(error) => CallError::Remote(error),
                RequestError::Transport(error) => self.lost(peer, &error),
            })
        };
        let reply = tokio::time::timeout(deadline, reply).await.map_err(|_| CallError::Deadline)??;
        Ok(codec::decode(&reply)?)
    }

    /// Opens a stream and waits until the peer accepts it.
    pub async fn open_stream(
        &self,
        peer: PublicKey,
        method: &str,
        body: Bytes,
        options: StreamOptions,
    ) -> Result<AnswerStream, CallError> {
        let channel = async {
            let connection = self.connection(peer).await?;
            connection.open_channel().await.map_err(|error| self.lost(peer, &error))
        };
        let channel =
            tokio::time::timeout(options.accept_within, channel).await.map_err(|_| CallError::NotAccepted)??;
        AnswerStream::open(channel, method, body, options).await
    }

    async fn connection(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, CallError> {
        let slot = {
            let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
            let slot = connections.entry(peer).or_default();
            if slot.get().is_some_and(|connection| connection.is_closed()) {
                *slot = Slot::default();
            }
            slot.clone()
        };
        let opened = slot.get_or_try_init(|| self.transport.connect(peer)).await;
        opened.cloned().map_err(|error| self.lost(peer, &error))
    }

    /// Forgets a peer's connection, so that the next call opens a new one.
    fn lost(&self, peer: PublicKey, error: &TransportError) -> CallError {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = connections.get(&peer)
            && slot.get().is_none_or(|connection| connection.is_closed())
        {
            connections.remove(&peer);
        }
        match error {
            TransportError::Unreachable { peer } => CallError::Unreachable { peer: *peer },
            TransportError::Closed => CallError::Closed,
        }
    }
}

//! Channels that the peer opened and that this side may accept.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};

use super::channel::{Channel, Link, Outlet};
use super::inbox::{Inbox, Queue};
use super::state::{Ask, Key, Refusal};
use super::{ChannelOptions, Handle, fits};

/// Why a channel could not be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AcceptError {
    /// The peer closed the channel, this side opened it already, or the connection is closed.
    #[error("the channel is gone")]
    Gone,
    /// The maximum number of channels is open.
    #[error("too many channels are open")]
    TooMany,
    /// The handshake does not fit in a message.
    #[error("the handshake is too long")]
    TooLong,
}

/// Accepts the channels of a protocol that the peer opens. Once it is dropped, they are rejected again.
pub struct Pairing {
    handle: Arc<Handle>,
    key: Key,
    sender: mpsc::Sender<Incoming>,
    incoming: Mutex<mpsc::Receiver<Incoming>>,
}

impl Pairing {
    pub(super) fn new(handle: Arc<Handle>, protocol: &str, id: Option<&[u8]>) -> Self {
        let (sender, incoming) = mpsc::channel(handle.shared.options.incoming_max.max(1));
        let key = Key { protocol: protocol.to_owned(), id: id.unwrap_or_default().to_owned() };
        handle.shared.pairings().insert(key.clone(), sender.clone());
        Self { handle, key, sender, incoming: Mutex::new(incoming) }
    }

    /// Returns the next channel that the peer opened, or `None` when the connection is closed. Cancel safe.
    pub async fn next(&self) -> Option<Incoming> {
        let mut incoming = self.incoming.lock().await;
        // Channels that have arrived already come first.
        if let Ok(next) = incoming.try_recv() {
            return Some(next);
        }
        self.handle.shared.stop.run_until_cancelled(incoming.recv()).await.flatten()
    }
}

impl Drop for Pairing {
    fn drop(&mut self) {
        let mut pairings = self.handle.shared.pairings();
        if pairings.get(&self.key).is_some_and(|sender| sender.same_channel(&self.sender)) {
            pairings.remove(&self.key);
        }
    }
}

impl fmt::Debug for Pairing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Pairing").field("protocol", &self.key.protocol).finish_non_exhaustive()
    }
}

/// A channel that the peer opened. Dropping it rejects the channel.
pub struct Incoming {
    handle: Arc<Handle>,
    ask: Ask,
}

impl Incoming {
    pub(super) fn new(handle: Arc<Handle>, ask: Ask) -> Self {
        Self { handle, ask }
    }

    /// Returns the channel's protocol.
    pub fn protocol(&self) -> &str {
        &self.ask.key.protocol
    }

    /// Returns the channel's id, which is empty if it has none.
    pub fn id(&self) -> &[u8] {
        &self.ask.key.id
    }

    /// Returns the peer's handshake.
    pub fn handshake(&self) -> &Bytes {
        &self.ask.handshake
    }

    /// Opens this side of the channel.
    pub fn accept(self, options: ChannelOptions) -> Result<Channel, AcceptError> {
        let queue = Arc::new(Queue::new(options.queue_bytes_max, options.overflow));
        let outlet = self.accept_with(&options.handshake, Arc::clone(&queue) as Arc<dyn Inbox>)?;
        Ok(Channel::new(outlet, queue))
    }

    fn accept_with(&self, handshake: &[u8], inbox: Arc<dyn Inbox>) -> Result<Outlet, AcceptError> {
        let shared = &self.handle.shared;
        if !fits(&[self.protocol().as_bytes(), self.id(), handshake]) {
            return Err(AcceptError::TooLong);
        }
        let link = Arc::new(Link::new(inbox));
        let mut state = shared.state();
        let announced = state.accept(&self.ask, handshake, Arc::clone(&link)).ok_or(AcceptError::Gone)?;
        let announced = announced.map_err(|refusal| match refusal {
            Refusal::TooMany => AcceptError::TooMany,
            Refusal::Duplicate => AcceptError::Gone,
        })?;
        let sent = shared.outgoing.control(&announced.message);
        link.set_local_id(announced.local_id);
        if sent.is_err() {
            link.shut();
            state.close(announced.local_id);
            return Err(AcceptError::Gone);
        }
        // The reading task delivers the messages that the peer sent ahead.
        shared.wake.notify_one();
        drop(state);
        Ok(Outlet::new(link, Arc::clone(&self.handle)))
    }

    /// Rejects the channel and tells the peer.
    pub fn reject(self) {
        drop(self);
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let shared = &self.handle.shared;
        let mut state = shared.state();
        if let Some(message) = state.reject(&self.ask) {
            // On a closed connection the peer need not be told.
            let _ = shared.outgoing.control(&message);
            // The reading task may be waiting for the pending messages to be dropped.
            shared.wake.notify_one();
        }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Incoming").field("protocol", &self.protocol()).finish_non_exhaustive()
    }
}

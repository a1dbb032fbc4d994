//! The user's handle to a channel.

use std::fmt;
use std::pin::pin;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

use super::inbox::{ChannelMessage, Inbox, Queue};
use super::state::Member;
use super::{Handle, Shared};
use crate::secret_stream::{Closed, SendError};

/// A channel of one protocol, which delivers messages in order. Dropping it closes it.
pub struct Channel {
    outlet: Outlet,
    queue: Arc<Queue>,
}

/// State shared by a channel's user and the connection.
pub(crate) struct Link {
    inbox: Arc<dyn Inbox>,
    /// The id that this side sends under, while the channel is open.
    local_id: Mutex<Option<u64>>,
    remote_handshake: OnceLock<Bytes>,
    opened: CancellationToken,
    closed: CancellationToken,
}

impl Link {
    pub(super) fn new(inbox: Arc<dyn Inbox>) -> Self {
        Self {
            inbox,
            local_id: Mutex::default(),
            remote_handshake: OnceLock::new(),
            opened: CancellationToken::new(),
            closed: CancellationToken::new(),
        }
    }

    pub(super) fn inbox(&self) -> &Arc<dyn Inbox> {
        &self.inbox
    }

    /// Allows sending. Called once, after the open message was sent.
    pub(super) fn set_local_id(&self, local_id: u64) {
        *self.local_id() = Some(local_id);
    }

    /// Prevents further sending. Returns the channel's id if it was open.
    pub(super) fn shut(&self) -> Option<u64> {
        let local_id = self.local_id().take();
        self.closed.cancel();
        local_id
    }

    pub(super) fn opened(&self, handshake: Bytes) {
        // A channel is opened only once.
        let _ = self.remote_handshake.set(handshake);
        self.opened.cancel();
    }

    fn local_id(&self) -> MutexGuard<'_, Option<u64>> {
        self.local_id.lock()
    }

    /// Sends while holding the lock, so that the id cannot pass to another channel.
    fn send(&self, shared: &Shared, kind: u64, parts: &[&[u8]]) -> Result<(), SendError> {
        let local_id = self.local_id();
        let id = local_id.ok_or(SendError::Closed)?;
        shared.outgoing.send(id, kind, parts)
    }
}

impl Member for Arc<Link> {
    fn shut(&self) {
        Link::shut(self);
    }
}

/// Lets an inbox respond immediately.
#[derive(Clone, Copy)]
pub(crate) struct Responder<'a> {
    pub(super) shared: &'a Shared,
    pub(super) link: &'a Link,
}

impl Responder<'_> {
    /// Sends a message on the channel.
    pub(crate) fn send(&self, kind: u64, parts: &[&[u8]]) -> Result<(), SendError> {
        self.link.send(self.shared, kind, parts)
    }
}

/// A channel without its queue. Dropping it closes the channel.
pub(crate) struct Outlet {
    link: Arc<Link>,
    handle: Arc<Handle>,
}

impl Outlet {
    pub(super) fn new(link: Arc<Link>, handle: Arc<Handle>) -> Self {
        Self { link, handle }
    }

    /// Sends one message, given in parts. Never waits.
    pub(crate) fn send(&self, kind: u64, parts: &[&[u8]]) -> Result<(), SendError> {
        self.link.send(&self.handle.shared, kind, parts)
    }

    /// Waits until the send queue of the connection is short enough for more. Cancel safe.
    pub(crate) async fn room(&self) -> Result<(), Closed> {
        // Usually there is space, and no need to wait.
        let mut room = pin!(self.handle.shared.stream.room());
        if let Some(result) = (&mut room).now_or_never() {
            return if self.link.closed.is_cancelled() { Err(Closed) } else { result };
        }
        self.link.closed.run_until_cancelled(room).await.unwrap_or(Err(Closed))
    }

    /// Waits until the peer has opened its side. Returns the peer's handshake.
    pub(crate) async fn opened(&self) -> Result<Bytes, Closed> {
        self.link.closed.run_until_cancelled(self.link.opened.cancelled()).await;
        // A channel that was opened and then closed counts as opened, because a handshake was received.
        self.link.remote_handshake.get().cloned().ok_or(Closed)
    }

    /// Closes the channel and tells the peer.
    pub(crate) fn close(&self) {
        self.handle.shared.close(&self.link);
    }

    /// Waits until the channel is closed, by either side or with the connection.
    pub(crate) async fn closed(&self) {
        self.link.closed.cancelled().await;
    }

    fn is_open(&self) -> bool {
        !self.link.closed.is_cancelled()
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.close();
    }
}

impl Channel {
    pub(super) fn new(outlet: Outlet, queue: Arc<Queue>) -> Self {
        Self { outlet, queue }
    }

    /// Sends one message, given in parts. Never waits; see [`Channel::room`] for backpressure.
    pub fn send(&self, kind: u64, parts: &[&[u8]]) -> Result<(), SendError> {
        self.outlet.send(kind, parts)
    }

    /// Waits until the send queue of the connection is short enough for more. Cancel safe.
    pub async fn room(&self) -> Result<(), Closed> {
        self.outlet.room().await
    }

    /// Returns the next message, or `None` when the channel is closed. Cancel safe.
    pub async fn receive(&self) -> Option<ChannelMessage> {
        self.queue.next().await
    }

    /// Returns the next message if one has arrived.
    pub fn try_receive(&self) -> Option<ChannelMessage> {
        self.queue.try_next()
    }

    /// Waits until the peer has opened its side. Returns the peer's handshake.
    pub async fn opened(&self) -> Result<Bytes, Closed> {
        self.outlet.opened().await
    }

    /// Returns the peer's handshake, if the peer has opened its side.
    pub fn remote_handshake(&self) -> Option<Bytes> {
        self.outlet.link.remote_handshake.get().cloned()
    }

    /// Closes the channel and tells the peer. Messages already received can still be read.
    pub fn close(&self) {
        self.outlet.close();
    }

    /// Waits until the channel is closed, by either side or with the connection.
    pub async fn closed(&self) {
        self.outlet.closed().await;
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Channel").field("is_open", &self.outlet.is_open()).finish_non_exhaustive()
    }
}

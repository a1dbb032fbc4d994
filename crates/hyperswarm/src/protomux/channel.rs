//! A channel as its user holds it.

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

/// The messages of one protocol, in order. Dropping it closes it.
pub struct Channel {
    outlet: Outlet,
    queue: Arc<Queue>,
}

/// What a channel's user and the connection share.
pub(crate) struct Link {
    inbox: Arc<dyn Inbox>,
    /// The id under which this side sends, while the channel is open.
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

    /// Allows sending. Called once, when the announcement is on its way.
    pub(super) fn set_local_id(&self, local_id: u64) {
        *self.local_id() = Some(local_id);
    }

    /// Forbids further sending. Returns the id of a channel that was open.
    pub(super) fn shut(&self) -> Option<u64> {
        let local_id = self.local_id().take();
        self.closed.cancel();
        local_id
    }

    pub(super) fn opened(&self, handshake: Bytes) {
        // A channel is opened once in its life.
        let _ = self.remote_handshake.set(handshake);
        self.opened.cancel();
    }

    fn local_id(&self) -> MutexGuard<'_, Option<u64>> {
        self.local_id.lock()
    }

    /// Sends while the lock keeps the id this channel's own.
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

/// Lets an inbox answer at once.
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

    /// Waits until the connection's queue is short enough for more. Cancel safe.
    pub(crate) async fn room(&self) -> Result<(), Closed> {
        // Most often there is room, and nothing to wait for.
        let mut room = pin!(self.handle.shared.stream.room());
        if let Some(result) = (&mut room).now_or_never() {
            return if self.link.closed.is_cancelled() { Err(Closed) } else { result };
        }
        self.link.closed.run_until_cancelled(room).await.unwrap_or(Err(Closed))
    }

    /// Waits until the peer opened its side. Returns the peer's handshake.
    pub(crate) async fn opened(&self) -> Result<Bytes, Closed> {
        self.link.closed.run_until_cancelled(self.link.opened.cancelled()).await;
        // What is both opened and closed counts as opened: a handshake was received.
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

    /// Sends one message, given in parts. Never waits: see [`Channel::room`].
    pub fn send(&self, kind: u64, parts: &[&[u8]]) -> Result<(), SendError> {
        self.outlet.send(kind, parts)
    }

    /// Waits until the connection's queue is short enough for more. Cancel safe.
    pub async fn room(&self) -> Result<(), Closed> {
        self.outlet.room().await
    }

    /// Returns the next message, or `None` when the channel is closed. Cancel safe.
    pub async fn receive(&self) -> Option<ChannelMessage> {
        self.queue.next().await
    }

    /// Returns the next message if one is here.
    pub fn try_receive(&self) -> Option<ChannelMessage> {
        self.queue.try_next()
    }

    /// Waits until the peer opened its side. Returns the peer's handshake.
    pub async fn opened(&self) -> Result<Bytes, Closed> {
        self.outlet.opened().await
    }

    /// Returns the peer's handshake, if the peer opened its side.
    pub fn remote_handshake(&self) -> Option<Bytes> {
        self.outlet.link.remote_handshake.get().cloned()
    }

    /// Closes the channel and tells the peer. What was received and not taken yet can still be taken.
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

//! Multiplexes many protocols on one connection, compatible with the Node package `protomux`.
//!
//! A channel carries the messages of one protocol. Its name is the protocol and, where there may be several channels of
//! one protocol, an id. Both sides open the channel, in either order or at the same time. Messages that one side sends
//! before the other has opened are buffered there.
//!
//! `state` holds the protocol rules and does no I/O. One task reads the connection and passes each message to the inbox
//! of its channel.

mod channel;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod head;
mod inbox;
mod outgoing;
mod pairing;
mod reader;
mod state;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::channel::Channel;
pub use self::inbox::{ChannelMessage, Overflow};
pub use self::pairing::{AcceptError, Incoming, Pairing};

pub(crate) use self::channel::{Outlet, Responder};
pub(crate) use self::head::Head;
pub(crate) use self::inbox::{Delivery, Inbox};

use self::channel::Link;
use self::inbox::Queue;
use self::outgoing::Outgoing;
use self::state::{Event, Key, Refusal, State};
use crate::secret_stream::{MESSAGE_BYTES_MAX, SecretStream};

/// Options of a [`Protomux`].
#[derive(Debug, Clone)]
pub struct Options {
    /// The maximum number of open channels. Further channels that the peer opens are rejected.
    pub channels_max: usize,
    /// How many bytes the peer may send on channels that are neither accepted nor rejected, before reading pauses.
    pub pending_bytes_max: usize,
    /// How many of the peer's channels may wait to be taken from a [`Pairing`]. More are rejected.
    pub incoming_max: usize,
    /// How long a connection that is being closed may take to deliver what was sent.
    pub linger: Duration,
    /// How long the peer may send requests without reading the responses.
    pub stall: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            channels_max: 1024,
            pending_bytes_max: 64 * 1024,
            incoming_max: 64,
            linger: Duration::from_secs(10),
            stall: Duration::from_secs(30),
        }
    }
}

/// Options of a [`Channel`].
#[derive(Debug, Clone)]
pub struct ChannelOptions {
    /// Data that the peer receives when the channel opens. Its format is up to the protocol.
    pub handshake: Bytes,
    /// How many bytes may wait for the consumer. A single message is always accepted.
    pub queue_bytes_max: usize,
    /// What happens when the consumer does not keep up.
    pub overflow: Overflow,
}

impl Default for ChannelOptions {
    fn default() -> Self {
        Self { handshake: Bytes::new(), queue_bytes_max: 4 * 1024 * 1024, overflow: Overflow::Wait }
    }
}

/// Why a channel could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A channel of this protocol and id is open already.
    #[error("the channel is open already")]
    Duplicate,
    /// The maximum number of channels is open.
    #[error("too many channels are open")]
    TooMany,
    /// The handshake does not fit in a message.
    #[error("the handshake is too long")]
    TooLong,
    /// The connection is closed.
    #[error("the connection is closed")]
    Closed,
}

/// A connection that carries channels. Clones share it.
///
/// The connection ends when all of its handles are dropped: this and its clones, channels and pairings.
#[derive(Clone)]
pub struct Protomux {
    handle: Arc<Handle>,
}

/// Ends the connection when it is dropped.
pub(crate) struct Handle {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    stream: SecretStream,
    options: Options,
    outgoing: Outgoing,
    state: Mutex<State<Arc<Link>>>,
    pairings: Mutex<HashMap<Key, mpsc::Sender<Incoming>>>,
    handle: Weak<Handle>,
    is_started: AtomicBool,
    /// Wakes the reading task for events that it did not cause itself.
    wake: Notify,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Protomux {
    /// Takes over a connection. Reading starts with [`Protomux::start`], so that pairings can be registered before the
    /// peer's channels would be rejected.
    pub fn new(stream: SecretStream, options: Options) -> Self {
        let handle = Arc::new_cyclic(|handle| Handle {
            shared: Arc::new(Shared {
                outgoing: Outgoing::new(stream.clone()),
                stream,
                state: Mutex::new(State::new(options.channels_max, options.pending_bytes_max)),
                options,
                pairings: Mutex::default(),
                handle: handle.clone(),
                is_started: AtomicBool::new(false),
                wake: Notify::new(),
                stop: CancellationToken::new(),
                tasks: TaskTracker::new(),
            }),
        });
        Self { handle }
    }

    /// Starts reading. From here on, a channel that the peer opens is rejected unless this side opens or pairs it.
    pub fn start(&self) {
        let shared = &self.handle.shared;
        if !shared.is_started.swap(true, Ordering::Relaxed) {
            shared.tasks.spawn(reader::run(Arc::clone(shared)));
            shared.tasks.close();
        }
    }

    /// Returns the underlying connection, for the public keys of its sides.
    pub fn stream(&self) -> &SecretStream {
        &self.handle.shared.stream
    }

    /// Changes [`Options::pending_bytes_max`] of this connection.
    pub fn set_pending_bytes_max(&self, bytes: usize) {
        let shared = &self.handle.shared;
        shared.state().set_pending_bytes_max(bytes);
        shared.wake.notify_one();
    }

    /// Opens a channel. An empty id means no id. Messages may be sent at once, but the peer may still reject the
    /// channel.
    pub fn open(&self, protocol: &str, id: &[u8], options: ChannelOptions) -> Result<Channel, OpenError> {
        let queue = Arc::new(Queue::new(options.queue_bytes_max, options.overflow));
        let outlet = self.open_with(protocol, id, &options.handshake, Arc::clone(&queue) as Arc<dyn Inbox>)?;
        Ok(Channel::new(outlet, queue))
    }

    /// Opens a channel that delivers its messages to `inbox`.
    pub(crate) fn open_with(
        &self,
        protocol: &str,
        id: &[u8],
        handshake: &[u8],
        inbox: Arc<dyn Inbox>,
    ) -> Result<Outlet, OpenError> {
        let shared = &self.handle.shared;
        if !fits(&[protocol.as_bytes(), id, handshake]) {
            return Err(OpenError::TooLong);
        }
        let key = Key { protocol: protocol.to_owned(), id: id.to_owned() };
        let link = Arc::new(Link::new(inbox));
        let mut state = shared.state();
        if shared.stop.is_cancelled() {
            return Err(OpenError::Closed);
        }
        let announced = state.open(key, handshake, Arc::clone(&link)).map_err(|refusal| match refusal {
            Refusal::Duplicate => OpenError::Duplicate,
            Refusal::TooMany => OpenError::TooMany,
        })?;
        let sent = shared.outgoing.control(&announced.message);
        link.set_local_id(announced.local_id);
        if sent.is_err() {
            link.shut();
            state.close(announced.local_id);
            return Err(OpenError::Closed);
        }
        shared.wake_for(&state);
        drop(state);
        Ok(Outlet::new(link, Arc::clone(&self.handle)))
    }

    /// Accepts the peer's channels of a protocol, with a certain id or with any id. Replaces an earlier pairing.
    pub fn pair(&self, protocol: &str, id: Option<&[u8]>) -> Pairing {
        Pairing::new(Arc::clone(&self.handle), protocol, id)
    }

    /// Holds back the messages of all channels, and sends them as one batch when the guard is dropped.
    ///
    /// Do not wait for the peer while holding the guard: the peer cannot respond to a message that is held back.
    pub fn cork(&self) -> Corked<'_> {
        self.handle.shared.outgoing.cork();
        Corked { outgoing: &self.handle.shared.outgoing }
    }

    /// Ends the connection after everything sent so far.
    pub fn close(&self) {
        self.handle.shared.stop.cancel();
        // The reading task closes the channels.
        self.start();
    }

    /// Closes the connection at once. Undelivered data is lost.
    pub fn destroy(&self) {
        self.handle.shared.stream.destroy();
        self.close();
    }

    /// Returns whether either side has ended the connection, so that no channel can be opened any more.
    pub fn is_closed(&self) -> bool {
        self.handle.shared.stop.is_cancelled()
    }

    /// Waits until the connection is closed.
    pub async fn closed(&self) {
        self.handle.shared.stream.closed().await;
    }
}

impl fmt::Debug for Protomux {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Protomux").field("remote_key", &self.stream().remote_key()).finish_non_exhaustive()
    }
}

/// A guard that holds messages back until it is dropped. See [`Protomux::cork`].
#[must_use]
pub struct Corked<'a> {
    outgoing: &'a Outgoing,
}

impl Drop for Corked<'_> {
    fn drop(&mut self) {
        self.outgoing.uncork();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State<Arc<Link>>> {
        self.state.lock()
    }

    fn pairings(&self) -> MutexGuard<'_, HashMap<Key, mpsc::Sender<Incoming>>> {
        self.pairings.lock()
    }

    /// Wakes the reading task for events that it did not cause itself.
    fn wake_for(&self, state: &State<Arc<Link>>) {
        if state.has_events() {
            self.wake.notify_one();
        }
    }

    /// Closes a channel, unless it is closed already, and tells the peer.
    fn close(&self, link: &Link) {
        let mut state = self.state();
        // Under the lock of the state, because afterwards the id may belong to another channel.
        if let Some(local_id) = link.shut()
            && let Some(message) = state.close(local_id)
        {
            // On a closed connection the peer need not be told.
            let _ = self.outgoing.control(&message);
        }
        drop(state);
        link.inbox().shut();
    }

    /// Collects the events of a received message, or of the rest of a batch. Returns how reading continues.
    fn take_events(
        &self,
        message: Option<Bytes>,
        events: &mut VecDeque<Event<Arc<Link>>>,
    ) -> Result<Reading, state::Violation> {
        let mut state = self.state();
        let result = match message {
            Some(message) => state.receive(message),
            None => state.read_on(),
        };
        state.swap_events(events);
        result.map(|()| match () {
            () if state.is_crowded() => Reading::Waits,
            () if state.has_unread() => Reading::Unfinished,
            () => Reading::Continues,
        })
    }
}

/// How reading continues once the current events are handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// With the next message.
    Continues,
    /// With the rest of the same message.
    Unfinished,
    /// Not until pending channels are accepted or rejected.
    Waits,
}

/// Returns whether the fields of an open message fit in one message.
fn fits(parts: &[&[u8]]) -> bool {
    const OVERHEAD_BYTES: usize = 64;
    parts.iter().fold(OVERHEAD_BYTES, |sum, part| sum.saturating_add(part.len())) <= MESSAGE_BYTES_MAX
}

#[cfg(test)]
mod tests;

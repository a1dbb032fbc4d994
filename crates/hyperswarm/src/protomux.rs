//! Many protocols on one connection, compatible with the Node package `protomux`.
//!
//! A channel carries the messages of one protocol. It is named by the protocol and, where there may be several, an id.
//! Both sides open it, in either order or at once; what one side sends before the other has opened waits there.
//!
//! `state` knows the rules and nothing else. One task reads the connection and hands each message to its channel's
//! inbox.

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

/// How a [`Protomux`] behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many channels may exist at once. What the peer opens beyond that is rejected.
    pub channels_max: usize,
    /// How much the peer may send for channels that are neither accepted nor rejected, before reading waits.
    pub pending_bytes_max: usize,
    /// How many of the peer's channels may wait for a [`Pairing`] to be looked at. More are rejected.
    pub incoming_max: usize,
    /// How long an ending connection may take to deliver what was sent.
    pub linger: Duration,
    /// How long the peer may take no answers while it asks for more.
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

/// How a [`Channel`] behaves.
#[derive(Debug, Clone)]
pub struct ChannelOptions {
    /// What the peer learns when the channel opens. Only the protocol knows its format.
    pub handshake: Bytes,
    /// How much may wait for the consumer. One message always fits.
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
    /// A channel of this protocol and id is open.
    #[error("the channel is open already")]
    Duplicate,
    /// As many channels are open as may be.
    #[error("too many channels are open")]
    TooMany,
    /// The handshake does not fit into a message.
    #[error("the handshake is too long")]
    TooLong,
    /// The connection is closed.
    #[error("the connection is closed")]
    Closed,
}

/// The channels of a connection. Clones share it.
///
/// The connection ends when all of its handles are gone: this and its clones, channels, pairings.
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
    /// Tells the reading task that there is something to do that it did not read.
    wake: Notify,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Protomux {
    /// Takes over a connection. Nothing is read before [`Protomux::start`], so that nothing that the peer opens is
    /// rejected for not being known yet.
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

    /// Begins to read. What the peer opens from here on must be opened or paired here, or it is rejected.
    pub fn start(&self) {
        let shared = &self.handle.shared;
        if !shared.is_started.swap(true, Ordering::Relaxed) {
            shared.tasks.spawn(reader::run(Arc::clone(shared)));
            shared.tasks.close();
        }
    }

    /// Returns the connection beneath, for the keys of its sides.
    pub fn stream(&self) -> &SecretStream {
        &self.handle.shared.stream
    }

    /// Opens a channel. An empty id stands for none. Messages may be sent at once; the peer may still refuse the
    /// channel.
    pub fn open(&self, protocol: &str, id: &[u8], options: ChannelOptions) -> Result<Channel, OpenError> {
        let queue = Arc::new(Queue::new(options.queue_bytes_max, options.overflow));
        let outlet = self.open_with(protocol, id, &options.handshake, Arc::clone(&queue) as Arc<dyn Inbox>)?;
        Ok(Channel::new(outlet, queue))
    }

    /// Opens a channel whose messages go to `inbox`.
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

    /// Takes what the peer opens for a protocol, with a certain id or with any. Replaces an earlier pairing.
    pub fn pair(&self, protocol: &str, id: Option<&[u8]>) -> Pairing {
        Pairing::new(Arc::clone(&self.handle), protocol, id)
    }

    /// Holds messages back, those of all channels, and sends them as one when the guard is dropped.
    ///
    /// The guard must not be held while waiting for the peer: it would wait for what is held back.
    pub fn cork(&self) -> Corked<'_> {
        self.handle.shared.outgoing.cork();
        Corked { outgoing: &self.handle.shared.outgoing }
    }

    /// Ends the connection after what was sent so far.
    pub fn close(&self) {
        self.handle.shared.stop.cancel();
        // The reading task closes the channels.
        self.start();
    }

    /// Closes the connection at once. What is not delivered yet is lost.
    pub fn destroy(&self) {
        self.handle.shared.stream.destroy();
        self.close();
    }

    /// Returns whether the connection has ended, by either side: nothing can be opened any more.
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

/// Holds messages back until it is dropped. See [`Protomux::cork`].
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

    /// Lets the reading task see to what it did not bring about itself.
    fn wake_for(&self, state: &State<Arc<Link>>) {
        if state.has_events() {
            self.wake.notify_one();
        }
    }

    /// Closes a channel, unless it is closed, and tells the peer.
    fn close(&self, link: &Link) {
        let mut state = self.state();
        // Under the state's lock, because afterwards the id may belong to another channel.
        if let Some(local_id) = link.shut()
            && let Some(message) = state.close(local_id)
        {
            // A closed connection needs no word.
            let _ = self.outgoing.control(&message);
        }
        drop(state);
        link.inbox().shut();
    }

    /// Takes what there is to do, after what was received if there is anything. Returns how reading goes on.
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

/// How reading goes on after what was received is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// With the next message.
    Continues,
    /// With the rest of the same message.
    Unfinished,
    /// Not before others make room.
    Waits,
}

/// Returns whether the parts of an opening fit into one message.
fn fits(parts: &[&[u8]]) -> bool {
    const OVERHEAD_BYTES: usize = 64;
    parts.iter().fold(OVERHEAD_BYTES, |sum, part| sum.saturating_add(part.len())) <= MESSAGE_BYTES_MAX
}

#[cfg(test)]
mod tests;

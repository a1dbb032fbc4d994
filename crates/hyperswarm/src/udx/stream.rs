//! The user's handle to a stream.

use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddrV4;
use std::ptr;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::budget::Share;
use super::connection::Connection;
use super::socket::lock;
use super::{PacketFilter, Socket, Stats, StreamClosed, StreamError, StreamOptions, Table};
use crate::crypto::random;

/// `room` waits once the unsent bytes reach the high-water mark, until they fall to the low-water mark.
const HIGH_WATER: usize = 256 * 1024;
const LOW_WATER: usize = 128 * 1024;

/// A bidirectional byte stream. All handles are equivalent. Dropping the last one destroys the stream, unless it was
/// ended: then what was written before is still delivered.
#[derive(Clone)]
pub struct Stream {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    table: Arc<Table>,
}

/// State shared by the handles and the tasks of the sockets.
pub(crate) struct Shared {
    pub(crate) id: u32,
    firewall: Option<PacketFilter>,
    inner: Mutex<Inner>,
    room: Notify,
    first: Notify,
    closed: Notify,
}

pub(crate) struct Inner {
    pub(crate) connection: Connection,
    /// The stream's own socket, from `connect` until the stream is forgotten.
    pub(crate) socket: Option<Socket>,
    pub(crate) address: Option<SocketAddrV4>,
    first_packet: Option<(Socket, SocketAddrV4)>,
    /// What this stream holds of the budget for unacknowledged bytes, if one limits it.
    unacknowledged: Option<Share>,
    reader: Option<Waker>,
    room_wanted: bool,
    /// Whether the socket's task knows that the stream may have packets to send.
    pub(crate) dirty: bool,
    /// When the socket's task will check the deadline.
    pub(crate) timer: Option<Instant>,
}

impl Shared {
    pub(crate) fn new(id: u32, options: &StreamOptions) -> Self {
        Self {
            id,
            firewall: options.firewall.clone(),
            inner: Mutex::new(Inner {
                connection: Connection::new(options),
                socket: None,
                address: None,
                first_packet: None,
                unacknowledged: options.limits.as_ref().map(|limits| Share::of(&limits.unacknowledged)),
                reader: None,
                room_wanted: false,
                dirty: false,
                timer: None,
            }),
            room: Notify::new(),
            first: Notify::new(),
            closed: Notify::new(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    pub(crate) fn firewall(&self) -> Option<&PacketFilter> {
        self.firewall.as_ref()
    }

    /// Asks the socket's task to send. Further writes until it does so need no further request.
    fn flush(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        if inner.dirty {
            return;
        }
        if let Some(socket) = inner.socket.clone() {
            inner.dirty = true;
            drop(inner);
            socket.link().flush(Arc::clone(self));
        }
    }

    /// Wakes the tasks that wait for what has happened. Returns whether a reader was woken.
    pub(crate) fn wake(&self, mut inner: MutexGuard<'_, Inner>) -> bool {
        inner.count_unacknowledged();
        let closed = inner.connection.closed().is_some();
        let readable = closed || inner.connection.is_readable() || inner.connection.is_ended_remotely();
        let reader = if readable { inner.reader.take() } else { None };
        let room = inner.room_wanted && (closed || inner.has_room(LOW_WATER + 1));
        if room {
            inner.room_wanted = false;
        }
        drop(inner);
        if room {
            self.room.notify_waiters();
        }
        if closed {
            self.closed.notify_waiters();
            self.first.notify_waiters();
        }
        let woken = reader.is_some();
        if let Some(reader) = reader {
            reader.wake();
        }
        woken
    }

    /// Records the source of a packet that reached a stream before it was connected.
    pub(crate) fn heard_from(&self, inner: &mut Inner, socket: &Socket, from: SocketAddrV4) {
        if inner.socket.is_none() && inner.first_packet.is_none() {
            inner.first_packet = Some((socket.clone(), from));
            self.first.notify_waiters();
        }
    }
}

impl Inner {
    /// Returns whether fewer bytes than this are unsent, and the budget allows more.
    fn has_room(&self, limit: usize) -> bool {
        let sender = self.connection.sender();
        let share = self.unacknowledged.as_ref();
        sender.unsent() < limit && share.is_none_or(|share| share.has_room(sender.unacknowledged()))
    }

    fn count_unacknowledged(&mut self) {
        if let Some(share) = &mut self.unacknowledged {
            share.set(self.connection.sender().unacknowledged());
        }
    }
}

impl Table {
    /// Makes a stream with an unpredictable id.
    pub(crate) fn insert(&self, options: &StreamOptions) -> Arc<Shared> {
        let mut streams = self.lock();
        loop {
            let id = u32::from_le_bytes(random());
            if let std::collections::hash_map::Entry::Vacant(entry) = streams.entry(id) {
                return Arc::clone(entry.insert(Arc::new(Shared::new(id, options))));
            }
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, std::collections::HashMap<u32, Arc<Shared>>> {
        lock(&self.streams)
    }

    /// Remembers where the packets of a stream go.
    fn connected(&self, stream: &Arc<Shared>, address: SocketAddrV4, remote_id: u32) {
        lock(&self.by_peer).insert((address, remote_id), Arc::downgrade(stream));
    }

    /// Handles a report that no process receives what is sent to the stream `remote_id` at an address.
    pub(crate) fn port_closed(&self, address: SocketAddrV4, remote_id: u32) {
        let Some(stream) = lock(&self.by_peer).get(&(address, remote_id)).and_then(Weak::upgrade) else { return };
        let mut inner = stream.lock();
        inner.connection.on_port_closed(Instant::now());
        self.settle(&stream, inner);
    }

    /// Wakes tasks that wait for a stream that may have closed. Removes the stream, or lets its socket's task send the
    /// last packet.
    fn settle(&self, stream: &Arc<Shared>, inner: MutexGuard<'_, Inner>) {
        let gone = inner.connection.is_gone();
        stream.wake(inner);
        if gone {
            self.remove(stream);
        } else {
            stream.flush(stream.lock());
        }
    }

    /// Removes a closed stream from the table.
    pub(crate) fn remove(&self, stream: &Arc<Shared>) {
        {
            let mut streams = self.lock();
            if streams.get(&stream.id).is_some_and(|known| Arc::ptr_eq(known, stream)) {
                streams.remove(&stream.id);
            }
        }
        // Dropped after the lock is released, because it may be the last handle of a socket.
        let (socket, peer) = {
            let mut inner = stream.lock();
            ((inner.socket.take(), inner.first_packet.take()), inner.address.zip(inner.connection.remote_id()))
        };
        drop(socket);
        let Some(peer) = peer else { return };
        let mut by_peer = lock(&self.by_peer);
        if by_peer.get(&peer).is_some_and(|known| ptr::eq(known.as_ptr(), Arc::as_ptr(stream))) {
            by_peer.remove(&peer);
        }
    }
}

impl Stream {
    pub(crate) fn new(shared: Arc<Shared>, table: Arc<Table>) -> Self {
        Self { handle: Arc::new(Handle { shared, table }) }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// Returns the id that the other side must send to.
    pub fn id(&self) -> u32 {
        self.shared().id
    }

    /// Waits for the first packet of a stream that is not connected, and returns the socket it arrived at and its
    /// source. Returns `None` if the stream closes first.
    pub async fn first_packet(&self) -> Option<(Socket, SocketAddrV4)> {
        let shared = self.shared();
        loop {
            let notified = shared.first.notified();
            {
                let inner = shared.lock();
                if inner.first_packet.is_some() || inner.connection.closed().is_some() {
                    return inner.first_packet.clone();
                }
            }
            notified.await;
        }
    }

    /// Connects to the other side's stream. Data received before is acknowledged, and data written before is sent. Does
    /// nothing if the stream is connected or closed.
    pub fn connect(&self, socket: &Socket, remote_id: u32, address: SocketAddrV4) {
        let shared = self.shared();
        let mut inner = shared.lock();
        if inner.connection.closed().is_none() && !inner.connection.is_connected() {
            if socket.link().is_closing() {
                inner.connection.fail(StreamError::SocketClosed, Instant::now());
                self.handle.settle(inner);
                return;
            }
            inner.connection.connect(remote_id, Instant::now());
            self.handle.table.connected(shared, address, remote_id);
            inner.socket = Some(socket.clone());
            inner.address = Some(address);
            shared.flush(inner);
        }
    }

    /// Appends bytes without waiting. Call `room` between writes to get backpressure; otherwise the queue is unbounded.
    pub fn write(&self, bytes: Bytes) -> Result<(), StreamClosed> {
        let shared = self.shared();
        let mut inner = shared.lock();
        if !inner.connection.is_writable() {
            return Err(StreamClosed);
        }
        inner.connection.write(bytes);
        inner.count_unacknowledged();
        shared.flush(inner);
        Ok(())
    }

    /// Waits until few enough bytes are unsent for more to be written. Cancel safe.
    pub async fn room(&self) -> Result<(), StreamClosed> {
        let shared = self.shared();
        let mut limit = HIGH_WATER;
        loop {
            let notified = shared.room.notified();
            {
                let mut inner = shared.lock();
                if !inner.connection.is_writable() {
                    return Err(StreamClosed);
                }
                if inner.has_room(limit) {
                    return Ok(());
                }
                inner.room_wanted = true;
            }
            notified.await;
            limit = LOW_WATER + 1;
        }
    }

    /// Returns the next bytes, or `None` at the other side's end. Only one task may read at a time. Cancel safe.
    pub async fn read(&self) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|context| self.poll_read(context)).await
    }

    /// Polls for the next bytes. See [`read`](Self::read).
    pub fn poll_read(&self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        let progress = ready!(tokio::task::coop::poll_proceed(context));
        let shared = self.shared();
        let mut inner = shared.lock();
        let Inner { connection, reader, .. } = &mut *inner;
        if let Some(bytes) = connection.read() {
            progress.made_progress();
            if connection.ack_due() {
                shared.flush(inner);
            }
            return Poll::Ready(Ok(Some(bytes)));
        }
        if connection.is_ended_remotely() {
            return Poll::Ready(Ok(None));
        }
        if let Some(Err(error)) = connection.closed() {
            return Poll::Ready(Err(error));
        }
        match reader {
            Some(known) => known.clone_from(context.waker()),
            None => *reader = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// Lifts the limits of the stream's options, and opens the receive window to its default.
    pub fn lift_limits(&self) {
        let mut inner = self.shared().lock();
        inner.unacknowledged = None;
        inner.connection.lift_limits(StreamOptions::default().receive_window_bytes as usize);
        self.handle.settle(inner);
    }

    /// Sets whether this side waits for the other. If it does, a short silence is followed by a heartbeat, so that the
    /// end of the other side's process is noticed at once. Takes effect with the next packet.
    pub fn watch(&self, is_watched: bool) {
        self.shared().lock().connection.watch(is_watched, Instant::now());
    }

    /// Sends an end after what was written. Reading is still possible.
    pub fn end(&self) {
        let mut inner = self.shared().lock();
        inner.connection.end();
        self.shared().flush(inner);
    }

    /// Closes at once, drops undelivered data and tells the other side.
    pub fn destroy(&self) {
        let mut inner = self.shared().lock();
        inner.connection.destroy(Instant::now());
        self.handle.settle(inner);
    }

    /// Waits until the stream is closed: both sides ended, or an error occurred.
    pub async fn closed(&self) {
        let shared = self.shared();
        loop {
            let notified = shared.closed.notified();
            if shared.lock().connection.closed().is_some() {
                return;
            }
            notified.await;
        }
    }

    /// Returns why the stream failed, if it has.
    pub fn error(&self) -> Option<StreamError> {
        self.shared().lock().connection.closed().and_then(Result::err)
    }

    /// Returns statistics of the stream and its path.
    pub fn stats(&self) -> Stats {
        let inner = self.shared().lock();
        let (sender, traffic) = (inner.connection.sender(), inner.connection.traffic);
        Stats {
            round_trip: sender.round_trip().smoothed(),
            congestion_window_bytes: sender.window_bytes(),
            in_flight_bytes: sender.in_flight(),
            unsent_bytes: sender.unsent() as u64,
            mtu_bytes: sender.mtu() as u64,
            resends: sender.resends,
            timeouts: sender.timeouts,
            bytes_sent: traffic.bytes_sent,
            bytes_received: traffic.bytes_received,
            packets_sent: traffic.packets_sent,
            packets_received: traffic.packets_received,
        }
    }

    /// Returns the other side's address, once the stream is connected.
    pub fn remote_address(&self) -> Option<SocketAddrV4> {
        self.shared().lock().address
    }
}

impl Handle {
    fn settle(&self, inner: MutexGuard<'_, Inner>) {
        self.table.settle(&self.shared, inner);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        inner.connection.abandon(Instant::now());
        self.settle(inner);
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Stream").field("id", &self.id()).field("remote", &self.remote_address()).finish()
    }
}

//! A UDP socket that carries streams and other datagrams.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::{Mutex, MutexGuard};
use quinn_udp::{Transmit, UdpSocketState};
use tokio::net::UdpSocket;

use super::Table;
use super::port_errors::without_pending_errors;
use super::stream::Shared;

/// The maximum number of datagrams queued while the kernel's send buffer is full.
const WAITING_MAX: usize = 256;

/// A datagram that is not UDX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// The sender's address.
    pub from: SocketAddrV4,
    /// The payload.
    pub bytes: Bytes,
}

/// A UDP socket that carries streams and other datagrams. It closes when its last handle and stream are dropped.
#[derive(Clone)]
pub struct Socket {
    handle: Arc<Handle>,
}

pub(crate) struct Handle {
    link: Arc<Link>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.link.close();
    }
}

/// State shared by the handles, the streams and the socket's task.
pub(crate) struct Link {
    pub(crate) io: UdpSocket,
    pub(crate) state: UdpSocketState,
    pub(crate) address: SocketAddrV4,
    pub(crate) table: Arc<Table>,
    /// Streams that may have packets to send.
    dirty: Mutex<Vec<Arc<Shared>>>,
    waiting: Mutex<VecDeque<(SocketAddrV4, Bytes)>>,
    /// Whether ICMP messages were received.
    pub(crate) had_errors: AtomicBool,
    woken: AtomicBool,
    closing: AtomicBool,
    pub(crate) waker: AtomicWaker,
}

impl Link {
    pub(crate) fn new(io: UdpSocket, state: UdpSocketState, address: SocketAddrV4, table: Arc<Table>) -> Self {
        Self {
            io,
            state,
            address,
            table,
            dirty: Mutex::default(),
            waiting: Mutex::default(),
            had_errors: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        }
    }

    /// Asks the task to send the packets of a stream.
    pub(crate) fn flush(&self, stream: Arc<Shared>) {
        lock(&self.dirty).push(stream);
        self.wake();
    }

    /// Moves the dirty streams to `queue`.
    pub(crate) fn take_dirty(&self, queue: &mut VecDeque<Arc<Shared>>) {
        queue.extend(lock(&self.dirty).drain(..));
    }

    pub(crate) fn take_woken(&self) -> bool {
        self.woken.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Sends at once, without asking the runtime whether the socket is writable.
    pub(crate) fn try_send(&self, to: SocketAddrV4, contents: &[u8], segment_size: Option<usize>) -> io::Result<()> {
        let transmit = Transmit { destination: SocketAddr::V4(to), ecn: None, contents, segment_size, src_ip: None };
        without_pending_errors(|| self.state.try_send((&self.io).into(), &transmit))
    }

    /// Sends the queued datagrams. Returns `false` if the send buffer is full again.
    pub(crate) fn send_waiting(&self) -> bool {
        let mut waiting = lock(&self.waiting);
        while let Some((to, bytes)) = waiting.front() {
            if is_full(&self.try_send(*to, bytes, None)) {
                return false;
            }
            waiting.pop_front();
        }
        true
    }
}

pub(crate) fn is_full(sent: &io::Result<()>) -> bool {
    sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

impl Socket {
    pub(crate) fn new(link: Arc<Link>) -> Self {
        Self { handle: Arc::new(Handle { link }) }
    }

    pub(crate) fn from_handle(handle: Arc<Handle>) -> Self {
        Self { handle }
    }

    pub(crate) fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.handle.link
    }

    /// Returns the address that the socket is bound to.
    pub fn local_address(&self) -> SocketAddrV4 {
        self.handle.link.address
    }

    /// Sends a datagram, or queues it while the send buffer is full. Drops it, as the network would, if the queue is
    /// full too.
    pub fn send(&self, to: SocketAddrV4, bytes: &[u8]) {
        let link = &self.handle.link;
        if !link.is_closing() && is_full(&link.try_send(to, bytes, None)) {
            let mut waiting = lock(&link.waiting);
            if waiting.len() < WAITING_MAX {
                waiting.push_back((to, Bytes::copy_from_slice(bytes)));
                link.wake();
            }
        }
    }

    /// Destroys the streams that the socket carries, and closes it.
    pub fn close(&self) {
        self.handle.link.close();
    }
}

impl PartialEq for Socket {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.link(), other.link())
    }
}

impl Eq for Socket {}

impl fmt::Debug for Socket {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Socket").field(&self.handle.link.address).finish()
    }
}

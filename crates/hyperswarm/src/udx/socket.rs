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
use super::stream::Shared;

/// Datagrams kept while the operating system takes no more.
const WAITING_MAX: usize = 256;

/// A datagram that isn't UDX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Where it came from.
    pub from: SocketAddrV4,
    /// What it holds.
    pub bytes: Bytes,
}

/// A UDP socket that carries streams and other datagrams. It is closed with its last handle or stream.
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

/// What handles, streams and the socket's task share.
pub(crate) struct Link {
    pub(crate) io: UdpSocket,
    pub(crate) state: UdpSocketState,
    pub(crate) address: SocketAddrV4,
    pub(crate) table: Arc<Table>,
    /// Streams that may have something to send.
    dirty: Mutex<Vec<Arc<Shared>>>,
    waiting: Mutex<VecDeque<(SocketAddrV4, Bytes)>>,
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
            woken: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        }
    }

    /// Lets the task look at a stream.
    pub(crate) fn flush(&self, stream: Arc<Shared>) {
        lock(&self.dirty).push(stream);
        self.wake();
    }

    /// Moves the streams to look at to `queue`.
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

    /// Sends at once, past the runtime's own idea of whether the socket is writable.
    pub(crate) fn try_send(&self, to: SocketAddrV4, contents: &[u8], segment_size: Option<usize>) -> io::Result<()> {
        let transmit = Transmit { destination: SocketAddr::V4(to), ecn: None, contents, segment_size, src_ip: None };
        self.state.try_send((&self.io).into(), &transmit)
    }

    /// Sends what waited for room; returns `false` when there is still none.
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

    /// Returns the address it is bound to.
    pub fn local_address(&self) -> SocketAddrV4 {
        self.handle.link.address
    }

    /// Sends a datagram if it can be sent soon; like the network, drops it otherwise.
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

    /// Destroys the streams that it carries and stops.
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

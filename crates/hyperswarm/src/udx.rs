//! Reliable streams over UDP datagrams, as libudx speaks them.
//!
//! A [`Udx`] holds the streams of a node by id, a [`Socket`] carries them, a [`Stream`] is what its user reads and
//! writes. What a stream does is decided in a state machine without sockets or clocks (`connection`); `driver` feeds
//! it.

mod congestion;
mod connection;
mod driver;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod mtu;
mod packet;
mod receiver;
mod rtt;
mod send_queue;
mod sender;
mod socket;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

pub use socket::{Datagram, Socket};
pub use stream::Stream;

use stream::Shared;

/// Decides whether a stream takes packets that come by another socket than its own, or before it is connected.
pub type PacketFilter = Arc<dyn Fn(&Socket, SocketAddrV4) -> bool + Send + Sync>;

/// How a stream behaves.
#[derive(Clone)]
pub struct StreamOptions {
    /// Bytes that may wait for the reader; the other side stops sending when they do.
    pub receive_window_bytes: u32,
    /// Sends a heartbeat when nothing was heard for this long. An unanswered one has no consequence.
    pub keep_alive: Option<Duration>,
    /// Returns whether to take a packet that comes by another socket than the stream's. All are taken without it.
    pub firewall: Option<PacketFilter>,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { receive_window_bytes: 4 * 1024 * 1024, keep_alive: None, firewall: None }
    }
}

impl fmt::Debug for StreamOptions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("StreamOptions")
            .field("receive_window_bytes", &self.receive_window_bytes)
            .field("keep_alive", &self.keep_alive)
            .finish_non_exhaustive()
    }
}

/// Why a stream gives no more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The other side destroyed the stream.
    #[error("the peer destroyed the stream")]
    Reset,
    /// The other side stopped answering.
    #[error("the peer stopped answering")]
    TimedOut,
    /// The stream was destroyed here.
    #[error("the stream was destroyed")]
    Destroyed,
    /// The stream's socket was closed.
    #[error("the socket of the stream was closed")]
    SocketClosed,
}

/// The stream was ended or closed, so that nothing can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed for writing")]
pub struct StreamClosed;

/// What a stream has done and what it knows of its path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// The smoothed round-trip time, once one was measured.
    pub round_trip: Option<Duration>,
    /// Bytes that may be on their way at once.
    pub congestion_window_bytes: u64,
    /// Bytes on their way.
    pub in_flight_bytes: u64,
    /// Written bytes that were never sent.
    pub unsent_bytes: u64,
    /// The size of full packets with the headers of IP and UDP.
    pub mtu_bytes: u64,
    /// Packets sent again.
    pub resends: u64,
    /// Times that nothing came back for so long that all was sent again.
    pub timeouts: u64,
    /// Bytes sent in packets, headers of UDX included.
    pub bytes_sent: u64,
    /// Bytes received in packets, headers of UDX included.
    pub bytes_received: u64,
    /// Packets sent.
    pub packets_sent: u64,
    /// Packets received.
    pub packets_received: u64,
}

/// The streams of a node by id, shared by its sockets.
#[derive(Clone, Default)]
pub struct Udx {
    table: Arc<Table>,
}

impl Udx {
    /// Makes an empty set of streams.
    pub fn new() -> Self {
        Self::default()
    }

    /// Binds a socket and starts its task. Whatever arrives and isn't UDX goes to the receiver, or is dropped while
    /// that is full. Must be called within a runtime.
    pub fn bind(&self, address: SocketAddrV4) -> io::Result<(Socket, mpsc::Receiver<Datagram>)> {
        driver::bind(&self.table, address)
    }

    /// Makes a stream with an id of its own, to be connected once the other side's id and address are known.
    pub fn stream(&self, options: StreamOptions) -> Stream {
        Stream::new(self.table.insert(&options), Arc::clone(&self.table))
    }

    /// Waits until all sockets are closed and have told the other sides of their streams so.
    pub async fn closed(&self) {
        self.table.tasks.close();
        self.table.tasks.wait().await;
    }
}

impl fmt::Debug for Udx {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Udx").field("streams", &self.table.lock().len()).finish()
    }
}

/// Streams by id, and the tasks of the sockets that carry them.
#[derive(Default)]
pub(crate) struct Table {
    streams: Mutex<HashMap<u32, Arc<Shared>>>,
    tasks: TaskTracker,
}

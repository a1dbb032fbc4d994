//! Reliable streams over UDP, compatible on the wire with libudx.
//!
//! A [`Udx`] holds the streams of a node by id, a [`Socket`] carries them, and a [`Stream`] is the handle that its user
//! reads from and writes to. A state machine without sockets or clocks (`connection`) decides what a stream does;
//! `driver` feeds it.

mod budget;
mod closed_port;
mod congestion;
mod connection;
mod driver;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod mtu;
mod packet;
mod port_errors;
mod receiver;
mod recovery;
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
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

pub use budget::Budget;
pub use socket::{Datagram, Socket};
pub use stream::Stream;

use stream::Shared;

/// Returns whether a stream accepts a packet that arrives at another socket than its own, or before it is connected.
pub type PacketFilter = Arc<dyn Fn(&Socket, SocketAddrV4) -> bool + Send + Sync>;

/// Options of a stream.
#[derive(Clone)]
pub struct StreamOptions {
    /// How many bytes may wait for the reader. Beyond that, flow control stops the other side.
    pub receive_window_bytes: u32,
    /// Sends a heartbeat when nothing was received for this long. A heartbeat without a response does not close the
    /// stream.
    pub keep_alive: Option<Duration>,
    /// Filters packets that arrive at another socket than the stream's. Without it, all are accepted.
    pub firewall: Option<PacketFilter>,
    /// Limits that apply until [`Stream::lift_limits`].
    pub limits: Option<StreamLimits>,
}

/// Limits of a stream whose peer has not proven yet that it may use more memory.
#[derive(Clone, Debug)]
pub struct StreamLimits {
    /// Limits the bytes that wait for the readers of all streams together. Packets beyond it are dropped, as if they
    /// were lost.
    pub received: Arc<Budget>,
    /// Limits the written bytes that the peers of all streams together have not acknowledged: beyond it,
    /// [`Stream::room`] waits.
    pub unacknowledged: Arc<Budget>,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { receive_window_bytes: 4 * 1024 * 1024, keep_alive: None, firewall: None, limits: None }
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

/// Why a stream failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The other side destroyed the stream.
    #[error("the peer destroyed the stream")]
    Reset,
    /// The other side stopped responding.
    #[error("the peer stopped answering")]
    TimedOut,
    /// The other side's host reports that no process has the port that the stream leads to.
    #[error("the peer's port is closed: its process has ended")]
    PortClosed,
    /// The stream was destroyed here.
    #[error("the stream was destroyed")]
    Destroyed,
    /// The socket of the stream was closed.
    #[error("the socket of the stream was closed")]
    SocketClosed,
}

/// The stream was ended or closed, so nothing more can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed for writing")]
pub struct StreamClosed;

/// Statistics of a stream and its path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// The smoothed round-trip time, once one was measured.
    pub round_trip: Option<Duration>,
    /// The congestion window.
    pub congestion_window_bytes: u64,
    /// Bytes in flight.
    pub in_flight_bytes: u64,
    /// Bytes that were written but never sent.
    pub unsent_bytes: u64,
    /// The size of full packets, including the IP and UDP headers.
    pub mtu_bytes: u64,
    /// The number of retransmitted packets.
    pub resends: u64,
    /// The number of retransmission timeouts.
    pub timeouts: u64,
    /// Bytes sent in packets, including the UDX headers.
    pub bytes_sent: u64,
    /// Bytes received in packets, including the UDX headers.
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

    /// Binds a socket and starts its task. Datagrams that are not UDX go to the receiver, and are dropped while it is
    /// full. Must be called within a Tokio runtime.
    pub fn bind(&self, address: SocketAddrV4) -> io::Result<(Socket, mpsc::Receiver<Datagram>)> {
        driver::bind(&self.table, address)
    }

    /// Makes a stream with a fresh id. Connect it once the other side's id and address are known.
    pub fn stream(&self, options: StreamOptions) -> Stream {
        Stream::new(self.table.insert(&options), Arc::clone(&self.table))
    }

    /// Waits until all sockets are closed and have notified the peers of their streams.
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
    /// The connected streams by the other side's address and id.
    by_peer: Mutex<HashMap<(SocketAddrV4, u32), Weak<Shared>>>,
    tasks: TaskTracker,
}

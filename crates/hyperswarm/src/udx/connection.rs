//! One side of a stream as a state machine: it takes packets, bytes and the time, and yields packets, bytes and a
//! deadline.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::budget::Share;
use super::closed_port::ClosedPort;
use super::packet::{DATA, DESTROY, END, HEARTBEAT, Header, Packet, SACK, unwrap_sequence};
use super::receiver::Receiver;
use super::sender::Sender;
use super::{StreamError, StreamOptions};

/// The receive window of a stream that is not connected yet, because its peer cannot be told to wait.
const UNCONNECTED_MAX: usize = 64 * 1024;
/// How long a closed stream still responds to a peer that missed its last packet.
const LINGER: Duration = Duration::from_secs(3);
/// How long the peer of an ended and abandoned stream may go without acknowledging anything.
const ABANDONED_MAX: Duration = Duration::from_secs(30);
/// How often the end is sent without an acknowledgement to a peer that has ended itself.
const END_TIMEOUTS_MAX: u8 = 3;
/// A packet whose sequence or ack number is farther from the expected one than this is not the peer's.
const SPAN_MAX: u64 = 65_536;
/// The number of unanswered zero-window probes after which the connection times out.
const ZERO_WINDOW_PROBES_MAX: u32 = 8;
const ZERO_WINDOW_PROBE_EVERY_MAX: Duration = Duration::from_secs(5);
/// The silence after which a watched stream sends a heartbeat.
const WATCHED_SILENCE: Duration = Duration::from_millis(750);
/// The sequence numbers of both sides start above zero, so that arithmetic below the first packet does not underflow.
const SEQUENCE_BASE: u64 = 1 << 32;

/// One side of a stream.
pub(crate) struct Connection {
    remote_id: Option<u32>,
    sender: Sender,
    receiver: Receiver,
    window_max: usize,
    keep_alive: Option<Duration>,
    /// Whether the user waits for the other side.
    is_watched: bool,
    closed_port: ClosedPort,

    ack_due: bool,
    heartbeat_due: bool,
    destroy_due: bool,
    /// The window last advertised to the other side.
    window_told: u32,

    last_heard_at: Option<Instant>,
    zero_window_probe_at: Option<Instant>,
    unanswered_zero_window_probes: u32,

    closed: Option<Result<(), StreamError>>,
    /// When a closed stream is to be forgotten.
    gone_at: Option<Instant>,
    /// When the last handle was dropped, or when the other side last acknowledged something after that.
    abandoned_at: Option<Instant>,
    pub(crate) traffic: Traffic,
}

/// Counters of packets and bytes, without the IP and UDP headers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    pub(crate) packets_sent: u64,
    pub(crate) packets_received: u64,
}

impl Connection {
    pub(crate) fn new(options: &StreamOptions) -> Self {
        Self::starting_at(options, 0, 0)
    }

    /// Starts at the given sequence numbers.
    pub(crate) fn starting_at(options: &StreamOptions, first: u32, peer_first: u32) -> Self {
        let first = SEQUENCE_BASE + u64::from(first);
        let peer_first = SEQUENCE_BASE + u64::from(peer_first);
        let window_max = options.receive_window_bytes as usize;
        let share = options.limits.as_ref().map(|limits| Share::of(&limits.received));
        let receiver = Receiver::new(peer_first, window_max.min(UNCONNECTED_MAX), share);
        Self {
            remote_id: None,
            sender: Sender::new(first, peer_first),
            window_told: receiver.window_bytes(),
            receiver,
            window_max,
            keep_alive: options.keep_alive,
            is_watched: false,
            closed_port: ClosedPort::default(),
            ack_due: false,
            heartbeat_due: false,
            destroy_due: false,
            last_heard_at: None,
            zero_window_probe_at: None,
            unanswered_zero_window_probes: 0,
            closed: None,
            gone_at: None,
            abandoned_at: None,
            traffic: Traffic::default(),
        }
    }

    pub(crate) fn sender(&self) -> &Sender {
        &self.sender
    }

    /// Returns how the stream closed, once it has.
    pub(crate) fn closed(&self) -> Option<Result<(), StreamError>> {
        self.closed
    }

    /// Returns whether the stream can be forgotten.
    pub(crate) fn is_gone(&self) -> bool {
        self.closed.is_some() && self.gone_at.is_none() && !self.destroy_due
    }

    /// From here on, packets go to the other side's stream `remote_id`.
    pub(crate) fn connect(&mut self, remote_id: u32, now: Instant) {
        if self.remote_id.is_none() && self.closed.is_none() {
            self.remote_id = Some(remote_id);
            self.receiver.set_window_max(self.window_max);
            self.window_told = self.receiver.window_bytes();
            self.last_heard_at = Some(now);
        }
    }

    /// From here on, only a window of this size limits what the other side may send, and it learns so.
    pub(crate) fn lift_limits(&mut self, window_max: usize) {
        self.window_max = window_max;
        self.receiver.lift_limits();
        if self.is_connected() {
            self.receiver.set_window_max(window_max);
            self.ack_due = self.closed.is_none();
        }
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.remote_id.is_some()
    }

    /// Returns the other side's id, once the stream is connected.
    pub(crate) fn remote_id(&self) -> Option<u32> {
        self.remote_id
    }

    /// Sets whether a heartbeat follows a short silence of the other side.
    pub(crate) fn watch(&mut self, is_watched: bool, now: Instant) {
        if is_watched && !self.is_watched {
            // The silence counts from here on.
            self.last_heard_at = self.last_heard_at.map(|_| now);
        }
        self.is_watched = is_watched;
    }

    /// Handles a report that no process receives what is sent to the other side.
    pub(crate) fn on_port_closed(&mut self, now: Instant) {
        if self.closed.is_none() && self.closed_port.report(now, self.sender.round_trip().smoothed()) {
            self.close(Err(StreamError::PortClosed), now, false);
        }
    }

    /// Returns whether bytes can still be written.
    pub(crate) fn is_writable(&self) -> bool {
        self.closed.is_none() && !self.sender.is_ending()
    }

    /// Queues bytes; the stream must be writable.
    pub(crate) fn write(&mut self, bytes: Bytes) {
        self.sender.write(bytes);
    }

    /// Sends an end after the bytes written so far.
    pub(crate) fn end(&mut self) {
        if self.closed.is_none() {
            self.sender.end();
        }
    }

    /// Closes at once and tells the other side.
    pub(crate) fn destroy(&mut self, now: Instant) {
        if self.closed.is_none() {
            self.destroy_due = self.remote_id.is_some();
            self.close(Err(StreamError::Destroyed), now, self.destroy_due);
        }
    }

    /// Closes for an external reason, and tells the other side if the stream is connected.
    pub(crate) fn fail(&mut self, error: StreamError, now: Instant) {
        self.destroy_due = self.closed.is_none() && self.remote_id.is_some();
        self.close(Err(error), now, false);
    }

    /// Called when the last handle is dropped. If the stream was ended, its data is still delivered; otherwise the
    /// stream is destroyed.
    pub(crate) fn abandon(&mut self, now: Instant) {
        self.abandoned_at = Some(now);
        self.receiver.discard();
        if !self.sender.is_ending() || self.sender.is_ended() || self.remote_id.is_none() {
            self.destroy(now);
        }
    }

    fn close(&mut self, how: Result<(), StreamError>, now: Instant, linger: bool) {
        if self.closed.is_none() {
            self.closed = Some(how);
            self.sender.clear();
            self.receiver.drop_early();
            self.zero_window_probe_at = None;
            self.heartbeat_due = false;
        }
        self.gone_at = linger.then(|| now + LINGER);
    }

    /// Returns the next chunk that arrived.
    pub(crate) fn read(&mut self) -> Option<Bytes> {
        let bytes = self.receiver.read()?;
        // The window is advertised again once it is larger than the other side knows by a quarter of the maximum.
        let open = self.receiver.window_bytes();
        let told = u64::from(self.window_told);
        if self.closed.is_none()
            && told < self.window_max as u64 / 2
            && u64::from(open) >= told + self.window_max as u64 / 4
        {
            self.ack_due = true;
        }
        Some(bytes)
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.receiver.is_readable()
    }

    /// Returns whether the other side's end arrived.
    pub(crate) fn is_ended_remotely(&self) -> bool {
        self.receiver.is_ended()
    }

    /// Returns whether an acknowledgement is due.
    pub(crate) fn ack_due(&self) -> bool {
        self.ack_due
    }

    /// Handles a packet. `expected` hints at how many payload bytes come with it and right after it.
    pub(crate) fn receive(&mut self, packet: &Packet<'_>, now: Instant, expected: usize) {
        let header = &packet.header;
        let sequence = unwrap_sequence(header.sequence, self.receiver.next());
        let ack = unwrap_sequence(header.ack, self.sender.next());
        // A packet that acknowledges data never sent, or whose numbers are far off, is not the peer's.
        let first_unacked = self.sender.first_unacked();
        if ack > self.sender.next()
            || ack + SPAN_MAX < first_unacked
            || sequence.abs_diff(self.receiver.next()) > SPAN_MAX
        {
            return;
        }
        self.traffic.packets_received += 1;
        self.traffic.bytes_received += (super::packet::HEADER_BYTES + packet.payload.len()) as u64;
        if self.closed.is_some() {
            self.answer_late(header.kind);
            return;
        }
        self.last_heard_at = Some(now);
        self.closed_port = ClosedPort::default();
        self.unanswered_zero_window_probes = 0;
        if header.kind & HEARTBEAT != 0 {
            self.ack_due = true;
            return;
        }
        if header.kind & DESTROY != 0 {
            if sequence >= self.receiver.next() && ack >= first_unacked {
                self.close(Err(StreamError::Reset), now, false);
            }
            return;
        }
        if header.kind & (DATA | END) != 0 {
            self.receiver.receive(sequence, header.kind, packet.payload, expected);
            self.ack_due = true;
        }
        self.sender.on_window(sequence, ack, header.window_bytes);
        self.sender.on_ack(now, ack, packet.ranges());
        if self.sender.first_unacked() > first_unacked
            && let Some(at) = &mut self.abandoned_at
        {
            *at = now;
        }
        self.watch_window(now);
        self.finish(now);
    }

    /// A closed stream repeats its last packet to a peer that missed it.
    fn answer_late(&mut self, kind: u8) {
        if kind & DESTROY != 0 {
            self.gone_at = None;
        } else if kind & (DATA | END | HEARTBEAT) != 0 {
            match self.closed {
                Some(Ok(())) => self.ack_due = true,
                _ => self.destroy_due = self.gone_at.is_some(),
            }
        }
    }

    /// Closes when both sides have ended, or when no handle is left to read until the other side's end.
    fn finish(&mut self, now: Instant) {
        if self.closed.is_some() || !self.sender.is_ended() {
            return;
        }
        if self.receiver.is_ended() {
            self.close(Ok(()), now, true);
        } else if self.abandoned_at.is_some() {
            self.destroy(now);
        }
    }

    fn watch_window(&mut self, now: Instant) {
        if !self.sender.is_stalled() {
            self.zero_window_probe_at = None;
        } else if self.zero_window_probe_at.is_none() {
            self.zero_window_probe_at = Some(now + self.zero_window_probe_interval());
        }
    }

    fn zero_window_probe_interval(&self) -> Duration {
        (self.sender.round_trip().timeout() * 2u32.pow(self.unanswered_zero_window_probes.min(8)))
            .min(ZERO_WINDOW_PROBE_EVERY_MAX)
    }

    /// Appends the next packet to send to `out`, or returns `false`.
    pub(crate) fn transmit(&mut self, now: Instant, out: &mut Vec<u8>) -> bool {
        let Some(stream_id) = self.remote_id else { return false };
        let header = Header {
            kind: 0,
            stream_id,
            window_bytes: self.receiver.window_bytes(),
            sequence: self.sender.next() as u32,
            ack: self.receiver.next() as u32,
        };
        let before = out.len();
        let sent = self.transmit_one(now, header, out);
        if sent {
            self.window_told = header.window_bytes;
            self.traffic.packets_sent += 1;
            self.traffic.bytes_sent += (out.len() - before) as u64;
        }
        sent
    }

    fn transmit_one(&mut self, now: Instant, header: Header, out: &mut Vec<u8>) -> bool {
        if std::mem::take(&mut self.destroy_due) {
            Header { kind: DESTROY, ..header }.encode(0, out);
            return true;
        }
        if self.ack_due && self.receiver.has_gaps() {
            self.ack_due = false;
            Header { kind: SACK, ..header }.encode(0, out);
            for (start, end) in self.receiver.ranges() {
                out.extend_from_slice(&(*start as u32).to_le_bytes());
                out.extend_from_slice(&(*end as u32).to_le_bytes());
            }
            return true;
        }
        if self.closed.is_none() {
            if self.sender.transmit(now, header, out) {
                self.ack_due = false;
                return true;
            }
            self.watch_window(now);
        }
        if std::mem::take(&mut self.heartbeat_due) {
            self.ack_due = false;
            Header { kind: HEARTBEAT, ..header }.encode(0, out);
            return true;
        }
        let ack = std::mem::take(&mut self.ack_due);
        if ack {
            header.encode(0, out);
        }
        ack
    }

    /// Returns when `on_deadline` must be called next.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        if self.closed.is_some() {
            return self.gone_at;
        }
        self.remote_id?;
        let abandoned = self.abandoned_at.map(|at| at + ABANDONED_MAX);
        let probes = [self.zero_window_probe_at, self.closed_port.probe_at()];
        let others = [self.sender.deadline(), self.keep_alive_at(), abandoned];
        probes.into_iter().chain(others).flatten().min()
    }

    fn keep_alive_at(&self) -> Option<Instant> {
        let watched = self.is_watched.then_some(WATCHED_SILENCE);
        // What is in flight is sent again and elicits a response anyway.
        let every = self.keep_alive.into_iter().chain(watched).min().filter(|_| self.sender.is_idle())?;
        self.last_heard_at.map(|at| at + every)
    }

    /// Handles the deadlines that have passed. `transmit` may have packets afterwards.
    pub(crate) fn on_deadline(&mut self, now: Instant) {
        if self.closed.is_some() {
            if self.gone_at.is_some_and(|at| at <= now) {
                self.gone_at = None;
            }
            return;
        }
        if self.sender.on_deadline(now).is_err() {
            self.close(Err(StreamError::TimedOut), now, false);
            return;
        }
        // The peer has ended and received this side's end, but its acknowledgement was lost and it has forgotten the
        // stream.
        if self.receiver.is_ended() && self.sender.end_timeouts() >= END_TIMEOUTS_MAX {
            self.close(Ok(()), now, false);
            return;
        }
        if self.abandoned_at.is_some_and(|at| at + ABANDONED_MAX <= now) {
            self.destroy(now);
            return;
        }
        if self.zero_window_probe_at.is_some_and(|at| at <= now) {
            if self.unanswered_zero_window_probes >= ZERO_WINDOW_PROBES_MAX {
                self.close(Err(StreamError::TimedOut), now, false);
                return;
            }
            self.unanswered_zero_window_probes += 1;
            self.zero_window_probe_at = Some(now + self.zero_window_probe_interval());
            self.heartbeat_due = true;
        }
        self.heartbeat_due |= self.closed_port.probe(now);
        if self.keep_alive_at().is_some_and(|at| at <= now) {
            self.last_heard_at = Some(now);
            self.heartbeat_due = true;
        }
    }
}

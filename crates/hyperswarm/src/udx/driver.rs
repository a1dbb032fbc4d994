//! The task of a socket: reads datagrams in batches, feeds them to streams, sends their packets and keeps their timers.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use quinn_udp::{RecvMeta, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::packet::{self, HEADER_BYTES, Packet};
use super::port_errors::{self, without_pending_errors};
use super::socket::{Datagram, Handle, Link, Socket, is_full};
use super::stream::{Inner, Shared};
use super::{StreamError, Table};

/// The maximum number of datagrams queued for their reader. More are dropped.
const DATAGRAMS_MAX: usize = 1024;
/// How many buffers one system call fills. Each may hold a run of datagrams of one size (GRO).
const BATCH: usize = 8;
const BUFFER_BYTES: usize = 64 * 1024;
/// How many batches are read before the packets that they cause are sent.
const BATCHES_PER_TURN: usize = 4;
/// How many bytes and packets one stream sends before the next one gets its turn.
const BURST_BYTES: usize = 62 * 1024;
const BURST_PACKETS: usize = 64;
/// How soon packets that a full send buffer did not accept are sent again, if the runtime does not say when it has
/// space.
const SEND_AGAIN_AFTER: Duration = Duration::from_millis(1);
/// The requested size of the kernel's socket buffers. The kernel may grant less. The default loses packets on fast
/// links.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;

pub(crate) fn bind(table: &Arc<Table>, address: SocketAddrV4) -> io::Result<(Socket, mpsc::Receiver<Datagram>)> {
    let socket = std::net::UdpSocket::bind(address)?;
    socket.set_nonblocking(true)?;
    // This also forbids IP fragmentation, as libudx does. A packet too large for the path is lost, and MTU discovery
    // relies on that.
    let state = UdpSocketState::new((&socket).into())?;
    // Without them, the end of a peer's process is noticed later.
    let _ = port_errors::enable(&socket);
    // A smaller buffer than requested only makes the socket slower under load.
    let _ = state.set_recv_buffer_size((&socket).into(), SOCKET_BUFFER_BYTES);
    let _ = state.set_send_buffer_size((&socket).into(), SOCKET_BUFFER_BYTES);
    let SocketAddr::V4(address) = socket.local_addr()? else {
        return Err(io::ErrorKind::AddrNotAvailable.into());
    };
    let link = Arc::new(Link::new(UdpSocket::from_std(socket)?, state, address, Arc::clone(table)));
    let socket = Socket::new(Arc::clone(&link));
    let (datagrams, receiver) = mpsc::channel(DATAGRAMS_MAX);
    let ended = CancellationToken::new();
    table.tasks.spawn(port_errors::watch(Arc::clone(&link), ended.clone()));
    let driver = Driver {
        link,
        _ended: ended.drop_guard(),
        handle: Arc::downgrade(socket.handle()),
        datagrams,
        buffers: vec![0; BATCH * BUFFER_BYTES].into_boxed_slice(),
        received: [RecvMeta::default(); BATCH],
        queue: VecDeque::new(),
        timers: BinaryHeap::new(),
        sleep: Box::pin(sleep_until(Instant::now())),
        sleeping_until: None,
        out: Vec::new(),
        sizes: Vec::new(),
        blocked: None,
        send_again_at: None,
        readable: true,
    };
    table.tasks.spawn(driver.run());
    Ok((socket, receiver))
}

struct Driver {
    link: Arc<Link>,
    /// Ends the task that reads ICMP messages.
    _ended: DropGuard,
    handle: Weak<Handle>,
    datagrams: mpsc::Sender<Datagram>,
    buffers: Box<[u8]>,
    received: [RecvMeta; BATCH],
    /// Streams that may have packets to send, in round-robin order.
    queue: VecDeque<Arc<Shared>>,
    /// Deadlines of streams by id. Some are out of date.
    timers: BinaryHeap<Reverse<(Instant, u32)>>,
    sleep: Pin<Box<Sleep>>,
    sleeping_until: Option<Instant>,
    out: Vec<u8>,
    sizes: Vec<usize>,
    /// Packets that the full send buffer of the kernel did not accept.
    blocked: Option<Run>,
    /// When they are sent again, if the runtime does not say when the buffer has space.
    send_again_at: Option<Instant>,
    readable: bool,
}

/// Consecutive packets to one address.
struct Run {
    to: SocketAddrV4,
    bytes: Vec<u8>,
    sizes: Vec<usize>,
}

impl Driver {
    async fn run(mut self) {
        loop {
            poll_fn(|context| self.poll_work(context)).await;
            if self.link.is_closing() {
                break;
            }
            if self.readable && self.receive(Instant::now()) {
                // Tasks woken by the received data run first, so that their responses carry the acknowledgement.
                yield_now().await;
            }
            let now = Instant::now();
            self.fire_timers(now);
            self.flush(now);
            if !self.queue.is_empty() && self.blocked.is_none() {
                yield_now().await;
            }
        }
        self.close();
    }

    /// Is ready when there is work to do.
    fn poll_work(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.link.waker.register(context.waker());
        let mut ready = self.link.take_woken() || self.link.is_closing();
        if self.link.io.poll_recv_ready(context).is_ready() {
            self.readable = true;
            ready = true;
        }
        if self.blocked.is_none() {
            ready |= !self.queue.is_empty();
        } else if self.send_again_at.is_none() {
            ready |= self.link.io.poll_send_ready(context).is_ready();
        }
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        if let Some(at) = timer.into_iter().chain(self.send_again_at).min() {
            if self.sleeping_until.is_none_or(|until| at < until) {
                self.sleeping_until = Some(at);
                self.sleep.as_mut().reset(at);
            }
            if self.sleep.as_mut().poll(context).is_ready() {
                self.sleeping_until = None;
                ready = true;
            }
        }
        if ready { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Reads the available datagrams. Returns whether a reader was woken.
    fn receive(&mut self, now: Instant) -> bool {
        let mut woken = false;
        for _ in 0..BATCHES_PER_TURN {
            let count = self.receive_batch();
            let buffers = std::mem::take(&mut self.buffers);
            for (buffer, meta) in buffers.chunks(BUFFER_BYTES).zip(self.received).take(count) {
                if let (SocketAddr::V4(from), Some(bytes)) = (meta.addr, buffer.get(..meta.len)) {
                    woken |= self.dispatch(from, bytes, meta.stride, now);
                }
            }
            self.buffers = buffers;
            if !self.readable {
                break;
            }
        }
        woken
    }

    fn receive_batch(&mut self) -> usize {
        let Self { link, buffers, received, .. } = self;
        let mut slices = buffers.chunks_mut(BUFFER_BYTES).map(IoSliceMut::new);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| slices.next().unwrap_or(IoSliceMut::new(&mut [])));
        let mut count = 0;
        let drained = link.io.try_io(Interest::READABLE, || {
            let receive = || link.state.recv((&link.io).into(), &mut slices, received);
            count = without_pending_errors(receive).unwrap_or(0);
            // A batch that is not full was the last one, which saves another system call. The next arrival wakes the
            // task.
            if count < BATCH { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        self.readable = drained.is_ok();
        count
    }

    /// Dispatches a run of datagrams of one size. Returns whether a reader was woken.
    fn dispatch(&mut self, from: SocketAddrV4, bytes: &[u8], stride: usize, now: Instant) -> bool {
        let mut woken = false;
        let mut rest = bytes;
        while !rest.is_empty() {
            let stride = stride.clamp(1, rest.len());
            let (first, after) = rest.split_at(stride);
            if !packet::is_udx(first) {
                // Dropped if the queue is full, as the network would drop it.
                let _ = self.datagrams.try_send(Datagram { from, bytes: Bytes::copy_from_slice(first) });
                rest = after;
                continue;
            }
            let id = packet::stream_id(first);
            let same = after.chunks(stride).take_while(|next| packet::is_udx(next) && packet::stream_id(next) == id);
            let length = first.len() + same.map(<[u8]>::len).sum::<usize>();
            let (run, after) = rest.split_at(length);
            woken |= id.is_some_and(|id| self.feed(id, from, run, stride, now));
            rest = after;
        }
        woken
    }

    /// Feeds a run of packets to one stream. Returns whether its reader was woken.
    fn feed(&mut self, id: u32, from: SocketAddrV4, run: &[u8], stride: usize, now: Instant) -> bool {
        let Some(stream) = self.link.table.lock().get(&id).cloned() else { return false };
        let mut inner = stream.lock();
        if !inner.socket.as_ref().is_some_and(|socket| Arc::ptr_eq(socket.link(), &self.link)) {
            let Some(socket) = self.handle.upgrade().map(Socket::from_handle) else { return false };
            if let Some(firewall) = stream.firewall() {
                // Not under the lock, because the firewall may call the stream.
                drop(inner);
                if !firewall(&socket, from) {
                    return false;
                }
                inner = stream.lock();
            }
            stream.heard_from(&mut inner, &socket, from);
        }
        let mut left = run.len();
        for datagram in run.chunks(stride) {
            let payloads = left.saturating_sub(left.div_ceil(stride) * HEADER_BYTES);
            left -= datagram.len();
            if let Some(packet) = Packet::decode(datagram) {
                inner.connection.receive(&packet, now, payloads);
            }
        }
        self.enqueue(&stream, &mut inner);
        stream.wake(inner)
    }

    /// Records that a stream may have packets to send.
    fn enqueue(&mut self, stream: &Arc<Shared>, inner: &mut Inner) {
        if inner.dirty {
            return;
        }
        match &inner.socket {
            Some(socket) if Arc::ptr_eq(socket.link(), &self.link) => self.queue.push_back(Arc::clone(stream)),
            Some(socket) => socket.link().flush(Arc::clone(stream)),
            None => return,
        }
        inner.dirty = true;
    }

    fn fire_timers(&mut self, now: Instant) {
        while let Some(Reverse((at, id))) = self.timers.peek().copied() {
            if at > now {
                break;
            }
            self.timers.pop();
            let Some(stream) = self.link.table.lock().get(&id).cloned() else { continue };
            let mut inner = stream.lock();
            if inner.timer != Some(at) {
                continue;
            }
            inner.timer = None;
            if inner.connection.deadline().is_some_and(|deadline| deadline <= now) {
                inner.connection.on_deadline(now);
            }
            // Sending sets the timer again.
            self.enqueue(&stream, &mut inner);
            stream.wake(inner);
        }
    }

    fn flush(&mut self, now: Instant) {
        self.send_again_at = None;
        if let Some(run) = self.blocked.take() {
            self.send(run);
        }
        if self.blocked.is_none() && !self.link.send_waiting() {
            self.block(Run { to: self.link.address, bytes: Vec::new(), sizes: Vec::new() });
        }
        if self.blocked.is_some() {
            return;
        }
        self.link.take_dirty(&mut self.queue);
        for _ in 0..self.queue.len() {
            if self.blocked.is_some() {
                break;
            }
            if let Some(stream) = self.queue.pop_front() {
                self.flush_stream(stream, now);
            }
        }
    }

    fn flush_stream(&mut self, stream: Arc<Shared>, now: Instant) {
        let mut bytes = std::mem::take(&mut self.out);
        let mut sizes = std::mem::take(&mut self.sizes);
        bytes.clear();
        sizes.clear();
        let mut inner = stream.lock();
        inner.dirty = false;
        let mut more = true;
        while more && bytes.len() < BURST_BYTES && sizes.len() < BURST_PACKETS {
            let before = bytes.len();
            more = inner.connection.transmit(now, &mut bytes);
            if more {
                sizes.push(bytes.len() - before);
            }
        }
        let to = inner.address;
        let gone = inner.connection.is_gone();
        if more {
            inner.dirty = true;
            self.queue.push_back(Arc::clone(&stream));
        }
        self.set_timer(stream.id, &mut inner);
        stream.wake(inner);
        if let Some(to) = to {
            self.send(Run { to, bytes, sizes });
        }
        if gone {
            self.link.table.remove(&stream);
        }
    }

    fn set_timer(&mut self, id: u32, inner: &mut Inner) {
        if let Some(deadline) = inner.connection.deadline() {
            // An earlier timer stays: checking once too often is cheaper than moving the timer with every packet.
            if inner.timer.is_none_or(|timer| deadline < timer) {
                inner.timer = Some(deadline);
                self.timers.push(Reverse((deadline, id)));
            }
        }
    }

    /// Sends packets, as many of one size at once as the system accepts (GSO), and keeps the buffers for reuse.
    fn send(&mut self, run: Run) {
        let Run { to, mut bytes, mut sizes } = run;
        let (mut sent_bytes, mut sent) = (0, 0);
        while sent < sizes.len() {
            let count = run_length(&sizes[sent..], self.link.state.max_gso_segments());
            let length: usize = sizes[sent..sent + count].iter().sum();
            let segment = (count > 1).then_some(sizes[sent]);
            let result = self.link.try_send(to, &bytes[sent_bytes..sent_bytes + length], segment);
            if is_full(&result) {
                bytes.drain(..sent_bytes);
                sizes.drain(..sent);
                self.block(Run { to, bytes, sizes });
                return;
            }
            if result.is_err() && count > 1 {
                self.send_each(to, &bytes[sent_bytes..sent_bytes + length], sizes[sent]);
            }
            sent_bytes += length;
            sent += count;
        }
        self.out = bytes;
        self.sizes = sizes;
    }

    /// Stops sending until the socket is writable again.
    fn block(&mut self, run: Run) {
        // The runtime does not know yet that the socket is not writable.
        let _ = self.link.io.try_io(Interest::WRITABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        // After an error, the runtime takes a socket for closed, and so for writable at all times.
        self.send_again_at = self.link.had_errors.load(Ordering::Relaxed).then(|| Instant::now() + SEND_AGAIN_AFTER);
        self.blocked = Some(run);
    }

    /// Sends packets one by one, for systems without GSO. A packet that fails counts as lost on the network.
    fn send_each(&self, to: SocketAddrV4, bytes: &[u8], segment: usize) {
        for packet in bytes.chunks(segment) {
            let _ = self.link.try_send(to, packet, None);
        }
    }

    /// Destroys the streams of the socket.
    fn close(&mut self) {
        let now = Instant::now();
        let streams: Vec<_> = self.link.table.lock().values().cloned().collect();
        for stream in streams {
            let mut inner = stream.lock();
            if inner.socket.as_ref().is_none_or(|socket| !Arc::ptr_eq(socket.link(), &self.link)) {
                continue;
            }
            inner.connection.fail(StreamError::SocketClosed, now);
            let mut bytes = Vec::new();
            if inner.connection.transmit(now, &mut bytes)
                && let Some(to) = inner.address
            {
                let _ = self.link.try_send(to, &bytes, None);
            }
            stream.wake(inner);
            self.link.table.remove(&stream);
        }
    }
}

/// Returns how many packets at the front can be sent at once: all of one size, except that the last may be smaller.
fn run_length(sizes: &[usize], segments_max: usize) -> usize {
    let first = sizes[0];
    let mut count = 1;
    let mut bytes = first;
    while count < sizes.len().min(segments_max) && sizes[count] <= first && bytes + sizes[count] <= BUFFER_BYTES - 64 {
        bytes += sizes[count];
        count += 1;
        if sizes[count - 1] < first {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::run_length;

    #[test]
    fn packets_of_one_size_go_out_together_with_one_smaller_last() {
        assert_eq!(run_length(&[1472], 64), 1);
        assert_eq!(run_length(&[1472, 1472, 1472], 64), 3);
        assert_eq!(run_length(&[1472, 1472, 100, 100], 64), 3);
        assert_eq!(run_length(&[100, 1472], 64), 1);
        assert_eq!(run_length(&[100; 100], 64), 64);
        assert_eq!(run_length(&[1472; 100], 64), 44);
        assert_eq!(run_length(&[1472; 100], 1), 1);
    }
}

//! What strangers make a node hold in memory, measured on a process of its own over real sockets.

use std::io::{BufRead as _, BufReader, Lines, Read as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use hyperswarm::crypto::{self, KeyPair};
use hyperswarm::hyperdht::{Config, ConnectOptions, HyperDht};
use hyperswarm::protomux::{ChannelOptions, Options as MuxOptions, Protomux};
use hyperswarm::rpc::encode_buffer;
use hyperswarm::secret_stream::SecretStream;
use hyperswarm::udx;
use protocol::control::NodeRole;
use protocol::membership::{Certificate, certificate};
use protocol::signature::NodeKey;
use protocol::{Clock as _, PublicKey};
use tether_rpc::server::STRANGER_BYTES_MAX;
use tether_rpc::transport::hyperswarm::{HyperswarmTransport, KnownPeers, Options, STREAM_PROTOCOL};
use tether_rpc::{Client, Membership, Server, ServerLimits, StreamOptions, SystemClock};
use tokio::sync::Semaphore;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::info;

const LOOPBACK: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
const READY: &str = "serving on ";
/// How much each stranger sends. Without limits, a node would hold all of it.
const SENT_BYTES: usize = 2 * 1024 * 1024;
const MIB: usize = 1024 * 1024;
/// Real sockets on a busy machine need a long timeout.
const TIMEOUT: Duration = Duration::from_mins(1);

fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed(&[seed; 32])
}

/// Returns the membership of a node of the pool that the process of these tests belongs to.
fn membership(seed: u8) -> Membership {
    let (pool, key, now) = (key(100), key(seed), SystemClock.now());
    let certificate = Certificate {
        v: certificate::VERSION,
        serial: 1,
        pool: pool.public_key(),
        public_key: key.public_key(),
        roles: vec![NodeRole::Worker],
        regions: vec![],
        models: vec![],
        not_before: now,
        not_after: now.after(Duration::from_hours(1)),
    };
    let signed = certificate.sign(&pool);
    Membership::new(pool.public_key(), key.public_key(), signed, Arc::new(SystemClock)).expect("a valid certificate")
}

async fn start(seed: u8, bootstrap: Vec<SocketAddrV4>) -> Arc<HyperswarmTransport> {
    let options =
        Options { listen: LOOPBACK, bootstrap, known: KnownPeers::default(), public_address: None, is_client: false };
    HyperswarmTransport::start(options, &key(seed)).await.expect("a socket")
}

/// A node that takes small requests from strangers and longer ones from members.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run in a process of its own by strangers_take_little_memory_and_members_are_served"]
async fn serves_until_its_input_ends() {
    let (node, membership) = (start(1, vec![]).await, membership(1));
    let known = membership.clone();
    let server = Server::new(node.clone(), info())
        .unary("length", |_, text: String| async move { Ok(text.len()) })
        .membership(membership)
        .body_limit(move |key| if known.is_member(key) { usize::MAX } else { STRANGER_BYTES_MAX });
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    tasks.spawn(server.run(stop.clone(), Duration::ZERO));
    println!("{READY}{}", node.local_address());
    let input = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut vec![]));
    input.await.expect("a thread").expect("an input");
    stop.cancel();
    tasks.close();
    tasks.wait().await;
}

/// The process of a node.
struct Node {
    child: Child,
    /// Kept open, because the process may print more.
    _output: Lines<BufReader<ChildStdout>>,
    address: SocketAddrV4,
}

impl Node {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "hostile::serves_until_its_input_ends", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let address = lines.find_map(|line| Some(line.ok()?.split_once(READY)?.1.parse().expect("an address")));
        Self { child, address: address.expect("a node that serves"), _output: lines }
    }

    /// Returns how much memory the process has used at most since the last reset.
    fn peak_bytes(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("a process");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        peak.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
    }

    fn reset_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").expect("reset");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It ends when its input does; a dead one needs no more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a stranger does to a node.
#[derive(Debug, Clone, Copy)]
enum Attack {
    /// Sends the longest frame that is allowed, without its last bytes.
    HalfFrame,
    /// Sends the beginning of the longest frame that there is.
    LongFrame,
    /// Sends requests and reads no response.
    Requests,
    /// Opens streams and never completes their requests.
    Streams,
}

const ATTACKS: [Attack; 4] = [Attack::HalfFrame, Attack::LongFrame, Attack::Requests, Attack::Streams];

impl Attack {
    /// Connects and sends until nothing more is taken. The connection must be kept.
    async fn begin(self, dht: &HyperDht, node: SocketAddrV4, number: usize) -> Option<SecretStream> {
        let mut seed = [7; 32];
        seed[..8].copy_from_slice(&number.to_le_bytes());
        let (peer, window) = (key(1).public_key(), if matches!(self, Self::Requests) { 4096 } else { 65_536 });
        let options = ConnectOptions {
            relay_addresses: vec![node],
            udx: udx::StreamOptions { receive_window_bytes: window, ..udx::StreamOptions::default() },
            ..ConnectOptions::default()
        };
        let stream = dht.connect(&KeyPair::from_seed(&seed), crypto::PublicKey(peer.0), options).await.ok()?;
        match self {
            Self::HalfFrame => raw(&stream, 136 * 1024, 136 * 1024 - 2),
            Self::LongFrame => raw(&stream, 0xff_ffff, SENT_BYTES),
            Self::Requests => requests(&stream, peer),
            Self::Streams => streams(&stream),
        }
        Some(stream)
    }
}

/// Sends the length of a frame and a part of it.
fn raw(stream: &SecretStream, frame_bytes: u32, sent: usize) {
    let mut bytes = vec![0; sent];
    bytes[..3].copy_from_slice(&frame_bytes.to_le_bytes()[..3]);
    // The node may have closed the connection.
    let _ = stream.stream().expect("a UDX stream").write(Bytes::from(bytes));
}

/// Sends requests on a channel. Their responses are longer, and nothing reads them.
fn requests(stream: &SecretStream, peer: PublicKey) {
    let mux = Protomux::new(stream.clone(), MuxOptions::default());
    let channel = mux.open(hyperswarm::rpc::PROTOCOL, &peer.0, ChannelOptions::default()).expect("open");
    let method = "x".repeat(64);
    for id in 1000..1000 + (SENT_BYTES / 100) as u16 {
        let [low, high] = id.to_le_bytes();
        let head = [0xfd, low, high, method.len() as u8];
        let _ = channel.send(0, &[&head, method.as_bytes(), &encode_buffer(b"{}")]);
    }
    std::mem::forget((mux, channel));
}

/// Opens streams whose requests lack their last byte.
fn streams(stream: &SecretStream) {
    let mux = Protomux::new(stream.clone(), MuxOptions::default());
    let mut opening = vec![1, 1];
    opening.extend(1024_u32.to_le_bytes());
    opening.extend(0_u64.to_le_bytes());
    opening.extend(*b"\x06length");
    opening.extend((STRANGER_BYTES_MAX as u32).to_le_bytes());
    let mut part = vec![2];
    part.resize(STRANGER_BYTES_MAX, b' ');
    for id in 0..(SENT_BYTES / STRANGER_BYTES_MAX) as u64 {
        let Ok(channel) = mux.open(STREAM_PROTOCOL, &id.to_le_bytes(), ChannelOptions::default()) else { return };
        let _ = channel.send(0, &[&opening]);
        let _ = channel.send(0, &[&part]);
        std::mem::forget(channel);
    }
    std::mem::forget(mux);
}

/// Waits until the node takes no more from anybody.
async fn until_stuck(streams: &[SecretStream]) {
    let taken = || -> u64 {
        let taken = |stream: &SecretStream| {
            let stats = stream.stream().expect("a UDX stream").stats();
            stats.bytes_sent - stats.in_flight_bytes.min(stats.bytes_sent)
        };
        streams.iter().map(taken).sum()
    };
    let (mut before, mut same) = (taken(), 0);
    while same < 10 {
        time::sleep(Duration::from_millis(100)).await;
        let now = taken();
        // Probes of windows that stay closed are sent all the time.
        same = if now - before <= 64 * streams.len() as u64 { same + 1 } else { 0 };
        before = now;
    }
}

/// Lets strangers attack a node, each in one of these ways. Returns by how much its memory grew at most.
async fn grown_bytes(strangers: usize, attacks: &[Attack]) -> usize {
    let node = Node::start();
    let dht = HyperDht::start(Config { bind: LOOPBACK, bootstrap: vec![node.address], ..Config::default() });
    let dht = dht.expect("a socket");
    node.reset_peak();
    let idle = node.peak_bytes();
    let mut held = vec![];
    for group in (0..strangers).collect::<Vec<_>>().chunks(32) {
        let begun = group.iter().map(|number| attacks[number % attacks.len()].begin(&dht, node.address, *number));
        held.extend(join_all(begun).await.into_iter().flatten());
    }
    assert_eq!(held.len(), strangers, "each stranger was let in");
    time::timeout(TIMEOUT, until_stuck(&held)).await.expect("nothing more is taken");
    let grown = node.peak_bytes() - idle;
    let member = start(2, vec![node.address]).await;
    let client = Client::new(member).with_membership(membership(2));
    let long = "x".repeat(4 * MIB);
    let length = client.call::<_, usize>(key(1).public_key(), "length", &long, TIMEOUT).await;
    assert_eq!(length, Ok(long.len()), "a member is served while strangers attack");
    grown
}

/// Clients of a gateway are strangers for as long as they are connected. Their waiting calls hold more bytes here than
/// the transport lets strangers hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_whose_calls_wait_lose_no_connection() {
    const CALLS: usize = 256;
    let (arrived, release) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (node, arrivals, gate) = (start(1, vec![]).await, arrived.clone(), release.clone());
    let limits = ServerLimits {
        strangers_body_bytes_max: 64 * MIB,
        strangers_calls_per_peer_max: CALLS,
        ..ServerLimits::default()
    };
    let server =
        Server::new(node.clone(), info()).membership(membership(1)).limits(limits).body_limit(|_| STRANGER_BYTES_MAX);
    let server = server.stream("wait", move |call| {
        arrivals.add_permits(1);
        let gate = gate.clone();
        async move {
            let _released = gate.acquire().await;
            let Ok(mut reply) = call.accept().await else { return };
            let _ = reply.send(b"done").await;
            let _ = reply.finish().await;
        }
    });
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    tasks.spawn(server.run(stop.clone(), Duration::ZERO));
    let client = Client::new(start(2, vec![node.local_address()]).await);
    let body = Bytes::from(vec![b'x'; 60 * 1024]);
    let options = StreamOptions { accept_within: TIMEOUT, deadline: None, stall: TIMEOUT };
    let calls = (0..CALLS).map(|_| client.open_stream(key(1).public_key(), "wait", body.clone(), options));
    let opened = async {
        // If a connection is lost, not all of them arrive.
        let _all = time::timeout(TIMEOUT / 2, arrived.acquire_many(CALLS as u32)).await;
        release.add_permits(CALLS);
    };
    let (opened, ()) = tokio::join!(join_all(calls), opened);
    assert_eq!(
        opened.iter().filter(|call| call.is_ok()).count(),
        CALLS,
        "{:?}",
        opened.iter().find(|call| call.is_err())
    );
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_take_little_memory_and_members_are_served() {
    let grown = grown_bytes(64, &ATTACKS).await;
    assert!(grown < 48 * MIB, "{} MiB", grown / MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures memory: docs/benchmarks.md"]
async fn a_thousand_strangers_take_at_most_64_mib() {
    let grown = grown_bytes(1000, &ATTACKS).await;
    println!("1,000 hostile connections took {:.1} MiB", grown as f64 / MIB as f64);
    assert!(grown <= 64 * MIB, "{} MiB", grown / MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures memory: docs/benchmarks.md"]
async fn a_thousand_strangers_that_do_the_same_take_at_most_100_mib() {
    for attack in ATTACKS {
        let grown = grown_bytes(1000, &[attack]).await;
        println!("1,000 connections of {attack:?} took {:.1} MiB", grown as f64 / MIB as f64);
        assert!(grown <= 100 * MIB, "{attack:?}: {} MiB", grown / MIB);
    }
}

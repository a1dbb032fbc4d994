//! The transport between hosts: connections by public key over Hyperswarm, and topics on its DHT.
//!
//! Unary calls are `@hyperswarm/rpc` requests whose values are JSON strings, so that a plain Node client can make them.
//! Each stream is a Protomux channel of the protocol `tether/stream/1`, with an id that its opener draws at random.

mod hints;
mod strangers;
mod turns;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hyperswarm::crypto::{self, KeyPair};
use hyperswarm::dht_rpc::RequestOptions;
use hyperswarm::hyperdht::records::Peer;
use hyperswarm::hyperdht::{self, ConnectOptions, HyperDht, Server, ServerOptions, TopicAnnouncer};
use hyperswarm::protomux::{self, ChannelOptions, Overflow, Pairing, Protomux};
use hyperswarm::rpc::{self as hyperswarm_rpc, Cause, IncomingRequest, RemoteError, Requests, Rpc, UNKNOWN_METHOD};
use hyperswarm::secret_stream::SecretStream;
use hyperswarm::udx::{self, StreamError};
use parking_lot::{Mutex, MutexGuard};
use protocol::signature::NodeKey;
use protocol::{ErrorCode, PublicKey, Topic, WireError, codec};
use serde::{Deserialize, Serialize};
use tokio::time;
use tracing::debug;

use self::hints::Hints;
use self::strangers::StreamLimits;
use self::turns::in_turns;
use self::watch::{Watch, Watches};
use super::{Channel, Connection, Incoming, Reply, RequestError, Transport, TransportError};
use crate::identity;

/// The Protomux protocol of streams.
pub const STREAM_PROTOCOL: &str = "tether/stream/1";
/// The only kind of message of that protocol: a frame.
const FRAME: u64 = 0;
/// The maximum number of streams and other channels of one connection.
const CHANNELS_MAX: usize = 8192;
/// How many streams of a peer may wait to be accepted.
const INCOMING_MAX: usize = 1024;
/// How many bytes a peer may send ahead on such streams before reading from the connection pauses.
const PENDING_BYTES_MAX: usize = 256 * 1024;
/// How many bytes of a stream's response may be unread before the stream is closed. Credit keeps an honest peer far
/// below this.
const RESPONSE_QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// How many bytes of a stream's request may be unread before the connection waits. Requests are read as fast as they
/// arrive.
const REQUEST_QUEUE_BYTES: usize = 512 * 1024;
/// The timeout of a lookup. Peers found by then are returned.
const LOOKUP: Duration = Duration::from_secs(2);
/// How long the next reply may take once a lookup has found a peer. Nodes that are gone stay in the routing tables of
/// others for a while, and would delay every lookup.
const NEXT_REPLY: Duration = Duration::from_millis(500);
/// The timeout of opening a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// The timeout of unannouncing, for example when the node leaves the network.
const LEAVE: Duration = Duration::from_secs(1);

/// How a node joins the network.
#[derive(Debug, Clone)]
pub struct Options {
    /// The UDP address to listen on. Port 0 takes any free port.
    pub listen: SocketAddrV4,
    /// Bootstrap nodes.
    pub bootstrap: Vec<SocketAddrV4>,
    /// The peers known from an earlier run of this node.
    pub known: KnownPeers,
    /// The IPv4 address at which other hosts reach the node, if it is known for certain. It wins over what other nodes
    /// report.
    pub public_address: Option<Ipv4Addr>,
    /// Whether the node only calls others. It then cannot be found, and stores nothing for others.
    pub is_client: bool,
}

/// Addresses at which nodes were found, so that a node can rejoin the network when no bootstrap node responds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KnownPeers {
    /// Nodes of the DHT.
    pub nodes: Vec<SocketAddrV4>,
    /// By public key, the addresses at which the peer or one of its relays was reached.
    pub peers: BTreeMap<PublicKey, Vec<SocketAddrV4>>,
}

impl KnownPeers {
    /// Reads the file. A missing or damaged file is not an error, because the file only saves time.
    pub fn read(path: &Path) -> Self {
        std::fs::read(path).ok().and_then(|bytes| codec::decode(&bytes).ok()).unwrap_or_default()
    }

    /// Merges what several nodes know.
    pub fn merged(all: impl IntoIterator<Item = Self>) -> Self {
        let mut merged = Self::default();
        for known in all {
            merged.nodes.extend(known.nodes);
            for (peer, addresses) in known.peers {
                merged.peers.entry(peer).or_default().extend(addresses);
            }
        }
        for addresses in merged.peers.values_mut().chain([&mut merged.nodes]) {
            addresses.sort_unstable();
            addresses.dedup();
        }
        merged
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        identity::replace_private(path, &codec::encode(self))
    }
}

/// A bootstrap node. It stores records and responds to lookups, and offers no services.
pub struct BootstrapNode(HyperDht);

impl BootstrapNode {
    /// Starts the node. `bootstrap` lists other bootstrap nodes, and `public_address` is as in [`Options`].
    pub fn start(
        listen: SocketAddrV4,
        bootstrap: Vec<SocketAddrV4>,
        public_address: Option<Ipv4Addr>,
    ) -> io::Result<Self> {
        let config = hyperdht::Config {
            bind: listen,
            bootstrap,
            public_address: public_address.map(|address| SocketAddrV4::new(address, 0)),
            ephemeral: false,
            firewalled: Some(false),
            ..hyperdht::Config::default()
        };
        Ok(Self(HyperDht::start(config)?))
    }

    /// Returns the UDP address that the node listens on.
    pub fn local_address(&self) -> SocketAddrV4 {
        self.0.local_address()
    }

    /// Returns the address at which other hosts reach the node, as far as this host can tell.
    pub fn reachable_address(&self) -> SocketAddrV4 {
        self.0.reachable_address()
    }

    /// Stops the node.
    pub async fn stop(&self) {
        self.0.stop().await;
    }
}

/// A node's interface to a Hyperswarm network. It is a persistent node of the DHT, unless it only calls others.
pub struct HyperswarmTransport {
    dht: HyperDht,
    key_pair: KeyPair,
    public_key: PublicKey,
    /// `None` if the node only calls others.
    server: Option<Arc<Server>>,
    announced: Mutex<HashMap<Topic, TopicAnnouncer>>,
    hints: Hints,
    remembered: Vec<PublicKey>,
    limits: StreamLimits,
}

impl HyperswarmTransport {
    /// Joins the network and listens under the node's key.
    pub async fn start(options: Options, key: &NodeKey) -> io::Result<Arc<Self>> {
        let remembered = options.known.peers.keys().copied().collect();
        let known_addresses =
            options.known.peers.iter().map(|(key, addresses)| (foreign(*key), addresses.clone())).collect();
        let config = hyperdht::Config {
            bind: options.listen,
            bootstrap: options.bootstrap,
            known_nodes: options.known.nodes,
            known_addresses,
            public_address: options.public_address.map(|address| SocketAddrV4::new(address, 0)),
            ephemeral: options.is_client,
            firewalled: Some(false),
            ..hyperdht::Config::default()
        };
        let dht = HyperDht::start(config)?;
        let key_pair = KeyPair::from_seed(key.seed());
        let limits = StreamLimits::new();
        let server = if options.is_client {
            None
        } else {
            let StreamLimits { stream, udx } = limits.clone();
            let options = ServerOptions { stream, udx, ..ServerOptions::default() };
            let server = dht.listen(key_pair.clone(), options).await.map_err(io::Error::other)?;
            Some(Arc::new(server))
        };
        let public_key = key.public_key();
        let (announced, hints) = (Mutex::default(), Hints::new());
        Ok(Arc::new(Self { dht, key_pair, public_key, server, announced, hints, remembered, limits }))
    }

    /// Returns the UDP address that the node listens on.
    pub fn local_address(&self) -> SocketAddrV4 {
        self.dht.local_address()
    }

    /// Returns the address at which other hosts reach the node, as far as this host can tell.
    pub fn reachable_address(&self) -> SocketAddrV4 {
        self.dht.reachable_address()
    }

    /// Returns this host's address as other nodes see it, if they agree. They may be unable to reach it there.
    pub fn seen_address(&self) -> Option<Ipv4Addr> {
        self.dht.rpc().reflexive_address().map(|address| address.host)
    }

    /// Returns the peers that this node knows, to be stored for the next run.
    pub fn known_peers(&self) -> KnownPeers {
        let peers = self.dht.known_addresses().into_iter().map(|(key, addresses)| (PublicKey(key.0), addresses));
        KnownPeers { nodes: self.dht.routing_nodes(), peers: peers.collect() }
    }

    /// Waits until the first nodes of the DHT have responded, or none of them has.
    pub async fn bootstrapped(&self) {
        self.dht.bootstrapped().await;
    }

    /// Returns whether a DHT node responds at an address.
    pub async fn responds(&self, address: SocketAddrV4) -> bool {
        self.dht.rpc().ping(address, RequestOptions::default()).await.is_ok()
    }

    /// Leaves the network. The topics are unannounced first, so that peers are not directed to a node that is gone.
    pub async fn stop(&self) {
        let announcers: Vec<_> = self.announced().drain().map(|(_, announcer)| announcer).collect();
        let leave = async {
            futures_util::future::join_all(announcers.into_iter().map(TopicAnnouncer::stop)).await;
            if let Some(server) = &self.server {
                server.close().await;
            }
        };
        // Announcements that remain expire by themselves.
        let _ = time::timeout(LEAVE, leave).await;
        self.dht.stop().await;
    }

    fn announced(&self) -> MutexGuard<'_, HashMap<Topic, TopicAnnouncer>> {
        self.announced.lock()
    }
}

#[async_trait]
impl Transport for HyperswarmTransport {
    fn public_key(&self) -> PublicKey {
        self.public_key
    }

    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError> {
        // The hints save a walk through the DHT. A peer that has moved is found by the walk.
        let relay_addresses = self.hints.of(peer);
        let StreamLimits { stream, udx } = self.limits.clone();
        let options = ConnectOptions { timeout: CONNECT, relay_addresses, stream, udx };
        let stream = self.dht.connect(&self.key_pair, foreign(peer), options).await.map_err(|error| {
            debug!(peer = peer.short(), %error, "no connection");
            TransportError::Unreachable { peer }
        })?;
        let connection = HyperswarmConnection::over(stream, peer, false).ok_or(TransportError::Unreachable { peer })?;
        Ok(Arc::new(connection))
    }

    async fn accept(&self) -> Option<Arc<dyn Connection>> {
        // A node that only calls others accepts no connections. To its services it looks closed.
        let server = self.server.as_ref()?;
        loop {
            let stream = server.accept().await?;
            // A connection that has closed meanwhile must not end the loop.
            if let Some(connection) = HyperswarmConnection::over(stream, self.public_key, true) {
                return Some(Arc::new(connection));
            }
        }
    }

    async fn announce(&self, topic: &Topic) -> Result<(), TransportError> {
        let announced = {
            let mut announced = self.announced();
            let announcer = announced.entry(topic.clone()).or_insert_with(|| {
                // A weak reference, because the announcer's task would otherwise keep the server alive, and the server
                // the node.
                let server = self.server.as_ref().map(Arc::downgrade).unwrap_or_default();
                let addresses = move || server.upgrade().map(|server| server.relay_addresses()).unwrap_or_default();
                self.dht.announcer(topic.key(), self.key_pair.clone(), Arc::new(addresses))
            });
            announcer.announced()
        };
        announced.await;
        Ok(())
    }

    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError> {
        let announcer = self.announced().remove(topic);
        if let Some(announcer) = announcer {
            // Announcements that remain expire by themselves.
            let _ = time::timeout(LEAVE, announcer.stop()).await;
        }
        Ok(())
    }

    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError> {
        let named = |peer: Peer| (PublicKey(peer.public_key.0), peer.relay_addresses);
        // In a network of two or three nodes, this node may store the only record.
        let mut found: BTreeMap<_, _> = self.dht.kept_peers(&topic.key()).into_iter().map(named).collect();
        let mut replies = self.dht.lookup(topic.key());
        let all = async {
            loop {
                let timeout = if found.is_empty() { LOOKUP } else { NEXT_REPLY };
                let Ok(Some(reply)) = time::timeout(timeout, replies.next()).await else { return };
                found.extend(reply.peers.into_iter().map(named));
            }
        };
        let _ = time::timeout(LOOKUP, all).await;
        let keys = in_turns(&found, &crypto::random());
        self.hints.learn(found);
        Ok(keys)
    }

    fn remembered(&self) -> Vec<PublicKey> {
        self.remembered.clone()
    }
}

fn foreign(key: PublicKey) -> crypto::PublicKey {
    crypto::PublicKey(key.0)
}

/// A connection. It ends when it, its streams and its unanswered requests are all dropped.
struct HyperswarmConnection {
    remote_key: PublicKey,
    mux: Protomux,
    rpc: Rpc,
    /// What the peer opens; `None` if this node dialled. The side that dials sends requests and receives none.
    opened: Option<Opened>,
    watches: Watches,
    closed: AtomicBool,
}

struct Opened {
    requests: Requests,
    streams: Pairing,
}

impl HyperswarmConnection {
    /// Takes over a connection. `server_key` is the key of the dialled side, which names the channel of requests.
    fn over(stream: SecretStream, server_key: PublicKey, takes_calls: bool) -> Option<Self> {
        let remote_key = PublicKey(stream.remote_key().0);
        let options = protomux::Options {
            channels_max: CHANNELS_MAX,
            incoming_max: INCOMING_MAX,
            pending_bytes_max: if takes_calls { strangers::STREAMS_BYTES } else { PENDING_BYTES_MAX },
            ..protomux::Options::default()
        };
        let mux = Protomux::new(stream, options);
        let rpc_options = if takes_calls { strangers::request_options() } else { hyperswarm_rpc::Options::default() };
        let (rpc, requests) = Rpc::open(&mux, &server_key.0, &rpc_options).ok()?;
        let opened = takes_calls.then(|| Opened { requests, streams: mux.pair(STREAM_PROTOCOL, None) });
        mux.start();
        let watches = Watches::of(mux.stream().stream());
        Some(Self { remote_key, mux, rpc, opened, watches, closed: AtomicBool::new(false) })
    }

    fn channel(&self, channel: protomux::Channel) -> HyperswarmChannel {
        HyperswarmChannel { channel, _watch: self.watches.watch() }
    }

    async fn take(&self, opened: &Opened) -> Option<Incoming> {
        loop {
            tokio::select! {
                // Requests come first, so that an introduction sent before a stream is handled before it.
                biased;
                request = opened.requests.next() => {
                    if let Some(request) = incoming_request(request?) {
                        return Some(request);
                    }
                }
                stream = opened.streams.next() => {
                    // A stream that its opener has closed already can be skipped.
                    if let Ok(channel) = stream?.accept(channel_options(REQUEST_QUEUE_BYTES, Overflow::Wait)) {
                        return Some(Incoming::Channel(Box::new(self.channel(channel))));
                    }
                }
            }
        }
    }
}

#[async_trait]
impl Connection for HyperswarmConnection {
    fn remote_key(&self) -> PublicKey {
        self.remote_key
    }

    async fn request(&self, method: &str, body: Bytes) -> Result<Bytes, RequestError> {
        let _watch = self.watches.watch();
        match self.rpc.request(method, &hyperswarm_rpc::encode_buffer(&body)).await {
            Ok(value) => hyperswarm_rpc::decode_buffer(&value).map_err(|_| garbled().into()),
            Err(hyperswarm_rpc::RequestError::Remote(error)) => Err(wire_error(*error).into()),
            Err(hyperswarm_rpc::RequestError::TooLong) => {
                Err(WireError::new(ErrorCode::RequestTooLarge, "the request has more than 16 MiB").into())
            }
            Err(hyperswarm_rpc::RequestError::Closed) => {
                self.closed.store(true, Ordering::Relaxed);
                Err(TransportError::Closed.into())
            }
        }
    }

    async fn open_channel(&self) -> Result<Box<dyn Channel>, TransportError> {
        let id = crypto::random::<16>();
        let options = channel_options(RESPONSE_QUEUE_BYTES, Overflow::Close);
        let channel = self.mux.open(STREAM_PROTOCOL, &id, options).map_err(|_| TransportError::Closed)?;
        Ok(Box::new(self.channel(channel)))
    }

    async fn next(&self) -> Option<Incoming> {
        let next = match &self.opened {
            Some(opened) => self.take(opened).await,
            None => {
                self.mux.closed().await;
                None
            }
        };
        if next.is_none() {
            self.closed.store(true, Ordering::Relaxed);
        }
        next
    }

    fn secret(&self) -> [u8; 32] {
        self.mux.stream().export(b"tether/hello")
    }

    fn allow_requests(&self, bytes_max: usize) {
        strangers::allow_requests(&self.mux, bytes_max);
    }

    fn trust(&self) {
        strangers::lift(&self.mux, &self.rpc);
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed) || self.mux.is_closed()
    }

    fn has_peer_ended(&self) -> bool {
        self.mux.stream().stream().and_then(udx::Stream::error) == Some(StreamError::PortClosed)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.mux.destroy();
    }
}

fn channel_options(queue_bytes_max: usize, overflow: Overflow) -> ChannelOptions {
    ChannelOptions { queue_bytes_max, overflow, ..ChannelOptions::default() }
}

/// Converts a request. Returns `None` for one that needs no further handling.
fn incoming_request(request: IncomingRequest) -> Option<Incoming> {
    if request.is_event() {
        // Events expect no response. Tether nodes send none.
        return None;
    }
    let method = request.method().to_owned();
    let Ok(body) = hyperswarm_rpc::decode_buffer(request.value()) else {
        let cause = Cause::new("the value is not a length-prefixed JSON text", ErrorCode::InvalidValue.as_str());
        let _ = request.error(&RemoteError::not_decoded(cause));
        return None;
    };
    let (_, reply) = request.into_parts();
    Some(Incoming::Request { method, body, reply: Box::new(HyperswarmReply(Some(reply))) })
}

/// Sends the answer to a request.
struct HyperswarmReply(Option<hyperswarm_rpc::Reply>);

#[async_trait]
impl Reply for HyperswarmReply {
    fn send(mut self: Box<Self>, response: Result<Bytes, WireError>) {
        if let Some(reply) = self.0.take() {
            send_response(reply, response);
        }
    }

    async fn closed(&mut self) {
        if let Some(reply) = &self.0 {
            reply.closed().await;
        }
    }
}

impl Drop for HyperswarmReply {
    fn drop(&mut self) {
        if let Some(reply) = self.0.take() {
            let given_up = WireError::new(ErrorCode::Unavailable, "the call was given up, try another node");
            send_response(reply, Err(given_up));
        }
    }
}

fn send_response(reply: hyperswarm_rpc::Reply, response: Result<Bytes, WireError>) {
    // A caller that is gone needs no response. A caller that was told that its response is too long needs no other.
    let _ = match response {
        Ok(value) => reply.ok(&hyperswarm_rpc::encode_buffer(&value)),
        Err(error) => reply.error(&remote_error(&error)),
    };
}

/// Encodes an error so that a plain `@hyperswarm/rpc` client sees its message and code as the cause, and a Tether node
/// sees all of it.
fn remote_error(error: &WireError) -> RemoteError {
    let mut cause = Cause::new(error.message.clone(), error.code.as_str());
    cause.context = String::from_utf8(codec::encode(error)).unwrap_or_default();
    if error.code == ErrorCode::UnknownMethod {
        return RemoteError { message: error.message.clone(), code: UNKNOWN_METHOD.to_owned(), cause: Some(cause) };
    }
    RemoteError::failed(cause)
}

fn wire_error(error: RemoteError) -> WireError {
    let refusal = error.cause.as_ref().and_then(|cause| codec::decode(cause.context.as_bytes()).ok());
    refusal.unwrap_or_else(|| match error.code.as_str() {
        UNKNOWN_METHOD => WireError::new(ErrorCode::UnknownMethod, "the peer knows no such method"),
        _ => garbled(),
    })
}

fn garbled() -> WireError {
    WireError::new(ErrorCode::InternalError, "a part of the network sent an invalid answer")
}

/// The channel of one stream.
struct HyperswarmChannel {
    channel: protomux::Channel,
    _watch: Watch,
}

impl fmt::Debug for HyperswarmChannel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("HyperswarmChannel")
    }
}

#[async_trait]
impl Channel for HyperswarmChannel {
    async fn send(&self, message: Bytes) -> bool {
        self.channel.room().await.is_ok() && self.try_send(message)
    }

    fn try_send(&self, message: Bytes) -> bool {
        self.channel.send(FRAME, &[&message]).is_ok()
    }

    async fn receive(&self) -> Option<Bytes> {
        loop {
            let message = self.channel.receive().await?;
            if message.kind == FRAME {
                return Some(message.payload);
            }
            // A message of another kind belongs to a later version of the protocol.
        }
    }

    fn try_receive(&self) -> Option<Bytes> {
        let message = self.channel.try_receive()?;
        (message.kind == FRAME).then_some(message.payload)
    }
}

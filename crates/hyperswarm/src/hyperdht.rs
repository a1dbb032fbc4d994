//! Stores records, announces peers and opens connections by public key, on top of [`crate::dht_rpc`]. Compatible with
//! the Node package `hyperdht`.
//!
//! A server announces itself to the three nodes closest to the hash of its public key. These nodes become its relays. A
//! client finds them by walking the DHT and sends them a Noise handshake message, which they forward to the server. The
//! server's response gives each side the address and the stream of the other. The two then connect over UDX without a
//! relay in between.

pub mod announcer;
pub mod commands;
mod connect;
#[cfg(test)]
mod golden;
pub mod handshake;
pub mod holepunch;
pub mod noise_payload;
pub mod persistent;
pub mod records;
mod request_handler;
pub mod router;
mod server;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::announcer::{RelayAddresses, TopicAnnouncer};
use self::connect::KnownAddresses;
pub use self::connect::{ConnectError, ConnectOptions, Step};
use self::persistent::Limits;
use self::records::{FindPeer, Lookup, MutableValue, Peer, StoreError};
use self::request_handler::RequestHandler;
pub use self::server::{FirewallRule, ListenError, Server, ServerOptions};
use crate::crypto::{KeyPair, PublicKey};
use crate::dht_rpc::{self, DhtRpc, Id};
use crate::secret_stream::SecretStream;
use crate::udx::Udx;

/// Configuration of a DHT node.
#[derive(Debug, Clone)]
pub struct Config {
    /// The address to bind to. Port 0 takes any free port. Starting fails if another port is in use.
    pub bind: SocketAddrV4,
    /// Bootstrap nodes. An empty list starts a new network.
    pub bootstrap: Vec<SocketAddrV4>,
    /// Nodes from an earlier run ([`HyperDht::routing_nodes`]), used in addition to `bootstrap`.
    pub known_nodes: Vec<SocketAddrV4>,
    /// Addresses at which servers were found in an earlier run ([`HyperDht::known_addresses`]).
    pub known_addresses: Vec<(PublicKey, Vec<SocketAddrV4>)>,
    /// Whether the node stays out of other nodes' routing tables, as clients and short-lived programs should.
    pub ephemeral: bool,
    /// Whether others may be unable to reach the node. `None` lets the node detect it.
    pub firewalled: Option<bool>,
    /// The address at which others reach this node, if it is known for certain. It wins over whatever other nodes
    /// report. Its port is ignored: others see and reach the port that the node is bound to.
    pub public_address: Option<SocketAddrV4>,
    /// The sustained number of requests per second that one source may send.
    pub requests_per_second: u32,
    /// The number of requests that one source may send in a burst.
    pub requests_burst: u32,
    /// How much a persistent node stores for others.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        let rpc = dht_rpc::Config::default();
        Self {
            bind: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
            bootstrap: Vec::new(),
            known_nodes: Vec::new(),
            known_addresses: Vec::new(),
            ephemeral: true,
            firewalled: None,
            public_address: None,
            requests_per_second: rpc.requests_per_second,
            requests_burst: rpc.requests_burst,
            limits: Limits::default(),
        }
    }
}

impl Config {
    fn rpc(&self) -> dht_rpc::Config {
        dht_rpc::Config {
            host: *self.bind.ip(),
            port: self.bind.port(),
            any_port: self.bind.port() == 0,
            bootstrap: self.bootstrap.clone(),
            known_nodes: self.known_nodes.clone(),
            ephemeral: Some(self.ephemeral),
            firewalled: self.firewalled.unwrap_or(true),
            public_address: self.public_address,
            requests_per_second: self.requests_per_second,
            requests_burst: self.requests_burst,
            ..dht_rpc::Config::default()
        }
    }
}

/// A node of the DHT. Clones refer to the same node.
#[derive(Clone)]
pub struct HyperDht {
    shared: Arc<Shared>,
}

/// State shared by the clones of a node, its servers and its connecting clients.
struct Shared {
    rpc: DhtRpc,
    udx: Udx,
    request_handler: Arc<RequestHandler>,
    known: Mutex<KnownAddresses>,
    public_address: Option<SocketAddrV4>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, KnownAddresses> {
        self.known.lock()
    }

    /// Returns the address at which this node reaches itself.
    fn own_address(&self) -> SocketAddrV4 {
        let mut address = self.rpc.server_socket().local_address();
        if address.ip().is_unspecified() {
            address.set_ip(Ipv4Addr::LOCALHOST);
        }
        address
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl HyperDht {
    /// Opens the sockets and starts looking for other nodes. Must be called within a Tokio runtime.
    pub fn start(config: Config) -> io::Result<Self> {
        let (udx, request_handler) = (Udx::new(), Arc::new(RequestHandler::new(config.limits)));
        let rpc = DhtRpc::start(config.rpc(), udx.clone(), request_handler.clone())?;
        let mut known = KnownAddresses::default();
        for (server, addresses) in config.known_addresses {
            known.set(server, addresses);
        }
        let shared = Shared {
            rpc,
            udx,
            request_handler,
            known: Mutex::new(known),
            public_address: config.public_address,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Starts a bootstrap node: persistent, not firewalled, at an address that never changes.
    pub fn bootstrapper(bind: SocketAddrV4) -> io::Result<Self> {
        let config = Config { bind, ephemeral: false, firewalled: Some(false), ..Config::default() };
        Self::start(config)
    }

    /// Connects to the server that listens with `remote`'s secret key, as the owner of `key_pair`.
    ///
    /// When this returns, the server has proven that it is online and holds the key.
    pub async fn connect(
        &self,
        key_pair: &KeyPair,
        remote: PublicKey,
        options: ConnectOptions,
    ) -> Result<SecretStream, ConnectError> {
        connect::connect(&self.shared, key_pair, remote, options).await
    }

    /// Listens for connections to a key. Returns once the server is announced, or no node was found to announce it to.
    pub async fn listen(&self, key_pair: KeyPair, options: ServerOptions) -> Result<Server, ListenError> {
        server::listen(self, key_pair, options).await
    }

    /// Searches for the nodes that know a route to a server.
    pub fn find_peer(&self, server: &PublicKey) -> FindPeer {
        records::find_peer(&self.shared.rpc, server, Vec::new())
    }

    /// Returns the peers that announced a topic to this node itself. A lookup asks only the other nodes.
    pub fn kept_peers(&self, topic: &Id) -> Vec<Peer> {
        self.shared.request_handler.peers(topic)
    }

    /// Searches the other nodes for the peers that announced a topic.
    pub fn lookup(&self, topic: Id) -> Lookup {
        records::lookup(&self.shared.rpc, topic, Vec::new())
    }

    /// Announces a peer under a topic once. Returns the nodes that store the announcement, which they do for about
    /// twenty minutes.
    pub async fn announce(
        &self,
        topic: Id,
        key_pair: &KeyPair,
        relay_addresses: &[SocketAddrV4],
    ) -> Result<Vec<SocketAddrV4>, StoreError> {
        records::announce(&self.shared.rpc, topic, key_pair, relay_addresses, Vec::new()).await
    }

    /// Keeps a peer announced under a topic until the announcer is stopped or dropped.
    pub fn announcer(&self, topic: Id, key_pair: KeyPair, relay_addresses: RelayAddresses) -> TopicAnnouncer {
        TopicAnnouncer::start(self.shared.rpc.clone(), topic, key_pair, relay_addresses, &self.shared.tasks)
    }

    /// Removes an announcement from every node that has it. Returns how many nodes confirmed.
    pub async fn unannounce(&self, topic: Id, key_pair: &KeyPair) -> usize {
        records::unannounce(&self.shared.rpc, topic, key_pair).await
    }

    /// Stores a value under its hash, and returns the hash.
    pub async fn immutable_put(&self, value: Bytes) -> Result<Id, StoreError> {
        records::immutable_put(&self.shared.rpc, value).await
    }

    /// Returns the value with this hash, as soon as one node has it.
    pub async fn immutable_get(&self, hash: Id) -> Option<Bytes> {
        records::immutable_get(&self.shared.rpc, hash).await
    }

    /// Stores a value under a key. `seq` must be higher than that of the value it replaces.
    pub async fn mutable_put(&self, key_pair: &KeyPair, seq: u64, value: Bytes) -> Result<(), StoreError> {
        records::mutable_put(&self.shared.rpc, key_pair, seq, value).await
    }

    /// Returns the newest value under a key whose sequence number is at least `seq_min`.
    pub async fn mutable_get(&self, public_key: &PublicKey, seq_min: u64) -> Option<MutableValue> {
        records::mutable_get(&self.shared.rpc, public_key, seq_min, true).await
    }

    /// Returns where servers were found recently, oldest first, to be passed to the next start.
    pub fn known_addresses(&self) -> Vec<(PublicKey, Vec<SocketAddrV4>)> {
        self.shared.known().all()
    }

    /// Returns persistent nodes, to be passed to the next start.
    pub fn routing_nodes(&self) -> Vec<SocketAddrV4> {
        self.shared.rpc.routing_nodes()
    }

    /// Waits until the first search for other nodes is over, whether or not it found any.
    pub async fn bootstrapped(&self) {
        self.shared.rpc.bootstrapped().await;
    }

    /// Returns the address that the node is bound to.
    pub fn local_address(&self) -> SocketAddrV4 {
        self.shared.rpc.server_socket().local_address()
    }

    /// Returns the address at which other hosts reach this node, as far as this host can tell.
    pub fn reachable_address(&self) -> SocketAddrV4 {
        let local = self.local_address();
        let public = self.shared.public_address.map(|public| SocketAddrV4::new(*public.ip(), local.port()));
        public.unwrap_or_else(|| dht_rpc::reachable(local))
    }

    /// Returns this node's address as others see it, if they can reach it there.
    pub fn remote_address(&self) -> Option<SocketAddrV4> {
        self.shared.rpc.remote_address()
    }

    /// Returns the underlying DHT node.
    pub fn rpc(&self) -> &DhtRpc {
        &self.shared.rpc
    }

    /// Removes the announcements, closes connections and closes the sockets.
    pub async fn stop(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        // Servers remove their announcements. Nodes that do not respond are not waited for.
        let _ = tokio::time::timeout(FAREWELL, self.shared.tasks.wait()).await;
        self.shared.rpc.stop().await;
        // The peers of open connections are told first, because the program may exit after this.
        let _ = tokio::time::timeout(FAREWELL, self.shared.udx.closed()).await;
    }
}

/// How long a stopping node waits for others to remove its announcements, and for its sockets to close.
const FAREWELL: Duration = Duration::from_secs(3);

impl fmt::Debug for HyperDht {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("HyperDht").field("address", &self.local_address()).finish_non_exhaustive()
    }
}

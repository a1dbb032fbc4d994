//! Requests between the nodes of a Kademlia DHT, compatible with the Node package `dht-rpc`.
//!
//! [`DhtRpc`] is one node. It keeps a routing table, responds to requests about it, and walks towards a target for a
//! [`Query`]. The commands of the layer above go to a [`Handler`]. The decisions of a node are made in [`state`], which
//! does no I/O; [`node`] carries them out.

mod aging_map;
mod congestion;
mod incoming_request;
mod message;
mod nat_sampler;
mod node;
mod own_address;
mod query;
mod rate_limit;
mod reply_budget;
mod routing_table;
mod state;
mod timeouts;
mod tokens;
mod walk;

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

pub use self::aging_map::AgingMap;
pub use self::incoming_request::{DhtRequest, ReplyOptions};
pub use self::message::{INVALID_TOKEN, Id, Message, Request, Response, Token, UNKNOWN_COMMAND, node_id};
pub use self::nat_sampler::{NatSampler, Reflexive};
pub use self::own_address::reachable;
pub use self::query::{Query, QueryStream};
pub use self::routing_table::K;

use self::message::{DELAYED_PING, PING};
use self::node::{Node, Waiting};
use self::state::{State, Via};
use crate::crypto::random;
use crate::udx::{Datagram, Socket, Udx};

/// The conventional port of the DHT.
pub const DEFAULT_PORT: u16 = 49_737;

/// Configuration of a node.
#[derive(Debug, Clone)]
pub struct Config {
    /// The address to bind to. `127.0.0.1` confines a test network to this host.
    pub host: Ipv4Addr,
    /// The first of five ports to try. Port 0 takes any free port.
    pub port: u16,
    /// Whether to take any free port if all five are in use.
    pub any_port: bool,
    /// Bootstrap nodes. An empty list starts a new network.
    pub bootstrap: Vec<SocketAddrV4>,
    /// Nodes from an earlier run, so that this node can join even if no bootstrap node responds.
    pub known_nodes: Vec<SocketAddrV4>,
    /// Whether the node stays out of other nodes' routing tables. `None` makes it persistent once it has proven stable
    /// and reachable.
    pub ephemeral: Option<bool>,
    /// Whether others may be unable to reach the node. `true` lets the node detect it.
    pub firewalled: bool,
    /// Whether to check for a firewall as soon as the first node responds.
    pub quick_firewall: bool,
    /// The address at which others reach this node, if it is known for certain, as for a bootstrap node. It wins over
    /// whatever other nodes report. Its port is ignored: others see and reach the port that the node is bound to.
    pub public_address: Option<SocketAddrV4>,
    /// How long a node must have run before it becomes persistent.
    pub stable_after: Duration,
    /// How many nodes a query asks at once.
    pub concurrency: usize,
    /// How many requests may be in flight, per slot of 750 ms.
    pub window_max: usize,
    /// The sustained number of requests per second that one source may send.
    pub requests_per_second: u32,
    /// The number of requests that one source may send in a burst.
    pub requests_burst: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            host: Ipv4Addr::UNSPECIFIED,
            port: DEFAULT_PORT,
            any_port: true,
            bootstrap: Vec::new(),
            known_nodes: Vec::new(),
            ephemeral: None,
            firewalled: true,
            quick_firewall: true,
            public_address: None,
            stable_after: Duration::from_mins(20),
            concurrency: 10,
            window_max: 80,
            requests_per_second: 500,
            requests_burst: 1_000,
        }
    }
}

impl Config {
    /// Returns the configuration of a bootstrap node: persistent, not firewalled, at an address that never changes.
    pub fn bootstrapper(address: SocketAddrV4) -> Self {
        Self {
            host: *address.ip(),
            port: address.port(),
            any_port: address.port() == 0,
            ephemeral: Some(false),
            firewalled: false,
            ..Self::default()
        }
    }

    /// Returns the configured address, with the port that the node is bound to.
    fn configured_address(&self, server: SocketAddrV4) -> Option<SocketAddrV4> {
        self.public_address.map(|public| SocketAddrV4::new(*public.ip(), server.port()))
    }

    /// Returns the address that a node which has asked nobody yet takes for its own.
    fn first_address(&self, server: SocketAddrV4) -> Option<SocketAddrV4> {
        // The first node of a network has no other node to ask and must respond at once. It uses the address it is
        // bound to, or the host's own address if it is bound to every address.
        let own = reachable(server);
        let is_sure = !self.host.is_unspecified() || self.ephemeral == Some(false);
        let is_first = is_sure && self.bootstrap.iter().all(|node| *node == own);
        (!self.firewalled && (is_first || self.host.is_loopback())).then_some(own)
    }
}

/// Handles the commands of the layer above. Called from the task that reads datagrams, so it must not block.
pub trait Handler: Send + Sync {
    /// Handles a request. Responds to a command that it does not know with [`UNKNOWN_COMMAND`].
    fn on_request(&self, request: DhtRequest);
}

/// A handler that knows no commands, for a node that only keeps a routing table.
#[derive(Debug, Default)]
pub struct NoCommands;

impl Handler for NoCommands {
    fn on_request(&self, request: DhtRequest) {
        request.error(UNKNOWN_COMMAND);
    }
}

/// A request to one node.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// The command.
    pub command: u64,
    /// What the command is about.
    pub target: Option<Id>,
    /// The token that the node issued before, if the node is asked to store something.
    pub token: Option<Token>,
    /// The value, in the command's format.
    pub value: Option<Bytes>,
}

impl Call {
    /// Makes a request with a command alone.
    pub fn new(command: u64) -> Self {
        Self { command, ..Self::default() }
    }
}

/// Options of a request.
#[derive(Clone, Default)]
pub struct RequestOptions {
    /// The socket to send from instead of the node's own. Datagrams that it receives must go to [`DhtRpc::receive`].
    pub socket: Option<Socket>,
    /// How often to resend, instead of three times.
    pub retries: Option<u8>,
    /// How long to wait for a response to each copy, instead of the estimate from the node's earlier responses.
    pub timeout: Option<Duration>,
}

/// The response of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DhtReply {
    /// The address of the node that responded.
    pub from: SocketAddrV4,
    /// The node's id, if it is persistent.
    pub from_id: Option<Id>,
    /// This node's address as the other node sees it.
    pub to: SocketAddrV4,
    /// Whether the response came to the server socket, which a node asks from only if it is not firewalled.
    pub on_server_socket: bool,
    /// The round-trip time.
    pub rtt: Duration,
    /// The token to send back with a request to store something.
    pub token: Option<Token>,
    /// Nodes closer to the target.
    pub closer_nodes: Vec<SocketAddrV4>,
    /// The error code, or 0.
    pub error: u64,
    /// The value, in the command's format.
    pub value: Option<Bytes>,
}

/// Why a request has no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DhtRequestError {
    /// The node did not respond to any of several copies.
    #[error("the node does not answer")]
    Timeout,
    /// Too many requests are in flight.
    #[error("too many requests are on their way")]
    Busy,
    /// This node was stopped.
    #[error("this node was stopped")]
    Stopped,
}

/// A node of the DHT. Clones refer to the same node, which stops when the last clone is dropped.
#[derive(Clone)]
pub struct DhtRpc {
    node: Arc<Node>,
    _stop_on_drop: Arc<DropGuard>,
}

impl DhtRpc {
    /// Opens the sockets and starts looking for other nodes. Must be called within a Tokio runtime.
    pub fn start(config: Config, udx: Udx, handler: Arc<dyn Handler>) -> io::Result<Self> {
        let (server, server_datagrams) = bind_server(&config, &udx)?;
        let (client, client_datagrams) = udx.bind(SocketAddrV4::new(config.host, 0))?;
        let state = State::new(&config, server.local_address(), Instant::now(), random::<256>);
        let stop = CancellationToken::new();
        let node = Arc::new(Node {
            client,
            server,
            handler,
            state: Mutex::new(state),
            waiting: Waiting::default(),
            concurrency: config.concurrency.max(1),
            quick_firewall: config.quick_firewall,
            forced: config.ephemeral == Some(false),
            hurry: Notify::new(),
            bootstrapped: watch::Sender::new(false),
            stop: stop.clone(),
            tasks: TaskTracker::new(),
        });
        node.tasks.spawn(node.clone().receive_all(Via::Server, server_datagrams));
        node.tasks.spawn(node.clone().receive_all(Via::Client, client_datagrams));
        node.tasks.spawn(node.clone().keep_time());
        let bootstrap = stop.clone().run_until_cancelled_owned(node.clone().bootstrap());
        node.tasks.spawn(bootstrap);
        Ok(Self { node, _stop_on_drop: Arc::new(stop.drop_guard()) })
    }

    /// Sends a request to one node and waits for the response, which may be an error from that node.
    pub async fn request(&self, call: Call, to: SocketAddrV4) -> Result<DhtReply, DhtRequestError> {
        self.request_with(call, to, RequestOptions::default()).await
    }

    /// Like [`request`](Self::request), with options.
    pub async fn request_with(
        &self,
        call: Call,
        to: SocketAddrV4,
        options: RequestOptions,
    ) -> Result<DhtReply, DhtRequestError> {
        self.node.request(&call, to, options, false).await
    }

    /// Pings a node.
    pub async fn ping(&self, to: SocketAddrV4, options: RequestOptions) -> Result<DhtReply, DhtRequestError> {
        self.node.request(&Call::new(PING), to, options, true).await
    }

    /// Asks a node to respond to a ping after a delay of at most ten seconds.
    pub async fn delayed_ping(&self, to: SocketAddrV4, delay: Duration) -> Result<DhtReply, DhtRequestError> {
        let millis = u32::try_from(delay.as_millis()).unwrap_or(u32::MAX);
        let call = Call { value: Some(millis.to_le_bytes().to_vec().into()), ..Call::new(DELAYED_PING) };
        let timeout = Some(delay + Duration::from_secs(1));
        self.node.request(&call, to, RequestOptions { timeout, ..RequestOptions::default() }, true).await
    }

    /// Walks towards a target and queries the nodes on the way.
    pub fn query(&self, query: Query) -> QueryStream {
        self.node.with(State::postpone_refresh);
        QueryStream::new(self.node.clone(), query)
    }

    /// Handles a datagram that arrived at a socket which a caller lent for a request.
    pub fn receive(&self, socket: &Socket, datagram: Datagram) {
        self.node.receive(&self.node.via_of(socket), datagram);
    }

    /// Returns this node's address as others see it, if they can reach it there.
    pub fn remote_address(&self) -> Option<SocketAddrV4> {
        self.node.with(|state| state.remote_address())
    }

    /// Returns this node's address as it is configured, or else as other nodes report it. They may be unable to reach
    /// it there.
    pub fn reflexive_address(&self) -> Option<Reflexive> {
        self.node.with(|state| state.own_address())
    }

    /// Returns this node's id, once the node is persistent.
    pub fn id(&self) -> Option<Id> {
        self.node.with(|state| state.id())
    }

    /// Returns whether this node is persistent.
    pub fn is_persistent(&self) -> bool {
        self.node.with(|state| !state.ephemeral)
    }

    /// Returns whether others may be unable to reach this node.
    pub fn is_firewalled(&self) -> bool {
        self.node.with(|state| state.firewalled)
    }

    /// Returns the socket that this node sends from.
    pub fn socket(&self) -> Socket {
        self.node.socket(&self.node.with(|state| state.via())).clone()
    }

    /// Returns the socket at which a node without a firewall is reached.
    pub fn server_socket(&self) -> Socket {
        self.node.server.clone()
    }

    /// Returns the socket that a firewalled node sends from.
    pub fn client_socket(&self) -> Socket {
        self.node.client.clone()
    }

    /// Returns persistent nodes, the most recently heard first, to be passed as `known_nodes` to the next start.
    pub fn routing_nodes(&self) -> Vec<SocketAddrV4> {
        self.node.with(|state| state.routing_nodes())
    }

    /// Waits until the first walk is over, whether or not it found any node.
    pub async fn bootstrapped(&self) {
        let mut bootstrapped = self.node.bootstrapped.subscribe();
        self.node.stop.run_until_cancelled(bootstrapped.wait_for(|done| *done)).await.map(drop).unwrap_or_default();
    }

    /// Returns whether the node was stopped.
    pub fn is_stopped(&self) -> bool {
        self.node.stop.is_cancelled()
    }

    /// Ends all requests and closes the sockets.
    pub async fn stop(&self) {
        self.node.stop.cancel();
        self.node.with(State::stop);
        self.node.tasks.close();
        self.node.tasks.wait().await;
        self.node.server.close();
        self.node.client.close();
    }
}

impl std::fmt::Debug for DhtRpc {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("DhtRpc").field("server", &self.node.server.local_address()).finish_non_exhaustive()
    }
}

/// Binds the first free one of five ports, so that a restarted node is usually found at its old address.
fn bind_server(config: &Config, udx: &Udx) -> io::Result<(Socket, mpsc::Receiver<Datagram>)> {
    let mut last_error = None;
    let ports = if config.port == 0 { 0..0 } else { config.port..config.port.saturating_add(5) };
    for port in ports {
        match udx.bind(SocketAddrV4::new(config.host, port)) {
            Ok(bound) => return Ok(bound),
            Err(error) => last_error = Some(error),
        }
        if !config.any_port {
            break;
        }
    }
    match last_error {
        Some(error) if !config.any_port => Err(error),
        _ => udx.bind(SocketAddrV4::new(config.host, 0)),
    }
}

#[cfg(test)]
pub(crate) mod tests;

//! Requests between the nodes of a Kademlia table, compatible with the Node package `dht-rpc`.
//!
//! [`DhtRpc`] is one node: it keeps a table of other nodes, answers what they ask about it, and walks towards a target
//! for a [`Query`]. The commands of the layer above go to a [`Handler`]. What a node decides is in [`state`], which
//! does no I/O; [`node`] acts on it.

mod aging_map;
mod congestion;
mod incoming_request;
mod message;
mod nat_sampler;
mod node;
mod own_address;
mod query;
mod rate_limit;
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

/// The port that nodes use by custom.
pub const DEFAULT_PORT: u16 = 49_737;

/// What a node is to be.
#[derive(Debug, Clone)]
pub struct Config {
    /// The address to bind to. `127.0.0.1` keeps a test network to itself.
    pub host: Ipv4Addr,
    /// The first of five ports to try. 0 takes any.
    pub port: u16,
    /// Whether any port will do when those are taken.
    pub any_port: bool,
    /// Nodes that know others. None starts a network of its own.
    pub bootstrap: Vec<SocketAddrV4>,
    /// Nodes from an earlier run, so that this one finds the network without the bootstrap nodes as well.
    pub known_nodes: Vec<SocketAddrV4>,
    /// Whether the node stays out of other nodes' tables. `None` lets it in once it has proven stable and reachable.
    pub ephemeral: Option<bool>,
    /// Whether others may be unable to reach the node. `true` lets it find out.
    pub firewalled: bool,
    /// Whether to look for a firewall as soon as the first node answers.
    pub quick_firewall: bool,
    /// The address that others reach this node at, where that is certain, as for a bootstrap node.
    pub public_address: Option<SocketAddrV4>,
    /// How long a node must have run before it becomes a lasting part of the table.
    pub stable_after: Duration,
    /// How many nodes a query asks at once.
    pub concurrency: usize,
    /// How many requests may be on their way without an answer, per 750 ms.
    pub window_max: usize,
    /// How many requests per second one source may send lastingly.
    pub requests_per_second: u32,
    /// How many requests one source may send at once.
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
    /// A node that others begin with: lasting and open, at an address that never changes.
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

    /// Returns the address that others see for sure, if the node knows it.
    fn known_public_address(&self, server: SocketAddrV4) -> Option<SocketAddrV4> {
        // The first node of a network has nobody to ask and must answer at once: it goes by what it is bound to, and by
        // the machine's own address where that is every address.
        let own = reachable(server);
        let is_sure = !self.host.is_unspecified() || self.ephemeral == Some(false);
        let is_first = is_sure && self.bootstrap.iter().all(|node| *node == own);
        let bound = (!self.firewalled && (is_first || self.host.is_loopback())).then_some(own);
        self.public_address.map(|public| SocketAddrV4::new(*public.ip(), server.port())).or(bound)
    }
}

/// Answers the commands of the layer above. Called where datagrams are read, so it must not block.
pub trait Handler: Send + Sync {
    /// Takes a request. Whoever does not know its command answers [`UNKNOWN_COMMAND`].
    fn on_request(&self, request: DhtRequest);
}

/// A handler that knows no commands: a node that only keeps a table.
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
    /// What to do.
    pub command: u64,
    /// What it is about.
    pub target: Option<Id>,
    /// What the node gave out before, where it is asked to store something.
    pub token: Option<Token>,
    /// The rest, as the command wants it.
    pub value: Option<Bytes>,
}

impl Call {
    /// Starts with a command alone.
    pub fn new(command: u64) -> Self {
        Self { command, ..Self::default() }
    }
}

/// How a request differs from a plain one.
#[derive(Clone, Default)]
pub struct RequestOptions {
    /// The socket to send from instead of the node's own. What comes back to it must go to [`DhtRpc::receive`].
    pub socket: Option<Socket>,
    /// How often to send it again, instead of three times.
    pub retries: Option<u8>,
    /// How long to wait for an answer to each copy, instead of what the node's earlier answers suggest.
    pub timeout: Option<Duration>,
}

/// What a node answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DhtReply {
    /// Who answered.
    pub from: SocketAddrV4,
    /// The node's id, where it is a lasting part of the table.
    pub from_id: Option<Id>,
    /// This node's address as the other sees it.
    pub to: SocketAddrV4,
    /// Whether it came to the server socket, which only an open node asks from.
    pub on_server_socket: bool,
    /// How long it took.
    pub rtt: Duration,
    /// What to send back before anything is stored.
    pub token: Option<Token>,
    /// Nodes closer to the target.
    pub closer_nodes: Vec<SocketAddrV4>,
    /// Why the node refused, or 0.
    pub error: u64,
    /// The rest, as the command has it.
    pub value: Option<Bytes>,
}

/// Why a request has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DhtRequestError {
    /// The node was asked several times.
    #[error("the node does not answer")]
    Timeout,
    /// More requests are on their way than a node may have.
    #[error("too many requests are on their way")]
    Busy,
    /// This node was stopped.
    #[error("this node was stopped")]
    Stopped,
}

/// A node of the table. Clones are the same node, which stops when the last of them is gone.
#[derive(Clone)]
pub struct DhtRpc {
    node: Arc<Node>,
    _stop_on_drop: Arc<DropGuard>,
}

impl DhtRpc {
    /// Opens the sockets and begins to look for other nodes. Call it within a Tokio runtime.
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

    /// Sends a request to one node and waits for the answer, which may be an error of the node.
    pub async fn request(&self, call: Call, to: SocketAddrV4) -> Result<DhtReply, DhtRequestError> {
        self.request_with(call, to, RequestOptions::default()).await
    }

    /// Does the same as [`request`](Self::request) with options.
    pub async fn request_with(
        &self,
        call: Call,
        to: SocketAddrV4,
        options: RequestOptions,
    ) -> Result<DhtReply, DhtRequestError> {
        self.node.request(&call, to, options, false).await
    }

    /// Asks a node for a sign of life.
    pub async fn ping(&self, to: SocketAddrV4, options: RequestOptions) -> Result<DhtReply, DhtRequestError> {
        self.node.request(&Call::new(PING), to, options, true).await
    }

    /// Asks a node for a sign of life after a delay of at most ten seconds.
    pub async fn delayed_ping(&self, to: SocketAddrV4, delay: Duration) -> Result<DhtReply, DhtRequestError> {
        let millis = u32::try_from(delay.as_millis()).unwrap_or(u32::MAX);
        let call = Call { value: Some(millis.to_le_bytes().to_vec().into()), ..Call::new(DELAYED_PING) };
        let timeout = Some(delay + Duration::from_secs(1));
        self.node.request(&call, to, RequestOptions { timeout, ..RequestOptions::default() }, true).await
    }

    /// Walks towards a target and asks the nodes on the way.
    pub fn query(&self, query: Query) -> QueryStream {
        self.node.with(State::postpone_refresh);
        QueryStream::new(self.node.clone(), query)
    }

    /// Takes a datagram that came to a socket which somebody lent for a request.
    pub fn receive(&self, socket: &Socket, datagram: Datagram) {
        self.node.receive(&self.node.via_of(socket), datagram);
    }

    /// Returns this node's address as others see it, where they can reach it.
    pub fn remote_address(&self) -> Option<SocketAddrV4> {
        self.node.with(|state| state.remote_address())
    }

    /// Returns what other nodes say about this node's address, whether or not they can reach it.
    pub fn reflexive_address(&self) -> Option<Reflexive> {
        self.node.with(|state| state.sampler.address())
    }

    /// Returns this node's id, once it is a lasting part of the table.
    pub fn id(&self) -> Option<Id> {
        self.node.with(|state| state.id())
    }

    /// Returns whether this node is a lasting part of the table.
    pub fn is_persistent(&self) -> bool {
        self.node.with(|state| !state.ephemeral)
    }

    /// Returns whether others may be unable to reach this node.
    pub fn is_firewalled(&self) -> bool {
        self.node.with(|state| state.firewalled)
    }

    /// Returns the socket that this node talks from.
    pub fn socket(&self) -> Socket {
        self.node.socket(&self.node.with(|state| state.via())).clone()
    }

    /// Returns the socket that an open node is reached at.
    pub fn server_socket(&self) -> Socket {
        self.node.server.clone()
    }

    /// Returns the socket that a node behind a firewall talks from.
    pub fn client_socket(&self) -> Socket {
        self.node.client.clone()
    }

    /// Returns nodes that last, those heard last first, for `known_nodes` of another start.
    pub fn routing_nodes(&self) -> Vec<SocketAddrV4> {
        self.node.with(|state| state.routing_nodes())
    }

    /// Waits until the first walk is over, whether or not it met anyone.
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

/// Binds the first free of five ports, so that a node that starts again is found where it was.
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

//! Accepts connections that are addressed to a public key.
//!
//! Each server has one task that responds to handshakes. A connection is handed out only after the client's first
//! encrypted frame has arrived, so an incomplete handshake never becomes a connection.

mod response_cache;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Mutex, mpsc};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, trace};

use self::response_cache::ResponseCache;
use super::HyperDht;
use super::announcer::Announcer;
use super::noise_payload::{Firewall, NoisePayload, Refusal, UdxInfo};
use super::request_handler::act;
use super::router::Back;
use crate::crypto::noise::{Responder, Session};
use crate::crypto::{KeyPair, PublicKey, hash, namespace};
use crate::dht_rpc::{DhtRequest, DhtRpc};
use crate::secret_stream::{self, SecretStream};
use crate::udx::{self, Udx};

/// How long a client may take from the response to its first encrypted frame.
const HALF_OPEN: Duration = Duration::from_secs(10);

/// The maximum number of connections between response and first frame. More evict the oldest.
const HALF_OPEN_MAX: usize = 1024;

/// To how many clients of one host a server sends first, before they have sent on the stream. A client's address may be
/// another host's, so further clients must send first.
const SENT_FIRST_MAX: usize = 64;

/// The maximum number of handshakes queued for the server's task. Further ones are dropped, and clients retry.
const INBOX_MAX: usize = 256;

/// Returns whether to reject a client, given its proven key and its address. Must not block.
pub type FirewallRule = Arc<dyn Fn(&PublicKey, SocketAddrV4) -> bool + Send + Sync>;

/// Options of a server.
#[derive(Clone)]
pub struct ServerOptions {
    /// Which clients to reject. A rejected client is told at once.
    pub firewall: Option<FirewallRule>,
    /// Options of the encrypted streams.
    pub stream: secret_stream::Options,
    /// Options of the streams below them.
    pub udx: udx::StreamOptions,
    /// How many connections may wait for [`Server::accept`]. Further ones are closed.
    pub backlog_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            firewall: None,
            stream: secret_stream::Options::default(),
            udx: udx::StreamOptions::default(),
            backlog_max: 256,
        }
    }
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ServerOptions")
            .field("stream", &self.stream)
            .field("udx", &self.udx)
            .field("backlog_max", &self.backlog_max)
            .finish_non_exhaustive()
    }
}

/// Why a server could not be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// Another server of this node listens with the same key.
    #[error("a server listens with this key already")]
    AlreadyListening,
    /// The node was stopped.
    #[error("the node was stopped")]
    Stopped,
}

/// A listening server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    public_key: PublicKey,
    connections: Mutex<mpsc::Receiver<SecretStream>>,
    announcer: Announcer,
    stop: CancellationToken,
    stopped: CancellationToken,
    /// Keeps the node running as long as the server exists.
    _node: HyperDht,
}

impl Server {
    /// Returns the key that clients connect to.
    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// Returns the next connection, or `None` once the server is stopped. Cancel safe.
    ///
    /// An attacker who recorded a client's handshake can replay it, but cannot read or send messages. Only the first
    /// message proves that the client is present.
    pub async fn accept(&self) -> Option<SecretStream> {
        self.connections.lock().await.recv().await
    }

    /// Returns the addresses at which clients can ask for this server: its own if it is reachable, then its relays.
    pub fn relay_addresses(&self) -> Vec<SocketAddrV4> {
        self.announcer.relay_addresses()
    }

    /// Announces the server again soon, for example after a network change.
    pub fn refresh(&self) {
        self.announcer.refresh();
    }

    /// Stops accepting connections and removes the announcements. Connections that were handed out stay open.
    pub async fn close(&self) {
        self.stop.cancel();
        self.stopped.cancelled().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A handshake on its way to the server's task.
pub(super) struct Incoming {
    pub(super) noise: Bytes,
    pub(super) back: Back,
    pub(super) request: DhtRequest,
}

/// Starts a server on a node and announces it.
pub(super) async fn listen(node: &HyperDht, key_pair: KeyPair, options: ServerOptions) -> Result<Server, ListenError> {
    let shared = &node.shared;
    if shared.stop.is_cancelled() || shared.rpc.is_stopped() {
        return Err(ListenError::Stopped);
    }
    let public_key = key_pair.public_key();
    let target = hash(&[public_key.as_bytes()]);
    let (inbox_sender, inbox) = mpsc::channel(INBOX_MAX);
    let (sender, connections) = mpsc::channel(options.backlog_max.max(1));
    if !shared.request_handler.open(target, public_key, inbox_sender) {
        return Err(ListenError::AlreadyListening);
    }
    let (stop, stopped) = (shared.stop.child_token(), CancellationToken::new());
    let announcer = Announcer::start(shared.rpc.clone(), key_pair.clone(), &shared.tasks);
    let task = ServerTask {
        key_pair,
        options,
        rpc: shared.rpc.clone(),
        udx: shared.udx.clone(),
        announcer: announcer.clone(),
        inbox,
        connections: sender,
        stop: stop.clone(),
    };
    let (request_handler, done) = (shared.request_handler.clone(), stopped.clone().drop_guard());
    let leaving = announcer.clone();
    shared.tasks.spawn(async move {
        task.run().await;
        request_handler.close(&target);
        leaving.stop().await;
        drop(done);
    });
    // From here on, dropping this future stops the server.
    let server = Server {
        public_key,
        connections: Mutex::new(connections),
        announcer,
        stop: stop.clone(),
        stopped,
        _node: node.clone(),
    };
    stop.run_until_cancelled(server.announcer.announced()).await.ok_or(ListenError::Stopped)?;
    Ok(server)
}

/// The task of a [`Server`].
struct ServerTask {
    key_pair: KeyPair,
    options: ServerOptions,
    rpc: DhtRpc,
    udx: Udx,
    announcer: Announcer,
    inbox: mpsc::Receiver<Incoming>,
    connections: mpsc::Sender<SecretStream>,
    stop: CancellationToken,
}

impl ServerTask {
    /// Responds to handshakes until the server is stopped.
    async fn run(mut self) {
        let mut responses = ResponseCache::default();
        let mut half_open: BTreeMap<u64, (udx::Stream, Option<Ipv4Addr>)> = BTreeMap::new();
        let mut opening = FuturesUnordered::new();
        let mut opened = 0_u64;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                Some((number, connection)) = opening.next(), if !opening.is_empty() => {
                    half_open.remove(&number);
                    if let Some(connection) = connection {
                        self.give_out(connection);
                    }
                }
                incoming = self.inbox.recv() => {
                    let Some(incoming) = incoming else { break };
                    let Some(mut opened_one) = self.on_handshake(&mut responses, incoming) else { continue };
                    opened += 1;
                    opened_one.send_first_within_limit(half_open.values().filter_map(|(_, host)| *host));
                    half_open.insert(opened, (opened_one.stream.clone(), opened_one.host()));
                    let number = opened;
                    let options = self.options.stream.clone();
                    opening.push(async move { (number, opened_one.open(options).await) });
                    if half_open.len() > HALF_OPEN_MAX && let Some((_, (oldest, _))) = half_open.pop_first() {
                        oldest.destroy();
                    }
                }
            }
        }
        for (stream, _) in half_open.into_values() {
            stream.destroy();
        }
    }

    /// Responds to one handshake. Returns the connection that it opens, if any.
    fn on_handshake(&self, responses: &mut ResponseCache, incoming: Incoming) -> Option<HalfOpen> {
        let Incoming { noise, back, request } = incoming;
        let (answer, half_open) =
            responses.get_or_make(&noise, Instant::now(), || self.shake_hands(&noise, back, &request))?;
        send(&request, back, &answer);
        half_open
    }

    fn shake_hands(&self, noise: &[u8], back: Back, request: &DhtRequest) -> Option<(Bytes, Option<HalfOpen>)> {
        let mut responder = Responder::new(&self.key_pair, &namespace("hyperswarm/dht", 0));
        let (payload, client) = responder
            .receive(noise)
            .inspect_err(|error| trace!(client = %back.client(), %error, "handshake dropped"))
            .ok()?;
        let payload = NoisePayload::decode(&payload).ok()?;
        let remote = match self.examine(&payload, &client, back.client()) {
            Ok(remote) => remote,
            Err(refusal) => {
                debug!(%client, address = %back.client(), ?refusal, "client turned away");
                let (answer, _) = responder.send(&NoisePayload::refusal(refusal).encode()).ok()?;
                return Some((answer.into(), None));
            }
        };
        // The stream must exist before the response is sent, because the client's first packet may arrive before the
        // next step.
        let stream = self.udx.stream(self.options.udx.clone());
        let own_address = self.rpc.remote_address();
        let answer = NoisePayload {
            // A firewalled server does not punch holes yet, so it names no relays to agree through. The client then
            // connects directly to the address at which its relay sees the server, which often works.
            firewall: own_address.map_or(Firewall::Unknown, |_| Firewall::Open),
            addresses4: own_address.into_iter().collect(),
            udx: Some(UdxInfo { reusable_socket: false, id: stream.id(), seq: 0 }),
            secret_stream: true,
            relay_addresses: self.announcer.relay_addresses(),
            ..NoisePayload::default()
        };
        let Ok((answer, session)) = responder.send(&answer.encode()) else {
            stream.destroy();
            return None;
        };
        let path = if back.is_direct() {
            Some((request.socket.clone(), back.client()))
        } else if payload.firewall == Firewall::Open {
            Some((self.rpc.socket(), back.client()))
        } else {
            None
        };
        Some((answer.into(), Some(HalfOpen { stream, remote_id: remote.id, session, path })))
    }

    /// Returns the client's stream, or the reason to reject the client.
    fn examine(&self, payload: &NoisePayload, client: &PublicKey, address: SocketAddrV4) -> Result<UdxInfo, Refusal> {
        if self.options.firewall.as_ref().is_some_and(|turns_away| turns_away(client, address)) {
            return Err(Refusal::Aborted);
        }
        if !payload.is_compatible() {
            return Err(Refusal::VersionMismatch);
        }
        payload.udx.ok_or(Refusal::Aborted)
    }

    fn give_out(&self, connection: SecretStream) {
        if let Err(error) = self.connections.try_send(connection) {
            debug!("connection closed: too many wait to be accepted");
            error.into_inner().destroy();
        }
    }
}

/// Sends a response back along the route of the handshake.
fn send(request: &DhtRequest, back: Back, noise: &[u8]) {
    act(request, back.decide(noise));
}

/// A connection whose client has not yet proven that it is present.
struct HalfOpen {
    stream: udx::Stream,
    remote_id: u32,
    session: Session,
    /// The client's address, if it can be reached before it sends.
    path: Option<(udx::Socket, SocketAddrV4)>,
}

impl HalfOpen {
    /// Returns the host that the server sends to before it has heard from it on the stream.
    fn host(&self) -> Option<Ipv4Addr> {
        self.path.as_ref().map(|(_, address)| *address.ip())
    }

    /// Waits for the client to send first if too many others of its host have not sent yet.
    fn send_first_within_limit(&mut self, hosts: impl Iterator<Item = Ipv4Addr>) {
        // All nodes of a test network run on one host, and nobody else receives what is sent there.
        let Some(host) = self.host().filter(|host| !host.is_loopback()) else { return };
        if hosts.filter(|other| *other == host).count() >= SENT_FIRST_MAX {
            self.path = None;
        }
    }

    /// Waits until the client's first encrypted frame arrives.
    async fn open(self, options: secret_stream::Options) -> Option<SecretStream> {
        let Self { stream, remote_id, session, path } = self;
        let deadline = Instant::now() + HALF_OPEN;
        let path = match path {
            Some(path) => Some(path),
            None => time::timeout_at(deadline, stream.first_packet()).await.ok().flatten(),
        };
        let Some((socket, address)) = path else {
            stream.destroy();
            return None;
        };
        stream.connect(&socket, remote_id, address);
        let connection = SecretStream::new(stream, session, options);
        match time::timeout_at(deadline, connection.opened()).await {
            Ok(Ok(())) => Some(connection),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;

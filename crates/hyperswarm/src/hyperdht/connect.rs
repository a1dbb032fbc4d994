//! Connects to a server by its public key.
//!
//! The client sends the same Noise message to every node that may know the server. It uses the first response that
//! decrypts, since only the server can have produced it. The connection counts as open once the server's first
//! encrypted frame arrives.

mod known_addresses;
mod path;

use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::time::{self, Instant};
use tracing::{debug, trace};

pub(super) use self::known_addresses::KnownAddresses;
use self::path::{Facts, Path};
use super::Shared;
use super::commands::PEER_HANDSHAKE;
use super::handshake::{Handshake, Mode};
use super::noise_payload::{Firewall, NoisePayload, Refusal, UdxInfo};
use super::records::{FindPeer, FoundPeer, find_peer};
use crate::crypto::noise::{Initiator, NoiseError, Session};
use crate::crypto::{KeyPair, PublicKey, hash, namespace};
use crate::dht_rpc::{Call, RequestOptions};
use crate::secret_stream::{self, SecretStream};
use crate::udx;

/// How many nodes are asked at once: this many from earlier connections, and as many found by the walk. The former may
/// all be gone, and must not hold up the latter.
const LANES: usize = 3;

/// How many nodes are asked before the search is given up. A server has three relays now, and had others before.
const ASKED_MAX: usize = 16;

/// How long the nodes known from earlier have before a walk searches for others as well.
const HEAD_START: Duration = Duration::from_millis(200);

/// How long a client that is not firewalled waits for a firewalled server to connect to it.
const PASSIVE: Duration = Duration::from_secs(10);

/// Options of a connection attempt.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Nodes that probably know the server, or the server itself. They are asked first.
    pub relay_addresses: Vec<SocketAddrV4>,
    /// The time limit of the whole attempt.
    pub timeout: Duration,
    /// Options of the encrypted stream.
    pub stream: secret_stream::Options,
    /// Options of the stream below it.
    pub udx: udx::StreamOptions,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            relay_addresses: Vec::new(),
            timeout: Duration::from_secs(15),
            stream: secret_stream::Options::default(),
            udx: udx::StreamOptions::default(),
        }
    }
}

/// Why connecting failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The server's key is not a valid public key.
    #[error("the key is not a valid one")]
    InvalidKey,
    /// None of the nodes that were asked knows the server.
    #[error("no node knows how to reach the server")]
    PeerNotFound,
    /// Nodes that know the server were asked, but none returned a response from the server.
    #[error("the server gave no answer to the handshake")]
    HandshakeFailed,
    /// The server refused the connection.
    #[error("the server refused the connection: {0:?}")]
    Refused(Refusal),
    /// The server speaks another version of the protocol.
    #[error("the server is not compatible")]
    Incompatible,
    /// Server and client are both firewalled.
    #[error("there is no way through the firewalls")]
    Unreachable,
    /// The server accepted the handshake but sent nothing on the stream.
    #[error("the server agreed to the connection but does not send")]
    Silent,
    /// The attempt timed out.
    #[error("there was no connection in time: {0}")]
    Timeout(Step),
    /// The node was stopped.
    #[error("the node was stopped")]
    Stopped,
}

/// The step at which a connection attempt timed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// No node that knows the server was found.
    Finding,
    /// The server had not responded to the handshake.
    Handshake,
    /// The first encrypted frame had not arrived.
    Stream,
}

impl std::fmt::Display for Step {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Finding => "the server was not found yet",
            Self::Handshake => "the server had not answered yet",
            Self::Stream => "the server had not sent anything yet",
        })
    }
}

/// Connects within the timeout of the options.
pub(super) async fn connect(
    shared: &Shared,
    key_pair: &KeyPair,
    remote: PublicKey,
    options: ConnectOptions,
) -> Result<SecretStream, ConnectError> {
    let deadline = Instant::now() + options.timeout;
    let mut step = Step::Finding;
    let attempt = Attempt::new(shared, key_pair, remote, options.udx.clone())?.run(options, &mut step);
    let connected = time::timeout_at(deadline, attempt).await;
    let result = connected.unwrap_or(Err(ConnectError::Timeout(step)));
    if let Err(error) = &result {
        debug!(%remote, %error, "no connection");
    }
    result
}

/// One connection attempt. Dropping it destroys its stream.
struct Attempt<'a> {
    shared: &'a Shared,
    remote: PublicKey,
    target: [u8; 32],
    stream: udx::Stream,
    /// The socket that sends the handshake and then carries the connection. A firewall lets responses in to no other
    /// socket.
    socket: udx::Socket,
    is_open: bool,
    initiator: Initiator,
    request: Call,
}

/// A response to the handshake from the server.
struct Answer {
    /// The node that delivered the response.
    relay: SocketAddrV4,
    /// The server's address as the relay sees it; `None` when the server itself was asked.
    server: Option<SocketAddrV4>,
    /// This node's address as the relay sees it.
    client: SocketAddrV4,
    payload: NoisePayload,
    session: Session,
}

impl<'a> Attempt<'a> {
    fn new(
        shared: &'a Shared,
        key_pair: &KeyPair,
        remote: PublicKey,
        udx: udx::StreamOptions,
    ) -> Result<Self, ConnectError> {
        let target = hash(&[remote.as_bytes()]);
        let stream = shared.udx.stream(udx);
        let own_address = shared.rpc.remote_address();
        let payload = NoisePayload {
            firewall: own_address.map_or(Firewall::Unknown, |_| Firewall::Open),
            addresses4: own_address.into_iter().collect(),
            udx: Some(UdxInfo { reusable_socket: false, id: stream.id(), seq: 0 }),
            secret_stream: true,
            ..NoisePayload::default()
        };
        let invalid = |_: NoiseError| ConnectError::InvalidKey;
        let prologue = namespace("hyperswarm/dht", 0);
        let mut initiator = Initiator::new(key_pair, remote, &prologue).map_err(invalid)?;
        let noise = initiator.send(&payload.encode()).map_err(invalid)?;
        let handshake = Handshake { mode: Mode::FromClient, noise: &noise, peer_address: None, relay_address: None };
        let request =
            Call { target: Some(target), value: Some(handshake.encode().into()), ..Call::new(PEER_HANDSHAKE) };
        let socket = shared.rpc.socket();
        Ok(Self { shared, remote, target, stream, socket, is_open: own_address.is_some(), initiator, request })
    }

    async fn run(self, options: ConnectOptions, step: &mut Step) -> Result<SecretStream, ConnectError> {
        let answer = self.find(&options.relay_addresses, step).await?;
        if !answer.payload.is_compatible() {
            return Err(ConnectError::Incompatible);
        }
        if let Some(refusal) = answer.payload.refusal {
            return Err(ConnectError::Refused(refusal));
        }
        let Some(UdxInfo { id, .. }) = answer.payload.udx else { return Err(ConnectError::Incompatible) };
        *step = Step::Stream;
        let (socket, address) = self.path(&answer).await?;
        trace!(remote = %self.remote, %address, "the server answered");
        self.stream.connect(&socket, id, address);
        let connection = SecretStream::new(self.stream, answer.session, options.stream);
        connection.opened().await.map_err(|_| ConnectError::Silent)?;
        // The server knows best, so the node that delivered the response comes last.
        let addresses = answer.payload.relay_addresses.into_iter().chain([answer.relay]);
        self.shared.known().set(self.remote, addresses);
        Ok(connection)
    }

    /// Returns the first response from the server.
    async fn find(&self, given: &[SocketAddrV4], step: &mut Step) -> Result<Answer, ConnectError> {
        let mut waiting: VecDeque<SocketAddrV4> = self.known(given).into();
        let mut asked: Vec<SocketAddrV4> = Vec::new();
        let mut asking = FuturesUnordered::new();
        let walk_after = if waiting.is_empty() { Duration::ZERO } else { HEAD_START };
        let head_start = time::sleep(walk_after);
        tokio::pin!(head_start);
        let mut walk = None;
        let mut is_walked = false;
        loop {
            let lanes = if walk.is_some() || is_walked { 2 * LANES } else { LANES };
            while asking.len() < lanes && asked.len() < ASKED_MAX {
                let Some(node) = waiting.pop_front() else { break };
                if !asked.contains(&node) {
                    asked.push(node);
                    asking.push(self.ask(node));
                    *step = Step::Handshake;
                }
            }
            if walk.is_none() && !is_walked && (asking.is_empty() || head_start.is_elapsed()) {
                walk = Some(find_peer(&self.shared.rpc, &self.remote, asked.clone()));
            }
            tokio::select! {
                Some(answer) = asking.next(), if !asking.is_empty() => {
                    if let Some(answer) = answer {
                        return Ok(answer);
                    }
                }
                () = &mut head_start, if walk.is_none() && !is_walked => {}
                found = next(&mut walk), if walk.is_some() && waiting.len() < LANES => match found {
                    Some(found) if found.peer.public_key == self.remote => waiting.push_back(found.from),
                    Some(_) => {}
                    None => (walk, is_walked) = (None, true),
                },
                else => break,
            }
        }
        if self.shared.rpc.is_stopped() {
            return Err(ConnectError::Stopped);
        }
        Err(if asked.is_empty() { ConnectError::PeerNotFound } else { ConnectError::HandshakeFailed })
    }

    /// Returns the addresses at which the server was found, or is expected.
    fn known(&self, given: &[SocketAddrV4]) -> Vec<SocketAddrV4> {
        let mut known = given.to_vec();
        known.extend(self.shared.known().get(&self.remote));
        // A server that announced itself to this node is reached directly.
        known.extend(self.shared.request_handler.router().relay(&self.target, Instant::now()));
        if self.shared.request_handler.serves(&self.target) {
            known.push(self.shared.own_address());
        }
        known
    }

    /// Asks one node for the server's response. Returns `None` for anything else that comes back.
    async fn ask(&self, node: SocketAddrV4) -> Option<Answer> {
        let options = RequestOptions { socket: Some(self.socket.clone()), ..RequestOptions::default() };
        let reply = self.shared.rpc.request_with(self.request.clone(), node, options).await;
        let reply = reply.inspect_err(|error| trace!(%node, %error, "no answer to a handshake")).ok()?;
        let value = reply.value?;
        let handshake = Handshake::decode(&value).ok().filter(|handshake| handshake.mode == Mode::Reply)?;
        // Only the server can have sealed a response that opens here. A relay that sends a forged one is treated like
        // one that does not respond.
        let (payload, session) = self.initiator.receive(handshake.noise).ok()?;
        let payload = NoisePayload::decode(&payload).ok()?;
        let server = handshake.peer_address.filter(|server| *server != node);
        Some(Answer { relay: node, server, client: reply.to, payload, session })
    }

    /// Returns how to reach the server that responded, once that is certain enough.
    async fn path(&self, answer: &Answer) -> Result<(udx::Socket, SocketAddrV4), ConnectError> {
        // If this client is not firewalled, the server may have sent to it already.
        if let Some(Some(path)) = self.stream.first_packet().now_or_never() {
            return Ok(path);
        }
        let server_socket = self.shared.rpc.server_socket();
        let path = Path::choose(Facts {
            relay: answer.relay,
            server: answer.server,
            client: answer.client,
            local: *server_socket.local_address().ip(),
            is_open: self.is_open,
            payload: &answer.payload,
        });
        let path = match path {
            Path::Straight(address) => Some((self.socket.clone(), address)),
            Path::Await => time::timeout(PASSIVE, self.stream.first_packet()).await.ok().flatten(),
            Path::Local(address) => {
                let options = RequestOptions { socket: Some(server_socket.clone()), ..RequestOptions::default() };
                let pong = self.shared.rpc.ping(address, options).await;
                pong.is_ok().then_some((server_socket, address))
            }
            Path::None => None,
        };
        path.ok_or(ConnectError::Unreachable)
    }
}

async fn next(walk: &mut Option<FindPeer>) -> Option<FoundPeer> {
    walk.as_mut()?.next().await
}

//! Decides whether to serve, forward or drop a handshake or a hole punch message.
//!
//! A server announces itself to a few nodes, which become its relays. A relay remembers the server's address as a
//! *route* and forwards handshakes to it. Every hop is a request with the transaction id of the client's request. Only
//! the last hop, from the client's relay to the client, is a response. The router does no I/O; [`super::HyperDht`]
//! sends.

mod rate_limit;
mod routes;

use std::collections::HashMap;
use std::net::SocketAddrV4;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::handshake::{Handshake, Mode};
use super::holepunch::Holepunch;
use crate::dht_rpc::AgingMap;
use rate_limit::RateLimit;
use routes::Routes;

/// How long a response may take to come through a relay. A client resends its request for about four seconds.
const PASSAGE: Duration = Duration::from_secs(10);

/// The maximum number of handshakes and hole punches in transit through this node. More make the oldest give way, which
/// has had most of its time.
const PASSAGES_MAX: usize = 8192;

/// A server's key in the DHT: the hash of its public key.
pub type Target = [u8; 32];

/// Where a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The sender's address, from the UDP header.
    pub from: SocketAddrV4,
    /// The sender's transaction id of the request.
    pub tid: u16,
}

/// What to do with a handshake or a hole punch.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision<'a> {
    /// A server of this node responds, by way of `back`.
    Serve {
        /// The Noise message.
        noise: &'a [u8],
        /// Where the response goes.
        back: Back,
    },
    /// Send the value as a request to `to`, with the same transaction id, command and target.
    Forward {
        /// The new value.
        value: Vec<u8>,
        /// The next hop.
        to: SocketAddrV4,
    },
    /// Send the value as the response to `to`, without token and closer nodes.
    Respond {
        /// The new value.
        value: Vec<u8>,
        /// The client.
        to: SocketAddrV4,
    },
    /// Respond without a value, but with nodes that are closer to the target.
    PointCloser,
    /// Do not respond.
    Drop,
}

/// The return route of a server's response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Back {
    /// The client asked the server itself.
    ToClient {
        /// The client.
        client: SocketAddrV4,
    },
    /// A relay asked on behalf of a client.
    ToRelay {
        /// The client's relay.
        relay: SocketAddrV4,
        /// The client's address as its relay sees it.
        client: SocketAddrV4,
    },
}

impl Back {
    /// Returns the client's address.
    pub fn client(self) -> SocketAddrV4 {
        match self {
            Self::ToClient { client } | Self::ToRelay { client, .. } => client,
        }
    }

    /// Returns whether no relay is in between.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::ToClient { .. })
    }

    /// Returns how to send a Noise response back.
    pub fn decide(self, noise: &[u8]) -> Decision<'static> {
        match self {
            Self::ToClient { client } => {
                let answer = Handshake { mode: Mode::Reply, noise, peer_address: None, relay_address: None };
                Decision::Respond { value: answer.encode(), to: client }
            }
            Self::ToRelay { relay, client } => {
                let answer =
                    Handshake { mode: Mode::FromServer, noise, peer_address: Some(client), relay_address: None };
                Decision::Forward { value: answer.encode(), to: relay }
            }
        }
    }
}

/// Routes to servers, and messages in transit through this node.
#[derive(Debug)]
pub struct Router {
    servers: HashMap<Target, Bytes>,
    routes: Routes,
    /// The targets of clients' requests that were forwarded, by the client's address and transaction id.
    passages: AgingMap<(SocketAddrV4, u16), Target>,
    limit: RateLimit,
}

impl Default for Router {
    fn default() -> Self {
        Self {
            servers: HashMap::new(),
            routes: Routes::default(),
            passages: AgingMap::new(PASSAGES_MAX, PASSAGE),
            limit: RateLimit::default(),
        }
    }
}

impl Router {
    /// Accepts handshakes for a server of this node. `record` is the server's record for others.
    ///
    /// Returns `false` if the server is registered already.
    pub fn add_server(&mut self, target: Target, record: Bytes) -> bool {
        if self.servers.contains_key(&target) {
            return false;
        }
        self.servers.insert(target, record);
        true
    }

    /// Stops accepting handshakes for a server of this node.
    pub fn remove_server(&mut self, target: &Target) {
        self.servers.remove(target);
    }

    /// Remembers that a server can be reached at `relay`, the address from which it announced itself with a valid
    /// signature.
    pub fn learn(&mut self, target: Target, relay: SocketAddrV4, record: Bytes, now: Instant) {
        self.routes.insert(target, relay, record, now);
    }

    /// Forgets the route to a server that unannounced itself.
    pub fn forget(&mut self, target: &Target) {
        self.routes.remove(target);
    }

    /// Returns the record of a server that this node serves or knows a route to.
    pub fn record(&self, target: &Target, now: Instant) -> Option<Bytes> {
        self.servers.get(target).or_else(|| Some(&self.routes.get(target, now)?.record)).cloned()
    }

    /// Returns the address from which a server announced itself.
    pub fn relay(&self, target: &Target, now: Instant) -> Option<SocketAddrV4> {
        Some(self.routes.get(target, now)?.relay)
    }

    /// Decides about the value of a PEER_HANDSHAKE request.
    pub fn on_handshake<'a>(&mut self, target: &Target, value: &'a [u8], origin: Origin, now: Instant) -> Decision<'a> {
        let Ok(handshake) = Handshake::decode(value) else { return Decision::Drop };
        if handshake.noise.is_empty() {
            return Decision::Drop;
        }
        if self.servers.contains_key(target) {
            return self.serve(&handshake, origin, now);
        }
        let relay = self.routes.get(target, now).map(|route| route.relay);
        let noise = handshake.noise;
        match (handshake.mode, relay, handshake.peer_address) {
            (Mode::FromClient, Some(relay), _) => {
                if !self.limit.take(*origin.from.ip(), now) {
                    return Decision::Drop;
                }
                self.passages.insert((origin.from, origin.tid), *target, now);
                forward(Mode::FromRelay, noise, Some(origin.from), None, relay)
            }
            // A client may name the server's relay, but a node that followed addresses from strangers could be aimed at
            // anyone.
            (Mode::FromClient, None, _) => Decision::PointCloser,
            (Mode::FromRelay, Some(relay), Some(client))
                if self.limit.take_relayed(*origin.from.ip(), *client.ip(), now) =>
            {
                forward(Mode::FromSecondRelay, noise, Some(client), Some(origin.from), relay)
            }
            (Mode::FromServer, _, Some(client)) if self.is_passing(target, client, origin.tid, now) => {
                let answer =
                    Handshake { mode: Mode::Reply, noise, peer_address: Some(origin.from), relay_address: None };
                Decision::Respond { value: answer.encode(), to: client }
            }
            _ => Decision::Drop,
        }
    }

    /// Decides about the value of a PEER_HOLEPUNCH request. Servers of this node do not punch.
    pub fn on_holepunch(&mut self, target: &Target, value: &[u8], origin: Origin, now: Instant) -> Decision<'static> {
        let Ok(holepunch) = Holepunch::decode(value) else { return Decision::Drop };
        let relay = self.routes.get(target, now).map(|route| route.relay);
        let (mode, id, payload) = (holepunch.mode, holepunch.id, holepunch.payload);
        match (mode, relay, holepunch.peer_address) {
            (Mode::FromClient, Some(relay), address) => {
                // The client may name another port at which the server punches, but not another host.
                let to = address.unwrap_or(relay);
                if to.ip() != relay.ip() || !self.limit.take(*origin.from.ip(), now) {
                    return Decision::Drop;
                }
                self.passages.insert((origin.from, origin.tid), *target, now);
                let value = Holepunch { mode: Mode::FromRelay, id, payload, peer_address: Some(origin.from) };
                Decision::Forward { value: value.encode(), to }
            }
            (Mode::FromServer, _, Some(client)) if self.is_passing(target, client, origin.tid, now) => {
                let value = Holepunch { mode: Mode::Reply, id, payload, peer_address: Some(origin.from) };
                Decision::Respond { value: value.encode(), to: client }
            }
            _ => Decision::Drop,
        }
    }

    fn serve<'a>(&mut self, handshake: &Handshake<'a>, origin: Origin, now: Instant) -> Decision<'a> {
        let back = match (handshake.mode, handshake.peer_address, handshake.relay_address) {
            (Mode::FromClient, _, _) => Back::ToClient { client: origin.from },
            (Mode::FromRelay, Some(client), _) => Back::ToRelay { relay: origin.from, client },
            (Mode::FromSecondRelay, Some(client), Some(relay)) => Back::ToRelay { relay, client },
            _ => return Decision::Drop,
        };
        let is_allowed = match back {
            Back::ToClient { client } => self.limit.take(*client.ip(), now),
            // The relay that the message names may not be the sender of this datagram, as little as the client is.
            Back::ToRelay { client, .. } => self.limit.take_relayed(*origin.from.ip(), *client.ip(), now),
        };
        if !is_allowed {
            return Decision::Drop;
        }
        Decision::Serve { noise: handshake.noise, back }
    }

    /// Returns whether a client waits for this response, so that nobody is sent what they did not ask for.
    fn is_passing(&self, target: &Target, client: SocketAddrV4, tid: u16, now: Instant) -> bool {
        self.passages.get(&(client, tid), now) == Some(target)
    }
}

fn forward(
    mode: Mode,
    noise: &[u8],
    peer_address: Option<SocketAddrV4>,
    relay_address: Option<SocketAddrV4>,
    to: SocketAddrV4,
) -> Decision<'static> {
    Decision::Forward { value: Handshake { mode, noise, peer_address, relay_address }.encode(), to }
}

#[cfg(test)]
mod tests;

//! Keeps a server findable by announcing it to the three nodes closest to the hash of its key. These become its relays.

mod topic_announcer;

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, watch};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

pub use self::topic_announcer::{RelayAddresses, TopicAnnouncer};
use super::commands::FIND_PEER;
use super::records::{Peer, announce_to, unannounce_from};
use crate::crypto::{KeyPair, PublicKey, hash};
use crate::dht_rpc::{Call, DhtReply, DhtRpc, Id, K, Query};

/// How many relays a server has.
const RELAYS: usize = 3;
/// How often the relays are asked whether they still know the server. This also keeps the NAT mapping to them open.
const CHECK: Duration = Duration::from_secs(3);
/// How often the server searches for nodes that are closer than its relays.
const RENEWAL: Duration = Duration::from_mins(5);
/// The delay before a server that found no node tries again. It grows with every failure.
const RETRY: Duration = Duration::from_secs(2);
/// How long to wait for nodes to confirm an unannounce.
const FAREWELL: Duration = Duration::from_secs(2);

/// A node that knows a route to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relay {
    /// The node.
    pub relay_address: SocketAddrV4,
    /// The server's address as the node sees it.
    pub peer_address: SocketAddrV4,
}

/// Announces a server until it is stopped. Dropping the last clone also stops it.
#[derive(Debug, Clone)]
pub struct Announcer {
    shared: Arc<Shared>,
    _stop_on_drop: Arc<tokio_util::sync::DropGuard>,
}

#[derive(Debug)]
struct Shared {
    relays: Mutex<Relays>,
    is_announced: watch::Sender<bool>,
    refresh: Notify,
    stop: CancellationToken,
    stopped: CancellationToken,
}

#[derive(Debug, Default)]
struct Relays {
    current: Vec<Relay>,
    previous: Vec<Relay>,
    addresses: Vec<SocketAddrV4>,
}

impl Shared {
    fn relays(&self) -> MutexGuard<'_, Relays> {
        self.relays.lock()
    }
}

impl Announcer {
    /// Starts announcing the server with these keys.
    pub fn start(dht: DhtRpc, key_pair: KeyPair, tasks: &TaskTracker) -> Self {
        Self::start_at(Pace { check: CHECK, renewal: RENEWAL, retry: RETRY }, dht, key_pair, tasks)
    }

    fn start_at(pace: Pace, dht: DhtRpc, key_pair: KeyPair, tasks: &TaskTracker) -> Self {
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            relays: Mutex::default(),
            is_announced: watch::Sender::new(false),
            refresh: Notify::new(),
            stop: stop.clone(),
            stopped: CancellationToken::new(),
        });
        let target = hash(&[key_pair.public_key().as_bytes()]);
        let task = Task { pace, dht, key_pair, target, shared: shared.clone(), closest: Vec::new() };
        tasks.spawn(task.run());
        Self { shared, _stop_on_drop: Arc::new(stop.drop_guard()) }
    }

    /// Waits until the server is announced, or no node was found to announce it to.
    pub async fn announced(&self) {
        // Fails only when the announcer is gone, and then there is nothing to wait for.
        let _ = self.shared.is_announced.subscribe().wait_for(|done| *done).await;
    }

    /// Returns the nodes that know a route to the server.
    pub fn relays(&self) -> Vec<Relay> {
        self.shared.relays().current.clone()
    }

    /// Returns at most three addresses that clients may start from: the server itself if it is reachable, then its
    /// relays.
    pub fn relay_addresses(&self) -> Vec<SocketAddrV4> {
        self.shared.relays().addresses.clone()
    }

    /// Returns whether a node knows a route to the server, or did until recently.
    pub fn is_relay(&self, address: SocketAddrV4) -> bool {
        let relays = self.shared.relays();
        relays.current.iter().chain(&relays.previous).any(|relay| relay.relay_address == address)
    }

    /// Announces the server again soon, for example after a network change.
    pub fn refresh(&self) {
        self.shared.refresh.notify_one();
    }

    /// Removes the announcements and stops.
    pub async fn stop(&self) {
        self.shared.stop.cancel();
        self.shared.stopped.cancelled().await;
    }
}

/// The intervals of an announcer.
#[derive(Debug, Clone, Copy)]
struct Pace {
    check: Duration,
    renewal: Duration,
    retry: Duration,
}

struct Task {
    pace: Pace,
    dht: DhtRpc,
    key_pair: KeyPair,
    target: Id,
    shared: Arc<Shared>,
    /// The closest nodes of the last walk. The next walk starts from them.
    closest: Vec<SocketAddrV4>,
}

impl Task {
    async fn run(mut self) {
        let _stopped = self.shared.stopped.clone().drop_guard();
        let stop = self.shared.stop.clone();
        stop.run_until_cancelled(self.announce_forever()).await;
        self.shared.is_announced.send_replace(true);
        let relays = std::mem::take(&mut self.shared.relays().current);
        // A node that does not respond forgets the server by itself after a while.
        let _ = time::timeout(FAREWELL, self.leave(&relays)).await;
    }

    async fn announce_forever(&mut self) {
        let mut misses = 0_u32;
        loop {
            self.announce().await;
            self.shared.is_announced.send_replace(true);
            if self.shared.relays().current.is_empty() {
                // No relay was found: the node is alone or cut off. It retries soon, then less often.
                misses = (misses + 1).min(4);
                tokio::select! {
                    () = time::sleep(self.pace.retry * misses) => {}
                    () = self.shared.refresh.notified() => {}
                }
                continue;
            }
            misses = 0;
            self.watch().await;
        }
    }

    /// Watches the relays until one fails or it is time to announce the server again.
    async fn watch(&self) {
        let renewal = Instant::now() + self.pace.renewal;
        while Instant::now() < renewal {
            tokio::select! {
                () = time::sleep(self.pace.check) => {}
                () = self.shared.refresh.notified() => return,
            }
            let relays = self.shared.relays().current.clone();
            let kept = join_all(relays.iter().map(|relay| self.is_kept(*relay))).await;
            if !kept.into_iter().all(|kept| kept) {
                debug!(key = %self.key_pair.public_key(), "a relay lost the way to the server");
                return;
            }
        }
    }

    /// Returns whether a relay still knows the route to this server at its current address. A ping would not reveal a
    /// relay that was restarted, or a NAT that gave this node another port.
    async fn is_kept(&self, relay: Relay) -> bool {
        let answer = self.ask(relay.relay_address).await;
        answer.is_some_and(|reply| reply.to == relay.peer_address && names(&reply, &self.key_pair.public_key()))
    }

    async fn ask(&self, node: SocketAddrV4) -> Option<DhtReply> {
        let call = Call { target: Some(self.target), ..Call::new(FIND_PEER) };
        self.dht.request(call, node).await.ok().filter(|reply| reply.error == 0)
    }

    async fn announce(&mut self) {
        let nodes = std::mem::take(&mut self.closest);
        let replies = self.dht.query(Query::new(self.target, FIND_PEER).starting_at(nodes)).closest().await;
        let peer = Peer { public_key: self.key_pair.public_key(), relay_addresses: Vec::new() };
        let announcements =
            replies.iter().take(RELAYS).map(|reply| announce_to(&self.dht, self.target, &self.key_pair, &peer, reply));
        let confirmed = join_all(announcements).await.into_iter().flatten();
        let current: Vec<_> =
            confirmed.map(|reply| Relay { relay_address: reply.from, peer_address: reply.to }).collect();
        self.closest = replies.into_iter().map(|reply| reply.from).take(K).collect();
        let own = self.dht.remote_address();
        let addresses = own.into_iter().chain(current.iter().map(|relay| relay.relay_address)).take(RELAYS).collect();
        let dropped = {
            let mut relays = self.shared.relays();
            let previous = std::mem::replace(&mut relays.current, current);
            relays.addresses = addresses;
            let is_current = |old: &Relay| relays.current.iter().any(|new| new.relay_address == old.relay_address);
            let dropped: Vec<_> = previous.iter().copied().filter(|old| !is_current(old)).collect();
            relays.previous = previous;
            dropped
        };
        let _ = time::timeout(FAREWELL, self.leave(&dropped)).await;
    }

    /// Removes announcements.
    async fn leave(&self, relays: &[Relay]) {
        join_all(relays.iter().map(|relay| async {
            let reply = self.ask(relay.relay_address).await.filter(|reply| reply.value.is_some())?;
            unannounce_from(&self.dht, self.target, &self.key_pair, &reply).await
        }))
        .await;
    }
}

fn names(reply: &DhtReply, public_key: &PublicKey) -> bool {
    let peer = reply.value.as_deref().and_then(|value| Peer::decode(value).ok());
    peer.is_some_and(|peer| peer.public_key == *public_key)
}

#[cfg(test)]
mod tests;

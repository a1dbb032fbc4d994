//! Keeps a peer announced under a topic.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Notify, watch};
use tokio::time::{self, Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::{Pace, RETRY};
use crate::crypto::KeyPair;
use crate::dht_rpc::{Call, DhtRpc, Id};
use crate::hyperdht::commands::LOOKUP;
use crate::hyperdht::persistent::PEERS_MAX;
use crate::hyperdht::records::{LookupReply, announce, unannounce_from};

/// Half of the time that nodes store an announcement.
const RENEWAL: Duration = Duration::from_mins(10);
/// How often the closest nodes are asked whether they still store it.
const CHECK: Duration = Duration::from_secs(15);
/// How many nodes are asked.
const CHECKED: usize = 5;
/// How many of these must still store it, if that many were asked.
const KEPT_MIN: usize = 3;
/// How long to wait for nodes to confirm an unannounce.
const FAREWELL: Duration = Duration::from_secs(2);

/// Returns the addresses that a peer is announced with. Called for each announcement.
pub type RelayAddresses = Arc<dyn Fn() -> Vec<SocketAddrV4> + Send + Sync>;

/// Announces a topic until it is stopped. Dropping it also stops it.
#[derive(Debug)]
pub struct TopicAnnouncer {
    is_announced: watch::Receiver<bool>,
    refresh: Arc<Notify>,
    stop: DropGuard,
    stopped: CancellationToken,
}

impl TopicAnnouncer {
    /// Starts announcing a topic under a key.
    pub fn start(
        dht: DhtRpc,
        topic: Id,
        key_pair: KeyPair,
        relay_addresses: RelayAddresses,
        tasks: &TaskTracker,
    ) -> Self {
        let pace = Pace { check: CHECK, renewal: RENEWAL, retry: RETRY };
        Self::start_at(pace, dht, topic, key_pair, relay_addresses, tasks)
    }

    pub(super) fn start_at(
        pace: Pace,
        dht: DhtRpc,
        topic: Id,
        key_pair: KeyPair,
        relay_addresses: RelayAddresses,
        tasks: &TaskTracker,
    ) -> Self {
        let (sender, is_announced) = watch::channel(false);
        let (refresh, stop, stopped) = (Arc::new(Notify::new()), CancellationToken::new(), CancellationToken::new());
        let task = Task { pace, dht, topic, key_pair, relay_addresses, refresh: refresh.clone(), holders: Vec::new() };
        tasks.spawn(task.run(sender, stop.clone(), stopped.clone()));
        Self { is_announced, refresh, stop: stop.drop_guard(), stopped }
    }

    /// Waits until the topic is announced, or no node was found to announce it to.
    pub fn announced(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut is_announced = self.is_announced.clone();
        async move {
            // Fails only when the announcer is gone, and then there is nothing to wait for.
            let _ = is_announced.wait_for(|done| *done).await;
        }
    }

    /// Announces the topic again soon, for example after the relay addresses changed.
    pub fn refresh(&self) {
        self.refresh.notify_one();
    }

    /// Removes the announcements and stops.
    pub async fn stop(self) {
        self.stop.disarm().cancel();
        self.stopped.cancelled().await;
    }
}

struct Task {
    pace: Pace,
    dht: DhtRpc,
    topic: Id,
    key_pair: KeyPair,
    relay_addresses: RelayAddresses,
    refresh: Arc<Notify>,
    /// The nodes that store the announcement, closest first.
    holders: Vec<SocketAddrV4>,
}

impl Task {
    async fn run(mut self, announced: watch::Sender<bool>, stop: CancellationToken, stopped: CancellationToken) {
        let _stopped = stopped.drop_guard();
        stop.run_until_cancelled(self.announce_forever(&announced)).await;
        announced.send_replace(true);
        // A node that does not respond forgets the announcement by itself after a while.
        let _ = time::timeout(FAREWELL, self.leave()).await;
    }

    async fn announce_forever(&mut self, announced: &watch::Sender<bool>) {
        let mut misses = 0_u32;
        loop {
            let nodes = self.holders.clone();
            let addresses = (self.relay_addresses)();
            match announce(&self.dht, self.topic, &self.key_pair, &addresses, nodes).await {
                Ok(holders) => {
                    self.holders = holders;
                    misses = 0;
                }
                Err(error) => {
                    debug!(%error, "the topic was not announced");
                    misses = (misses + 1).min(4);
                }
            }
            announced.send_replace(true);
            if misses == 0 {
                self.watch().await;
                continue;
            }
            tokio::select! {
                () = time::sleep(self.pace.retry * misses) => {}
                () = self.refresh.notified() => {}
            }
        }
    }

    /// Watches the closest holders until too few of them still store the announcement, or it is time to announce again.
    async fn watch(&self) {
        let renewal = Instant::now() + self.pace.renewal;
        while Instant::now() < renewal {
            tokio::select! {
                () = time::sleep(self.pace.check) => {}
                () = self.refresh.notified() => return,
            }
            let checked = &self.holders[..self.holders.len().min(CHECKED)];
            let kept = join_all(checked.iter().map(|node| self.is_kept(*node))).await;
            let kept = kept.into_iter().filter(|kept| *kept).count();
            if kept < checked.len().min(KEPT_MIN) {
                debug!(kept, "nodes lost the announcement");
                return;
            }
        }
    }

    /// Returns whether a node still stores the announcement. A node that was restarted or does not respond has lost it.
    async fn is_kept(&self, node: SocketAddrV4) -> bool {
        let call = Call { target: Some(self.topic), ..Call::new(LOOKUP) };
        let Ok(reply) = self.dht.request(call, node).await else { return false };
        let found = reply.value.as_deref().and_then(|value| LookupReply::decode(value).ok());
        let own = self.key_pair.public_key();
        // A full response may omit this peer by chance, so it counts as kept.
        found.is_some_and(|found| {
            found.peers.len() >= PEERS_MAX || found.peers.iter().any(|peer| peer.public_key == own)
        })
    }

    async fn leave(&self) {
        join_all(self.holders.iter().map(|node| async {
            let call = Call { target: Some(self.topic), ..Call::new(LOOKUP) };
            let reply = self.dht.request(call, *node).await.ok()?;
            unannounce_from(&self.dht, self.topic, &self.key_pair, &reply).await
        }))
        .await;
    }
}

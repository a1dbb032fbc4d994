//! Finds peers by topic and tracks what they announce.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, stream};
use parking_lot::Mutex;
use protocol::control::{Empty, NODE_DESCRIBE, NodeInfo, NodeRole};
use protocol::{PublicKey, Region, Topic};
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::candidates::Candidates;
use crate::backoff::{self, Backoff};
use crate::client::Client;
use crate::membership::Membership;
use crate::transport::Transport;

mod candidates;

/// The maximum interval of lookups once a peer is known. It is slightly shorter, depending on the node's key.
const REFRESH: Duration = Duration::from_secs(2);
/// The interval of lookups while no peer is known, and after one was lost, which may have come back at another address.
const SEARCH: Duration = Duration::from_millis(100);
/// How long the short interval lasts after a peer was lost.
const SEARCH_FOR: Duration = Duration::from_secs(5);
/// The timeout of a lookup.
const LOOKUP: Duration = Duration::from_secs(5);
/// The timeout of a peer's `node.describe`.
const DESCRIBE: Duration = Duration::from_secs(2);
/// How many peers are asked concurrently.
const REQUESTS_AT_ONCE: usize = 128;
/// How many new peers are asked in one round. Anyone may announce on a topic.
const NEW_PEERS_MAX: usize = 256;
/// How many peers the directory holds.
const KNOWN_MAX: usize = 256;

/// The timeout of announcing a topic.
const ANNOUNCE_WITHIN: Duration = Duration::from_secs(10);
/// The timeout of unannouncing a topic.
const UNANNOUNCE_WITHIN: Duration = Duration::from_secs(2);
/// The delay after the first failed announcement. It doubles with each failure.
const AGAIN: Duration = Duration::from_millis(500);
/// The maximum delay.
const AGAIN_MAX: Duration = Duration::from_secs(30);

/// Keeps a node announced under a topic until `stop`, then unannounces it.
pub async fn keep_announced(transport: &dyn Transport, topic: &Topic, stop: &CancellationToken) {
    let announcing = async {
        let mut backoff = Backoff::new(AGAIN, AGAIN_MAX, backoff::seed_of([transport.public_key(); 2]));
        loop {
            let why = match time::timeout(ANNOUNCE_WITHIN, transport.announce(topic)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it took too long".to_owned(),
            };
            let wait = backoff.next_wait();
            warn!(%topic, why, ?wait, "could not announce this node: others will not find it until it can");
            time::sleep(wait).await;
        }
        stop.cancelled().await;
    };
    stop.run_until_cancelled(announcing).await;
    // If this fails, the node's announcement expires by itself.
    let _ = time::timeout(UNANNOUNCE_WITHIN, transport.unannounce(topic)).await;
}

/// The peers of one topic and what they announce. Clones share their contents.
#[derive(Clone)]
pub struct Directory {
    membership: Membership,
    peers: watch::Receiver<Arc<BTreeMap<PublicKey, NodeInfo>>>,
    unreachable: Arc<AtomicUsize>,
}

/// The task that keeps a [`Directory`] up to date.
pub struct DirectoryTask {
    transport: Arc<dyn Transport>,
    client: Client,
    topic: Topic,
    peers: watch::Sender<Arc<BTreeMap<PublicKey, NodeInfo>>>,
    /// The number of nodes that the last lookup found but that did not respond when they were last asked.
    unreachable: Arc<AtomicUsize>,
    candidates: Mutex<Candidates>,
}

impl Directory {
    /// Makes an empty directory of a topic, and the task that fills it.
    pub fn new(transport: Arc<dyn Transport>, client: Client, topic: Topic) -> (Self, DirectoryTask) {
        let (sender, peers) = watch::channel(Arc::default());
        let membership = client.membership().clone();
        let unreachable = Arc::new(AtomicUsize::new(0));
        let candidates = Mutex::new(Candidates::new(transport.public_key()));
        let task =
            DirectoryTask { transport, client, topic, peers: sender, unreachable: unreachable.clone(), candidates };
        (Self { membership, peers, unreachable }, task)
    }

    /// Returns the peers of a role, ordered by key. If membership is checked, only those certified for the role.
    pub fn find(&self, role: NodeRole) -> Vec<PublicKey> {
        let peers = self.peers.borrow();
        let of_role = peers.iter().filter(|(_, info)| info.roles.contains(&role));
        // Checked on each call, so that a revoked peer disappears at once.
        of_role.map(|(key, _)| *key).filter(|key| self.membership.has_role(*key, role)).collect()
    }

    /// Returns the regions of the peers of a role, without duplicates.
    pub fn regions(&self, role: NodeRole) -> BTreeSet<Region> {
        let peers = self.peers.borrow();
        peers.values().filter(|info| info.roles.contains(&role)).map(|info| info.region.clone()).collect()
    }

    /// Returns how many nodes are announced on the topic but cannot be reached.
    pub fn unreachable(&self) -> usize {
        self.unreachable.load(Ordering::Relaxed)
    }

    /// Waits until a peer of a role is known, for at most `within`. Returns whether there is one.
    pub async fn wait_for(&self, role: NodeRole, within: Duration) -> bool {
        let mut peers = self.peers.clone();
        let known = peers.wait_for(|peers| peers.values().any(|info| info.roles.contains(&role)));
        matches!(time::timeout(within, known).await, Ok(Ok(_)))
    }

    /// Waits until the set of peers changes. Returns `false` once the directory's task has ended.
    pub async fn changed(&mut self) -> bool {
        self.peers.changed().await.is_ok()
    }
}

impl DirectoryTask {
    /// Looks up the topic periodically until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let own_key = self.transport.public_key();
        let refreshing = async {
            let mut search_until = Instant::now();
            for round in 0.. {
                if self.refresh(own_key).await {
                    search_until = Instant::now() + SEARCH_FOR;
                }
                let is_search = self.peers.borrow().is_empty() || Instant::now() < search_until;
                let nominal = if is_search { SEARCH } else { REFRESH };
                time::sleep(backoff::spread(nominal, [own_key; 2], round)).await;
            }
        };
        stop.run_until_cancelled(async { tokio::join!(self.recall(), refreshing) }).await;
    }

    /// Asks the peers of an earlier run. The nodes that stored this network's topics may be gone, and then lookups find
    /// nothing for a while.
    async fn recall(&self) {
        let mut responses = std::pin::pin!(self.ask(self.transport.remembered().into_iter().take(NEW_PEERS_MAX)));
        while let Some((key, info)) = responses.next().await {
            // Workers are tracked elsewhere, and there may be many.
            if let Some(info) = info.filter(|info| info.roles != [NodeRole::Worker]) {
                self.learn(key, info);
            }
        }
    }

    /// Asks found and known peers to describe themselves, and keeps those that respond. Returns whether a known peer
    /// was lost.
    ///
    /// A storage node returns a random selection of its records, and a lookup may fail, so a peer that responds stays
    /// whether or not it was found. A peer that left without notice is dropped, because every peer is asked each time.
    async fn refresh(&self, own_key: PublicKey) -> bool {
        let found = match time::timeout(LOOKUP, self.transport.lookup(&self.topic)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                debug!(%error, topic = %self.topic, "lookup failed");
                vec![]
            }
            Err(_) => {
                debug!(topic = %self.topic, "lookup took too long");
                vec![]
            }
        };
        // Known peers come first, so that a crowd on the topic cannot displace them. Then comes the registry that this
        // node was given when it joined.
        let mut peers: Vec<PublicKey> = self.peers.borrow().keys().copied().collect();
        let mut seen: BTreeSet<PublicKey> = peers.iter().copied().chain([own_key]).collect();
        let announced: BTreeSet<PublicKey> = found.iter().copied().collect();
        peers.extend(self.client.membership().registry().filter(|key| seen.insert(*key)));
        let known = peers.len();
        let new = found.into_iter().filter(|key| seen.insert(*key));
        peers.extend(self.candidates.lock().choose(new, NEW_PEERS_MAX, Instant::now()));
        let new: BTreeSet<PublicKey> = peers[known..].iter().copied().collect();
        let mut silent: BTreeSet<PublicKey> = peers.iter().copied().collect();
        let mut responses = std::pin::pin!(self.ask(peers));
        while let Some((key, info)) = responses.next().await {
            self.candidates.lock().note(key, info.is_some(), Instant::now());
            if info.is_none() && new.contains(&key) {
                self.part(key);
            }
            // Added at once, without waiting for the peers that are gone.
            if let Some(info) = info {
                silent.remove(&key);
                self.learn(key, info);
            }
        }
        // Nodes that are asked less often now count as well.
        let is_unreachable =
            |candidates: &Candidates, key: &PublicKey| silent.contains(key) || candidates.has_failed(*key);
        let candidates = self.candidates.lock();
        let unreachable = announced.iter().filter(|key| is_unreachable(&candidates, key)).count();
        drop(candidates);
        self.unreachable.store(unreachable, Ordering::Relaxed);
        self.peers.send_if_modified(|peers| {
            let is_lost = peers.keys().any(|key| silent.contains(key));
            if is_lost {
                Arc::make_mut(peers).retain(|key, _| !silent.contains(key));
            }
            is_lost
        })
    }

    /// Closes the connection to a node that is not a member.
    fn part(&self, key: PublicKey) {
        if !self.client.membership().is_member(key) {
            self.client.disconnect(key);
        }
    }

    fn learn(&self, key: PublicKey, info: NodeInfo) {
        self.peers.send_if_modified(|peers| {
            let known = peers.get(&key);
            let is_news = known != Some(&info) && (known.is_some() || peers.len() < KNOWN_MAX);
            if is_news {
                Arc::make_mut(peers).insert(key, info);
            }
            is_news
        });
    }

    /// Asks peers to describe themselves. A peer yields `None` if it does not respond, or is not certified for what it
    /// claims.
    fn ask(&self, peers: impl IntoIterator<Item = PublicKey>) -> impl Stream<Item = (PublicKey, Option<NodeInfo>)> {
        let responses = peers.into_iter().map(move |key| async move {
            match self.client.call::<_, NodeInfo>(key, NODE_DESCRIBE, &Empty {}, DESCRIBE).await {
                Ok(info) => (key, self.certified(key, info).await),
                Err(_) => (key, None),
            }
        });
        stream::iter(responses).buffer_unordered(REQUESTS_AT_ONCE)
    }

    /// Reduces a peer's description to the roles that it is certified for. Returns `None` if no role is left.
    async fn certified(&self, key: PublicKey, mut info: NodeInfo) -> Option<NodeInfo> {
        let membership = self.client.membership();
        if membership.is_checked() {
            if membership.standing(key).is_err() {
                self.client.meet(key, DESCRIBE).await.ok()?;
            }
            let region = info.region.clone();
            info.roles.retain(|role| membership.check_role(key, *role, Some(&region)).is_ok());
        }
        (!info.roles.is_empty()).then_some(info)
    }
}

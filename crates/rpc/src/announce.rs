//! Finds peers by topic and keeps track of what they do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, stream};
use protocol::control::{Empty, NODE_DESCRIBE, NodeInfo, NodeRole};
use protocol::{PublicKey, Region, Topic};
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::backoff;
use crate::client::Client;
use crate::membership::Membership;
use crate::transport::Transport;

/// How often the topic is looked up once somebody is known, at most; a little less often by chance of the keys.
const REFRESH: Duration = Duration::from_secs(2);
/// How often it is looked up while nobody is known, and after somebody was lost: it may have come back elsewhere.
const SEARCH: Duration = Duration::from_millis(100);
/// For how long after that.
const SEARCH_FOR: Duration = Duration::from_secs(5);
/// How long a lookup may take.
const LOOKUP: Duration = Duration::from_secs(5);
/// How long a peer may take to say what it is.
const DESCRIBE: Duration = Duration::from_secs(2);
/// Peers asked side by side.
const ASKED_AT_ONCE: usize = 32;
/// Peers asked in one round besides those known. Anyone may announce on a topic.
const ASKED_MAX: usize = 64;
/// Peers known at once.
const KNOWN_MAX: usize = 256;

/// How long the network may take to announce a topic.
const ANNOUNCE_WITHIN: Duration = Duration::from_secs(10);
/// How long it may take to take a topic back.
const UNANNOUNCE_WITHIN: Duration = Duration::from_secs(2);
/// The wait after an announcement that failed for the first time; it doubles.
const AGAIN: Duration = Duration::from_millis(500);
/// The longest wait.
const AGAIN_MAX: Duration = Duration::from_secs(30);

/// Keeps a node announced under a topic until `stop`, and then takes it off.
pub async fn keep_announced(transport: &dyn Transport, topic: &Topic, stop: &CancellationToken) {
    let announcing = async {
        let mut failures = 0;
        loop {
            let why = match time::timeout(ANNOUNCE_WITHIN, transport.announce(topic)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it took too long".to_owned(),
            };
            failures += 1;
            let nominal = backoff::doubled(AGAIN, AGAIN_MAX, failures);
            let wait = backoff::spread(nominal, [transport.public_key(); 2], failures.into());
            warn!(%topic, why, ?wait, "could not announce this node: others will not find it until it can");
            time::sleep(wait).await;
        }
        stop.cancelled().await;
    };
    stop.run_until_cancelled(announcing).await;
    // A node that goes away anyway is forgotten by expiry.
    let _ = time::timeout(UNANNOUNCE_WITHIN, transport.unannounce(topic)).await;
}

/// The peers of one topic and what they do. Clones see the same.
#[derive(Clone)]
pub struct Directory {
    membership: Membership,
    peers: watch::Receiver<Arc<BTreeMap<PublicKey, NodeInfo>>>,
    unreachable: Arc<AtomicUsize>,
}

/// Keeps a [`Directory`] fresh while it runs.
pub struct DirectoryTask {
    transport: Arc<dyn Transport>,
    client: Client,
    topic: Topic,
    peers: watch::Sender<Arc<BTreeMap<PublicKey, NodeInfo>>>,
    /// Nodes that the last lookup found and that did not answer.
    unreachable: Arc<AtomicUsize>,
}

impl Directory {
    /// Makes an empty directory of a topic, and the task that fills it.
    pub fn new(transport: Arc<dyn Transport>, client: Client, topic: Topic) -> (Self, DirectoryTask) {
        let (sender, peers) = watch::channel(Arc::default());
        let membership = client.membership().clone();
        let unreachable = Arc::new(AtomicUsize::new(0));
        let task = DirectoryTask { transport, client, topic, peers: sender, unreachable: unreachable.clone() };
        (Self { membership, peers, unreachable }, task)
    }

    /// Returns the peers of a role, in the order of their keys. With admission, only those certified for it.
    pub fn find(&self, role: NodeRole) -> Vec<PublicKey> {
        let peers = self.peers.borrow();
        let of_role = peers.iter().filter(|(_, info)| info.roles.contains(&role));
        // Asked each time: who was expelled is gone at once.
        of_role.map(|(key, _)| *key).filter(|key| self.membership.has_role(*key, role)).collect()
    }

    /// Returns where the peers of a role stand, each region once.
    pub fn regions(&self, role: NodeRole) -> BTreeSet<Region> {
        let peers = self.peers.borrow();
        peers.values().filter(|info| info.roles.contains(&role)).map(|info| info.region.clone()).collect()
    }

    /// Returns how many nodes announce themselves on the topic and cannot be reached.
    pub fn unreachable(&self) -> usize {
        self.unreachable.load(Ordering::Relaxed)
    }

    /// Waits until a peer of a role is known, at most `within`. Says whether there is one.
    pub async fn wait_for(&self, role: NodeRole, within: Duration) -> bool {
        let mut peers = self.peers.clone();
        let known = peers.wait_for(|peers| peers.values().any(|info| info.roles.contains(&role)));
        matches!(time::timeout(within, known).await, Ok(Ok(_)))
    }

    /// Waits until the set of peers changes. Returns false once nobody keeps it fresh.
    pub async fn changed(&mut self) -> bool {
        self.peers.changed().await.is_ok()
    }
}

impl DirectoryTask {
    /// Looks the topic up until `stop`.
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

    /// Asks the peers of an earlier run. Who kept this node's topics then may be gone, and nothing be found for a
    /// while.
    async fn recall(&self) {
        let mut answers = std::pin::pin!(self.ask(self.transport.remembered().into_iter().take(ASKED_MAX)));
        while let Some((key, info)) = answers.next().await {
            // Workers are followed elsewhere, and may be many.
            if let Some(info) = info.filter(|info| info.roles != [NodeRole::Worker]) {
                self.learn(key, info);
            }
        }
    }

    /// Asks those who were found and those who are known what they are, and keeps those who answer. Says whether
    /// somebody was lost.
    ///
    /// A storage node returns some records at random and not all, and a lookup may fail: who answers stays, found or
    /// not. Whoever left without a word drops out, since everyone is asked each time.
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
        // Those known come first, so that a crowd on the topic cannot drive them out; then the registry that this node
        // was told of when it joined.
        let mut peers: Vec<PublicKey> = self.peers.borrow().keys().copied().collect();
        let mut seen: BTreeSet<PublicKey> = peers.iter().copied().chain([own_key]).collect();
        let announced: BTreeSet<PublicKey> = found.iter().copied().collect();
        let others = self.client.membership().registry().into_iter().chain(found);
        peers.extend(others.filter(|key| seen.insert(*key)).take(ASKED_MAX));
        let mut silent: BTreeSet<PublicKey> = peers.iter().copied().collect();
        let mut answers = std::pin::pin!(self.ask(peers));
        while let Some((key, info)) = answers.next().await {
            // Known at once: nobody waits for those that are gone.
            if let Some(info) = info {
                silent.remove(&key);
                self.learn(key, info);
            }
        }
        self.unreachable.store(silent.intersection(&announced).count(), Ordering::Relaxed);
        self.peers.send_if_modified(|peers| {
            let is_lost = peers.keys().any(|key| silent.contains(key));
            if is_lost {
                Arc::make_mut(peers).retain(|key, _| !silent.contains(key));
            }
            is_lost
        })
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

    /// Asks peers what they are. Nothing is returned of one that does not answer, or may not be what it says.
    fn ask(&self, peers: impl IntoIterator<Item = PublicKey>) -> impl Stream<Item = (PublicKey, Option<NodeInfo>)> {
        let answers = peers.into_iter().map(move |key| async move {
            match self.client.call::<_, NodeInfo>(key, NODE_DESCRIBE, &Empty {}, DESCRIBE).await {
                Ok(info) => (key, self.certified(key, info).await),
                Err(_) => (key, None),
            }
        });
        stream::iter(answers).buffer_unordered(ASKED_AT_ONCE)
    }

    /// Leaves of what a peer says it is what it may be; nothing of it for a stranger.
    async fn certified(&self, key: PublicKey, mut info: NodeInfo) -> Option<NodeInfo> {
        let membership = self.client.membership();
        if membership.is_checked() {
            if membership.standing(key).is_err() {
                self.client.meet(key, DESCRIBE).await.ok()?;
            }
            let region = info.region.clone();
            info.roles.retain(|role| membership.admit(key, *role, Some(&region)).is_ok());
        }
        (!info.roles.is_empty()).then_some(info)
    }
}

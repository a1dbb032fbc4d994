//! Finds peers by topic and keeps track of what they do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use protocol::control::{Empty, NODE_DESCRIBE, NodeInfo, NodeRole};
use protocol::{PublicKey, Topic};
use tokio::sync::watch;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::client::Client;
use crate::transport::Transport;

/// How often the topic is looked up once somebody is known.
const REFRESH: Duration = Duration::from_secs(2);
/// How often it is looked up while nobody is known.
const SEARCH: Duration = Duration::from_millis(100);
/// How long a peer may take to say what it is.
const DESCRIBE: Duration = Duration::from_secs(2);

/// The peers of one topic and what they do. Clones see the same.
#[derive(Clone)]
pub struct Directory {
    peers: watch::Receiver<Arc<BTreeMap<PublicKey, NodeInfo>>>,
}

/// Keeps a [`Directory`] fresh while it runs.
pub struct DirectoryTask {
    transport: Arc<dyn Transport>,
    client: Client,
    topic: Topic,
    peers: watch::Sender<Arc<BTreeMap<PublicKey, NodeInfo>>>,
}

impl Directory {
    /// Makes an empty directory of a topic, and the task that fills it.
    pub fn new(transport: Arc<dyn Transport>, client: Client, topic: Topic) -> (Self, DirectoryTask) {
        let (sender, peers) = watch::channel(Arc::default());
        (Self { peers }, DirectoryTask { transport, client, topic, peers: sender })
    }

    /// Returns the peers of a role, in the order of their keys.
    pub fn find(&self, role: NodeRole) -> Vec<PublicKey> {
        let peers = self.peers.borrow();
        peers.iter().filter(|(_, info)| info.roles.contains(&role)).map(|(key, _)| *key).collect()
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
        stop.run_until_cancelled(async {
            loop {
                self.refresh().await;
                let wait = if self.peers.borrow().is_empty() { SEARCH } else { REFRESH };
                time::sleep(wait).await;
            }
        })
        .await;
    }

    async fn refresh(&self) {
        let found = match self.transport.lookup(&self.topic).await {
            Ok(found) => found,
            Err(error) => {
                // Those known stay known: a network must outlive its lookups.
                debug!(%error, topic = %self.topic, "lookup failed");
                return;
            }
        };
        let own_key = self.transport.public_key();
        // Everyone is asked each time: a peer that left without a word drops out.
        let described = join_all(found.into_iter().filter(|key| *key != own_key).map(|key| async move {
            let info = self.client.call::<_, NodeInfo>(key, NODE_DESCRIBE, &Empty {}, DESCRIBE).await.ok()?;
            Some((key, info))
        }))
        .await;
        let fresh: BTreeMap<_, _> = described.into_iter().flatten().collect();
        self.peers.send_if_modified(|peers| {
            let changed = **peers != fresh;
            if changed {
                *peers = Arc::new(fresh);
            }
            changed
        });
    }
}

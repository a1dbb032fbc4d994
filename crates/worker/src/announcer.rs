//! Announces the worker on the presence topic, and on one topic for each model that is ready.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use protocol::health::HEARTBEAT;
use protocol::model::ModelKey;
use protocol::{Region, Topic};
use rpc::Transport;
use tokio::sync::watch;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Timeout for announcing one topic.
const ANNOUNCE_WITHIN: Duration = Duration::from_secs(10);
/// Timeout for unannouncing all topics at the end.
const UNANNOUNCE_WITHIN: Duration = Duration::from_secs(2);

/// Keeps the announced topics equal to the wanted ones.
pub(crate) struct Announcer<Wanted> {
    transport: Arc<dyn Transport>,
    /// Returns the topics that should be announced.
    wanted: Wanted,
    changes: watch::Receiver<()>,
    announced: BTreeSet<Topic>,
}

impl<Wanted: Fn() -> BTreeSet<Topic>> Announcer<Wanted> {
    pub(crate) fn new(transport: Arc<dyn Transport>, wanted: Wanted, changes: watch::Receiver<()>) -> Self {
        Self { transport, wanted, changes, announced: BTreeSet::new() }
    }

    /// Announces until `stop`, then unannounces every topic.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let announcing = async {
            loop {
                self.changes.mark_unchanged();
                let wanted = (self.wanted)();
                if wanted != self.announced {
                    self.reconcile(&wanted).await;
                }
                // A topic that failed is retried, even if nothing has changed.
                let _ = time::timeout(HEARTBEAT, self.changes.changed()).await;
            }
        };
        stop.run_until_cancelled(announcing).await;
        let _ = time::timeout(UNANNOUNCE_WITHIN, self.reconcile(&BTreeSet::new())).await;
    }

    async fn reconcile(&mut self, wanted: &BTreeSet<Topic>) {
        for topic in self.announced.difference(wanted).cloned().collect::<Vec<_>>() {
            match time::timeout(ANNOUNCE_WITHIN, self.transport.unannounce(&topic)).await {
                Ok(Ok(())) => drop(self.announced.remove(&topic)),
                Ok(Err(error)) => debug!(%topic, %error, "could not take the topic back"),
                Err(_) => debug!(%topic, "the topic was not taken back in time"),
            }
        }
        for topic in wanted {
            if self.announced.contains(topic) {
                continue;
            }
            // Recorded first: an announcement that `stop` interrupts may already have reached the network.
            self.announced.insert(topic.clone());
            match time::timeout(ANNOUNCE_WITHIN, self.transport.announce(topic)).await {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => debug!(%topic, %error, "could not announce"),
                Err(_) => debug!(%topic, "the topic was not announced in time"),
            }
            self.announced.remove(topic);
        }
    }
}

/// Returns the topics of a worker that serves these models in a region.
pub(crate) fn topics(region: &Region, ready: impl IntoIterator<Item = ModelKey>) -> BTreeSet<Topic> {
    let models = ready.into_iter().map(|key| Topic::Model(key.model_id, key.version, region.clone()));
    models.chain([Topic::Presence(region.clone())]).collect()
}

//! Finds the nodes that have a file: first workers that report it, then the registries.

use std::collections::BTreeMap;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use protocol::control::{ARTIFACT_HOLDERS, ArtifactHolders, ArtifactHoldersRequest, NodeRole};
use protocol::model::ModelKey;
use protocol::{Digest, PublicKey};
use rpc::{Client, Directory};
use tokio::time::Instant;
use tracing::debug;

/// Timeout for an orchestrator's list of workers.
const HOLDERS_WITHIN: Duration = Duration::from_secs(5);
/// How long to wait for a registry to be found.
const REGISTRY_WITHIN: Duration = Duration::from_secs(2);
/// Workers asked in one round.
const WORKERS_MAX: usize = 8;
/// Maximum number of avoided nodes. The one that is avoided longest gives way.
const AVOIDED_MAX: usize = 1024;
/// How long a node that sent wrong bytes is avoided.
pub(crate) const AVOID_FOR: Duration = Duration::from_mins(10);

/// A node that may have a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Source {
    pub(crate) peer: PublicKey,
    pub(crate) is_registry: bool,
}

/// Finds the nodes to ask for a file.
pub(crate) struct Sources {
    client: Client,
    pub(super) directory: Directory,
    /// Nodes that sent wrong bytes, and until when they are avoided.
    avoided: Mutex<BTreeMap<PublicKey, Instant>>,
}

impl Sources {
    pub(crate) fn new(client: Client, directory: Directory) -> Self {
        Self { client, directory, avoided: Mutex::default() }
    }

    /// Returns the nodes to ask for a file of these models, in order.
    ///
    /// Workers come first, in an order that differs from node to node. When many nodes fetch at once they serve each
    /// other, and few ask the registry.
    pub(crate) async fn of(&self, digest: &Digest, models: &[ModelKey]) -> Vec<Source> {
        let own = self.client.public_key();
        let mut workers = self.holders(digest, models).await.workers;
        workers.sort_by_key(|peer| Digest::of(&[own.0, peer.0, digest.0].concat()));
        workers.truncate(WORKERS_MAX);
        self.directory.wait_for(NodeRole::Registry, REGISTRY_WITHIN).await;
        let workers = workers.into_iter().map(|peer| Source { peer, is_registry: false });
        let registries = self.directory.find(NodeRole::Registry).into_iter();
        let all = workers.chain(registries.map(|peer| Source { peer, is_registry: true }));
        all.filter(|source| !self.is_avoided(source.peer)).collect()
    }

    async fn holders(&self, digest: &Digest, models: &[ModelKey]) -> ArtifactHolders {
        let request = ArtifactHoldersRequest { digest: *digest, models: models.to_vec() };
        for orchestrator in self.directory.find(NodeRole::Orchestrator) {
            match self.client.call(orchestrator, ARTIFACT_HOLDERS, &request, HOLDERS_WITHIN).await {
                Ok(holders) => return holders,
                Err(error) => debug!(orchestrator = orchestrator.short(), %error, "the workers could not be listed"),
            }
        }
        ArtifactHolders::default()
    }

    /// Avoids a node for a while.
    pub(crate) fn avoid(&self, peer: PublicKey) {
        avoid(&mut self.avoided(), peer, Instant::now());
    }

    /// Explains why there is no source to ask.
    pub(crate) fn nobody(&self) -> String {
        if self.avoided().is_empty() {
            "no node that has it answers".to_owned()
        } else {
            let minutes = AVOID_FOR.as_secs() / 60;
            format!("no node that has it answers, but for such that sent other bytes less than {minutes} minutes ago")
        }
    }

    fn is_avoided(&self, peer: PublicKey) -> bool {
        let now = Instant::now();
        let mut avoided = self.avoided();
        avoided.retain(|_, until| *until > now);
        avoided.contains_key(&peer)
    }

    fn avoided(&self) -> MutexGuard<'_, BTreeMap<PublicKey, Instant>> {
        self.avoided.lock()
    }
}

/// Adds a node to those that are avoided.
fn avoid(avoided: &mut BTreeMap<PublicKey, Instant>, peer: PublicKey, now: Instant) {
    avoided.retain(|_, until| *until > now);
    if avoided.len() >= AVOIDED_MAX
        && !avoided.contains_key(&peer)
        && let Some(first) = avoided.iter().min_by_key(|(_, until)| **until).map(|(peer, _)| *peer)
    {
        avoided.remove(&first);
    }
    avoided.insert(peer, now + AVOID_FOR);
}

/// Returns the nodes to blame for wrong bytes. A registry is blamed only if it sent the whole file.
pub(crate) fn blamed(contributors: &[Source], is_resumed: bool) -> Vec<PublicKey> {
    let is_alone = contributors.len() == 1 && !is_resumed;
    contributors.iter().filter(|source| is_alone || !source.is_registry).map(|source| source.peer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_number_of_nodes_is_avoided() {
        let (mut avoided, start) = (BTreeMap::new(), Instant::now());
        let node = |number: u32| PublicKey([number.to_le_bytes(); 8].concat().try_into().expect("32 bytes"));
        for number in 0..2 * AVOIDED_MAX as u32 {
            avoid(&mut avoided, node(number), start + Duration::from_millis(number.into()));
        }
        assert_eq!(avoided.len(), AVOIDED_MAX);
        assert!(!avoided.contains_key(&node(0)) && avoided.contains_key(&node(2 * AVOIDED_MAX as u32 - 1)));
        avoid(&mut avoided, node(0), start + 2 * AVOID_FOR);
        assert_eq!(avoided.len(), 1, "the others' time is over");
    }

    #[test]
    fn a_registry_is_blamed_for_what_it_sent_alone_and_a_worker_for_all_it_had_a_part_in() {
        let worker = Source { peer: PublicKey([1; 32]), is_registry: false };
        let registry = Source { peer: PublicKey([2; 32]), is_registry: true };
        assert_eq!(blamed(&[registry], false), [registry.peer]);
        assert_eq!(blamed(&[registry], true), []);
        assert_eq!(blamed(&[worker], true), [worker.peer]);
        assert_eq!(blamed(&[worker, registry], false), [worker.peer]);
    }
}

//! The artifacts that nodes may fetch from each other: those of the models that operators added, and of their adapters,
//! as of the last read of the catalogue.

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::control::Catalog;
use protocol::model::{ModelEntry, ModelKey};
use protocol::{Digest, ModelName};
use tokio::sync::watch;

/// The catalogue's facts about one artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ListedFile {
    /// Its length in bytes.
    pub(crate) bytes: u64,
    /// The least memory that its model takes, in bytes; 0 for an adapter.
    pub(crate) memory_min: u64,
    /// The models that it belongs to.
    pub(crate) models: Vec<ModelKey>,
}

/// The listed artifacts. Clones share their state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listed(watch::Sender<Arc<BTreeMap<Digest, ListedFile>>>);

impl Listed {
    /// Replaces the list with that of a catalogue.
    pub(crate) fn update(&self, catalog: &Catalog) {
        let added: BTreeMap<&ModelKey, &ModelEntry> =
            catalog.models.iter().filter(|model| model.added).map(|model| (&model.key, model)).collect();
        let mut files: BTreeMap<Digest, ListedFile> = BTreeMap::new();
        let mut add = |digest: Digest, bytes: u64, memory_min: u64, key: &ModelKey| {
            let file = files.entry(digest).or_insert_with(|| ListedFile { bytes, memory_min, models: vec![] });
            file.models.push(key.clone());
        };
        for model in added.values() {
            add(model.digest, model.bytes, memory_min(model), &model.key);
        }
        for adapter in catalog.adapters.iter().filter(|adapter| added.contains_key(&adapter.key.model)) {
            add(adapter.digest, adapter.bytes, 0, &adapter.key.model);
        }
        self.0.send_if_modified(|known| {
            let is_news = **known != files;
            if is_news {
                *known = Arc::new(files);
            }
            is_news
        });
    }

    /// Returns the facts about a listed artifact.
    pub(crate) fn get(&self, digest: &Digest) -> Option<ListedFile> {
        self.0.borrow().get(digest).cloned()
    }

    /// Returns every artifact of the added models and of their adapters.
    pub(crate) fn all(&self) -> Arc<BTreeMap<Digest, ListedFile>> {
        self.0.borrow().clone()
    }

    /// Returns the names of the models that an artifact belongs to.
    pub(crate) fn names_of(&self, digest: &Digest) -> Vec<ModelName> {
        self.get(digest).into_iter().flat_map(|file| file.models).map(|key| key.model_id).collect()
    }

    /// Waits until an artifact is no longer listed. Cancel safe.
    pub(crate) async fn until_gone(&self, digest: &Digest) {
        let mut files = self.0.subscribe();
        // The sender lives as long as `self`.
        let _ = files.wait_for(|files| !files.contains_key(digest)).await;
    }
}

/// Estimates the least memory that a model takes, from the catalogue. Counts its weights, and a quarter of what the
/// default settings need besides them, since contexts are shortened when memory is short. The plan before the load is
/// more precise.
fn memory_min(model: &ModelEntry) -> u64 {
    let memory_bytes = model.facts.as_ref().map_or(0, |facts| facts.memory_bytes);
    model.bytes.saturating_add(memory_bytes.saturating_sub(model.bytes) / 4)
}

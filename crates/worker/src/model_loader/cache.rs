//! The models of a worker and how far each is.
//!
//! Every model served stays resident. Pins, budgets and eviction would decide here which may.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use engine::{LoadSnapshot, LoadedModel, ModelId};
use protocol::PrefixDigest;
use protocol::health::{CachedModel, ModelState};
use protocol::model::ModelKey;
use tokio::sync::{Notify, watch};

use super::warm_prefixes::WarmPrefixes;
use crate::config::ServedModel;

/// How far a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Status {
    /// Nobody has asked for it.
    Absent,
    /// It is being verified or loaded.
    Loading,
    /// It answers.
    Ready(LoadedModel),
    /// It could not be loaded, or its engine died; it is tried again. For people and logs of this node only.
    Failed(Arc<str>),
}

/// A model that the worker serves.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) model: ServedModel,
    pub(crate) key: ModelKey,
    pub(crate) status: watch::Sender<Status>,
    /// Somebody wants it in memory.
    pub(crate) wanted: Notify,
    /// The engine that was last found dead.
    dead: watch::Sender<Option<ModelId>>,
    /// Failures since the last success of an engine that is still there.
    strikes: AtomicU32,
    /// What the present engine likely has at hand.
    warm: Mutex<WarmPrefixes>,
}

/// The models that the worker serves, in the order of its configuration.
#[derive(Debug)]
pub(crate) struct ModelCache {
    entries: Vec<Arc<Entry>>,
}

impl ModelCache {
    pub(crate) fn new(models: &[ServedModel]) -> Self {
        Self { entries: models.iter().map(|model| Arc::new(Entry::new(model.clone()))).collect() }
    }

    pub(crate) fn entries(&self) -> &[Arc<Entry>] {
        &self.entries
    }

    pub(crate) fn find(&self, key: &ModelKey) -> Option<&Arc<Entry>> {
        self.entries.iter().find(|entry| entry.key == *key)
    }

    /// Returns the models that answer.
    pub(crate) fn ready(&self) -> Vec<(ModelKey, LoadedModel)> {
        let ready = self.entries.iter().filter_map(|entry| Some((entry.key.clone(), entry.loaded()?)));
        ready.collect()
    }

    /// Returns what health reports say of the models in memory, or on their way there.
    pub(crate) fn manifest(&self, snapshots: &[LoadSnapshot]) -> Vec<CachedModel> {
        let cached = self.entries.iter().filter_map(|entry| {
            let (state, id) = match &*entry.status.borrow() {
                Status::Absent => return None,
                Status::Loading => (ModelState::Loading, None),
                Status::Ready(loaded) => (ModelState::Ready, Some(loaded.id)),
                Status::Failed(_) => (ModelState::Error, None),
            };
            let is_ready = state == ModelState::Ready;
            let snapshot = snapshots.iter().find(|snapshot| Some(snapshot.model) == id);
            Some(CachedModel {
                prefixes: if is_ready { entry.warm_prefixes() } else { Vec::new() },
                attested: entry.model.remote.is_none(),
                // JSON has no word for a number that is not finite.
                tokens_per_second: snapshot
                    .map(|snapshot| snapshot.tokens_per_second)
                    .filter(|speed| speed.is_finite())
                    .unwrap_or_default(),
                ..CachedModel::new(entry.key.clone(), entry.model.digest(), state)
            })
        });
        cached.collect()
    }
}

impl Entry {
    fn new(model: ServedModel) -> Self {
        Self {
            key: model.key(),
            model,
            status: watch::Sender::new(Status::Absent),
            wanted: Notify::new(),
            dead: watch::Sender::new(None),
            strikes: AtomicU32::new(0),
            warm: Mutex::default(),
        }
    }

    /// Returns the model where it answers.
    pub(crate) fn loaded(&self) -> Option<LoadedModel> {
        match &*self.status.borrow() {
            Status::Ready(loaded) => Some(loaded.clone()),
            _ => None,
        }
    }

    /// Takes the beginnings of a prompt that an engine evaluated, the longest first.
    pub(crate) fn remember(&self, id: ModelId, marks: impl Iterator<Item = PrefixDigest>) {
        // A job may outlive its engine; the next engine has nothing of it.
        if self.loaded().is_some_and(|loaded| loaded.id == id) {
            self.warm.lock().unwrap_or_else(PoisonError::into_inner).remember(marks);
        }
    }

    fn warm_prefixes(&self) -> Vec<PrefixDigest> {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner).list()
    }

    /// Makes the model answer on an engine that has evaluated nothing yet.
    pub(crate) fn set_ready(&self, loaded: LoadedModel) {
        *self.warm.lock().unwrap_or_else(PoisonError::into_inner) = WarmPrefixes::default();
        self.status.send_replace(Status::Ready(loaded));
    }

    /// Says that an engine is dead; one that was replaced already does not matter.
    pub(crate) fn bury(&self, id: ModelId) {
        self.dead.send_replace(Some(id));
    }

    /// Waits until an engine is found dead.
    pub(crate) async fn died(&self, id: ModelId) {
        // The sender lives as long as this entry.
        let _ = self.dead.subscribe().wait_for(|dead| *dead == Some(id)).await;
    }

    /// Counts a failure and returns how many came in a row.
    pub(crate) fn strike(&self) -> u32 {
        self.strikes.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Forgets the failures.
    pub(crate) fn forgive(&self) {
        // Read first: the usual case writes nothing that cores would have to share.
        if self.strikes.load(Ordering::Relaxed) != 0 {
            self.strikes.store(0, Ordering::Relaxed);
        }
    }
}

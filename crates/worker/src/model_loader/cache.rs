//! The models of a worker and how far each is.
//!
//! Every model served stays resident. Pins, budgets and eviction would decide here which may.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::{LoadSnapshot, LoadedModel, ModelId};
use protocol::health::{CachedModel, LoadProgress, ModelState};
use protocol::model::ModelKey;
use protocol::{AdapterName, PrefixDigest};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::adapters::Adapters;
use super::warm_prefixes::WarmPrefixes;
use crate::config::ServedModel;

/// How far a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Status {
    /// Nobody has asked for it.
    Absent,
    /// It is being verified or loaded.
    Loading(Load),
    /// It answers.
    Ready(LoadedModel),
    /// It could not be loaded, or its engine died; it is tried again. For people and logs of this node only.
    Failed(Arc<str>),
}

/// A load under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    since: Instant,
    percent: u8,
    /// Length of the artifact; 0 before it was opened.
    bytes: u64,
    /// How long it took the last time, and the wait before it; unknown for the first load.
    expected: Option<Duration>,
}

impl Load {
    /// Begins a load that is expected to take so long, where that is known.
    pub(crate) fn begin(expected: Option<Duration>) -> Self {
        Self { since: Instant::now(), percent: 0, bytes: 0, expected }
    }

    /// Returns how far it is. A load that is expected to take as long as the last one is as far as its time says, so
    /// that jobs wait for one that ends soon from its beginning on.
    fn progress(&self) -> LoadProgress {
        let Self { percent, bytes, expected, .. } = *self;
        let elapsed = self.since.elapsed();
        let Some(expected) = expected else {
            return LoadProgress { percent, elapsed_ms: elapsed.as_millis() as u64, bytes };
        };
        let by_time = 100 * elapsed.as_millis() / expected.as_millis().max(1);
        let percent = percent.max(by_time.clamp(1, 99) as u8);
        // A load that takes longer than expected is told by its own time again.
        let elapsed = elapsed.max(expected * u32::from(percent) / 100);
        LoadProgress { percent, elapsed_ms: elapsed.as_millis() as u64, bytes }
    }
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
    dead: watch::Sender<Option<(ModelId, Arc<str>)>>,
    /// Failures since the last success of an engine that is still there.
    strikes: AtomicU32,
    /// The adapters of the present engine.
    pub(crate) adapters: Arc<Adapters>,
    /// The pinned adapter is part of the weights.
    merged: AtomicBool,
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
            let (state, id, loading) = match &*entry.status.borrow() {
                Status::Absent => return None,
                Status::Loading(load) => (ModelState::Loading, None, Some(load.progress())),
                Status::Ready(loaded) => (ModelState::Ready, Some(loaded.id), None),
                Status::Failed(_) => (ModelState::Error, None, None),
            };
            let snapshot = snapshots.iter().find(|snapshot| Some(snapshot.model) == id);
            Some(CachedModel {
                attested: entry.model.remote.is_none(),
                adapters: id.map(|id| entry.adapters_at_hand(id)).unwrap_or_default(),
                loading,
                prefixes: id.map(|_| entry.warm_prefixes()).unwrap_or_default(),
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
        let adapters = Adapters::new(model.adapters_max);
        Self {
            key: model.key(),
            model,
            status: watch::Sender::new(Status::Absent),
            wanted: Notify::new(),
            dead: watch::Sender::new(None),
            strikes: AtomicU32::new(0),
            adapters,
            merged: AtomicBool::new(false),
            warm: Mutex::default(),
        }
    }

    /// Says whether the pinned adapter is part of the weights of the present engine.
    pub(crate) fn is_merged(&self) -> bool {
        self.merged.load(Ordering::Relaxed)
    }

    /// Notes it.
    pub(crate) fn set_merged(&self, merged: bool) {
        self.merged.store(merged, Ordering::Relaxed);
    }

    fn adapters_at_hand(&self, id: ModelId) -> Vec<AdapterName> {
        match &self.model.pinned_adapter {
            Some(pinned) if self.is_merged() => vec![pinned.clone()],
            _ => self.adapters.at_hand(id),
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
        self.adapters.begin(loaded.id);
        *self.warm.lock().unwrap_or_else(PoisonError::into_inner) = WarmPrefixes::default();
        self.status.send_replace(Status::Ready(loaded));
    }

    /// Notes the length of the artifact that is being loaded.
    pub(crate) fn opened(&self, bytes: u64) {
        self.status.send_modify(|status| {
            if let Status::Loading(load) = status {
                load.bytes = bytes;
            }
        });
    }

    /// Notes how far the load is. Says whether that is farther than before.
    pub(crate) fn progressed(&self, share: f32) -> bool {
        let percent = (share.clamp(0.0, 1.0) * 100.0) as u8;
        self.status.send_if_modified(|status| match status {
            Status::Loading(load) if load.percent < percent => {
                load.percent = percent;
                true
            }
            _ => false,
        })
    }

    /// Says that an engine is dead, and of what; one that was replaced already does not matter.
    pub(crate) fn bury(&self, id: ModelId, cause: impl Into<Arc<str>>) {
        self.dead.send_replace(Some((id, cause.into())));
    }

    /// Waits until an engine is found dead, and returns of what.
    pub(crate) async fn died(&self, id: ModelId) -> Arc<str> {
        let mut dead = self.dead.subscribe();
        let found = dead.wait_for(|dead| dead.as_ref().is_some_and(|(dead, _)| *dead == id)).await;
        // The sender lives as long as this entry.
        found.ok().and_then(|dead| dead.as_ref().map(|(_, cause)| cause.clone())).unwrap_or_default()
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

//! The models of a worker and their states.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use engine::{LoadSnapshot, LoadedModel, ModelId};
use parking_lot::{Mutex, MutexGuard, RwLock};
use protocol::control::ResidencyState;
use protocol::health::{CachedModel, LoadProgress, ModelState, REASON_BYTES_MAX};
use protocol::model::ModelKey;
use protocol::{AdapterName, PrefixDigest};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::adapters::Adapters;
use super::residency::{Order, Residency, ResidencyFacts};
use super::warm_prefixes::WarmPrefixes;
use crate::config::{ServedModel, duration_of};
use crate::{device_report, model_facts};

/// The base time of any load, and how fast its bytes are read, before a first load was measured.
const FIRST_LOAD: Duration = Duration::from_secs(1);
const LOAD_BYTES_PER_MILLI: u64 = 500_000;

/// The state of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Status {
    /// It is not in memory.
    Absent,
    /// It is being verified or loaded.
    Loading(Load),
    Ready(LoadedModel),
    /// It could not be loaded, or its engine died; it is retried. The reason is for operators.
    Failed(Arc<str>),
}

/// A load under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    since: Instant,
    percent: u8,
    /// Length of the artifact; 0 before it was opened.
    bytes: u64,
    /// How long the last load took, with the wait before it; for the first load, estimated from the length.
    expected: Option<Duration>,
    /// Set while its file is fetched from another node.
    fetch: Option<Fetch>,
}

/// Progress of a fetch, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fetch {
    /// What was there when the fetch began.
    begun_with: u64,
    there: u64,
    of: u64,
}

impl Fetch {
    /// Returns the progress of the whole file, with the time that all of it would have taken at this pace.
    fn progress(self, elapsed: Duration) -> LoadProgress {
        let percent = (100 * u128::from(self.there) / u128::from(self.of.max(1))).min(100) as u8;
        let came = self.there.saturating_sub(self.begun_with);
        let whole = elapsed.as_millis() * u128::from(self.there) / u128::from(came.max(1));
        // Nothing has come yet, so its end cannot be estimated.
        let percent = if came == 0 { 0 } else { percent };
        let elapsed_ms = u64::try_from(whole).unwrap_or(u64::MAX);
        LoadProgress { percent, elapsed_ms, bytes: self.of, fetching: true }
    }
}

impl Load {
    /// Begins a load, with its expected time if that is known.
    pub(crate) fn begin(expected: Option<Duration>) -> Self {
        Self { since: Instant::now(), percent: 0, bytes: 0, expected, fetch: None }
    }

    /// Returns the progress of the load. Before the engine reports any, it is derived from the expected time, so that
    /// jobs wait from the beginning for a load that ends soon.
    fn progress(&self) -> LoadProgress {
        let Self { percent, bytes, expected, .. } = *self;
        let elapsed = self.since.elapsed();
        if let Some(fetch) = self.fetch {
            return fetch.progress(elapsed);
        }
        let Some(expected) = expected.filter(|_| percent == 0) else {
            return LoadProgress { percent, elapsed_ms: elapsed.as_millis() as u64, bytes, fetching: false };
        };
        let by_time = 100 * elapsed.as_millis() / expected.as_millis().max(1);
        let percent = percent.max(by_time.clamp(1, 99) as u8);
        // A load that takes longer than expected is estimated by its own time again.
        let elapsed = elapsed.max(expected * u32::from(percent) / 100);
        LoadProgress { percent, elapsed_ms: elapsed.as_millis() as u64, bytes, fetching: false }
    }
}

/// How long a model stays in memory, by sources other than this worker's settings.
#[derive(Debug, Default, Clone, Copy)]
struct Wishes {
    /// The catalogue pins it.
    pin: bool,
    /// The catalogue's `keep_alive`, in seconds.
    listed: Option<i64>,
    /// The `keep_alive` of the last request or operator while it is in memory, in seconds.
    requested: Option<i64>,
}

/// A model that the worker serves.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) model: ServedModel,
    pub(crate) key: ModelKey,
    pub(crate) status: watch::Sender<Status>,
    /// Notified when a job wants it in memory.
    wanted: Notify,
    facts: Mutex<ResidencyFacts>,
    wishes: Mutex<Wishes>,
    /// The last decision, for its keeper.
    pub(crate) order: watch::Sender<Option<Order>>,
    /// Notifies the residency decision of each change.
    stirred: Arc<Notify>,
    /// It was not loaded at the start for lack of memory.
    stays_out: AtomicBool,
    /// Its file is not here, and can be fetched.
    to_fetch: AtomicBool,
    /// Jobs that wait for it.
    waiters: AtomicU32,
    /// Cancelled when it is no longer served.
    pub(crate) retired: CancellationToken,
    /// The engine that was last found dead, and why.
    dead: watch::Sender<Option<(ModelId, Arc<str>)>>,
    /// Consecutive failures of an engine that is still there.
    strikes: AtomicU32,
    /// The adapters of the present engine.
    pub(crate) adapters: Arc<Adapters>,
    /// The pinned adapter is merged into the weights.
    merged: AtomicBool,
    /// The prompt prefixes that the present engine likely has in its KV cache.
    warm: Mutex<WarmPrefixes>,
}

/// The models that the worker serves: those of its configuration, in its order, and then those of the catalogue.
#[derive(Debug)]
pub(crate) struct ModelCache {
    entries: RwLock<Arc<[Arc<Entry>]>>,
    /// Models that are no longer served and still hold memory.
    leaving: Mutex<Vec<Arc<Entry>>>,
    /// Notified of each change that may let a model into memory or out of it.
    pub(crate) stirred: Arc<Notify>,
}

/// A job's hold on a model in memory. While it lives, the model is not unloaded to free memory.
#[derive(Debug)]
pub(crate) struct Hold {
    entry: Arc<Entry>,
    pub(crate) loaded: LoadedModel,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut facts = self.entry.facts();
        facts.jobs = facts.jobs.saturating_sub(1);
        facts.last_used = Instant::now();
        let is_last = facts.jobs == 0;
        drop(facts);
        if is_last {
            self.entry.stirred.notify_one();
            if self.entry.retired.is_cancelled() {
                self.entry.status.send_modify(|_| {});
            }
        }
    }
}

/// A job's wait for a model.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    entry: &'a Entry,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut facts = self.entry.facts();
        if self.entry.waiters.fetch_sub(1, Ordering::AcqRel) == 1 {
            facts.waiting_since = None;
            self.entry.stirred.notify_one();
        }
    }
}

impl ModelCache {
    /// Creates the cache. With `preload` all models are loaded at the start, otherwise only the pinned ones.
    pub(crate) fn new(models: &[ServedModel], preload: bool) -> Self {
        let stirred = Arc::new(Notify::new());
        let entry = |model: &ServedModel| {
            let status =
                if preload || model.pin == Some(true) { Status::Loading(Load::begin(None)) } else { Status::Absent };
            Arc::new(Entry::new(model.clone(), status, stirred.clone()))
        };
        let entries = RwLock::new(models.iter().map(entry).collect());
        Self { entries, leaving: Mutex::default(), stirred: stirred.clone() }
    }

    /// Adds a model that is loaded on demand, and returns its entry.
    pub(crate) fn add(&self, model: ServedModel) -> Arc<Entry> {
        let added = Arc::new(Entry::new(model, Status::Absent, self.stirred.clone()));
        let mut entries = self.entries.write();
        *entries = entries.iter().chain([&added]).cloned().collect();
        added
    }

    /// Removes a model: it takes no more jobs, and is unloaded once those that run have ended.
    pub(crate) fn remove(&self, key: &ModelKey) {
        let mut entries = self.entries.write();
        let (gone, kept): (Vec<_>, Vec<_>) = entries.iter().cloned().partition(|entry| entry.key == *key);
        *entries = kept.into();
        self.leaving().extend(gone.iter().cloned());
        drop(entries);
        for entry in gone {
            entry.retired.cancel();
        }
        self.stirred.notify_one();
    }

    /// Forgets a removed model that holds no memory any more.
    pub(crate) fn forget(&self, entry: &Arc<Entry>) {
        self.leaving().retain(|leaving| !Arc::ptr_eq(leaving, entry));
        self.stirred.notify_one();
    }

    /// Returns the models that hold memory or may: those that are served, and those that are leaving.
    pub(crate) fn all_entries(&self) -> Vec<Arc<Entry>> {
        let entries = self.entries();
        entries.iter().cloned().chain(self.leaving().iter().cloned()).collect()
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        self.leaving.lock()
    }

    pub(crate) fn entries(&self) -> Arc<[Arc<Entry>]> {
        self.entries.read().clone()
    }

    pub(crate) fn find(&self, key: &ModelKey) -> Option<Arc<Entry>> {
        self.entries().iter().find(|entry| entry.key == *key).cloned()
    }

    /// Returns the models that are ready.
    pub(crate) fn ready(&self) -> Vec<(ModelKey, LoadedModel)> {
        let entries = self.entries();
        let ready = entries.iter().filter_map(|entry| Some((entry.key.clone(), entry.loaded()?)));
        ready.collect()
    }

    /// Returns the health report's entries of the models in memory, or being loaded.
    pub(crate) fn manifest(&self, snapshots: &[LoadSnapshot]) -> Vec<CachedModel> {
        let entries = self.entries();
        let cached = entries.iter().filter_map(|entry| {
            let (mut loading, mut reason, mut context_length, mut placement, mut server) = (None, None, 0, None, None);
            let (state, id) = match &*entry.status.borrow() {
                Status::Absent => return None,
                Status::Loading(load) => {
                    loading = Some(load.progress());
                    (ModelState::Loading, None)
                }
                Status::Ready(loaded) => {
                    context_length = loaded.context_length;
                    server = loaded.server.map(model_facts::server_to_protocol);
                    placement = device_report::device_placement(loaded, &entry.model);
                    (ModelState::Ready, Some(loaded.id))
                }
                Status::Failed(why) => {
                    reason = Some(why[..why.floor_char_boundary(REASON_BYTES_MAX)].to_owned());
                    (ModelState::Error, None)
                }
            };
            let snapshot = snapshots.iter().find(|snapshot| Some(snapshot.model) == id);
            Some(CachedModel {
                attested: entry.model.remote.is_none(),
                context_length,
                adapters: id.map(|id| entry.attached_adapters(id)).unwrap_or_default(),
                loading,
                reason,
                placement,
                server,
                prefixes: id.map(|_| entry.warm_prefixes()).unwrap_or_default(),
                // JSON cannot express a number that is not finite.
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
    fn new(model: ServedModel, status: Status, stirred: Arc<Notify>) -> Self {
        let adapters = Adapters::new(model.adapters_max);
        let facts = ResidencyFacts {
            residency: Residency::Unloaded,
            bytes: 0,
            bytes_min: 0,
            vram_bytes: 0,
            vram_bytes_min: 0,
            is_pinned: model.is_pinned(false),
            keep_alive: model.keep_alive(None),
            jobs: 0,
            waiting_since: None,
            last_used: Instant::now(),
            is_closed: false,
        };
        Self {
            key: model.key(),
            model,
            status: watch::Sender::new(status),
            wanted: Notify::new(),
            facts: Mutex::new(facts),
            wishes: Mutex::default(),
            order: watch::Sender::new(None),
            stirred,
            stays_out: AtomicBool::new(false),
            to_fetch: AtomicBool::new(false),
            waiters: AtomicU32::new(0),
            retired: CancellationToken::new(),
            dead: watch::Sender::new(None),
            strikes: AtomicU32::new(0),
            adapters,
            merged: AtomicBool::new(false),
            warm: Mutex::default(),
        }
    }

    /// Returns the facts by which residency is decided.
    pub(crate) fn facts(&self) -> MutexGuard<'_, ResidencyFacts> {
        self.facts.lock()
    }

    /// Applies the catalogue's pin and `keep_alive`. Returns whether the model has become pinned.
    pub(crate) fn follow(&self, pin: bool, keep_alive_secs: Option<i64>) -> bool {
        self.wish(|wishes| (wishes.pin, wishes.listed) = (pin, keep_alive_secs))
    }

    /// Applies the `keep_alive` of a request or an operator, in seconds; -1 for ever. It holds until the model is
    /// unloaded.
    pub(crate) fn keep_for(&self, secs: i64) {
        self.wish(|wishes| wishes.requested = Some(secs));
    }

    fn wish(&self, change: impl FnOnce(&mut Wishes)) -> bool {
        let mut wishes = self.wishes.lock();
        change(&mut wishes);
        let is_pinned = self.model.is_pinned(wishes.pin);
        let keep_alive = match wishes.requested {
            Some(secs) => duration_of(secs),
            None => self.model.keep_alive(wishes.listed),
        };
        drop(wishes);
        let mut facts = self.facts();
        let is_news = is_pinned && !facts.is_pinned;
        if (facts.is_pinned, facts.keep_alive) != (is_pinned, keep_alive) {
            (facts.is_pinned, facts.keep_alive) = (is_pinned, keep_alive);
            drop(facts);
            self.stirred.notify_one();
        }
        is_news
    }

    /// Returns whether it is unloaded as soon as it has no job.
    pub(crate) fn leaves_at_once(&self) -> bool {
        let facts = self.facts();
        facts.keep_alive == Some(Duration::ZERO) && !facts.is_pinned
    }

    /// Records the memory that it takes, and the least that it can take, in bytes.
    pub(crate) fn plan(&self, bytes: u64, bytes_min: u64) {
        let mut facts = self.facts();
        (facts.bytes, facts.bytes_min) = (bytes, bytes_min);
    }

    /// Records the GPU memory that it takes, in bytes, and the least that it can take, if that has changed.
    pub(crate) fn plan_vram(&self, bytes: u64, bytes_min: Option<u64>) {
        let mut facts = self.facts();
        facts.vram_bytes = bytes;
        facts.vram_bytes_min = bytes_min.unwrap_or(facts.vram_bytes_min);
    }

    /// Sets its residency, and triggers a new decision about which models stay in memory.
    pub(crate) fn move_to(&self, residency: Residency) {
        let mut facts = self.facts();
        facts.residency = residency;
        facts.is_closed = false;
        if let Residency::Loaded(since) = residency {
            facts.last_used = since;
        }
        drop(facts);
        if residency == Residency::Changing {
            // A request's `keep_alive` ends with this time in memory.
            self.wish(|wishes| wishes.requested = None);
        }
        self.order.send_replace(None);
        self.stirred.notify_one();
    }

    /// Applies a decision, unless a job has come meanwhile that it did not know of.
    pub(crate) fn obey(&self, order: Order) {
        let mut facts = self.facts();
        match order {
            Order::Leave if facts.jobs > 0 => {
                drop(facts);
                // Decide again, so that a model that waits for this memory need not wait for the next change.
                return self.stirred.notify_one();
            }
            // Its keeper is about to unload it.
            Order::Open if *self.order.borrow() == Some(Order::Leave) => return,
            Order::Leave | Order::Close => facts.is_closed = true,
            Order::Open => facts.is_closed = false,
            Order::Load(_) => facts.residency = Residency::Changing,
            Order::StayOut | Order::Refuse(_) => facts.residency = Residency::Unloaded,
        }
        drop(facts);
        match order {
            // Wakes the waiting jobs.
            Order::Open => self.status.send_modify(|_| {}),
            Order::Close => {}
            Order::Load(_) | Order::Leave => drop(self.order.send_replace(Some(order))),
            Order::StayOut | Order::Refuse(_) => {
                self.order.send_replace(Some(order));
                // Another model may be waiting for memory as well.
                self.stirred.notify_one();
            }
        }
    }

    /// Unloads the model unless jobs run on it, and returns its state.
    pub(crate) fn send_out(&self) -> (ResidencyState, Option<String>) {
        let status = self.status.borrow().clone();
        match status {
            Status::Ready(_) => {}
            Status::Loading(_) => return (ResidencyState::Loading, Some("it is just being loaded".into())),
            Status::Absent | Status::Failed(_) => return (ResidencyState::Unloaded, None),
        }
        if self.model.remote.is_some() {
            return (ResidencyState::Loaded, Some("another program's server holds it".into()));
        }
        let jobs = self.facts().jobs;
        match jobs {
            0 => {
                self.obey(Order::Leave);
                (ResidencyState::Unloaded, None)
            }
            1 => (ResidencyState::InUse, Some("a job runs on it".into())),
            jobs => (ResidencyState::InUse, Some(format!("{jobs} jobs run on it"))),
        }
    }

    /// Waits for the next order to its keeper.
    pub(crate) async fn ordered(&self) -> Order {
        let mut orders = self.order.subscribe();
        let order = orders.wait_for(Option::is_some).await;
        // The sender lives as long as this entry.
        order.ok().and_then(|order| *order).unwrap_or(Order::StayOut)
    }

    /// Returns a hold on the model if it is ready and accepts jobs.
    pub(crate) fn hold(self: &Arc<Self>) -> Option<Hold> {
        let mut facts = self.facts();
        let loaded = self.loaded().filter(|_| !facts.is_closed && !self.retired.is_cancelled())?;
        facts.jobs += 1;
        drop(facts);
        Some(Hold { entry: self.clone(), loaded })
    }

    /// Registers a waiting job.
    pub(crate) fn wait(&self) -> Waiting<'_> {
        let mut facts = self.facts();
        self.waiters.fetch_add(1, Ordering::AcqRel);
        facts.waiting_since.get_or_insert_with(Instant::now);
        drop(facts);
        self.wanted.notify_one();
        self.stirred.notify_one();
        Waiting { entry: self }
    }

    /// Returns whether jobs wait for it.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.waiters.load(Ordering::Acquire) > 0
    }

    /// Waits until jobs wait for it.
    pub(crate) async fn wanted(&self) {
        while !self.is_waited_for() {
            self.wanted.notified().await;
        }
    }

    /// Returns whether no job runs on it or waits for it.
    pub(crate) fn is_unused(&self) -> bool {
        self.facts().jobs == 0 && !self.is_waited_for()
    }

    /// Waits until no job runs on it.
    pub(crate) async fn is_free(&self) {
        let mut status = self.status.subscribe();
        while self.facts().jobs > 0 {
            let _ = status.changed().await;
        }
    }

    /// Returns whether it was left out at the start for lack of memory.
    pub(crate) fn has_stayed_out(&self) -> bool {
        self.stays_out.load(Ordering::Relaxed)
    }

    /// Records that it is loaded on demand only.
    pub(crate) fn stay_out(&self) {
        self.stays_out.store(true, Ordering::Relaxed);
    }

    /// Returns whether the pinned adapter is merged into the present engine's weights.
    pub(crate) fn is_merged(&self) -> bool {
        self.merged.load(Ordering::Relaxed)
    }

    pub(crate) fn set_merged(&self, merged: bool) {
        self.merged.store(merged, Ordering::Relaxed);
    }

    fn attached_adapters(&self, id: ModelId) -> Vec<AdapterName> {
        match &self.model.pinned_adapter {
            Some(pinned) if self.is_merged() => vec![pinned.clone()],
            _ => self.adapters.attached(id),
        }
    }

    /// Returns the model if it is ready.
    pub(crate) fn loaded(&self) -> Option<LoadedModel> {
        match &*self.status.borrow() {
            Status::Ready(loaded) => Some(loaded.clone()),
            _ => None,
        }
    }

    /// Records the prefixes of a prompt that an engine evaluated, the longest first.
    pub(crate) fn remember(&self, id: ModelId, marks: impl Iterator<Item = PrefixDigest>) {
        // A job may outlive its engine, and the next engine has none of its prefixes.
        if self.loaded().is_some_and(|loaded| loaded.id == id) {
            self.warm.lock().remember(marks);
        }
    }

    fn warm_prefixes(&self) -> Vec<PrefixDigest> {
        self.warm.lock().list()
    }

    /// Makes the model ready on a new engine, which has evaluated nothing yet.
    pub(crate) fn set_ready(&self, loaded: LoadedModel) {
        self.adapters.begin(loaded.id);
        *self.warm.lock() = WarmPrefixes::default();
        self.status.send_replace(Status::Ready(loaded));
    }

    /// Records the length of the artifact that is being loaded.
    pub(crate) fn opened(&self, bytes: u64) {
        self.status.send_modify(|status| {
            if let Status::Loading(load) = status {
                load.bytes = bytes;
                load.expected.get_or_insert(FIRST_LOAD + Duration::from_millis(bytes / LOAD_BYTES_PER_MILLI));
            }
        });
    }

    /// Returns whether its file must be fetched before it can be loaded.
    pub(crate) fn is_to_fetch(&self) -> bool {
        self.to_fetch.load(Ordering::Relaxed)
    }

    /// Records whether its file must be fetched, and returns whether that has changed.
    pub(crate) fn set_to_fetch(&self, to_fetch: bool) -> bool {
        self.to_fetch.swap(to_fetch, Ordering::Relaxed) != to_fetch
    }

    /// Records the progress of its fetch, in bytes.
    pub(crate) fn fetching(&self, there: u64, of: u64, begun_with: u64) {
        self.status.send_modify(|status| {
            let fetch = Some(Fetch { begun_with, there, of });
            match status {
                Status::Loading(load) if load.fetch.is_some() => load.fetch = fetch,
                _ => *status = Status::Loading(Load { fetch, ..Load::begin(None) }),
            }
        });
    }

    /// Records that its file is here, and that its load begins.
    pub(crate) fn fetched(&self) {
        self.status.send_replace(Status::Loading(Load::begin(None)));
    }

    /// Records the progress of its load. Returns whether the percentage has grown.
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

    /// Declares an engine dead, with the cause. If it was replaced already, nothing happens.
    pub(crate) fn declare_dead(&self, id: ModelId, cause: impl Into<Arc<str>>) {
        self.dead.send_replace(Some((id, cause.into())));
    }

    /// Waits until an engine is declared dead, and returns the cause.
    pub(crate) async fn died(&self, id: ModelId) -> Arc<str> {
        let mut dead = self.dead.subscribe();
        let found = dead.wait_for(|dead| dead.as_ref().is_some_and(|(dead, _)| *dead == id)).await;
        // The sender lives as long as this entry.
        found.ok().and_then(|dead| dead.as_ref().map(|(_, cause)| cause.clone())).unwrap_or_default()
    }

    /// Counts a failure, and returns the number of consecutive failures.
    pub(crate) fn strike(&self) -> u32 {
        self.strikes.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn forgive(&self) {
        // Checked first: the common case must not write to a cache line that cores share.
        if self.strikes.load(Ordering::Relaxed) != 0 {
            self.strikes.store(0, Ordering::Relaxed);
        }
    }
}

//! In-memory view of the live workers, from which the scheduler chooses.

pub(crate) mod listing;
mod pace;
mod replicas;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use protocol::control::FleetWorker;
use protocol::health::{Activity, CachedModel, EXPIRY, HealthReport, LoadProgress, ModelServer, ModelState};
use protocol::model::ModelKey;
use protocol::prefix::PrefixChain;
use protocol::{AdapterName, Digest, Region, WorkerId};
use tokio::time::Instant;

use crate::job_gate::JobGate;
use crate::scheduler::{Candidate, Refusal};
use pace::Pace;
use replicas::{Replica, Replicas};

/// What a report changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The worker was not known.
    Found,
    /// The report was the worker's last: it has left.
    Left,
    /// The worker was restarted: state of its earlier process is void.
    Restarted,
    /// The worker is known and stays.
    None,
}

/// While a worker fetches a model, no other fetches it if the fetch ends within this time.
const FETCH_WAIT: Duration = Duration::from_mins(10);
/// The speed of a fetch is not judged before it has run this long.
const FETCH_BEGINS: Duration = Duration::from_mins(1);
/// The most ejected workers that are remembered.
const EJECTED_MAX: usize = 16_384;
/// The most concurrent jobs and the most jobs in all that a worker's report is believed.
const SLOTS_MAX: u32 = 1_024;
const CAPACITY_MAX: u32 = 16_384;
/// The highest decode speed that a worker's report is believed, in tokens per second.
const SPEED_MAX: f32 = 100_000.0;
/// A job may be sent to a worker that is loading its model if the load ends within this time.
const LOAD_WAIT: Duration = Duration::from_secs(5);

/// Returns whether a load ends soon enough for a job to wait. A load that has only just begun has no estimate and does
/// not count.
fn ends_soon(progress: LoadProgress) -> bool {
    progress.remaining().is_some_and(|remaining| remaining <= LOAD_WAIT)
}

/// Returns whether a fetch or load ends within [`FETCH_WAIT`]. One that has just begun counts as in time. If it is too
/// slow, other workers may fetch the model too.
fn is_under_way(progress: LoadProgress) -> bool {
    progress.elapsed_ms < FETCH_BEGINS.as_millis() as u64
        || progress.remaining().is_some_and(|remaining| remaining <= FETCH_WAIT)
}

/// Returns the progress of a loading model. A worker that reports none counts as having just begun.
fn load_progress(cached: &&mut CachedModel) -> LoadProgress {
    cached.loading.unwrap_or_default()
}

/// What a job needs from a worker.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    pub model: &'a ModelKey,
    /// Digest of the model's file in the catalogue, if the job names it.
    pub digest: Option<Digest>,
    /// The adapter to run it with.
    pub adapter: Option<&'a AdapterName>,
    /// Digests of the prompt's prefixes.
    pub prefix: &'a PrefixChain,
    /// The longest context known to be too short for the job, in tokens; 0 if unknown.
    pub short_context: u32,
    /// The answer that the worker must continue, if another began it.
    pub continuation: Option<Continuation>,
    /// The regions in which the job may run; all if `None`.
    pub regions: Option<&'a [Region]>,
}

/// The kind of answer that a worker must continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuation {
    /// Its tokens are known: it is of an engine.
    Tokens,
    /// Only its text is known: a server of this kind began it. An engine does not continue it, because its template
    /// and its build of the model may differ.
    Text(ModelServer),
}

pub struct Fleet {
    own_region: Region,
    near_regions: Vec<Region>,
    /// The most jobs beyond its slots that a worker gets while others wait in the orchestrator.
    backlog_max: u32,
    state: RwLock<State>,
    /// Where jobs wait for the slots.
    gate: OnceLock<Weak<JobGate>>,
}

#[derive(Default)]
struct State {
    workers: Vec<Option<Worker>>,
    free: Vec<usize>,
    by_id: HashMap<WorkerId, usize>,
    by_model: HashMap<ModelKey, Replicas>,
    /// Until when workers are ejected, by worker, whether or not they are live. Has at most [`EJECTED_MAX`] entries.
    ejected: HashMap<WorkerId, Instant>,
}

/// A live worker. The fields that scoring reads come first, so that it touches few cache lines.
struct Worker {
    worker_id: WorkerId,
    proximity: f32,
    slots: u32,
    capacity: u32,
    /// Jobs that other orchestrators have on it, as far as its last report shows.
    others: u32,
    /// Jobs this orchestrator has reserved on it.
    reserved: AtomicU32,
    /// Those of them that give way to jobs of other classes.
    yielding: AtomicU32,
    /// The most that it had reserved since the last report.
    reserved_most: AtomicU32,
    pace: Pace,
    draining: bool,
    activity: Activity,
    set_aside_until: Option<Instant>,
    ejected_until: Option<Instant>,
    last_seen: Instant,
    /// When a report was last rejected because the worker's clock is off.
    skewed_at: Option<Instant>,
    report: HealthReport,
}

impl Worker {
    /// Returns how many jobs it has before further ones wait in the orchestrator. A worker without slots of its own has
    /// as many as it may.
    fn limit(&self, backlog_max: u32) -> u32 {
        let limit = self.slots.saturating_add(self.pace.backlog(self.slots, backlog_max));
        if self.slots == 0 { self.capacity } else { limit.min(self.capacity) }
    }

    fn is_silent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_seen) >= EXPIRY
    }

    /// Returns whether the worker only sends reports that are not believed.
    fn is_skewed(&self, now: Instant) -> bool {
        self.is_silent(now) && self.skewed_at.is_some_and(|at| now.saturating_duration_since(at) < EXPIRY)
    }
}

impl Fleet {
    /// Makes an empty fleet as seen from a region.
    pub fn new(own_region: Region, near_regions: Vec<Region>) -> Self {
        Self { own_region, near_regions, backlog_max: 0, state: RwLock::default(), gate: OnceLock::new() }
    }

    /// Releases jobs that wait at this gate, from now on, when a slot becomes free.
    pub(crate) fn feed(&self, gate: &Arc<JobGate>) {
        let _ = self.gate.set(Arc::downgrade(gate));
    }

    /// Keeps everybody from looking at the workers, until it is dropped.
    #[cfg(test)]
    pub(crate) fn hold(&self) -> impl Drop + '_ {
        self.write()
    }

    fn tell_gate(&self) {
        if let Some(gate) = self.gate.get().and_then(Weak::upgrade) {
            gate.poke();
        }
    }

    /// Lets workers with short jobs have up to so many more than their slots.
    #[must_use]
    pub fn with_backlog(self, backlog_max: u32) -> Self {
        Self { backlog_max, ..self }
    }

    /// Applies an accepted report.
    pub fn update(&self, mut report: HealthReport, now: Instant) -> Change {
        let proximity = self.proximity(&report.region);
        let mut guard = self.write();
        let state = &mut *guard;
        if report.is_last() {
            return if state.remove(report.worker_id) { Change::Left } else { Change::None };
        }
        let known = state.by_id.get(&report.worker_id).copied();
        let index = known.unwrap_or_else(|| state.index_for(report.worker_id));
        let before = state.workers[index].take();
        let ejected_until = state.ejected.get(&report.worker_id).copied().filter(|until| now < *until);
        if let Some(before) = &before {
            for model in before.report.supported.iter().filter(|model| !report.supported.contains(model)) {
                state.forget_replica(model, index);
            }
        }
        for model in &report.supported {
            let mut cached = report.model_cache.iter_mut().find(|cached| cached.key == *model);
            // The prefixes are moved to the lookup index, so listed reports leave them out.
            let prefixes = cached.as_mut().map(|cached| std::mem::take(&mut cached.prefixes)).unwrap_or_default();
            let replica = Replica {
                worker: index,
                resident: cached.as_ref().is_some_and(|cached| cached.state == ModelState::Ready),
                loading: cached.as_ref().filter(|cached| cached.state == ModelState::Loading).map(load_progress),
                to_fetch: report.to_fetch.contains(model),
                failed: cached.as_ref().is_some_and(|cached| cached.state == ModelState::Error),
                server: cached.as_ref().and_then(|cached| cached.server),
                is_adopted: cached.as_ref().is_some_and(|cached| !cached.attested),
                context_length: cached.as_ref().map_or(0, |cached| cached.context_length),
                digest: cached.as_ref().map(|cached| cached.digest),
                tokens_per_second: cached
                    .map(|cached| cached.tokens_per_second)
                    .filter(|speed| speed.is_finite())
                    .map_or(0.0, |speed| speed.clamp(0.0, SPEED_MAX)),
            };
            let replicas = state.by_model.entry(model.clone()).or_default();
            replicas.put(replica);
            replicas.warm_up(index, prefixes);
        }
        let same_start = before.as_ref().filter(|before| before.report.epoch == report.epoch);
        let change = match (&before, same_start) {
            (None, _) => Change::Found,
            (Some(_), None) => Change::Restarted,
            (Some(_), Some(_)) => Change::None,
        };
        let reserved = before.as_ref().map_or(0, |before| before.reserved.load(Ordering::Relaxed));
        let yielding = before.as_ref().map_or(0, |before| before.yielding.load(Ordering::Relaxed));
        let own = before.as_ref().map_or(0, |before| before.reserved_most.load(Ordering::Relaxed)).max(reserved);
        let reported = report.capacity.running.saturating_add(report.capacity.waiting);
        state.workers[index] = Some(Worker {
            worker_id: report.worker_id,
            proximity,
            slots: report.capacity.slots.min(SLOTS_MAX),
            capacity: report.capacity.total().min(CAPACITY_MAX),
            // The report may be older than the ends of jobs that it counts.
            others: reported.saturating_sub(own),
            reserved: AtomicU32::new(reserved),
            yielding: AtomicU32::new(yielding),
            reserved_most: AtomicU32::new(reserved),
            pace: same_start.map(|before| before.pace.clone()).unwrap_or_default(),
            draining: report.draining,
            activity: report.activity,
            // Unlike the next one, this outlives a restart: a worker must not shed its record by restarting.
            ejected_until,
            // A restarted worker is not blamed for its earlier process.
            set_aside_until: same_start.and_then(|before| before.set_aside_until),
            last_seen: now,
            skewed_at: None,
            report,
        });
        change
    }

    /// Removes the workers that have been silent for 15 seconds, and returns them. One whose clock is off stays, so
    /// that decisions name the reason why it gets no job.
    pub fn expire(&self, now: Instant) -> Vec<WorkerId> {
        let mut state = self.write();
        let silent = |worker: &&Worker| worker.is_silent(now) && !worker.is_skewed(now);
        let gone: Vec<WorkerId> =
            state.workers.iter().flatten().filter(silent).map(|worker| worker.worker_id).collect();
        for worker_id in &gone {
            state.remove(*worker_id);
        }
        gone
    }

    /// Removes a worker at once. Returns whether it was known.
    pub fn remove(&self, worker_id: WorkerId) -> bool {
        self.write().remove(worker_id)
    }

    /// Records that a report was rejected because the worker's clock is off.
    pub fn note_skew(&self, worker_id: WorkerId, now: Instant) {
        let mut state = self.write();
        if let Some(index) = state.by_id.get(&worker_id).copied()
            && let Some(worker) = &mut state.workers[index]
        {
            worker.skewed_at = Some(now);
        }
    }

    /// Sets a worker aside: until `until`, it gets a job only if no other worker can take it.
    pub fn set_aside(&self, worker_id: WorkerId, until: Instant) {
        let mut state = self.write();
        if let Some(index) = state.by_id.get(&worker_id).copied()
            && let Some(worker) = &mut state.workers[index]
        {
            worker.set_aside_until = Some(until);
        }
    }

    /// Takes a worker back that was set aside until `until`, unless it was set aside again since.
    pub fn take_back(&self, worker_id: WorkerId, until: Instant) {
        self.no_longer_aside(worker_id, until);
        self.tell_gate();
    }

    fn no_longer_aside(&self, worker_id: WorkerId, until: Instant) {
        let mut state = self.write();
        if let Some(index) = state.by_id.get(&worker_id).copied()
            && let Some(worker) = &mut state.workers[index]
            && worker.set_aside_until == Some(until)
        {
            worker.set_aside_until = None;
        }
    }

    /// Ejects a worker, also from its restarts: until `until`, it gets a job only if no other worker can take it.
    pub fn eject(&self, worker_id: WorkerId, until: Instant) {
        let mut guard = self.write();
        let state = &mut *guard;
        if state.ejected.len() >= EJECTED_MAX {
            let now = Instant::now();
            state.ejected.retain(|_, until| now < *until);
        }
        if state.ejected.len() < EJECTED_MAX || state.ejected.contains_key(&worker_id) {
            state.ejected.insert(worker_id, until);
        }
        if let Some(index) = state.by_id.get(&worker_id).copied()
            && let Some(worker) = &mut state.workers[index]
        {
            worker.ejected_until = Some(until);
        }
    }

    /// Adds one to a worker's reserved jobs, or subtracts one if `more` is false. A waiting job gets the slot then.
    /// `yields` says whether the job gives way to those of other classes.
    pub fn count_reserved(&self, worker_id: WorkerId, yields: bool, more: bool) {
        self.count(worker_id, yields, more);
        if !more {
            self.tell_gate();
        }
    }

    fn count(&self, worker_id: WorkerId, yields: bool, more: bool) {
        let state = self.read();
        let Some(worker) = state.by_id.get(&worker_id).and_then(|index| state.workers[*index].as_ref()) else {
            return;
        };
        if more {
            let before = worker.reserved.fetch_add(1, Ordering::Relaxed);
            worker.reserved_most.fetch_max(before.saturating_add(1), Ordering::Relaxed);
            worker.yielding.fetch_add(u32::from(yields), Ordering::Relaxed);
        } else {
            // Never below zero: the worker may have been removed and found again meanwhile.
            let less = |count: u32| count.checked_sub(1);
            let _ = worker.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            if yields {
                let _ = worker.yielding.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            }
        }
    }

    /// Calls `decide` with the workers that support one of a job's models.
    pub fn with_candidates<T>(
        &self,
        wanted: &[Wanted<'_>],
        now: Instant,
        decide: impl FnOnce(CandidateIter<'_>) -> T,
    ) -> T {
        let state = self.read();
        let sources: Vec<Source<'_>> = wanted.iter().map(|wanted| state.source(*wanted, now)).collect();
        let (workers, backlog_max) = (&state.workers[..], self.backlog_max);
        decide(CandidateIter { workers, sources: &sources, build: 0, replicas: [].iter(), backlog_max, now }.begin())
    }

    /// Records how long a worker took for a job, and how long its slot was empty before and after.
    pub fn note_pace(&self, worker_id: WorkerId, busy: Duration, between: Duration) {
        let state = self.read();
        if let Some(worker) = state.by_id.get(&worker_id).and_then(|index| state.workers[*index].as_ref()) {
            worker.pace.record(busy, between);
        }
    }

    /// Returns the server that runs a model for a worker, if the worker reported one.
    pub fn server(&self, worker_id: WorkerId, model: &ModelKey) -> Option<ModelServer> {
        let state = self.read();
        let worker = state.by_id.get(&worker_id).and_then(|index| state.workers[*index].as_ref())?;
        worker.report.model_cache.iter().find(|cached| cached.key == *model)?.server
    }

    /// Returns the context length that a worker reported for a model in its memory, or 0 if unknown.
    pub fn context_length(&self, worker_id: WorkerId, model: &ModelKey) -> u32 {
        let state = self.read();
        let worker = state.by_id.get(&worker_id).and_then(|index| state.workers[*index].as_ref());
        let cached = worker.and_then(|worker| worker.report.model_cache.iter().find(|cached| cached.key == *model));
        cached.map_or(0, |cached| cached.context_length)
    }

    /// Marks a worker as fetching a model, because it gets a job for a model whose file it lacks. Its next report
    /// replaces the mark.
    pub fn expect_fetch(&self, worker_id: WorkerId, model: &ModelKey) {
        let mut state = self.write();
        if let Some(index) = state.by_id.get(&worker_id).copied()
            && let Some(replicas) = state.by_model.get_mut(model)
        {
            replicas.expect_fetch(index);
        }
    }

    /// Returns the worker whose load of the wanted model has progressed the most, or `None` if a worker has it ready or
    /// none is loading it.
    pub fn loading(&self, wanted: Wanted<'_>, now: Instant) -> Option<(WorkerId, LoadProgress)> {
        let state = self.read();
        let replicas = state.by_model.get(wanted.model)?.list.iter();
        let live = replicas.filter_map(|replica| {
            let worker = state.workers[replica.worker].as_ref()?;
            let lives = worker.report.takes_jobs() && now.saturating_duration_since(worker.last_seen) < EXPIRY;
            let lives = lives && wanted.regions.is_none_or(|regions| regions.contains(&worker.report.region));
            (lives && wanted.is_adapter_served(worker)).then_some((worker.worker_id, replica))
        });
        let mut farthest: Option<(WorkerId, LoadProgress)> = None;
        for (worker_id, replica) in live {
            if replica.resident {
                return None;
            }
            if let Some(progress) = replica.loading
                && farthest.is_none_or(|(_, most)| most.percent < progress.percent)
            {
                farthest = Some((worker_id, progress));
            }
        }
        farthest
    }

    /// Lists every live worker, ordered by id.
    pub fn list(&self, now: Instant) -> Vec<FleetWorker> {
        let state = self.read();
        let mut workers: Vec<FleetWorker> = state
            .workers
            .iter()
            .flatten()
            .filter(|worker| now.saturating_duration_since(worker.last_seen) < EXPIRY)
            .map(|worker| FleetWorker {
                report: worker.report.clone(),
                age_ms: now.duration_since(worker.last_seen).as_millis() as u64,
                reserved: worker.reserved.load(Ordering::Relaxed),
                shortened: false,
            })
            .collect();
        workers.sort_by_key(|worker| worker.report.worker_id);
        workers
    }

    /// Returns the models that the workers support.
    pub fn models(&self) -> Vec<ModelKey> {
        self.read().by_model.keys().cloned().collect()
    }

    /// Returns how many workers are alive.
    pub fn len(&self) -> usize {
        self.read().by_id.len()
    }

    /// Returns how many workers are loading a model.
    pub fn loading_count(&self) -> usize {
        let state = self.read();
        let is_loading =
            |worker: &&Worker| worker.report.model_cache.iter().any(|model| model.state == ModelState::Loading);
        state.workers.iter().flatten().filter(is_loading).count()
    }

    /// Returns whether no worker is alive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the time since a worker's last report.
    pub fn silence(&self, worker_id: WorkerId, now: Instant) -> Option<Duration> {
        let state = self.read();
        let worker = state.workers[*state.by_id.get(&worker_id)?].as_ref()?;
        Some(now.duration_since(worker.last_seen))
    }

    fn proximity(&self, region: &Region) -> f32 {
        if *region == self.own_region {
            1.0
        } else if self.near_regions.contains(region) {
            0.5
        } else {
            0.0
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write()
    }
}

impl State {
    fn source<'a>(&'a self, wanted: Wanted<'a>, now: Instant) -> Source<'a> {
        let replicas = self.by_model.get(wanted.model);
        let list = replicas.map_or(&[][..], |replicas| &replicas.list);
        Source {
            warm: replicas.map(|replicas| replicas.shares(wanted.prefix)).unwrap_or_default(),
            is_coming: list
                .iter()
                .any(|replica| replica.loading.is_some_and(is_under_way) && self.is_live(replica, now)),
            replicas: list,
            wanted,
        }
    }

    fn index_for(&mut self, worker_id: WorkerId) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.workers.push(None);
            self.workers.len() - 1
        });
        self.by_id.insert(worker_id, index);
        index
    }

    fn is_live(&self, replica: &Replica, now: Instant) -> bool {
        let worker = self.workers[replica.worker].as_ref();
        worker.is_some_and(|worker| {
            worker.report.takes_jobs() && now.saturating_duration_since(worker.last_seen) < EXPIRY
        })
    }

    fn forget_replica(&mut self, model: &ModelKey, worker: usize) {
        if let Some(replicas) = self.by_model.get_mut(model) {
            replicas.remove(worker);
            if replicas.list.is_empty() {
                self.by_model.remove(model);
            }
        }
    }

    /// Removes a worker. Returns whether it was known.
    fn remove(&mut self, worker_id: WorkerId) -> bool {
        let Some(index) = self.by_id.remove(&worker_id) else { return false };
        if let Some(worker) = self.workers[index].take() {
            for model in &worker.report.supported {
                self.forget_replica(model, index);
            }
        }
        self.free.push(index);
        true
    }
}

impl Wanted<'_> {
    /// Returns whether the job was too long for another worker, and this one's context is not known to be longer.
    fn is_too_long_for(&self, replica: &Replica) -> bool {
        self.short_context > 0 && replica.context_length <= self.short_context
    }

    fn is_adapter_served(&self, worker: &Worker) -> bool {
        worker.report.serves_adapter(self.model, self.adapter)
    }

    fn is_adapter_attached(&self, worker: &Worker) -> bool {
        let cached = || worker.report.model_cache.iter().find(|cached| cached.key == *self.model);
        self.adapter.is_none_or(|name: &AdapterName| cached().is_some_and(|cached| cached.adapters.contains(name)))
    }
}

/// The workers of one model, and the share of the job's prompt that each has cached.
struct Source<'a> {
    replicas: &'a [Replica],
    warm: HashMap<usize, f32>,
    /// Whether a worker is fetching or loading the model; other workers then do not fetch it at the same time.
    is_coming: bool,
    wanted: Wanted<'a>,
}

impl Continuation {
    /// `continues_tokens` is what the worker reports of its engine.
    fn is_possible(self, replica: &Replica, continues_tokens: bool) -> bool {
        match self {
            Self::Tokens => continues_tokens && !replica.is_adopted && replica.server.is_none(),
            Self::Text(begun) => {
                replica.server.is_some_and(|server| server.kind == begun.kind && (server.prefills || !begun.prefills))
            }
        }
    }
}

/// Iterates over the workers that support one of a job's models, model by model.
#[derive(Clone)]
pub struct CandidateIter<'a> {
    workers: &'a [Option<Worker>],
    sources: &'a [Source<'a>],
    /// Index of the current source.
    build: usize,
    /// Remaining replicas of the current source.
    replicas: std::slice::Iter<'a, Replica>,
    backlog_max: u32,
    now: Instant,
}

impl<'a> CandidateIter<'a> {
    fn begin(self) -> Self {
        let replicas = self.sources.first().map_or(&[][..], |source| source.replicas).iter();
        Self { replicas, ..self }
    }

    #[inline]
    fn next_of(&mut self, source: &'a Source<'a>) -> Option<Candidate> {
        let wanted = &source.wanted;
        for replica in self.replicas.by_ref() {
            let Some(worker) = &self.workers[replica.worker] else { continue };
            // Expired, but not yet removed by the sweep.
            if worker.is_silent(self.now) && !worker.is_skewed(self.now) {
                continue;
            }
            let barred = if worker.is_skewed(self.now) {
                Some(Refusal::ClockSkew)
            } else if worker.draining {
                Some(Refusal::Draining)
            } else if worker.activity == Activity::Paused {
                Some(Refusal::Paused)
            } else if replica.failed {
                Some(Refusal::ModelError)
            } else if replica.loading.is_some_and(|progress| !ends_soon(progress))
                || replica.to_fetch && source.is_coming
            {
                Some(Refusal::Loading)
            } else if wanted.regions.is_some_and(|regions| !regions.contains(&worker.report.region)) {
                Some(Refusal::Region)
            } else if !wanted.is_adapter_served(worker) {
                Some(Refusal::NoAdapter)
            } else if wanted.continuation.is_some_and(|begun| !begun.is_possible(replica, worker.report.continues)) {
                Some(Refusal::CannotContinue)
            } else if wanted.is_too_long_for(replica) {
                Some(Refusal::ShortContext)
            } else if wanted.digest.is_some_and(|digest| replica.digest.is_some_and(|reported| reported != digest)) {
                Some(Refusal::OtherDigest)
            } else if worker.ejected_until.is_some_and(|until| self.now < until) {
                Some(Refusal::Ejected)
            } else if worker.set_aside_until.is_some_and(|until| self.now < until) {
                Some(Refusal::SetAside)
            } else {
                None
            };
            return Some(Candidate {
                worker_id: worker.worker_id,
                build: self.build,
                resident: replica.resident,
                has_file: !replica.to_fetch,
                is_deprioritised: worker.activity == Activity::Deprioritised,
                adapter_attached: wanted.is_adapter_attached(worker),
                proximity: worker.proximity,
                slots: worker.slots,
                capacity: worker.capacity,
                limit: worker.limit(self.backlog_max),
                load: worker.others.saturating_add(worker.reserved.load(Ordering::Relaxed)),
                yielding: worker.yielding.load(Ordering::Relaxed),
                warm_share: source.warm.get(&replica.worker).copied().unwrap_or_default(),
                tokens_per_second: replica.tokens_per_second,
                context_length: replica.context_length,
                barred,
            });
        }
        None
    }
}

impl Iterator for CandidateIter<'_> {
    type Item = Candidate;

    #[inline]
    fn next(&mut self) -> Option<Candidate> {
        loop {
            let source = self.sources.get(self.build)?;
            if let Some(candidate) = self.next_of(source) {
                return Some(candidate);
            }
            self.build += 1;
            self.replicas = self.sources.get(self.build)?.replicas.iter();
        }
    }
}

#[cfg(test)]
mod tests;

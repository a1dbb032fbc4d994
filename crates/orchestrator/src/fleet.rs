//! The workers believed alive, in memory: what the scheduler sees.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use protocol::control::FleetWorker;
use protocol::health::{EXPIRY, HealthReport, ModelState, PREFIXES_MAX};
use protocol::model::ModelKey;
use protocol::prefix::PrefixChain;
use protocol::{PrefixDigest, Region, WorkerId};
use tokio::time::Instant;

use crate::scheduler::{Candidate, Refusal};

/// What a report changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The worker was not known.
    Found,
    /// It was its last report: the worker is gone.
    Left,
    /// It was started again: what was known of its earlier life is void.
    Restarted,
    /// The worker is known and stays.
    None,
}

/// What a job wants of a worker.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The model.
    pub model: &'a ModelKey,
    /// The beginnings of its prompt.
    pub prefix: &'a PrefixChain,
}

/// The workers believed alive.
pub struct Fleet {
    own_region: Region,
    near_regions: Vec<Region>,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    workers: Vec<Option<Worker>>,
    free: Vec<usize>,
    by_id: HashMap<WorkerId, usize>,
    by_model: HashMap<ModelKey, Replicas>,
}

/// What placing a job needs of a worker comes first, so that scoring reads few cache lines.
struct Worker {
    worker_id: WorkerId,
    proximity: f32,
    slots: u32,
    capacity: u32,
    reported_load: u32,
    /// Jobs this orchestrator has reserved on it.
    reserved: AtomicU32,
    draining: bool,
    set_aside_until: Option<Instant>,
    last_seen: Instant,
    report: HealthReport,
}

/// The workers that support one model, without gaps, so that scoring is one pass.
#[derive(Default)]
struct Replicas {
    list: Vec<Replica>,
    position: HashMap<usize, usize>,
    /// The workers that have the beginning of a prompt at hand.
    warm: HashMap<PrefixDigest, Vec<usize>>,
    /// What each of them told of.
    told: HashMap<usize, Vec<PrefixDigest>>,
}

#[derive(Clone, Copy)]
struct Replica {
    worker: usize,
    resident: bool,
    failed: bool,
    tokens_per_second: f32,
}

impl Replicas {
    fn put(&mut self, replica: Replica) {
        if let Some(&position) = self.position.get(&replica.worker) {
            self.list[position] = replica;
        } else {
            self.position.insert(replica.worker, self.list.len());
            self.list.push(replica);
        }
    }

    /// Takes what a worker has at hand, in place of what it had before.
    fn warm_up(&mut self, worker: usize, mut prefixes: Vec<PrefixDigest>) {
        self.cool_down(worker);
        prefixes.truncate(PREFIXES_MAX);
        prefixes.sort_unstable();
        prefixes.dedup();
        for digest in &prefixes {
            self.warm.entry(*digest).or_default().push(worker);
        }
        if !prefixes.is_empty() {
            self.told.insert(worker, prefixes);
        }
    }

    fn cool_down(&mut self, worker: usize) {
        for digest in self.told.remove(&worker).unwrap_or_default() {
            if let Some(workers) = self.warm.get_mut(&digest) {
                workers.retain(|warm| *warm != worker);
                if workers.is_empty() {
                    self.warm.remove(&digest);
                }
            }
        }
    }

    /// Returns the share of a prompt that workers have at hand. Few do, or all of them little, so that looking from
    /// the prompt costs less than looking from each worker.
    fn shares(&self, prefix: &PrefixChain) -> HashMap<usize, f32> {
        let mut shares = HashMap::new();
        for (digest, share) in prefix.shares() {
            for worker in self.warm.get(&digest).into_iter().flatten() {
                shares.entry(*worker).or_insert(share);
            }
        }
        shares
    }

    fn remove(&mut self, worker: usize) {
        self.cool_down(worker);
        if let Some(position) = self.position.remove(&worker) {
            self.list.swap_remove(position);
            if let Some(moved) = self.list.get(position) {
                self.position.insert(moved.worker, position);
            }
        }
    }
}

impl Fleet {
    /// Makes an empty fleet, seen from a region.
    pub fn new(own_region: Region, near_regions: Vec<Region>) -> Self {
        Self { own_region, near_regions, state: RwLock::default() }
    }

    /// Takes a report that was found worth believing.
    pub fn update(&self, mut report: HealthReport, now: Instant) -> Change {
        let proximity = self.proximity(&report.region);
        let mut guard = self.write();
        let state = &mut *guard;
        if report.is_last() {
            return if state.remove(report.worker_id) { Change::Left } else { Change::None };
        }
        let known = state.by_id.get(&report.worker_id).copied();
        let index = known.unwrap_or_else(|| state.place_for(report.worker_id));
        let before = state.workers[index].take();
        if let Some(before) = &before {
            for model in before.report.supported.iter().filter(|model| !report.supported.contains(model)) {
                state.forget_replica(model, index);
            }
        }
        for model in &report.supported {
            let mut cached = report.model_cache.iter_mut().find(|cached| cached.key == *model);
            // Kept where they are looked up, and shown to nobody.
            let prefixes = cached.as_mut().map(|cached| std::mem::take(&mut cached.prefixes)).unwrap_or_default();
            let replica = Replica {
                worker: index,
                resident: cached.as_ref().is_some_and(|cached| cached.state == ModelState::Ready),
                failed: cached.as_ref().is_some_and(|cached| cached.state == ModelState::Error),
                tokens_per_second: cached
                    .map(|cached| cached.tokens_per_second)
                    .filter(|speed| speed.is_finite())
                    .unwrap_or(0.0),
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
        state.workers[index] = Some(Worker {
            worker_id: report.worker_id,
            proximity,
            slots: report.capacity.slots,
            capacity: report.capacity.total(),
            reported_load: report.capacity.running.saturating_add(report.capacity.waiting),
            reserved: AtomicU32::new(before.as_ref().map_or(0, |before| before.reserved.load(Ordering::Relaxed))),
            draining: report.draining,
            // A worker that was started anew is not blamed for what it was.
            set_aside_until: same_start.and_then(|before| before.set_aside_until),
            last_seen: now,
            report,
        });
        change
    }

    /// Forgets workers that have been silent for 15 seconds, and returns them.
    pub fn expire(&self, now: Instant) -> Vec<WorkerId> {
        let mut state = self.write();
        let silent = |worker: &&Worker| now.duration_since(worker.last_seen) >= EXPIRY;
        let gone: Vec<WorkerId> =
            state.workers.iter().flatten().filter(silent).map(|worker| worker.worker_id).collect();
        for worker_id in &gone {
            state.remove(*worker_id);
        }
        gone
    }

    /// Forgets a worker at once. Says whether it was known.
    pub fn remove(&self, worker_id: WorkerId) -> bool {
        self.write().remove(worker_id)
    }

    /// Gives a worker no job until `until`.
    pub fn set_aside(&self, worker_id: WorkerId, until: Instant) {
        let mut state = self.write();
        if let Some(index) = state.by_id.get(&worker_id).copied()
            && let Some(worker) = &mut state.workers[index]
        {
            worker.set_aside_until = Some(until);
        }
    }

    /// Counts a job reserved on a worker, or no longer.
    pub fn count_reserved(&self, worker_id: WorkerId, more: bool) {
        let state = self.read();
        let Some(worker) = state.by_id.get(&worker_id).and_then(|index| state.workers[*index].as_ref()) else {
            return;
        };
        if more {
            worker.reserved.fetch_add(1, Ordering::Relaxed);
        } else {
            // Not below zero: a worker may have been forgotten and found again in between.
            let less = |count: u32| count.checked_sub(1);
            let _ = worker.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
    }

    /// Shows the workers that support a job's model to a decision.
    pub fn with_candidates<T>(
        &self,
        wanted: Wanted<'_>,
        now: Instant,
        decide: impl FnOnce(CandidateIter<'_>) -> T,
    ) -> T {
        let state = self.read();
        let replicas = state.by_model.get(wanted.model);
        let list = replicas.map_or(&[][..], |replicas| &replicas.list);
        let warm = replicas.map(|replicas| replicas.shares(wanted.prefix)).unwrap_or_default();
        decide(CandidateIter { workers: &state.workers, replicas: list.iter(), warm: &warm, now })
    }

    /// Returns every live worker for people to see.
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

    /// Says whether no worker is alive.
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
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn place_for(&mut self, worker_id: WorkerId) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.workers.push(None);
            self.workers.len() - 1
        });
        self.by_id.insert(worker_id, index);
        index
    }

    fn forget_replica(&mut self, model: &ModelKey, worker: usize) {
        if let Some(replicas) = self.by_model.get_mut(model) {
            replicas.remove(worker);
            if replicas.list.is_empty() {
                self.by_model.remove(model);
            }
        }
    }

    /// Forgets a worker. Says whether it was known.
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

/// The workers that support a job's model.
#[derive(Clone)]
pub struct CandidateIter<'a> {
    workers: &'a [Option<Worker>],
    replicas: std::slice::Iter<'a, Replica>,
    warm: &'a HashMap<usize, f32>,
    now: Instant,
}

impl Iterator for CandidateIter<'_> {
    type Item = Candidate;

    #[inline]
    fn next(&mut self) -> Option<Candidate> {
        for replica in self.replicas.by_ref() {
            let Some(worker) = &self.workers[replica.worker] else { continue };
            // Gone, though nobody has cleared it away yet.
            if self.now.saturating_duration_since(worker.last_seen) >= EXPIRY {
                continue;
            }
            let barred = if worker.draining {
                Some(Refusal::Draining)
            } else if worker.set_aside_until.is_some_and(|until| self.now < until) {
                Some(Refusal::SetAside)
            } else if replica.failed {
                Some(Refusal::ModelError)
            } else {
                None
            };
            return Some(Candidate {
                worker_id: worker.worker_id,
                resident: replica.resident,
                proximity: worker.proximity,
                gpu_class_matches: true,
                slots: worker.slots,
                capacity: worker.capacity,
                // The worker's word is up to 5 s old, and other orchestrators' jobs are only in it.
                load: worker.reported_load.max(worker.reserved.load(Ordering::Relaxed)),
                warm_share: self.warm.get(&replica.worker).copied().unwrap_or_default(),
                tokens_per_second: replica.tokens_per_second,
                barred,
            });
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::health::{CachedModel, Capacity};
    use protocol::infer::InferRequest;
    use protocol::{Digest, PublicKey, UnixMillis};

    fn model(name: &str) -> ModelKey {
        ModelKey { model_id: name.parse().expect("name"), version: "1.0".parse().expect("version") }
    }

    fn report(number: u8, models: &[&str]) -> HealthReport {
        let worker_id = PublicKey([number; 32]);
        let cached = |name: &&str| CachedModel {
            tokens_per_second: 1.0,
            ..CachedModel::new(model(name), Digest([0; 32]), ModelState::Ready)
        };
        HealthReport {
            v: 1,
            worker_id,
            pub_key: worker_id,
            region: "local".parse().expect("region"),
            gpu_class: "cpu".into(),
            vram_gb: 0,
            accelerators: vec![],
            capacity: Capacity { slots: 2, running: 0, waiting: 0, queue_max: 2 },
            supported: models.iter().map(|name| model(name)).collect(),
            model_cache: models.iter().map(cached).collect(),
            latency_hops: 0,
            draining: false,
            epoch: 1,
            seq: 0,
            issued_at: UnixMillis(0),
            not_after: UnixMillis(0),
        }
    }

    fn fleet() -> Fleet {
        Fleet::new("local".parse().expect("region"), vec![])
    }

    fn of(model: &ModelKey) -> Wanted<'_> {
        static NO_PROMPT: PrefixChain = PrefixChain::NONE;
        Wanted { model, prefix: &NO_PROMPT }
    }

    fn serving(fleet: &Fleet, name: &str, now: Instant) -> Vec<u8> {
        let mut ids: Vec<u8> =
            fleet.with_candidates(of(&model(name)), now, |found| found.map(|found| found.worker_id.0[0]).collect());
        ids.sort_unstable();
        ids
    }

    #[test]
    fn a_worker_silent_for_fifteen_seconds_leaves_the_fleet() {
        let (fleet, now) = (fleet(), Instant::now());
        fleet.update(report(1, &["m"]), now);
        fleet.update(report(2, &["m"]), now + Duration::from_secs(1));
        assert_eq!(fleet.expire(now + Duration::from_millis(14_999)), []);
        assert_eq!(serving(&fleet, "m", now + Duration::from_millis(14_999)), [1, 2]);
        assert_eq!(serving(&fleet, "m", now + Duration::from_secs(15)), [2], "at once, and not at the next sweep");
        assert_eq!(fleet.expire(now + Duration::from_secs(15)), [PublicKey([1; 32])]);
        assert_eq!(serving(&fleet, "m", now), [2]);
    }

    #[test]
    fn a_worker_is_gone_with_its_last_report_and_not_before() {
        let (fleet, now) = (fleet(), Instant::now());
        let leaving = |running| {
            let mut report = report(1, &["m"]);
            (report.draining, report.capacity.running) = (true, running);
            report
        };
        assert_eq!(fleet.update(report(1, &["m"]), now), Change::Found);
        assert_eq!(fleet.update(leaving(1), now), Change::None);
        assert_eq!(fleet.len(), 1, "it still has a job");
        assert_eq!(fleet.update(leaving(0), now), Change::Left);
        assert_eq!(fleet.update(leaving(0), now), Change::None);
        assert_eq!((fleet.len(), serving(&fleet, "m", now)), (0, vec![]));
    }

    #[test]
    fn a_worker_that_was_started_again_is_told_from_one_that_went_on() {
        let (fleet, now) = (fleet(), Instant::now());
        let of_start = |epoch| HealthReport { epoch, ..report(1, &["m"]) };
        assert_eq!(fleet.update(of_start(1), now), Change::Found);
        assert_eq!(fleet.update(of_start(1), now), Change::None);
        assert_eq!(fleet.update(of_start(2), now), Change::Restarted);
        assert_eq!(fleet.update(of_start(2), now), Change::None);
    }

    #[test]
    fn the_workers_of_a_model_follow_the_reports() {
        let (fleet, now) = (fleet(), Instant::now());
        for number in 1..=4 {
            fleet.update(report(number, &["m", "n"]), now);
        }
        fleet.update(report(2, &["n"]), now);
        fleet.update(report(4, &["m"]), now);
        assert_eq!(serving(&fleet, "m", now), [1, 3, 4]);
        assert_eq!(serving(&fleet, "n", now), [1, 2, 3]);
        fleet.expire(now + EXPIRY);
        assert_eq!(serving(&fleet, "m", now), [0u8; 0]);
        fleet.update(report(9, &["m"]), now);
        assert_eq!(serving(&fleet, "m", now), [9]);
    }

    #[test]
    fn workers_are_as_warm_as_their_last_report_says() {
        let (fleet, now) = (fleet(), Instant::now());
        let job = |text: &str| -> InferRequest {
            let input = serde_json::json!({ "messages": [
                { "role": "system", "content": "Be brief." }, { "role": "user", "content": text },
            ]});
            serde_json::from_value(serde_json::json!({
                "tenantId": "acme", "modelId": "m", "version": "1.0", "input": input, "retryToken": "r",
                "correlationId": "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f", "traceId": "11".repeat(16),
            }))
            .expect("a job")
        };
        let (hello, bye) = (PrefixChain::of(&job("hello")), PrefixChain::of(&job("bye")));
        let warm = |number, prompt: Option<&PrefixChain>| {
            let mut report = report(number, &["m", "n"]);
            report.model_cache[0].prefixes = prompt.map(|prompt| prompt.marks().collect()).unwrap_or_default();
            fleet.update(report, now);
        };
        let shares = |prefix: &PrefixChain| -> Vec<f32> {
            let wanted = Wanted { model: &model("m"), prefix };
            let mut found: Vec<Candidate> = fleet.with_candidates(wanted, now, |found| found.collect());
            found.sort_by_key(|found| found.worker_id);
            found.into_iter().map(|found| (found.warm_share * 10.0).round() / 10.0).collect()
        };
        warm(1, Some(&hello));
        warm(2, Some(&bye));
        warm(3, None);
        assert_eq!(shares(&hello), [1.0, 0.6, 0.0], "all of it, what all begin with, nothing");
        warm(1, None);
        assert_eq!(shares(&hello), [0.0, 0.6, 0.0]);
        fleet.remove(PublicKey([2; 32]));
        assert_eq!(shares(&bye), [0.0, 0.0]);
        let state = fleet.read();
        let replicas = &state.by_model[&model("m")];
        assert!(replicas.warm.is_empty() && replicas.told.is_empty(), "nothing is left behind");
    }

    #[test]
    fn a_worker_is_as_loaded_as_the_larger_of_its_word_and_our_count() {
        let (fleet, now) = (fleet(), Instant::now());
        let id = PublicKey([1; 32]);
        let load = |fleet: &Fleet| {
            fleet.with_candidates(of(&model("m")), now, |mut found| found.next().map(|found| found.load))
        };
        fleet.update(report(1, &["m"]), now);
        fleet.count_reserved(id, true);
        fleet.count_reserved(id, true);
        assert_eq!(load(&fleet), Some(2));
        let mut busy = report(1, &["m"]);
        busy.capacity.running = 3;
        fleet.update(busy, now);
        assert_eq!(load(&fleet), Some(3));
        fleet.update(report(1, &["m"]), now);
        assert_eq!(load(&fleet), Some(2), "a report does not make us forget what we reserved");
        for _ in 0..5 {
            fleet.count_reserved(id, false);
        }
        assert_eq!(load(&fleet), Some(0));
    }
}

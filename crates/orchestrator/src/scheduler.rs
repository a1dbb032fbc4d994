//! Chooses the worker that runs a job.
//!
//! A pure function of the candidates and the job. It reads no clock and sends nothing; `Orchestrator` does both.

use std::cmp::Ordering;

use protocol::WorkerId;
use protocol::control::{CandidateScore, RefusedWorker};
use protocol::health::Activity;
use protocol::model::ModelKey;

pub mod affinity;

use affinity::{Terms, Weights};

/// The most rows of the decision table; of a large fleet only the best are kept.
pub const TABLE_MAX: usize = 64;

/// A worker and one of the requested models that it supports. A worker that supports several is listed once for each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub worker_id: WorkerId,
    /// Index of the model it would run, among the models that may run the job.
    pub build: usize,
    /// Whether the model is in its memory.
    pub resident: bool,
    /// Whether the model's file is on its disk.
    pub has_file: bool,
    /// Whether its machine's owner lets it take only jobs that find room on no other worker.
    pub is_deprioritised: bool,
    /// Whether the requested adapter is attached, or none was requested.
    pub adapter_attached: bool,
    /// 1 in the same region, less in regions farther away.
    pub proximity: f32,
    /// Jobs it runs concurrently.
    pub slots: u32,
    /// Jobs it may hold, running and waiting.
    pub capacity: u32,
    /// Jobs it holds before further ones wait in the orchestrator: its slots, and more if its jobs are short.
    pub limit: u32,
    /// Jobs it holds, as far as known.
    pub load: u32,
    /// Those of them that give up their slots to jobs of other classes: batch jobs of this orchestrator.
    pub yielding: u32,
    /// Share of the prompt in its prefix cache, 0 to 1.
    pub warm_share: f32,
    /// Decode speed in tokens per second, 0 if unknown.
    pub tokens_per_second: f32,
    /// The model's context in tokens, 0 if unknown.
    pub context_length: u32,
    /// Why it cannot be chosen, if so.
    pub barred: Option<Refusal>,
}

/// Why a worker cannot be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It holds as many jobs as it may.
    Full,
    /// All its slots are taken. Jobs wait for one in the orchestrator.
    Busy,
    /// It accepts no new jobs.
    Draining,
    /// Its machine's owner lets it take no jobs at present.
    Paused,
    /// It did not acknowledge a recent job. It is chosen only if no other worker can be, and none is merely full.
    SetAside,
    /// It failed too often or lied. Like one that is set aside, it is chosen only if no other worker can be.
    Ejected,
    /// Its clock is off, so its reports are not believed. It keeps the jobs that it has.
    ClockSkew,
    /// It reports another file under the model's name than the catalogue.
    OtherDigest,
    /// It could not load the model.
    ModelError,
    /// It is loading the model and will not be ready soon, or another worker is already fetching the model.
    Loading,
    /// The tenant's jobs may not run in its region.
    Region,
    /// It does not serve the requested adapter.
    NoAdapter,
    /// It cannot continue an answer that another worker began: its version is too old, or it has adopted the model's
    /// server.
    CannotContinue,
    /// Its context is no longer than one that was too short for the job.
    ShortContext,
    /// The job could cost more there than its tenant's quotas allow.
    OverQuota,
    /// It already failed this job with the same model.
    Tried,
}

impl Refusal {
    /// Returns the reason's name in decision tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Busy => "busy",
            Self::Draining => "draining",
            Self::Paused => "paused",
            Self::SetAside => "set_aside",
            Self::Ejected => "ejected",
            Self::ClockSkew => "clock_skew",
            Self::OtherDigest => "other_digest",
            Self::ModelError => "model_error",
            Self::Loading => "loading",
            Self::Region => "region_not_allowed",
            Self::NoAdapter => "no_adapter",
            Self::CannotContinue => "cannot_continue",
            Self::ShortContext => "short_context",
            Self::OverQuota => "over_quota",
            Self::Tried => "tried",
        }
    }
}

/// Where a job goes, and why.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Placement {
    /// The chosen worker, or `None` if all are refused.
    pub chosen: Option<Candidate>,
    /// The best candidates and their terms, the best first.
    pub candidates: Vec<CandidateScore>,
    /// Workers that cannot be chosen.
    pub refused: Vec<RefusedWorker>,
    /// Whether a worker could run the job, but none has room, so that the job may wait.
    pub is_busy: bool,
    /// Whether the chosen worker must fetch the model's file, while one that has it merely has no free slot.
    pub may_wait_for_file: bool,
}

/// The room of the workers that may run a job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Supply {
    /// Whether a worker may run it at all, now or once it has room.
    pub exists: bool,
    /// Free slots of workers that have the model's file.
    free: u32,
    /// The same for jobs that others give way to.
    urgent: u32,
    /// Free slots of those that must fetch it.
    to_fetch: u32,
    /// Jobs that may wait before another worker fetches the file.
    patient: u32,
}

impl Supply {
    /// Adds the room of a worker.
    fn add(&mut self, candidate: &Candidate) {
        let most = candidate.limit.min(candidate.capacity);
        let free = most.saturating_sub(candidate.load);
        self.exists = true;
        if candidate.has_file {
            self.free += free;
            let urgent = most.saturating_sub(candidate.load.saturating_sub(candidate.yielding));
            // Jobs that give up their slots stay with the worker.
            self.urgent += urgent.min(candidate.capacity.saturating_sub(candidate.load));
            self.patient += candidate.capacity.saturating_sub(candidate.limit);
        } else {
            self.to_fetch += free;
        }
    }

    /// Returns how many jobs may start, if so many wait.
    pub fn room(&self, waiting: usize) -> u32 {
        if self.free == 0 && waiting as u64 > u64::from(self.patient) { self.to_fetch } else { self.free }
    }

    /// Returns how many jobs may start that are not batch jobs, if so many wait.
    pub fn urgent_room(&self, waiting: usize) -> u32 {
        self.room(waiting).max(self.urgent)
    }
}

/// Returns the room of the workers that may run a job. Those that are set aside or ejected count if there are no
/// others.
pub fn supply(candidates: impl Iterator<Item = Candidate>) -> Supply {
    let (mut best, mut usable, mut last_resort, mut build) =
        (Supply::default(), Supply::default(), Supply::default(), 0);
    for candidate in candidates {
        if candidate.build != build {
            // A worker is listed once for each model, and has its slots only once.
            best = best.larger(usable);
            (usable, build) = (Supply::default(), candidate.build);
        }
        match candidate.barred {
            None => usable.add(&candidate),
            Some(Refusal::SetAside | Refusal::Ejected) => last_resort.add(&candidate),
            Some(_) => {}
        }
    }
    let best = best.larger(usable);
    if best.exists { best } else { last_resort }
}

impl Supply {
    fn larger(self, other: Self) -> Self {
        let order = |supply: &Self| (supply.exists, supply.free, supply.to_fetch);
        if order(&other) > order(&self) { other } else { self }
    }
}

/// A worker that failed a job, and the index of the model it ran, as in [`Candidate::build`].
pub type Tried = (WorkerId, usize);

/// Places a job. `tried` lists the workers that failed it before. `models` lists the models that may run it, for the
/// table, and is empty if there is only one.
pub fn place(
    candidates: impl Iterator<Item = Candidate> + Clone,
    tried: &[Tried],
    weights: &Weights,
    models: &[ModelKey],
) -> Placement {
    let model_of = |candidate: &Candidate| models.get(candidate.build).cloned();
    let fastest = candidates.clone().map(|candidate| candidate.tokens_per_second).fold(0.0, f32::max);
    let mut placement = Placement::default();
    let mut table: Vec<(f64, Candidate)> = Vec::with_capacity(TABLE_MAX * 2);
    let mut is_cut = false;
    let mut chosen: Option<(f64, Candidate)> = None;
    // A missing acknowledgement may be the fault of the machine or the network, so such a worker is better than none. A
    // full worker is better still, because it has a free slot soon.
    let mut last_resort: Option<(f64, Candidate)> = None;
    let mut is_one_full = false;
    let mut is_one_busy = false;
    let mut is_one_ejected = false;
    for candidate in candidates {
        if let Some(refusal) = refusal(&candidate, tried) {
            is_one_full |= refusal == Refusal::Full;
            is_one_busy |= refusal == Refusal::Busy;
            let taken_back = Candidate { barred: None, ..candidate };
            let has_no_room = matches!(self::refusal(&taken_back, tried), Some(Refusal::Full | Refusal::Busy));
            let is_of_load = matches!(refusal, Refusal::Full | Refusal::Busy | Refusal::SetAside | Refusal::Ejected);
            placement.is_busy |= is_of_load && has_no_room;
            placement.may_wait_for_file |= refusal == Refusal::Busy && candidate.has_file;
            if matches!(refusal, Refusal::SetAside | Refusal::Ejected) && self::refusal(&taken_back, tried).is_none() {
                let score = Terms::of(&candidate, fastest).score(weights);
                // An ejection lasts too long to wait for a free slot elsewhere.
                is_one_ejected |= refusal == Refusal::Ejected;
                if last_resort.as_ref().is_none_or(|best| is_better((score, &taken_back), (best.0, &best.1))) {
                    last_resort = Some((score, taken_back));
                }
            }
            if placement.refused.len() < TABLE_MAX {
                let reason = refusal.as_str().to_owned();
                let (worker_id, model) = (candidate.worker_id, model_of(&candidate));
                placement.refused.push(RefusedWorker { worker_id, model, reason });
            }
            continue;
        }
        let score = Terms::of(&candidate, fastest).score(weights);
        if chosen.as_ref().is_none_or(|best| is_better((score, &candidate), (best.0, &best.1))) {
            chosen = Some((score, candidate));
        }
        // The table grows to twice its size before it is cut back, so that a large fleet is not sorted for its sake.
        let worst = if is_cut { table.get(TABLE_MAX - 1) } else { None };
        if worst.is_none_or(|worst| is_better((score, &candidate), (worst.0, &worst.1))) {
            table.push((score, candidate));
            if table.len() == TABLE_MAX * 2 {
                cut(&mut table);
                is_cut = true;
            }
        }
    }
    if let (None, false, Some((score, candidate))) =
        (chosen, is_one_busy || is_one_full && !is_one_ejected, last_resort)
    {
        chosen = last_resort;
        table.push((score, candidate));
        let is_it =
            |refused: &RefusedWorker| refused.worker_id == candidate.worker_id && refused.model == model_of(&candidate);
        placement.refused.retain(|refused| !is_it(refused));
    }
    cut(&mut table);
    let row = |(score, candidate): &(f64, Candidate)| row(*score, candidate, model_of(candidate), fastest);
    placement.candidates = table.iter().map(row).collect();
    placement.chosen = chosen.map(|(_, candidate)| candidate);
    placement.is_busy &= placement.chosen.is_none();
    placement.may_wait_for_file &= placement.chosen.is_some_and(|candidate| !candidate.has_file);
    placement
}

fn refusal(candidate: &Candidate, tried: &[Tried]) -> Option<Refusal> {
    if candidate.barred.is_some() {
        candidate.barred
    } else if tried.contains(&(candidate.worker_id, candidate.build)) {
        Some(Refusal::Tried)
    } else if candidate.load >= candidate.capacity {
        Some(Refusal::Full)
    } else if candidate.load >= candidate.limit {
        Some(Refusal::Busy)
    } else {
        None
    }
}

/// Returns whether `one` is the better candidate. Workers that must fetch the model's file come last, whatever their
/// score, and before them those that their owners deprioritise. Equal scores go to the lowest id, so that every
/// orchestrator agrees.
fn is_better(one: (f64, &Candidate), other: (f64, &Candidate)) -> bool {
    order(one, other).is_lt()
}

/// Orders candidates, the better first.
fn order(one: (f64, &Candidate), other: (f64, &Candidate)) -> Ordering {
    let by_file = other.1.has_file.cmp(&one.1.has_file);
    let by_owner = one.1.is_deprioritised.cmp(&other.1.is_deprioritised);
    by_file.then(by_owner).then_with(|| other.0.total_cmp(&one.0)).then_with(|| one.1.worker_id.cmp(&other.1.worker_id))
}

fn cut(table: &mut Vec<(f64, Candidate)>) {
    table.sort_by(|one, other| order((one.0, &one.1), (other.0, &other.1)));
    table.truncate(TABLE_MAX);
}

fn row(score: f64, candidate: &Candidate, model: Option<ModelKey>, fastest: f32) -> CandidateScore {
    let terms = Terms::of(candidate, fastest);
    CandidateScore {
        worker_id: candidate.worker_id,
        model,
        activity: if candidate.is_deprioritised { Activity::Deprioritised } else { Activity::Accepting },
        score,
        model_match: terms.model_match,
        region_proximity: terms.region_proximity,
        queue_depth: terms.queue_depth,
        warm_cache: terms.warm_cache,
        speed: terms.speed,
    }
}

#[cfg(test)]
mod tests;

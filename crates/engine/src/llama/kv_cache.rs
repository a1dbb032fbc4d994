//! The KV cache of one context: which sequences hold which cells, and what is kept as a prefix cache.
//!
//! When a generation ends, its sequence is retained. A prompt with the same prefix takes a retained sequence over, or
//! shares the prefix of one, retained or running, without copying a cell. If cells run short, the least recently used
//! sequence moves to host memory, and can come back from there.
//!
//! In layers with sliding-window or chunked attention, llama.cpp reuses cells outside the window and leaves them out of
//! what it saves. So a prefix is used only if every layer still has all cells that the next token sees.

use std::sync::Arc;

use super::cell_ledger::{CellLedger, Cells};
use super::native::{Context, Model, Token, Window};
use super::prompt_logits::PromptLogits;
use super::snapshots::{Snapshot, Snapshots};
use crate::model_runtime::AdapterId;

/// The most retained sequences; llama.cpp keeps a row of logits for each.
const RETAINED_MAX: u32 = 32;
/// Cells of all retained sequences but the latest; the others move to host memory.
///
/// Attention reads every cell up to the last one in use: 10,000 cells that no running sequence needs cost a model of
/// 0.5 billion parameters a quarter of its speed. A copy costs a few microseconds a token.
const RETAINED_CELLS_MAX: usize = 1_024;
/// Tokens that restoring a snapshot must save, beyond what the cache has, to be worth the copy.
const SNAPSHOT_GAIN_MIN: usize = 32;
/// The fraction (1/8) of host memory for snapshots that prompt logits may take.
const LOGITS_PART: u64 = 8;

/// Tokens whose keys and values are in the cache.
#[derive(Debug)]
pub(super) struct CachedSequence {
    /// llama.cpp's id of the sequence.
    pub(super) seq_id: i32,
    /// Its tokens, in order from the first position.
    pub(super) tokens: Vec<Token>,
    /// The adapter that it was evaluated with; another adapter gives other keys and values.
    pub(super) adapter: Option<AdapterId>,
    cells: Cells,
}

/// The KV cache of one context.
#[derive(Debug)]
pub(super) struct KvCache {
    pub(super) context: Context,
    ledger: CellLedger,
    /// Sequence ids that are not in use.
    free_ids: Vec<i32>,
    /// In LRU order: the least recently used first.
    retained: Vec<CachedSequence>,
    snapshots: Snapshots,
    prompt_logits: PromptLogits,
    can_rewind: bool,
    window: Window,
}

/// The cached prefix of a prompt.
#[derive(Debug)]
pub(super) struct CachedPrefix {
    pub(super) cached: CachedSequence,
    /// The logits after the prompt, if all of it is cached and they are known.
    pub(super) logits: Option<Arc<[f32]>>,
}

/// Where the prefix of a prompt is cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Retained(usize),
    Running(i32),
    Snapshot(usize),
}

impl KvCache {
    /// Returns the empty cache of a context with so many cells and at most `slots` running sequences.
    pub(super) fn new(context: Context, cells: u32, slots: u32, host_bytes_max: u64) -> Self {
        let (can_rewind, window) = (context.model().can_rewind(), context.model().window());
        let free_ids = (0..sequences(context.model(), slots).cast_signed()).rev().collect();
        let bytes_max = if can_rewind { host_bytes_max } else { 0 };
        let logits_max = bytes_max / LOGITS_PART;
        Self {
            context,
            ledger: CellLedger::new(cells),
            free_ids,
            retained: Vec::new(),
            snapshots: Snapshots::new(bytes_max - logits_max, window),
            prompt_logits: PromptLogits::new(logits_max),
            can_rewind,
            window,
        }
    }

    /// Returns whether a sequence can be truncated and shared. Recurrent models cannot.
    pub(super) fn can_rewind(&self) -> bool {
        self.can_rewind
    }

    /// Returns the fraction of the cells that running sequences hold, 0 to 1. Cells of retained sequences count as
    /// free.
    pub(super) fn usage(&self) -> f32 {
        1.0 - self.available() as f32 / self.ledger.len() as f32
    }

    /// Returns how many cells are free or would be after eviction.
    pub(super) fn available(&self) -> usize {
        self.ledger.free() + self.retained.iter().map(|cached| self.ledger.alone(&cached.cells)).sum::<usize>()
    }

    /// Returns how many of the available cells a prompt would take.
    pub(super) fn cells_for<'a>(
        &self,
        prompt: &[Token],
        adapter: Option<AdapterId>,
        running: impl Iterator<Item = &'a CachedSequence>,
    ) -> usize {
        match self.find(prompt, adapter, running) {
            Some((Source::Running(_), common)) => prompt.len() - common,
            // Retained cells count as available, and no longer do once the sequence runs.
            Some((Source::Retained(index), common)) => {
                prompt.len() - common + common.min(self.ledger.alone(&self.retained[index].cells))
            }
            Some((Source::Snapshot(_), _)) | None => prompt.len(),
        }
    }

    /// Begins the sequence of a prompt with as much of it as the cache or host memory has. The last token is left out
    /// unless its logits are known. There must be fewer running sequences than slots.
    pub(super) fn begin<'a>(
        &mut self,
        prompt: &[Token],
        adapter: Option<AdapterId>,
        running: impl Iterator<Item = &'a CachedSequence> + Clone,
    ) -> CachedPrefix {
        let mut cached = self.begin_cached(prompt, adapter, running);
        let logits = if cached.tokens.len() == prompt.len() { self.prompt_logits.find(prompt, adapter) } else { None };
        if logits.is_none() {
            // Restoring may have taken another way than `find` foresaw.
            self.rewind(&mut cached, prompt.len().saturating_sub(1));
        }
        CachedPrefix { cached, logits }
    }

    fn begin_cached<'a>(
        &mut self,
        prompt: &[Token],
        adapter: Option<AdapterId>,
        running: impl Iterator<Item = &'a CachedSequence> + Clone,
    ) -> CachedSequence {
        let Some((source, common)) = self.find(prompt, adapter, running.clone()) else {
            return self.empty(adapter);
        };
        match source {
            Source::Retained(index) if self.should_take_over(index, common) => {
                let mut cached = self.retained.remove(index);
                self.rewind(&mut cached, common);
                cached
            }
            Source::Retained(index) => {
                // It is the most recently used now, and must not be evicted for the sequence that shares it.
                let cached = self.retained.remove(index);
                let begun = self.share(&cached, common);
                self.retained.push(cached);
                begun
            }
            Source::Running(sequence) => match running.into_iter().find(|cached| cached.seq_id == sequence) {
                Some(cached) => self.share(cached, common),
                None => self.empty(adapter),
            },
            Source::Snapshot(index) => self.restore(index, common),
        }
    }

    /// Begins a sequence without a cached prefix.
    pub(super) fn begin_empty(&mut self, adapter: Option<AdapterId>) -> CachedPrefix {
        CachedPrefix { cached: self.empty(adapter), logits: None }
    }

    /// Keeps the logits after a prompt, from this row of the last step, for the same prompt later.
    pub(super) fn keep_logits(&mut self, prompt: &[Token], adapter: Option<AdapterId>, row: usize) {
        if let Some(logits) = self.context.logits(row) {
            self.prompt_logits.keep(prompt, adapter, logits);
        }
    }

    /// Records that the next tokens of a sequence were evaluated.
    pub(super) fn extend(&mut self, cached: &mut CachedSequence, tokens: &[Token]) {
        self.ledger.take(&mut cached.cells, tokens.len());
        cached.tokens.extend_from_slice(tokens);
    }

    /// Truncates a sequence to so many tokens. If that is impossible, or the sequence could not go on from there, all
    /// of it is forgotten.
    pub(super) fn rewind(&mut self, cached: &mut CachedSequence, length: usize) {
        if cached.tokens.len() <= length {
            return;
        }
        let length = if self.is_whole(cached, length) && self.context.remove(cached.seq_id, length) {
            length
        } else {
            // Forgetting all of a sequence never fails.
            self.context.remove(cached.seq_id, 0);
            0
        };
        cached.tokens.truncate(length);
        self.ledger.release(&mut cached.cells, length);
    }

    /// Forgets all tokens of a sequence, here and in llama.cpp.
    pub(super) fn start_over(&mut self, cached: &mut CachedSequence) {
        self.context.remove(cached.seq_id, 0);
        cached.tokens.clear();
        self.ledger.release(&mut cached.cells, 0);
    }

    /// Retains the sequence of a generation that ended, for prompts with the same prefix.
    pub(super) fn retain(&mut self, cached: CachedSequence) {
        if cached.tokens.is_empty() || !self.can_rewind {
            return self.forget(cached);
        }
        // A retained sequence that this one begins with is of no further use.
        let is_covered = |cache: &Self, other: &CachedSequence| {
            let goes_on = other.adapter == cached.adapter && cached.tokens.starts_with(&other.tokens);
            goes_on && cache.is_whole(&cached, other.tokens.len())
        };
        while let Some(index) = self.retained.iter().position(|other| is_covered(self, other)) {
            let old = self.retained.remove(index);
            self.forget(old);
        }
        self.retained.push(cached);
        while self.retained.len() > 1 && self.holds_too_much() {
            self.evict();
        }
    }

    fn holds_too_much(&self) -> bool {
        let older = &self.retained[..self.retained.len() - 1];
        let cells = || older.iter().map(|cached| self.ledger.alone(&cached.cells)).sum::<usize>();
        self.retained.len() > RETAINED_MAX as usize || (self.snapshots.takes(1) && cells() > RETAINED_CELLS_MAX)
    }

    /// Frees the cells of a sequence.
    pub(super) fn forget(&mut self, mut cached: CachedSequence) {
        self.context.remove(cached.seq_id, 0);
        self.ledger.release(&mut cached.cells, 0);
        self.free_ids.push(cached.seq_id);
    }

    /// Evicts retained sequences until so many cells are free; returns whether they are.
    pub(super) fn free_cells(&mut self, cells: usize) -> bool {
        while self.ledger.free() < cells && self.evict() {}
        self.ledger.free() >= cells
    }

    /// Drops everything that was evaluated with an adapter, except running sequences.
    pub(super) fn forget_adapter(&mut self, adapter: AdapterId) {
        self.snapshots.forget(adapter);
        self.prompt_logits.forget(adapter);
        while let Some(index) = self.retained.iter().position(|cached| cached.adapter == Some(adapter)) {
            let cached = self.retained.remove(index);
            self.forget(cached);
        }
    }

    /// Forgets everything, after a failure that left the context in an unknown state. No sequence may be running.
    pub(super) fn reset(&mut self) {
        for cached in std::mem::take(&mut self.retained) {
            self.forget(cached);
        }
        self.prompt_logits.clear();
        self.context.clear();
    }

    /// Evicts the least recently used sequence, to host memory if that has space.
    fn evict(&mut self) -> bool {
        if self.retained.is_empty() {
            return false;
        }
        let cached = self.retained.remove(0);
        if self.snapshots.takes(1)
            && let Some(first) = self.context.first_position(cached.seq_id)
            && let Some(bytes) = self.context.save(cached.seq_id)
        {
            // Cells that its last token does not see are not saved.
            let first = first.max(self.window.first_seen(cached.tokens.len() - 1));
            self.snapshots.keep(Snapshot { tokens: cached.tokens.clone(), adapter: cached.adapter, first, bytes });
        }
        self.forget(cached);
        true
    }

    fn find<'a>(
        &self,
        prompt: &[Token],
        adapter: Option<AdapterId>,
        running: impl Iterator<Item = &'a CachedSequence>,
    ) -> Option<(Source, usize)> {
        if !self.can_rewind {
            return None;
        }
        let is_known = self.prompt_logits.has(prompt, adapter);
        let usable = if is_known { prompt.len() } else { prompt.len().saturating_sub(1) };
        let prompt = &prompt[..usable];
        let of = |cached: &CachedSequence| {
            let common = if cached.adapter == adapter { common_prefix(&cached.tokens, prompt) } else { 0 };
            if self.is_whole(cached, common) { common } else { 0 }
        };
        let retained = self.retained.iter().enumerate().map(|(index, cached)| (Source::Retained(index), of(cached)));
        let running = running.map(|cached| (Source::Running(cached.seq_id), of(cached)));
        // Of equals the last one, which is the most recently used.
        let in_cache = running.chain(retained).max_by_key(|(_, common)| *common).filter(|(_, common)| *common > 0);
        let in_cache_tokens = in_cache.map_or(0, |(_, common)| common);
        let is_worth_copying = |common: usize| {
            let is_all = is_known && common == usable && common > in_cache_tokens;
            is_all || common >= in_cache_tokens + SNAPSHOT_GAIN_MIN
        };
        let snapshot = self.snapshots.find(prompt, adapter).filter(|(_, common)| is_worth_copying(*common));
        snapshot.map(|(index, common)| (Source::Snapshot(index), common)).or(in_cache)
    }

    /// Returns whether a sequence can go on after so many tokens: every layer has the cells that the next token sees.
    fn is_whole(&self, cached: &CachedSequence, length: usize) -> bool {
        let first = self.context.first_position(cached.seq_id);
        length == 0 || first.is_some_and(|first| first <= self.window.first_seen(length))
    }

    /// Returns whether to take a retained sequence over rather than share it: at least half of it is the common prefix.
    fn should_take_over(&self, index: usize, common: usize) -> bool {
        common * 2 >= self.retained[index].tokens.len()
    }

    fn empty(&mut self, adapter: Option<AdapterId>) -> CachedSequence {
        let seq_id = self.next_id();
        CachedSequence { seq_id, tokens: Vec::new(), adapter, cells: Cells::default() }
    }

    fn share(&mut self, source: &CachedSequence, length: usize) -> CachedSequence {
        let seq_id = self.next_id();
        self.context.share(source.seq_id, seq_id, length);
        let cells = self.ledger.share(&source.cells, length);
        CachedSequence { seq_id, tokens: source.tokens[..length].to_vec(), adapter: source.adapter, cells }
    }

    fn restore(&mut self, index: usize, common: usize) -> CachedSequence {
        let Snapshot { tokens, adapter, bytes, .. } = self.snapshots.take(index);
        let mut cached = self.empty(adapter);
        if !self.free_cells(tokens.len()) || !self.context.restore(cached.seq_id, &bytes) {
            // A copy that failed half-way may have left some cells.
            self.context.remove(cached.seq_id, 0);
            return cached;
        }
        self.extend(&mut cached, &tokens);
        self.rewind(&mut cached, common);
        cached
    }

    fn next_id(&mut self) -> i32 {
        if self.free_ids.is_empty() {
            self.evict();
        }
        self.free_ids.pop().expect("there are as many ids as slots and retained sequences")
    }
}

/// Returns how many sequences the context must be made for.
pub(super) fn sequences(model: &Model, slots: u32) -> u32 {
    // Recurrent models retain nothing, because their sequences cannot be truncated.
    if model.can_rewind() { slots + RETAINED_MAX } else { slots }
}

/// Returns the length of the longest common prefix.
pub(super) fn common_prefix(one: &[Token], other: &[Token]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

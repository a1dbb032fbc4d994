//! One context's room of keys and values: who holds which cells, and what is kept for those who come back.
//!
//! A *strand* is a sequence of tokens whose keys and values are in the room. When a generation ends its strand is
//! retained, so that a prompt that begins alike need not be evaluated again: it takes a strand over, or shares the
//! beginning of one, whether retained or at work, without copying a cell. Where cells run short, the least recently
//! used strand goes to host memory, and comes back from there.
//!
//! Where layers see a part of a text only, llama.cpp gives the cells that they no longer see to whoever needs some, and
//! leaves them out of what it saves. So a beginning is used only where every layer has all that its next token sees.

use std::sync::Arc;

use super::cell_ledger::{CellLedger, Cells};
use super::endings::Endings;
use super::native::{Context, Model, Token, Window};
use super::snapshots::{Snapshot, Snapshots};
use crate::model_runtime::AdapterId;

/// Strands that are retained; llama.cpp keeps a row of logits for each.
const RETAINED_MAX: u32 = 32;
/// Cells that retained strands hold, beside the latest of them, where host memory takes the others.
///
/// Attention looks at every cell up to the last one in use, whoever holds it: 10,000 cells that nobody needs at present
/// cost a model of 0.5 billion parameters a fourth of its speed. A copy costs a few microseconds a token.
const RETAINED_CELLS_MAX: usize = 1_024;
/// Tokens that a snapshot must spare beyond what the room has, to be worth its copying.
const SNAPSHOT_GAIN_MIN: usize = 32;
/// The part of host memory for snapshots that the logits behind prompts may take.
const ENDINGS_PART: u64 = 8;

/// Tokens whose keys and values are in the room.
#[derive(Debug)]
pub(super) struct Strand {
    /// Its number in llama.cpp.
    pub(super) sequence: i32,
    /// Its tokens, in order from the first position.
    pub(super) tokens: Vec<Token>,
    /// The adapter it was evaluated with; other adapters give other keys and values.
    pub(super) adapter: Option<AdapterId>,
    cells: Cells,
}

/// The room of one context.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) context: Context,
    ledger: CellLedger,
    /// Sequence numbers that nobody has.
    numbers: Vec<i32>,
    /// The least recently used first.
    retained: Vec<Strand>,
    snapshots: Snapshots,
    endings: Endings,
    can_rewind: bool,
    window: Window,
}

/// What a prompt begins with.
#[derive(Debug)]
pub(super) struct Beginning {
    pub(super) strand: Strand,
    /// The logits behind the prompt, where the strand has all of it.
    pub(super) logits: Option<Arc<[f32]>>,
}

/// Where the beginning of a prompt is at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Retained(usize),
    AtWork(i32),
    Snapshot(usize),
}

impl Room {
    /// Returns the empty room of a context with so many cells, in which `slots` strands are at work at most.
    pub(super) fn new(context: Context, cells: u32, slots: u32, host_bytes_max: u64) -> Self {
        let (can_rewind, window) = (context.model().can_rewind(), context.model().window());
        let numbers = (0..sequences(context.model(), slots).cast_signed()).rev().collect();
        let bytes_max = if can_rewind { host_bytes_max } else { 0 };
        let endings_max = bytes_max / ENDINGS_PART;
        Self {
            context,
            ledger: CellLedger::new(cells),
            numbers,
            retained: Vec::new(),
            snapshots: Snapshots::new(bytes_max - endings_max, window),
            endings: Endings::new(endings_max),
            can_rewind,
            window,
        }
    }

    /// Returns whether a strand can be cut back and shared.
    pub(super) fn can_rewind(&self) -> bool {
        self.can_rewind
    }

    /// Returns the share of the cells that strands at work hold, 0 to 1; those of others are free for the asking.
    pub(super) fn usage(&self) -> f32 {
        1.0 - self.available() as f32 / self.ledger.len() as f32
    }

    /// Returns how many cells are free or could be made so.
    pub(super) fn available(&self) -> usize {
        self.ledger.free() + self.retained.iter().map(|strand| self.ledger.alone(&strand.cells)).sum::<usize>()
    }

    /// Returns how many of the available cells a prompt would take.
    pub(super) fn cells_for<'a>(
        &self,
        prompt: &[Token],
        adapter: Option<AdapterId>,
        at_work: impl Iterator<Item = &'a Strand>,
    ) -> usize {
        match self.find(prompt, adapter, at_work) {
            Some((Source::AtWork(_), common)) => prompt.len() - common,
            // What is retained counts as available, and no longer does once it is at work.
            Some((Source::Retained(place), common)) => {
                prompt.len() - common + common.min(self.ledger.alone(&self.retained[place].cells))
            }
            Some((Source::Snapshot(_), _)) | None => prompt.len(),
        }
    }

    /// Begins the strand of a prompt with as much of it as the room or host memory has, but for its last token where the
    /// logits that it gives are not known. There must be fewer strands at work than slots.
    pub(super) fn begin<'a>(
        &mut self,
        prompt: &[Token],
        adapter: Option<AdapterId>,
        at_work: impl Iterator<Item = &'a Strand> + Clone,
    ) -> Beginning {
        let mut strand = self.begin_strand(prompt, adapter, at_work);
        let logits = if strand.tokens.len() == prompt.len() { self.endings.find(prompt, adapter) } else { None };
        if logits.is_none() {
            // Restoring it may have taken another way than was foreseen.
            self.rewind(&mut strand, prompt.len().saturating_sub(1));
        }
        Beginning { strand, logits }
    }

    fn begin_strand<'a>(
        &mut self,
        prompt: &[Token],
        adapter: Option<AdapterId>,
        at_work: impl Iterator<Item = &'a Strand> + Clone,
    ) -> Strand {
        let Some((source, common)) = self.find(prompt, adapter, at_work.clone()) else {
            return self.empty(adapter);
        };
        match source {
            Source::Retained(place) if self.is_better_taken(place, common) => {
                let mut strand = self.retained.remove(place);
                self.rewind(&mut strand, common);
                strand
            }
            Source::Retained(place) => {
                // It was used, so it is the last to go; and it must not be the one that gives way to its own sharer.
                let strand = self.retained.remove(place);
                let begun = self.share(&strand, common);
                self.retained.push(strand);
                begun
            }
            Source::AtWork(sequence) => match at_work.into_iter().find(|strand| strand.sequence == sequence) {
                Some(strand) => self.share(strand, common),
                None => self.empty(adapter),
            },
            Source::Snapshot(place) => self.restore(place, common),
        }
    }

    /// Begins a strand with nothing.
    pub(super) fn begin_empty(&mut self, adapter: Option<AdapterId>) -> Beginning {
        Beginning { strand: self.empty(adapter), logits: None }
    }

    /// Keeps the logits behind a prompt, which the last step gave in this row, for whoever asks the same again.
    pub(super) fn keep_ending(&mut self, prompt: &[Token], adapter: Option<AdapterId>, row: usize) {
        if let Some(logits) = self.context.logits(row) {
            self.endings.keep(prompt, adapter, logits);
        }
    }

    /// Takes note that a strand's next tokens were evaluated.
    pub(super) fn extend(&mut self, strand: &mut Strand, tokens: &[Token]) {
        self.ledger.take(&mut strand.cells, tokens.len());
        strand.tokens.extend_from_slice(tokens);
    }

    /// Cuts a strand back to so many tokens; the whole strand is forgotten where that cannot be done, or where it could
    /// not go on from there.
    pub(super) fn rewind(&mut self, strand: &mut Strand, length: usize) {
        if strand.tokens.len() <= length {
            return;
        }
        let length = if self.is_whole(strand, length) && self.context.remove(strand.sequence, length) {
            length
        } else {
            // Forgetting all of a sequence never fails.
            self.context.remove(strand.sequence, 0);
            0
        };
        strand.tokens.truncate(length);
        self.ledger.release(&mut strand.cells, length);
    }

    /// Forgets what of a strand is evaluated, and whatever llama.cpp has of it.
    pub(super) fn start_over(&mut self, strand: &mut Strand) {
        self.context.remove(strand.sequence, 0);
        strand.tokens.clear();
        self.ledger.release(&mut strand.cells, 0);
    }

    /// Keeps the strand of a generation that ended, for those whose prompts begin like it.
    pub(super) fn retain(&mut self, strand: Strand) {
        if strand.tokens.is_empty() || !self.can_rewind {
            return self.forget(strand);
        }
        // Who asked the same twice, or went on from it, has no use for two of them.
        let is_covered = |room: &Self, other: &Strand| {
            let goes_on = other.adapter == strand.adapter && strand.tokens.starts_with(&other.tokens);
            goes_on && room.is_whole(&strand, other.tokens.len())
        };
        while let Some(place) = self.retained.iter().position(|other| is_covered(self, other)) {
            let old = self.retained.remove(place);
            self.forget(old);
        }
        self.retained.push(strand);
        while self.retained.len() > 1 && self.holds_too_much() {
            self.evict();
        }
    }

    fn holds_too_much(&self) -> bool {
        let older = &self.retained[..self.retained.len() - 1];
        let cells = || older.iter().map(|strand| self.ledger.alone(&strand.cells)).sum::<usize>();
        self.retained.len() > RETAINED_MAX as usize || (self.snapshots.takes(1) && cells() > RETAINED_CELLS_MAX)
    }

    /// Lets the cells of a strand go.
    pub(super) fn forget(&mut self, mut strand: Strand) {
        self.context.remove(strand.sequence, 0);
        self.ledger.release(&mut strand.cells, 0);
        self.numbers.push(strand.sequence);
    }

    /// Lets retained strands go until so many cells are free; returns whether they are.
    pub(super) fn make_room(&mut self, cells: usize) -> bool {
        while self.ledger.free() < cells && self.evict() {}
        self.ledger.free() >= cells
    }

    /// Drops all that was evaluated with an adapter and is not at work.
    pub(super) fn forget_adapter(&mut self, adapter: AdapterId) {
        self.snapshots.forget(adapter);
        self.endings.forget(adapter);
        while let Some(place) = self.retained.iter().position(|strand| strand.adapter == Some(adapter)) {
            let strand = self.retained.remove(place);
            self.forget(strand);
        }
    }

    /// Forgets everything after a failure of which nothing more is known. No strand may be at work any more.
    pub(super) fn reset(&mut self) {
        for strand in std::mem::take(&mut self.retained) {
            self.forget(strand);
        }
        self.endings.clear();
        self.context.clear();
    }

    /// Lets the least recently used strand go, by way of host memory.
    fn evict(&mut self) -> bool {
        if self.retained.is_empty() {
            return false;
        }
        let strand = self.retained.remove(0);
        if self.snapshots.takes(1)
            && let Some(first) = self.context.first_position(strand.sequence)
            && let Some(bytes) = self.context.save(strand.sequence)
        {
            // What its last token does not see is not saved.
            let first = first.max(self.window.first_seen(strand.tokens.len() - 1));
            self.snapshots.keep(Snapshot { tokens: strand.tokens.clone(), adapter: strand.adapter, first, bytes });
        }
        self.forget(strand);
        true
    }

    fn find<'a>(
        &self,
        prompt: &[Token],
        adapter: Option<AdapterId>,
        at_work: impl Iterator<Item = &'a Strand>,
    ) -> Option<(Source, usize)> {
        if !self.can_rewind {
            return None;
        }
        let is_known = self.endings.has(prompt, adapter);
        let usable = if is_known { prompt.len() } else { prompt.len().saturating_sub(1) };
        let prompt = &prompt[..usable];
        let of = |strand: &Strand| {
            let common = if strand.adapter == adapter { common_prefix(&strand.tokens, prompt) } else { 0 };
            if self.is_whole(strand, common) { common } else { 0 }
        };
        let retained = self.retained.iter().enumerate().map(|(place, strand)| (Source::Retained(place), of(strand)));
        let at_work = at_work.map(|strand| (Source::AtWork(strand.sequence), of(strand)));
        // Of equals the last: what is retained is in the order of its use.
        let in_room = at_work.chain(retained).max_by_key(|(_, common)| *common).filter(|(_, common)| *common > 0);
        let in_room_has = in_room.map_or(0, |(_, common)| common);
        let is_worth_copying = |common: usize| {
            let is_all = is_known && common == usable && common > in_room_has;
            is_all || common >= in_room_has + SNAPSHOT_GAIN_MIN
        };
        let snapshot = self.snapshots.find(prompt, adapter).filter(|(_, common)| is_worth_copying(*common));
        snapshot.map(|(place, common)| (Source::Snapshot(place), common)).or(in_room)
    }

    /// Returns whether a text can go on behind so many tokens of a strand: every layer has what the next token sees.
    fn is_whole(&self, strand: &Strand, length: usize) -> bool {
        let first = self.context.first_position(strand.sequence);
        length == 0 || first.is_some_and(|first| first <= self.window.first_seen(length))
    }

    /// Says whether a retained strand is rather taken over than shared: most of it is of use to this prompt alone.
    fn is_better_taken(&self, place: usize, common: usize) -> bool {
        common * 2 >= self.retained[place].tokens.len()
    }

    fn empty(&mut self, adapter: Option<AdapterId>) -> Strand {
        let sequence = self.number();
        Strand { sequence, tokens: Vec::new(), adapter, cells: Cells::default() }
    }

    fn share(&mut self, source: &Strand, length: usize) -> Strand {
        let sequence = self.number();
        self.context.share(source.sequence, sequence, length);
        let cells = self.ledger.share(&source.cells, length);
        Strand { sequence, tokens: source.tokens[..length].to_vec(), adapter: source.adapter, cells }
    }

    fn restore(&mut self, place: usize, common: usize) -> Strand {
        let Snapshot { tokens, adapter, bytes, .. } = self.snapshots.take(place);
        let mut strand = self.empty(adapter);
        if !self.make_room(tokens.len()) || !self.context.restore(strand.sequence, &bytes) {
            // A copy that failed half-way may have left something.
            self.context.remove(strand.sequence, 0);
            return strand;
        }
        self.extend(&mut strand, &tokens);
        self.rewind(&mut strand, common);
        strand
    }

    fn number(&mut self) -> i32 {
        if self.numbers.is_empty() {
            self.evict();
        }
        self.numbers.pop().expect("there are as many numbers as slots and retained strands")
    }
}

/// Returns how many sequences the context of a room must be made for.
pub(super) fn sequences(model: &Model, slots: u32) -> u32 {
    // What is recurrent cannot be cut back, so that a strand that ended is of no use.
    if model.can_rewind() { slots + RETAINED_MAX } else { slots }
}

/// Returns how many tokens two sequences have in common before they part.
pub(super) fn common_prefix(one: &[Token], other: &[Token]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

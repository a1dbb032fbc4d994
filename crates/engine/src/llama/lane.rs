//! The generations that share one context: what a step evaluates, and what becomes of its outcome.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::batch_plan::{self, Limits, Need, Plan, Tokens};
use super::draft::{usual_cost, worthwhile};
use super::engine::Options;
use super::native::{Adapter, Batch, DecodeError, Token};
use super::pulse::Pulse;
use super::room::{Room, Strand, common_prefix};
use super::sequence::{Drawn, Finished, Sequence};
use super::step_clock::StepClock;
use crate::memory_plan::{BATCH_TOKENS, ECHO_ROWS};
use crate::model_runtime::{AdapterId, Counters, EngineError, FinishReason};
use crate::sampler::Sampler;

/// How long a step with prompts may keep those waiting who generate.
const GAP: Duration = Duration::from_millis(200);
/// Prompt tokens that ride along however slow they are, so that prompts make progress.
const PROMPT_BESIDE_OTHERS_MIN: usize = 64;
/// Tokens that must be free beyond the prompt before a generation starts, so that it does not lose its place at once.
const HEADROOM: usize = 256;
/// Tokens of a common beginning for which a generation waits until another has evaluated them.
const WORTH_WAITING_FOR: usize = 64;
/// How often a step in evaluation is asked whether anyone still wants it.
const ASK_EVERY: Duration = Duration::from_millis(5);

/// The generations of one context.
pub(super) struct Lane {
    pub(super) room: Room,
    slots: Vec<Option<Sequence>>,
    /// Tokens that may be suggested at once.
    draft_max: usize,
    /// Evaluates what is continued token by token, as it was evaluated at first.
    deterministic: bool,
    /// A row has the same bits whatever is beside it.
    row_by_row: bool,
    clock: StepClock,
    batch: Batch,
    last_adapter: Option<AdapterId>,
    turn: usize,
}

/// What a lane uses of the engine that it belongs to.
pub(super) struct Tools<'a> {
    pub(super) adapters: &'a BTreeMap<AdapterId, Arc<Adapter>>,
    pub(super) sampler: &'a mut Sampler,
    pub(super) counters: &'a mut Counters,
    pub(super) pulse: &'a mut Pulse,
    pub(super) stop: &'a CancellationToken,
}

/// A row of output that tells how likely a prompt token was.
#[derive(Debug, Clone, Copy)]
struct PromptRow {
    slot: usize,
    row: usize,
    /// The place before that token.
    position: usize,
}

/// What a step brought.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) finished: Vec<Finished>,
    /// Generations that lost their cells to others and wait to go on, the eldest first.
    pub(super) preempted: Vec<Sequence>,
    /// Tokens that were drawn.
    pub(super) drawn: u64,
    /// What the evaluation took.
    pub(super) took: Duration,
}

impl Lane {
    pub(super) fn new(room: Room, slots: u32, options: Options, deterministic: bool) -> Self {
        // Suggestions that are wrong must be taken back.
        let draft_max = if deterministic || !room.can_rewind() { 0 } else { options.draft_tokens as usize };
        Self {
            room,
            slots: (0..slots).map(|_| None).collect(),
            draft_max,
            deterministic,
            row_by_row: options.row_by_row,
            clock: StepClock::default(),
            batch: Batch::default(),
            last_adapter: None,
            turn: 0,
        }
    }

    /// Returns the generations at work.
    pub(super) fn at_work(&self) -> impl Iterator<Item = &Sequence> + Clone {
        self.slots.iter().flatten()
    }

    /// Returns whether a slot is free.
    pub(super) fn has_slot(&self) -> bool {
        self.slots.iter().any(Option::is_none)
    }

    /// Returns whether a generation had better wait: another one is evaluating the beginning they share.
    pub(super) fn is_evaluating_for(&self, sequence: &Sequence) -> bool {
        if !self.room.can_rewind() || self.deterministic || sequence.is_telling_prompt() {
            return false;
        }
        let others = self.at_work().filter(|other| other.job.adapter == sequence.job.adapter);
        let coming = others.map(|other| {
            let common = common_prefix(&other.tokens, &sequence.tokens);
            common.saturating_sub(other.evaluated())
        });
        coming.max().unwrap_or(0) >= WORTH_WAITING_FOR
    }

    /// Returns whether the room holds a generation beside those at work.
    pub(super) fn has_room_for(&self, sequence: &Sequence) -> bool {
        let growth = (sequence.left() as usize).min(HEADROOM);
        let needed = self.room.cells_for(&sequence.tokens, sequence.job.adapter, self.strands()) + growth;
        // What others still have to evaluate is theirs, or whoever gave way to them would come back at once.
        let promised: usize = self.at_work().map(Sequence::pending).sum();
        // Who is alone gets all there is, and it is enough: no sequence is longer than the room.
        self.at_work().next().is_none() || self.room.available() >= needed + promised
    }

    /// Puts a generation to work; returns how many tokens it looked up in the cache, and how many it found. There must
    /// be a free slot.
    pub(super) fn start(&mut self, mut sequence: Sequence) -> (u64, u64) {
        let begun = if self.deterministic || sequence.is_telling_prompt() {
            // What others left would change the order of sums, and has no logits to tell.
            self.room.begin_empty(sequence.job.adapter)
        } else {
            let strands = self.slots.iter().flatten().filter_map(|sequence| sequence.strand.as_ref());
            self.room.begin(&sequence.tokens, sequence.job.adapter, strands)
        };
        let looked_up = (sequence.tokens.len() as u64, begun.strand.tokens.len() as u64);
        sequence.start(begun);
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.is_none()) {
            *slot = Some(sequence);
        }
        looked_up
    }

    /// Tells the readers of those who started.
    pub(super) fn tell_starts(&mut self) {
        let model = Arc::clone(self.room.context.model());
        self.slots.iter_mut().flatten().for_each(|sequence| sequence.tell_start(model.vocabulary()));
    }

    /// Drops the generations whose readers are gone; returns how many.
    pub(super) fn drop_cancelled(&mut self) -> usize {
        let mut dropped = 0;
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|sequence| sequence.job.outbox.is_cancelled()) {
                drop(self.leave(slot));
                dropped += 1;
            }
        }
        dropped
    }

    /// Takes every generation out, to be told that it failed.
    pub(super) fn drain(&mut self) -> Vec<Sequence> {
        (0..self.slots.len()).filter_map(|slot| self.leave(slot)).collect()
    }

    /// Evaluates one batch; returns `None` where there is nothing to do.
    pub(super) fn step(&mut self, tools: &mut Tools<'_>) -> Option<Outcome> {
        let mut outcome = Outcome::default();
        if self.draw_known(tools, &mut outcome) {
            return Some(outcome);
        }
        let plan = self.plan()?;
        let wanted: usize = plan.shares.iter().sum();
        if !self.room.make_room(wanted) {
            self.give_way(&mut outcome, &DecodeError::NoRoom);
            return Some(outcome);
        }
        let (rows, told) = self.fill(&plan);
        self.room.context.set_adapter(plan.adapter.and_then(|adapter| tools.adapters.get(&adapter)));
        let begin = Instant::now();
        let decoded = self.evaluate(&plan, tools);
        outcome.took = begin.elapsed();
        tools.counters.decode_steps += 1;
        match decoded {
            Ok(()) => {
                self.take_note(&plan, outcome.took, tools.counters);
                self.tell_prompts(&told, tools.sampler);
                for (slot, rows) in rows {
                    self.draw(slot, &rows, tools, &mut outcome);
                }
            }
            // Whoever asked for it is dropped before the next step.
            Err(DecodeError::Aborted) => self.take_back(&plan),
            Err(error @ DecodeError::NoRoom) => self.give_way(&mut outcome, &error),
            Err(error @ DecodeError::Failed(_)) => {
                for sequence in self.drain() {
                    sequence.job.outbox.fail(EngineError::Failed { reason: error.to_string() });
                }
                self.room.reset();
            }
        }
        Some(outcome)
    }

    fn plan(&mut self) -> Option<Plan> {
        let mut rows = 0;
        for sequence in self.slots.iter_mut().flatten() {
            rows += usize::from(sequence.is_generating() && !sequence.job.outbox.is_full());
        }
        for sequence in self.slots.iter_mut().flatten().filter(|sequence| sequence.is_generating()) {
            let most = self.draft_max.min(sequence.left().saturating_sub(1) as usize);
            // Where rows beside each other change bits, how many there are must not depend on how fast this machine was.
            let cost = |rows| if self.row_by_row { self.clock.seconds(rows) } else { usual_cost(rows) };
            let most = worthwhile(sequence.drafter.hit_rate(), most, rows.max(1), cost);
            sequence.suggested = sequence.drafter.suggest(&sequence.tokens, most);
            rows += sequence.suggested.len();
        }
        let deterministic = self.deterministic;
        let mut echo_rows = ECHO_ROWS as usize;
        let needs: Vec<Need> =
            self.slots.iter_mut().map(|slot| need(slot.as_mut(), deterministic, &mut echo_rows)).collect();
        let room = BATCH_TOKENS as usize;
        let prompt_beside_others = self.clock.prompt_tokens_within(GAP, PROMPT_BESIDE_OTHERS_MIN, room);
        self.turn = (self.turn + 1) % self.slots.len();
        let together = self.room.can_rewind();
        let limits = Limits { room, prompt_beside_others, together };
        let plan = batch_plan::plan(&needs, self.last_adapter, self.turn, limits)?;
        self.last_adapter = plan.adapter;
        if !together {
            // Who was alone in this step is the last in the next.
            self.turn = plan.shares.iter().position(|share| *share > 0).unwrap_or(self.turn);
        }
        Some(plan)
    }

    /// Fills the batch and returns the rows of output of each slot, and those that tell of prompts.
    fn fill(&mut self, plan: &Plan) -> (Vec<(usize, Vec<usize>)>, Vec<PromptRow>) {
        self.batch.clear();
        let mut outputs = Vec::new();
        let mut told = Vec::new();
        for (slot, (sequence, &share)) in self.slots.iter_mut().zip(&plan.shares).enumerate() {
            let Some(sequence) = sequence else { continue };
            let asked: Vec<bool> = (0..share).map(|place| sequence.is_asked_of(sequence.evaluated() + place)).collect();
            let Sequence { tokens, strand: Some(strand), suggested, .. } = sequence else { continue };
            suggested.truncate(share.saturating_sub(1));
            let begin = strand.tokens.len();
            let coming = tokens[begin..].iter().chain(suggested.iter()).take(share);
            let rows: Vec<usize> = coming
                .zip(begin..)
                .map(|(token, position)| {
                    let output = position + 1 >= tokens.len();
                    let is_asked = asked[position - begin];
                    let row = self.batch.push(*token, position, strand.sequence, output || is_asked);
                    if is_asked {
                        told.push(PromptRow { slot, row, position });
                    }
                    (row, output)
                })
                .filter_map(|(row, output)| output.then_some(row))
                .collect();
            if !rows.is_empty() {
                outputs.push((slot, rows));
            }
        }
        (outputs, told)
    }

    /// Tells the readers who want to know it how likely their prompts were.
    fn tell_prompts(&mut self, told: &[PromptRow], sampler: &mut Sampler) {
        let model = Arc::clone(self.room.context.model());
        for &PromptRow { slot, row, position } in told {
            if let (Some(sequence), Some(logits)) = (&mut self.slots[slot], self.room.context.logits(row)) {
                sequence.tell_prompt(position, logits, sampler, model.vocabulary());
            }
        }
    }

    /// Evaluates the batch, unless most of it is for readers who go meanwhile.
    fn evaluate(&mut self, plan: &Plan, tools: &mut Tools<'_>) -> Result<(), DecodeError> {
        let Tools { pulse, stop, .. } = tools;
        let readers: Vec<_> = self.slots.iter().zip(&plan.shares).collect();
        let all: usize = plan.shares.iter().sum();
        let mut next = Instant::now() + ASK_EVERY;
        let mut is_in_vain = || {
            let now = Instant::now();
            if now < next {
                return false;
            }
            next = now + ASK_EVERY;
            pulse.beat(now);
            let is_gone = |sequence: &Sequence| sequence.job.outbox.is_cancelled();
            let gone: usize =
                readers.iter().filter(|(slot, _)| slot.as_ref().is_some_and(is_gone)).map(|(_, share)| **share).sum();
            stop.is_cancelled() || gone * 2 >= all
        };
        self.room.context.decode(&mut self.batch, &mut is_in_vain)
    }

    /// Forgets what took part in a step that was given up, where its state may have gone on without being told.
    fn take_back(&mut self, plan: &Plan) {
        if self.room.can_rewind() {
            return;
        }
        for (slot, _) in self.slots.iter_mut().zip(&plan.shares).filter(|(_, share)| **share > 0) {
            if let Some(Sequence { strand: Some(strand), .. }) = slot {
                self.room.start_over(strand);
            }
        }
    }

    fn take_note(&mut self, plan: &Plan, took: Duration, counters: &mut Counters) {
        let mut prompt_rows = 0;
        for (slot, &share) in self.slots.iter_mut().zip(&plan.shares).filter(|(_, share)| **share > 0) {
            let Some(sequence) = slot else { continue };
            if !sequence.is_generating() {
                prompt_rows += share;
            }
            let Sequence { tokens, strand: Some(strand), suggested, .. } = sequence else { continue };
            let begin = strand.tokens.len();
            let evaluated: Vec<Token> = tokens[begin..].iter().chain(suggested.iter()).take(share).copied().collect();
            self.room.extend(strand, &evaluated);
            sequence.note_reading();
        }
        counters.prompt_tokens += prompt_rows as u64;
        self.clock.note(plan.shares.iter().sum(), prompt_rows, took);
    }

    /// Draws the first tokens of answers to prompts that were evaluated before; returns whether there were any.
    fn draw_known(&mut self, tools: &mut Tools<'_>, outcome: &mut Outcome) -> bool {
        let mut has_drawn = false;
        for slot in 0..self.slots.len() {
            let Self { room, slots, .. } = self;
            let Some(sequence) = &mut slots[slot] else { continue };
            let Some(logits) = sequence.known.take() else { continue };
            has_drawn = true;
            if sequence.left() == 0 {
                // Only the prompt was asked for.
                self.end(slot, Ok(FinishReason::Length), outcome);
                continue;
            }
            let drawn = sequence.draw(&logits, tools.sampler, room.context.model().vocabulary());
            let came = u64::from(sequence.pending() > 0);
            outcome.drawn += came;
            tools.counters.generated_tokens += came;
            match drawn {
                Ok(Drawn::Token(_)) => {}
                Ok(Drawn::End(reason)) => self.end(slot, Ok(reason), outcome),
                Err(error) => self.end(slot, Err(error), outcome),
            }
        }
        has_drawn
    }

    /// Draws the next tokens of a slot: one, and one more for each suggestion that was right.
    fn draw(&mut self, slot: usize, rows: &[usize], tools: &mut Tools<'_>, outcome: &mut Outcome) {
        let Self { room, slots, .. } = self;
        let Some(sequence) = &mut slots[slot] else { return };
        let model = Arc::clone(room.context.model());
        let suggested = std::mem::take(&mut sequence.suggested);
        let before = sequence.tokens.len();
        if sequence.generated() == 0
            && let Some(row) = rows.first()
        {
            room.keep_ending(&sequence.tokens, sequence.job.adapter, *row);
        }
        // Where only the prompt was asked for, nothing is drawn.
        let is_over = sequence.left() == 0;
        let mut end = is_over.then_some(Ok(FinishReason::Length));
        let rows = if is_over { &[][..] } else { rows };
        for (row, suggestion) in rows.iter().zip(suggested.iter().map(Some).chain([None])) {
            let Some(logits) = room.context.logits(*row) else { break };
            match sequence.draw(logits, tools.sampler, model.vocabulary()) {
                Ok(Drawn::Token(token)) if suggestion == Some(&token) => {}
                Ok(Drawn::Token(_)) => break,
                Ok(Drawn::End(reason)) => {
                    end = Some(Ok(reason));
                    break;
                }
                Err(error) => {
                    end = Some(Err(error));
                    break;
                }
            }
        }
        let came = &sequence.tokens[before..];
        outcome.drawn += came.len() as u64;
        tools.counters.generated_tokens += came.len() as u64;
        tools.counters.drafted_tokens += suggested.len() as u64;
        tools.counters.accepted_tokens += came.len().saturating_sub(1).min(suggested.len()) as u64;
        sequence.drafter.learn(&sequence.tokens, came, suggested.len());
        if let Some(strand) = &mut sequence.strand {
            // Wrong suggestions were evaluated, and are forgotten.
            let right = common_prefix(&strand.tokens, &sequence.tokens);
            room.rewind(strand, right);
        }
        if let Some(end) = end {
            self.end(slot, end, outcome);
        }
    }

    /// Ends the generation of a slot.
    fn end(&mut self, slot: usize, end: Result<FinishReason, EngineError>, outcome: &mut Outcome) {
        let Some(sequence) = self.leave(slot) else { return };
        match end {
            Ok(reason) => outcome.finished.push(sequence.finish(reason)),
            Err(error) => sequence.job.outbox.fail(error),
        }
    }

    /// Lets the youngest generation wait where cells run short, or fails it where there is no other.
    fn give_way(&mut self, outcome: &mut Outcome, error: &DecodeError) {
        let youngest = (0..self.slots.len())
            .filter(|slot| self.slots[*slot].is_some())
            .min_by_key(|slot| self.slots[*slot].as_ref().map_or(0, Sequence::generated));
        let is_alone = self.at_work().count() == 1;
        let Some(sequence) = youngest.and_then(|slot| self.leave(slot)) else { return };
        if is_alone {
            sequence.job.outbox.fail(EngineError::Failed { reason: error.to_string() });
        } else {
            outcome.preempted.push(sequence);
        }
    }

    /// Empties a slot, and keeps what it evaluated for those who come back.
    fn leave(&mut self, slot: usize) -> Option<Sequence> {
        let mut sequence = self.slots[slot].take()?;
        if let Some(strand) = sequence.strand.take() {
            if self.deterministic { self.room.forget(strand) } else { self.room.retain(strand) }
        }
        Some(sequence)
    }

    fn strands(&self) -> impl Iterator<Item = &Strand> + Clone {
        self.at_work().filter_map(|sequence| sequence.strand.as_ref())
    }
}

/// Returns what a slot wants. Prompts whose log-probabilities are told share the rows that are left for them.
fn need(sequence: Option<&mut Sequence>, deterministic: bool, echo_rows: &mut usize) -> Need {
    let Some(sequence) = sequence else { return Need { adapter: None, tokens: Tokens::None } };
    let prompt_left = sequence.job.prompt_tokens.saturating_sub(sequence.evaluated());
    let tokens = if sequence.job.outbox.is_full() {
        Tokens::None
    } else if sequence.is_generating() {
        Tokens::Next(sequence.suggested.len())
    } else if deterministic {
        // The answer's tokens were evaluated one by one, and are again.
        Tokens::Prompt(prompt_left.max(1))
    } else if sequence.is_telling_prompt() {
        match sequence.pending().min(*echo_rows) {
            0 => Tokens::None,
            count => {
                *echo_rows -= count;
                Tokens::Prompt(count)
            }
        }
    } else {
        Tokens::Prompt(sequence.pending())
    };
    Need { adapter: sequence.job.adapter, tokens }
}

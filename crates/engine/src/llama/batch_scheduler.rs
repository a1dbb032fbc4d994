//! Continuous batching: the generations of one context, what each step evaluates, and what becomes of its results.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::batch_plan::{self, Need, Plan, StepLimits, Tokens};
use super::draft::{usual_cost, worthwhile};
use super::engine::Options;
use super::kv_cache::{CachedSequence, KvCache, common_prefix};
use super::native::{Adapter, Batch, DecodeError, Token};
use super::pulse::Pulse;
use super::sequence::{Drawn, Finished, Sequence};
use super::step_clock::StepClock;
use crate::memory_plan::{BATCH_TOKENS, ECHO_ROWS};
use crate::model_runtime::{AdapterId, Counters, EngineError, FinishReason};
use crate::sampler::Sampler;

/// How long a step with prefill may delay the next token of running generations.
const GAP: Duration = Duration::from_millis(200);
/// Prompt tokens of a step however slow they are, so that prompts make progress.
const PREFILL_TOKENS_MIN: usize = 64;
/// Cells that must be free beyond the prompt before a generation starts, so that it is not preempted at once.
const HEADROOM: usize = 256;
/// Tokens of a shared prefix for which a generation waits until another has evaluated them.
const SHARED_PREFIX_MIN: usize = 64;
/// While others run, generations that yield take part in one of so many steps.
const YIELDING_ONE_IN: u32 = 20;
/// After so many steps without any that yields, one that waits for a slot goes before the others, and keeps the slot
/// until it has taken part in a step.
const OVERDUE_STEPS: u32 = 200;
/// How often a running step checks whether anyone still wants it.
const ASK_EVERY: Duration = Duration::from_millis(5);

/// Plans and runs the steps of one context.
pub(super) struct BatchScheduler {
    pub(super) kv_cache: KvCache,
    slots: Vec<Option<Sequence>>,
    /// The most draft tokens of one step.
    draft_max: usize,
    /// Evaluates continued answers token by token, as they were evaluated at first.
    deterministic: bool,
    /// The result of a row does not depend on the other rows of a step.
    row_by_row: bool,
    clock: StepClock,
    batch: Batch,
    last_adapter: Option<AdapterId>,
    turn: usize,
    /// Steps since a generation that yields took part.
    paused_steps: u32,
}

/// What a batch scheduler uses of its engine.
pub(super) struct Tools<'a> {
    pub(super) adapters: &'a BTreeMap<AdapterId, Arc<Adapter>>,
    pub(super) sampler: &'a mut Sampler,
    pub(super) counters: &'a mut Counters,
    pub(super) pulse: &'a mut Pulse,
    pub(super) stop: &'a CancellationToken,
    /// Whether a generation that does not yield wants tokens, in any context.
    pub(super) has_urgent: bool,
    /// Whether a deterministic generation that does not yield waits for the slot of another.
    pub(super) is_exact_awaited: bool,
}

/// A row of logits that gives the log-probability of a prompt token.
#[derive(Debug, Clone, Copy)]
struct PromptRow {
    slot: usize,
    row: usize,
    /// The position before that token.
    position: usize,
}

/// The results of a step.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) finished: Vec<Finished>,
    /// Generations that were preempted and wait to go on, the oldest first.
    pub(super) preempted: Vec<Sequence>,
    /// Tokens that were drawn.
    pub(super) drawn: u64,
    /// What the evaluation took.
    pub(super) took: Duration,
}

impl BatchScheduler {
    pub(super) fn new(kv_cache: KvCache, slots: u32, options: Options, deterministic: bool) -> Self {
        // Wrong draft tokens must be removed again.
        let draft_max = if deterministic || !kv_cache.can_rewind() { 0 } else { options.draft_tokens as usize };
        Self {
            kv_cache,
            slots: (0..slots).map(|_| None).collect(),
            draft_max,
            deterministic,
            row_by_row: options.row_by_row,
            clock: StepClock::default(),
            batch: Batch::default(),
            last_adapter: None,
            turn: 0,
            paused_steps: 0,
        }
    }

    /// Returns the running generations.
    pub(super) fn running(&self) -> impl Iterator<Item = &Sequence> + Clone {
        self.slots.iter().flatten()
    }

    /// Returns whether a slot is free.
    pub(super) fn has_slot(&self) -> bool {
        self.slots.iter().any(Option::is_none)
    }

    /// Returns whether a generation that yields has a slot.
    pub(super) fn has_yielding(&self) -> bool {
        self.running().any(|sequence| sequence.job.yields)
    }

    /// Returns whether a running generation that does not yield wants tokens.
    pub(super) fn has_urgent(&mut self) -> bool {
        self.slots.iter_mut().flatten().any(|sequence| !sequence.job.yields && !sequence.job.outbox.is_full())
    }

    /// Returns whether a generation that yields must take part in a step before others start.
    pub(super) fn is_overdue(&self, sequence: &mut Sequence) -> bool {
        let job = &mut sequence.job;
        let is_late = self.paused_steps >= OVERDUE_STEPS;
        is_late && job.yields && job.deterministic == self.deterministic && !job.outbox.is_full()
    }

    /// Returns whether a generation should wait because another one is evaluating their shared prefix.
    pub(super) fn is_evaluating_prefix_of(&self, sequence: &Sequence) -> bool {
        if !self.kv_cache.can_rewind() || self.deterministic || sequence.echoes_prompt() {
            return false;
        }
        // One that yields may not go on before this one ends.
        let is_ahead = |other: &&Sequence| !other.job.yields || sequence.job.yields;
        let others = self.running().filter(|other| other.job.adapter == sequence.job.adapter).filter(is_ahead);
        let coming = others.map(|other| {
            let common = common_prefix(&other.tokens, &sequence.tokens);
            common.saturating_sub(other.evaluated())
        });
        coming.max().unwrap_or(0) >= SHARED_PREFIX_MIN
    }

    /// Returns whether the KV cache has cells for a generation besides the running ones.
    pub(super) fn has_capacity_for(&self, sequence: &Sequence) -> bool {
        let growth = (sequence.left() as usize).min(HEADROOM);
        let needed = self.kv_cache.cells_for(&sequence.tokens, sequence.job.adapter, self.cached_sequences()) + growth;
        // Cells for what others have yet to evaluate are theirs, or a preempted generation would come back at once.
        let promised: usize = self.running().map(Sequence::pending).sum();
        // A single generation gets all cells, and they suffice: no sequence is longer than the cache.
        self.running().next().is_none() || self.kv_cache.available() >= needed + promised
    }

    /// Starts a generation; returns how many tokens it looked up in the prefix cache, and how many it found. There must
    /// be a free slot.
    pub(super) fn start(&mut self, mut sequence: Sequence) -> (u64, u64) {
        let begun = if self.deterministic || sequence.echoes_prompt() {
            // A cached prefix would change the order of sums, and has no logits to report.
            self.kv_cache.begin_empty(sequence.job.adapter)
        } else {
            let running = self.slots.iter().flatten().filter_map(|sequence| sequence.in_cache.as_ref());
            self.kv_cache.begin(&sequence.tokens, sequence.job.adapter, running)
        };
        let looked_up = (sequence.tokens.len() as u64, begun.cached.tokens.len() as u64);
        sequence.start(begun);
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.is_none()) {
            *slot = Some(sequence);
        }
        looked_up
    }

    /// Sends the start of each generation that has started.
    pub(super) fn send_starts(&mut self) {
        let model = Arc::clone(self.kv_cache.context.model());
        self.slots.iter_mut().flatten().for_each(|sequence| sequence.send_start(model.vocabulary()));
    }

    /// Drops the generations whose readers are gone; returns how many.
    pub(super) fn drop_cancelled(&mut self) -> usize {
        let mut dropped = 0;
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|sequence| sequence.job.outbox.is_cancelled()) {
                drop(self.vacate(slot));
                dropped += 1;
            }
        }
        dropped
    }

    /// Takes every generation out, so that the caller can fail it.
    pub(super) fn drain(&mut self) -> Vec<Sequence> {
        (0..self.slots.len()).filter_map(|slot| self.vacate(slot)).collect()
    }

    /// Evaluates one batch; returns `None` where there is nothing to do.
    pub(super) fn step(&mut self, tools: &mut Tools<'_>) -> Option<Outcome> {
        let mut outcome = Outcome::default();
        if self.sample_known(tools, &mut outcome) {
            return Some(outcome);
        }
        // One that cannot be preempted goes on, if others wait for its end.
        let pauses = tools.has_urgent && !(self.deterministic && tools.is_exact_awaited);
        let plan = self.plan(pauses)?;
        let wanted: usize = plan.shares.iter().sum();
        if !self.kv_cache.free_cells(wanted) {
            self.preempt_youngest(&mut outcome, &DecodeError::CacheFull);
            return Some(outcome);
        }
        let (rows, prompt_rows) = self.fill(&plan);
        self.kv_cache.context.set_adapter(plan.adapter.and_then(|adapter| tools.adapters.get(&adapter)));
        let begin = Instant::now();
        let decoded = self.evaluate(&plan, tools);
        outcome.took = begin.elapsed();
        tools.counters.decode_steps += 1;
        match decoded {
            Ok(()) => {
                self.record_step(&plan, outcome.took, tools.counters);
                self.send_prompt_logprobs(&prompt_rows, tools.sampler);
                for (slot, rows) in rows {
                    self.draw(slot, &rows, tools, &mut outcome);
                }
            }
            // The cancelled generations are dropped before the next step.
            Err(DecodeError::Aborted) => self.undo_step(&plan),
            Err(error @ DecodeError::CacheFull) => self.preempt_youngest(&mut outcome, &error),
            Err(error @ DecodeError::Failed(_)) => {
                for sequence in self.drain() {
                    sequence.job.outbox.fail(EngineError::Failed { reason: error.to_string() });
                }
                self.kv_cache.reset();
            }
        }
        Some(outcome)
    }

    fn plan(&mut self, pauses: bool) -> Option<Plan> {
        let mut rows = 0;
        for sequence in self.slots.iter_mut().flatten() {
            rows += usize::from(sequence.is_generating() && !sequence.job.outbox.is_full());
        }
        for sequence in self.slots.iter_mut().flatten().filter(|sequence| sequence.is_generating()) {
            let most = self.draft_max.min(sequence.left().saturating_sub(1) as usize);
            // If rows influence each other's last bits, their number must not depend on the speed of this machine.
            let cost = |rows| if self.row_by_row { self.clock.seconds(rows) } else { usual_cost(rows) };
            let most = worthwhile(sequence.drafter.hit_rate(), most, rows.max(1), cost);
            sequence.suggested = sequence.drafter.suggest(&sequence.tokens, most);
            rows += sequence.suggested.len();
        }
        let mut needs = self.needs();
        let yields = |slot: &Option<Sequence>| slot.as_ref().is_some_and(|sequence| sequence.job.yields);
        let yields: Vec<bool> = self.slots.iter().map(yields).collect();
        let has_paused = pauses && self.pause_yielding(&mut needs, &yields);
        let batch_tokens_max = BATCH_TOKENS as usize;
        let prefill_tokens_max = self.clock.prompt_tokens_within(GAP, PREFILL_TOKENS_MIN, batch_tokens_max);
        self.turn = (self.turn + 1) % self.slots.len();
        let together = self.kv_cache.can_rewind();
        let limits = StepLimits { batch_tokens_max, prefill_tokens_max, together };
        let plan = batch_plan::plan(&needs, self.last_adapter, self.turn, limits);
        self.count_paused(plan.as_ref(), &yields, has_paused);
        let plan = plan?;
        self.last_adapter = plan.adapter;
        if !together {
            // The slot that was alone in this step is the last in the next.
            self.turn = plan.shares.iter().position(|share| *share > 0).unwrap_or(self.turn);
        }
        Some(plan)
    }

    /// Returns what each slot wants. Those that do not yield come first where slots share what there is.
    fn needs(&mut self) -> Vec<Need> {
        let (deterministic, mut echo_rows) = (self.deterministic, ECHO_ROWS as usize);
        let mut needs = vec![Need { adapter: None, tokens: Tokens::None }; self.slots.len()];
        for yields in [false, true] {
            for (wanted, slot) in needs.iter_mut().zip(&mut self.slots) {
                if let Some(sequence) = slot.as_mut().filter(|sequence| sequence.job.yields == yields) {
                    *wanted = need(sequence, deterministic, &mut echo_rows);
                }
            }
        }
        needs
    }

    /// Pauses the generations that yield, until they are due for one step in [`YIELDING_ONE_IN`], so that they do not
    /// starve. Returns whether one was paused.
    fn pause_yielding(&self, needs: &mut [Need], yields: &[bool]) -> bool {
        self.paused_steps.saturating_add(1) < YIELDING_ONE_IN && batch_plan::pause_yielding(needs, yields)
    }

    /// Counts a step in which no generation that yields takes part.
    fn count_paused(&mut self, plan: Option<&Plan>, yields: &[bool], has_paused: bool) {
        let takes_part = |plan: &Plan| plan.shares.iter().zip(yields).any(|(share, yields)| *yields && *share > 0);
        if plan.is_some_and(takes_part) {
            self.paused_steps = 0;
        } else if plan.is_some() || has_paused {
            self.paused_steps = self.paused_steps.saturating_add(1);
        }
    }

    /// Fills the batch and returns the rows of logits of each slot, and those of prompt tokens.
    fn fill(&mut self, plan: &Plan) -> (Vec<(usize, Vec<usize>)>, Vec<PromptRow>) {
        self.batch.clear();
        let mut outputs = Vec::new();
        let mut prompt_rows = Vec::new();
        for (slot, (sequence, &share)) in self.slots.iter_mut().zip(&plan.shares).enumerate() {
            let Some(sequence) = sequence else { continue };
            let echoes: Vec<bool> =
                (0..share).map(|index| sequence.echoes_after(sequence.evaluated() + index)).collect();
            let Sequence { tokens, in_cache: Some(in_cache), suggested, .. } = sequence else { continue };
            suggested.truncate(share.saturating_sub(1));
            let begin = in_cache.tokens.len();
            let coming = tokens[begin..].iter().chain(suggested.iter()).take(share);
            let rows: Vec<usize> = coming
                .zip(begin..)
                .map(|(token, position)| {
                    let output = position + 1 >= tokens.len();
                    let is_echoed = echoes[position - begin];
                    let row = self.batch.push(*token, position, in_cache.seq_id, output || is_echoed);
                    if is_echoed {
                        prompt_rows.push(PromptRow { slot, row, position });
                    }
                    (row, output)
                })
                .filter_map(|(row, output)| output.then_some(row))
                .collect();
            if !rows.is_empty() {
                outputs.push((slot, rows));
            }
        }
        (outputs, prompt_rows)
    }

    /// Sends log-probabilities of prompt tokens to the readers that asked for them.
    fn send_prompt_logprobs(&mut self, prompt_rows: &[PromptRow], sampler: &mut Sampler) {
        let model = Arc::clone(self.kv_cache.context.model());
        for &PromptRow { slot, row, position } in prompt_rows {
            if let (Some(sequence), Some(logits)) = (&mut self.slots[slot], self.kv_cache.context.logits(row)) {
                sequence.send_prompt_logprob(position, logits, sampler, model.vocabulary());
            }
        }
    }

    /// Evaluates the batch; aborts if the readers of at least half of it are gone.
    fn evaluate(&mut self, plan: &Plan, tools: &mut Tools<'_>) -> Result<(), DecodeError> {
        let Tools { pulse, stop, .. } = tools;
        let readers: Vec<_> = self.slots.iter().zip(&plan.shares).collect();
        let all: usize = plan.shares.iter().sum();
        let mut next = Instant::now() + ASK_EVERY;
        let mut is_abandoned = || {
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
        self.kv_cache.context.decode(&mut self.batch, &mut is_abandoned)
    }

    /// Forgets the sequences of an aborted step of a recurrent model, whose state may be ahead of the tokens.
    fn undo_step(&mut self, plan: &Plan) {
        if self.kv_cache.can_rewind() {
            return;
        }
        for (slot, _) in self.slots.iter_mut().zip(&plan.shares).filter(|(_, share)| **share > 0) {
            if let Some(Sequence { in_cache: Some(in_cache), .. }) = slot {
                self.kv_cache.start_over(in_cache);
            }
        }
    }

    fn record_step(&mut self, plan: &Plan, took: Duration, counters: &mut Counters) {
        let mut prompt_rows = 0;
        for (slot, &share) in self.slots.iter_mut().zip(&plan.shares).filter(|(_, share)| **share > 0) {
            let Some(sequence) = slot else { continue };
            if !sequence.is_generating() {
                prompt_rows += share;
            }
            let Sequence { tokens, in_cache: Some(in_cache), suggested, .. } = sequence else { continue };
            let begin = in_cache.tokens.len();
            let evaluated: Vec<Token> = tokens[begin..].iter().chain(suggested.iter()).take(share).copied().collect();
            self.kv_cache.extend(in_cache, &evaluated);
            sequence.note_reading();
        }
        counters.prompt_tokens += prompt_rows as u64;
        self.clock.note(plan.shares.iter().sum(), prompt_rows, took);
    }

    /// Samples the first token of answers whose prompt logits are known; returns whether there were any.
    fn sample_known(&mut self, tools: &mut Tools<'_>, outcome: &mut Outcome) -> bool {
        let mut has_drawn = false;
        for slot in 0..self.slots.len() {
            let Self { kv_cache, slots, .. } = self;
            let Some(sequence) = &mut slots[slot] else { continue };
            let Some(logits) = sequence.known.take() else { continue };
            has_drawn = true;
            if let Some(reason) = sequence.is_over() {
                self.end(slot, Ok(reason), outcome);
                continue;
            }
            let drawn = sequence.draw(&logits, tools.sampler, kv_cache.context.model().vocabulary());
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

    /// Samples the next tokens of a slot: one, and one more for each draft token that was right.
    fn draw(&mut self, slot: usize, rows: &[usize], tools: &mut Tools<'_>, outcome: &mut Outcome) {
        let Self { kv_cache, slots, .. } = self;
        let Some(sequence) = &mut slots[slot] else { return };
        let model = Arc::clone(kv_cache.context.model());
        let suggested = std::mem::take(&mut sequence.suggested);
        let before = sequence.tokens.len();
        if sequence.generated() == 0
            && let Some(row) = rows.first()
        {
            kv_cache.keep_logits(&sequence.tokens, sequence.job.adapter, *row);
        }
        // Nothing is drawn if only the prompt was requested, or if the continued answer had ended.
        let mut end = sequence.is_over().map(Ok);
        let rows = if end.is_some() { &[][..] } else { rows };
        for (row, suggestion) in rows.iter().zip(suggested.iter().map(Some).chain([None])) {
            let Some(logits) = kv_cache.context.logits(*row) else { break };
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
        if let Some(in_cache) = &mut sequence.in_cache {
            // Wrong draft tokens were evaluated, and are removed.
            let right = common_prefix(&in_cache.tokens, &sequence.tokens);
            kv_cache.rewind(in_cache, right);
        }
        if let Some(end) = end {
            self.end(slot, end, outcome);
        }
    }

    /// Ends the generation of a slot.
    fn end(&mut self, slot: usize, end: Result<FinishReason, EngineError>, outcome: &mut Outcome) {
        let Some(sequence) = self.vacate(slot) else { return };
        match end {
            Ok(reason) => outcome.finished.push(sequence.finish(reason)),
            Err(error) => sequence.job.outbox.fail(error),
        }
    }

    /// Takes a generation that yields out of its slot, the youngest first. One that is overdue stays, and so does a
    /// deterministic one, which could not go on where it was.
    pub(super) fn preempt_yielding(&mut self) -> Option<Sequence> {
        if self.deterministic {
            return None;
        }
        let is_late = self.paused_steps >= OVERDUE_STEPS;
        let may_go = |sequence: &mut Sequence| sequence.job.yields && (!is_late || sequence.job.outbox.is_full());
        let ages = self.slots.iter_mut().enumerate().filter_map(|(slot, sequence)| {
            let sequence = sequence.as_mut()?;
            may_go(sequence).then(|| (sequence.generated(), slot))
        });
        let youngest = ages.min();
        youngest.and_then(|(_, slot)| self.vacate(slot))
    }

    /// Preempts the youngest generation if cells run short, or fails it if it is the only one.
    fn preempt_youngest(&mut self, outcome: &mut Outcome, error: &DecodeError) {
        let youngest = (0..self.slots.len())
            .filter(|slot| self.slots[*slot].is_some())
            .min_by_key(|slot| self.slots[*slot].as_ref().map(|sequence| (!sequence.job.yields, sequence.generated())));
        let is_alone = self.running().count() == 1;
        let Some(sequence) = youngest.and_then(|slot| self.vacate(slot)) else { return };
        if is_alone {
            sequence.job.outbox.fail(EngineError::Failed { reason: error.to_string() });
        } else {
            outcome.preempted.push(sequence);
        }
    }

    /// Empties a slot and retains its sequence in the prefix cache.
    fn vacate(&mut self, slot: usize) -> Option<Sequence> {
        let mut sequence = self.slots[slot].take()?;
        if let Some(in_cache) = sequence.in_cache.take() {
            if self.deterministic { self.kv_cache.forget(in_cache) } else { self.kv_cache.retain(in_cache) }
        }
        Some(sequence)
    }

    fn cached_sequences(&self) -> impl Iterator<Item = &CachedSequence> + Clone {
        self.running().filter_map(|sequence| sequence.in_cache.as_ref())
    }
}

/// Returns what a slot wants. Prompts with log-probabilities share the rows that are left for them.
fn need(sequence: &mut Sequence, deterministic: bool, echo_rows: &mut usize) -> Need {
    let prompt_left = sequence.job.prompt_tokens.saturating_sub(sequence.evaluated());
    let tokens = if sequence.job.outbox.is_full() {
        Tokens::None
    } else if sequence.is_generating() {
        Tokens::Next(sequence.suggested.len())
    } else if deterministic {
        // The answer's tokens were evaluated one by one, and are again.
        Tokens::Prompt(prompt_left.max(1))
    } else if sequence.echoes_prompt() {
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

//! The thread that owns one loaded model and does all its work.
//!
//! Between two steps it accepts new work, drops cancelled work and starts waiting work. Without work it sleeps.
//! Generations share the main batch scheduler. Deterministic ones have a scheduler, and a context, of their own.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use futures_util::future::{self, FutureExt};
use parking_lot::Mutex;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::batch_scheduler::{BatchScheduler, Outcome, Tools};
use super::embedder::{EmbedJob, Embedder};
use super::kv_cache::{self, KvCache};
use super::native::{Adapter, Context, ContextOptions, Model};
use super::pulse::{self, Pulse};
use super::sequence::{Finished, Job, Sequence};
use crate::memory_plan::{BATCH_TOKENS, Shape, outputs};
use crate::model_runtime::{AdapterId, Counters, EngineError, LoadSnapshot};
use crate::sampler::Sampler;

/// Time constant of the smoothed tokens per second.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// A command to an engine thread.
pub(super) enum Work {
    Generate(Box<Job>),
    Embed(EmbedJob),
    /// Attaches an adapter from its verified file.
    AddAdapter {
        adapter: AdapterId,
        file: File,
        attached: oneshot::Sender<Result<(), EngineError>>,
    },
    /// Detaches an adapter once no generation uses it.
    RemoveAdapter {
        adapter: AdapterId,
    },
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    pub(super) shape: Shape,
    pub(super) threads: i32,
    pub(super) prompt_cache_bytes: u64,
    pub(super) draft_tokens: u32,
    /// Whether the result of a row is independent of the other rows in a step.
    pub(super) row_by_row: bool,
}

/// The loop of one engine thread.
pub(super) struct Engine {
    model: Arc<Model>,
    options: Options,
    main: Option<BatchScheduler>,
    exact: Option<BatchScheduler>,
    embedder: Option<Embedder>,
    waiting: VecDeque<Sequence>,
    embeds: VecDeque<EmbedJob>,
    adapters: BTreeMap<AdapterId, Arc<Adapter>>,
    /// Adapters to detach once no generation uses them.
    leaving: Vec<AdapterId>,
    work: mpsc::Receiver<Work>,
    snapshot: Arc<Mutex<LoadSnapshot>>,
    pulse: Pulse,
    stop: CancellationToken,
    sampler: Sampler,
    counters: Counters,
    rate: Rate,
}

impl Engine {
    /// Creates the engine of a loaded model. `generates` reserves the KV cache of its generations.
    pub(super) fn new(
        model: Arc<Model>,
        options: Options,
        generates: bool,
        work: mpsc::Receiver<Work>,
        snapshot: Arc<Mutex<LoadSnapshot>>,
        pulse: Pulse,
        stop: CancellationToken,
    ) -> Result<Self, EngineError> {
        let main = generates.then(|| main_scheduler(&model, options)).transpose()?;
        Ok(Self {
            model,
            options,
            main,
            exact: None,
            embedder: None,
            waiting: VecDeque::new(),
            embeds: VecDeque::new(),
            adapters: BTreeMap::new(),
            leaving: Vec::new(),
            work,
            snapshot,
            pulse,
            stop,
            sampler: Sampler::default(),
            counters: Counters::default(),
            rate: Rate::default(),
        })
    }

    /// Runs until it is stopped, or until no more work can be sent.
    pub(super) fn serve(mut self) {
        while !self.stop.is_cancelled() {
            self.pulse.beat(Instant::now());
            let connected = self.take_work();
            self.drop_cancelled();
            self.start_waiting();
            self.release_adapters();
            self.publish();
            // The snapshot is published first, so that a reader that sees a start also sees the slot taken.
            self.main.iter_mut().chain(&mut self.exact).for_each(BatchScheduler::send_starts);
            let worked = self.step();
            if !worked {
                if !connected && self.is_idle() {
                    break;
                }
                self.sleep();
            }
        }
        self.end_all(&EngineError::NotLoaded);
    }

    /// Runs the next step of each scheduler and one batch of embeddings; returns false if there is nothing to do.
    fn step(&mut self) -> bool {
        let is_exact_awaited = self.waiting.iter().any(|sequence| sequence.job.deterministic && !sequence.job.yields);
        let Self { main, exact, adapters, sampler, counters, pulse, stop, .. } = self;
        let has_urgent = main.iter_mut().chain(exact.iter_mut()).any(BatchScheduler::has_urgent);
        let mut tools = Tools { adapters, sampler, counters, pulse, stop, has_urgent, is_exact_awaited };
        let outcomes: Vec<Outcome> =
            main.iter_mut().chain(exact.iter_mut()).filter_map(|scheduler| scheduler.step(&mut tools)).collect();
        let mut worked = !outcomes.is_empty();
        for outcome in outcomes {
            self.rate.add(outcome.drawn, outcome.took);
            for sequence in outcome.preempted.into_iter().rev() {
                self.waiting.push_front(sequence);
            }
            self.send_finished(outcome.finished);
        }
        worked |= self.embed();
        worked
    }

    fn embed(&mut self) -> bool {
        if self.embeds.is_empty() && self.embedder.as_ref().is_none_or(Embedder::is_idle) {
            return false;
        }
        if self.embedder.is_none() {
            match self.pulse.hold(|| Embedder::new(&self.model, self.options)) {
                Ok(embedder) => self.embedder = Some(embedder),
                Err(error) => {
                    for job in self.embeds.drain(..) {
                        job.fail(error.clone());
                    }
                    return true;
                }
            }
        }
        if let Some(embedder) = &mut self.embedder {
            self.counters.prompt_tokens += embedder.step(&mut self.embeds, &self.stop, &mut self.pulse);
            self.counters.decode_steps += 1;
        }
        true
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty()
            && self.embeds.is_empty()
            && self.embedder.as_ref().is_none_or(Embedder::is_idle)
            && self.schedulers().all(|scheduler| scheduler.running().next().is_none())
    }

    fn schedulers(&self) -> impl Iterator<Item = &BatchScheduler> {
        self.main.iter().chain(&self.exact)
    }

    /// Accepts new work. Returns false once all senders are gone.
    fn take_work(&mut self) -> bool {
        loop {
            match self.work.try_recv() {
                Ok(work) => self.take(work),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, work: Work) {
        match work {
            Work::Generate(job) => {
                self.pulse.follow(job.outbox.reading());
                self.waiting.extend(Sequence::new(*job, self.model.vocabulary()));
            }
            Work::Embed(job) => self.embeds.push_back(job),
            Work::AddAdapter { adapter, file, attached } => {
                let loaded = self.pulse.hold(|| Adapter::load(&self.model, &file));
                let loaded = loaded.map_err(|reason| EngineError::InvalidModel { reason });
                let _ = attached.send(loaded.map(|loaded| drop(self.adapters.insert(adapter, Arc::new(loaded)))));
            }
            Work::RemoveAdapter { adapter } => self.leaving.push(adapter),
        }
    }

    fn drop_cancelled(&mut self) {
        let waiting = self.waiting.len() + self.embeds.len();
        self.waiting.retain(|sequence| !sequence.job.outbox.is_cancelled());
        self.embeds.retain(|job| !job.is_cancelled());
        let dropped = waiting - self.waiting.len() - self.embeds.len();
        let schedulers = self.main.iter_mut().chain(&mut self.exact);
        let stopped: usize = schedulers.map(BatchScheduler::drop_cancelled).sum();
        self.counters.cancelled += (dropped + stopped) as u64;
    }

    /// Starts waiting generations in the order of their arrival, those that yield after the others, for which they give
    /// up their slots and cells. One that is overdue goes first.
    ///
    /// A generation without KV cache capacity blocks those behind it, so that long prompts get their turn. One that
    /// waits for another to evaluate their shared prefix does not.
    fn start_waiting(&mut self) {
        let (mut deferred, mut preempted) = (VecDeque::new(), VecDeque::new());
        let mut is_full = false;
        let overdue = self.take_overdue();
        let (first, last): (VecDeque<_>, VecDeque<_>) =
            self.waiting.drain(..).partition(|sequence| !sequence.job.yields);
        let first = overdue.into_iter().chain(first).map(|sequence| (sequence, true));
        for (sequence, goes_first) in first.chain(last.into_iter().map(|sequence| (sequence, false))) {
            if sequence.job.adapter.is_some_and(|adapter| !self.adapters.contains_key(&adapter)) {
                sequence.job.outbox.fail(gone_adapter());
                continue;
            }
            let scheduler = match self.scheduler(&sequence) {
                Ok(Some(scheduler)) => scheduler,
                Ok(None) => {
                    sequence.job.outbox.fail(EngineError::NotLoaded);
                    continue;
                }
                Err(error) => {
                    sequence.job.outbox.fail(error);
                    continue;
                }
            };
            let is_behind = is_full && !sequence.job.deterministic;
            let may_take_slot = scheduler.has_slot() || (goes_first && scheduler.has_yielding());
            if !is_behind && may_take_slot && scheduler.is_evaluating_prefix_of(&sequence) {
                deferred.push_back(sequence);
                continue;
            }
            let is_blocked =
                |scheduler: &BatchScheduler| !scheduler.has_slot() || !scheduler.has_capacity_for(&sequence);
            while goes_first && !is_behind && is_blocked(scheduler) {
                let Some(yielding) = scheduler.preempt_yielding() else { break };
                preempted.push_back(yielding);
            }
            if is_behind || is_blocked(scheduler) {
                is_full |= !sequence.job.deterministic;
                deferred.push_back(sequence);
            } else {
                let (queries, hits) = scheduler.start(sequence);
                self.counters.prefix_queries += queries;
                self.counters.prefix_hits += hits;
            }
        }
        // What was preempted goes on before what has not begun.
        preempted.append(&mut deferred);
        self.waiting = preempted;
    }

    /// Takes out the first generation that yields for each context in which none has had its turn for long.
    fn take_overdue(&mut self) -> Vec<Sequence> {
        let mut overdue = vec![];
        for scheduler in self.main.iter().chain(&self.exact) {
            let next = self.waiting.iter_mut().position(|sequence| scheduler.is_overdue(sequence));
            overdue.extend(next.and_then(|index| self.waiting.remove(index)));
        }
        overdue
    }

    /// Returns the batch scheduler of a generation.
    fn scheduler(&mut self, sequence: &Sequence) -> Result<Option<&mut BatchScheduler>, EngineError> {
        if !sequence.job.deterministic {
            return Ok(self.main.as_mut());
        }
        if self.exact.is_none() {
            self.exact = Some(self.pulse.hold(|| exact_scheduler(&self.model, self.options))?);
        }
        Ok(self.exact.as_mut())
    }

    /// Frees detached adapters that no generation uses any more.
    fn release_adapters(&mut self) {
        for adapter in std::mem::take(&mut self.leaving) {
            let uses = |sequence: &Sequence| sequence.job.adapter == Some(adapter);
            if self.waiting.iter().any(uses) || self.schedulers().flat_map(BatchScheduler::running).any(uses) {
                self.leaving.push(adapter);
                continue;
            }
            for scheduler in self.main.iter_mut().chain(&mut self.exact) {
                scheduler.kv_cache.forget_adapter(adapter);
                scheduler.kv_cache.context.set_adapter(None);
            }
            self.adapters.remove(&adapter);
        }
    }

    /// Sleeps until new work or a stop arrives, until a reader has room or disconnects, or until waiting readers are
    /// due a progress report.
    fn sleep(&mut self) {
        let at_work =
            self.schedulers().flat_map(BatchScheduler::running).map(|sequence| sequence.job.outbox.capacity().boxed());
        let waiting = self.waiting.iter().map(|sequence| sequence.job.outbox.gone().boxed());
        let readers: Vec<_> = at_work.chain(waiting).collect();
        let until = (!readers.is_empty()).then(|| Instant::now() + pulse::TELL_EVERY);
        let mut arrived = None;
        block_on(until, async {
            let reader = async {
                if readers.is_empty() { future::pending().await } else { future::select_all(readers).await.0 }
            };
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = reader => {}
                work = self.work.recv(), if !self.work.is_closed() => arrived = work,
            }
        });
        if let Some(work) = arrived {
            self.take(work);
        }
    }

    /// Updates the counters before it sends the ends, so that a reader that sees an end also sees the counters.
    fn send_finished(&mut self, finished: Vec<Finished>) {
        if finished.is_empty() {
            return;
        }
        self.counters.completed += finished.len() as u64;
        self.publish();
        for finished in finished {
            finished.tell();
        }
    }

    fn end_all(&mut self, error: &EngineError) {
        self.work.close();
        self.take_work();
        let running = self.main.iter_mut().chain(&mut self.exact).flat_map(BatchScheduler::drain);
        for sequence in running.chain(self.waiting.drain(..)) {
            sequence.job.outbox.fail(error.clone());
        }
        for job in self.embeds.drain(..) {
            job.fail(error.clone());
        }
        if let Some(embedder) = &mut self.embedder {
            embedder.fail_all(error);
        }
    }

    fn publish(&mut self) {
        let running = self.schedulers().flat_map(BatchScheduler::running).count() as u32;
        let usage = self.main.as_ref().map_or(0.0, |scheduler| scheduler.kv_cache.usage());
        let mut snapshot = self.snapshot.lock();
        snapshot.running = running;
        snapshot.kv_usage = usage;
        snapshot.tokens_per_second = self.rate.tokens_per_second;
        snapshot.counters = self.counters;
    }
}

fn main_scheduler(model: &Arc<Model>, options: Options) -> Result<BatchScheduler, EngineError> {
    let Shape { slots, kv_tokens, .. } = options.shape;
    let context = ContextOptions {
        cells: kv_tokens,
        batch_tokens: BATCH_TOKENS,
        sequences: kv_cache::sequences(model, slots),
        outputs: outputs(slots, options.draft_tokens),
        threads: options.threads,
        pooling: None,
    };
    let context = Context::new(model, context).map_err(|reason| EngineError::Failed { reason })?;
    let kv_cache = KvCache::new(context, kv_tokens, slots, options.prompt_cache_bytes);
    Ok(BatchScheduler::new(kv_cache, slots, options, false))
}

fn exact_scheduler(model: &Arc<Model>, options: Options) -> Result<BatchScheduler, EngineError> {
    let cells = options.shape.context_length;
    let context = ContextOptions {
        cells,
        batch_tokens: BATCH_TOKENS,
        sequences: 1,
        outputs: 1,
        threads: options.threads,
        pooling: None,
    };
    let context = Context::new(model, context).map_err(|reason| EngineError::Failed { reason })?;
    Ok(BatchScheduler::new(KvCache::new(context, cells, 1, 0), 1, options, true))
}

/// Returns the error for an adapter that is not attached.
pub(super) fn gone_adapter() -> EngineError {
    crate::model_runtime::unsupported("adapter", "it is not attached to this model")
}

/// Tokens per second, smoothed over the time spent generating.
#[derive(Debug, Default)]
struct Rate {
    tokens_per_second: f32,
}

impl Rate {
    fn add(&mut self, tokens: u64, elapsed: Duration) {
        let seconds = elapsed.as_secs_f32();
        if tokens == 0 || seconds <= 0.0 {
            return;
        }
        let rate = tokens as f32 / seconds;
        let share = 1.0 - (-seconds / RATE_WINDOW.as_secs_f32()).exp();
        if self.tokens_per_second == 0.0 {
            self.tokens_per_second = rate;
        } else {
            self.tokens_per_second += share * (rate - self.tokens_per_second);
        }
    }
}

/// Runs a future to completion on this thread, which belongs to no async runtime, or until `until`.
fn block_on(until: Option<Instant>, future: impl Future<Output = ()>) {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = TaskContext::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(()) => return,
            Poll::Pending => match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => thread::park(),
                Some(Duration::ZERO) => return,
                Some(left) => thread::park_timeout(left),
            },
        }
    }
}

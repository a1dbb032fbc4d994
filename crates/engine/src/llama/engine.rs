//! The thread that owns one loaded model and evaluates batches for all its generations.
//!
//! Each step puts one token of every generating slot and a share of the waiting prompts in one batch, evaluates it,
//! and draws the next token of each slot that has logits. Between steps it takes new work, drops what was cancelled
//! and starts what waits. Without work the thread sleeps.

use std::collections::VecDeque;
use std::fs::File;
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use futures_util::future::{self, FutureExt};
use llama_cpp_2::DecodeError;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::batch_plan::{self, Need};
use super::outbox::Outbox;
use super::{backend, log};
use crate::memory_plan::{BATCH_TOKENS, Shape};
use crate::model_runtime::{Counters, EngineError, FinishReason, LoadSnapshot, ProgressSink, Sampling, Usage};
use crate::sampler::{History, Sampler};
use crate::text_assembler::TextAssembler;

/// Over what time the tokens a second are smoothed.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// What an engine thread needs to begin.
pub(super) struct Start {
    pub(super) file: File,
    pub(super) shape: Shape,
    pub(super) threads: i32,
    pub(super) gpu_layers: u32,
    pub(super) progress: ProgressSink,
    pub(super) jobs: mpsc::Receiver<Job>,
    pub(super) snapshot: Arc<Mutex<LoadSnapshot>>,
    pub(super) stop: CancellationToken,
}

/// An admitted generation.
pub(super) struct Job {
    pub(super) prompt: Vec<LlamaToken>,
    pub(super) sampling: Sampling,
    pub(super) stop: Vec<String>,
    pub(super) limit: u32,
    pub(super) ignore_eos: bool,
    pub(super) outbox: Outbox,
    pub(super) admitted: OwnedSemaphorePermit,
}

/// A generation in a slot.
struct Sequence {
    job: Job,
    /// Tokens whose keys and values are in the slot.
    evaluated: usize,
    /// The token that was drawn last and is still to be evaluated.
    next: Option<LlamaToken>,
    generated: u32,
    assembler: TextAssembler,
}

/// A generation that came to its end in this step.
struct Finished {
    sequence: Sequence,
    reason: FinishReason,
}

/// The loop of one engine thread.
pub(super) struct Engine<'a> {
    model: &'a LlamaModel,
    context: LlamaContext<'a>,
    batch: LlamaBatch<'static>,
    slots: Vec<Option<Sequence>>,
    waiting: VecDeque<Job>,
    jobs: mpsc::Receiver<Job>,
    snapshot: Arc<Mutex<LoadSnapshot>>,
    stop: CancellationToken,
    sampler: Sampler,
    counters: Counters,
    rate: Rate,
    cells: u32,
    turn: usize,
}

impl Engine<'_> {
    /// Loads the model, tells `ready` how that went, and serves until it is stopped.
    pub(super) fn run(start: Start, ready: oneshot::Sender<Result<Arc<LlamaModel>, EngineError>>) {
        let Start { file, shape, threads, gpu_layers, progress, jobs, snapshot, stop } = start;
        let model = match load_model(&file, gpu_layers, progress, stop.clone()) {
            Ok(model) => Arc::new(model),
            Err(error) => return drop(ready.send(Err(error))),
        };
        // The mapping of the file stays; the descriptor is not needed any more.
        drop(file);
        let context = match new_context(&model, shape, threads) {
            Ok(context) => context,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let engine = Engine {
            model: &model,
            context,
            batch: LlamaBatch::new(BATCH_TOKENS as usize, 1),
            slots: (0..shape.slots).map(|_| None).collect(),
            waiting: VecDeque::new(),
            jobs,
            snapshot,
            stop,
            sampler: Sampler::default(),
            counters: Counters::default(),
            rate: Rate::default(),
            cells: shape.slots * shape.context_length,
            turn: 0,
        };
        if ready.send(Ok(Arc::clone(&model))).is_ok() {
            engine.serve();
        }
    }

    fn serve(mut self) {
        while !self.stop.is_cancelled() {
            let connected = self.take_jobs();
            self.drop_cancelled();
            self.start_waiting();
            self.publish();
            let shares = batch_plan::plan(&self.needs(), self.turn, BATCH_TOKENS as usize);
            self.turn = (self.turn + 1) % self.slots.len();
            if shares.iter().any(|share| *share > 0) {
                self.step(&shares);
            } else if connected || !self.is_idle() {
                self.sleep();
            } else {
                break;
            }
        }
        self.end_all(&EngineError::NotLoaded);
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.slots.iter().all(Option::is_none)
    }

    /// Takes new jobs; returns false once nobody can send any more.
    fn take_jobs(&mut self) -> bool {
        loop {
            match self.jobs.try_recv() {
                Ok(job) => self.waiting.push_back(job),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn drop_cancelled(&mut self) {
        let waiting = self.waiting.len();
        self.waiting.retain(|job| !job.outbox.is_cancelled());
        self.counters.cancelled += (waiting - self.waiting.len()) as u64;
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|sequence| sequence.job.outbox.is_cancelled()) {
                self.counters.cancelled += 1;
                drop(self.free(slot));
            }
        }
    }

    fn start_waiting(&mut self) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_some() {
                continue;
            }
            let Some(job) = self.waiting.pop_front() else { return };
            let assembler = TextAssembler::new(&job.stop);
            let prompt_tokens = job.prompt.len() as u32;
            self.slots[slot] = Some(Sequence { job, evaluated: 0, next: None, generated: 0, assembler });
            // Whoever sees the start sees the slot taken.
            self.publish();
            if let Some(sequence) = &mut self.slots[slot] {
                sequence.job.outbox.started(prompt_tokens, 0);
            }
        }
    }

    fn needs(&mut self) -> Vec<Need> {
        self.slots.iter_mut().map(|slot| slot.as_mut().map_or(Need::Nothing, Sequence::need)).collect()
    }

    /// Waits for a job, for the end, or for a reader that makes room or goes.
    fn sleep(&mut self) {
        let rooms = self.slots.iter().flatten().map(|sequence| sequence.job.outbox.room().boxed());
        let readers: Vec<_> = rooms.chain(self.waiting.iter().map(|job| job.outbox.gone().boxed())).collect();
        let mut arrived = None;
        block_on(async {
            let reader = async {
                if readers.is_empty() { future::pending().await } else { future::select_all(readers).await.0 }
            };
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = reader => {}
                job = self.jobs.recv(), if !self.jobs.is_closed() => arrived = job,
            }
        });
        self.waiting.extend(arrived);
    }

    /// Evaluates one batch and draws a token for each slot that has logits.
    fn step(&mut self, shares: &[usize]) {
        self.batch.clear();
        let mut rows = Vec::new();
        for (slot, &share) in shares.iter().enumerate() {
            let Some(sequence) = &self.slots[slot] else { continue };
            for index in 0..share {
                let position = sequence.evaluated + index;
                let last = position + 1 == sequence.end();
                let token = sequence.next.unwrap_or_else(|| sequence.job.prompt[position]);
                if last {
                    rows.push((slot, self.batch.n_tokens()));
                }
                // The plan keeps to the room of the batch.
                let added = self.batch.add(token, position as i32, &[slot as i32], last);
                added.expect("the batch has room for every planned token");
            }
        }
        let begin = Instant::now();
        let decoded = self.context.decode(&mut self.batch);
        self.counters.decode_steps += 1;
        if let Err(error) = decoded {
            return self.recover(shares, &error);
        }
        for (slot, &share) in self.slots.iter_mut().zip(shares) {
            // A paused slot keeps the token that it has still to evaluate.
            if let Some(sequence) = slot
                && share > 0
            {
                sequence.evaluated += share;
                if sequence.next.take().is_none() {
                    self.counters.prompt_tokens += share as u64;
                }
            }
        }
        let generated = self.counters.generated_tokens;
        let mut finished = Vec::new();
        for (slot, row) in rows {
            self.draw(slot, row, &mut finished);
        }
        self.rate.add(self.counters.generated_tokens - generated, begin.elapsed());
        self.tell_finished(finished);
    }

    /// Draws the next token of a slot from a row of logits.
    fn draw(&mut self, slot: usize, row: i32, finished: &mut Vec<Finished>) {
        let Some(sequence) = &mut self.slots[slot] else { return };
        let logits = self.context.get_logits_ith(row);
        let position = sequence.evaluated as u64;
        let token = match self.sampler.sample(logits, &sequence.job.sampling, position, &History::default(), None) {
            Ok(token) => token,
            Err(error) => {
                let error = EngineError::Failed { reason: error.to_string() };
                if let Some(sequence) = self.free(slot) {
                    sequence.job.outbox.fail(error);
                }
                return;
            }
        };
        let vocabulary = self.model.vocab();
        let drawn = LlamaToken(token as i32);
        let reason = if vocabulary.is_eog(drawn) && !sequence.job.ignore_eos {
            Some(FinishReason::Stop)
        } else {
            sequence.generated += 1;
            self.counters.generated_tokens += 1;
            let text = sequence.assembler.push(&vocabulary.token_to_piece(drawn, false, None));
            sequence.job.outbox.piece(&text, token);
            if sequence.assembler.is_stopped() {
                Some(FinishReason::Stop)
            } else if sequence.generated >= sequence.job.limit {
                Some(FinishReason::Length)
            } else {
                sequence.next = Some(drawn);
                None
            }
        };
        if let Some(reason) = reason
            && let Some(sequence) = self.free(slot)
        {
            finished.push(Finished { sequence, reason });
        }
    }

    /// Counts the ends before it tells them, so that whoever sees an end sees the counters and the room as well.
    fn tell_finished(&mut self, finished: Vec<Finished>) {
        self.counters.completed += finished.len() as u64;
        let mut told = Vec::new();
        for Finished { sequence, reason } in finished {
            let Sequence { job: Job { prompt, outbox, admitted, .. }, generated, mut assembler, .. } = sequence;
            drop(admitted);
            let usage = Usage { prompt_tokens: prompt.len() as u32, completion_tokens: generated, cached_tokens: 0 };
            told.push((outbox, assembler.finish(), reason, usage));
        }
        self.publish();
        for (outbox, text, reason, usage) in told {
            outbox.done(&text, reason, usage);
        }
    }

    /// Ends the generations of a batch that could not be evaluated.
    fn recover(&mut self, shares: &[usize], error: &DecodeError) {
        let failure = EngineError::Failed { reason: error.to_string() };
        if *error == DecodeError::NoKvCacheSlot {
            for (slot, _) in shares.iter().enumerate().filter(|(_, share)| **share > 0) {
                if let Some(sequence) = self.free(slot) {
                    sequence.job.outbox.fail(failure.clone());
                }
            }
        } else {
            // Nothing is known of the keys and values any more.
            self.context.clear_kv_cache();
            for sequence in self.slots.iter_mut().filter_map(Option::take) {
                sequence.job.outbox.fail(failure.clone());
            }
        }
    }

    /// Empties a slot and forgets its keys and values.
    fn free(&mut self, slot: usize) -> Option<Sequence> {
        let sequence = self.slots[slot].take()?;
        if let Err(error) = self.context.kv_cache_seq_rm(slot as i32, None, None) {
            tracing::error!(slot, %error, "the keys and values of a slot could not be removed");
        }
        Some(sequence)
    }

    fn end_all(&mut self, error: &EngineError) {
        self.jobs.close();
        self.take_jobs();
        let running = self.slots.iter_mut().filter_map(Option::take).map(|sequence| sequence.job);
        for job in running.chain(self.waiting.drain(..)) {
            job.outbox.fail(error.clone());
        }
    }

    fn publish(&mut self) {
        let evaluated: usize = self.slots.iter().flatten().map(|sequence| sequence.evaluated).sum();
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot.running = self.slots.iter().flatten().count() as u32;
        snapshot.kv_usage = evaluated as f32 / self.cells as f32;
        snapshot.tokens_per_second = self.rate.tokens_per_second;
        snapshot.counters = self.counters;
    }
}

impl Sequence {
    /// Returns how many tokens are evaluated once the slot has logits for its next token.
    fn end(&self) -> usize {
        if self.next.is_some() { self.evaluated + 1 } else { self.job.prompt.len() }
    }

    fn need(&mut self) -> Need {
        if self.job.outbox.is_full() {
            Need::Nothing
        } else if self.next.is_some() {
            Need::Next
        } else {
            Need::Prompt(self.job.prompt.len() - self.evaluated)
        }
    }
}

/// Tokens a second, smoothed over the time in which tokens were made.
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

fn load_model(
    file: &File,
    gpu_layers: u32,
    progress: ProgressSink,
    stop: CancellationToken,
) -> Result<LlamaModel, EngineError> {
    let mut reached = 0.0_f32;
    let parameters = LlamaModelParams::default().with_n_gpu_layers(gpu_layers).with_progress_callback(move |share| {
        if share > reached {
            reached = share.min(1.0);
            progress(reached);
        }
        !stop.is_cancelled()
    });
    // The path leads through the open descriptor: what was verified is what is loaded.
    let path = format!("{DESCRIPTORS}/{}", file.as_raw_fd());
    let _ = log::take_errors();
    LlamaModel::load_from_file(backend()?, path, &parameters).map_err(|_| {
        let reason = log::take_errors().into_iter().next().unwrap_or_else(|| "llama.cpp refuses it".into());
        // Want of memory is not the model's fault, and llama.cpp tells it apart in words only.
        if reason.contains("alloc") { EngineError::Failed { reason } } else { EngineError::InvalidModel { reason } }
    })
}

#[cfg(target_os = "linux")]
const DESCRIPTORS: &str = "/proc/self/fd";
#[cfg(not(target_os = "linux"))]
const DESCRIPTORS: &str = "/dev/fd";

fn new_context(model: &LlamaModel, shape: Shape, threads: i32) -> Result<LlamaContext<'_>, EngineError> {
    let parameters = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(shape.slots * shape.context_length))
        .with_n_batch(BATCH_TOKENS)
        .with_n_ubatch(BATCH_TOKENS)
        .with_n_seq_max(shape.slots)
        // One room for all sequences: without it a copied prefix fails an assertion.
        .with_kv_unified(true)
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
        .with_no_perf(true);
    model.new_context(backend()?, parameters).map_err(|_| EngineError::Failed {
        reason: log::take_errors().into_iter().next().unwrap_or_else(|| "llama.cpp could not make a context".into()),
    })
}

/// Runs a future on this thread, which belongs to no async runtime.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

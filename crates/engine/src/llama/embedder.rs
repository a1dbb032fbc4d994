//! Computes embedding vectors of texts, in a context of its own.
//!
//! Most models attend causally: their texts are evaluated in chunks, several texts to a batch, and the token vectors
//! are pooled here, so a text may be as long as the model's context. Other models need the whole text at once: a
//! batch holds whole texts, and llama.cpp does the pooling.

mod sizes;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio_util::sync::CancellationToken;

use super::engine::Options;
use super::native::{Batch, Context, ContextOptions, DecodeError, Model, Pooling, Token};
use super::pulse::Pulse;
use crate::model_runtime::EngineError;
use sizes::{Reading, Sizes, TEXTS_MAX, sizes};

/// A text to embed.
pub(super) struct EmbedJob {
    /// Its tokens: at least one, and no more than fit the context.
    pub(super) tokens: Vec<Token>,
    /// Receives the embedding vector, which is normalised, or a reranker's score as a vector of one number.
    pub(super) made: oneshot::Sender<Result<Vec<f32>, EngineError>>,
    pub(super) admitted: Arc<OwnedSemaphorePermit>,
}

/// Computes embedding vectors. Its context grows with the texts.
pub(super) struct Embedder {
    model: Arc<Model>,
    threads: i32,
    context_length: u32,
    pooling: Pooling,
    reading: Reading,
    context: Option<(Context, Sizes)>,
    batch: Batch,
    open: Vec<Open>,
}

/// A text that is being evaluated.
struct Open {
    job: EmbedJob,
    sequence: i32,
    read: usize,
    /// The vectors of its tokens, as far as they are pooled.
    pooled: Vec<f64>,
}

impl EmbedJob {
    /// Returns whether the caller no longer waits for the vector.
    pub(super) fn is_cancelled(&self) -> bool {
        self.made.is_closed()
    }

    pub(super) fn fail(self, error: EngineError) {
        self.end(Err(error));
    }

    fn end(self, made: Result<Vec<f32>, EngineError>) {
        // The permit is released before the caller learns of the end.
        drop(self.admitted);
        let _ = self.made.send(made);
    }
}

impl Embedder {
    pub(super) fn new(model: &Arc<Model>, options: Options) -> Result<Self, EngineError> {
        // Only a context reports the model's pooling and attention type.
        let trial = ContextOptions {
            cells: TEXTS_MAX,
            batch_tokens: TEXTS_MAX,
            sequences: 1,
            outputs: TEXTS_MAX,
            threads: options.threads,
            pooling: Some(Pooling::OfModel),
        };
        let trial = Context::new(model, trial).map_err(|reason| EngineError::Failed { reason })?;
        Ok(Self {
            model: Arc::clone(model),
            threads: options.threads,
            context_length: options.shape.context_length,
            // Models that were not made for embeddings have no pooling of their own; the mean works best for them.
            pooling: trial.pooling().unwrap_or(Pooling::Mean),
            // llama.cpp applies a reranker's classifier, to whole texts only.
            reading: if trial.is_causal() && trial.pooling() != Some(Pooling::Rank) {
                Reading::Pieces
            } else {
                Reading::Whole
            },
            context: None,
            batch: Batch::default(),
            open: Vec::new(),
        })
    }

    /// Returns whether no text is being evaluated.
    pub(super) fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// Fails all texts that are being evaluated.
    pub(super) fn fail_all(&mut self, error: &EngineError) {
        for open in self.open.drain(..) {
            open.job.fail(error.clone());
        }
        if let Some((context, _)) = &mut self.context {
            context.clear();
        }
    }

    /// Evaluates one batch of texts, in order. Returns the number of evaluated tokens.
    pub(super) fn step(&mut self, jobs: &mut VecDeque<EmbedJob>, stop: &CancellationToken, pulse: &mut Pulse) -> u64 {
        self.drop_cancelled();
        if let Err(error) = self.ensure_context(jobs, pulse) {
            // The next text may be shorter and fit.
            if let Some(job) = jobs.pop_front() {
                job.fail(error);
            }
            return 0;
        }
        let Some((context, sizes)) = &mut self.context else { return 0 };
        take_in(&mut self.open, jobs, *sizes);
        if self.open.is_empty() {
            return 0;
        }
        let rows = fill(&mut self.batch, &mut self.open, sizes.batch_tokens as usize);
        let mut in_vain = || {
            pulse.beat(Instant::now());
            stop.is_cancelled() || self.open.iter().all(|open| open.job.is_cancelled())
        };
        let evaluated = self.batch.len() as u64;
        match context.decode(&mut self.batch, &mut in_vain) {
            Ok(()) => {
                if self.reading == Reading::Pieces {
                    pool(context, self.pooling, &mut self.open, &rows);
                }
                self.finish();
            }
            // Texts whose callers are gone are dropped before the next step.
            Err(error @ (DecodeError::Aborted | DecodeError::CacheFull | DecodeError::Failed(_))) => {
                self.fail_all(&EngineError::Failed { reason: error.to_string() });
            }
        }
        evaluated
    }

    fn drop_cancelled(&mut self) {
        let Some((context, _)) = &mut self.context else { return };
        self.open.retain(|open| {
            let stays = !open.job.is_cancelled();
            if !stays {
                context.remove(open.sequence, 0);
            }
            stays
        });
    }

    /// Creates a larger context if the next text needs one, once no text is being evaluated in the old one.
    fn ensure_context(&mut self, jobs: &VecDeque<EmbedJob>, pulse: &mut Pulse) -> Result<(), EngineError> {
        let Some(next) = jobs.front().filter(|_| self.open.is_empty()) else { return Ok(()) };
        let longest = u32::try_from(next.tokens.len()).unwrap_or(u32::MAX);
        if self.context.as_ref().is_some_and(|(_, sizes)| sizes.cells >= longest) {
            return Ok(());
        }
        let vocabulary = self.model.vocabulary().len();
        let sizes = sizes(self.reading, vocabulary, longest, self.context_length);
        let options = ContextOptions {
            cells: sizes.cells,
            batch_tokens: sizes.batch_tokens,
            sequences: TEXTS_MAX,
            outputs: sizes.batch_tokens,
            threads: self.threads,
            pooling: Some(match self.reading {
                Reading::Pieces => Pooling::Tokens,
                Reading::Whole => self.pooling,
            }),
        };
        // The old context is freed first, since memory may not suffice for both.
        self.context = None;
        let context = pulse.hold(|| Context::new(&self.model, options));
        self.context = Some((context.map_err(|reason| EngineError::Failed { reason })?, sizes));
        Ok(())
    }

    /// Sends the vectors of the texts that are completely evaluated.
    fn finish(&mut self) {
        let Some((context, _)) = &mut self.context else { return };
        for open in self.open.extract_if(.., |open| open.read == open.job.tokens.len()) {
            let made = match self.reading {
                Reading::Pieces => normalised(&open.pooled),
                Reading::Whole => match context.pooled(open.sequence) {
                    Some(outputs) if self.pooling == Pooling::Rank => score(outputs).map(|score| vec![score]),
                    Some(vector) => normalised(&vector.iter().copied().map(f64::from).collect::<Vec<_>>()),
                    None => Err(EngineError::Failed { reason: "the model made no vector".into() }),
                },
            };
            context.remove(open.sequence, 0);
            open.job.end(made);
        }
    }
}

/// Starts as many of the next texts as fit together with those being evaluated.
fn take_in(open: &mut Vec<Open>, jobs: &mut VecDeque<EmbedJob>, sizes: Sizes) {
    let mut cells: usize = open.iter().map(|open| open.job.tokens.len()).sum();
    let is_free = |sequence: &i32| open.iter().all(|open| open.sequence != *sequence);
    let free: Vec<i32> = (0..TEXTS_MAX as i32).filter(is_free).collect();
    for sequence in free {
        let Some(job) = jobs.pop_front_if(|job| cells + job.tokens.len() <= sizes.cells as usize) else { return };
        cells += job.tokens.len();
        open.push(Open { job, sequence, read: 0, pooled: Vec::new() });
    }
}

/// Fills a batch with the next tokens of each text. Returns the index of the text for each row.
fn fill(batch: &mut Batch, open: &mut [Open], batch_tokens: usize) -> Vec<usize> {
    batch.clear();
    let mut rows = Vec::with_capacity(batch_tokens);
    for (index, open) in open.iter_mut().enumerate() {
        let share = (open.job.tokens.len() - open.read).min(batch_tokens - batch.len());
        for position in open.read..open.read + share {
            batch.push(open.job.tokens[position], position, open.sequence, true);
            rows.push(index);
        }
        open.read += share;
    }
    rows
}

/// Adds the token vectors of a batch to the pooled vectors of their texts.
fn pool(context: &Context, pooling: Pooling, open: &mut [Open], rows: &[usize]) {
    for (row, index) in rows.iter().enumerate() {
        let Some(vector) = context.token_vector(row) else { continue };
        let pooled = &mut open[*index].pooled;
        if pooled.is_empty() {
            pooled.extend(vector.iter().copied().map(f64::from));
            continue;
        }
        for (sum, number) in pooled.iter_mut().zip(vector) {
            match pooling {
                // The vector is normalised at the end, so a sum is as good as a mean.
                Pooling::Mean | Pooling::OfModel | Pooling::Tokens | Pooling::Rank => *sum += f64::from(*number),
                Pooling::First => {}
                Pooling::Last => *sum = f64::from(*number),
            }
        }
    }
}

/// Returns a reranker's score from the outputs of its classifier. A single output is a logit; of several, the first is
/// the probability that the text is relevant.
fn score(outputs: &[f32]) -> Result<f32, EngineError> {
    let score = match outputs {
        [logit] => 1.0 / (1.0 + (-logit).exp()),
        [probability, ..] => *probability,
        [] => f32::NAN,
    };
    let failed = || EngineError::Failed { reason: "the model made a score that is no number".into() };
    score.is_finite().then_some(score).ok_or_else(failed)
}

/// Returns a vector with the same direction and length 1.
fn normalised(vector: &[f64]) -> Result<Vec<f32>, EngineError> {
    let length = vector.iter().map(|number| number.powi(2)).sum::<f64>().sqrt();
    if !(length.is_finite() && length > 0.0) {
        return Err(EngineError::Failed { reason: "the model made a vector that has no direction".into() });
    }
    Ok(vector.iter().map(|number| (number / length) as f32).collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::llama::native::ModelOptions;
    use crate::memory_plan::Shape;

    const TEXT: [Token; 300] = [11; 300];

    #[test]
    fn a_text_in_pieces_has_the_vector_that_llama_cpp_makes_of_it_at_once() {
        let file = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny.gguf"));
        let model = Model::load(&[&file.expect("the model is there")], ModelOptions::default(), |_| true);
        let model = Arc::new(model.expect("it loads"));
        let mut text = TEXT;
        (0..).zip(&mut text).for_each(|(index, token)| *token += index % 200);
        let tokens = TEXT.len() as u32;
        let at_once = ContextOptions {
            cells: 512,
            batch_tokens: 512,
            sequences: 1,
            outputs: 512,
            threads: 1,
            pooling: Some(Pooling::Mean),
        };
        let mut at_once = Context::new(&model, at_once).expect("the context fits");
        let mut batch = Batch::default();
        for (position, token) in text.iter().enumerate() {
            batch.push(*token, position, 0, true);
        }
        at_once.decode(&mut batch, &mut || false).expect("it is evaluated");
        let whole: Vec<f64> = at_once.pooled(0).expect("a vector").iter().copied().map(f64::from).collect();

        let shape = Shape { context_length: 512, slots: 1, kv_tokens: 512 };
        let options = Options { shape, threads: 1, prompt_cache_bytes: 0, draft_tokens: 0, row_by_row: true };
        let mut embedder = Embedder::new(&model, options).expect("the context fits");
        let (made, mut vector) = oneshot::channel();
        let admission = Arc::new(Semaphore::new(1)).try_acquire_owned().expect("it is free");
        let mut jobs = VecDeque::from([EmbedJob { tokens: text.to_vec(), made, admitted: Arc::new(admission) }]);
        let (stop, mut pulse) = (CancellationToken::new(), Pulse::new(Arc::default()));
        embedder.ensure_context(&jobs, &mut pulse).expect("the context fits");
        // Small chunks, as with a large vocabulary.
        embedder.context.as_mut().expect("it was made").1.batch_tokens = 32;
        let mut evaluated = vec![];
        while !jobs.is_empty() || !embedder.is_idle() {
            evaluated.push(embedder.step(&mut jobs, &stop, &mut pulse));
        }
        assert_eq!((evaluated.len() as u32, evaluated.iter().sum::<u64>()), (tokens.div_ceil(32), u64::from(tokens)));
        let (vector, whole) = (vector.try_recv().expect("it was made").expect("and well"), normalised(&whole));
        let likeness: f32 =
            vector.iter().zip(&whole.expect("it has a direction")).map(|(one, other)| one * other).sum();
        assert!(likeness > 0.9999, "{likeness}");
    }

    #[test]
    fn a_logit_becomes_a_score_between_zero_and_one_and_a_probability_stays() {
        assert_eq!((score(&[0.0]), score(&[0.25, 0.75])), (Ok(0.5), Ok(0.25)));
        assert!(score(&[-9.0]).is_ok_and(|score| score > 0.0 && score < 0.001));
        for bad in [&[][..], &[f32::NAN], &[f32::INFINITY, 0.0]] {
            assert!(score(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn vectors_have_length_one_and_those_without_direction_are_errors() {
        assert_eq!(normalised(&[3.0, 4.0]), Ok(vec![0.6, 0.8]));
        for bad in [[0.0, 0.0], [f64::NAN, 1.0], [f64::INFINITY, 1.0]] {
            assert!(normalised(&bad).is_err(), "{bad:?}");
        }
    }
}

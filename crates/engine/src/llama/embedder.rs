//! Makes vectors of texts, several in one batch, in a context of its own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio_util::sync::CancellationToken;

use super::engine::Options;
use super::native::{Batch, Context, ContextOptions, Model, Pooling, Token};
use super::pulse::Pulse;
use crate::model_runtime::EngineError;

/// Texts that one batch holds at most.
const TEXTS_MAX: u32 = 32;
/// Tokens that a batch may always hold.
const TOKENS_MIN: u32 = 256;
/// Memory for logits, which llama.cpp makes of every token here although nobody reads them, twice.
const LOGIT_BYTES_MAX: u32 = 512 << 20;

/// One text to make a vector of.
pub(super) struct EmbedJob {
    /// Its tokens, no more than the context holds and at least one.
    pub(super) tokens: Vec<Token>,
    /// Takes the vector, of length 1.
    pub(super) made: oneshot::Sender<Result<Vec<f32>, EngineError>>,
    pub(super) admitted: Arc<OwnedSemaphorePermit>,
}

/// The context that makes vectors.
pub(super) struct Embedder {
    context: Context,
    batch: Batch,
    tokens_max: usize,
}

impl EmbedJob {
    /// Returns whether nobody waits for the vector any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.made.is_closed()
    }

    pub(super) fn fail(self, error: EngineError) {
        let _ = self.made.send(Err(error));
    }
}

impl Embedder {
    pub(super) fn new(model: &Arc<Model>, options: Options) -> Result<Self, EngineError> {
        let tokens_max = tokens_max(model, options.shape.context_length);
        let context = |pooling| {
            let options = ContextOptions {
                cells: tokens_max,
                batch_tokens: tokens_max,
                sequences: TEXTS_MAX,
                outputs: tokens_max,
                threads: options.threads,
                pooling: Some(pooling),
            };
            Context::new(model, options).map_err(|reason| EngineError::Failed { reason })
        };
        let mut context_of_model = context(Pooling::OfModel)?;
        if !context_of_model.pools() {
            // Models that were not made for it have no pooling of their own; the mean is what serves best.
            context_of_model = context(Pooling::Mean)?;
        }
        Ok(Self { context: context_of_model, batch: Batch::default(), tokens_max: tokens_max as usize })
    }

    /// Makes vectors of as many texts as one batch holds; returns how many tokens it evaluated.
    pub(super) fn step(&mut self, jobs: &mut VecDeque<EmbedJob>, stop: &CancellationToken, pulse: &mut Pulse) -> u64 {
        self.batch.clear();
        self.context.clear();
        let mut taken = Vec::new();
        while let Some(job) = jobs.pop_front_if(|job| {
            taken.len() < TEXTS_MAX as usize && self.batch.len() + job.tokens.len() <= self.tokens_max
        }) {
            for (position, token) in job.tokens.iter().enumerate() {
                self.batch.push(*token, position, taken.len() as i32, true);
            }
            taken.push(job);
        }
        let mut in_vain = || {
            pulse.beat(Instant::now());
            stop.is_cancelled() || taken.iter().all(EmbedJob::is_cancelled)
        };
        let decoded = self.context.decode(&mut self.batch, &mut in_vain);
        for (sequence, job) in (0..).zip(taken) {
            let made = match (&decoded, self.context.pooled(sequence)) {
                (Ok(()), Some(vector)) => normalised(vector),
                (Ok(()), None) => Err(EngineError::Failed { reason: "the model made no vector".into() }),
                (Err(error), _) => Err(EngineError::Failed { reason: error.to_string() }),
            };
            drop(job.admitted);
            let _ = job.made.send(made);
        }
        self.batch.len() as u64
    }
}

/// Returns how many tokens a text may have: its vector is made of all of them, so they have to be in one batch.
pub(super) fn tokens_max(model: &Model, context_length: u32) -> u32 {
    let bytes_per_token = model.vocabulary().len().saturating_mul(8).max(1);
    context_length.min((LOGIT_BYTES_MAX / bytes_per_token).max(TOKENS_MIN))
}

/// Returns a vector of the same direction and of length 1.
fn normalised(vector: &[f32]) -> Result<Vec<f32>, EngineError> {
    let length = vector.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt();
    if !(length.is_finite() && length > 0.0) {
        return Err(EngineError::Failed { reason: "the model made a vector that has no direction".into() });
    }
    Ok(vector.iter().map(|number| (f64::from(*number) / length) as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one_and_those_without_direction_are_errors() {
        assert_eq!(normalised(&[3.0, 4.0]), Ok(vec![0.6, 0.8]));
        for bad in [&[0.0, 0.0][..], &[f32::NAN, 1.0], &[f32::INFINITY, 1.0]] {
            assert!(normalised(bad).is_err(), "{bad:?}");
        }
    }
}

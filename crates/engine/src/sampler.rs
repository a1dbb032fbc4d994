//! Samples the next token from logits.
//!
//! A draw is a pure function of the logits, the settings, the seed, the token's position in the sequence and the
//! tokens before it. It keeps no state, so a worker that continues another worker's answer draws as the first would
//! have. Bias, penalties and mask change the logits first. Then the filters apply in llama.cpp's order: top-k, top-p,
//! min-p, temperature. The arithmetic does not depend on platform libraries, so equal logits give equal draws on
//! every machine.

mod candidates;
mod history;
mod token_mask;
mod vocabulary;

use crate::model_runtime::Sampling;
use candidates::Candidates;

pub use history::History;
pub use token_mask::TokenMask;

/// The log-probability that stands for the logarithm of zero, as in OpenAI's API.
pub const LOGPROB_MIN: f32 = -9_999.0;

/// The bias that bans a token whatever its logit.
const BAN: f32 = -100.0;

/// Why no token could be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model returned a logit that is not finite, or no logits at all.
    #[error("the model gave logits that are not finite")]
    NotFinite,
    /// Bias and constraint together forbid every token.
    #[error("logit_bias and the constraint on the answer leave no token")]
    NothingAllowed,
}

/// Buffers that a sampler reuses between draws.
#[derive(Debug, Default)]
pub struct Sampler {
    changed: Vec<f32>,
    candidates: Candidates,
    weights: Vec<f32>,
}

/// Returns a number in [0, 1) that depends only on the seed and the position.
pub fn uniform(seed: u64, position: u64) -> f64 {
    (hash(seed, position) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Returns bits that depend only on the seed and the position.
pub(crate) fn hash(seed: u64, position: u64) -> u64 {
    // Two rounds of the SplitMix64 finaliser: one spreads the seed, one the position on top of it.
    mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ position.wrapping_mul(0xd134_2543_de82_ef95))
}

impl Sampler {
    /// Draws the token at `position`. At temperature 0 it is the most likely token, and of equals the lowest.
    pub fn sample(
        &mut self,
        logits: &[f32],
        sampling: &Sampling,
        position: u64,
        history: &History,
        mask: Option<&TokenMask>,
    ) -> Result<u32, SampleError> {
        let penalised = History::is_needed(sampling);
        let is_changed = penalised || mask.is_some() || !sampling.logit_bias.is_empty();
        let logits = if is_changed {
            self.changed.clear();
            self.changed.extend_from_slice(logits);
            add_bias(&mut self.changed, &sampling.logit_bias);
            if penalised {
                penalise(&mut self.changed, sampling, history);
            }
            if let Some(mask) = mask {
                mask.apply(&mut self.changed);
            }
            self.changed.as_slice()
        } else {
            logits
        };
        let (best, highest) = vocabulary::likeliest(logits).ok_or(SampleError::NotFinite)?;
        if highest == f32::NEG_INFINITY {
            return Err(if is_changed { SampleError::NothingAllowed } else { SampleError::NotFinite });
        }
        if sampling.temperature <= 0.0 {
            return Ok(best);
        }
        let point = uniform(sampling.seed, position);
        let floor = if sampling.min_p > 0.0 { highest + sampling.min_p.ln() } else { f32::NEG_INFINITY };
        self.weights.clear();
        if sampling.top_k == 0 && sampling.top_p >= 1.0 {
            vocabulary::weigh(logits, highest, floor, sampling.temperature, &mut self.weights);
            return Ok(vocabulary::pick(&self.weights, point).map_or(best, |index| index as u32));
        }
        let kept = self.candidates.keep(logits, highest, sampling.top_k, sampling.top_p);
        let weigh = |logit| vocabulary::weight(logit, highest, floor, sampling.temperature);
        self.weights.extend(kept.iter().map(|candidate| weigh(candidate.logit)));
        Ok(vocabulary::pick(&self.weights, point).map_or(best, |index| kept[index].token))
    }

    /// Returns the log-probability of a token, and the `top` most likely tokens with theirs, the most likely first.
    ///
    /// All values are finite: [`LOGPROB_MIN`] stands for a probability of zero.
    pub fn logprob(&mut self, logits: &[f32], token: u32, top: u32) -> (f32, Vec<(u32, f32)>) {
        let Some((_, highest)) = vocabulary::likeliest(logits).filter(|(_, highest)| highest.is_finite()) else {
            return (LOGPROB_MIN, Vec::new());
        };
        let normaliser = f64::from(highest) + vocabulary::total(logits, highest).ln();
        let logprob = |logit: f32| ((f64::from(logit) - normaliser) as f32).clamp(LOGPROB_MIN, 0.0);
        let top = if top == 0 { &[] } else { self.candidates.likeliest(logits, highest, top) };
        let top = top.iter().map(|candidate| (candidate.token, logprob(candidate.logit))).collect();
        (logits.get(token as usize).map_or(LOGPROB_MIN, |logit| logprob(*logit)), top)
    }
}

fn add_bias(logits: &mut [f32], bias: &[(u32, f32)]) {
    for (token, bias) in bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = if *bias <= BAN { f32::NEG_INFINITY } else { *logit + bias };
        }
    }
}

fn penalise(logits: &mut [f32], sampling: &Sampling, history: &History) {
    for (token, answered) in history.tokens() {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        *logit = if *logit > 0.0 { *logit / sampling.repetition_penalty } else { *logit * sampling.repetition_penalty };
        if answered > 0 {
            *logit -= sampling.presence_penalty + sampling.frequency_penalty * answered as f32;
        }
        // A tiny divisor must not turn a finite logit into infinity.
        *logit = logit.min(f32::MAX);
    }
}

fn mix(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests;

//! Scores how well a worker suits a job. The score is the weighted sum of five terms, each between 0 and 1; higher is
//! better.

use protocol::control::ScoreWeights;
use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::Candidate;

/// Weights of the terms of the score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// Weight of a loaded model and an attached adapter.
    pub model_match: f64,
    /// Weight of a near region.
    pub region_proximity: f64,
    /// Weight of free slots and a short queue.
    pub queue_depth: f64,
    /// Weight of the share of the prompt that the worker has in its prefix cache. A higher weight keeps a conversation
    /// on the worker that knows it, even if another one is less busy.
    pub warm_cache: f64,
    /// Weight of the speed relative to the fastest candidate.
    pub speed: f64,
    /// Ignored. Settings files of earlier versions have it.
    #[serde(skip_serializing)]
    #[schemars(skip)]
    pub gpu_class: IgnoredAny,
}

impl Default for Weights {
    fn default() -> Self {
        // An idle worker that has to load the model first must lose against a busy one that has it. One that has the
        // whole prompt cached wins while it has a free slot; beyond that, waiting would cost more than a new prefill.
        Self {
            model_match: 4.0,
            region_proximity: 2.0,
            queue_depth: 3.0,
            warm_cache: 1.5,
            speed: 0.5,
            gpu_class: IgnoredAny,
        }
    }
}

impl From<&Weights> for ScoreWeights {
    fn from(weights: &Weights) -> Self {
        let Weights { model_match, region_proximity, queue_depth, warm_cache, speed, gpu_class: _ } = *weights;
        Self { model_match, region_proximity, queue_depth, warm_cache, speed }
    }
}

/// The terms of one candidate, each between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// 1 if the model is in memory, 0.9 if an adapter must be attached, 0.5 if the model must be loaded.
    pub model_match: f64,
    /// 1 in the same region, less in regions farther away.
    pub region_proximity: f64,
    /// Higher for a shorter queue: 1 when idle, 0.5 with all slots taken, less with a queue.
    pub queue_depth: f64,
    /// Share of the prompt in the prefix cache.
    pub warm_cache: f64,
    /// Speed relative to the fastest candidate; 0.5 if unknown.
    pub speed: f64,
}

impl Terms {
    /// Returns a candidate's terms. `fastest` is the highest speed of any candidate, in tokens per second.
    #[inline]
    pub fn of(candidate: &Candidate, fastest: f32) -> Self {
        let slots = f64::from(candidate.slots.max(1));
        let known = candidate.tokens_per_second > 0.0 && fastest > 0.0;
        Self {
            model_match: match (candidate.resident, candidate.adapter_attached) {
                (true, true) => 1.0,
                (true, false) => 0.9,
                (false, _) => 0.5,
            },
            region_proximity: f64::from(candidate.proximity),
            queue_depth: slots / (slots + f64::from(candidate.load)),
            warm_cache: f64::from(candidate.warm_share),
            speed: if known { f64::from(candidate.tokens_per_second / fastest) } else { 0.5 },
        }
    }

    /// Returns the weighted sum.
    #[inline]
    pub fn score(&self, weights: &Weights) -> f64 {
        self.model_match * weights.model_match
            + self.region_proximity * weights.region_proximity
            + self.queue_depth * weights.queue_depth
            + self.warm_cache * weights.warm_cache
            + self.speed * weights.speed
    }
}

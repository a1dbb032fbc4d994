//! Sampling settings.

use serde::{Deserialize, Serialize};

use crate::limits::{InvalidInput, ensure};
use crate::request::Input;

/// How the next token is chosen. With `temperature` 0 it is the most likely one.
///
/// Bias and penalties change the logits first, in this order. Then the filters apply, then the temperature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Sampling temperature, in [0, 2]; 1 leaves the distribution unchanged.
    pub temperature: f32,
    /// Keeps the smallest set of tokens whose probabilities sum to this, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps tokens whose probability is at least this fraction of the highest, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Divides the positive logits of tokens in the prompt or the answer, and multiplies their negative logits, in (0,
    /// 2]; 1 changes nothing.
    #[serde(default = "one")]
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token that occurs in the answer, in [-2, 2].
    #[serde(default)]
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token for each time that it occurs in the answer, in [-2, 2].
    #[serde(default)]
    pub frequency_penalty: f32,
    /// Added to the logits of tokens, by token id, in [-100, 100]; -100 bans a token.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the sampler. The same seed draws the same random number at each position of an answer.
    pub seed: u64,
}

fn one() -> f32 {
    1.0
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// Returns the settings of a request. Settings that it omits get a neutral value, and [`LeftToModel`] lists them.
    /// `seed` applies to a request without a seed.
    pub fn of(input: &Input, seed: u64) -> Self {
        let neutral = Self::default();
        Self {
            temperature: input.temperature.unwrap_or(neutral.temperature),
            top_p: input.top_p.unwrap_or(neutral.top_p),
            top_k: input.top_k.unwrap_or(neutral.top_k),
            min_p: input.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: input.repetition_penalty.unwrap_or(neutral.repetition_penalty),
            presence_penalty: input.presence_penalty.unwrap_or(neutral.presence_penalty),
            frequency_penalty: input.frequency_penalty.unwrap_or(neutral.frequency_penalty),
            logit_bias: input.logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
            seed: input.seed.unwrap_or(seed),
        }
    }

    /// Checks that each setting is within its range.
    pub fn check(&self) -> Result<(), InvalidInput> {
        let are_within = self.logit_bias.iter().all(|(_, bias)| (-100.0..=100.0).contains(bias));
        ensure(are_within, "logit_bias", "must have values between -100 and 100")?;
        for (param, value, least, most, problem) in [
            ("temperature", self.temperature, 0.0, 2.0, "must be between 0 and 2"),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0, "must be above 0 and at most 1"),
            ("min_p", self.min_p, 0.0, 1.0, "must be between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, 2.0, "must be above 0 and at most 2"),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0, "must be between -2 and 2"),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "must be between -2 and 2"),
        ] {
            ensure((least..=most).contains(&value), param, problem)?;
        }
        Ok(())
    }
}

/// The sampling settings that a request omits. A runtime fills them in from [`SamplingDefaults`], or leaves them to the
/// server that runs the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeftToModel {
    /// Whether the request omits [`Sampling::temperature`].
    pub temperature: bool,
    /// Whether the request omits [`Sampling::top_p`].
    pub top_p: bool,
    /// Whether the request omits [`Sampling::top_k`].
    pub top_k: bool,
    /// Whether the request omits [`Sampling::min_p`].
    pub min_p: bool,
    /// Whether the request omits [`Sampling::repetition_penalty`].
    pub repetition_penalty: bool,
}

impl LeftToModel {
    /// Returns which settings a request omits.
    pub fn of(input: &Input) -> Self {
        Self {
            temperature: input.temperature.is_none(),
            top_p: input.top_p.is_none(),
            top_k: input.top_k.is_none(),
            min_p: input.min_p.is_none(),
            repetition_penalty: input.repetition_penalty.is_none(),
        }
    }
}

/// A model's sampling settings for requests that omit them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// Default of [`Sampling::temperature`].
    pub temperature: f32,
    /// Default of [`Sampling::top_p`].
    pub top_p: f32,
    /// Default of [`Sampling::top_k`].
    pub top_k: u32,
    /// Default of [`Sampling::min_p`].
    pub min_p: f32,
    /// Default of [`Sampling::repetition_penalty`].
    pub repetition_penalty: f32,
}

/// llama.cpp's defaults.
impl Default for SamplingDefaults {
    fn default() -> Self {
        Self { temperature: 0.8, top_p: 0.95, top_k: 40, min_p: 0.05, repetition_penalty: 1.0 }
    }
}

impl SamplingDefaults {
    /// Sets the settings in `left` to these defaults.
    pub fn fill(&self, sampling: &mut Sampling, left: LeftToModel) {
        let set = |value: &mut f32, left: bool, default: f32| {
            if left {
                *value = default;
            }
        };
        set(&mut sampling.temperature, left.temperature, self.temperature);
        set(&mut sampling.top_p, left.top_p, self.top_p);
        set(&mut sampling.min_p, left.min_p, self.min_p);
        set(&mut sampling.repetition_penalty, left.repetition_penalty, self.repetition_penalty);
        if left.top_k {
            sampling.top_k = self.top_k;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_asks_for_is_how_tokens_are_drawn() {
        let input = Input {
            temperature: Some(0.0),
            top_p: Some(0.5),
            top_k: Some(9),
            min_p: Some(0.1),
            repetition_penalty: Some(1.5),
            presence_penalty: Some(-1.0),
            frequency_penalty: Some(0.5),
            logit_bias: [(7, -100.0)].into(),
            seed: Some(42),
            ..Input::default()
        };
        let expected = Sampling {
            temperature: 0.0,
            top_p: 0.5,
            top_k: 9,
            min_p: 0.1,
            repetition_penalty: 1.5,
            presence_penalty: -1.0,
            frequency_penalty: 0.5,
            logit_bias: vec![(7, -100.0)],
            seed: 42,
        };
        assert_eq!((Sampling::of(&input, 1), LeftToModel::of(&input)), (expected, LeftToModel::default()));
        assert_eq!(Sampling::of(&Input::default(), 1), Sampling { seed: 1, ..Sampling::default() });
    }

    #[test]
    fn settings_out_of_range_are_refused_by_name() {
        let refused = |sampling: Sampling| sampling.check().expect_err("out of range").param;
        assert_eq!(refused(Sampling { temperature: -1.0, ..Sampling::default() }), "temperature");
        assert_eq!(refused(Sampling { temperature: f32::NAN, ..Sampling::default() }), "temperature");
        assert_eq!(refused(Sampling { top_p: 0.0, ..Sampling::default() }), "top_p");
        assert_eq!(refused(Sampling { min_p: 1.5, ..Sampling::default() }), "min_p");
        assert_eq!(refused(Sampling { repetition_penalty: 0.0, ..Sampling::default() }), "repetition_penalty");
        assert_eq!(refused(Sampling { presence_penalty: 2.5, ..Sampling::default() }), "presence_penalty");
        assert_eq!(refused(Sampling { frequency_penalty: f32::NAN, ..Sampling::default() }), "frequency_penalty");
        assert_eq!(refused(Sampling { logit_bias: vec![(0, -101.0)], ..Sampling::default() }), "logit_bias");
        assert_eq!(Sampling::default().check(), Ok(()));
    }
}

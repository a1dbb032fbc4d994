//! Draws the next token from logits.
//!
//! A draw is a pure function of the logits, the settings, the seed and the token's position in the sequence. It keeps
//! no state, so a worker that continues another's answer draws as the first would have. Filters apply in the order of
//! llama.cpp: top-k, top-p, min-p, temperature.

use crate::model_runtime::{EngineError, Sampling};

/// Why no token could be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model gave something that is not a number, or nothing at all.
    #[error("the model gave logits that are not finite")]
    NotFinite,
}

/// Buffers that a sampler keeps from draw to draw.
#[derive(Debug, Default)]
pub struct Sampler {
    candidates: Vec<Candidate>,
    weights: Vec<f64>,
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    logit: f32,
    token: u32,
}

/// Refuses settings that mean nothing.
pub fn check(sampling: &Sampling) -> Result<(), EngineError> {
    let refuse = |parameter: &str, reason: &str| {
        Err(EngineError::Unsupported { parameter: parameter.into(), reason: reason.into() })
    };
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        return refuse("temperature", "it must be a number from 0");
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return refuse("top_p", "it must be above 0 and at most 1");
    }
    if !(0.0..=1.0).contains(&sampling.min_p) {
        return refuse("min_p", "it must lie between 0 and 1");
    }
    Ok(())
}

/// Returns a number in [0, 1) that depends on nothing but the seed and the position.
pub fn uniform(seed: u64, position: u64) -> f64 {
    // Two rounds of the SplitMix64 finaliser: one spreads the seed, one the position on top of it.
    let mixed = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ position.wrapping_mul(0xd134_2543_de82_ef95));
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

impl Sampler {
    /// Draws the token at `position`; the likeliest, and of equals the lowest, at temperature 0.
    pub fn sample(&mut self, logits: &[f32], sampling: &Sampling, position: u64) -> Result<u32, SampleError> {
        let (best, highest) = argmax(logits)?;
        if sampling.temperature <= 0.0 {
            return Ok(best);
        }
        let point = uniform(sampling.seed, position);
        let filtered = sampling.top_k > 0 || sampling.top_p < 1.0;
        if !filtered {
            return Ok(self.draw_from_all(logits, highest, sampling, point).unwrap_or(best));
        }
        self.collect(logits, sampling.top_k);
        if sampling.top_p < 1.0 {
            self.keep_top_p(highest, sampling.top_p);
        }
        let floor = logit_floor(highest, sampling.min_p);
        self.candidates.retain(|candidate| candidate.logit >= floor);
        // In order of tokens, since the order of logits is the first thing that rounding changes.
        self.candidates.sort_unstable_by_key(|candidate| candidate.token);
        self.weights.clear();
        let weigh = |candidate: &Candidate| weight(candidate.logit, highest, sampling.temperature);
        self.weights.extend(self.candidates.iter().map(weigh));
        Ok(pick(&self.weights, point).map_or(best, |index| self.candidates[index].token))
    }

    fn draw_from_all(&mut self, logits: &[f32], highest: f32, sampling: &Sampling, point: f64) -> Option<u32> {
        let floor = logit_floor(highest, sampling.min_p);
        self.weights.clear();
        let weigh = |logit: &f32| if *logit < floor { 0.0 } else { weight(*logit, highest, sampling.temperature) };
        self.weights.extend(logits.iter().map(weigh));
        pick(&self.weights, point).map(|index| index as u32)
    }

    /// Takes the `top_k` likeliest tokens, or all.
    fn collect(&mut self, logits: &[f32], top_k: u32) {
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0..).map(|(&logit, token)| Candidate { logit, token }));
        let keep = top_k as usize;
        if keep > 0 && keep < self.candidates.len() {
            self.candidates.select_nth_unstable_by(keep - 1, likelier);
            self.candidates.truncate(keep);
        }
    }

    /// Keeps the smallest set of likeliest candidates whose probabilities reach `top_p`.
    fn keep_top_p(&mut self, highest: f32, top_p: f32) {
        let total: f64 = self.candidates.iter().map(|candidate| weight(candidate.logit, highest, 1.0)).sum();
        let goal = total * f64::from(top_p);
        let mut reached = 0.0;
        let mut sorted = 0;
        let mut step = 128;
        // Sorts piece by piece: the set is nearly always a small part of the vocabulary.
        while sorted < self.candidates.len() {
            let rest = &mut self.candidates[sorted..];
            let count = step.min(rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count - 1, likelier);
            }
            rest[..count].sort_unstable_by(likelier);
            for (index, candidate) in rest[..count].iter().enumerate() {
                reached += weight(candidate.logit, highest, 1.0);
                if reached >= goal {
                    self.candidates.truncate(sorted + index + 1);
                    return;
                }
            }
            sorted += count;
            step *= 4;
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "it is handed to sorts, which compare references")]
fn likelier(left: &Candidate, right: &Candidate) -> std::cmp::Ordering {
    right.logit.total_cmp(&left.logit).then(left.token.cmp(&right.token))
}

/// Returns the likeliest token and its logit.
fn argmax(logits: &[f32]) -> Result<(u32, f32), SampleError> {
    let mut best = 0;
    let mut highest = f32::NEG_INFINITY;
    let mut unordered = false;
    for (token, &logit) in (0..).zip(logits) {
        unordered |= logit.is_nan();
        if logit > highest {
            highest = logit;
            best = token;
        }
    }
    // Minus infinity masks a token; a vocabulary of nothing else has no likeliest one.
    if unordered || !highest.is_finite() { Err(SampleError::NotFinite) } else { Ok((best, highest)) }
}

fn logit_floor(highest: f32, min_p: f32) -> f32 {
    if min_p > 0.0 { highest + min_p.ln() } else { f32::NEG_INFINITY }
}

fn weight(logit: f32, highest: f32, temperature: f32) -> f64 {
    f64::from(((logit - highest) / temperature).exp())
}

/// Returns the index whose share of the sum holds the point.
fn pick(weights: &[f64], point: f64) -> Option<usize> {
    let goal = point * weights.iter().sum::<f64>();
    let mut reached = 0.0;
    let mut last = None;
    for (index, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            reached += weight;
            last = Some(index);
            if reached > goal {
                break;
            }
        }
    }
    last
}

fn mix(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn draw(logits: &[f32], sampling: &Sampling, position: u64) -> Result<u32, SampleError> {
        Sampler::default().sample(logits, sampling, position)
    }

    fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// The plainest reading of the settings: sort everything, filter, normalise, walk.
    fn reference(logits: &[f32], sampling: &Sampling, position: u64) -> u32 {
        let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|logit| f64::from(*logit))).collect();
        all.sort_by(|left, right| right.1.total_cmp(&left.1).then(left.0.cmp(&right.0)));
        if sampling.top_k > 0 {
            all.truncate(sampling.top_k as usize);
        }
        let highest = all[0].1;
        if sampling.top_p < 1.0 {
            let total: f64 = all.iter().map(|(_, logit)| (logit - highest).exp()).sum();
            let mut sum = 0.0;
            let count = all.iter().position(|(_, logit)| {
                sum += (logit - highest).exp() / total;
                sum >= f64::from(sampling.top_p)
            });
            all.truncate(count.map_or(all.len(), |index| index + 1));
        }
        all.retain(|(_, logit)| (logit - highest).exp() >= f64::from(sampling.min_p));
        all.sort_by_key(|(token, _)| *token);
        let temperature = f64::from(sampling.temperature);
        let total: f64 = all.iter().map(|(_, logit)| ((logit - highest) / temperature).exp()).sum();
        let mut sum = 0.0;
        for (token, logit) in &all {
            sum += ((logit - highest) / temperature).exp() / total;
            if sum > uniform(sampling.seed, position) {
                return *token;
            }
        }
        all.last().expect("one is left").0
    }

    #[test]
    fn temperature_zero_takes_the_likeliest_and_of_equals_the_lowest() {
        assert_eq!(draw(&[1.0, 3.0, -2.0, 3.0], &greedy(), 9), Ok(1));
    }

    #[test]
    fn logits_that_are_not_numbers_are_an_error() {
        for logits in [&[1.0, f32::NAN][..], &[f32::INFINITY, 1.0], &[f32::NEG_INFINITY], &[]] {
            assert_eq!(draw(logits, &greedy(), 0), Err(SampleError::NotFinite));
            assert_eq!(draw(logits, &Sampling::default(), 0), Err(SampleError::NotFinite));
        }
    }

    #[test]
    fn a_masked_token_is_never_drawn() {
        let logits = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0];
        let drawn: Vec<_> = (0..200).map(|position| draw(&logits, &Sampling::default(), position)).collect();
        assert!(drawn.iter().all(|token| matches!(token, Ok(1 | 3))));
        assert!(drawn.contains(&Ok(1)) && drawn.contains(&Ok(3)));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.5_f32.ln(), 0.3_f32.ln(), 0.2_f32.ln()];
        let mut counts = [0_u32; 3];
        for position in 0..20_000 {
            counts
                [draw(&logits, &Sampling { seed: 7, ..Sampling::default() }, position).expect("it draws") as usize] +=
                1;
        }
        for (count, expected) in counts.into_iter().zip([10_000.0, 6_000.0, 4_000.0]) {
            assert!((f64::from(count) - expected).abs() < 300.0, "{counts:?}");
        }
    }

    #[test]
    fn seeds_and_positions_give_unlike_numbers() {
        let numbers: Vec<f64> = (0..50).flat_map(|seed| (0..50).map(move |place| uniform(seed, place))).collect();
        let mean = numbers.iter().sum::<f64>() / 2_500.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        let distinct: std::collections::HashSet<u64> = numbers.iter().map(|number| number.to_bits()).collect();
        assert_eq!(distinct.len(), 2_500);
        assert!(numbers.iter().all(|number| (0.0..1.0).contains(number)));
    }

    #[test]
    fn the_numbers_of_a_seed_stay_what_they_are() {
        // Workers of different releases continue each other's answers, so these must never change.
        let numbers = [uniform(0, 0), uniform(1, 0), uniform(1, 1)].map(|number| (number * 1e9) as u64);
        assert_eq!(numbers, [281_761_297, 862_856_148, 884_775_068]);
    }

    #[test]
    fn top_k_of_one_is_greedy_at_any_temperature() {
        let sampling = Sampling { temperature: 5.0, top_k: 1, ..Sampling::default() };
        assert!((0..50).all(|position| draw(&[0.1, 0.2, 0.15], &sampling, position) == Ok(1)));
    }

    #[test]
    fn settings_that_mean_nothing_are_refused_by_name() {
        let refused = |sampling| match check(&sampling) {
            Err(EngineError::Unsupported { parameter, .. }) => parameter,
            other => format!("{other:?}"),
        };
        assert_eq!(refused(Sampling { temperature: -1.0, ..Sampling::default() }), "temperature");
        assert_eq!(refused(Sampling { temperature: f32::NAN, ..Sampling::default() }), "temperature");
        assert_eq!(refused(Sampling { top_p: 0.0, ..Sampling::default() }), "top_p");
        assert_eq!(refused(Sampling { min_p: 1.5, ..Sampling::default() }), "min_p");
        assert_eq!(check(&Sampling::default()), Ok(()));
    }

    proptest! {
        #[test]
        fn a_draw_equals_the_plain_reading_of_the_settings(
            logits in prop::collection::vec(-8.0_f32..8.0, 1..600),
            temperature in 0.1_f32..2.0,
            top_k in prop_oneof![Just(0_u32), 1_u32..700],
            top_p in prop_oneof![Just(1.0_f32), 0.05_f32..1.0],
            min_p in prop_oneof![Just(0.0_f32), 0.001_f32..0.9],
            seed in any::<u64>(),
            position in 0_u64..5_000,
        ) {
            let sampling = Sampling { temperature, top_p, top_k, min_p, seed, ..Sampling::default() };
            let drawn = draw(&logits, &sampling, position).expect("it draws");
            let expected = reference(&logits, &sampling, position);
            // Single and double precision may part on the edge between two neighbours, and only there.
            if drawn != expected {
                let again = (1..=20).filter(|step| {
                    draw(&logits, &sampling, position + step) != Ok(reference(&logits, &sampling, position + step))
                });
                prop_assert!(again.count() <= 1, "{} against {}", drawn, expected);
            }
        }

        #[test]
        fn any_logits_give_a_token_or_an_error(
            logits in prop::collection::vec(any::<f32>(), 0..64),
            top_k in 0_u32..70, top_p in 0.01_f32..=1.0, min_p in 0.0_f32..=1.0, temperature in 0.0_f32..3.0,
        ) {
            let sampling = Sampling { temperature, top_p, top_k, min_p, seed: 1, ..Sampling::default() };
            if let Ok(token) = draw(&logits, &sampling, 3) {
                prop_assert!((token as usize) < logits.len());
            }
        }
    }
}

use super::*;
use proptest::prelude::*;

fn draw(logits: &[f32], sampling: &Sampling, position: u64) -> Result<u32, SampleError> {
    Sampler::default().sample(logits, sampling, position, &History::default(), None)
}

fn seeded(seed: u64) -> Sampling {
    Sampling { seed, ..Sampling::default() }
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

/// The tokens of a sequence, and those that may come next.
#[derive(Debug, Clone, Default)]
struct Past {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    allowed: Option<Vec<u32>>,
}

impl Past {
    fn draw(&self, logits: &[f32], sampling: &Sampling, position: u64) -> Result<u32, SampleError> {
        let mut history = History::new(&self.prompt);
        self.answer.iter().for_each(|token| history.push(*token));
        let mask = self.allowed.as_ref().map(|allowed| allowed.iter().copied().collect());
        Sampler::default().sample(logits, sampling, position, &history, mask.as_ref())
    }

    /// The simplest implementation of the changes to a logit.
    fn change(&self, token: u32, mut logit: f64, sampling: &Sampling) -> f64 {
        for (_, bias) in sampling.logit_bias.iter().filter(|(biased, _)| *biased == token) {
            logit += if *bias <= -100.0 { f64::NEG_INFINITY } else { f64::from(*bias) };
        }
        if self.prompt.contains(&token) || self.answer.contains(&token) {
            let penalty = f64::from(sampling.repetition_penalty);
            logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
        }
        let count = self.answer.iter().filter(|answered| **answered == token).count();
        if count > 0 {
            logit -= f64::from(sampling.presence_penalty) + f64::from(sampling.frequency_penalty) * count as f64;
        }
        let is_allowed = self.allowed.as_ref().is_none_or(|allowed| allowed.contains(&token));
        if is_allowed { logit } else { f64::NEG_INFINITY }
    }
}

/// The simplest implementation of sampling: change, sort everything, filter, normalise, walk.
fn reference(logits: &[f32], sampling: &Sampling, position: u64, past: &Past) -> u32 {
    let changed = (0..).zip(logits).map(|(token, logit)| (token, past.change(token, f64::from(*logit), sampling)));
    let mut all: Vec<(u32, f64)> = changed.collect();
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
        counts[draw(&logits, &Sampling { seed: 7, ..Sampling::default() }, position).expect("it draws") as usize] += 1;
    }
    for (count, expected) in counts.into_iter().zip([10_000.0, 6_000.0, 4_000.0]) {
        assert!((f64::from(count) - expected).abs() < 300.0, "{counts:?}");
    }
}

#[test]
fn seeds_and_positions_give_unlike_numbers() {
    let numbers: Vec<f64> = (0..50).flat_map(|seed| (0..50).map(move |index| uniform(seed, index))).collect();
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
fn penalties_follow_their_definitions() {
    let mut history = History::new(&[0, 1]);
    for token in [2, 2, 3] {
        history.push(token);
    }
    let changed = |sampling: Sampling| {
        let mut logits = [2.0, -2.0, 2.0, -2.0];
        penalise(&mut logits, &sampling, &history);
        logits.map(|logit| (logit * 100.0) as i32)
    };
    let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
    assert_eq!(changed(sampling), [100, -400, 100, -400], "prompt and answer, once");
    let sampling = Sampling { presence_penalty: 0.5, ..Sampling::default() };
    assert_eq!(changed(sampling), [200, -200, 150, -250], "the answer, once");
    let sampling = Sampling { frequency_penalty: -0.5, ..Sampling::default() };
    assert_eq!(changed(sampling), [200, -200, 300, -150], "the answer, each time");
}

#[test]
fn a_bias_of_minus_100_bans_a_token_and_other_tokens_do_not_matter() {
    let sampling = Sampling { logit_bias: vec![(1, -100.0), (7, 100.0)], ..greedy() };
    assert_eq!(draw(&[0.0, 1e9], &sampling, 0), Ok(0));
}

#[test]
fn only_what_the_mask_allows_is_drawn() {
    let past = |allowed: &[u32]| Past { allowed: Some(allowed.to_vec()), ..Past::default() };
    let logits: Vec<f32> = (0..100).map(|token| token as f32).collect();
    assert_eq!(past(&[3, 40, 41]).draw(&logits, &greedy(), 0), Ok(41));
    let hot = Sampling { temperature: 50.0, top_p: 0.99, ..Sampling::default() };
    let drawn: Vec<_> = (0..100).map(|position| past(&[3, 40, 41]).draw(&logits, &hot, position)).collect();
    assert!(drawn.iter().all(|token| matches!(token, Ok(3 | 40 | 41))), "{drawn:?}");
    for sampling in [greedy(), hot] {
        assert_eq!(past(&[]).draw(&logits, &sampling, 0), Err(SampleError::NothingAllowed));
        assert_eq!(past(&[100]).draw(&logits, &sampling, 0), Err(SampleError::NothingAllowed));
    }
}

#[test]
fn log_probabilities_are_those_of_the_logits_and_finite() {
    let logits = [0.5_f32.ln(), f32::NEG_INFINITY, 0.3_f32.ln(), 0.2_f32.ln()];
    let mut sampler = Sampler::default();
    let (of_token, top) = sampler.logprob(&logits, 3, 9);
    assert!((of_token.exp() - 0.2).abs() < 1e-6);
    assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [0, 2, 3]);
    assert!(top.iter().zip([0.5, 0.3, 0.2]).all(|((_, logprob), share)| (logprob.exp() - share).abs() < 1e-6));
    assert!(sampler.logprob(&logits, 1, 1).0 <= LOGPROB_MIN);
    assert_eq!(sampler.logprob(&logits, 4, 0), (LOGPROB_MIN, Vec::new()));
    assert_eq!(sampler.logprob(&[f32::NAN], 0, 5), (LOGPROB_MIN, Vec::new()));
}

proptest! {
    #[test]
    fn a_draw_equals_the_plain_reading_of_the_settings(
        logits in prop::collection::vec(-8.0_f32..8.0, 1..600),
        temperature in 0.1_f32..2.0,
        top_k in prop_oneof![Just(0_u32), 1_u32..700],
        top_p in prop_oneof![Just(1.0_f32), 0.05_f32..1.0],
        min_p in prop_oneof![Just(0.0_f32), 0.001_f32..0.9],
        penalties in prop_oneof![Just((1.0, 0.0, 0.0)), (0.1_f32..2.0, -2.0_f32..2.0, -2.0_f32..2.0)],
        logit_bias in prop::collection::vec((0_u32..600, prop_oneof![Just(-100.0), -5.0_f32..5.0]), 0..4),
        prompt in prop::collection::vec(0_u32..600, 0..40),
        answer in prop::collection::vec(0_u32..60, 0..40),
        allowed in prop_oneof![Just(None), prop::collection::vec(0_u32..600, 1..400).prop_map(Some)],
        seed in any::<u64>(),
        position in 0_u64..5_000,
    ) {
        let (repetition_penalty, presence_penalty, frequency_penalty) = penalties;
        let past = Past { prompt, answer, allowed };
        let sampling = Sampling {
            temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias,
            ..seeded(seed)
        };
        let changes = |token| past.change(token, f64::from(logits[token as usize]), &sampling);
        if !(0..logits.len() as u32).any(|token| changes(token).is_finite()) {
            prop_assert_eq!(past.draw(&logits, &sampling, position), Err(SampleError::NothingAllowed));
            return Ok(());
        }
        let agree = |position| {
            past.draw(&logits, &sampling, position) == Ok(reference(&logits, &sampling, position, &past))
        };
        // Single and double precision may differ at the boundary between two neighbours, and only there.
        if !agree(position) {
            prop_assert!((1..=20).filter(|step| !agree(position + step)).count() <= 1);
        }
    }

    #[test]
    fn any_logits_give_a_token_or_an_error(
        logits in prop::collection::vec(any::<f32>(), 0..64),
        top_k in 0_u32..70, top_p in 0.01_f32..=1.0, min_p in 0.0_f32..=1.0, temperature in 0.0_f32..3.0,
        repetition_penalty in f32::MIN_POSITIVE..2.0, answer in prop::collection::vec(any::<u32>(), 0..8),
        token in any::<u32>(),
    ) {
        let sampling = Sampling {
            temperature, top_p, top_k, min_p, repetition_penalty, seed: 1, ..Sampling::default()
        };
        let past = Past { answer, ..Past::default() };
        if let Ok(token) = past.draw(&logits, &sampling, 3) {
            prop_assert!((token as usize) < logits.len());
        }
        let (logprob, top) = Sampler::default().logprob(&logits, token, top_k);
        prop_assert!(top.iter().map(|(_, logprob)| logprob).chain([&logprob]).all(|logprob| logprob.is_finite()));
    }
}

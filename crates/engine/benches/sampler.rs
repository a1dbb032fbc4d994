//! What a draw costs at the vocabulary of Qwen: `cargo bench -p tether-engine --bench sampler`.

#![allow(clippy::print_stdout, clippy::disallowed_methods)]

use std::hint::black_box;
use std::time::Instant;

use tether_engine::Sampling;
use tether_engine::sampler::{History, Sampler, uniform};

const VOCABULARY: u64 = 152_000;
const DRAWS: u32 = 1_000;

fn main() {
    // Logits of a model that knows what it wants: a bell with a few tokens far above.
    let bell = |token: u64| (0..6).map(|part| uniform(token, part) as f32).sum::<f32>() * 4.0 - 12.0;
    let logits: Vec<f32> =
        (0..VOCABULARY).map(|token| bell(token) + if token % 9_973 == 1 { 14.0 } else { 0.0 }).collect();
    let mut sampler = Sampler::default();
    let default = Sampling::default();
    for (name, sampling) in [
        ("greedy", Sampling { temperature: 0.0, ..default.clone() }),
        ("all tokens", default.clone()),
        ("top_p 0.9", Sampling { top_p: 0.9, ..default.clone() }),
        ("top_k 40", Sampling { top_k: 40, ..default }),
    ] {
        let begin = Instant::now();
        for position in 0..DRAWS {
            let _ = black_box(sampler.sample(&logits, &sampling, position.into(), &History::default(), None));
        }
        println!("{name}: {:.1?}", begin.elapsed() / DRAWS);
    }
    let begin = Instant::now();
    for token in 0..DRAWS {
        black_box(sampler.logprob(&logits, token, 20));
    }
    println!("20 log-probabilities: {:.1?}", begin.elapsed() / DRAWS);
}

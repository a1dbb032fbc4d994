//! How exactly an answer goes on after its worker was lost: an engine is given what the caller has already, and should
//! say what the first would have said. Draws depend on a token's place alone, so only the order of sums can differ.

use futures_util::future::join_all;

use crate::Model;
use crate::measure::Workload;
use crate::ours::Ours;
use crate::side::{Answer, Question};

const ANSWERS: u64 = 16;
const PROMPT: usize = 64;
const ANSWER: u32 = 128;
/// What the caller has when the worker is lost.
const HAS: usize = 50;
/// Streams that run beside one.
const OTHERS: u64 = 7;

/// Of some answers that went on elsewhere, how many ended as the first would have, and how many tokens of all were the
/// same up to the first that was not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Continued {
    pub(crate) answers: u64,
    pub(crate) equal: u64,
    pub(crate) same_share: f64,
}

/// Continues answers on another engine that has nothing else to do, and on one that serves seven other streams.
pub(crate) async fn measure(model: &Model, temperature: f32) -> [Continued; 2] {
    let lost = Ours::load(model, 0).await;
    let engines = [Ours::load(model, 0).await, Ours::load(model, 0).await];
    let mut measured = [Continued { answers: ANSWERS, equal: 0, same_share: 0.0 }; 2];
    for number in 0..ANSWERS {
        let workload = Workload { round: 1_000 + number, vocabulary: model.vocabulary, context: model.context };
        let prompt = workload.prompt(0, PROMPT);
        let question = Question { prompt: &prompt, tokens: ANSWER, varied: true, temperature, ..Question::default() };
        let whole = Answer::of(&lost, question).await.whole().await.tokens;
        let rest = Question { continued: &whole[..HAS], ..question };
        let others: Vec<_> = (1..=OTHERS).map(|other| workload.prompt(other, PROMPT)).collect();
        for ((count, engine), measured) in [0, OTHERS as usize].into_iter().zip(&engines).zip(&mut measured) {
            let beside = others[..count].iter().map(|prompt| async {
                let question = Question { prompt, tokens: 4 * ANSWER, varied: true, ..Question::default() };
                drop(Answer::of(engine, question).await.whole().await);
            });
            let continued = tokio::select! {
                continued = async { Answer::of(engine, rest).await.whole().await.tokens } => continued,
                _ = join_all(beside), if count > 0 => unreachable!("the others go on for longer"),
            };
            let same = continued.iter().zip(&whole[HAS..]).take_while(|(ours, first)| ours == first).count();
            measured.equal += u64::from(same == whole.len() - HAS);
            measured.same_share += same as f64 / (whole.len() - HAS) as f64 / ANSWERS as f64;
        }
    }
    for engine in engines.into_iter().chain([lost]) {
        engine.stop().await;
    }
    measured
}

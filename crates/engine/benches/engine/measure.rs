//! What is measured, and on what.

use std::cell::Cell;
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use tokio::time::sleep;

use crate::side::{Answer, Heard, Question, Side};

pub(crate) const PROMPT: usize = 512;
pub(crate) const ANSWER: u32 = 128;
const SHORT_PROMPT: usize = 16;
const CONVERSATION: usize = 1000;
const FIRST_ANSWER: u32 = 64;
const SECOND_QUESTION: usize = 32;
const LONG_PROMPT: usize = 2000;
/// Streams that run while a long prompt is admitted, and tokens after which they count as running.
const RUNNING: usize = 3;
const WELL_UNDER_WAY: usize = 8;
/// How long a side may still be busy with streams that nobody reads any more.
const SETTLED_WITHIN: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    /// Tokens a second of a prompt that no cache has.
    Prompt,
    /// Tokens a second of so many streams together, from the first token to the last.
    Generate(usize),
    /// Tokens a second of one stream whose caller predicts it, and is right about so many tokens of a hundred.
    Predicted(u64),
    /// Milliseconds to the first token of an adapter's answer while another adapter's is under way.
    SecondAdapter,
    /// Milliseconds to the first token of the second answer in a conversation.
    SecondTurn,
    /// The longest milliseconds between two tokens of running streams while a long prompt is admitted.
    Gap,
}

pub(crate) struct Measurement {
    pub(crate) figure: f64,
    /// What the admitted prompt waited for its first token, where one was admitted, in milliseconds.
    pub(crate) newcomer: Option<f64>,
}

impl From<f64> for Measurement {
    fn from(figure: f64) -> Self {
        Self { figure, newcomer: None }
    }
}

impl Measure {
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Prompt | Self::Generate(_) | Self::Predicted(_) => "tokens/s",
            Self::SecondAdapter | Self::SecondTurn | Self::Gap => "ms",
        }
    }

    pub(crate) async fn take(self, side: &dyn Side, workload: &Workload) -> Measurement {
        match self {
            Self::Prompt => prompt_speed(side, workload).await.into(),
            Self::Generate(streams) => generation_speed(side, workload, streams).await.into(),
            Self::Predicted(percent) => predicted_speed(side, workload, percent).await.into(),
            Self::SecondAdapter => second_adapter(side, workload).await.into(),
            Self::SecondTurn => second_turn(side, workload).await.into(),
            Self::Gap => gap(side, workload).await,
        }
    }
}

/// Prompts that no other round has, and the same for both sides.
pub(crate) struct Workload {
    pub(crate) round: u64,
    pub(crate) vocabulary: u32,
    pub(crate) context: u32,
}

impl Workload {
    pub(crate) fn prompt(&self, which: u64, length: usize) -> Vec<u32> {
        let mut state = self.round << 8 | which;
        std::iter::repeat_with(|| self.word(&mut state)).take(length).collect()
    }

    /// Returns an answer with so many of a hundred tokens left as they are, by chance.
    fn prediction(&self, answer: &[u32], percent: u64) -> Vec<u32> {
        let mut state = self.round;
        let mut predict = |token| if random(&mut state) % 100 < percent { token } else { self.word(&mut state) };
        answer.iter().map(|token| predict(*token)).collect()
    }

    /// Any token but the last, which ends a text.
    fn word(&self, state: &mut u64) -> u32 {
        (random(state) % u64::from(self.vocabulary - 1)) as u32
    }
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

async fn prompt_speed(side: &dyn Side, workload: &Workload) -> f64 {
    let prompt = workload.prompt(0, PROMPT);
    let heard = Answer::of(side, plain(&prompt, 1)).await.whole().await;
    PROMPT as f64 / heard.first().as_secs_f64()
}

async fn generation_speed(side: &dyn Side, workload: &Workload, streams: usize) -> f64 {
    let prompts: Vec<_> = (0..streams).map(|which| workload.prompt(which as u64, SHORT_PROMPT)).collect();
    let answers = prompts.iter().map(async |prompt| Answer::of(side, plain(prompt, ANSWER)).await.whole().await);
    speed(&join_all(answers).await)
}

async fn predicted_speed(side: &dyn Side, workload: &Workload, percent: u64) -> f64 {
    let prompt = workload.prompt(0, SHORT_PROMPT);
    let question = Question { varied: true, ..plain(&prompt, ANSWER) };
    let answer = Answer::of(side, question).await.whole().await;
    let prediction = workload.prediction(&answer.tokens, percent);
    let again = Answer::of(side, Question { prediction: &prediction, ..question }).await.whole().await;
    speed(&[again])
}

async fn second_adapter(side: &dyn Side, workload: &Workload) -> f64 {
    let (first, second) = (workload.prompt(0, SHORT_PROMPT), workload.prompt(1, SHORT_PROMPT));
    let mut under_way = Answer::of(side, Question { adapter: Some(0), ..plain(&first, ANSWER) }).await;
    assert!(under_way.next().await);
    let question = Question { adapter: Some(1), ..plain(&second, ANSWER) };
    let second = async { Answer::of(side, question).await.whole().await };
    let (_, second) = join(under_way.whole(), second).await;
    milliseconds(second.first())
}

async fn second_turn(side: &dyn Side, workload: &Workload) -> f64 {
    let mut conversation = workload.prompt(0, CONVERSATION - FIRST_ANSWER as usize);
    let answer = Answer::of(side, plain(&conversation, FIRST_ANSWER)).await.whole().await;
    conversation.extend(answer.tokens);
    conversation.extend(workload.prompt(1, SECOND_QUESTION));
    milliseconds(Answer::of(side, plain(&conversation, 1)).await.whole().await.first())
}

async fn gap(side: &dyn Side, workload: &Workload) -> Measurement {
    let endless = workload.context - SHORT_PROMPT as u32;
    let mut running = Vec::new();
    for which in 0..RUNNING {
        running.push(Answer::of(side, plain(&workload.prompt(which as u64, SHORT_PROMPT), endless)).await);
    }
    join_all(running.iter_mut().map(async |answer| {
        while answer.heard.at.len() < WELL_UNDER_WAY {
            assert!(answer.next().await);
        }
    }))
    .await;

    let length = LONG_PROMPT.min(workload.context as usize - 2 * SHORT_PROMPT);
    let long = workload.prompt(RUNNING as u64, length);
    let admitted = Cell::new(None);
    let newcomer = async {
        let heard = Answer::of(side, plain(&long, 1)).await.whole().await;
        admitted.set(Some(Instant::now()));
        heard
    };
    // One piece after the admission closes the last gap.
    let others = join_all(running.iter_mut().map(async |answer| {
        while admitted.get().is_none_or(|admitted| answer.heard.at.last().is_none_or(|last| *last < admitted)) {
            assert!(answer.next().await, "a stream ended before the prompt was admitted");
        }
    }));
    let (newcomer, _) = join(newcomer, others).await;
    let longest = running.iter().map(|answer| answer.heard.longest_gap_after(newcomer.sent_at)).max().unwrap();
    drop(running);
    sleep(SETTLED_WITHIN).await;
    Measurement { figure: milliseconds(longest), newcomer: Some(milliseconds(newcomer.first())) }
}

fn plain(prompt: &[u32], tokens: u32) -> Question<'_> {
    Question { prompt, tokens, ..Question::default() }
}

/// Tokens a second of all answers together, from the first of them to the last.
fn speed(answers: &[Heard]) -> f64 {
    let first = answers.iter().filter_map(|it| it.at.first()).min().unwrap();
    let last = answers.iter().filter_map(|it| it.at.last()).max().unwrap();
    f64::from(ANSWER - 1) * answers.len() as f64 / (*last - *first).as_secs_f64()
}

impl Heard {
    fn first(&self) -> Duration {
        self.at[0] - self.sent_at
    }

    fn longest_gap_after(&self, start: Instant) -> Duration {
        let gaps = self.at.windows(2).filter(|pair| pair[1] > start).map(|pair| pair[1] - pair[0]);
        gaps.max().unwrap()
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

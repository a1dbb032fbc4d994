//! Conversations that go on, are cut back, come again and are given up, on models of every family: each answer has the
//! probabilities that a fresh context gives.

use std::collections::{BTreeMap, BTreeSet};

use tether_engine::{
    EngineError, Event, GenerateRequest, GenerateStream, LlamaRuntime, LoadOptions, ModelId, ModelRuntime, PromptInput,
    Sampling, TokenLogprob, no_progress,
};

use crate::chance::Chance;
use crate::llama_repeats::kernels_are_supported;
use crate::random_model::{BEGIN, CHUNK, FILL_IN, Family, VOCABULARY, WINDOW, Weights, random_model};
use crate::{ask, options, run, tiny, within};

/// Returns how far probabilities may differ, as logarithms: sums are made in another order. ggml's attention sums
/// halves where ours sums floats.
fn tolerance() -> f32 {
    if kernels_are_supported() { 0.02 } else { 0.25 }
}
/// Likely tokens whose probabilities are compared.
const TOP: u32 = 20;

/// An answer as it was told.
#[derive(Debug, Default)]
struct Reported {
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    cached_tokens: u32,
}

struct Subject {
    runtime: LlamaRuntime,
    model: ModelId,
    chance: Chance,
    name: String,
    /// Texts that were asked about, with their answers.
    texts: Vec<Vec<u32>>,
    cached_tokens: u32,
}

impl Subject {
    async fn new(family: Family, weights: Weights, seed: u64, options: LoadOptions) -> Self {
        let runtime = LlamaRuntime::new();
        let model = random_model(family, weights, seed);
        let model = within(runtime.load(model, options, no_progress())).await.expect("it loads").id;
        let name = format!("{family:?}, seed {seed}");
        Self { runtime, model, chance: Chance(seed), name, texts: Vec::new(), cached_tokens: 0 }
    }

    fn tokens(&mut self, count: u64) -> Vec<u32> {
        (0..count).map(|_| self.chance.below(VOCABULARY as u64 - 1) as u32).collect()
    }

    fn request(&self, prompt: &[u32], max_tokens: u32) -> GenerateRequest {
        GenerateRequest {
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            logprobs: Some(TOP),
            ..GenerateRequest::new(self.model, PromptInput::Tokens(prompt.to_vec()))
        }
    }

    async fn start(&self, prompt: &[u32], max_tokens: u32) -> GenerateStream {
        within(self.runtime.generate(self.request(prompt, max_tokens))).await.expect("it is admitted")
    }

    /// Compares the first and the last token of an answer with what a fresh context says in their places.
    async fn check(&mut self, prompt: &[u32], reported: &Reported) {
        self.cached_tokens += reported.cached_tokens;
        for index in BTreeSet::from([0, reported.tokens.len() - 1]) {
            let fresh = GenerateRequest {
                continued: reported.tokens[..index].to_vec(),
                deterministic: true,
                ..self.request(prompt, index as u32 + 1)
            };
            let fresh = read(within(self.runtime.generate(fresh)).await.expect("it is admitted")).await;
            let likely = |logprob: &TokenLogprob| {
                logprob.top.iter().map(|top| (top.token, top.logprob)).collect::<BTreeMap<_, _>>()
            };
            let (ours, theirs) = (likely(&reported.logprobs[index]), likely(&fresh.logprobs[0]));
            let both = ours.iter().filter_map(|(token, ours)| Some(ours - theirs.get(token)?));
            let differences: Vec<f32> = both.map(f32::abs).collect();
            let largest = differences.iter().copied().fold(0.0, f32::max);
            assert!(
                differences.len() > TOP as usize / 2 && largest <= tolerance(),
                "{}: token {index} behind a prompt of {} tokens, {} of them cached, is off by {largest}",
                self.name,
                prompt.len(),
                reported.cached_tokens
            );
        }
    }

    /// Asks about several texts at once; the last of them may be given up after its first token.
    async fn ask(&mut self, prompts: Vec<Vec<u32>>, gives_up: bool) {
        let max_tokens = 1 + self.chance.below(12) as u32;
        let mut streams = Vec::new();
        for prompt in &prompts {
            streams.push(self.start(prompt, max_tokens).await);
        }
        if gives_up && let Some(mut stream) = streams.pop() {
            within(stream.next()).await.expect("it starts").expect("and well");
        }
        for (prompt, stream) in prompts.iter().zip(streams) {
            let reported = read(stream).await;
            assert_eq!(reported.tokens.len(), max_tokens as usize, "{}", self.name);
            self.check(prompt, &reported).await;
            self.texts.push([&prompt[..], &reported.tokens].concat());
        }
    }

    /// Returns a text that is new, goes on from an earlier one, is one cut back, or is one as it was.
    fn prompt(&mut self, longest: u64) -> Vec<u32> {
        let kind = if self.texts.is_empty() { 0 } else { self.chance.below(5) };
        let old = if kind == 0 { &[][..] } else { &self.texts[self.chance.below(self.texts.len() as u64) as usize] };
        let keep = match kind {
            1 | 2 => 1 + self.chance.below(old.len() as u64) as usize,
            _ => old.len(),
        };
        let mut prompt = old[..keep].to_vec();
        let room = longest.saturating_sub(keep as u64);
        if kind != 4 && room > 0 {
            let more = 1 + self.chance.below(room.min(longest / 3));
            prompt.extend(self.tokens(more));
        }
        prompt.truncate(longest as usize);
        prompt
    }
}

async fn read(mut stream: GenerateStream) -> Reported {
    let mut reported = Reported::default();
    while let Some(event) = within(stream.next()).await {
        match event.expect("it answers") {
            Event::Started { cached_tokens, .. } => reported.cached_tokens = cached_tokens,
            Event::Piece(piece) => {
                reported.tokens.extend(piece.tokens);
                reported.logprobs.extend(piece.logprobs);
            }
            Event::Progress(_) | Event::Done { .. } => {}
        }
    }
    reported
}

/// Drives random conversations through a room that is too small for them.
async fn converse(family: Family, seed: u64) {
    let prompt_cache_bytes = if seed.is_multiple_of(2) { 4 << 20 } else { 0 };
    let options =
        LoadOptions { context_length: 256, slots: 4, kv_tokens: 512, prompt_cache_bytes, draft_tokens: 3, ..options() };
    let mut subject = Subject::new(family, Weights::F16, seed, options).await;
    for _ in 0..24 {
        let together = 1 + subject.chance.below(4);
        let mut prompts = Vec::new();
        for _ in 0..together {
            prompts.push(subject.prompt(240));
        }
        let gives_up = together > 1 && subject.chance.below(4) == 0;
        subject.ask(prompts, gives_up).await;
    }
    let is_reused = matches!(family, Family::Full | Family::Sliding);
    assert!(
        !is_reused || subject.cached_tokens > 500,
        "{}: {} tokens were reused",
        subject.name,
        subject.cached_tokens
    );
}

#[tokio::test]
async fn answers_of_a_model_that_sees_everything_are_those_of_a_fresh_context() {
    for seed in 0..4 {
        converse(Family::Full, seed).await;
    }
}

#[tokio::test]
async fn answers_of_a_model_with_a_sliding_window_are_those_of_a_fresh_context() {
    for seed in 0..8 {
        converse(Family::Sliding, seed).await;
    }
}

#[tokio::test]
async fn answers_of_a_recurrent_model_are_those_of_a_fresh_context() {
    for seed in 0..6 {
        converse(Family::Recurrent, seed).await;
    }
}

#[tokio::test]
async fn answers_of_a_hybrid_model_are_those_of_a_fresh_context() {
    for seed in 0..6 {
        converse(Family::Hybrid, seed).await;
    }
}

#[tokio::test]
async fn answers_of_a_model_with_chunks_are_those_of_a_fresh_context() {
    let options = LoadOptions { context_length: CHUNK as u32 + 256, slots: 1, ..options() };
    let mut subject = Subject::new(Family::Chunked, Weights::F16, 1, options).await;
    let text = subject.tokens(CHUNK as u64 + 64);
    read(subject.start(&text, 1).await).await;
    // Sends the long text to host memory, without what its second chunk does not see.
    let short = subject.tokens(100);
    read(subject.start(&short, 1).await).await;
    for (length, cached) in [(CHUNK + 20, CHUNK + 19), (CHUNK - 40, 0)] {
        let prompt = &text[..length];
        let reported = read(subject.start(prompt, 1).await).await;
        assert_eq!(reported.cached_tokens as usize, cached, "of {length} tokens");
        subject.check(prompt, &reported).await;
    }
}

#[tokio::test]
async fn a_model_with_a_sliding_window_answers_a_short_prompt_after_long_ones() {
    let options = LoadOptions { context_length: 1_024, slots: 4, ..options() };
    let mut subject = Subject::new(Family::Sliding, Weights::F16, 7, options).await;
    let begin = subject.tokens(1);
    let documents: Vec<_> = (0..3).map(|_| [&begin[..], &subject.tokens(20 * WINDOW as u64)].concat()).collect();
    let short = [&begin[..], &subject.tokens(12)].concat();
    for prompt in [&short, &documents[0], &documents[1], &documents[2], &documents[0], &short] {
        subject.ask(vec![prompt.clone()], false).await;
    }
}

#[tokio::test]
async fn models_of_all_formats_answer_on_this_processor() {
    for weights in [Weights::F16, Weights::Q4_0, Weights::Q4_1, Weights::Q8_0] {
        let mut subject = Subject::new(Family::Full, weights, 3, options()).await;
        let prompt = subject.tokens(70);
        let reported = read(subject.start(&prompt, 4).await).await;
        assert_eq!(reported.tokens.len(), 4, "{weights:?}");
    }
}

#[tokio::test]
async fn a_plain_prompt_that_writes_its_first_token_itself_gets_no_second_one() {
    let subject = Subject::new(Family::Full, Weights::F16, 3, options()).await;
    let count = async |text: &str| {
        let input = PromptInput::Text(text.to_owned());
        within(subject.runtime.count_tokens(subject.model, &input)).await.expect("it counts")
    };
    assert_eq!(count("The capital").await, 12);
    assert_eq!(count(&format!("{BEGIN}The capital")).await, 12);
    assert_eq!(count(&format!("{BEGIN}{BEGIN}The capital")).await, 13);
}

#[tokio::test]
async fn a_text_is_filled_in_with_the_tokens_that_its_model_knows() {
    let runtime = LlamaRuntime::new();
    let artifact = random_model(Family::Full, Weights::F16, 7);
    let model = within(runtime.load(artifact, options(), no_progress())).await.expect("it loads").id;
    let fill = |input, suffix: Option<&str>| GenerateRequest {
        suffix: suffix.map(str::to_owned),
        max_tokens: Some(8),
        ignore_eos: true,
        ..GenerateRequest { input, ..ask(model, "") }
    };
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let [before, after, between] = FILL_IN;
    let begin = VOCABULARY as u32 - 2;
    // What looks like a special token in somebody's file is text.
    let (prefix, suffix) = ("f(<|end|>", ") = 1");
    let by_hand = [&[begin, before][..], &bytes(prefix), &[after], &bytes(suffix), &[between]].concat();
    let expected = run(&runtime, fill(PromptInput::Tokens(by_hand), None)).await;
    for input in [PromptInput::Text(prefix.into()), PromptInput::Tokens(bytes(prefix))] {
        let filled = run(&runtime, fill(input, Some(suffix))).await;
        assert_eq!(
            (filled.tokens.clone(), filled.usage().prompt_tokens),
            (expected.tokens.clone(), expected.usage().prompt_tokens)
        );
    }
    let tiny = within(runtime.load(tiny(), options(), no_progress())).await.expect("it loads").id;
    let request = GenerateRequest {
        suffix: Some("x".into()),
        ..GenerateRequest { input: PromptInput::Text("a".into()), ..ask(tiny, "") }
    };
    let refused = within(runtime.generate(request)).await.expect_err("it knows no such tokens");
    assert!(matches!(&refused, EngineError::Unsupported { parameter, .. } if parameter == "suffix"), "{refused}");
}

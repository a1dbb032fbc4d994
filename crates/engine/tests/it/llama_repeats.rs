//! The same request gives the same answer, to the bit of its probabilities.

use futures_util::future::join_all;
use tether_engine::{
    Event, GenerateRequest, Kernels, LlamaRuntime, LoadOptions, ModelId, ModelRuntime, PromptInput, Sampling,
    no_progress,
};

use crate::chance::Chance;
use crate::random_model::{Family, VOCABULARY, Weights, random_model};
use crate::{options, within};

/// The tokens of an answer, with the bits of the logarithms of their probabilities.
type Drawn = Vec<(u32, u32)>;

struct Subject {
    runtime: LlamaRuntime,
    model: ModelId,
    deterministic: bool,
}

impl Subject {
    /// Loads a model into a room that is too small for all prompts, with and without host memory for the others.
    async fn new(family: Family, weights: Weights, prompt_cache_bytes: u64, kernels: Kernels) -> Self {
        let (context_length, slots, kv_tokens, draft_tokens) = (512, 8, 1_024, 3);
        let options =
            LoadOptions { context_length, slots, kv_tokens, draft_tokens, prompt_cache_bytes, kernels, ..options() };
        let runtime = LlamaRuntime::new();
        let model = random_model(family, weights, 5);
        let model = within(runtime.load(model, options, no_progress())).await.expect("it loads").id;
        Self { runtime, model, deterministic: false }
    }

    async fn answer(&self, prompt: &[u32]) -> Drawn {
        let request = GenerateRequest {
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            max_tokens: Some(24),
            ignore_eos: true,
            logprobs: Some(0),
            deterministic: self.deterministic,
            ..GenerateRequest::new(self.model, PromptInput::Tokens(prompt.to_vec()))
        };
        let mut stream = within(self.runtime.generate(request)).await.expect("it is admitted");
        let mut logprobs = Vec::new();
        while let Some(event) = within(stream.next()).await {
            if let Event::Piece(piece) = event.expect("it answers") {
                logprobs.extend(piece.logprobs.iter().map(|logprob| (logprob.token, logprob.logprob.to_bits())));
            }
        }
        logprobs
    }

    async fn answers(&self, prompts: &[Vec<u32>]) -> Vec<Drawn> {
        let mut answers = Vec::new();
        for prompt in prompts {
            answers.push(self.answer(prompt).await);
        }
        answers
    }
}

/// Prompts of many lengths, some of which begin alike.
fn prompts() -> Vec<Vec<u32>> {
    let mut chance = Chance(9);
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    for number in 0..20 {
        let mut prompt = if number % 3 == 2 { prompts[number - 1].clone() } else { vec![1, 2] };
        prompt.truncate(1 + chance.below(60) as usize);
        let more = 3 + chance.below(if number % 2 == 0 { 12 } else { 150 });
        prompt.extend((0..more).map(|_| chance.below(VOCABULARY as u64 - 1) as u32));
        prompts.push(prompt);
    }
    prompts
}

#[tokio::test]
async fn with_our_kernels_an_answer_repeats_to_the_bit_whatever_was_asked_before_or_is_beside_it() {
    if !kernels_are_supported() {
        return;
    }
    let prompts = prompts();
    for family in [Family::Full, Family::Sliding] {
        for weights in [Weights::Q4_0, Weights::Q8_0] {
            for prompt_cache_bytes in [0, 4 << 20] {
                let name = format!("{family:?}, {weights:?}, {prompt_cache_bytes} bytes of cache");
                let subject = Subject::new(family, weights, prompt_cache_bytes, Kernels::Auto).await;
                let first = subject.answers(&prompts).await;
                assert!(first.iter().all(|logprobs| logprobs.len() == 24), "{name}");
                assert_eq!(subject.answers(&prompts).await, first, "{name}: again");
                let together = join_all(prompts.iter().map(|prompt| subject.answer(prompt))).await;
                assert_eq!(together, first, "{name}: all at once");
                let exact = Subject { deterministic: true, ..subject };
                assert_eq!(exact.answers(&prompts).await, first, "{name}: in a context of its own");
            }
        }
    }
}

/// ggml multiplies several rows of floats with other kernels than one. Nobody who asks an idle engine twice may notice.
#[tokio::test]
async fn an_idle_engine_answers_the_same_request_alike_to_the_bit() {
    if !kernels_are_supported() {
        return;
    }
    let prompts = prompts();
    for family in [Family::Full, Family::Sliding, Family::Chunked, Family::Recurrent, Family::Hybrid] {
        for weights in [Weights::F16, Weights::Q4_1] {
            let subject = Subject::new(family, weights, 4 << 20, Kernels::Auto).await;
            let first = subject.answers(&prompts).await;
            for round in 0..2 {
                let again = subject.answers(&prompts).await;
                for (index, (again, first)) in again.iter().zip(&first).enumerate() {
                    assert_eq!(again, first, "{family:?}, {weights:?}, prompt {index}, round {round}");
                }
            }
        }
    }
}

#[tokio::test]
async fn without_our_kernels_an_answer_repeats_to_the_bit_where_that_is_asked_for() {
    let prompts = &prompts()[..8];
    for weights in [Weights::F16, Weights::Q4_0, Weights::Q4_1, Weights::Q8_0] {
        let subject = Subject::new(Family::Sliding, weights, 4 << 20, Kernels::Off).await;
        let exact = Subject { deterministic: true, ..subject };
        let first = exact.answers(prompts).await;
        let others = Subject { deterministic: false, ..exact };
        others.answers(prompts).await;
        let exact = Subject { deterministic: true, ..others };
        for (index, first) in first.iter().enumerate() {
            let beside = [0, 1, 2].map(|other| exact.answer(&prompts[(index + other) % prompts.len()]));
            assert_eq!(join_all(beside).await[0], *first, "{weights:?}");
        }
    }
}

/// Returns whether our kernels run here: what they make does not depend on how many rows are beside it.
pub(crate) fn kernels_are_supported() -> bool {
    LlamaRuntime::new().describe().detail.contains("TETHER_KERNELS")
}

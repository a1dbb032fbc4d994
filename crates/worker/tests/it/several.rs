//! Jobs that ask for more than one answer: several to the same prompt, or vectors of texts.

use std::collections::BTreeMap;

use engine::{MockOptions, MockRuntime, ModelRuntime as _};
use protocol::ErrorCode;
use protocol::infer::{EmbedInput, FinishReason, InferChunk, InferRequest, Input, Message, Role};
use protocol::usage::TokenUsage;
use rpc::CallError;
use tokio::time::{self, Instant};

use crate::{SECOND, Scene, config, next, read, request, slow};

fn asking(n: u32) -> InferRequest {
    InferRequest { input: Input { n: Some(n), max_tokens: Some(5), ..request().input }, ..request() }
}

fn embedding(texts: Vec<EmbedInput>) -> InferRequest {
    InferRequest { input: Input { embed: Some(texts), ..Input::default() }, ..request() }
}

fn texts_by_index(chunks: &[InferChunk]) -> BTreeMap<u32, String> {
    let mut texts = BTreeMap::<u32, String>::new();
    for chunk in chunks.iter().filter(|chunk| !chunk.done) {
        *texts.entry(chunk.payload.index).or_default() += &chunk.payload.text;
    }
    texts
}

#[tokio::test(start_paused = true)]
async fn each_answer_has_its_index_and_its_end_and_the_prompt_is_counted_once() {
    for slots in [1, 2, 4] {
        let mock = MockOptions { per_token: SECOND / 100, ..MockOptions::default() };
        let scene = Scene::ready(tether_worker::Config { slots, queue_max: 1, ..config() }, mock).await;
        let (chunks, error) = read(scene.open(&asking(3)).await.expect("accepted")).await;
        assert_eq!(error, None);
        assert!(chunks.iter().enumerate().all(|(index, chunk)| chunk.seq == index as u64));
        let expected = (0..3).map(|index| (index, MockRuntime::text(5))).collect();
        assert_eq!(texts_by_index(&chunks), expected);
        let (last, others) = chunks.split_last().expect("chunks");
        let ends = others.iter().filter_map(|chunk| Some((chunk.payload.index, chunk.payload.finish_reason?)));
        assert_eq!(ends.collect::<BTreeMap<_, _>>(), (0..3).map(|index| (index, FinishReason::Length)).collect());
        assert!(last.done && last.payload.finish_reason == Some(FinishReason::Length));
        let usage = TokenUsage { prompt_tokens: 3, completion_tokens: 15, cached_tokens: 0, reasoning_tokens: 0 };
        assert_eq!(last.payload.usage, Some(usage));
        // What a caller who leaves early is billed for is told once as well.
        let usages: Vec<_> = others.iter().filter_map(|chunk| chunk.payload.usage).collect();
        assert_eq!(usages, [TokenUsage { completion_tokens: 0, ..usage }]);
    }
}

#[tokio::test(start_paused = true)]
async fn several_prompts_are_one_job_and_each_is_counted_once() {
    for slots in [1, 4] {
        let mock = MockOptions { per_token: SECOND / 100, ..MockOptions::default() };
        let scene = Scene::ready(tether_worker::Config { slots, queue_max: 1, ..config() }, mock).await;
        let prompts = ["one", "two words", "now three words"].map(|text| EmbedInput::Text(text.into()));
        let prompts = Some([&prompts[..], &[EmbedInput::Tokens(vec![1; 4])]].concat());
        let input = Input { prompts, prompt: None, ..asking(2).input };
        let (chunks, error) = read(scene.open(&InferRequest { input, ..request() }).await.expect("accepted")).await;
        assert_eq!(error, None);
        let expected = (0..8).map(|index| (index, MockRuntime::text(5))).collect();
        assert_eq!(texts_by_index(&chunks), expected);
        let (last, others) = chunks.split_last().expect("chunks");
        let usage = last.payload.usage.expect("the last tells what it took");
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (1 + 2 + 3 + 4, 8 * 5));
        // A caller who leaves is billed for the prompts that were read by then.
        let progress: Vec<_> =
            others.iter().filter_map(|chunk| chunk.payload.usage).map(|usage| usage.prompt_tokens).collect();
        assert!(progress.is_sorted() && progress.last() == Some(&10), "{progress:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_thoughts_of_all_answers_are_counted() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    let messages = Some(vec![Message::new(Role::User, "hi")]);
    let template_options = [("enable_thinking".to_owned(), true.into())].into_iter().collect();
    let input = Input { messages, prompt: None, template_options, n: Some(2), ..request().input };
    let (chunks, error) = read(scene.open(&InferRequest { input, ..request() }).await.expect("accepted")).await;
    assert_eq!(error, None);
    let usage = chunks.last().and_then(|last| last.payload.usage).expect("the last chunk tells it");
    assert_eq!((usage.completion_tokens, usage.reasoning_tokens), (34, 2));
}

#[tokio::test(start_paused = true)]
async fn answers_progress_side_by_side() {
    let scene = Scene::ready(config(), slow()).await;
    let long = InferRequest { input: Input { n: Some(3), ..request().input }, ..request() };
    let mut stream = scene.open(&long).await.expect("accepted");
    let mut counts = BTreeMap::<u32, usize>::new();
    while counts.values().sum::<usize>() < 30 {
        let chunk = next(&mut stream).await.expect("it runs").expect("and well");
        *counts.entry(chunk.payload.index).or_default() += chunk.payload.tokens.len();
    }
    assert!(counts.len() == 3 && counts.values().all(|count| (9..=12).contains(count)), "{counts:?}");
    drop(stream);
    time::sleep(SECOND).await;
    let state = &scene.runtime.load_state()[0];
    assert_eq!((state.running, state.waiting, state.counters.cancelled), (0, 0, 3));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_fails_one_answer_fails_the_job() {
    let mock = MockOptions { die_first: 1, die_after: 2, ..MockOptions::default() };
    let scene = Scene::ready(config(), mock).await;
    let (chunks, error) = read(scene.open(&asking(2)).await.expect("accepted")).await;
    assert!(chunks.iter().all(|chunk| !chunk.done));
    let Some(CallError::Remote(error)) = error else { panic!("it fails: {error:?}") };
    assert_eq!(error.code, ErrorCode::WorkerFailed);
}

#[tokio::test(start_paused = true)]
async fn vectors_come_in_chunks_far_below_the_limit_of_a_message() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    let texts: Vec<_> = (0..2_048).map(|number| EmbedInput::Text(format!("text {number}"))).collect();
    let (chunks, error) = read(scene.open(&embedding(texts)).await.expect("accepted")).await;
    assert_eq!(error, None);
    let (last, others) = chunks.split_last().expect("chunks");
    assert!(others.len() > 1 && others.iter().all(|chunk| chunk.payload.embeddings.len() < 2_048));
    let vectors: Vec<_> = others.iter().flat_map(|chunk| &chunk.payload.embeddings).collect();
    assert!(vectors.iter().enumerate().all(|(index, vector)| vector.index as usize == index));
    assert_eq!((vectors.len(), vectors[7].vector().expect("a vector").len()), (2_048, 8));
    let usage = TokenUsage { prompt_tokens: 4_096, completion_tokens: 0, cached_tokens: 0, reasoning_tokens: 0 };
    assert_eq!((last.done, last.payload.usage, others[0].payload.usage), (true, Some(usage), Some(usage)));
}

#[tokio::test(start_paused = true)]
async fn vectors_of_another_length_than_the_models_are_refused() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    let of_length = |dimensions| {
        let request = embedding(vec![EmbedInput::Tokens(vec![1, 2])]);
        InferRequest { input: Input { dimensions: Some(dimensions), ..request.input }, ..request }
    };
    let error = scene.refusal(&of_length(9)).await;
    assert_eq!((error.code, error.param.as_deref()), (ErrorCode::UnsupportedParameter, Some("dimensions")));
    let (chunks, error) = read(scene.open(&of_length(8)).await.expect("accepted")).await;
    assert_eq!((error, chunks.len()), (None, 2));
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_the_making_of_vectors() {
    let scene = Scene::ready(config(), MockOptions { first_token: SECOND * 60, ..MockOptions::default() }).await;
    let hurried = InferRequest { deadline_ms: Some(2_000), ..embedding(vec![EmbedInput::Text("x".into())]) };
    let begin = Instant::now();
    let (chunks, error) = read(scene.open(&hurried).await.expect("accepted")).await;
    assert!(chunks.is_empty() && begin.elapsed() == SECOND * 2, "after {:?}", begin.elapsed());
    let Some(CallError::Remote(error)) = error else { panic!("the deadline passes: {error:?}") };
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);
}

//! Jobs that are read or wait their turn say so, and a deadline is for the beginning of an answer.

use std::time::Duration;

use engine::{MockOptions, MockRuntime};
use protocol::ErrorCode;
use protocol::infer::{EmbedInput, InferChunk, InferRequest, Input, PROGRESS_WITHIN, Progress};
use rpc::{CallError, ResponseStream};
use tether_worker::Config;
use tokio::time::Instant;

use crate::{SECOND, Scene, config, next, read, request, text};

const TEN_MINUTES: Duration = Duration::from_mins(10);

fn wanting_progress() -> InferRequest {
    InferRequest { progress: true, ..request() }
}

/// Reads to the end, checks that no silence was too long, and returns what came apart from progress, and the progress.
async fn listen(mut stream: ResponseStream) -> (Vec<InferChunk>, Vec<Progress>, Option<CallError>) {
    let (mut chunks, mut progress, mut heard_at) = (vec![], vec![], Instant::now());
    let error = loop {
        let chunk = match next(&mut stream).await {
            Some(Ok(chunk)) => chunk,
            Some(Err(error)) => break Some(error),
            None => break None,
        };
        assert!(heard_at.elapsed() <= PROGRESS_WITHIN, "silent for {:?}", heard_at.elapsed());
        heard_at = Instant::now();
        assert_eq!((chunk.attempt, chunk.seq), (3, chunks.len() as u64), "progress takes no place");
        match chunk.progress {
            Some(event) => progress.push(event),
            None => chunks.push(chunk),
        }
    };
    (chunks, progress, error)
}

#[tokio::test(start_paused = true)]
async fn a_prompt_that_is_read_for_ten_minutes_is_answered_and_tells_how_far_it_is() {
    let mock = MockOptions { first_token: TEN_MINUTES, ..MockOptions::default() };
    let scene = Scene::ready(config(), mock).await;
    let input = Input { prompt: Some("word ".repeat(3_000)), ..Input::default() };
    let stream = scene.open(&InferRequest { input, ..wanting_progress() }).await.expect("accepted");
    let (chunks, progress, error) = listen(stream).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(16)));
    assert!(progress.is_sorted_by_key(|progress| progress.tokens_read));
    let last = progress.last().expect("it was told");
    assert!(last.tokens_read > 2_900 && last.tokens_total == 3_000, "{last:?}");
}

#[tokio::test(start_paused = true)]
async fn a_job_that_waits_ten_minutes_for_a_slot_is_answered() {
    let mock = MockOptions { first_token: TEN_MINUTES, ..MockOptions::default() };
    let scene = Scene::ready(Config { slots: 1, queue_max: 1, ..config() }, mock).await;
    let begun = Instant::now();
    let first = scene.open(&wanting_progress()).await.expect("a slot");
    let second = scene.open(&wanting_progress()).await.expect("a place");
    let ((ran, _, _), (chunks, progress, error)) = tokio::join!(listen(first), listen(second));
    assert_eq!((error, text(&ran), text(&chunks)), (None, MockRuntime::text(16), MockRuntime::text(16)));
    assert!(begun.elapsed() >= TEN_MINUTES * 2, "{:?}", begun.elapsed());
    assert_eq!(progress[0], Progress { tokens_read: 0, tokens_total: 3 });
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_vectors_or_for_a_load_hears_of_it() {
    let slow = MockOptions { first_token: TEN_MINUTES, load: TEN_MINUTES, ..MockOptions::default() };
    let scene = Scene::new(Config { preload: false, ..config() }, slow).await;
    let input = Input { embed: Some(vec![EmbedInput::Text("a".into())]), ..Input::default() };
    let stream = scene.open(&InferRequest { input, ..wanting_progress() }).await.expect("accepted");
    let (chunks, progress, error) = listen(stream).await;
    assert_eq!(error, None);
    assert_eq!(chunks[0].payload.embeddings.len(), 1);
    assert!(progress.len() > 600, "{}", progress.len());
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_that_knows_no_progress_gets_none() {
    let mock = MockOptions { first_token: SECOND * 30, ..MockOptions::default() };
    let scene = Scene::ready(config(), mock).await;
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(16)));
    assert!(chunks.iter().all(|chunk| chunk.progress.is_none()));
}

#[tokio::test(start_paused = true)]
async fn a_silent_engine_is_not_talked_over() {
    let scene = Scene::ready(config(), MockOptions { hang_first: 1, ..MockOptions::default() }).await;
    let (chunks, progress, error) = listen(scene.open(&wanting_progress()).await.expect("accepted")).await;
    assert_eq!((chunks, progress, error), (vec![], vec![], Some(CallError::Stalled)));
}

#[tokio::test(start_paused = true)]
async fn a_running_answer_outlives_its_deadline_and_one_that_has_not_begun_does_not() {
    let mock = MockOptions { first_token: SECOND, per_token: SECOND, tokens: 100, ..MockOptions::default() };
    let scene = Scene::ready(Config { slots: 1, ..config() }, mock).await;
    let hurried = InferRequest { deadline_ms: Some(10_000), ..wanting_progress() };
    let first = scene.open(&hurried).await.expect("a slot");
    let begun = Instant::now();
    let second = scene.open(&hurried).await.expect("a place");
    let ((chunks, _, error), (none, _, refused)) = tokio::join!(listen(first), async {
        let late = listen(second).await;
        assert_eq!(begun.elapsed().as_secs(), 10);
        late
    });
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(100)));
    assert!(begun.elapsed() >= SECOND * 100);
    let Some(CallError::Remote(refused)) = refused else { panic!("{refused:?}") };
    assert_eq!((none.len(), refused.code), (0, ErrorCode::DeadlineExceeded));
}

//! Work is told from silence, and a deadline is for the beginning of an answer.

use std::time::Duration;

use protocol::infer::{InferChunk, InferRequest};
use protocol::policy::ServiceClass;
use protocol::{ErrorCode, WireError, codec};
use rpc::{CallError, ResponseStream, StreamOptions};
use tether_orchestrator::Config;
use tokio::time::{self, Instant};

use crate::stand::{Manner, Stand, stand};

/// Submits a job of a gateway that reads progress and waits so long for the answer to begin.
async fn submit(stand: &Stand, job: &InferRequest, deadline: Duration) -> Result<ResponseStream, CallError> {
    let options = StreamOptions { accept_within: deadline, deadline: Some(deadline), stall: Duration::from_mins(2) };
    let body = codec::encode(job).into();
    stand.gateway.open_stream(stand.orchestrator, protocol::infer::SUBMIT, body, options).await
}

/// Reads to the end: the answer, how often there was progress, and the error if there was one.
async fn listen(mut answer: ResponseStream) -> (Vec<InferChunk>, usize, Option<WireError>) {
    let (mut chunks, mut progress) = (vec![], 0);
    while let Some(message) = answer.next().await {
        let chunk: InferChunk = match message {
            Ok(message) => codec::decode(&message).expect("a chunk"),
            Err(error) => return (chunks, progress, Some(error.into())),
        };
        if chunk.progress.is_some() {
            progress += 1;
        } else {
            answer.lift_deadline();
            chunks.push(chunk);
        }
    }
    (chunks, progress, None)
}

fn wanting_progress(stand: &Stand) -> InferRequest {
    InferRequest { progress: true, ..stand.job() }
}

#[tokio::test]
async fn a_prompt_that_is_read_for_ten_minutes_is_answered_and_speaks_well_of_its_model() {
    let mut config = Config::default();
    config.breaker.window_secs = 24 * 3600;
    let stand = stand(config).await;
    let worker = stand.worker(1, Manner::Read(600)).await;
    // As many as the breaker needs to judge, the others long enough to be slow for it.
    for seconds in [600, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90] {
        *worker.manner.lock() = Manner::Read(seconds);
        let begun = Instant::now();
        let answer = submit(&stand, &wanting_progress(&stand), Duration::from_mins(15)).await.expect("accepted");
        // The store has a thread of its own, which paused time would not wait for.
        time::pause();
        let (chunks, progress, error) = listen(answer).await;
        time::resume();
        assert_eq!((error, progress as u64, chunks.len() as u64), (None, seconds, seconds + 1));
        assert!(chunks.iter().all(|chunk| chunk.attempt == 1));
        assert!(begun.elapsed() >= Duration::from_secs(2 * seconds), "{:?}", begun.elapsed());
        worker.report(&stand, |_| {}).await.expect("believed");
    }
    assert_eq!(worker.jobs_seen(), 11);
    assert!(!stand.metrics.encode().contains("tether_breaker_transitions_total{"));
}

#[tokio::test]
async fn whoever_does_not_ask_for_progress_gets_none() {
    let stand = stand(Config::default()).await;
    stand.worker(1, Manner::Read(1)).await;
    let chunks = stand.answer(&stand.job()).await.expect("answered");
    assert!(chunks.len() == 2 && chunks.iter().all(|chunk| chunk.progress.is_none()), "{chunks:?}");
}

#[tokio::test]
async fn a_worker_that_falls_silent_while_it_reads_is_given_up_and_another_answers() {
    let stand = stand(Config { stall_secs: 1, ..Config::default() }).await;
    let (silent, healthy) = stand.pair(Manner::FallSilent(1), Manner::Answer(2)).await;
    let answer = submit(&stand, &wanting_progress(&stand), Duration::from_mins(15)).await.expect("accepted");
    let (chunks, progress, error) = listen(answer).await;
    assert_eq!((error, progress, chunks.len()), (None, 1, 3));
    assert!(chunks.iter().all(|chunk| chunk.attempt == 2), "{chunks:?}");
    assert_eq!((silent.jobs_seen(), healthy.jobs_seen()), (1, 1));
    silent.cancelled.notified().await;
}

#[tokio::test]
async fn a_running_answer_outlives_its_deadline_and_one_that_has_not_begun_does_not() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Read(2)).await;
    let answer = submit(&stand, &wanting_progress(&stand), Duration::from_millis(3_500)).await.expect("accepted");
    let (chunks, _, error) = listen(answer).await;
    assert_eq!((error, chunks.len()), (None, 3));
    *worker.manner.lock() = Manner::Read(600);
    let answer = submit(&stand, &wanting_progress(&stand), Duration::from_millis(1_500)).await.expect("accepted");
    let (chunks, _, error) = listen(answer).await;
    assert_eq!((chunks, error.map(|error| error.code)), (vec![], Some(ErrorCode::DeadlineExceeded)));
    worker.cancelled.notified().await;
}

#[tokio::test]
async fn a_worker_that_only_says_that_it_works_is_given_up_and_another_answers() {
    let stand = stand(Config { token_stall_secs: 1, ..Config::default() }).await;
    let (idle, healthy) = stand.pair(Manner::Idle, Manner::Answer(2)).await;
    let answer = submit(&stand, &wanting_progress(&stand), Duration::from_mins(15)).await.expect("accepted");
    let (chunks, progress, error) = listen(answer).await;
    assert_eq!((error, chunks.len()), (None, 3));
    assert!(progress > 1 && chunks.iter().all(|chunk| chunk.attempt == 2), "{chunks:?}");
    idle.cancelled.notified().await;
    assert_eq!((idle.jobs_seen(), healthy.jobs_seen()), (1, 1));
}

#[tokio::test]
async fn a_worker_may_let_a_batch_job_wait() {
    let stand = stand(Config { token_stall_secs: 1, ..Config::default() }).await;
    let worker = stand.worker(1, Manner::Idle).await;
    let job = InferRequest { class: ServiceClass::Batch, ..wanting_progress(&stand) };
    let answer = submit(&stand, &job, Duration::from_millis(2_500)).await.expect("accepted");
    let (chunks, _, error) = listen(answer).await;
    assert_eq!((chunks, error.map(|error| error.code)), (vec![], Some(ErrorCode::DeadlineExceeded)));
    assert_eq!(worker.jobs_seen(), 1);
}

//! Answers that outlive the worker that began them.

use std::time::Duration;

use futures_util::FutureExt as _;
use metadata_store::{DurableState, TerminalState};
use protocol::health::{HealthReport, ModelServer, ServerKind};
use protocol::infer::{Delivered, DeliveredAnswer, DeliveredText, InferChunk, InferRequest, OutputFormat, SUBMIT};
use protocol::{ErrorCode, WireError, codec};
use rpc::{ResponseStream, StreamOptions};
use tether_orchestrator::Config;
use tokio::time::{self, Instant};

use crate::stand::{Manner, Stand, Worker, stand};

/// The answer of fake workers with so many chunks.
fn whole(chunks: u64) -> String {
    (0..chunks).fold(String::new(), |text, seq| text + &format!("{seq} "))
}

/// Checks that chunks are the whole answer, without a gap or a repeat; returns the last.
fn check(chunks: &[InferChunk]) -> &InferChunk {
    let (last, parts) = chunks.split_last().expect("an end");
    let text: String = parts.iter().map(|chunk| chunk.payload.text.as_str()).collect();
    assert_eq!(text, whole(parts.len() as u64));
    assert!(chunks.iter().zip(0..).all(|(chunk, seq)| chunk.seq == seq), "{chunks:?}");
    assert!(last.done && chunks.is_sorted_by_key(|chunk| chunk.attempt));
    last
}

/// Reads an answer whose beginning was read.
async fn rest(mut answer: ResponseStream, mut chunks: Vec<InferChunk>) -> Result<Vec<InferChunk>, WireError> {
    while let Some(chunk) = answer.next().await {
        chunks.push(codec::decode(&chunk?).expect("a chunk"));
    }
    Ok(chunks)
}

/// Submits a job and reads so many chunks.
async fn begin(stand: &Stand, job: &InferRequest, count: u64) -> (ResponseStream, Vec<InferChunk>) {
    // A gateway waits longer for the next chunk than an answer waits for a worker.
    let options =
        StreamOptions { accept_within: Duration::from_secs(5), deadline: None, stall: Duration::from_mins(2) };
    let answer = stand.gateway.open_stream(stand.orchestrator, SUBMIT, codec::encode(job).into(), options).await;
    let (mut answer, mut chunks) = (answer.expect("accepted"), vec![]);
    for _ in 0..count {
        let chunk = answer.next().await.expect("a chunk").expect("no error");
        chunks.push(codec::decode(&chunk).expect("a chunk"));
    }
    (answer, chunks)
}

/// Waits until a worker was given so many jobs. It reports all the while: no other can continue its answer, so it is
/// asked again once it has reported.
async fn until_asked(stand: &Stand, worker: &Worker, jobs: usize) {
    while worker.jobs_seen() < jobs {
        worker.report(stand, |_| {}).await.expect("believed");
        time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn another_worker_continues_an_answer_and_each_token_is_billed_once() {
    for manner in [Manner::DieAfter(3), Manner::CrashAfter(3)] {
        let stand = stand(Config::default()).await;
        let (dying, healthy) = stand.pair(manner, Manner::Answer(8)).await;
        let job = stand.job();
        let chunks = stand.answer(&job).await.expect("answered");
        let last = check(&chunks);
        assert_eq!((chunks.len(), last.attempt, last.payload.continued), (9, 2, 1));
        assert_eq!((dying.jobs_seen(), healthy.jobs_seen()), (1, 1));
        let usage = stand.usage().await;
        assert_eq!(usage.len(), 1);
        assert_eq!((usage[0].usage.prompt_tokens, usage[0].usage.completion_tokens), (3, 8));
        assert_eq!(last.payload.usage, Some(usage[0].usage));
        assert!(stand.metrics.encode().contains("phase=\"mid_stream\""));
    }
}

#[tokio::test]
async fn an_answer_moves_on_as_often_as_its_workers_die_after_new_tokens() {
    let stand = stand(Config::default()).await;
    let mut workers = vec![];
    for number in 1..=6 {
        workers.push(stand.worker(number, Manner::DieAfter(number.into())).await);
    }
    workers.sort_by_key(|worker| worker.key.public_key());
    for (worker, chunks) in workers.iter().zip([2, 4, 6, 8, 10]) {
        *worker.manner.lock() = Manner::DieAfter(chunks);
    }
    *workers[5].manner.lock() = Manner::Answer(12);
    let chunks = stand.answer(&stand.job()).await.expect("answered");
    let last = check(&chunks);
    assert_eq!((chunks.len(), last.payload.continued), (13, 5));
}

#[tokio::test]
async fn nobody_tries_a_fourth_time_to_continue_an_answer() {
    let stand = stand(Config::default()).await;
    let mut workers = vec![];
    for number in 1..=6 {
        workers.push(stand.worker(number, Manner::DieAfter(2)).await);
    }
    let job = stand.job();
    let (answer, chunks) = begin(&stand, &job, 2).await;
    let error = rest(answer, chunks).await.expect_err("nobody gets further");
    assert_eq!(error.code, ErrorCode::WorkerFailed);
    assert_eq!(workers.iter().map(Worker::jobs_seen).sum::<usize>(), 1 + 3);
    assert_eq!(stand.settled(&job).await.state, DurableState::Settled(TerminalState::Failed));
    assert_eq!(stand.usage().await, []);
}

#[tokio::test]
async fn stopping_workers_hand_a_job_over_and_it_counts_against_nobody() {
    // Before its first token, after some, and by workers that add none.
    for chunks in [0, 2] {
        let stand = stand(Config { attempts_max: 1, ..Config::default() }).await;
        let mut workers = vec![];
        for number in 1..=6 {
            workers.push(stand.worker(number, Manner::LeaveAfter(chunks)).await);
        }
        workers.sort_by_key(|worker| worker.key.public_key());
        *workers[5].manner.lock() = Manner::Answer(4);
        for _ in 0..10 {
            let answer = stand.answer(&stand.job()).await.expect("answered");
            assert_eq!((answer.len(), check(&answer).payload.continued), (5, u32::from(chunks > 0)));
        }
        assert_eq!(workers.iter().map(Worker::jobs_seen).collect::<Vec<_>>(), [10; 6], "nobody is ejected");
        assert!(stand.usage().await.iter().all(|usage| usage.usage.completion_tokens == 4));
        let breaker = format!("tether_breaker_transitions_total{{model=\"{}\"", stand.job().model());
        assert!(!stand.metrics.encode().contains(&breaker), "no breaker opens");
    }
}

#[tokio::test]
async fn an_answer_waits_for_a_worker_that_can_continue_it() {
    let stand = stand(Config::default()).await;
    let only = stand.worker(1, Manner::DieAfter(2)).await;
    let (answer, chunks) = begin(&stand, &stand.job(), 2).await;
    until_asked(&stand, &only, 2).await;
    stand.worker(2, Manner::Answer(5)).await;
    let chunks = rest(answer, chunks).await.expect("answered");
    assert_eq!((chunks.len(), check(&chunks).payload.continued), (6, 1));
}

#[tokio::test]
async fn an_answer_waits_for_30_seconds_and_asks_nobody_in_vain() {
    let stand = stand(Config::default()).await;
    let only = stand.worker(1, Manner::DieAfter(2)).await;
    let job = stand.job();
    let (mut answer, _) = begin(&stand, &job, 2).await;
    only.report(&stand, |report| report.draining = true).await.expect("believed");
    time::pause();
    let begun = Instant::now();
    let end = answer.next().await.expect("an end").expect_err("nobody came");
    let waited = begun.elapsed();
    time::resume();
    assert_eq!(WireError::from(end).code, ErrorCode::WorkerFailed);
    assert!((29..32).contains(&waited.as_secs()), "{waited:?}");
    assert!(only.jobs_seen() <= 2, "it is asked again once at most, before it drained");
    assert_eq!(stand.settled(&job).await.state, DurableState::Settled(TerminalState::Failed));
    assert!(stand.explain(&job).await.attempts.len() <= 4);
}

#[tokio::test]
async fn a_caller_that_leaves_while_its_answer_waits_pays_for_what_it_read() {
    let stand = stand(Config::default()).await;
    let only = stand.worker(1, Manner::DieAfter(2)).await;
    let job = InferRequest { acknowledges: true, ..stand.job() };
    let mut answer = stand.submit(&job).await.expect("accepted");
    answer.acknowledge_reads();
    for _ in 0..2 {
        answer.next().await.expect("a chunk").expect("no error");
    }
    assert!(answer.next().now_or_never().is_none(), "who asks for the next chunk has read this one");
    while only.jobs_seen() < 1 {
        time::sleep(Duration::from_millis(10)).await;
    }
    drop(answer);
    let record = stand.settled(&job).await;
    assert_eq!(record.state, DurableState::Settled(TerminalState::Cancelled));
    assert_eq!(record.usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens)), Some((3, 2)));
}

#[tokio::test]
async fn only_the_orchestrator_knows_what_was_delivered() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(3)).await;
    let answers = vec![DeliveredAnswer { tokens: vec![7, 8], ..DeliveredAnswer::default() }];
    let forged = InferRequest { delivered: Some(Delivered { seq: 1000, answers }), ..stand.job() };
    let chunks = stand.answer(&forged).await.expect("answered");
    assert_eq!((chunks.len(), check(&chunks).payload.continued, worker.jobs_seen()), (4, 0, 1));
}

#[tokio::test]
async fn whoever_cannot_continue_an_answer_is_not_asked_to() {
    let stand = stand(Config::default()).await;
    let (dying, other) = stand.pair(Manner::DieAfter(2), Manner::Answer(5)).await;
    for (round, is_old) in (1..).zip([true, false]) {
        let cannot = |report: &mut protocol::health::HealthReport| {
            report.continues = !is_old;
            report.model_cache[0].attested = is_old;
        };
        other.report(&stand, cannot).await.expect("believed");
        let (_answer, chunks) = begin(&stand, &stand.job(), 2).await;
        until_asked(&stand, &dying, 2 * round).await;
        assert_eq!((chunks.len(), other.jobs_seen()), (2, 0));
    }
}

/// Makes a report that of a worker whose model runs on a server.
fn on_server(kind: ServerKind) -> impl Fn(&mut HealthReport) {
    move |report| {
        let cached = &mut report.model_cache[0];
        (cached.attested, cached.server) = (false, Some(ModelServer { kind, prefills: true }));
    }
}

#[tokio::test]
async fn a_server_of_the_same_kind_continues_the_text_of_another() {
    let stand = stand(Config::default()).await;
    let (dying, healthy) = stand.pair(Manner::DieUntold(3), Manner::Answer(8)).await;
    for worker in [&dying, &healthy] {
        worker.report(&stand, on_server(ServerKind::Vllm)).await.expect("believed");
    }
    let chunks = stand.answer(&stand.job()).await.expect("answered");
    let last = check(&chunks);
    assert_eq!((chunks.len(), last.attempt, last.payload.continued), (9, 2, 1));
    let expected = DeliveredText { text: "0 1 2 ".into(), tokens: 2 };
    let seen = healthy.delivered.lock().clone().expect("it continues");
    assert_eq!((seen.seq, seen.answers[0].text.as_ref()), (3, Some(&expected)));
}

#[tokio::test]
async fn the_text_of_a_server_goes_to_no_engine_and_to_no_other_software() {
    let stand = stand(Config::default()).await;
    let (dying, other) = stand.pair(Manner::DieUntold(2), Manner::Answer(5)).await;
    dying.report(&stand, on_server(ServerKind::Vllm)).await.expect("believed");
    for (round, is_engine) in (1..).zip([true, false]) {
        if is_engine {
            other.report(&stand, |_| {}).await.expect("believed");
        } else {
            other.report(&stand, on_server(ServerKind::LlamaServer)).await.expect("believed");
        }
        let (_answer, chunks) = begin(&stand, &stand.job(), 2).await;
        while dying.jobs_seen() < 2 * round {
            dying.report(&stand, on_server(ServerKind::Vllm)).await.expect("believed");
            time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!((chunks.len(), other.jobs_seen()), (2, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_constrained_answer_of_a_server_ends_with_an_error_at_once() {
    let stand = stand(Config::default()).await;
    let (dying, healthy) = stand.pair(Manner::DieUntold(3), Manner::Answer(8)).await;
    for worker in [&dying, &healthy] {
        worker.report(&stand, on_server(ServerKind::Vllm)).await.expect("believed");
    }
    let mut job = stand.job();
    job.input.format = OutputFormat::Json;
    let begun = Instant::now();
    let (answer, chunks) = begin(&stand, &job, 3).await;
    let error = rest(answer, chunks).await.expect_err("its format would begin anew");
    assert_eq!((error.code, healthy.jobs_seen()), (ErrorCode::WorkerFailed, 0));
    assert!(begun.elapsed() < Duration::from_secs(10), "nobody is waited for");
}

#[tokio::test]
async fn an_engine_that_crashes_again_on_a_continued_answer_ends_it() {
    let stand = stand(Config::default()).await;
    let (first, second) = stand.pair(Manner::CrashAfter(2), Manner::CrashAfter(4)).await;
    let third = stand.worker(3, Manner::Answer(9)).await;
    third.report(&stand, |report| report.draining = true).await.expect("believed");
    let (answer, chunks) = begin(&stand, &stand.job(), 4).await;
    let error = rest(answer, chunks).await.expect_err("two engines crashed on it");
    assert_eq!(error.code, ErrorCode::RequestCrashesEngine);
    assert_eq!((first.jobs_seen(), second.jobs_seen(), third.jobs_seen()), (1, 1, 0));
}

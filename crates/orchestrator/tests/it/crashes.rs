//! What an engine's crash does to the job it worked on, and to all others.

use metadata_store::{DurableState, TerminalState};
use protocol::ErrorCode;
use protocol::infer::InferRequest;
use tether_orchestrator::Config;
use tokio::task::JoinSet;

use crate::stand::{Manner, Stand, Worker, stand, submit};

fn about(stand: &Stand, prompt: &str) -> InferRequest {
    let input = serde_json::from_value(prompt.into()).expect("a prompt");
    InferRequest { input, ..stand.job() }
}

fn seen(workers: &[Worker]) -> usize {
    workers.iter().map(Worker::jobs_seen).sum()
}

#[tokio::test]
async fn a_request_on_which_two_engines_crashed_is_given_to_no_third() {
    let stand = stand(Config::default()).await;
    let mut workers = vec![];
    for number in 1..=4 {
        workers.push(stand.worker(number, Manner::Crash(1)).await);
    }
    let job = about(&stand, "poison");
    let error = stand.answer(&job).await.expect_err("engines crash on it");
    assert_eq!((error.code, error.should_retry()), (ErrorCode::RequestCrashesEngine, false));
    assert!(!error.message.contains("try again"), "{error}");
    assert_eq!(seen(&workers), 2);
    let record = stand.record(&job).await.expect("kept");
    assert_eq!(record.state, DurableState::Settled(TerminalState::Dead));
    assert_eq!(record.error.map(|error| error.code), Some(ErrorCode::RequestCrashesEngine));
    assert_eq!(stand.usage().await, []);

    // A client that repeats it all the same reaches no engine.
    let error = stand.answer(&about(&stand, "poison")).await.expect_err("it is known");
    assert_eq!((error.code, seen(&workers)), (ErrorCode::RequestCrashesEngine, 2));
    for worker in &workers {
        *worker.manner.lock() = Manner::Answer(1);
    }
    stand.answer(&about(&stand, "another")).await.expect("others are answered");
}

#[tokio::test]
async fn repeats_of_one_request_count_together_where_one_worker_serves_it() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Crash(1)).await;
    let first = stand.answer(&stand.job()).await.expect_err("it crashes");
    assert_eq!((first.code, first.should_retry()), (ErrorCode::WorkerFailed, true));
    let second = stand.answer(&stand.job()).await.expect_err("it crashes again");
    let third = stand.answer(&stand.job()).await.expect_err("it is known");
    assert_eq!((second.code, third.code), (ErrorCode::RequestCrashesEngine, ErrorCode::RequestCrashesEngine));
    assert_eq!(worker.jobs_seen(), 2);
}

#[tokio::test]
async fn whoever_ran_beside_the_cause_is_answered_by_another_engine_every_time() {
    let stand = stand(Config::default()).await;
    let (crashing, healthy) = stand.pair(Manner::Crash(4), Manner::Answer(1)).await;
    for round in 1..=20 {
        let chunks = stand.answer(&stand.job()).await.expect("answered by the other");
        assert_eq!(chunks[0].attempt, 2);
        assert_eq!((crashing.jobs_seen(), healthy.jobs_seen()), (round, round));
    }
}

#[tokio::test]
async fn crashes_count_against_requests_and_never_against_the_model() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Crash(1)).await;
    for number in 0..30 {
        let job = about(&stand, &format!("poison {number}"));
        assert_eq!(stand.answer(&job).await.expect_err("it crashes").code, ErrorCode::WorkerFailed);
    }
    *worker.manner.lock() = Manner::Answer(1);
    stand.answer(&about(&stand, "hi")).await.expect("the breaker is closed");
}

#[tokio::test]
async fn a_worker_that_dies_under_many_jobs_counts_once_and_all_of_them_move_on() {
    const JOBS: usize = 36;
    let stand = stand(Config::default()).await;
    let (dying, healthy) = stand.pair(Manner::Wait, Manner::Answer(1)).await;
    dying.report(&stand, |report| report.capacity.slots = 64).await.expect("believed");
    healthy.report(&stand, |report| report.draining = true).await.expect("believed");
    let mut answers = JoinSet::new();
    for _ in 0..JOBS {
        let (gateway, orchestrator, job) = (stand.gateway.clone(), stand.orchestrator, stand.job());
        answers.spawn(async move {
            let mut answer = submit(&gateway, orchestrator, &job).await?;
            while let Some(chunk) = answer.next().await {
                chunk?;
            }
            Ok::<(), rpc::CallError>(())
        });
    }
    while dying.jobs_seen() < JOBS {
        tokio::task::yield_now().await;
    }
    healthy.report(&stand, |report| report.capacity.slots = 64).await.expect("believed");
    stand.network.cut(dying.key.public_key());
    for answered in answers.join_all().await {
        answered.expect("answered by the other");
    }
    stand.answer(&stand.job()).await.expect("the breaker is closed");
    assert!(!stand.metrics.encode().contains("tether_breaker_transitions_total{"));
}

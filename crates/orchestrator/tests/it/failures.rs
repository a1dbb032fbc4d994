use std::time::Duration;

use metadata_store::{DurableState, TerminalState};
use protocol::ErrorCode;
use tether_orchestrator::Config;
use tokio::time::Instant;

use crate::stand::{Manner, Worker, stand};

#[tokio::test]
async fn workers_that_are_all_full_get_a_tenth_more_than_the_jobs() {
    const JOBS: usize = 1_000;
    let stand = stand(Config::default()).await;
    let mut workers = vec![];
    for number in 1..=3 {
        workers.push(stand.worker(number, Manner::Refuse(ErrorCode::WorkerFull)).await);
    }
    for _ in 0..JOBS {
        stand.answer(&stand.job()).await.expect_err("nobody has room");
    }
    let seen: usize = workers.iter().map(Worker::jobs_seen).sum();
    // A hundred at once and one a second are always allowed.
    assert!(seen > JOBS && seen <= JOBS * 11 / 10 + 100 + 60, "{seen}");
}

#[tokio::test]
async fn a_worker_that_refuses_or_dies_before_the_first_token_costs_nothing() {
    for manner in [
        Manner::Refuse(ErrorCode::WorkerFull),
        Manner::Refuse(ErrorCode::WorkerStopping),
        Manner::Refuse(ErrorCode::ModelNotHere),
        Manner::Refuse(ErrorCode::WorkerFailed),
        Manner::DieAfter(0),
        Manner::WrongAttempt,
    ] {
        let stand = stand(Config::default()).await;
        let (bad, good) = stand.pair(manner, Manner::Answer(2)).await;
        let job = stand.job();
        let chunks = stand.answer(&job).await.expect("answered by the other");
        assert_eq!(chunks.len(), 3);
        assert!(chunks.iter().all(|chunk| chunk.attempt == 2), "{chunks:?}");
        assert_eq!((bad.jobs_seen(), good.jobs_seen()), (1, 1));
        let record = stand.record(&job).await.expect("kept");
        assert_eq!((record.attempt, record.worker_id), (2, good.key.public_key()));
        assert_eq!(stand.usage().await.len(), 1);
    }
}

#[tokio::test]
async fn nobody_tries_a_fourth_time() {
    let stand = stand(Config::default()).await;
    let mut workers = vec![];
    for number in 1..=5 {
        workers.push(stand.worker(number, Manner::DieAfter(0)).await);
    }
    let job = stand.job();
    let error = stand.answer(&job).await.expect_err("all die");
    assert_eq!(error.code, ErrorCode::WorkerFailed);
    assert_eq!(workers.iter().map(super::stand::Worker::jobs_seen).sum::<usize>(), 3);
    let record = stand.record(&job).await.expect("kept");
    assert_eq!(record.state, DurableState::Settled(TerminalState::Failed));
    assert_eq!(record.error.map(|error| error.code), Some(ErrorCode::WorkerFailed));
    assert_eq!(stand.usage().await, []);
}

#[tokio::test]
async fn an_answer_that_broke_off_and_cannot_continue_is_an_error_and_is_not_billed() {
    let stand = stand(Config::default()).await;
    stand.worker(1, Manner::DieUntold(2)).await;
    let healthy = stand.worker(2, Manner::DieUntold(2)).await;
    let job = stand.job();
    let mut answer = stand.submit(&job).await.expect("accepted");
    answer.next().await.expect("a chunk").expect("no error");
    answer.next().await.expect("a chunk").expect("no error");
    let end = answer.next().await.expect("an end").expect_err("the worker died");
    assert_eq!(protocol::WireError::from(end).code, ErrorCode::WorkerFailed);
    assert_eq!(stand.settled(&job).await.state, DurableState::Settled(TerminalState::Failed));
    assert_eq!(stand.usage().await, []);
    assert!(healthy.jobs_seen() <= 1);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_does_not_acknowledge_is_set_aside() {
    let stand = stand(Config::default()).await;
    let mute = stand.worker(1, Manner::Mute).await;
    let began = Instant::now();
    let error = stand.answer(&stand.job()).await.expect_err("nobody else is there");
    assert_eq!(error.code, ErrorCode::WorkerFailed);
    assert!((500..1000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    let answering = stand.worker(2, Manner::Answer(1)).await;
    for _ in 0..5 {
        stand.answer(&stand.job()).await.expect("answered");
    }
    assert_eq!((mute.jobs_seen(), answering.jobs_seen()), (1, 5));
    // A worker that was started anew is not blamed for what it was.
    *mute.manner.lock() = Manner::Answer(1);
    mute.report(&stand, |report| report.epoch = 2).await.expect("believed");
    answering.report(&stand, |report| report.draining = true).await.expect("believed");
    stand.answer(&stand.job()).await.expect("answered by the restarted one");
}

#[tokio::test]
async fn one_late_acknowledgement_does_not_shut_a_network_of_one_worker() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Mute).await;
    let error = stand.answer(&stand.job()).await.expect_err("it does not acknowledge");
    assert_eq!(error.code, ErrorCode::WorkerFailed);
    *worker.manner.lock() = Manner::Answer(1);
    stand.answer(&stand.job()).await.expect("there is no other");
}

#[tokio::test]
async fn a_worker_cut_off_in_mid_dispatch_fails_over() {
    let stand = stand(Config::default()).await;
    let (first, _second) = stand.pair(Manner::Answer(1), Manner::Answer(1)).await;
    stand.network.cut(first.key.public_key());
    let chunks = stand.answer(&stand.job()).await.expect("answered by the other");
    assert_eq!(chunks[0].attempt, 2);
}

#[tokio::test]
async fn a_deadline_ends_a_job_that_hangs() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Wait).await;
    let job = stand.job();
    let options = rpc::StreamOptions {
        accept_within: Duration::from_secs(5),
        deadline: Some(Duration::from_millis(300)),
        stall: Duration::from_secs(5),
    };
    let body = protocol::codec::encode(&job).into();
    let refused = stand.gateway.open_stream(stand.orchestrator, protocol::infer::SUBMIT, body, options).await;
    let refused = protocol::WireError::from(refused.expect_err("the deadline passes"));
    assert_eq!(refused.code, ErrorCode::DeadlineExceeded);
    worker.cancelled.notified().await;
    assert_eq!(stand.settled(&job).await.state, DurableState::Settled(TerminalState::Failed));
}

#[tokio::test]
async fn a_model_that_keeps_failing_opens_its_breaker_and_a_probe_closes_it() {
    let mut config = Config::default();
    config.breaker.open_secs = 1;
    let stand = stand(config).await;
    let worker = stand.worker(1, Manner::DieAfter(0)).await;
    for _ in 0..10 {
        stand.answer(&stand.job()).await.expect_err("the worker dies");
    }
    let seen = worker.jobs_seen();
    let refused = stand.answer(&stand.job()).await.expect_err("the breaker is open");
    assert_eq!(refused.code, ErrorCode::BreakerOpen);
    assert!(refused.retry_after_ms.is_some_and(|wait| wait <= 1000));
    assert_eq!(worker.jobs_seen(), seen);
    *worker.manner.lock() = Manner::Answer(1);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    stand.answer(&stand.job()).await.expect("the probe");
    stand.answer(&stand.job()).await.expect("closed again");
    assert!(stand.metrics.encode().contains("tether_breaker_state{model=\"tether-tiny@1.0\",region=\"local\"} 0"));
}

#[tokio::test(start_paused = true)]
async fn a_quick_model_that_becomes_slow_opens_its_breaker_and_a_slow_probe_closes_it() {
    let mut config = Config::default();
    (config.breaker.window_secs, config.breaker.failure_ratio) = (3_600, 0.3);
    let stand = stand(config).await;
    let worker = stand.worker(1, Manner::Answer(1)).await;
    let answer = || async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        worker.report(&stand, |_| {}).await.expect("believed");
        stand.answer(&stand.job()).await
    };
    for _ in 0..20 {
        answer().await.expect("answered as usual");
    }
    *worker.manner.lock() = Manner::Late(12);
    let mut slow = 0;
    let refused = loop {
        match answer().await {
            Ok(_) => slow += 1,
            Err(error) => break error,
        }
    };
    // Eight of 28 are less than three tenths, nine of 29 are more.
    assert_eq!((refused.code, slow), (ErrorCode::BreakerOpen, 9));
    tokio::time::sleep(Duration::from_secs(5)).await;
    answer().await.expect("the probe");
    answer().await.expect("closed again");
}

#[tokio::test]
async fn callers_faults_do_not_open_the_breaker() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Refuse(ErrorCode::ContextLengthExceeded)).await;
    for _ in 0..20 {
        let error = stand.answer(&stand.job()).await.expect_err("too long");
        assert_eq!(error.code, ErrorCode::ContextLengthExceeded);
    }
    assert_eq!(worker.jobs_seen(), 20);
}

#[tokio::test]
async fn a_job_that_was_accepted_is_not_refused_by_the_breaker_that_opens_meanwhile() {
    let stand = stand(Config::default()).await;
    let (first, second) = stand.pair(Manner::Wait, Manner::DieAfter(0)).await;
    let job = stand.job();
    let waiting = stand.submit(&job);
    let failing = async {
        while first.jobs_seen() == 0 {
            tokio::task::yield_now().await;
        }
        first.report(&stand, |report| report.draining = true).await.expect("believed");
        for _ in 0..10 {
            stand.answer(&stand.job()).await.expect_err("the worker dies");
        }
        assert_eq!(stand.answer(&stand.job()).await.expect_err("refused").code, ErrorCode::BreakerOpen);
        *second.manner.lock() = Manner::Answer(1);
        stand.network.cut(first.key.public_key());
    };
    let (answer, ()) = tokio::join!(waiting, failing);
    answer.expect("accepted").next().await.expect("a chunk").expect("answered by the other");
}

#[tokio::test]
async fn a_worker_that_is_stopped_in_mid_answer_is_named_as_such_and_not_as_a_lack_of_room() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::StopAfter(2)).await;
    let job = stand.job();
    let error = stand.answer(&job).await.expect_err("it stops");
    assert_eq!(error.code, ErrorCode::WorkerFailed);
    assert!(error.message.contains("stopped in the middle of the answer"), "{error}");
    assert_eq!(stand.settled(&job).await.state, DurableState::Settled(TerminalState::Failed));
    assert_eq!(stand.usage().await, []);
    // A stop is no fault: neither the worker nor the model is shut out.
    for _ in 0..12 {
        stand.answer(&stand.job()).await.expect_err("it stops");
    }
    *worker.manner.lock() = Manner::Answer(1);
    stand.answer(&stand.job()).await.expect("answered");
}

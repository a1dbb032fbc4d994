//! What operators see of jobs, and what they do with them.

use std::sync::Arc;
use std::time::Duration;

use metadata_store::{DurableState, JobStore as _, SqliteStore, TerminalState};
use protocol::control::{ExplainRequest, JOB_EXPLAIN, NodeRole};
use protocol::infer::InferChunk;
use protocol::jobs::{
    DEAD_LETTER_LIST, DEAD_LETTER_PURGE, DEAD_LETTER_RELEASE, DEAD_LETTER_SHOW, DeadLetter, DeadLetterPage,
    DeadLetterPurge, DeadLetterQuery, DeadLetterRef, DeadLettersPurged, JOB_CANCEL, JOB_LIST, JOB_SHOW, JobPage,
    JobQuery, JobRef, JobStatus, JobsCancelled,
};
use protocol::{ErrorCode, PublicKey, codec};
use rpc::{CallError, Client};
use serde_json::{Value, json};
use tether_orchestrator::Config;
use tokio::time;

use crate::stand::{Manner, OPERATOR, certificate, key, membership, stand, stand_on};

const SECOND: Duration = Duration::from_secs(1);

fn code<T>(outcome: &Result<T, CallError>) -> Option<ErrorCode> {
    match outcome {
        Err(CallError::Remote(error)) => Some(error.code),
        _ => None,
    }
}

#[tokio::test]
async fn a_job_is_explained_after_the_fact_also_when_its_candidates_are_forgotten() {
    let stand = stand(Config { decisions_kept: 1, ..Config::default() }).await;
    let (refusing, answering) = stand.pair(Manner::Refuse(ErrorCode::WorkerFailed), Manner::Answer(1)).await;
    let (refusing, answering) = (refusing.key.public_key(), answering.key.public_key());
    let job = stand.job();
    stand.answer(&job).await.expect("answered");
    let ends = |decision: &protocol::control::Decision| -> Vec<(Option<PublicKey>, String)> {
        decision.attempts.iter().map(|attempt| (attempt.chosen, attempt.outcome.clone())).collect()
    };
    let expected = [(Some(refusing), "worker_failed".to_owned()), (Some(answering), "completed".to_owned())];
    let fresh = stand.explain(&job).await;
    assert_eq!(ends(&fresh), expected);
    let (best, weights) = (&fresh.attempts[0].candidates[0], fresh.weights.expect("weights"));
    let sum = best.model_match * weights.model_match
        + best.region_proximity * weights.region_proximity
        + best.queue_depth * weights.queue_depth
        + best.warm_cache * weights.warm_cache
        + best.speed * weights.speed;
    assert!((sum - best.score).abs() < 1e-9, "{best:?}");
    let kept = fresh.job.expect("kept");
    assert_eq!((kept.status, kept.attempts, kept.continued), (JobStatus::Completed, 2, 0));
    assert_eq!(kept.history.iter().map(|attempt| attempt.counted).collect::<Vec<_>>(), [true, false]);

    // Another job takes its place in the log.
    stand.answer(&stand.job()).await.expect("answered");
    let later = stand.explain(&job).await;
    assert_eq!(ends(&later), expected);
    assert!(later.attempts.iter().all(|attempt| attempt.candidates.is_empty()));
    assert_eq!(later.job, Some(kept));

    let unknown = ExplainRequest { correlation_id: stand.job().correlation_id };
    let asked = stand.gateway.call::<_, Value>(stand.orchestrator, JOB_EXPLAIN, &unknown, SECOND).await;
    assert_eq!(code(&asked), Some(ErrorCode::NotFound));
}

#[tokio::test]
async fn jobs_are_listed_and_shown_while_they_run_and_afterwards() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(2)).await;
    let done = stand.job();
    stand.answer(&done).await.expect("answered");
    *worker.manner.lock() = Manner::Hang;
    let running = stand.job();
    let mut stream = stand.submit(&running).await.expect("accepted");
    stream.next().await.expect("a chunk").expect("a good one");
    let list = async |status| {
        let query = JobQuery { status, limit: 10, ..JobQuery::default() };
        let page: JobPage = stand.ask(JOB_LIST, &query).await;
        assert_eq!(page.next, None);
        page.jobs.iter().map(|job| (job.correlation_id, job.status)).collect::<Vec<_>>()
    };
    let expected = [(running.correlation_id, JobStatus::Running), (done.correlation_id, JobStatus::Completed)];
    assert_eq!(list(None).await, expected);
    assert_eq!(list(Some(JobStatus::Running)).await, expected[..1]);
    let shown: JobPage = stand.ask(JOB_SHOW, &JobRef { correlation_id: done.correlation_id }).await;
    let [job] = &shown.jobs[..] else { panic!("one job: {shown:?}") };
    assert_eq!((job.history.len(), job.history[0].outcome.as_str()), (1, "completed"));
    assert_eq!((job.worker_id, job.usage.expect("billed").completion_tokens), (worker.key.public_key(), 2));
}

#[tokio::test]
async fn a_job_that_an_operator_cancels_ends_with_an_honest_error_and_is_billed_as_far_as_it_was_read() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let job = stand.job();
    let mut stream = stand.submit(&job).await.expect("accepted");
    let first: InferChunk = codec::decode(&stream.next().await.expect("a chunk").expect("a good one")).expect("one");
    assert_eq!(first.seq, 0);
    let request = JobRef { correlation_id: job.correlation_id };
    let cancelled: JobsCancelled = stand.operate(JOB_CANCEL, &request).await.expect("allowed");
    assert_eq!(cancelled.jobs.iter().map(|job| job.status).collect::<Vec<_>>(), [JobStatus::Cancelled]);
    let Some(Err(CallError::Remote(error))) = stream.next().await else { panic!("the answer ends with an error") };
    assert_eq!((error.code, error.should_retry()), (ErrorCode::CancelledByOperator, false));
    time::timeout(SECOND * 60, worker.cancelled.notified()).await.expect("the worker was told to stop");
    let record = stand.record(&job).await.expect("kept");
    assert_eq!(record.state, DurableState::Settled(TerminalState::Cancelled));
    assert_eq!(record.error.map(|error| error.code), Some(ErrorCode::CancelledByOperator));
    assert_eq!(record.usage.map(|usage| usage.completion_tokens), Some(1));
    let query = DeadLetterQuery { limit: 10, ..DeadLetterQuery::default() };
    assert_eq!(stand.store.list_dead_letters(query).await.expect("readable").dead_letters, []);

    let again: JobsCancelled = stand.operate(JOB_CANCEL, &request).await.expect("allowed");
    assert_eq!(again.jobs, [], "it no longer runs");
}

#[tokio::test]
async fn a_job_is_cancelled_while_its_worker_says_nothing_and_while_its_answer_waits_for_another() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Wait).await;
    let silent = stand.job();
    let (gateway, orchestrator) = (stand.gateway.clone(), stand.orchestrator);
    let cancel = async |job: &protocol::infer::InferRequest| {
        let request = JobRef { correlation_id: job.correlation_id };
        stand.operate::<JobsCancelled>(JOB_CANCEL, &request).await.expect("allowed").jobs.len()
    };
    let submitted = crate::stand::submit(&gateway, orchestrator, &silent);
    let cancelling = async {
        while worker.jobs_seen() < 1 {
            time::sleep(SECOND / 100).await;
        }
        cancel(&silent).await
    };
    let (refused, cancelled) = tokio::join!(submitted, cancelling);
    assert_eq!((code(&refused), cancelled), (Some(ErrorCode::CancelledByOperator), 1));
    assert_eq!(stand.usage().await, [], "nothing was read");

    // No other worker can continue this one.
    *worker.manner.lock() = Manner::CrashAfter(1);
    let waiting = stand.job();
    let mut stream = stand.submit(&waiting).await.expect("accepted");
    stream.next().await.expect("a chunk").expect("a good one");
    while stand.record(&waiting).await.is_none_or(|record| record.state != DurableState::Reserved) {
        time::sleep(SECOND / 100).await;
    }
    time::sleep(SECOND / 2).await;
    assert_eq!(cancel(&waiting).await, 1);
    let Some(Err(CallError::Remote(error))) = stream.next().await else { panic!("the answer ends with an error") };
    assert_eq!(error.code, ErrorCode::CancelledByOperator);
}

#[tokio::test]
async fn a_dead_letter_is_listed_shown_released_and_deleted() {
    let stand = stand(Config::default()).await;
    let (first, second) = stand.pair(Manner::Crash(1), Manner::Crash(1)).await;
    let job = stand.job();
    stand.answer(&job).await.expect_err("engines crash on it");
    let id = job.correlation_id;
    let query = DeadLetterQuery { limit: 10, ..DeadLetterQuery::default() };
    let page: DeadLetterPage = stand.operate(DEAD_LETTER_LIST, &query).await.expect("allowed");
    assert_eq!(page.dead_letters.iter().map(|letter| letter.correlation_id).collect::<Vec<_>>(), [id]);
    let show = async |payload| {
        let request = DeadLetterRef { correlation_id: id, payload };
        stand.operate::<DeadLetter>(DEAD_LETTER_SHOW, &request).await
    };
    assert_eq!(show(false).await.expect("there").request, None);
    let request = show(true).await.expect("there").request.expect("kept");
    assert_eq!((&request.input, request.model()), (&job.input, job.model()));

    // Whoever repeats the request is refused until an operator releases it.
    for worker in [&first, &second] {
        *worker.manner.lock() = Manner::Answer(1);
    }
    assert_eq!(stand.answer(&stand.job()).await.expect_err("known").code, ErrorCode::RequestCrashesEngine);
    stand.operate::<DeadLetter>(DEAD_LETTER_RELEASE, JobRef { correlation_id: id }).await.expect("there");
    stand.answer(&stand.job()).await.expect("it runs again");

    let purge = DeadLetterPurge { correlation_id: Some(id), ..DeadLetterPurge::default() };
    let purged: DeadLettersPurged = stand.operate(DEAD_LETTER_PURGE, &purge).await.expect("allowed");
    assert_eq!(purged.purged, 1);
    assert_eq!(code(&show(false).await), Some(ErrorCode::NotFound));
}

#[tokio::test]
async fn operators_calls_are_for_gateways_that_bring_an_operators_token() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(1)).await;
    let id = json!(stand.job().correlation_id);
    let of_request = json!({ "correlationId": id });
    let by_gateway =
        [(JOB_LIST, json!({ "limit": 1 })), (JOB_SHOW, of_request.clone()), (JOB_EXPLAIN, of_request.clone())];
    let by_operator = [
        (JOB_CANCEL, of_request.clone()),
        (DEAD_LETTER_LIST, json!({ "limit": 1 })),
        (DEAD_LETTER_SHOW, of_request.clone()),
        (DEAD_LETTER_RELEASE, of_request),
        (DEAD_LETTER_PURGE, json!({ "correlationId": id })),
    ];
    let stranger = Client::new(stand.network.node(&key(66)));
    let elsewhere = protocol::membership::Certificate {
        regions: vec!["mars".parse().expect("region")],
        ..certificate(67, NodeRole::Gateway)
    };
    let elsewhere = Client::new(stand.network.node(&key(67))).with_membership(membership(&elsewhere));
    let call = async |client: &Client, method: &str, request: &Value| {
        code(&client.call::<_, Value>(stand.orchestrator, method, request, SECOND).await)
    };
    let tokens =
        [("", Some(ErrorCode::InvalidApiKey)), ("caller", Some(ErrorCode::InsufficientScope)), (OPERATOR, None)];
    let all = by_gateway.iter().map(|row| (row, false)).chain(by_operator.iter().map(|row| (row, true)));
    for ((method, request), needs_token) in all {
        for (token, denial) in tokens {
            let request = json!({ "token": token, "request": request });
            let request = if needs_token { &request } else { &request["request"] };
            for client in [&stranger, &worker.client, &elsewhere] {
                assert_eq!(call(client, method, request).await, Some(ErrorCode::NotEnrolled), "{method}");
            }
            let denied = call(&stand.gateway, method, request).await;
            // There is no such job, and no such letter.
            let denied = denied.filter(|code| *code != ErrorCode::NotFound);
            assert_eq!(denied, denial.filter(|_| needs_token), "{method} with {token:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn settled_jobs_and_dead_letters_are_removed_in_time_and_usage_stays() {
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    // Jobs are kept for an hour longer than their answers.
    let config = Config { jobs_kept_hours: 1, answers_kept_hours: 1, dead_letters_days: 1, ..Config::default() };
    let stand = stand_on(store.clone(), config).await;
    let now = protocol::Clock::now(&rpc::SystemClock);
    // Jobs of an earlier orchestrator: the clock of the network is the real one.
    let hours_ago = |hours: u64| protocol::UnixMillis(now.0 - hours * 3_600_000);
    for (number, hours) in [(1, 3), (2, 1), (3, 30)] {
        settle(&store, number, hours_ago(hours)).await;
    }
    let is_there = async |number| store.job(&old_job(number).key).await.expect("readable").is_some();
    // It looked when it started; the next look is a minute away.
    time::sleep(SECOND * 61).await;
    assert_eq!([is_there(1).await, is_there(2).await, is_there(3).await], [false, true, false]);
    let query = DeadLetterQuery { limit: 10, ..DeadLetterQuery::default() };
    let letters = store.list_dead_letters(query).await.expect("readable").dead_letters;
    assert_eq!(letters.iter().map(|letter| letter.died_at).collect::<Vec<_>>(), [hours_ago(1), hours_ago(3)]);
    assert_eq!(stand.usage().await.len(), 3);
    assert!(stand.metrics.encode().contains("tether_dlq_depth 2"), "{}", stand.metrics.encode());
}

fn old_job(number: u128) -> metadata_store::NewJob {
    metadata_store::NewJob {
        key: metadata_store::JobKey {
            tenant_id: "acme".parse().expect("tenant"),
            correlation_id: protocol::CorrelationId(uuid::Uuid::from_u128(number)),
            retry_token: "old".parse().expect("token"),
        },
        trace_id: protocol::TraceId([1; 16]),
        model: crate::stand::model(),
        region: crate::stand::region(),
        worker_id: key(1).public_key(),
        worker_capacity: 9,
        attempt: 1,
        now: protocol::UnixMillis(0),
        lease_until: protocol::UnixMillis(u64::MAX >> 1),
        request_fingerprint: [0; 32],
        limits: protocol::quota::QuotaLimits::default(),
        tokens: 1_000,
        counts: true,
    }
}

/// Writes a job that was settled then, with a bill and a dead letter.
async fn settle(store: &SqliteStore, number: u128, now: protocol::UnixMillis) {
    let job = old_job(number);
    store.reserve(job.clone()).await.expect("reserves");
    let usage = protocol::usage::TokenUsage { prompt_tokens: 1, ..protocol::usage::TokenUsage::default() };
    let dead_letter = metadata_store::NewDeadLetter {
        cause: protocol::jobs::DeadLetterCause::AttemptsFailed,
        history: vec![],
        payload: None,
        letters_max: 10,
        bytes_max: 10,
    };
    let settlement = metadata_store::Settlement {
        answer: None,
        note: None,
        key: job.key,
        attempt: 1,
        worker_id: job.worker_id,
        state: TerminalState::Completed,
        finish_reason: None,
        error: None,
        usage: Some(usage),
        is_bounded: false,
        now,
        history: vec![],
        continued: 0,
        dead_letter: Some(dead_letter),
    };
    store.finalise(settlement).await.expect("settles");
}

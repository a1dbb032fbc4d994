use std::sync::Arc;
use std::time::Duration;

use metadata_store::{DurableState, TerminalState};
use protocol::ErrorCode;
use protocol::health::{HealthReport, LoadProgress, ModelState};
use protocol::policy::TenantPolicy;
use protocol::prefix::PrefixChain;
use rpc::CallError;
use tether_orchestrator::Config;

use crate::stand::{Manner, model, stand};

#[tokio::test]
async fn an_answer_arrives_whole_and_is_billed_once() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(3)).await;
    let job = stand.job();
    let chunks = stand.answer(&job).await.expect("answered");
    let text: String = chunks.iter().map(|chunk| chunk.payload.text.as_str()).collect();
    assert_eq!(text, "0 1 2 ");
    assert!(chunks.iter().map(|chunk| chunk.seq).eq(0..4));
    let usage = chunks.last().and_then(|chunk| chunk.payload.usage).expect("the last chunk tells the usage");
    // Whoever holds the last chunk holds a settled job: no waiting here.
    let record = stand.record(&job).await.expect("kept");
    assert_eq!(record.state, DurableState::Settled(TerminalState::Completed));
    assert_eq!(record.worker_id, worker.key.public_key());
    let billed = stand.usage().await;
    assert_eq!(billed.iter().map(|record| record.usage).collect::<Vec<_>>(), [usage]);
    assert_eq!(stand.store.active_reservations().await.expect("readable"), []);
}

#[tokio::test]
async fn a_caller_that_leaves_stops_the_worker_and_pays_for_what_it_got() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let job = stand.job();
    let mut answer = stand.submit(&job).await.expect("accepted");
    answer.next().await.expect("a chunk").expect("no error");
    drop(answer);
    worker.cancelled.notified().await;
    let record = stand.settled(&job).await;
    assert_eq!(record.state, DurableState::Settled(TerminalState::Cancelled));
    let got =
        protocol::usage::TokenUsage { prompt_tokens: 3, completion_tokens: 1, cached_tokens: 0, reasoning_tokens: 0 };
    assert_eq!(record.usage, Some(got));
}

#[tokio::test]
async fn a_caller_that_reads_nothing_does_not_hold_its_place_for_ever() {
    let stand = stand(Config { caller_stall_secs: 1, ..Config::default() }).await;
    stand.worker(1, Manner::Answer(100_000)).await;
    let job = stand.job();
    let _unread = stand.submit(&job).await.expect("accepted");
    let record = stand.settled(&job).await;
    assert_eq!(record.state, DurableState::Settled(TerminalState::Cancelled));
    assert_eq!(stand.store.active_reservations().await.expect("readable"), []);
}

#[tokio::test]
async fn a_prompt_goes_to_the_worker_that_has_its_beginning_at_hand() {
    let stand = stand(Config::default()).await;
    let (first, second) = stand.pair(Manner::Answer(1), Manner::Answer(1)).await;
    let job = stand.job();
    let warm = |report: &mut HealthReport| {
        report.model_cache[0].prefixes = PrefixChain::of(&job).marks().collect();
        report.capacity.running = 1;
    };
    second.report(&stand, warm).await.expect("believed");
    stand.answer(&job).await.expect("answered");
    assert_eq!((first.jobs_seen(), second.jobs_seen()), (0, 1));
    let table = &stand.explain(&job).await.attempts[0].candidates;
    let terms: Vec<f64> = table.iter().map(|row| row.warm_cache).collect();
    assert_eq!(terms, [1.0, 0.0], "the table says why");
    assert!(stand.fleet().await.workers.iter().all(|worker| worker.report.model_cache[0].prefixes.is_empty()));
}

#[tokio::test]
async fn a_model_that_nobody_has_ready_yet_is_refused_with_how_far_it_is() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(1)).await;
    let loading = |percent| {
        move |report: &mut HealthReport| {
            report.model_cache[0].state = ModelState::Loading;
            report.model_cache[0].loading =
                Some(LoadProgress { percent, elapsed_ms: 20_000, bytes: 7, fetching: false });
        }
    };
    worker.report(&stand, loading(50)).await.expect("believed");
    let refused = stand.answer(&stand.job()).await.expect_err("it takes 20 s yet");
    assert_eq!((refused.code, refused.retry_after_ms), (ErrorCode::ModelLoading, Some(20_000)));
    let model_loading = refused.loading.expect("how far it is");
    assert_eq!((model_loading.model, model_loading.progress.percent, model_loading.progress.bytes), (model(), 50, 7));
    assert!(!worker.key.public_key().to_string().contains(&model_loading.node), "{}", model_loading.node);
    assert_eq!(worker.jobs_seen(), 0);
    worker.report(&stand, loading(90)).await.expect("believed");
    stand.answer(&stand.job()).await.expect("a job waits for a load that ends soon");
    worker.report(&stand, loading(50)).await.expect("believed");
    let ready = stand.worker(2, Manner::Answer(1)).await;
    stand.answer(&stand.job()).await.expect("another worker has it ready");
    assert_eq!((worker.jobs_seen(), ready.jobs_seen()), (1, 1));
}

#[tokio::test]
async fn jobs_spread_over_the_workers_while_they_run() {
    let stand = stand(Config::default()).await;
    let one = stand.worker(1, Manner::Hang).await;
    let two = stand.worker(2, Manner::Hang).await;
    let mut answers = vec![];
    for _ in 0..8 {
        answers.push(stand.submit(&stand.job()).await.expect("accepted"));
    }
    assert_eq!((one.jobs_seen(), two.jobs_seen()), (4, 4));
}

#[tokio::test]
async fn a_full_fleet_sheds_with_a_time_to_come_back() {
    let stand = stand(Config { queue_max: 0, ..Config::default() }).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let mut answers = vec![];
    for _ in 0..4 {
        answers.push(stand.submit(&stand.job()).await.expect("accepted"));
    }
    let fifth = stand.answer(&stand.job()).await.expect_err("the worker has 4 slots, and no job may wait");
    assert_eq!(fifth.code, ErrorCode::NoCapacity);
    assert!(fifth.retry_after_ms.is_some());
    assert_eq!(worker.jobs_seen(), 4);
    drop(answers.pop());
    worker.cancelled.notified().await;
    for _ in 0..100 {
        if stand.store.active_reservations().await.expect("readable")[0].1 < 4 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    *worker.manner.lock() = Manner::Answer(1);
    stand.answer(&stand.job()).await.expect("there is room again");
}

#[tokio::test]
async fn a_model_that_nobody_serves_is_no_capacity_and_not_an_internal_error() {
    let stand = stand(Config::default()).await;
    let error = stand.answer(&stand.job()).await.expect_err("no worker");
    assert_eq!(error.code, ErrorCode::NoCapacity);
    assert!(error.message.contains("tether-tiny@1.0"), "{error}");
}

#[tokio::test]
async fn one_retry_token_never_runs_twice() {
    let stand = Arc::new(stand(Config::default()).await);
    let worker = stand.worker(1, Manner::Answer(2)).await;
    let job = stand.job();
    let tries = (0..50).map(|_| {
        let (stand, job) = (stand.clone(), job.clone());
        async move { stand.answer(&job).await }
    });
    let outcomes = futures_join(tries).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    let others = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
    let refusals = [ErrorCode::IdempotencyInProgress, ErrorCode::IdempotencyKeyReused];
    assert!(others.clone().all(|error| refusals.contains(&error.code)), "{outcomes:?}");
    assert_eq!(worker.jobs_seen(), 1);
    assert_eq!(stand.usage().await.len(), 1);
}

async fn futures_join<T: Send + 'static>(
    work: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let mut set = tokio::task::JoinSet::new();
    for work in work {
        set.spawn(work);
    }
    set.join_all().await
}

#[tokio::test]
async fn a_tenants_rules_are_applied_before_anything_is_written() {
    let stand = stand(Config { policy_cache_secs: 0, ..Config::default() }).await;
    stand.worker(1, Manner::Answer(1)).await;
    *stand.policy.lock() = TenantPolicy { allowed_models: Some(vec![]), ..TenantPolicy::default() };
    let job = stand.job();
    assert_eq!(stand.answer(&job).await.expect_err("not allowed").code, ErrorCode::ModelNotAllowed);
    assert_eq!(stand.record(&job).await, None);

    let twice = TenantPolicy { requests_per_minute: Some(2), ..TenantPolicy::default() };
    *stand.policy.lock() = twice;
    stand.answer(&stand.job()).await.expect("the first");
    stand.answer(&stand.job()).await.expect("the second");
    let third = stand.answer(&stand.job()).await.expect_err("the third");
    assert_eq!(third.code, ErrorCode::RateLimitExceeded);
    assert!(third.retry_after_ms.is_some());
}

#[tokio::test]
async fn a_malformed_job_is_refused_with_the_part_that_offends() {
    let stand = stand(Config::default()).await;
    let mut job = serde_json::to_value(stand.job()).expect("JSON");
    job["modelId"] = "Not A Model".into();
    let seconds = Duration::from_secs(5);
    let options = rpc::StreamOptions { accept_within: seconds, deadline: None, stall: seconds };
    let body = job.to_string().into();
    let refused = stand.gateway.open_stream(stand.orchestrator, protocol::infer::SUBMIT, body, options).await;
    let Err(CallError::Remote(error)) = refused else { panic!("{refused:?}") };
    assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidValue, Some("modelId")));
}

#[tokio::test]
async fn how_a_job_was_placed_can_be_told() {
    let stand = stand(Config::default()).await;
    let (refusing, answering) = stand.pair(Manner::Refuse(ErrorCode::WorkerFull), Manner::Answer(1)).await;
    let draining = stand.worker(3, Manner::Answer(1)).await;
    let finishing = |report: &mut protocol::health::HealthReport| {
        (report.draining, report.capacity.running) = (true, 1);
    };
    draining.report(&stand, finishing).await.expect("believed");
    let job = stand.job();
    stand.answer(&job).await.expect("answered");
    let decision = stand.explain(&job).await;
    let outcomes: Vec<_> = decision.attempts.iter().map(|attempt| (attempt.chosen, attempt.outcome.as_str())).collect();
    assert_eq!(
        outcomes,
        [(Some(refusing.key.public_key()), "worker_full"), (Some(answering.key.public_key()), "completed")]
    );
    assert_eq!(decision.attempts[0].candidates.len(), 2);
    assert_eq!(decision.attempts[0].refused[0].reason, "draining");
    assert_eq!(decision.attempts[1].refused.iter().filter(|refused| refused.reason == "tried").count(), 1);
}

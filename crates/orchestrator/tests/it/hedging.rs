//! A second worker for a job whose first one is silent: one of the two answers, and the other costs nothing.

use std::time::Duration;

use metadata_store::{DurableState, TerminalState};
use protocol::health::HealthReport;
use protocol::infer::InferRequest;
use protocol::jobs::{JOB_LIST, JobPage, JobQuery};
use protocol::policy::TenantPolicy;
use protocol::quota::Amount;
use protocol::{Clock as _, ErrorCode};
use rpc::SystemClock;
use tether_orchestrator::Config;
use tokio::time;

use crate::stand::{Manner, Stand, Worker, stand};

/// More jobs than are needed to know a worker's times.
const JOBS: usize = 25;

/// Two workers, the first of which has answered enough jobs and now does as told.
async fn hedged(config: Config, first: Manner, second: Manner) -> (Stand, Worker, Worker) {
    let stand = stand(config).await;
    let (one, two) = stand.pair(Manner::Answer(1), second).await;
    for _ in 0..JOBS {
        stand.answer(&stand.job()).await.expect("answered");
    }
    assert_eq!((one.jobs_seen(), two.jobs_seen()), (JOBS, 0));
    *one.manner.lock() = first;
    (stand, one, two)
}

fn hedging() -> Config {
    Config { hedge: true, ..Config::default() }
}

fn counts(stand: &Stand, outcome: &str, count: u32) -> bool {
    stand.metrics.encode().contains(&format!("tether_hedges_total{{outcome=\"{outcome}\"}} {count}\n"))
}

async fn is_counted(stand: &Stand, outcome: &str) {
    for _ in 0..1_000 {
        if counts(stand, outcome, 1) {
            return;
        }
        time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no hedge was {outcome}: {}", stand.metrics.encode());
}

/// The outcomes of a job's attempts, as `tether explain` shows them.
async fn explained(stand: &Stand, job: &InferRequest) -> Vec<(u32, String)> {
    let attempts = stand.explain(job).await.attempts.into_iter();
    attempts.map(|attempt| (attempt.attempt, attempt.outcome)).collect()
}

fn outcomes<const N: usize>(expected: [(u32, &str); N]) -> Vec<(u32, String)> {
    expected.map(|(attempt, outcome)| (attempt, outcome.to_owned())).to_vec()
}

#[tokio::test(start_paused = true)]
async fn a_second_worker_answers_for_a_silent_one_and_only_it_is_billed() {
    let (stand, one, two) = hedged(hedging(), Manner::Wait, Manner::Answer(3)).await;
    let job = stand.job();
    let chunks = stand.answer(&job).await.expect("answered by the second");
    let places: Vec<_> = chunks.iter().map(|chunk| (chunk.attempt, chunk.seq)).collect();
    assert_eq!(places, [(2, 0), (2, 1), (2, 2), (2, 3)]);
    one.cancelled.notified().await;
    is_counted(&stand, "won").await;
    let record = stand.record(&job).await.expect("kept");
    assert_eq!((record.state, record.attempt), (DurableState::Settled(TerminalState::Completed), 2));
    assert_eq!((record.worker_id, record.continued), (two.key.public_key(), 0));
    let billed: Vec<_> =
        stand.usage().await.into_iter().filter(|bill| bill.worker_id == two.key.public_key()).collect();
    assert_eq!((billed.len(), stand.usage().await.len()), (1, JOBS + 1));
    assert_eq!((&billed[0].key, billed[0].usage.completion_tokens), (&record.key, 3));
    assert_eq!(stand.store.active_reservations().await.expect("readable"), []);
    assert_eq!(explained(&stand, &job).await, outcomes([(1, "overtaken"), (2, "completed")]));
    let history: Vec<_> = record.history.iter().map(|attempt| attempt.outcome.as_str()).collect();
    assert_eq!(history, ["overtaken", "completed"]);
    let listed: JobPage = stand.ask(JOB_LIST, &JobQuery { limit: 100, ..JobQuery::default() }).await;
    assert_eq!(listed.jobs.iter().filter(|listed| listed.correlation_id == job.correlation_id).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_second_worker_that_is_slower_is_cancelled_and_not_billed() {
    let (stand, one, two) = hedged(hedging(), Manner::Read(2), Manner::Wait).await;
    let job = stand.job();
    let chunks = stand.answer(&job).await.expect("answered by the first");
    assert!(chunks.len() == 3 && chunks.iter().all(|chunk| chunk.attempt == 1), "{chunks:?}");
    two.cancelled.notified().await;
    is_counted(&stand, "lost").await;
    let record = stand.record(&job).await.expect("kept");
    assert_eq!((record.attempt, record.worker_id), (1, one.key.public_key()));
    assert_eq!((stand.usage().await.len(), two.jobs_seen()), (JOBS + 1, 1));
    assert_eq!(stand.store.active_reservations().await.expect("readable"), []);
    assert_eq!(explained(&stand, &job).await, outcomes([(1, "completed"), (1, "hedge_lost")]));
}

#[tokio::test(start_paused = true)]
async fn both_workers_hold_a_reservation_until_one_has_answered() {
    let (stand, one, two) = hedged(hedging(), Manner::Wait, Manner::Wait).await;
    let job = stand.job();
    let answer = stand.submit(&job);
    let looking = async {
        while two.jobs_seen() == 0 {
            time::sleep(Duration::from_millis(10)).await;
        }
        let mut held = stand.store.active_reservations().await.expect("readable");
        held.sort_unstable();
        let mut expected = [(one.key.public_key(), 1), (two.key.public_key(), 1)];
        expected.sort_unstable();
        assert_eq!(held, expected);
    };
    tokio::select! {
        _ = answer => panic!("nobody answers"),
        () = looking => {}
    }
    // The caller is gone, and both end.
    one.cancelled.notified().await;
    two.cancelled.notified().await;
    is_counted(&stand, "lost").await;
    assert_eq!((stand.store.active_reservations().await.expect("readable"), stand.usage().await.len()), (vec![], JOBS));
}

#[tokio::test(start_paused = true)]
async fn a_second_worker_takes_nothing_of_its_tenants_requests_and_jobs() {
    let config = Config { policy_cache_secs: 0, ..hedging() };
    let (stand, one, two) = hedged(config, Manner::Wait, Manner::Wait).await;
    let requests_per_day = Some(JOBS as u64 + 2);
    *stand.policy.lock() = TenantPolicy { concurrent_jobs: Some(2), requests_per_day, ..TenantPolicy::default() };
    let (first, second) = (stand.job(), stand.job());
    let another = async {
        while two.jobs_seen() == 0 {
            time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(stand.store.active_reservations().await.expect("readable").len(), 2);
        (*one.manner.lock(), *two.manner.lock()) = (Manner::Answer(1), Manner::Answer(1));
        stand.answer(&second).await.expect("the second of two jobs");
    };
    tokio::select! {
        _ = stand.submit(&first) => panic!("nobody answers"),
        () = another => {}
    }
    is_counted(&stand, "lost").await;
    stand.settled(&first).await;
    let usage = stand.store.quota_usage(&"acme".parse().expect("tenant"), SystemClock.now()).await.expect("readable");
    assert_eq!((usage.jobs, usage.day_requests), (0, Amount { spent: JOBS as u64 + 1, reserved: 0 }));
}

#[tokio::test(start_paused = true)]
async fn a_job_may_use_what_its_second_worker_may_use() {
    let config = Config { policy_cache_secs: 0, ..hedging() };
    let (stand, one, two) = hedged(config, Manner::Wait, Manner::AnswerLong(20_000)).await;
    for (worker, context_length) in [(&one, 4_096), (&two, 131_072)] {
        let change = |report: &mut HealthReport| report.model_cache[0].context_length = context_length;
        worker.report(&stand, change).await.expect("believed");
    }
    *stand.policy.lock() = TenantPolicy { tokens_per_day: Some(1_000_000), ..TenantPolicy::default() };
    let mut job = stand.job();
    job.input = serde_json::from_value(serde_json::json!("x".repeat(30_000))).expect("a prompt");
    stand.answer(&job).await.expect("answered by the second");
    assert_eq!((*one.max_tokens.lock(), *two.max_tokens.lock()), (None, Some(4_096)));
    let billed = stand.usage().await.pop().expect("a bill").usage;
    assert_eq!((billed.prompt_tokens, billed.completion_tokens), (20_000, 1));

    *stand.policy.lock() = TenantPolicy { tokens_per_day: Some(50_000), ..TenantPolicy::default() };
    *one.manner.lock() = Manner::Late(5);
    let again = InferRequest { input: job.input, ..stand.job() };
    let chunks = stand.answer(&again).await.expect("answered by the first");
    assert!(chunks.iter().all(|chunk| chunk.attempt == 1), "the second may use too much: {chunks:?}");
    assert_eq!(two.jobs_seen(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_second_worker_that_fails_changes_nothing() {
    let second = Manner::Refuse(ErrorCode::WorkerFailed);
    let (stand, _, two) = hedged(hedging(), Manner::Read(2), second).await;
    let job = stand.job();
    let chunks = stand.answer(&job).await.expect("answered by the first");
    assert!(chunks.iter().all(|chunk| chunk.attempt == 1), "{chunks:?}");
    assert_eq!(two.jobs_seen(), 1);
    assert!(counts(&stand, "failed", 1));
    assert_eq!(explained(&stand, &job).await, outcomes([(1, "completed"), (1, "hedge_failed")]));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_has_begun_gets_no_second_worker() {
    let (stand, _one, two) = hedged(hedging(), Manner::Hang, Manner::Answer(1)).await;
    let mut answer = stand.submit(&stand.job()).await.expect("accepted");
    answer.next().await.expect("a chunk").expect("no error");
    time::sleep(Duration::from_secs(10)).await;
    assert_eq!(two.jobs_seen(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_reads_on_is_not_silent() {
    let stand = stand(hedging()).await;
    let (one, two) = stand.pair(Manner::Read(1), Manner::Answer(1)).await;
    for _ in 0..JOBS {
        stand.answer(&stand.job()).await.expect("answered");
        one.report(&stand, |_| {}).await.expect("believed");
        two.report(&stand, |_| {}).await.expect("believed");
    }
    // It takes far longer than usual, and evaluates a token of the prompt each second.
    *one.manner.lock() = Manner::Read(8);
    stand.answer(&stand.job()).await.expect("answered");
    assert_eq!(two.jobs_seen(), 0);
}

#[tokio::test(start_paused = true)]
async fn without_the_setting_nobody_is_hedged() {
    let (stand, _, two) = hedged(Config::default(), Manner::Read(9), Manner::Answer(1)).await;
    stand.answer(&stand.job()).await.expect("answered");
    assert_eq!(two.jobs_seen(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_tenant_without_retries_gets_no_second_worker() {
    let config = Config { retry_budget_percent: 0, ..hedging() };
    let (stand, one, two) = hedged(config, Manner::Refuse(ErrorCode::WorkerFull), Manner::Answer(1)).await;
    *two.manner.lock() = Manner::Refuse(ErrorCode::WorkerFull);
    for _ in 0..150 {
        stand.answer(&stand.job()).await.expect_err("both are full");
    }
    let seen = two.jobs_seen();
    *one.manner.lock() = Manner::FallSilent(0);
    let answer = time::timeout(Duration::from_millis(900), stand.answer(&stand.job())).await;
    assert!(answer.is_err(), "nobody answers");
    assert!(counts(&stand, "no_budget", 1), "{}", stand.metrics.encode());
    assert_eq!(two.jobs_seen(), seen);
}

#[tokio::test(start_paused = true)]
async fn a_full_worker_is_no_second_worker() {
    let (stand, _, two) = hedged(hedging(), Manner::Read(2), Manner::Answer(1)).await;
    two.report(&stand, |report| (report.capacity.running, report.capacity.waiting) = (4, 4)).await.expect("believed");
    stand.answer(&stand.job()).await.expect("answered");
    assert!(counts(&stand, "no_worker", 1), "{}", stand.metrics.encode());
    assert_eq!(two.jobs_seen(), 0);
}

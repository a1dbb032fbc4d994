//! Quotas and regions of tenants, as an orchestrator applies them.

use std::time::Duration;

use protocol::health::HealthReport;
use protocol::infer::{InferChunk, InferRequest};
use protocol::jobs::{JOB_CANCEL, JobRef, JobsCancelled};
use protocol::policy::TenantPolicy;
use protocol::quota::{QUOTA_LIST, QuotaPage, QuotaQuery, QuotaRule, QuotaState};
use protocol::{ErrorCode, codec};
use tether_orchestrator::Config;

use crate::stand::{Manner, Stand, Worker, key, stand};

/// Policies are not cached, so that tests need not wait.
fn config() -> Config {
    Config { policy_cache_secs: 0, ..Config::default() }
}

async fn limited(policy: TenantPolicy) -> Stand {
    let stand = stand(config()).await;
    *stand.policy.lock() = policy;
    stand
}

fn daily(tokens: u64) -> TenantPolicy {
    TenantPolicy { tokens_per_day: Some(tokens), ..TenantPolicy::default() }
}

/// A job whose answer has at most so many tokens.
fn short(stand: &Stand, max_tokens: u32) -> InferRequest {
    let mut job = stand.job();
    job.input.max_tokens = Some(max_tokens);
    job
}

async fn state(stand: &Stand, rule: QuotaRule) -> QuotaState {
    let page: QuotaPage = stand.ask(QUOTA_LIST, &QuotaQuery { tenant_id: Some("acme".parse().expect("name")) }).await;
    *page.tenants[0].quotas.iter().find(|state| state.rule == rule).expect("every rule is listed")
}

#[tokio::test]
async fn a_job_holds_its_worst_case_until_it_ends_and_pays_what_it_used() {
    let stand = limited(daily(10_000)).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let first = short(&stand, 6_000);
    let mut waiting = stand.submit(&first).await.expect("accepted");
    waiting.next().await.expect("a chunk").expect("of the answer");
    let held = state(&stand, QuotaRule::TokensPerDay).await;
    assert!(held.spent == 0 && (6_000..8_000).contains(&held.reserved), "{held:?}");

    let refused = stand.answer(&short(&stand, 6_000)).await.expect_err("both cannot fit");
    assert_eq!((refused.code, refused.param.as_deref()), (ErrorCode::InsufficientQuota, Some("tokens_per_day")));
    let quota = refused.quota.expect("it says how much is left");
    assert_eq!((quota.limit, quota.reserved), (Some(10_000), held.reserved));
    assert!(refused.message.contains("resets in"), "{}", refused.message);

    *worker.manner.lock() = Manner::Answer(2);
    drop(waiting);
    stand.settled(&first).await;
    stand.answer(&short(&stand, 6_000)).await.expect("there is room again");
    let after = state(&stand, QuotaRule::TokensPerDay).await;
    let billed: u64 = stand.usage().await.iter().map(|record| u64::from(record.usage.total_tokens())).sum();
    assert_eq!((after.spent, after.reserved), (billed, 0));
}

#[tokio::test]
async fn a_failed_job_costs_no_tokens() {
    let stand = limited(daily(10_000)).await;
    stand.worker(1, Manner::DieAfter(0)).await;
    stand.answer(&short(&stand, 5)).await.expect_err("the worker dies");
    let after = state(&stand, QuotaRule::TokensPerDay).await;
    assert_eq!((after.spent, after.reserved), (0, 0));
    assert_eq!(state(&stand, QuotaRule::RequestsPerDay).await.spent, 0);
}

#[tokio::test]
async fn an_answer_without_a_length_is_bounded_where_tokens_are_limited() {
    let stand = limited(daily(1_000_000)).await;
    let worker = stand.worker(1, Manner::Answer(2)).await;
    stand.answer(&stand.job()).await.expect("answered");
    assert_eq!(*worker.max_tokens.lock(), Some(config().quota_answer_tokens), "the worker ends the answer there");
    stand.answer(&short(&stand, 7)).await.expect("answered");
    assert_eq!(*worker.max_tokens.lock(), Some(7));
    *stand.policy.lock() = TenantPolicy::default();
    stand.answer(&stand.job()).await.expect("answered");
    assert_eq!(*worker.max_tokens.lock(), None, "nothing is reserved from a limit");
}

/// A prompt of as many bytes.
fn long(stand: &Stand, bytes: usize) -> InferRequest {
    let mut job = stand.job();
    job.input = serde_json::from_value(serde_json::json!("x".repeat(bytes))).expect("a prompt");
    job
}

/// Two workers: one with a short context, which refuses the prompt, and one that has read as many tokens of it.
async fn short_and_long(stand: &Stand, prompt_tokens: u32) -> (Worker, Worker) {
    let too_long = Manner::Refuse(ErrorCode::ContextLengthExceeded);
    let (short, long) = stand.pair(too_long, Manner::AnswerLong(prompt_tokens)).await;
    for (worker, context_length) in [(&short, 4_096), (&long, 131_072)] {
        let change = |report: &mut HealthReport| report.model_cache[0].context_length = context_length;
        worker.report(stand, change).await.expect("believed");
    }
    (short, long)
}

#[tokio::test]
async fn a_job_that_moves_to_a_longer_context_is_billed_all_that_it_used() {
    for (policy, answer_tokens) in [(TenantPolicy::default(), None), (daily(1_000_000), Some(4_096))] {
        let stand = limited(policy).await;
        let (short, long_context) = short_and_long(&stand, 50_000).await;
        stand.answer(&long(&stand, 60_000)).await.expect("answered by the second");
        assert_eq!((short.jobs_seen(), long_context.jobs_seen()), (1, 1));
        assert_eq!(*short.max_tokens.lock(), None, "its context bounds the answer");
        assert_eq!(*long_context.max_tokens.lock(), answer_tokens);
        let billed: Vec<_> = stand.usage().await.iter().map(|record| record.usage.total_tokens()).collect();
        assert_eq!(billed, [50_001]);
        let after = state(&stand, QuotaRule::TokensPerDay).await;
        assert_eq!((after.spent, after.reserved), (50_001, 0));
    }
}

#[tokio::test]
async fn a_job_moves_to_no_worker_where_it_could_exceed_a_limit() {
    let stand = limited(daily(20_000)).await;
    let (short, long_context) = short_and_long(&stand, 50_000).await;
    let refused = stand.answer(&long(&stand, 60_000)).await.expect_err("it may need more");
    assert_eq!((refused.code, refused.param.as_deref()), (ErrorCode::InsufficientQuota, Some("tokens_per_day")));
    assert_eq!((short.jobs_seen(), long_context.jobs_seen()), (1, 0));
    let after = state(&stand, QuotaRule::TokensPerDay).await;
    assert_eq!((after.spent, after.reserved), (0, 0));
}

/// Adds workers in the order in which they are asked: what each does, and its context.
async fn in_order(stand: &Stand, workers: Vec<(Manner, u32)>) -> Vec<Worker> {
    let mut numbers: Vec<u8> = (1..=workers.len() as u8).collect();
    numbers.sort_by_key(|number| key(*number).public_key());
    let mut added = vec![];
    for (number, (manner, context_length)) in numbers.into_iter().zip(workers) {
        let worker = stand.worker(number, manner).await;
        let change = |report: &mut HealthReport| report.model_cache[0].context_length = context_length;
        worker.report(stand, change).await.expect("believed");
        added.push(worker);
    }
    added
}

#[tokio::test]
async fn a_job_that_could_cost_too_much_on_one_worker_runs_on_another() {
    let scenes = [
        (vec![(Manner::Answer(2), 131_072), (Manner::Answer(2), 4_096)], [0, 1].as_slice()),
        (vec![(Manner::DieAfter(0), 4_096), (Manner::Answer(2), 131_072), (Manner::Answer(2), 4_096)], &[1, 0, 1]),
    ];
    for (workers, seen) in scenes {
        let stand = limited(daily(20_000)).await;
        let workers = in_order(&stand, workers).await;
        let job = long(&stand, 60_000);
        stand.answer(&job).await.expect("answered by the last");
        assert_eq!(workers.iter().map(Worker::jobs_seen).collect::<Vec<_>>(), seen);
        let last = stand.explain(&job).await.attempts.pop().expect("an attempt");
        assert!(last.refused.iter().any(|refused| refused.reason == "over_quota"), "{:?}", last.refused);
        let after = state(&stand, QuotaRule::TokensPerDay).await;
        assert_eq!((after.spent, after.reserved), (5, 0));
    }
}

#[tokio::test]
async fn an_operator_cancels_a_job_that_waits_although_a_worker_is_free() {
    let stand = limited(TenantPolicy::default()).await;
    let contexts = [(Manner::Hang, 4_096), (Manner::Answer(2), 131_072)];
    let mut held = vec![];
    for (number, (manner, context_length)) in (1..).zip(contexts) {
        let worker = stand.worker(number, manner).await;
        let change = |report: &mut HealthReport| report.model_cache[0].context_length = context_length;
        worker.report(&stand, change).await.expect("believed");
        while held.len() < 4 {
            held.push(stand.submit(&stand.job()).await.expect("accepted"));
        }
    }
    *stand.policy.lock() = daily(20_000);
    let job = long(&stand, 60_000);
    let cancelling = async {
        // The free worker has been ruled out, so the job waits for one of the others and looks again and again.
        while !stand.metrics.encode().contains("insufficient_quota") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let request = JobRef { correlation_id: job.correlation_id };
        stand.operate::<JobsCancelled>(JOB_CANCEL, request).await.expect("allowed")
    };
    let (answer, cancelled) = tokio::join!(stand.answer(&job), cancelling);
    assert_eq!(answer.expect_err("cancelled").code, ErrorCode::CancelledByOperator);
    assert_eq!((cancelled.jobs.len(), cancelled.waiting), (0, 1));
}

#[tokio::test]
async fn an_answer_that_another_worker_continues_takes_no_more_than_before() {
    let stand = limited(daily(1_000_000)).await;
    let (one, _two) = stand.pair(Manner::Hang, Manner::Answer(40)).await;
    let first = short(&stand, 100);
    let mut waiting = stand.submit(&first).await.expect("accepted");
    waiting.next().await.expect("a chunk").expect("of the answer");
    let held = state(&stand, QuotaRule::TokensPerDay).await.reserved;
    drop(waiting);
    stand.settled(&first).await;
    let spent = state(&stand, QuotaRule::TokensPerDay).await.spent;

    *stand.policy.lock() = daily(spent + held);
    *one.manner.lock() = Manner::DieAfter(20);
    let job = short(&stand, 100);
    stand.answer(&job).await.expect("continued by the second");
    assert_eq!(stand.record(&job).await.expect("kept").continued, 1);
}

#[tokio::test]
async fn a_request_that_needs_more_than_the_whole_limit_is_told_what_to_change() {
    let stand = limited(TenantPolicy { tokens_per_minute: Some(1_000), ..TenantPolicy::default() }).await;
    stand.worker(1, Manner::Answer(2)).await;
    let refused = stand.answer(&short(&stand, 5_000)).await.expect_err("too much");
    assert_eq!(refused.code, ErrorCode::InsufficientQuota);
    assert!(refused.message.contains("lower max_tokens"), "{}", refused.message);
    stand.answer(&short(&stand, 5)).await.expect("fits");
}

#[tokio::test]
async fn a_tenant_has_no_more_jobs_at_once_than_it_may() {
    let stand = limited(TenantPolicy { concurrent_jobs: Some(2), ..TenantPolicy::default() }).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let mut running = vec![];
    for _ in 0..2 {
        let mut answer = stand.submit(&stand.job()).await.expect("accepted");
        answer.next().await.expect("a chunk").expect("of the answer");
        running.push(answer);
    }
    let refused = stand.answer(&stand.job()).await.expect_err("the third");
    assert_eq!((refused.code, refused.retry_after_ms), (ErrorCode::RateLimitExceeded, Some(1_000)));
    assert_eq!(refused.param.as_deref(), Some("concurrent_jobs"));
    assert_eq!(worker.jobs_seen(), 2);
    running.pop();
    *worker.manner.lock() = Manner::Answer(1);
    for _ in 0..500 {
        if stand.answer(&stand.job()).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no job ran within five seconds after another ended");
}

/// Returns the first chunk of a job's answer.
async fn told(stand: &Stand, job: InferRequest) -> InferChunk {
    let mut answer = stand.submit(&job).await.expect("accepted");
    let first = codec::decode(&answer.next().await.expect("a chunk").expect("read")).expect("a chunk");
    while answer.next().await.is_some() {}
    first
}

#[tokio::test]
async fn a_caller_learns_what_is_left_before_its_answer_begins() {
    let stand = limited(daily(10_000)).await;
    stand.worker(1, Manner::Answer(2)).await;
    let first = told(&stand, InferRequest { progress: true, ..short(&stand, 100) }).await;
    let quota = first.quota.expect("what is left");
    assert!(first.progress.is_some() && quota.left().is_some_and(|left| left < 9_900), "{quota:?}");
    let shared = InferRequest { progress: true, linger_ms: Some(1_000), keeps_answer: true, ..short(&stand, 100) };
    assert!(told(&stand, shared.clone()).await.quota.is_some());
    assert!(told(&stand, shared).await.quota.is_none(), "a kept answer says nothing of the present");
    assert!(told(&stand, short(&stand, 100)).await.progress.is_none(), "a caller that knows no progress gets none");
}

#[tokio::test]
async fn a_tenant_whose_policy_cannot_be_read_is_missing_from_the_list_and_the_others_are_shown() {
    let stand = limited(daily(10_000)).await;
    stand.worker(1, Manner::Answer(2)).await;
    for tenant in ["acme", "other", "third"] {
        let tenant_id = tenant.parse().expect("a name");
        stand.answer(&InferRequest { tenant_id, ..short(&stand, 100) }).await.expect("there is room");
    }
    let list = async || {
        let page: QuotaPage = stand.ask(QUOTA_LIST, &QuotaQuery::default()).await;
        let names: Vec<String> = page.tenants.iter().map(|tenant| tenant.tenant_id.to_string()).collect();
        (names.join(" "), page.incomplete)
    };
    assert_eq!(list().await, ("acme other third".to_owned(), false));
    *stand.withheld.lock() = Some("other".parse().expect("a name"));
    assert_eq!(list().await, ("acme third".to_owned(), true));
}

#[tokio::test]
async fn jobs_run_only_in_allowed_regions() {
    let near = "near".parse().expect("a region");
    let stand = stand(Config { near_regions: vec![near], ..config() }).await;
    let own = stand.worker(1, Manner::Answer(1)).await;
    let allow = |regions: &[&str]| {
        let allowed = regions.iter().map(|region| region.parse().expect("a region")).collect();
        *stand.policy.lock() = TenantPolicy { allowed_regions: Some(allowed), ..TenantPolicy::default() };
    };
    allow(&["far"]);
    let never = stand.answer(&stand.job()).await.expect_err("no worker is ever there");
    assert_eq!(never.code, ErrorCode::ResidencyMismatch);
    allow(&["near", "far"]);
    let not_now = stand.answer(&stand.job()).await.expect_err("none is there now");
    assert_eq!(not_now.code, ErrorCode::NoCapacity);
    assert!(not_now.message.contains("allowed regions"), "{}", not_now.message);
    let (other, region) = (stand.worker(2, Manner::Answer(1)).await, "near".parse().expect("a region"));
    other.report(&stand, |report| report.region = region).await.expect("believed");
    stand.answer(&stand.job()).await.expect("there is one now");
    assert_eq!((own.jobs_seen(), other.jobs_seen()), (0, 1));
    allow(&["local"]);
    stand.answer(&stand.job()).await.expect("runs here");
    assert_eq!((own.jobs_seen(), other.jobs_seen()), (1, 1));
}

//! Jobs that several models may run.

use metadata_store::{DurableState, TerminalState};
use protocol::ErrorCode;
use protocol::health::{CachedModel, HealthReport, ModelState};
use protocol::infer::InferRequest;
use protocol::model::ModelKey;
use protocol::policy::TenantPolicy;
use tether_orchestrator::Config;

use crate::stand::{Manner, Stand, Worker, model, stand};

fn key(name: &str) -> ModelKey {
    ModelKey { model_id: name.parse().expect("a name"), version: "1.0".parse().expect("a version") }
}

/// Has a report say that the worker holds these models, with this much context, instead of its own.
fn holds(names: &[&str], context_length: u32) -> impl FnOnce(&mut HealthReport) {
    let models: Vec<ModelKey> = names.iter().map(|name| key(name)).collect();
    move |report| {
        let like = report.model_cache[0].clone();
        report.model_cache =
            models.iter().map(|key| CachedModel { key: key.clone(), context_length, ..like.clone() }).collect();
        report.supported = models;
    }
}

/// Has a report say the same of a busy worker, to whom others are preferred.
fn holds_and_is_busy(names: &'static [&'static str]) -> impl FnOnce(&mut HealthReport) {
    move |report| {
        holds(names, 0)(report);
        report.capacity.running = 3;
    }
}

async fn worker(stand: &Stand, number: u8, names: &[&str], context_length: u32, manner: Manner) -> Worker {
    let worker = stand.worker(number, manner).await;
    worker.report(stand, holds(names, context_length)).await.expect("believed");
    worker
}

/// A job that `tether-tiny` may run, and these.
fn job(stand: &Stand, others: &[&str]) -> InferRequest {
    InferRequest { alternatives: others.iter().map(|name| key(name)).collect(), ..stand.job() }
}

const TOO_LONG: Manner = Manner::Refuse(ErrorCode::ContextLengthExceeded);
const CANNOT: Manner = Manner::Refuse(ErrorCode::UnsupportedParameter);

#[tokio::test]
async fn what_one_model_cannot_do_another_does_and_is_billed_for() {
    let stand = stand(Config { attempts_max: 1, ..Config::default() }).await;
    let unable = worker(&stand, 1, &["tether-tiny", "third"], 0, CANNOT).await;
    let able = worker(&stand, 2, &["other"], 0, Manner::Answer(2)).await;
    // So that the model that cannot is asked first.
    able.report(&stand, holds_and_is_busy(&["other"])).await.expect("believed");
    let job = job(&stand, &["other", "third", "nobody-has-it", "other"]);
    let chunks = stand.answer(&job).await.expect("answered, though no model may fail");
    assert_eq!(chunks.len(), 3);
    assert_eq!((unable.jobs_seen(), able.jobs_seen()), (2, 1), "each model was asked once");
    let record = stand.record(&job).await.expect("kept");
    assert_eq!((record.model, record.state), (key("other"), DurableState::Settled(TerminalState::Completed)));
    assert_eq!(stand.usage().await.into_iter().map(|usage| usage.model).collect::<Vec<_>>(), [key("other")]);
    let attempts = stand.explain(&job).await.attempts;
    assert_eq!(attempts.len(), 3);
    let last = attempts.last().expect("the third");
    assert_eq!(last.candidates[0].model, Some(key("other")));
    let ruled_out = last.refused.iter().filter(|refused| refused.reason == "short_context");
    assert_eq!(ruled_out.filter_map(|refused| refused.model.clone()).count(), 2, "{:?}", last.refused);
}

/// A job that may be too long for the workers of these tests.
fn long(mut job: InferRequest) -> InferRequest {
    job.input.max_tokens = Some(100_000);
    job
}

#[tokio::test]
async fn what_no_model_can_do_is_refused_as_the_last_one_refused_it() {
    let stand = stand(Config::default()).await;
    let workers = [
        worker(&stand, 1, &["tether-tiny"], 0, TOO_LONG).await,
        worker(&stand, 2, &["other"], 512, TOO_LONG).await,
        worker(&stand, 3, &["other"], 512, TOO_LONG).await,
    ];
    let job = long(job(&stand, &["other", "nobody-has-it"]));
    let refused = stand.answer(&job).await.expect_err("nobody can");
    assert_eq!(refused.code, ErrorCode::ContextLengthExceeded);
    let seen: usize = workers.iter().map(Worker::jobs_seen).sum();
    assert_eq!(seen, 2, "a worker with no more context than one that refused is not asked");
    assert_eq!(stand.settled(&job).await.state, DurableState::Settled(TerminalState::Failed));
    assert_eq!(stand.usage().await, []);
}

#[tokio::test]
async fn a_refusal_is_not_final_while_a_model_that_may_be_able_is_full() {
    let stand = stand(Config::default()).await;
    worker(&stand, 1, &["tether-tiny"], 0, CANNOT).await;
    let full = worker(&stand, 2, &["other"], 0, Manner::Answer(1)).await;
    let report = |report: &mut HealthReport| {
        holds(&["other"], 0)(report);
        report.capacity.running = 8;
    };
    full.report(&stand, report).await.expect("believed");
    let refused = stand.answer(&job(&stand, &["other"])).await.expect_err("it is full");
    assert_eq!(refused.code, ErrorCode::NoCapacity, "it has room soon");
    full.report(&stand, holds(&["other"], 0)).await.expect("believed");
    stand.answer(&job(&stand, &["other"])).await.expect("it has room");
}

#[tokio::test]
async fn what_is_too_long_for_one_worker_goes_to_one_with_more_context() {
    let stand = stand(Config { attempts_max: 1, ..Config::default() }).await;
    let mut workers = vec![];
    for (number, context_length) in [(1, 512), (2, 512), (3, 4_096), (4, 0)] {
        let manner = if context_length == 4_096 { Manner::Answer(1) } else { TOO_LONG };
        workers.push(worker(&stand, number, &["tether-tiny"], context_length, manner).await);
    }
    // Unknown to be long enough, it is taken only where it is asked first.
    workers[3].report(&stand, holds_and_is_busy(&["tether-tiny"])).await.expect("believed");
    for _ in 0..8 {
        stand.answer(&long(stand.job())).await.expect("one worker has enough");
    }
    assert_eq!(workers[2].jobs_seen(), 8);
    let refused: usize = [0, 1, 3].map(|index: usize| workers[index].jobs_seen()).iter().sum();
    assert!(refused <= 8, "one refusal a job is enough: {refused}");
}

#[tokio::test]
async fn a_worker_whose_one_model_fails_is_asked_for_the_other() {
    let stand = stand(Config::default()).await;
    // It refuses one of its models, as a worker does whose server is away, and answers for the other.
    let both = worker(&stand, 1, &["tether-tiny", "other"], 0, Manner::Only(key("other"))).await;
    for _ in 0..2 {
        let job = job(&stand, &["other"]);
        stand.answer(&job).await.expect("the other model answers");
        assert_eq!(stand.record(&job).await.expect("kept").model, key("other"));
    }
    assert!(both.jobs_seen() >= 3);
}

#[tokio::test]
async fn a_refusal_is_not_final_while_a_model_that_may_be_able_is_shut_off() {
    let mut config = Config::default();
    config.breaker.open_secs = 1_000;
    let stand = stand(config).await;
    worker(&stand, 2, &["other"], 0, Manner::DieAfter(0)).await;
    for _ in 0..100 {
        let other = InferRequest { model_id: key("other").model_id, ..stand.job() };
        if stand.answer(&other).await.expect_err("it dies").code == ErrorCode::BreakerOpen {
            break;
        }
    }
    worker(&stand, 1, &["tether-tiny"], 0, CANNOT).await;
    let refused = stand.answer(&job(&stand, &["other"])).await.expect_err("one cannot, the other is shut off");
    assert_ne!(refused.code, ErrorCode::UnsupportedParameter, "{refused}");
}

#[tokio::test]
async fn a_model_whose_breaker_is_open_is_passed_over() {
    let mut config = Config::default();
    config.breaker.open_secs = 1_000;
    let stand = stand(config).await;
    let broken = worker(&stand, 1, &["tether-tiny"], 0, Manner::DieAfter(0)).await;
    let mut code = ErrorCode::WorkerFailed;
    for _ in 0..100 {
        code = stand.answer(&stand.job()).await.expect_err("it dies").code;
        if code == ErrorCode::BreakerOpen {
            break;
        }
    }
    assert_eq!(code, ErrorCode::BreakerOpen);
    let seen = broken.jobs_seen();
    let well = worker(&stand, 2, &["other"], 0, Manner::Answer(1)).await;
    well.report(&stand, holds_and_is_busy(&["other"])).await.expect("believed");
    for _ in 0..4 {
        stand.answer(&job(&stand, &["other"])).await.expect("the other model answers");
    }
    assert_eq!((broken.jobs_seen(), well.jobs_seen()), (seen, 4));
}

#[tokio::test]
async fn a_job_gets_no_model_that_its_tenant_may_not_use() {
    let stand = stand(Config::default()).await;
    let denied = worker(&stand, 1, &["tether-tiny", "third"], 0, Manner::Answer(1)).await;
    let allowed = worker(&stand, 2, &["other"], 0, Manner::Answer(1)).await;
    allowed.report(&stand, holds_and_is_busy(&["other"])).await.expect("believed");
    let policy = TenantPolicy { allowed_models: Some(vec![key("other").model_id]), ..TenantPolicy::default() };
    *stand.policy.lock() = policy;
    for _ in 0..4 {
        stand.answer(&job(&stand, &["other", "third"])).await.expect("one of them may be used");
    }
    assert_eq!((denied.jobs_seen(), allowed.jobs_seen()), (0, 4));
    let refused = stand.answer(&job(&stand, &["third"])).await.expect_err("none of them may");
    assert_eq!(refused.code, ErrorCode::ModelNotAllowed);
}

#[tokio::test]
async fn a_worker_that_answers_with_another_model_is_not_believed() {
    let stand = stand(Config { attempts_max: 1, ..Config::default() }).await;
    let liar = worker(&stand, 1, &["tether-tiny"], 0, Manner::AnswerAs(key("other"))).await;
    let refused = stand.answer(&job(&stand, &["other"])).await.expect_err("not what was asked of it");
    assert_eq!((refused.code, liar.jobs_seen()), (ErrorCode::WorkerFailed, 1));
    let honest = worker(&stand, 2, &["other"], 0, Manner::AnswerAs(key("other"))).await;
    liar.report(&stand, |report| report.model_cache[0].state = ModelState::Error).await.expect("believed");
    let chunks = stand.answer(&job(&stand, &["other"])).await.expect("answered");
    assert_eq!((chunks[0].model.clone(), honest.jobs_seen()), (Some(key("other")), 1));
    assert_ne!(model(), key("other"));
}

//! A client that asks again gets the answer of its job, and the job runs once.

use std::sync::Arc;
use std::time::Duration;

use metadata_store::{DurableState, SqliteStore, StoreOptions, TerminalState};
use protocol::infer::{InferChunk, InferRequest};
use protocol::{Digest, ErrorCode, TraceId, codec};
use rpc::ResponseStream;
use tether_orchestrator::Config;
use tokio::task::JoinSet;

use crate::stand::{Manner, Stand, stand, stand_on};

const COMPLETED: DurableState = DurableState::Settled(TerminalState::Completed);
const CANCELLED: DurableState = DurableState::Settled(TerminalState::Cancelled);

/// A job that its client may submit again.
fn repeatable(stand: &Stand) -> InferRequest {
    let fingerprint = Some(Digest::of(b"this"));
    let job = InferRequest { acknowledges: true, progress: true, ..stand.job() };
    InferRequest { fingerprint, linger_ms: Some(30_000), keeps_answer: true, ..job }
}

/// The same job, as a gateway submits it when its client asks again.
fn again(job: &InferRequest) -> InferRequest {
    InferRequest { trace_id: TraceId([2; 16]), deadline_ms: Some(9_999), ..job.clone() }
}

async fn next(answer: &mut ResponseStream) -> InferChunk {
    codec::decode(&answer.next().await.expect("a chunk").expect("no error")).expect("well formed")
}

/// Reads chunks up to the end.
async fn rest(answer: &mut ResponseStream) -> Vec<InferChunk> {
    let mut chunks = vec![];
    while let Some(chunk) = answer.next().await {
        chunks.push(codec::decode(&chunk.expect("no error")).expect("a chunk"));
    }
    chunks
}

async fn submit(stand: &Stand, job: &InferRequest) -> ResponseStream {
    let mut answer = stand.submit(job).await.expect("accepted");
    answer.acknowledge_reads();
    answer
}

async fn whole(stand: &Stand, job: &InferRequest) -> Vec<InferChunk> {
    rest(&mut submit(stand, job).await).await
}

fn parts(chunks: &[InferChunk]) -> Vec<&InferChunk> {
    chunks.iter().filter(|chunk| chunk.progress.is_none()).collect()
}

fn is_replayed(chunks: &[InferChunk]) -> bool {
    chunks[0].origin.expect("the first chunk says where the answer comes from").replayed
}

#[tokio::test]
async fn of_a_hundred_calls_under_one_token_one_runs_and_all_are_answered() {
    let stand = Arc::new(stand(Config::default()).await);
    let worker = stand.worker(1, Manner::Answer(20)).await;
    let job = repeatable(&stand);
    let mut calls = JoinSet::new();
    for _ in 0..100 {
        let (stand, job) = (stand.clone(), again(&job));
        calls.spawn(async move { whole(&stand, &job).await });
    }
    let outcomes = calls.join_all().await;
    let first = parts(&outcomes[0]);
    assert_eq!(first.len(), 21);
    assert!(outcomes.iter().all(|chunks| parts(chunks) == first));
    assert_eq!((worker.jobs_seen(), stand.usage().await.len()), (1, 1));
}

#[tokio::test]
async fn a_repeat_reads_a_running_answer_from_its_beginning() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Read(2)).await;
    let job = repeatable(&stand);
    let mut first = submit(&stand, &job).await;
    let begun = next(&mut first).await;
    let mut second = submit(&stand, &again(&job)).await;
    let first = [vec![begun], rest(&mut first).await].concat();
    let second = rest(&mut second).await;
    assert_eq!(parts(&first), parts(&second));
    assert!(parts(&first).last().expect("an end").done);
    let origin = |chunks: &[InferChunk]| chunks.iter().find_map(|chunk| chunk.origin).expect("is told");
    let (ran, joined) = (origin(&first), origin(&second));
    assert_eq!((ran.created_at, ran.replayed, joined.replayed), (joined.created_at, false, false));
    assert_eq!((ran.attached, joined.attached), (false, true));
    assert_eq!((worker.jobs_seen(), stand.usage().await.len()), (1, 1));
}

#[tokio::test]
async fn an_answer_that_has_ended_is_replayed_also_by_the_next_orchestrator() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = SqliteStore::open(folder.path().join("store.db"), StoreOptions::default());
    let store = Arc::new(store.expect("opens"));
    let (job, first) = {
        let stand = stand_on(store.clone(), Config::default()).await;
        let worker = stand.worker(1, Manner::Answer(5)).await;
        let job = repeatable(&stand);
        let first = whole(&stand, &job).await;
        let second = whole(&stand, &again(&job)).await;
        assert_eq!((is_replayed(&first), is_replayed(&second)), (false, true));
        assert_eq!(parts(&first), parts(&second));
        assert_eq!((worker.jobs_seen(), stand.usage().await.len()), (1, 1));
        (job, first)
    };
    let sealed = bytes_of_files(folder.path());
    assert!(!sealed.windows(9).any(|bytes| bytes == b"\"text\":\"0"), "no answer lies in the store as it is");
    let stand = stand_on(store, Config::default()).await;
    let third = whole(&stand, &again(&job)).await;
    assert!(is_replayed(&third));
    assert_eq!(parts(&first), parts(&third));
    assert_eq!(third[0].origin.map(|origin| origin.created_at), first[0].origin.map(|origin| origin.created_at));
}

fn bytes_of_files(folder: &std::path::Path) -> Vec<u8> {
    let files = std::fs::read_dir(folder).expect("a folder").map(|file| file.expect("readable").path());
    files.flat_map(|file| std::fs::read(file).expect("readable")).collect()
}

#[tokio::test]
async fn another_request_under_the_token_is_refused_while_its_job_runs_and_after() {
    let stand = stand(Config::default()).await;
    stand.worker(1, Manner::Read(1)).await;
    let job = repeatable(&stand);
    let other = InferRequest { fingerprint: Some(Digest::of(b"that")), ..job.clone() };
    let mut first = submit(&stand, &job).await;
    next(&mut first).await;
    for _ in 0..2 {
        let refused = stand.answer(&other).await.expect_err("not a repeat");
        assert_eq!((refused.code, refused.param.as_deref()), (ErrorCode::IdempotencyKeyReused, Some("retryToken")));
        rest(&mut first).await;
    }
}

#[tokio::test]
async fn a_job_goes_on_when_its_client_is_away_and_is_billed_once() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Read(1)).await;
    let job = repeatable(&stand);
    let mut first = submit(&stand, &job).await;
    next(&mut first).await;
    drop(first);
    assert_eq!(stand.settled(&job).await.state, COMPLETED);
    let second = whole(&stand, &again(&job)).await;
    assert!(is_replayed(&second) && second.last().expect("an end").done);
    assert_eq!(worker.jobs_seen(), 1);
    assert_eq!(stand.usage().await[0].usage.completion_tokens, parts(&second).len() as u32 - 1);
}

#[tokio::test]
async fn a_job_whose_client_stays_away_is_given_up_and_billed_for_what_was_read() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let job = InferRequest { linger_ms: Some(50), ..repeatable(&stand) };
    let mut first = submit(&stand, &job).await;
    while next(&mut first).await.progress.is_some() {}
    drop(tokio::time::timeout(Duration::from_millis(20), first.next()).await);
    drop(first);
    worker.cancelled.notified().await;
    let record = stand.settled(&job).await;
    assert_eq!((record.state, record.usage.map(|usage| usage.completion_tokens)), (CANCELLED, Some(1)));
    let refused = stand.answer(&again(&job)).await.expect_err("its answer is not kept");
    assert_eq!(refused.code, ErrorCode::IdempotencyKeyReused);
}

#[tokio::test]
async fn a_repeat_of_a_job_that_failed_runs_it_again() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::DieUntold(1)).await;
    let job = repeatable(&stand);
    let mut first = submit(&stand, &job).await;
    while let Some(Ok(_)) = first.next().await {}
    assert_eq!(stand.settled(&job).await.state, DurableState::Settled(TerminalState::Failed));
    *worker.manner.lock() = Manner::Answer(3);
    let second = whole(&stand, &again(&job)).await;
    assert_eq!((parts(&second).len(), parts(&second)[0].attempt), (4, 2));
    assert_eq!((stand.record(&job).await.expect("kept").state, stand.usage().await.len()), (COMPLETED, 1));
}

#[tokio::test]
async fn an_answer_that_is_not_to_be_kept_stays_with_its_orchestrator_for_a_while() {
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    let stand = stand_on(store.clone(), Config::default()).await;
    stand.worker(1, Manner::Answer(3)).await;
    let job = InferRequest { keeps_answer: false, ..repeatable(&stand) };
    let first = whole(&stand, &job).await;
    let second = whole(&stand, &again(&job)).await;
    assert_eq!((parts(&first), is_replayed(&second)), (parts(&second), true));
    assert_eq!(stand.usage().await.len(), 1);
    let stand = stand_on(store, Config::default()).await;
    let refused = stand.answer(&again(&job)).await.expect_err("its answer is gone");
    assert_eq!(refused.code, ErrorCode::IdempotencyKeyReused);
}

#[tokio::test]
async fn an_orchestrator_may_keep_no_answers() {
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    let config = Config { answers_kept_hours: 0, ..Config::default() };
    let stand = stand_on(store.clone(), config.clone()).await;
    stand.worker(1, Manner::Answer(3)).await;
    let job = repeatable(&stand);
    assert_eq!(parts(&whole(&stand, &job).await).len(), 4);
    let stand = stand_on(store, config).await;
    let refused = stand.answer(&again(&job)).await.expect_err("its answer is gone");
    assert_eq!(refused.code, ErrorCode::IdempotencyKeyReused);
}

#[tokio::test]
async fn a_repeat_runs_at_once_after_its_orchestrator_was_killed() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str| folder.path().join(name);
    let open = |name: &str| Arc::new(SqliteStore::open(file(name), StoreOptions::default()).expect("opens"));
    let first = stand_on(open("first.db"), Config::default()).await;
    first.worker(1, Manner::Hang).await;
    let job = repeatable(&first);
    let mut answer = submit(&first, &job).await;
    next(&mut answer).await;
    // What a process leaves that is killed now.
    for end in ["", "-wal"] {
        std::fs::copy(file(&format!("first.db{end}")), file(&format!("second.db{end}"))).expect("copied");
    }
    let second = stand_on(open("second.db"), Config::default()).await;
    // The store knows the reports of the first worker.
    second.worker(2, Manner::Answer(1)).await;
    let chunks = whole(&second, &again(&job)).await;
    assert!(parts(&chunks).iter().all(|chunk| chunk.attempt == 2), "{chunks:?}");
    let record = second.record(&job).await.expect("kept");
    assert_eq!((record.state, record.attempt, second.usage().await.len()), (COMPLETED, 2, 1));
}

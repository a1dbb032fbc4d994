//! A caller pays for what it acknowledged.

use std::time::Duration;

use futures_util::FutureExt as _;
use metadata_store::{DurableState, JobRecord, TerminalState};
use protocol::ErrorCode;
use protocol::infer::InferRequest;
use protocol::usage::TokenUsage;
use rpc::{CallError, ResponseStream};
use tether_orchestrator::Config;

use crate::stand::{Manner, Stand, key, stand};

/// A job whose caller acknowledges what it reads, and its answer.
async fn acknowledged(stand: &Stand) -> (InferRequest, ResponseStream) {
    let job = InferRequest { acknowledges: true, ..stand.job() };
    let mut answer = stand.submit(&job).await.expect("accepted");
    answer.acknowledge_reads();
    (job, answer)
}

async fn read(answer: &mut ResponseStream, chunks: usize) {
    for _ in 0..chunks {
        answer.next().await.expect("a chunk").expect("no error");
    }
}

fn tokens(record: &JobRecord) -> u32 {
    record.usage.map_or(0, |usage| usage.completion_tokens)
}

const CANCELLED: DurableState = DurableState::Settled(TerminalState::Cancelled);

#[tokio::test]
async fn an_answer_that_its_caller_read_to_the_end_is_billed_whole() {
    let stand = stand(Config::default()).await;
    stand.worker(1, Manner::Answer(300)).await;
    let (job, mut answer) = acknowledged(&stand).await;
    read(&mut answer, 301).await;
    let record = stand.record(&job).await.expect("kept");
    assert_eq!((record.state, tokens(&record)), (DurableState::Settled(TerminalState::Completed), 300));
}

#[tokio::test]
async fn a_caller_that_freezes_pays_nothing_that_it_did_not_acknowledge() {
    let stand = stand(Config { caller_stall_secs: 1, ..Config::default() }).await;
    stand.worker(1, Manner::Answer(75)).await;
    let (job, mut answer) = acknowledged(&stand).await;
    read(&mut answer, 15).await;
    let record = stand.settled(&job).await;
    assert_eq!((record.state, record.usage), (CANCELLED, None));
    assert!(stand.usage().await.is_empty(), "no line of a bill for nothing");
    assert_eq!(stand.store.active_reservations().await.expect("readable"), []);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_reads_slowly_is_not_gone() {
    let stand = stand(Config { caller_stall_secs: 3, ..Config::default() }).await;
    stand.worker(1, Manner::Answer(10)).await;
    let (job, mut answer) = acknowledged(&stand).await;
    for _ in 0..11 {
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        read(&mut answer, 1).await;
    }
    let record = stand.record(&job).await.expect("kept");
    assert_eq!((record.state, tokens(&record)), (DurableState::Settled(TerminalState::Completed), 10));
}

#[tokio::test]
async fn a_caller_that_was_given_up_is_told_so() {
    let stand = stand(Config { caller_stall_secs: 1, ..Config::default() }).await;
    stand.worker(1, Manner::Answer(75)).await;
    let (job, mut answer) = acknowledged(&stand).await;
    read(&mut answer, 15).await;
    stand.settled(&job).await;
    read(&mut answer, 60).await;
    let end = answer.next().await.expect("an end").expect_err("not the answer's");
    assert!(matches!(&end, CallError::Remote(error) if error.code == ErrorCode::Unavailable), "{end:?}");
}

#[tokio::test]
async fn a_caller_that_leaves_pays_for_what_it_read() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let (job, mut answer) = acknowledged(&stand).await;
    read(&mut answer, 1).await;
    assert!(answer.next().now_or_never().is_none(), "who asks for the next chunk has read this one");
    drop(answer);
    worker.cancelled.notified().await;
    let record = stand.settled(&job).await;
    let read = TokenUsage { prompt_tokens: 3, completion_tokens: 1, ..TokenUsage::default() };
    assert_eq!((record.state, record.usage), (CANCELLED, Some(read)));
}

#[tokio::test]
async fn a_caller_that_dies_in_mid_answer_pays_for_no_more_than_it_read() {
    let stand = stand(Config::default()).await;
    stand.worker(1, Manner::Read(4)).await;
    let (job, mut answer) = acknowledged(&stand).await;
    read(&mut answer, 3).await;
    stand.network.cut(key(202).public_key());
    let record = stand.settled(&job).await;
    assert_eq!(record.state, CANCELLED);
    assert!((1..=2).contains(&tokens(&record)), "{record:?}");
}

#[tokio::test]
async fn another_request_under_a_known_token_is_refused_as_such() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(1)).await;
    let asked = |text: &str| Some(protocol::Digest::of(text.as_bytes()));
    let job = InferRequest { fingerprint: asked("this"), ..stand.job() };
    stand.answer(&job).await.expect("answered");
    let later = InferRequest { trace_id: protocol::TraceId([2; 16]), deadline_ms: Some(9_999), ..job.clone() };
    let repeat = stand.answer(&later).await.expect_err("its answer is not kept");
    assert_eq!(repeat.code, ErrorCode::IdempotencyKeyReused);
    let other = InferRequest { fingerprint: asked("that"), ..job };
    let refused = stand.answer(&other).await.expect_err("not a repeat");
    assert_eq!((refused.code, refused.param.as_deref()), (ErrorCode::IdempotencyKeyReused, Some("retryToken")));
    assert_eq!(worker.jobs_seen(), 1);
}

#[tokio::test]
async fn a_caller_that_acknowledges_nothing_gets_what_it_always_got() {
    let stand = stand(Config::default()).await;
    stand.worker(1, Manner::Answer(2)).await;
    let chunks = stand.answer(&stand.job()).await.expect("answered");
    assert_eq!(chunks.len(), 3);
    assert_eq!(stand.usage().await[0].usage.completion_tokens, 2);
}

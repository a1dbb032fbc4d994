//! Which jobs leave a dead letter, and what it holds.

use metadata_store::{DurableState, TerminalState};
use protocol::jobs::{AttemptRecord, DeadLetter, DeadLetterCause, DeadLetterQuery};
use protocol::{ErrorCode, WorkerId};
use tether_orchestrator::Config;

use crate::stand::{Manner, Stand, stand};

async fn letters(stand: &Stand) -> Vec<DeadLetter> {
    let query = DeadLetterQuery { limit: 100, ..DeadLetterQuery::default() };
    stand.store.list_dead_letters(query).await.expect("readable").dead_letters
}

fn ends(history: &[AttemptRecord]) -> Vec<(WorkerId, &str, bool)> {
    history.iter().map(|attempt| (attempt.worker_id, attempt.outcome.as_str(), attempt.counted)).collect()
}

#[tokio::test]
async fn a_poison_request_leaves_one_dead_letter_with_its_sealed_request() {
    let stand = stand(Config::default()).await;
    let (first, second) = stand.pair(Manner::Crash(1), Manner::Crash(1)).await;
    let (first, second) = (first.key.public_key(), second.key.public_key());
    let job = stand.job();
    stand.answer(&job).await.expect_err("engines crash on it");
    let letters = letters(&stand).await;
    let [letter] = &letters[..] else { panic!("one letter: {letters:?}") };
    assert_eq!((letter.correlation_id, &letter.tenant_id), (job.correlation_id, &job.tenant_id));
    let code = ErrorCode::RequestCrashesEngine;
    assert_eq!((letter.cause, letter.error_code), (DeadLetterCause::EnginesCrashed, code));
    assert_eq!(ends(&letter.history), [(first, "engine_crashed", true), (second, "engine_crashed", true)]);
    let (_, payload) = stand.store.dead_letter(job.correlation_id).await.expect("readable").expect("is there");
    let payload = payload.expect("kept");
    assert_eq!(letter.payload_bytes.expect("kept") as usize + 24 + 16, payload.len());
    assert!(!payload.windows(4).any(|bytes| bytes == b"\"hi\""), "it is sealed");

    // A repeat is refused before it is a job.
    assert_eq!(stand.answer(&stand.job()).await.expect_err("it is known").code, code);
    assert_eq!(self::letters(&stand).await.len(), 1);
}

#[tokio::test]
async fn a_job_that_workers_fail_without_progress_leaves_a_dead_letter() {
    let stand = stand(Config::default()).await;
    for number in 1..=3 {
        stand.worker(number, Manner::Refuse(ErrorCode::WorkerFailed)).await;
    }
    let job = stand.job();
    assert_eq!(stand.answer(&job).await.expect_err("all fail").code, ErrorCode::WorkerFailed);
    let letters = letters(&stand).await;
    assert_eq!(letters.iter().map(|letter| letter.cause).collect::<Vec<_>>(), [DeadLetterCause::AttemptsFailed]);
    let record = stand.record(&job).await.expect("kept");
    assert_eq!(record.state, DurableState::Settled(TerminalState::Failed));
    assert_eq!((record.history.len(), &record.history), (3, &letters[0].history));
    let numbers: Vec<u32> = record.history.iter().map(|attempt| attempt.attempt).collect();
    assert_eq!(numbers, [1, 2, 3]);
}

#[tokio::test]
async fn failures_that_say_nothing_of_the_request_leave_no_dead_letter() {
    let manners = [
        ("killed", Manner::DieAfter(0)),
        ("killed in the middle of the answer", Manner::DieUntold(2)),
        ("their engines killed", Manner::LoseEngine),
        ("stopped", Manner::Refuse(ErrorCode::WorkerStopping)),
        ("full", Manner::Refuse(ErrorCode::WorkerFull)),
        ("away", Manner::Refuse(ErrorCode::Unavailable)),
        ("the caller's fault", Manner::Refuse(ErrorCode::ContextLengthExceeded)),
    ];
    for (name, manner) in manners {
        let stand = stand(Config::default()).await;
        for number in 1..=4 {
            stand.worker(number, manner.clone()).await;
        }
        let job = stand.job();
        stand.answer(&job).await.expect_err(name);
        assert_eq!(stand.settled(&job).await.state, DurableState::Settled(TerminalState::Failed), "{name}");
        assert_eq!(letters(&stand).await, [], "{name}");
    }
}

#[tokio::test]
async fn an_answer_that_others_continue_has_the_history_of_all_and_no_dead_letter() {
    let stand = stand(Config::default()).await;
    let (first, second) = stand.pair(Manner::CrashAfter(2), Manner::Answer(4)).await;
    let job = stand.job();
    stand.answer(&job).await.expect("continued");
    let record = stand.record(&job).await.expect("kept");
    assert_eq!(record.continued, 1);
    let expected = [(first.key.public_key(), "engine_crashed", false), (second.key.public_key(), "completed", false)];
    assert_eq!(ends(&record.history), expected);
    assert!(record.history.iter().all(|attempt| attempt.progressed && attempt.began_at <= attempt.ended_at));
    assert_eq!(letters(&stand).await, []);
}

#[tokio::test]
async fn no_dead_letter_is_written_where_none_is_to_be_kept() {
    let stand = stand(Config { dead_letters_max: 0, ..Config::default() }).await;
    stand.pair(Manner::Crash(1), Manner::Crash(1)).await;
    stand.answer(&stand.job()).await.expect_err("engines crash on it");
    assert_eq!(letters(&stand).await, []);
}

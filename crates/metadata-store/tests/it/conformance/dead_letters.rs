//! Dead letters.

use protocol::jobs::{DeadLetter, DeadLetterCause, DeadLetterPurge, DeadLetterQuery};
use protocol::{ErrorCode, UnixMillis};
use tether_metadata_store::{
    Finalised, JobError, JobKey, JobStore, NewDeadLetter, NewJob, SealedPayload, Settlement, TerminalState,
};

use super::Jobs;
use super::samples::{LEASE, NOW, attempt, job, key, model_key, settlement, tenant};

fn letter(sealed: &[u8]) -> NewDeadLetter {
    NewDeadLetter {
        cause: DeadLetterCause::EnginesCrashed,
        history: vec![attempt(1, 1, "engine_crashed"), attempt(2, 1, "engine_crashed")],
        payload: Some(SealedPayload { sealed: sealed.to_vec(), plain_bytes: 3 }),
        letters_max: 100,
        bytes_max: 1_000,
    }
}

/// A job that died so.
fn death(number: u128, letter: NewDeadLetter) -> Settlement {
    let error = JobError { code: ErrorCode::RequestCrashesEngine, message: "change it".into() };
    let now = UnixMillis(NOW.0 + number as u64);
    let dead_letter = Some(letter);
    Settlement { state: TerminalState::Dead, error: Some(error), usage: None, now, dead_letter, ..settlement(number) }
}

async fn die(store: &dyn JobStore, number: u128, letter: NewDeadLetter) {
    store.reserve(NewJob { worker_capacity: 99, ..job(number) }).await.expect("reserves");
    assert_eq!(store.finalise(death(number, letter)).await, Ok(Finalised::Settled));
}

async fn numbers(store: &dyn JobStore) -> Vec<u128> {
    let page = store.list_dead_letters(DeadLetterQuery { limit: 100, ..DeadLetterQuery::default() }).await;
    page.expect("reads").dead_letters.iter().map(|letter| letter.correlation_id.0.as_u128()).collect()
}

pub(crate) async fn a_dead_letter_is_written_with_its_settlement(subject: Jobs) {
    let store = subject.store;
    die(&*store, 1, letter(b"sealed")).await;
    let (found, payload) = store.dead_letter(key(1).correlation_id).await.expect("reads").expect("is there");
    let NewJob { trace_id, model, region, .. } = job(1);
    let expected = DeadLetter {
        sequence: 1,
        correlation_id: key(1).correlation_id,
        tenant_id: tenant("acme"),
        model,
        region,
        trace_id,
        cause: DeadLetterCause::EnginesCrashed,
        error_code: ErrorCode::RequestCrashesEngine,
        error_message: "change it".into(),
        history: letter(b"").history,
        created_at: NOW,
        died_at: UnixMillis(NOW.0 + 1),
        payload_bytes: Some(3),
        request: None,
    };
    assert_eq!((found, payload.as_deref()), (expected, Some(b"sealed".as_slice())));
    assert_eq!(store.count_dead_letters().await, Ok(1));
    assert_eq!(store.dead_letter(key(2).correlation_id).await, Ok(None));

    // It outlives its job.
    assert_eq!(store.prune(LEASE, 10).await, Ok(1));
    assert_eq!(numbers(&*store).await, [1]);
}

pub(crate) async fn a_settlement_that_changes_nothing_writes_no_letter(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    let stale = Settlement { attempt: 2, ..death(1, letter(b"x")) };
    assert_eq!(store.finalise(stale).await, Ok(Finalised::Stale { attempt: 1 }));
    store.finalise(settlement(1)).await.expect("settles");
    let settled = Finalised::AlreadySettled { state: TerminalState::Completed };
    assert_eq!(store.finalise(death(1, letter(b"x"))).await, Ok(settled));
    assert_eq!(store.count_dead_letters().await, Ok(0));
}

pub(crate) async fn the_oldest_letters_make_room(subject: Jobs) {
    let store = subject.store;
    for number in 1..=5 {
        die(&*store, number, NewDeadLetter { letters_max: 3, ..letter(b"x") }).await;
    }
    assert_eq!(numbers(&*store).await, [5, 4, 3]);
    let long = [0; 90];
    for number in 6..=8 {
        die(&*store, number, NewDeadLetter { bytes_max: 200, ..letter(&long) }).await;
    }
    assert_eq!(numbers(&*store).await, [8, 7]);
    // Without its payload, a letter takes no bytes.
    die(&*store, 9, NewDeadLetter { bytes_max: 89, payload: None, ..letter(b"") }).await;
    assert_eq!(numbers(&*store).await, [9]);
    die(&*store, 10, NewDeadLetter { bytes_max: 89, ..letter(&long) }).await;
    assert_eq!(numbers(&*store).await, [10, 9]);
    let (found, payload) = store.dead_letter(key(10).correlation_id).await.expect("reads").expect("is there");
    assert_eq!((found.payload_bytes, payload), (None, None));
    die(&*store, 11, NewDeadLetter { letters_max: 0, ..letter(b"x") }).await;
    assert_eq!(numbers(&*store).await, [10, 9]);
}

pub(crate) async fn letters_are_listed_in_pages_by_tenant_and_model(subject: Jobs) {
    let store = subject.store;
    for number in 1..=5 {
        die(&*store, number, letter(b"x")).await;
    }
    let (other, model) = (JobKey { tenant_id: tenant("other"), ..key(6) }, model_key("other", "1.0"));
    store.reserve(NewJob { key: other.clone(), model, worker_capacity: 99, ..job(6) }).await.expect("reserves");
    store.finalise(Settlement { key: other, ..death(6, letter(b"x")) }).await.expect("settles");
    let (mut listed, mut before) = (vec![], None);
    loop {
        let page = store.list_dead_letters(DeadLetterQuery { before, limit: 4, ..DeadLetterQuery::default() }).await;
        let page = page.expect("reads");
        listed.extend(page.dead_letters.iter().map(|letter| letter.correlation_id.0.as_u128()));
        match page.next {
            Some(next) => before = Some(next),
            None => break,
        }
    }
    assert_eq!(listed, [6, 5, 4, 3, 2, 1]);
    let of_tenant = DeadLetterQuery { tenant_id: Some(tenant("other")), limit: 9, ..DeadLetterQuery::default() };
    let of_model = DeadLetterQuery { model_id: Some(job(1).model.model_id), limit: 9, ..DeadLetterQuery::default() };
    assert_eq!(store.list_dead_letters(of_tenant).await.expect("reads").dead_letters.len(), 1);
    assert_eq!(store.list_dead_letters(of_model).await.expect("reads").dead_letters.len(), 5);
}

pub(crate) async fn letters_are_deleted_by_request_number_and_age(subject: Jobs) {
    let store = subject.store;
    for number in 1..=6 {
        die(&*store, number, letter(b"x")).await;
    }
    let purge = |purge| store.purge_dead_letters(purge);
    let by_request = DeadLetterPurge { correlation_id: Some(key(5).correlation_id), ..DeadLetterPurge::default() };
    assert_eq!(purge(by_request.clone()).await, Ok(1));
    assert_eq!(purge(by_request).await, Ok(0));
    assert_eq!(purge(DeadLetterPurge { sequence: Some(6), ..DeadLetterPurge::default() }).await, Ok(1));
    let before = Some(UnixMillis(NOW.0 + 3));
    assert_eq!(purge(DeadLetterPurge { died_before: before, ..DeadLetterPurge::default() }).await, Ok(2));
    assert_eq!(numbers(&*store).await, [4, 3]);
    assert_eq!(purge(DeadLetterPurge::default()).await, Ok(2));
    assert_eq!(store.count_dead_letters().await, Ok(0));
}

pub(crate) async fn an_expired_lease_leaves_no_letter(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    assert_eq!(store.release_expired(LEASE, 10).await.expect("releases").len(), 1);
    assert_eq!(store.count_dead_letters().await, Ok(0));
}

//! Jobs, reservations, usage and presence marks.

use protocol::infer::FinishReason;
use protocol::jobs::{JobQuery, JobStatus};
use protocol::presence::HighWater;
use protocol::{ErrorCode, UnixMillis, WireError};
use tether_metadata_store::{
    DurableState, FinaliseError, Finalised, JobError, JobKey, JobRecord, NewJob, NewNote, ReassignError, Reassignment,
    ReserveError, Reserved, SealedAnswer, Settlement, StoreError, TerminalState, UsageCursor,
};

use super::Jobs;
use super::samples::{
    LEASE, NOW, USAGE, attempt, job, key, lease, model_key, reassignment, settlement, tenant, worker,
};

pub(crate) async fn a_reserved_job_is_found_as_it_was_written(subject: Jobs) {
    let store = subject.store;
    assert_eq!(store.reserve(job(1)).await, Ok(Reserved::New));
    let NewJob { trace_id, model, region, worker_id, request_fingerprint, .. } = job(1);
    let expected = JobRecord {
        sequence: 1,
        key: key(1),
        trace_id,
        model,
        region,
        worker_id,
        attempt: 1,
        state: DurableState::Reserved,
        finish_reason: None,
        error: None,
        usage: None,
        request_fingerprint,
        lease_until: Some(LEASE),
        created_at: NOW,
        updated_at: NOW,
        continued: 0,
        history: vec![],
    };
    assert_eq!(store.job(&key(1)).await, Ok(Some(expected)));
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 1)]));
}

pub(crate) async fn the_same_key_again_returns_the_job_there_is(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    let again = NewJob { worker_id: worker(2), request_fingerprint: [6; 32], ..job(1) };
    let outcome = store.reserve(again).await.expect("a resend is no error");
    let Reserved::Duplicate(known) = outcome else { panic!("the job is known: {outcome:?}") };
    assert_eq!((known.worker_id, known.request_fingerprint), (worker(1), [5; 32]));
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 1)]));

    store.finalise(settlement(1)).await.expect("settles");
    let outcome = store.reserve(job(1)).await.expect("a resend is no error");
    let Reserved::Duplicate(known) = outcome else { panic!("the job is known: {outcome:?}") };
    assert_eq!(known.state, DurableState::Settled(TerminalState::Completed));
    assert_eq!(known.lease_until, None);
    assert_eq!(store.active_reservations().await, Ok(vec![]));
}

pub(crate) async fn a_resend_finds_its_job_even_while_the_worker_is_full(subject: Jobs) {
    let store = subject.store;
    let only = NewJob { worker_capacity: 1, ..job(1) };
    store.reserve(only.clone()).await.expect("reserves");
    assert!(matches!(store.reserve(only).await, Ok(Reserved::Duplicate(_))));
}

pub(crate) async fn another_tenant_token_or_id_is_another_job(subject: Jobs) {
    let store = subject.store;
    let keys = [
        key(1),
        key(2),
        JobKey { tenant_id: tenant("other"), ..key(1) },
        JobKey { retry_token: "retry-2".parse().expect("a token"), ..key(1) },
    ];
    for key in keys {
        assert_eq!(store.reserve(NewJob { key, ..job(1) }).await, Ok(Reserved::New));
    }
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 4)]));
}

pub(crate) async fn a_full_worker_takes_no_further_job(subject: Jobs) {
    let store = subject.store;
    for number in 1..=4 {
        store.reserve(job(number)).await.expect("there is room");
    }
    assert_eq!(store.reserve(job(5)).await, Err(ReserveError::NoCapacity { worker_id: worker(1) }));
    assert_eq!(store.job(&key(5)).await, Ok(None), "a refused job leaves nothing behind");
    let elsewhere = NewJob { worker_id: worker(2), ..job(5) };
    assert_eq!(store.reserve(elsewhere).await, Ok(Reserved::New));
    let nowhere = NewJob { worker_id: worker(3), worker_capacity: 0, ..job(6) };
    assert_eq!(store.reserve(nowhere).await, Err(ReserveError::NoCapacity { worker_id: worker(3) }));
}

pub(crate) async fn a_settled_job_frees_its_slot(subject: Jobs) {
    let store = subject.store;
    for number in 1..=4 {
        store.reserve(job(number)).await.expect("there is room");
    }
    for (number, state) in [
        (1, TerminalState::Completed),
        (2, TerminalState::Failed),
        (3, TerminalState::Cancelled),
        (4, TerminalState::Dead),
    ] {
        let settled = store.finalise(Settlement { state, ..settlement(number) }).await;
        assert_eq!(settled, Ok(Finalised::Settled));
        assert_eq!(store.reserve(job(number + 10)).await, Ok(Reserved::New), "after {state:?}");
    }
}

pub(crate) async fn a_settled_job_says_how_it_ended(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    store.reserve(job(2)).await.expect("reserves");
    let completed =
        Settlement { finish_reason: Some(FinishReason::Length), now: UnixMillis(NOW.0 + 7), ..settlement(1) };
    store.finalise(completed).await.expect("settles");
    let error = JobError { code: ErrorCode::DeadlineExceeded, message: "too slow".into() };
    let failed = Settlement { state: TerminalState::Failed, error: Some(error.clone()), usage: None, ..settlement(2) };
    store.finalise(failed).await.expect("settles");

    let completed = store.job(&key(1)).await.expect("reads").expect("is known");
    assert_eq!(completed.state, DurableState::Settled(TerminalState::Completed));
    assert_eq!(completed.finish_reason, Some(FinishReason::Length));
    assert_eq!((completed.usage, completed.lease_until), (Some(USAGE), None));
    assert_eq!((completed.created_at, completed.updated_at), (NOW, UnixMillis(NOW.0 + 7)));
    let failed = store.job(&key(2)).await.expect("reads").expect("is known");
    assert_eq!((failed.state, failed.error), (DurableState::Settled(TerminalState::Failed), Some(error)));
}

pub(crate) async fn a_second_settlement_changes_and_bills_nothing(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    store.finalise(settlement(1)).await.expect("settles");
    let before = store.job(&key(1)).await;
    for state in [TerminalState::Completed, TerminalState::Failed] {
        let outcome = store.finalise(Settlement { state, now: LEASE, ..settlement(1) }).await;
        assert_eq!(outcome, Ok(Finalised::AlreadySettled { state: TerminalState::Completed }));
    }
    assert_eq!(store.job(&key(1)).await, before);
    assert_eq!(store.usage(&tenant("acme"), UsageCursor::default(), 10).await.expect("reads").len(), 1);
}

pub(crate) async fn only_completed_and_cancelled_jobs_are_billed(subject: Jobs) {
    let store = subject.store;
    let endings = [
        (1, TerminalState::Completed, Some(USAGE)),
        (2, TerminalState::Cancelled, Some(USAGE)),
        (3, TerminalState::Failed, Some(USAGE)),
        (4, TerminalState::Dead, Some(USAGE)),
        (5, TerminalState::Cancelled, None),
    ];
    for (number, state, usage) in endings {
        store.reserve(NewJob { worker_capacity: 9, ..job(number) }).await.expect("reserves");
        store.finalise(Settlement { state, usage, ..settlement(number) }).await.expect("settles");
    }
    let records = store.usage(&tenant("acme"), UsageCursor::default(), 10).await.expect("reads");
    assert_eq!(records.iter().map(|record| record.key.clone()).collect::<Vec<_>>(), [key(1), key(2)]);
    let record = &records[0];
    assert_eq!((record.usage, record.worker_id, record.attempt), (USAGE, worker(1), 1));
    assert_eq!((&record.model, &record.region, record.settled_at), (&job(1).model, &job(1).region, NOW));
}

pub(crate) async fn an_attempt_that_was_given_up_on_cannot_settle(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    store.reassign(reassignment(1)).await.expect("moves");
    assert_eq!(store.finalise(settlement(1)).await, Ok(Finalised::Stale { attempt: 2 }));
    let wrong_worker = Settlement { attempt: 2, ..settlement(1) };
    assert_eq!(store.finalise(wrong_worker).await, Ok(Finalised::Stale { attempt: 2 }));
    assert_eq!(store.usage(&tenant("acme"), UsageCursor::default(), 10).await, Ok(vec![]));
    let present = Settlement { attempt: 2, worker_id: worker(2), ..settlement(1) };
    assert_eq!(store.finalise(present).await, Ok(Finalised::Settled));
}

pub(crate) async fn a_job_that_came_to_nothing_runs_again_as_its_next_attempt(subject: Jobs) {
    let store = subject.store;
    let endings = [
        (1, TerminalState::Failed, Some(USAGE), true),
        (2, TerminalState::Cancelled, None, true),
        (3, TerminalState::Cancelled, Some(USAGE), false),
        (4, TerminalState::Completed, None, true),
        (5, TerminalState::Dead, None, false),
    ];
    for (number, state, usage, runs_again) in endings {
        let runs_again = runs_again && state != TerminalState::Completed;
        store.reserve(NewJob { worker_capacity: 9, ..job(number) }).await.expect("reserves");
        store.finalise(Settlement { state, usage, ..settlement(number) }).await.expect("settles");
        let other = NewJob { request_fingerprint: [6; 32], worker_capacity: 9, ..job(number) };
        assert!(matches!(store.reserve(other).await, Ok(Reserved::Duplicate(_))), "another request is refused");
        let full = NewJob { worker_capacity: 0, ..job(number) };
        let again = NewJob { worker_id: worker(2), worker_capacity: 9, now: LEASE, ..job(number) };
        let (when_full, outcome) = (store.reserve(full).await, store.reserve(again).await);
        if runs_again {
            assert_eq!(when_full, Err(ReserveError::NoCapacity { worker_id: worker(1) }), "{state:?}");
            assert_eq!(outcome, Ok(Reserved::Again { attempt: 2 }), "{state:?}");
        } else {
            let is_known = matches!((&when_full, &outcome), (Ok(Reserved::Duplicate(_)), Ok(Reserved::Duplicate(_))));
            assert!(is_known, "{state:?}: {outcome:?}");
        }
    }
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(2), 2)]));
    let again = store.job(&key(1)).await.expect("reads").expect("is known");
    assert_eq!((again.state, again.error, again.attempt), (DurableState::Reserved, None, 2));
    assert_eq!((again.created_at, again.updated_at), (NOW, LEASE));
    assert_eq!(store.finalise(settlement(1)).await, Ok(Finalised::Stale { attempt: 2 }), "the first attempt is over");
    let second = Settlement { attempt: 2, worker_id: worker(2), ..settlement(1) };
    assert_eq!(store.finalise(second).await, Ok(Finalised::Settled));
    let billed = store.usage(&tenant("acme"), UsageCursor::default(), 10).await.expect("reads");
    assert_eq!(billed.iter().filter(|record| record.key == key(1)).count(), 1);
}

fn answer(text: &[u8], expires_at: UnixMillis) -> SealedAnswer {
    SealedAnswer { sealed: text.into(), expires_at }
}

pub(crate) async fn an_answer_is_kept_with_its_settlement_and_no_other(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    assert_eq!(store.answer(&key(1), NOW).await, Ok(None));
    let kept = Settlement { answer: Some(answer(b"kept", LEASE)), ..settlement(1) };
    let stale = Settlement { attempt: 2, answer: Some(answer(b"stale", LEASE)), ..settlement(1) };
    assert_eq!(store.finalise(stale.clone()).await, Ok(Finalised::Stale { attempt: 1 }));
    assert_eq!(store.answer(&key(1), NOW).await, Ok(None));
    store.finalise(kept).await.expect("settles");
    store.finalise(stale).await.expect("is settled");
    assert_eq!(store.answer(&key(1), NOW).await, Ok(Some(b"kept".to_vec())));
    assert_eq!(store.answer(&key(1), LEASE).await, Ok(None), "it has expired");
    assert_eq!(store.answer(&key(2), NOW).await, Ok(None));
}

pub(crate) async fn answers_are_pruned_by_age_and_by_bytes(subject: Jobs) {
    let store = subject.store;
    for number in 1..=4 {
        store.reserve(NewJob { worker_capacity: 9, ..job(number) }).await.expect("reserves");
        let kept = answer(&[0; 10], UnixMillis(NOW.0 + number as u64));
        store.finalise(Settlement { answer: Some(kept), ..settlement(number) }).await.expect("settles");
    }
    let has = async |number| store.answer(&key(number), NOW).await.expect("reads").is_some();
    assert_eq!(store.prune_answers(NOW, 40, 10).await, Ok(0));
    assert_eq!(store.prune_answers(UnixMillis(NOW.0 + 1), 40, 10).await, Ok(1));
    assert!(!has(1).await && has(2).await);
    assert_eq!(store.prune_answers(NOW, 15, 1).await, Ok(1), "one at a time");
    assert!(!has(2).await && has(3).await);
    assert_eq!(store.prune_answers(NOW, 15, 10).await, Ok(1));
    assert!(!has(3).await && has(4).await);
    assert!(store.job(&key(1)).await.expect("reads").is_some(), "the job is not removed");
    // The last answer goes with its job, and takes no room any more.
    assert_eq!(store.prune(UnixMillis(LEASE.0 + 1), 10).await, Ok(4));
    for number in 5..=6 {
        store.reserve(NewJob { worker_capacity: 9, ..job(number) }).await.expect("reserves");
        let kept = answer(&[0; 10], LEASE);
        store.finalise(Settlement { answer: Some(kept), ..settlement(number) }).await.expect("settles");
    }
    assert_eq!(store.prune_answers(NOW, 20, 10).await, Ok(0));
    assert!(has(5).await && has(6).await);
}

fn note(number: u128, expires_at: UnixMillis) -> NewNote {
    NewNote { key: key(number), sealed: b"a note".as_slice().into(), created_at: NOW, expires_at }
}

pub(crate) async fn a_note_is_kept_before_its_job_or_with_its_answer_and_removed_with_it(subject: Jobs) {
    let store = subject.store;
    let tenant = key(1).tenant_id;
    let find = async |number, now| store.note(&tenant, key(number).correlation_id, now).await.expect("reads");
    assert_eq!(find(1, NOW).await, None);
    store.keep_note(note(1, LEASE)).await.expect("keeps");
    let kept = find(1, NOW).await.expect("is kept");
    assert_eq!((kept.key, &*kept.sealed, kept.created_at, kept.error), (key(1), &b"a note"[..], NOW, None));
    assert_eq!(find(1, LEASE).await, None, "it has expired");
    let other = "other".parse().expect("tenant");
    assert_eq!(store.note(&other, key(1).correlation_id, NOW).await, Ok(None));
    // The first reason stays, until the job runs again.
    for reason in ["first", "second"] {
        store.fail_note(&key(1), WireError::new(ErrorCode::NoCapacity, reason)).await.expect("writes");
        assert_eq!(find(1, NOW).await.and_then(|kept| kept.error).map(|error| error.message), Some("first".into()));
    }
    store.keep_note(note(1, LEASE)).await.expect("keeps");
    assert_eq!(find(1, NOW).await.expect("is kept").error, None);
    store.reserve(job(2)).await.expect("reserves");
    let kept = Settlement { answer: Some(answer(b"kept", LEASE)), note: Some(note(2, LEASE)), ..settlement(2) };
    store.finalise(kept).await.expect("settles");
    store.fail_note(&key(2), WireError::new(ErrorCode::Cancelled, "too late")).await.expect("writes");
    assert_eq!(find(2, NOW).await.expect("is kept").error, None, "its job has completed");
    assert_eq!(store.remove_note(&other, key(2).correlation_id).await, Ok(false));
    assert_eq!(store.remove_note(&tenant, key(2).correlation_id).await, Ok(true));
    assert_eq!(store.remove_note(&tenant, key(2).correlation_id).await, Ok(false));
    assert_eq!((find(2, NOW).await, store.answer(&key(2), NOW).await), (None, Ok(None)));
}

pub(crate) async fn notes_are_pruned_by_age_and_by_bytes(subject: Jobs) {
    let store = subject.store;
    for number in 1..=3 {
        store.keep_note(note(number, UnixMillis(NOW.0 + number as u64))).await.expect("keeps");
    }
    // A note that replaces another takes its room.
    store.keep_note(note(3, UnixMillis(NOW.0 + 3))).await.expect("keeps");
    assert_eq!(store.prune_notes(NOW, 18, 10).await, Ok(0));
    assert_eq!(store.prune_notes(UnixMillis(NOW.0 + 1), 18, 10).await, Ok(1));
    assert_eq!(store.prune_notes(NOW, 6, 10).await, Ok(1));
    let tenant = key(3).tenant_id;
    assert!(store.note(&tenant, key(3).correlation_id, NOW).await.expect("reads").is_some(), "the youngest stays");
}

pub(crate) async fn answers_of_the_tenant_that_has_most_give_way_first(subject: Jobs) {
    let store = subject.store;
    let of = |number: u128| JobKey { tenant_id: tenant(if number < 3 { "small" } else { "big" }), ..key(number) };
    for number in 1..=8 {
        store.reserve(NewJob { key: of(number), worker_capacity: 9, ..job(number) }).await.expect("reserves");
        // Those of the small tenant would expire first.
        let kept = answer(&[0; 10], UnixMillis(NOW.0 + number as u64));
        let settled = Settlement { key: of(number), answer: Some(kept), ..settlement(number) };
        store.finalise(settled).await.expect("settles");
    }
    let has = async |number| store.answer(&of(number), NOW).await.expect("reads").is_some();
    assert_eq!(store.prune_answers(NOW, 45, 10).await, Ok(4));
    for (number, stays) in [(1, true), (2, true), (3, false), (6, false), (7, true), (8, true)] {
        assert_eq!(has(number).await, stays, "{number}");
    }
    assert_eq!(store.prune_answers(NOW, 0, 10).await, Ok(4));
}

pub(crate) async fn a_job_moves_to_another_worker_as_its_next_attempt(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    let later = UnixMillis(LEASE.0 + 5);
    let model = model_key("other", "2.1");
    let move_on = Reassignment { lease_until: later, now: LEASE, model: model.clone(), ..reassignment(1) };
    store.reassign(move_on).await.expect("moves");
    let moved = store.job(&key(1)).await.expect("reads").expect("is known");
    assert_eq!(moved.model, model, "another model may run it");
    assert_eq!((moved.worker_id, moved.attempt, moved.state), (worker(2), 2, DurableState::Reserved));
    assert_eq!((moved.lease_until, moved.updated_at, moved.created_at), (Some(later), LEASE, NOW));
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(2), 1)]));
}

pub(crate) async fn a_job_moves_only_from_its_present_attempt(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    store.reassign(reassignment(1)).await.expect("moves");
    let stale = ReassignError::Stale { state: DurableState::Reserved, attempt: 2 };
    assert_eq!(store.reassign(reassignment(1)).await, Err(stale));
    let settle = Settlement { attempt: 2, worker_id: worker(2), ..settlement(1) };
    store.finalise(settle).await.expect("settles");
    let settled = ReassignError::Stale { state: DurableState::Settled(TerminalState::Completed), attempt: 2 };
    assert_eq!(store.reassign(Reassignment { from_attempt: 2, ..reassignment(1) }).await, Err(settled));
    assert_eq!(store.active_reservations().await, Ok(vec![]));
}

pub(crate) async fn a_job_stays_where_it_is_when_the_next_worker_is_full(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    let refused = store.reassign(Reassignment { worker_capacity: 0, ..reassignment(1) }).await;
    assert_eq!(refused, Err(ReassignError::NoCapacity { worker_id: worker(2) }));
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 1)]));
    assert_eq!(store.finalise(settlement(1)).await, Ok(Finalised::Settled));
}

pub(crate) async fn a_job_may_try_again_on_its_own_full_worker(subject: Jobs) {
    let store = subject.store;
    store.reserve(NewJob { worker_capacity: 1, ..job(1) }).await.expect("reserves");
    let again = Reassignment { worker_id: worker(1), worker_capacity: 1, ..reassignment(1) };
    assert_eq!(store.reassign(again).await, Ok(()));
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 1)]));
}

pub(crate) async fn a_job_nobody_wrote_is_not_found(subject: Jobs) {
    let store = subject.store;
    assert_eq!(store.job(&key(1)).await, Ok(None));
    assert_eq!(store.reassign(reassignment(1)).await, Err(ReassignError::NotFound));
    assert_eq!(store.finalise(settlement(1)).await, Err(FinaliseError::NotFound));
    assert_eq!(store.renew(vec![lease(1, 1)], LEASE).await, Ok(vec![lease(1, 1)]));
}

pub(crate) async fn a_lease_that_ran_out_fails_its_job_and_frees_the_slot(subject: Jobs) {
    let store = subject.store;
    for number in 1..=4 {
        let lease_until = UnixMillis(LEASE.0 + number as u64);
        store.reserve(NewJob { lease_until, ..job(number) }).await.expect("reserves");
    }
    assert_eq!(store.release_expired(LEASE, 10).await, Ok(vec![]));
    let now = UnixMillis(LEASE.0 + 3);
    let first = store.release_expired(now, 2).await.expect("releases");
    assert_eq!(first.iter().map(|job| job.key.clone()).collect::<Vec<_>>(), [key(1), key(2)], "the oldest first");
    for job in first {
        assert_eq!((job.state, job.lease_until), (DurableState::Settled(TerminalState::Failed), None));
        assert_eq!(job.error.expect("says why").code, ErrorCode::WorkerFailed);
        assert_eq!(job.updated_at, now);
    }
    assert_eq!(store.release_expired(now, 10).await.expect("releases").len(), 1);
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 1)]));
    let late = store.finalise(settlement(1)).await;
    assert_eq!(late, Ok(Finalised::AlreadySettled { state: TerminalState::Failed }));
    assert_eq!(store.usage(&tenant("acme"), UsageCursor::default(), 10).await, Ok(vec![]));
}

pub(crate) async fn a_renewed_lease_lives_on_and_is_never_shortened(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    store.reserve(job(2)).await.expect("reserves");
    store.finalise(settlement(2)).await.expect("settles");
    let later = UnixMillis(LEASE.0 + 1);
    let renewed = store.renew(vec![lease(1, 1), lease(2, 1), lease(3, 1)], later).await;
    assert_eq!(renewed, Ok(vec![lease(2, 1), lease(3, 1)]));
    assert_eq!(store.renew(vec![lease(1, 1)], NOW).await, Ok(vec![]));
    assert_eq!(store.release_expired(LEASE, 10).await, Ok(vec![]));
    assert_eq!(store.job(&key(1)).await.expect("reads").expect("is known").lease_until, Some(later));
}

pub(crate) async fn a_stale_attempt_does_not_renew_the_lease_of_its_successor(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    store.reassign(reassignment(1)).await.expect("moves");
    let (later, moved) = (UnixMillis(LEASE.0 + 100), store.job(&key(1)).await.expect("reads").expect("is known"));
    assert_eq!(store.renew(vec![lease(1, 1)], later).await, Ok(vec![lease(1, 1)]));
    assert_eq!(store.job(&key(1)).await, Ok(Some(moved)));
    assert_eq!(store.renew(vec![lease(1, 2)], later).await, Ok(vec![]));
    assert_eq!(store.job(&key(1)).await.expect("reads").expect("is known").lease_until, Some(later));
}

pub(crate) async fn usage_is_read_in_pages_without_gap_or_repeat(subject: Jobs) {
    let store = subject.store;
    for number in 0..10 {
        store.reserve(job(number)).await.expect("reserves");
        // Three at a time share a millisecond.
        let now = UnixMillis(NOW.0 + number as u64 / 3);
        store.finalise(Settlement { now, ..settlement(number) }).await.expect("settles");
    }
    let mut read = Vec::new();
    let mut cursor = UsageCursor::since(UnixMillis(NOW.0 + 1));
    loop {
        let page = store.usage(&tenant("acme"), cursor, 2).await.expect("reads");
        let Some(last) = page.last() else { break };
        cursor = last.cursor();
        read.extend(page.into_iter().map(|record| record.key));
    }
    assert_eq!(read, (3..10).map(key).collect::<Vec<_>>());
}

pub(crate) async fn usage_is_each_tenants_own(subject: Jobs) {
    let store = subject.store;
    let other = JobKey { tenant_id: tenant("other"), ..key(1) };
    store.reserve(NewJob { key: other.clone(), ..job(1) }).await.expect("reserves");
    store.finalise(Settlement { key: other, ..settlement(1) }).await.expect("settles");
    assert_eq!(store.usage(&tenant("acme"), UsageCursor::default(), 10).await, Ok(vec![]));
    assert_eq!(store.usage(&tenant("other"), UsageCursor::default(), 10).await.expect("reads").len(), 1);
}

pub(crate) async fn a_mark_is_raised_and_never_lowered(subject: Jobs) {
    let store = subject.store;
    let mark = |epoch, seq| HighWater { epoch, seq };
    assert_eq!(store.high_waters().await, Ok(vec![]));
    // Each step: what is offered, and what holds then. Peers choose these numbers, up to the largest.
    for (offered, holds) in [
        (mark(3, 5), mark(3, 5)),
        (mark(3, 4), mark(3, 5)),
        (mark(2, 900), mark(3, 5)),
        (mark(3, 256), mark(3, 256)),
        (mark(4, 0), mark(4, 0)),
        (mark(u64::MAX, 1), mark(u64::MAX, 1)),
        (mark(u64::MAX, u64::MAX), mark(u64::MAX, u64::MAX)),
    ] {
        store.raise_high_water(vec![(worker(1), offered), (worker(2), mark(1, 1))]).await.expect("raises");
        assert_eq!(store.high_waters().await, Ok(vec![(worker(1), holds), (worker(2), mark(1, 1))]));
    }
}

pub(crate) async fn a_closed_store_says_so(subject: Jobs) {
    let store = subject.store;
    store.reserve(job(1)).await.expect("reserves");
    store.close().await.expect("closes");
    assert_eq!(store.reserve(job(2)).await, Err(ReserveError::Store(StoreError::Closed)));
    assert_eq!(store.job(&key(1)).await, Err(StoreError::Closed));
    store.close().await.expect("closing again does nothing");
}

pub(crate) async fn the_attempts_of_a_job_are_kept_with_it(subject: Jobs) {
    let store = subject.store;
    for number in 1..=3 {
        store.reserve(job(number)).await.expect("reserves");
    }
    let first = attempt(1, 1, "worker_failed");
    for number in [1, 2] {
        store.reassign(Reassignment { history: vec![first.clone()], ..reassignment(number) }).await.expect("moves");
    }
    let running = store.jobs_of(key(1).correlation_id).await.expect("reads");
    assert_eq!(running[0].history, std::slice::from_ref(&first));

    let history = vec![first.clone(), attempt(2, 2, "completed")];
    let settle = Settlement { attempt: 2, worker_id: worker(2), history, continued: 1, ..settlement(1) };
    store.finalise(settle.clone()).await.expect("settles");
    let settled = store.job(&key(1)).await.expect("reads").expect("is known");
    assert_eq!((settled.history, settled.continued), (settle.history, 1));

    // Of the attempt during which the lease expired, the store knows only worker and model.
    store.release_expired(LEASE, 10).await.expect("releases");
    let expired = store.job(&key(2)).await.expect("reads").expect("is known");
    let last = expired.history.last().expect("attempts");
    assert_eq!((expired.history.len(), last.attempt, last.worker_id), (2, 2, worker(2)));
    assert_eq!((last.outcome.as_str(), last.ended_at, last.counted), ("worker_failed", LEASE, false));
    assert_eq!(store.job(&key(3)).await.expect("reads").expect("is known").history, []);
}

pub(crate) async fn jobs_are_listed_in_pages_by_status_tenant_and_model(subject: Jobs) {
    let store = subject.store;
    let other = JobKey { tenant_id: tenant("other"), ..key(7) };
    for number in 1..=6 {
        store.reserve(NewJob { worker_capacity: 9, ..job(number) }).await.expect("reserves");
    }
    let model = model_key("other", "1.0");
    store.reserve(NewJob { worker_capacity: 9, key: other, model, ..job(7) }).await.expect("reserves");
    for number in [2, 4, 6] {
        let state = if number == 6 { TerminalState::Failed } else { TerminalState::Completed };
        store.finalise(Settlement { state, ..settlement(number) }).await.expect("settles");
    }
    let list = async |query: JobQuery| {
        let (mut numbers, mut before) = (vec![], None);
        loop {
            let page = store.list_jobs(JobQuery { before, ..query.clone() }).await.expect("reads");
            assert!(page.jobs.len() <= query.limit as usize);
            numbers.extend(page.jobs.iter().map(|job| job.key.correlation_id.0.as_u128()));
            match page.next {
                Some(next) => before = Some(next),
                None => return numbers,
            }
        }
    };
    let query = JobQuery { limit: 2, ..JobQuery::default() };
    assert_eq!(list(query.clone()).await, [7, 6, 5, 4, 3, 2, 1]);
    let status = |status| JobQuery { status: Some(status), ..query.clone() };
    assert_eq!(list(status(JobStatus::Running)).await, [7, 5, 3, 1]);
    assert_eq!(list(status(JobStatus::Completed)).await, [4, 2]);
    assert_eq!(list(status(JobStatus::Dead)).await, []);
    assert_eq!(list(JobQuery { tenant_id: Some(tenant("other")), ..query.clone() }).await, [7]);
    assert_eq!(list(JobQuery { model_id: Some(job(1).model.model_id), ..status(JobStatus::Failed) }).await, [6]);
    let of_request = store.jobs_of(key(7).correlation_id).await.expect("reads");
    assert_eq!(of_request.iter().map(|job| job.key.tenant_id.as_str()).collect::<Vec<_>>(), ["other"]);
}

pub(crate) async fn old_jobs_are_removed_and_running_ones_and_usage_stay(subject: Jobs) {
    let store = subject.store;
    for number in 1..=4 {
        store.reserve(job(number)).await.expect("reserves");
    }
    for number in 1..=3 {
        let now = UnixMillis(NOW.0 + number as u64);
        store.finalise(Settlement { now, ..settlement(number) }).await.expect("settles");
    }
    assert_eq!(store.prune(UnixMillis(NOW.0 + 3), 1).await, Ok(1), "no more than asked for");
    assert_eq!(store.job(&key(1)).await, Ok(None), "the oldest first");
    assert_eq!(store.prune(UnixMillis(NOW.0 + 3), 10).await, Ok(1));
    assert_eq!(store.prune(UnixMillis(NOW.0 + 3), 10).await, Ok(0));
    assert_eq!(store.job(&key(2)).await, Ok(None));
    for number in [3, 4] {
        assert!(store.job(&key(number)).await.expect("reads").is_some(), "job {number}");
    }
    let usage = store.usage(&tenant("acme"), UsageCursor::default(), 10).await.expect("reads");
    assert_eq!(usage.iter().map(|record| record.key.clone()).collect::<Vec<_>>(), [key(1), key(2), key(3)]);

    // The key of a removed job is free again, and its next job has a bill of its own.
    assert_eq!(store.reserve(job(1)).await, Ok(Reserved::New));
    store.finalise(settlement(1)).await.expect("settles");
    assert_eq!(store.usage(&tenant("acme"), UsageCursor::default(), 10).await.expect("reads").len(), 4);
}

//! Every history of jobs within bounds, by a model checker; and that the checker notices each rule that is lost.

use std::collections::BTreeSet;

use metadata_store::{DurableState, Finalised};
use orchestrator::job::{JobEvent, JobState, Position};
use parking_lot::Mutex;
use stateright::{Checker, HasDiscoveries, Model};
use tether_simulation::job_book;

use crate::job_model::{Bounds, Jobs, Rules, Sight};

/// One job under every fault.
fn one_job(rules: Rules) -> Jobs {
    let bounds = Bounds {
        submissions: 1,
        crashes: 1,
        deaths: 1,
        partitions: 1,
        departures: 1,
        renewals: 1,
        waits: 1,
        ..Bounds::default()
    };
    Jobs { rules, bounds, jobs: 1, capacities: vec![1, 1], chunks: 1, seen: Mutex::default() }
}

/// One job whose caller asks again, there or at another orchestrator.
fn repeated(rules: Rules) -> Jobs {
    let bounds = Bounds { submissions: 2, crashes: 1, renewals: 1, ..Bounds::default() };
    Jobs { rules, bounds, jobs: 1, capacities: vec![1, 1], chunks: 1, seen: Mutex::default() }
}

/// Two jobs that compete for two workers.
fn two_jobs(rules: Rules) -> Jobs {
    let bounds = Bounds { submissions: 2, crashes: 1, ..Bounds::default() };
    Jobs { rules, bounds, jobs: 2, capacities: vec![1, 1], chunks: 1, seen: Mutex::default() }
}

/// A job that a second dispatcher takes over while its first goes on. No orchestrator does that yet, and a store is
/// made for it.
fn taken_over(rules: Rules) -> Jobs {
    let bounds = Bounds { submissions: 1, renewals: 1, takeovers: 1, ..Bounds::default() };
    Jobs { rules, bounds, jobs: 1, capacities: vec![1, 1], chunks: 1, seen: Mutex::default() }
}

/// Checks every history, and returns what happened in some of them.
fn check(jobs: Jobs) -> BTreeSet<Sight> {
    let checker = jobs.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    checker.model().seen.lock().clone()
}

/// Checks that some history breaks a property.
fn assert_broken(jobs: Jobs, property: &'static str) {
    let until = HasDiscoveries::AnyOf([property].into());
    let checker = jobs.checker().threads(2).finish_when(until).spawn_bfs().join();
    checker.assert_any_discovery(property);
}

#[test]
fn no_fault_loses_doubles_or_breaks_a_job() {
    let seen = check(one_job(Rules::default()));
    let expected = [
        Sight::StaleChunkRefused,
        Sight::LateSettlementRefused,
        Sight::Continued,
        Sight::Expired,
        Sight::StaleMoveRefused,
    ];
    assert_eq!(seen, expected.into());
}

#[test]
fn a_caller_that_asks_again_gets_one_job() {
    let seen = check(repeated(Rules::default()));
    assert!(seen.is_superset(&[Sight::RepeatRefused, Sight::RunsAgain].into()), "{seen:?}");
}

#[test]
fn jobs_that_compete_never_overcommit_a_worker() {
    assert!(check(two_jobs(Rules::default())).contains(&Sight::Full));
}

#[test]
fn of_two_dispatchers_of_a_job_only_the_latest_writes() {
    let seen = check(taken_over(Rules::default()));
    assert!(seen.is_superset(&[Sight::LateSettlementRefused, Sight::StaleMoveRefused].into()), "{seen:?}");
}

#[test]
fn a_store_that_settles_what_is_settled_is_found() {
    let store = job_book::Rules { settle: |_, _, _| Finalised::Settled, ..job_book::Rules::default() };
    assert_broken(one_job(Rules { store, ..Rules::default() }), "every job is settled once");
    assert_broken(taken_over(Rules { store, ..Rules::default() }), "every job is billed at most once");
}

#[test]
fn a_store_that_forgets_the_attempt_is_found() {
    let settle = job_book::Rules {
        settle: |job, _, _| match job.state {
            DurableState::Settled(state) => Finalised::AlreadySettled { state },
            DurableState::Reserved => Finalised::Settled,
        },
        ..job_book::Rules::default()
    };
    let check_move = job_book::Rules { check_move: |_, _| Ok(()), ..job_book::Rules::default() };
    let may_renew =
        job_book::Rules { may_renew: |job, _| job.state == DurableState::Reserved, ..job_book::Rules::default() };
    for store in [settle, check_move, may_renew] {
        assert_broken(taken_over(Rules { store, ..Rules::default() }), "no attempt writes after its successor");
    }
    assert_broken(one_job(Rules { store: check_move, ..Rules::default() }), "every job is settled once");
}

#[test]
fn a_store_that_does_not_count_is_found() {
    let store = job_book::Rules { has_room: |_, _| true, ..job_book::Rules::default() };
    assert_broken(two_jobs(Rules { store, ..Rules::default() }), "no worker is over-committed");
}

#[test]
fn an_orchestrator_that_takes_any_chunk_is_found() {
    let any_attempt = |chunk: Position, expected: Position| chunk.seq == expected.seq;
    assert_broken(
        one_job(Rules { is_next: any_attempt, ..Rules::default() }),
        "no chunk of a stale attempt is accepted",
    );
    assert_broken(one_job(Rules { is_next: |_, _| true, ..Rules::default() }), "no answer is spliced");
}

#[test]
fn an_answer_that_is_begun_again_is_found() {
    let forgetful = Rules { knows_delivered: false, ..Rules::default() };
    assert_broken(one_job(forgetful), "no job is out of step");
    let after = |state, event| match (state, event) {
        (JobState::Streaming, JobEvent::GiveUpAttempt) => Ok(JobState::Received),
        (state, event) => state.after(event),
    };
    assert_broken(one_job(Rules { after, ..forgetful }), "no answer is begun again");
}

#[test]
fn a_last_chunk_before_the_settlement_is_found() {
    let hasty = Rules { settles_first: false, ..Rules::default() };
    assert_broken(one_job(hasty), "whoever sees the end of an answer has a completed job");
}

#[test]
fn jobs_that_nobody_releases_are_found() {
    let lazy = Rules { sweeps: false, ..Rules::default() };
    assert_broken(one_job(lazy), "every accepted job comes to its end");
}

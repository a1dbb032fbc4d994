//! The operations of the reference, done to a real store.

use metadata_store::fencing::Standing;
use metadata_store::{
    FinaliseError, JobKey, JobRecord, JobStore, Lease, NewJob, Reassignment, ReserveError, Reserved, Settlement,
    TerminalState,
};
use proptest::prelude::*;
use protocol::quota::QuotaLimits;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, PublicKey, TraceId, UnixMillis, WorkerId};
use tether_simulation::job_book::{Entry, Operation, Outcome};
use uuid::Uuid;

/// More than any test has jobs.
const ALL: u32 = 1_000_000;

pub(crate) fn worker(number: u32) -> WorkerId {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    PublicKey(key)
}

fn key(job: u32) -> JobKey {
    JobKey {
        tenant_id: "acme".parse().expect("a tenant"),
        correlation_id: CorrelationId(Uuid::from_u128(job.into())),
        retry_token: "retry".parse().expect("a token"),
    }
}

fn model() -> protocol::model::ModelKey {
    protocol::model::ModelKey { model_id: "m".parse().expect("a name"), version: "1.0".parse().expect("a version") }
}

fn number(key: &JobKey) -> u32 {
    key.correlation_id.0.as_u128() as u32
}

fn entry(record: &JobRecord) -> Entry {
    Entry {
        standing: Standing { attempt: record.attempt, worker_id: record.worker_id, state: record.state },
        lease_until: record.lease_until.map(|until| until.0),
        tokens: record.usage.map(|usage| usage.completion_tokens),
    }
}

pub(crate) async fn perform(store: &dyn JobStore, operation: Operation) -> Outcome {
    let now = UnixMillis(1);
    match operation {
        Operation::Reserve { job, worker, capacity, lease_until } => {
            let new = NewJob {
                key: key(job),
                trace_id: TraceId([1; 16]),
                model: model(),
                region: "local".parse().expect("a region"),
                worker_id: worker,
                worker_capacity: capacity,
                attempt: 1,
                now,
                lease_until: UnixMillis(lease_until),
                request_fingerprint: [0; 32],
                limits: QuotaLimits::default(),
                tokens: 1_000,
                counts: true,
            };
            match store.reserve(new).await {
                Ok(Reserved::New) => Outcome::Reserved,
                Ok(Reserved::Again { attempt }) => Outcome::Again { attempt },
                Ok(Reserved::Duplicate(known)) => Outcome::Known(entry(&known)),
                Err(ReserveError::NoCapacity { .. }) => Outcome::Full,
                Err(refused @ ReserveError::Quota(_)) => panic!("no limit applies: {refused}"),
                Err(ReserveError::Store(error)) => panic!("the store failed: {error}"),
            }
        }
        Operation::Reassign { job, from_attempt, worker, capacity, lease_until } => {
            let reassignment = Reassignment {
                history: vec![],
                key: key(job),
                from_attempt,
                model: model(),
                worker_id: worker,
                worker_capacity: capacity,
                now,
                lease_until: UnixMillis(lease_until),
                limits: QuotaLimits::default(),
                tokens: 2_000,
            };
            store.reassign(reassignment).await.map_or_else(Outcome::from, |()| Outcome::Moved)
        }
        Operation::Finalise { job, attempt, worker, state, tokens } => {
            let usage = TokenUsage { completion_tokens: tokens, ..TokenUsage::default() };
            let settlement = Settlement {
                history: vec![],
                continued: 0,
                dead_letter: None,
                key: key(job),
                attempt,
                worker_id: worker,
                state,
                finish_reason: None,
                error: None,
                usage: Some(usage),
                is_bounded: false,
                answer: None,
                note: None,
                now,
            };
            match store.finalise(settlement).await {
                Ok(finalised) => Outcome::Finalised(finalised),
                Err(FinaliseError::NotFound) => Outcome::NotFound,
                Err(FinaliseError::Store(error)) => panic!("the store failed: {error}"),
            }
        }
        Operation::Renew { job, attempt, lease_until } => {
            let lost = store
                .renew(vec![Lease { key: key(job), attempt }], UnixMillis(lease_until))
                .await
                .expect("the store works");
            Outcome::Renewed(lost.is_empty())
        }
        Operation::ReleaseExpired { now } => {
            let released = store.release_expired(UnixMillis(now), ALL).await.expect("the store works");
            let mut jobs: Vec<u32> = released.iter().map(|record| number(&record.key)).collect();
            jobs.sort_unstable();
            Outcome::Released(jobs)
        }
        Operation::Find { job } => {
            let found = store.job(&key(job)).await.expect("the store works");
            found.map_or(Outcome::NotFound, |record| Outcome::Known(entry(&record)))
        }
        Operation::Held { worker } => {
            let held = store.active_reservations().await.expect("the store works");
            Outcome::Held(held.into_iter().find(|(holder, _)| *holder == worker).map_or(0, |(_, count)| count))
        }
    }
}

/// Any operation on few jobs and workers, so that they meet.
pub(crate) fn operations() -> impl Strategy<Value = Operation> {
    let (job, attempt, lease_until) = (0..4u32, 1..4u32, 1..20u64);
    let (worker, capacity) = ((1..3u32).prop_map(worker), 1..3u32);
    let state =
        proptest::sample::select(vec![TerminalState::Completed, TerminalState::Cancelled, TerminalState::Failed]);
    prop_oneof![
        4 => (job.clone(), worker.clone(), capacity.clone(), lease_until.clone())
            .prop_map(|(job, worker, capacity, lease_until)| Operation::Reserve { job, worker, capacity, lease_until }),
        4 => (job.clone(), attempt.clone(), worker.clone(), capacity, lease_until.clone()).prop_map(
            |(job, from_attempt, worker, capacity, lease_until)| Operation::Reassign {
                job, from_attempt, worker, capacity, lease_until,
            }
        ),
        4 => (job.clone(), attempt.clone(), worker.clone(), state, 0..9u32).prop_map(|(job, attempt, worker, state, tokens)| {
            Operation::Finalise { job, attempt, worker, state, tokens }
        }),
        2 => (job.clone(), attempt, lease_until.clone())
            .prop_map(|(job, attempt, lease_until)| Operation::Renew { job, attempt, lease_until }),
        1 => lease_until.prop_map(|now| Operation::ReleaseExpired { now }),
        2 => job.prop_map(|job| Operation::Find { job }),
        1 => worker.prop_map(|worker| Operation::Held { worker }),
    ]
}

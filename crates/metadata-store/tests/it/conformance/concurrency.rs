//! What holds while many act at once.

use std::collections::HashMap;
use std::sync::Arc;

use protocol::WorkerId;
use tether_metadata_store::{
    Finalised, JobKey, JobStore, NewJob, ReassignError, Reassignment, Redemption, ReserveError, Reserved, Settlement,
    UsageCursor,
};
use tokio::task::JoinSet;

use super::membership::{ID, invite};
use super::samples::{NOW, job, key, reassignment, settlement, tenant, worker};
use super::{Jobs, Registry, Subject};

const CLIENTS: u128 = 64;

pub(crate) async fn of_64_reservations_of_one_slot_exactly_one_is_made(subject: Jobs) {
    let outcomes =
        at_once(
            &subject,
            |store, number| async move { store.reserve(NewJob { worker_capacity: 1, ..job(number) }).await },
        )
        .await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Ok(Reserved::New)).count(), 1);
    let refused = Err(ReserveError::NoCapacity { worker_id: worker(1) });
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == refused).count(), 63);
    assert_eq!(subject.store.active_reservations().await, Ok(vec![(worker(1), 1)]));
}

pub(crate) async fn of_64_resends_of_one_job_exactly_one_is_new(subject: Jobs) {
    let outcomes = at_once(&subject, |store, number| async move {
        store.reserve(NewJob { worker_id: worker(number as u8), ..job(1) }).await.expect("is no error")
    })
    .await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Reserved::New).count(), 1);
}

pub(crate) async fn of_64_settlements_of_one_job_exactly_one_bills(subject: Jobs) {
    subject.store.reserve(job(1)).await.expect("reserves");
    let outcomes =
        at_once(&subject, |store, _| async move { store.finalise(settlement(1)).await.expect("is no error") }).await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Finalised::Settled).count(), 1);
    assert_eq!(subject.store.usage(&tenant("acme"), UsageCursor::default(), 10).await.expect("reads").len(), 1);
}

pub(crate) async fn of_64_nodes_that_redeem_one_invite_exactly_one_does(subject: Registry) {
    subject.store.put_invite(invite()).await.expect("is added");
    let outcomes = at_once(&subject, |store, number| async move {
        store.redeem_invite(ID, worker(number as u8), NOW).await.expect("is no error")
    })
    .await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Redemption::Done).count(), 1);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Redemption::Used).count(), 63);
}

/// Has all clients act at once.
pub(super) async fn at_once<S, T, F>(subject: &Subject<S>, act: impl Fn(Arc<S>, u128) -> F) -> Vec<T>
where
    S: ?Sized,
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    (0..CLIENTS).map(|number| act(Arc::clone(&subject.store), number)).collect::<JoinSet<_>>().join_all().await
}

const WORKERS: u64 = 3;
const CAPACITY: u32 = 5;

pub(crate) async fn random_traffic_never_overcommits_a_worker_and_bills_each_job_once(subject: Jobs) {
    for seed in 0..4_u32 {
        let billed: usize = at_once(&subject, |store, client| traffic(store, u128::from(seed) * CLIENTS + client))
            .await
            .into_iter()
            .sum();
        let records = subject.store.usage(&tenant(&format!("tenant-{seed}")), UsageCursor::default(), 10_000).await;
        assert_eq!(records.expect("reads").len(), billed, "seed {seed}");
        assert_eq!(subject.store.active_reservations().await, Ok(vec![]), "seed {seed}: every job was settled");
    }
}

/// Reserves, moves and settles jobs, checks the slots in between, and returns how many jobs it settled.
async fn traffic(store: Arc<dyn JobStore>, client: u128) -> usize {
    let mut random = Random(client as u64);
    let mut settled = 0;
    for number in 0..12 {
        let tenant_id = tenant(&format!("tenant-{}", client / CLIENTS));
        let key = JobKey { tenant_id, ..key(client * 1000 + number) };
        let chosen = worker(random.below(WORKERS) as u8);
        let new = NewJob { key: key.clone(), worker_id: chosen, worker_capacity: CAPACITY, ..job(0) };
        match store.reserve(new).await {
            Ok(Reserved::New) => {}
            Err(ReserveError::NoCapacity { .. }) => continue,
            other => panic!("the key is new: {other:?}"),
        }
        check_slots(store.as_ref()).await;
        let (mut holder, mut attempt) = (chosen, 1);
        while random.below(2) == 0 {
            let next = worker(random.below(WORKERS) as u8);
            let moved = Reassignment {
                key: key.clone(),
                from_attempt: attempt,
                worker_id: next,
                worker_capacity: CAPACITY,
                ..reassignment(0)
            };
            match store.reassign(moved).await {
                Ok(()) => (holder, attempt) = (next, attempt + 1),
                Err(ReassignError::NoCapacity { .. }) => {}
                other => panic!("nobody else moves this job: {other:?}"),
            }
            check_slots(store.as_ref()).await;
        }
        let settle = Settlement { key, attempt, worker_id: holder, ..settlement(0) };
        let (first, second) = tokio::join!(store.finalise(settle.clone()), store.finalise(settle));
        let outcomes = [first.expect("is no error"), second.expect("is no error")];
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Finalised::Settled).count(), 1);
        settled += 1;
    }
    settled
}

async fn check_slots(store: &dyn JobStore) {
    let held: HashMap<WorkerId, u32> = store.active_reservations().await.expect("reads").into_iter().collect();
    assert!(held.values().all(|held| *held <= CAPACITY), "overcommitted: {held:?}");
}

/// SplitMix64: the same seed makes the same traffic.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }
}

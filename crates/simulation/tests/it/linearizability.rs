//! Calls of many threads at once have outcomes that one thread could have had as well.
//!
//! Histories are short, because the search for an order takes time that grows fast with their length. Each has jobs and
//! workers of its own, and all run on one store in a file.

use std::sync::Arc;

use fastrand::Rng;
use metadata_store::{SqliteStore, StoreOptions, TerminalState};
use parking_lot::Mutex;
use stateright::semantics::{ConsistencyTester as _, LinearizabilityTester, SequentialSpec};
use tether_simulation::job_book::{JobBook, Operation, Outcome, Rules};
use tokio::task::JoinSet;

use crate::store_calls::{perform, worker};

const THREADS: u32 = 4;
const OPERATIONS_OF_A_THREAD: u32 = 6;
const OPERATIONS_OF_A_HISTORY: u64 = (THREADS * OPERATIONS_OF_A_THREAD) as u64;
const JOBS: u32 = 3;
const CAPACITY: u32 = 2;

#[derive(Clone, Debug, Default)]
struct Reference(JobBook);

impl SequentialSpec for Reference {
    type Op = Operation;
    type Ret = Outcome;

    fn invoke(&mut self, operation: &Operation) -> Outcome {
        self.0.apply(operation, &Rules::default())
    }
}

type History = LinearizabilityTester<u32, Reference>;

/// Draws an operation on the jobs and workers of a history.
fn draw(history: u32, random: &mut Rng) -> Operation {
    let job = history * JOBS + random.u32(..JOBS);
    let (worker, capacity) = (worker(history * 2 + random.u32(..2)), CAPACITY);
    let (attempt, lease_until) = (random.u32(1..4), random.u64(1..20));
    match random.u8(..16) {
        0..5 => Operation::Reserve { job, worker, capacity, lease_until },
        5..9 => Operation::Reassign { job, from_attempt: attempt, worker, capacity, lease_until },
        9..12 => {
            let states = [TerminalState::Completed, TerminalState::Cancelled, TerminalState::Failed];
            let (state, tokens) = (states[random.usize(..3)], random.u32(..3));
            Operation::Finalise { job, attempt, worker, state, tokens }
        }
        12 => Operation::Renew { job, attempt: random.u32(1..4), lease_until },
        13 => Operation::ReleaseExpired { now: lease_until / 2 },
        14 => Operation::Find { job },
        _ => Operation::Held { worker },
    }
}

/// Has threads act at once, and returns what each of them did when.
async fn record(store: &Arc<SqliteStore>, number: u32) -> History {
    let history = Arc::new(Mutex::new(History::new(Reference::default())));
    let mut threads = JoinSet::new();
    for thread in 0..THREADS {
        let (store, history) = (store.clone(), history.clone());
        let mut random = Rng::with_seed(u64::from(number) << 8 | u64::from(thread));
        threads.spawn(async move {
            for _ in 0..OPERATIONS_OF_A_THREAD {
                let operation = draw(number, &mut random);
                history.lock().on_invoke(thread, operation).expect("one call at a time");
                let outcome = perform(store.as_ref(), operation).await;
                history.lock().on_return(thread, outcome).expect("it was called");
            }
        });
    }
    threads.join_all().await;
    history.lock().clone()
}

/// Records histories with so many operations in all, and returns how many have no order.
async fn histories_without_an_order(operations: u64) -> u64 {
    let folder = tempfile::tempdir().expect("a folder");
    let options = StoreOptions { verify: false, ..StoreOptions::default() };
    let store = Arc::new(SqliteStore::open(folder.path().join("jobs.db"), options).expect("a store"));
    let mut without = 0;
    for number in 0..operations.div_ceil(OPERATIONS_OF_A_HISTORY) {
        let history = record(&store, number as u32).await;
        without += u64::from(!history.is_consistent());
        // The next history begins with a store in which nothing is reserved.
        perform(store.as_ref(), Operation::ReleaseExpired { now: 1_000 }).await;
    }
    without
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_calls_at_once_have_an_order() {
    assert_eq!(histories_without_an_order(10_000).await, 0);
}

/// Runs as many operations as the environment says; `make linearizability` does so.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "runs for long: make linearizability"]
async fn any_number_of_calls_at_once_have_an_order() {
    #[expect(clippy::disallowed_methods, reason = "a recipe says how long this runs")]
    let operations = std::env::var("OPERATIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(1_000_000);
    assert_eq!(histories_without_an_order(operations).await, 0);
}

/// The tester would prove little if it found an order for everything.
#[test]
fn two_calls_that_both_get_the_last_place_are_noticed() {
    let mut history = History::new(Reference::default());
    let reserve = |job| Operation::Reserve { job, worker: worker(1), capacity: 1, lease_until: 9 };
    for (thread, job) in [(0, 1), (1, 2)] {
        history.on_invoke(thread, reserve(job)).expect("one call at a time");
    }
    for thread in [0, 1] {
        history.on_return(thread, Outcome::Reserved).expect("it was called");
    }
    assert!(!history.is_consistent());
}

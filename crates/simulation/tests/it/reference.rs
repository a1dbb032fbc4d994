//! The store that runs does what the reference does, which the model of a job's life is checked with.

use metadata_store::SqliteStore;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use tether_simulation::job_book::{JobBook, Operation, Outcome, Rules};

use crate::store_calls::{operations, perform};

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_store_does_what_its_reference_does(history in proptest::collection::vec(operations(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let store = SqliteStore::in_memory().expect("a store");
            let (mut book, rules) = (JobBook::default(), Rules::default());
            for operation in history {
                let done = perform(&store, operation).await;
                prop_assert_eq!(&done, &book.apply(&operation, &rules), "{:?}", operation);
            }
            for job in 0..4 {
                let find = Operation::Find { job };
                prop_assert_eq!(perform(&store, find).await, book.apply(&find, &rules));
            }
            Ok(())
        })?;
    }
}

/// The random histories would prove little if they never met a refusal.
#[test]
fn random_histories_meet_every_outcome() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut book = JobBook::default();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..2_000 {
        let operation = operations().new_tree(&mut runner).expect("an operation").current();
        let name = match book.apply(&operation, &Rules::default()) {
            Outcome::Finalised(finalised) => format!("{finalised:?}"),
            outcome => format!("{outcome:?}"),
        };
        seen.insert(name.chars().take_while(|letter| letter.is_alphanumeric()).collect::<String>());
        if book.jobs.len() == 4 && book.jobs.values().all(|entry| entry.lease_until.is_none()) {
            book = JobBook::default();
        }
    }
    let expected = [
        "Again",
        "AlreadySettled",
        "CannotMove",
        "Full",
        "Held",
        "Known",
        "Moved",
        "NotFound",
        "Released",
        "Renewed",
        "Reserved",
        "Settled",
        "Stale",
    ];
    assert_eq!(seen, expected.map(str::to_owned).into());
}

use proptest::prelude::*;
use protocol::PublicKey;

use super::*;

fn worker(number: u8) -> Candidate {
    Candidate {
        build: 0,
        worker_id: PublicKey([number; 32]),
        resident: true,
        has_file: true,
        is_deprioritised: false,
        adapter_attached: true,
        proximity: 1.0,
        slots: 4,
        capacity: 8,
        limit: 8,
        load: 0,
        yielding: 0,
        warm_share: 0.0,
        context_length: 0,
        tokens_per_second: 10.0,
        barred: None,
    }
}

fn chosen(candidates: &[Candidate]) -> Option<WorkerId> {
    place(candidates.iter().copied(), &[], &Weights::default(), &[]).chosen.map(|candidate| candidate.worker_id)
}

#[test]
fn each_term_decides_when_all_else_is_equal() {
    let better: [fn(&mut Candidate); 5] = [
        |worker| worker.resident = true,
        |worker| worker.proximity = 1.0,
        |worker| worker.load = 0,
        |worker| worker.warm_share = 1.0,
        |worker| worker.tokens_per_second = 10.0,
    ];
    for (term, improve) in better.into_iter().enumerate() {
        let poor =
            |number| Candidate { resident: false, proximity: 0.0, load: 3, tokens_per_second: 1.0, ..worker(number) };
        let mut good = poor(2);
        improve(&mut good);
        assert_eq!(chosen(&[poor(1), good, poor(3)]), Some(good.worker_id), "term {term}");
    }
}

#[test]
fn settings_of_earlier_versions_may_name_a_weight_for_the_gpu_class() {
    let weights: Weights = serde_json::from_str(r#"{"gpu_class": 1.0, "speed": 0.25}"#).expect("is read");
    assert_eq!(weights, Weights { speed: 0.25, ..Weights::default() });
    assert!(!serde_json::to_string(&weights).expect("is written").contains("gpu_class"));
}

#[test]
fn an_adapter_at_hand_decides_among_equals_and_not_against_a_model_in_memory() {
    let to_attach = Candidate { adapter_attached: false, ..worker(1) };
    assert_eq!(chosen(&[to_attach, worker(2)]), Some(worker(2).worker_id));
    let to_load = Candidate { resident: false, ..to_attach };
    assert_eq!(chosen(&[to_load, Candidate { worker_id: PublicKey([3; 32]), ..to_attach }]), Some(PublicKey([3; 32])));
}

#[test]
fn whoever_has_to_fetch_the_file_comes_last_and_gets_the_job_where_no_other_takes_it() {
    let far = Candidate { resident: false, proximity: 0.0, load: 7, tokens_per_second: 1.0, ..worker(1) };
    let to_fetch = Candidate { resident: false, has_file: false, ..worker(2) };
    assert_eq!(chosen(&[to_fetch, far]), Some(far.worker_id), "a file on the disk, far away and busy");
    assert_eq!(chosen(&[to_fetch, Candidate { load: 8, ..far }]), Some(to_fetch.worker_id), "the other is full");
    assert_eq!(chosen(&[to_fetch]), Some(to_fetch.worker_id));
}

#[test]
fn a_worker_whose_owner_deprioritises_it_gets_the_job_that_finds_room_nowhere_else() {
    let poor = Candidate { resident: false, proximity: 0.0, load: 7, tokens_per_second: 1.0, ..worker(2) };
    let deprioritised = Candidate { is_deprioritised: true, ..worker(1) };
    let placement = place([deprioritised, poor].into_iter(), &[], &Weights::default(), &[]);
    assert_eq!(placement.chosen, Some(poor));
    let listed: Vec<_> = placement.candidates.iter().map(|row| (row.worker_id, row.activity)).collect();
    assert_eq!(listed, [(poor.worker_id, Activity::Accepting), (deprioritised.worker_id, Activity::Deprioritised)]);
    assert_eq!(chosen(&[deprioritised, Candidate { load: 8, ..poor }]), Some(deprioritised.worker_id));
    let to_fetch = Candidate { has_file: false, ..worker(3) };
    assert_eq!(chosen(&[deprioritised, to_fetch]), Some(deprioritised.worker_id), "a fetch takes longer");
}

#[test]
fn jobs_that_yield_give_up_their_slots_and_not_their_places() {
    let rooms = |capacity, yielding| {
        let supply = supply([Candidate { capacity, limit: 4, load: 4, yielding, ..worker(1) }].into_iter());
        (supply.room(0), supply.urgent_room(0))
    };
    assert_eq!(rooms(8, 0), (0, 0));
    assert_eq!(rooms(8, 3), (0, 3));
    assert_eq!(rooms(5, 3), (0, 1), "it holds one more job");
    assert_eq!(rooms(4, 3), (0, 0), "it holds no further job");
}

#[test]
fn equal_scores_go_to_the_lowest_id_in_whatever_order_they_come() {
    assert_eq!(chosen(&[worker(3), worker(1), worker(2)]), Some(PublicKey([1; 32])));
    assert_eq!(chosen(&[worker(1), worker(2), worker(3)]), Some(PublicKey([1; 32])));
}

#[test]
fn a_worker_that_cannot_be_taken_is_listed_with_its_reason() {
    let full = Candidate { load: 8, ..worker(1) };
    let draining = Candidate { barred: Some(Refusal::Draining), ..worker(2) };
    let placement =
        place([full, draining, worker(3)].into_iter(), &[(PublicKey([3; 32]), 0)], &Weights::default(), &[]);
    assert_eq!(placement.chosen, None);
    let reasons: Vec<&str> = placement.refused.iter().map(|refused| refused.reason.as_str()).collect();
    assert_eq!(reasons, ["full", "draining", "tried"]);
}

#[test]
fn load_spreads_over_equal_workers() {
    let mut workers = [worker(1), worker(2), worker(3)];
    for _ in 0..12 {
        let id = chosen(&workers).expect("room is left");
        workers.iter_mut().find(|worker| worker.worker_id == id).expect("known").load += 1;
    }
    assert_eq!(workers.map(|worker| worker.load), [4, 4, 4]);
}

#[test]
fn a_conversation_goes_back_to_its_worker_while_that_has_a_free_slot() {
    for slots in [1, 2, 4, 16] {
        let warm =
            |load| Candidate { load, slots, capacity: 2 * slots, limit: 2 * slots, warm_share: 1.0, ..worker(2) };
        let idle = Candidate { slots, capacity: 2 * slots, limit: 2 * slots, ..worker(1) };
        for load in 0..slots {
            assert_eq!(chosen(&[idle, warm(load)]), Some(worker(2).worker_id), "{load} of {slots}");
        }
        assert_eq!(chosen(&[idle, warm(slots)]), Some(worker(1).worker_id), "of {slots} none is free");
    }
}

#[test]
fn the_best_lead_the_table_in_whatever_order_they_come() {
    let numbered = |number: u8, speed: f32| Candidate { tokens_per_second: speed, ..worker(number) };
    let slow: Vec<Candidate> = (1..=255).map(|number| numbered(number, 1.0)).collect();
    // In `late`, all are equal and the lowest id comes last. In `hidden`, a fast candidate follows a faster one.
    let mut late = slow.clone();
    late.push(numbered(0, 1.0));
    let placement = place(late.iter().copied(), &[], &Weights::default(), &[]);
    assert_eq!(placement.candidates[0].worker_id, worker(0).worker_id);
    let mut hidden = slow;
    hidden[TABLE_MAX - 1] = numbered(TABLE_MAX as u8, 9.0);
    hidden[TABLE_MAX] = numbered(TABLE_MAX as u8 + 1, 8.0);
    let placement = place(hidden.iter().copied(), &[], &Weights::default(), &[]);
    assert_eq!(placement.candidates[1].worker_id, worker(TABLE_MAX as u8 + 1).worker_id);
}

proptest! {
    #[test]
    fn the_table_is_sorted_led_by_the_chosen_and_bounded(
        loads in proptest::collection::vec((0u32..10, any::<bool>(), 0u8..4), 0..300)
    ) {
        let candidates: Vec<Candidate> = loads
            .iter()
            .enumerate()
            .map(|(number, &(load, resident, speed))| Candidate {
                worker_id: PublicKey([(number % 256) as u8; 32]),
                load,
                resident,
                tokens_per_second: f32::from(speed),
                ..worker(0)
            })
            .collect();
        let placement = place(candidates.iter().copied(), &[], &Weights::default(), &[]);
        prop_assert!(placement.candidates.len() <= TABLE_MAX);
        prop_assert!(placement.candidates.is_sorted_by(|one, other| one.score >= other.score));
        let fits = candidates.iter().filter(|candidate| candidate.load < candidate.capacity).count();
        prop_assert_eq!(placement.candidates.len(), fits.min(TABLE_MAX));
        prop_assert_eq!(
            placement.candidates.first().map(|row| row.worker_id),
            placement.chosen.map(|candidate| candidate.worker_id)
        );
    }
}

#[test]
fn a_worker_that_was_set_aside_is_taken_where_there_is_no_other() {
    let aside = |number| Candidate { barred: Some(Refusal::SetAside), ..worker(number) };
    let best = Candidate { load: 0, ..aside(1) };
    assert_eq!(chosen(&[best, Candidate { load: 7, ..worker(2) }]), Some(worker(2).worker_id), "another has room");
    assert_eq!(chosen(&[Candidate { load: 3, ..aside(1) }, aside(3)]), Some(worker(3).worker_id), "the better of them");
    assert_eq!(chosen(&[best, Candidate { load: 8, ..worker(2) }]), None, "another has room soon");
    let draining = Candidate { barred: Some(Refusal::Draining), ..worker(2) };
    let placement = place([best, draining].into_iter(), &[], &Weights::default(), &[]);
    assert_eq!(placement.chosen.map(|candidate| candidate.worker_id), Some(best.worker_id));
    assert_eq!(placement.candidates.len(), 1, "the table shows it");
    assert_eq!(placement.refused.iter().map(|refused| refused.reason.as_str()).collect::<Vec<_>>(), ["draining"]);
    let tried = place([best].into_iter(), &[(best.worker_id, 0)], &Weights::default(), &[]);
    assert_eq!((tried.chosen, tried.refused.len()), (None, 1), "not for a job that it failed");
    assert_eq!(chosen(&[Candidate { load: 8, ..best }]), None, "not where it is full");
}

//! Tests which candidates the fleet offers, for given reports and times.

use super::*;
use protocol::health::Capacity;
use protocol::infer::InferRequest;
use protocol::model::AdapterKey;
use protocol::{Digest, PublicKey, UnixMillis};

fn model(name: &str) -> ModelKey {
    ModelKey { model_id: name.parse().expect("name"), version: "1.0".parse().expect("version") }
}

fn report(number: u8, models: &[&str]) -> HealthReport {
    let worker_id = PublicKey([number; 32]);
    let cached = |name: &&str| CachedModel {
        tokens_per_second: 1.0,
        ..CachedModel::new(model(name), Digest([0; 32]), ModelState::Ready)
    };
    HealthReport {
        v: 1,
        worker_id,
        pub_key: worker_id,
        region: "local".parse().expect("region"),
        gpu_class: "cpu".into(),
        vram_gb: 0,
        accelerators: vec![],
        capacity: Capacity { slots: 2, running: 0, waiting: 0, queue_max: 2 },
        supported: models.iter().map(|name| model(name)).collect(),
        to_fetch: vec![],
        adapters: vec![],
        pinned: vec![],
        model_cache: models.iter().map(cached).collect(),
        latency_hops: 0,
        draining: false,
        activity: protocol::health::Activity::Accepting,
        continues: true,
        epoch: 1,
        seq: 0,
        issued_at: UnixMillis(0),
        not_after: UnixMillis(0),
    }
}

fn fleet() -> Fleet {
    Fleet::new("local".parse().expect("region"), vec![])
}

fn of(model: &ModelKey) -> Wanted<'_> {
    static NO_PROMPT: PrefixChain = PrefixChain::NONE;
    Wanted {
        model,
        digest: None,
        adapter: None,
        prefix: &NO_PROMPT,
        short_context: 0,
        continuation: None,
        regions: None,
    }
}

fn serving(fleet: &Fleet, name: &str, now: Instant) -> Vec<u8> {
    let mut ids: Vec<u8> =
        fleet.with_candidates(&[of(&model(name))], now, |found| found.map(|found| found.worker_id.0[0]).collect());
    ids.sort_unstable();
    ids
}

#[test]
fn boasting_is_believed_up_to_a_limit() {
    let (fleet, now) = (fleet(), Instant::now());
    let mut boast = report(1, &["m"]);
    boast.capacity = Capacity { slots: u32::MAX, running: 0, waiting: 0, queue_max: u32::MAX };
    let cached = CachedModel::new(model("m"), Digest([1; 32]), ModelState::Ready);
    boast.model_cache = vec![CachedModel { tokens_per_second: f32::MAX, ..cached }];
    fleet.update(boast, now);
    let found = fleet.with_candidates(&[of(&model("m"))], now, |mut found| found.next()).expect("a candidate");
    assert_eq!((found.slots, found.capacity, found.tokens_per_second), (SLOTS_MAX, CAPACITY_MAX, SPEED_MAX));
}

#[test]
fn a_worker_silent_for_fifteen_seconds_leaves_the_fleet() {
    let (fleet, now) = (fleet(), Instant::now());
    fleet.update(report(1, &["m"]), now);
    fleet.update(report(2, &["m"]), now + Duration::from_secs(1));
    assert_eq!(fleet.expire(now + Duration::from_millis(14_999)), []);
    assert_eq!(serving(&fleet, "m", now + Duration::from_millis(14_999)), [1, 2]);
    assert_eq!(serving(&fleet, "m", now + Duration::from_secs(15)), [2], "at once, and not at the next sweep");
    assert_eq!(fleet.expire(now + Duration::from_secs(15)), [PublicKey([1; 32])]);
    assert_eq!(serving(&fleet, "m", now), [2]);
}

#[test]
fn a_worker_is_gone_with_its_last_report_and_not_before() {
    let (fleet, now) = (fleet(), Instant::now());
    let leaving = |running| {
        let mut report = report(1, &["m"]);
        (report.draining, report.capacity.running) = (true, running);
        report
    };
    assert_eq!(fleet.update(report(1, &["m"]), now), Change::Found);
    assert_eq!(fleet.update(leaving(1), now), Change::None);
    assert_eq!(fleet.len(), 1, "it still has a job");
    assert_eq!(fleet.update(leaving(0), now), Change::Left);
    assert_eq!(fleet.update(leaving(0), now), Change::None);
    assert_eq!((fleet.len(), serving(&fleet, "m", now)), (0, vec![]));
}

#[test]
fn a_worker_that_was_started_again_is_told_from_one_that_went_on() {
    let (fleet, now) = (fleet(), Instant::now());
    let of_start = |epoch| HealthReport { epoch, ..report(1, &["m"]) };
    assert_eq!(fleet.update(of_start(1), now), Change::Found);
    assert_eq!(fleet.update(of_start(1), now), Change::None);
    assert_eq!(fleet.update(of_start(2), now), Change::Restarted);
    assert_eq!(fleet.update(of_start(2), now), Change::None);
}

#[test]
fn the_workers_of_a_model_follow_the_reports() {
    let (fleet, now) = (fleet(), Instant::now());
    for number in 1..=4 {
        fleet.update(report(number, &["m", "n"]), now);
    }
    fleet.update(report(2, &["n"]), now);
    fleet.update(report(4, &["m"]), now);
    assert_eq!(serving(&fleet, "m", now), [1, 3, 4]);
    assert_eq!(serving(&fleet, "n", now), [1, 2, 3]);
    fleet.expire(now + EXPIRY);
    assert_eq!(serving(&fleet, "m", now), [0u8; 0]);
    fleet.update(report(9, &["m"]), now);
    assert_eq!(serving(&fleet, "m", now), [9]);
}

#[test]
fn workers_are_as_warm_as_their_last_report_says() {
    let (fleet, now) = (fleet(), Instant::now());
    let job = |text: &str| -> InferRequest {
        let input = serde_json::json!({ "messages": [
            { "role": "system", "content": "Be brief." }, { "role": "user", "content": text },
        ]});
        serde_json::from_value(serde_json::json!({
            "tenantId": "acme", "modelId": "m", "version": "1.0", "input": input, "retryToken": "r",
            "correlationId": "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f", "traceId": "11".repeat(16),
        }))
        .expect("a job")
    };
    let (hello, bye) = (PrefixChain::of(&job("hello")), PrefixChain::of(&job("bye")));
    let warm = |number, prompt: Option<&PrefixChain>| {
        let mut report = report(number, &["m", "n"]);
        report.model_cache[0].prefixes = prompt.map(|prompt| prompt.marks().collect()).unwrap_or_default();
        fleet.update(report, now);
    };
    let shares = |prefix: &PrefixChain| -> Vec<f32> {
        let wanted = Wanted {
            model: &model("m"),
            digest: None,
            adapter: None,
            prefix,
            short_context: 0,
            continuation: None,
            regions: None,
        };
        let mut found: Vec<Candidate> = fleet.with_candidates(&[wanted], now, |found| found.collect());
        found.sort_by_key(|found| found.worker_id);
        found.into_iter().map(|found| (found.warm_share * 10.0).round() / 10.0).collect()
    };
    warm(1, Some(&hello));
    warm(2, Some(&bye));
    warm(3, None);
    assert_eq!(shares(&hello), [1.0, 0.6, 0.0], "all of it, what all begin with, nothing");
    warm(1, None);
    assert_eq!(shares(&hello), [0.0, 0.6, 0.0]);
    fleet.remove(PublicKey([2; 32]));
    assert_eq!(shares(&bye), [0.0, 0.0]);
    let state = fleet.read();
    let replicas = &state.by_model[&model("m")];
    assert!(replicas.is_cold(), "nothing is left behind");
}

#[test]
fn a_job_with_an_adapter_goes_to_workers_that_serve_it_with_its_model() {
    let (fleet, now, pirate) = (fleet(), Instant::now(), "pirate".parse().expect("name"));
    let mut at_hand = report(1, &["m", "n"]);
    at_hand.adapters = vec![AdapterKey { model: model("m"), adapter: pirate }];
    at_hand.model_cache[0].adapters = vec![at_hand.adapters[0].adapter.clone()];
    let served = HealthReport { adapters: at_hand.adapters.clone(), ..report(2, &["m", "n"]) };
    for report in [at_hand.clone(), served, report(3, &["m", "n"])] {
        fleet.update(report, now);
    }
    let seen = |name: &str| {
        let model = model(name);
        let wanted = Wanted { adapter: Some(&at_hand.adapters[0].adapter), ..of(&model) };
        let mut found: Vec<Candidate> = fleet.with_candidates(&[wanted], now, |found| found.collect());
        found.sort_by_key(|found| found.worker_id);
        found.into_iter().map(|found| (found.adapter_attached, found.barred)).collect::<Vec<_>>()
    };
    let none = Some(Refusal::NoAdapter);
    assert_eq!(seen("m"), [(true, None), (false, None), (false, none)]);
    assert_eq!(seen("n"), [(false, none); 3], "it is no adapter of the other model");
}

#[test]
fn a_worker_whose_model_has_an_adapter_in_it_takes_jobs_with_that_one_only() {
    let (fleet, now) = (fleet(), Instant::now());
    let adapter = |text: &str| text.parse::<AdapterName>().expect("name");
    let key = |text| AdapterKey { model: model("m"), adapter: adapter(text) };
    let pinned = HealthReport { adapters: vec![key("pirate")], pinned: vec![key("pirate")], ..report(1, &["m", "n"]) };
    fleet.update(pinned, now);
    let barred = |name: &str, adapter: Option<AdapterName>| {
        let model = model(name);
        let wanted = Wanted { adapter: adapter.as_ref(), ..of(&model) };
        fleet.with_candidates(&[wanted], now, |found| found.map(|found| found.barred).collect::<Vec<_>>())
    };
    assert_eq!(barred("m", Some(adapter("pirate"))), [None]);
    assert_eq!(barred("m", Some(adapter("other"))), [Some(Refusal::NoAdapter)]);
    assert_eq!(barred("m", None), [Some(Refusal::NoAdapter)], "its answers would be the adapter's");
    assert_eq!(barred("n", None), [None], "another of its models is as it was");
    let mut plain = report(2, &["m"]);
    plain.model_cache[0].state = ModelState::Loading;
    plain.model_cache[0].loading = Some(LoadProgress { percent: 40, elapsed_ms: 60_000, bytes: 7, fetching: false });
    fleet.update(plain, now);
    let (wanted, pirate) = (model("m"), adapter("pirate"));
    let farthest = |adapter| fleet.loading(Wanted { adapter, ..of(&wanted) }, now).map(|(worker, _)| worker.0[0]);
    assert_eq!(farthest(None), Some(2), "the one that is ready is of no use to it");
    assert_eq!(farthest(Some(&pirate)), None);
}

#[test]
fn a_job_waits_for_a_load_that_ends_soon_and_for_no_other() {
    let (fleet, now) = (fleet(), Instant::now());
    let loading = |number, percent, elapsed_ms| {
        let mut report = report(number, &["m"]);
        report.model_cache[0].state = ModelState::Loading;
        report.model_cache[0].loading = Some(LoadProgress { percent, elapsed_ms, bytes: 7, fetching: false });
        fleet.update(report, now);
    };
    loading(1, 0, 0);
    loading(2, 10, 3_000);
    loading(3, 90, 30_000);
    let model = model("m");
    let barred =
        || fleet.with_candidates(&[of(&model)], now, |found| found.map(|found| found.barred).collect::<Vec<_>>());
    assert_eq!(barred(), [Some(Refusal::Loading), Some(Refusal::Loading), None]);
    let farthest = |now| fleet.loading(of(&model), now).map(|(worker, progress)| (worker.0[0], progress.percent));
    assert_eq!(farthest(now), Some((3, 90)));
    assert_eq!(farthest(now + EXPIRY), None, "they are gone");
    fleet.update(report(1, &["m"]), now);
    assert_eq!(farthest(now), None, "one has it ready");
}

#[test]
fn a_worker_that_its_owner_pauses_gets_no_job_and_one_that_is_deprioritised_does() {
    let (fleet, now, model) = (fleet(), Instant::now(), model("m"));
    let found = |activity| {
        fleet.update(HealthReport { activity, ..report(1, &["m"]) }, now);
        fleet.with_candidates(&[of(&model)], now, |mut found| {
            found.next().map(|found| (found.barred, found.is_deprioritised))
        })
    };
    assert_eq!(found(Activity::Accepting), Some((None, false)));
    assert_eq!(found(Activity::Deprioritised), Some((None, true)));
    assert_eq!(found(Activity::Paused), Some((Some(Refusal::Paused), false)), "it stays in the table");
    assert_eq!(found(Activity::Accepting), Some((None, false)));
}

#[test]
fn while_one_worker_fetches_a_model_no_other_begins_to() {
    let (fleet, now, model) = (fleet(), Instant::now(), model("m"));
    let report_of = |number| {
        let mut report = HealthReport { to_fetch: vec![model.clone()], ..report(number, &["m"]) };
        report.model_cache.clear();
        fleet.update(report, now);
    };
    let barred = |now| {
        fleet.with_candidates(&[of(&model)], now, |found| {
            found.map(|found| (found.has_file, found.barred)).collect::<Vec<_>>()
        })
    };
    report_of(1);
    report_of(2);
    assert_eq!(barred(now), [(false, None), (false, None)]);
    // From dispatch on, before the worker reports it.
    fleet.expect_fetch(PublicKey([1; 32]), &model);
    assert_eq!(barred(now), [(false, Some(Refusal::Loading)); 2]);
    assert!(fleet.loading(of(&model), now).is_some_and(|(worker, progress)| worker.0[0] == 1 && progress.fetching));
    report_of(1);
    assert_eq!(barred(now), [(false, None), (false, None)], "it has let it be");
    let mut fetching = report(1, &["m"]);
    fetching.model_cache[0].state = ModelState::Loading;
    let progress = LoadProgress { percent: 10, elapsed_ms: 60_000, bytes: 7, fetching: true };
    fetching.model_cache[0].loading = Some(progress);
    fetching.to_fetch = vec![model.clone()];
    fleet.update(fetching, now);
    assert_eq!(barred(now), [(false, Some(Refusal::Loading)); 2]);
    let mut slow = report(1, &["m"]);
    slow.model_cache[0].state = ModelState::Loading;
    slow.model_cache[0].loading = Some(LoadProgress { elapsed_ms: 120_000, ..progress });
    slow.to_fetch = vec![model.clone()];
    fleet.update(slow, now);
    assert_eq!(barred(now)[1], (false, None), "that takes 18 minutes yet: another fetches it as well");
    fleet.update(report(2, &["m"]), now);
    assert_eq!(barred(now)[1], (true, None), "one that has the file takes jobs as ever");
    report_of(2);
    let late = now + EXPIRY;
    fleet.update(HealthReport { to_fetch: vec![model.clone()], model_cache: vec![], ..report(3, &["m"]) }, late);
    assert_eq!(barred(late), [(false, None)], "the one that fetched it is gone");
}

#[test]
fn a_worker_is_as_loaded_as_our_count_and_what_it_reports_beyond_that() {
    let (fleet, now) = (fleet(), Instant::now());
    let id = PublicKey([1; 32]);
    let load = |fleet: &Fleet| {
        fleet.with_candidates(&[of(&model("m"))], now, |mut found| found.next().map(|found| found.load))
    };
    fleet.update(report(1, &["m"]), now);
    fleet.count_reserved(id, false, true);
    fleet.count_reserved(id, false, true);
    assert_eq!(load(&fleet), Some(2));
    let mut busy = report(1, &["m"]);
    busy.capacity.running = 3;
    fleet.update(busy, now);
    assert_eq!(load(&fleet), Some(3));
    fleet.update(report(1, &["m"]), now);
    assert_eq!(load(&fleet), Some(2), "a report does not make us forget what we reserved");
    fleet.count_reserved(id, false, false);
    let mut late = report(1, &["m"]);
    late.capacity.running = 2;
    fleet.update(late, now);
    assert_eq!(load(&fleet), Some(1), "a report may be older than a job's end");
    for _ in 0..5 {
        fleet.count_reserved(id, false, false);
    }
    assert_eq!(load(&fleet), Some(0));
}

#[test]
fn a_worker_is_taken_back_unless_it_was_set_aside_again() {
    let (fleet, now) = (fleet(), Instant::now());
    let (worker, later) = (PublicKey([1; 32]), |seconds| now + Duration::from_secs(seconds));
    fleet.update(report(1, &["m"]), now);
    let barred = || fleet.with_candidates(&[of(&model("m"))], now, |mut found| found.next()).expect("known").barred;
    fleet.set_aside(worker, later(5));
    fleet.set_aside(worker, later(6));
    fleet.take_back(worker, later(5));
    assert_eq!(barred(), Some(Refusal::SetAside));
    fleet.take_back(worker, later(6));
    assert_eq!(barred(), None);
}

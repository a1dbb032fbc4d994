//! Tests which jobs the gate releases, with one worker of one slot.

use std::thread;

use futures_util::FutureExt as _;
use prometheus_client::registry::Registry;
use protocol::health::{Capacity, HealthReport};
use protocol::{PublicKey, UnixMillis};
use tokio::time;

use super::*;
use crate::fair_queue::FlowKey;

const WORKER: PublicKey = PublicKey([1; 32]);

fn model() -> ModelKey {
    ModelKey { model_id: "m".parse().expect("a name"), version: "1.0".parse().expect("a version") }
}

fn report() -> HealthReport {
    HealthReport {
        v: 1,
        worker_id: WORKER,
        pub_key: WORKER,
        region: "local".parse().expect("a region"),
        gpu_class: "cpu".into(),
        vram_gb: 0,
        accelerators: vec![],
        capacity: Capacity { slots: 1, running: 0, waiting: 0, queue_max: 2 },
        supported: vec![model()],
        to_fetch: vec![],
        adapters: vec![],
        pinned: vec![],
        model_cache: vec![],
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

fn metrics() -> Metrics {
    Metrics::register(&mut Registry::default(), observability::metrics::Shed::default())
}

/// A gate before a worker whose only slot is taken.
fn gate(limits: Limits) -> (Arc<Fleet>, Arc<JobGate>) {
    let fleet = Arc::new(Fleet::new("local".parse().expect("a region"), vec![]));
    fleet.update(report(), Instant::now());
    fleet.count_reserved(WORKER, false, true);
    let gate = Arc::new(JobGate::new(fleet.clone(), metrics(), limits));
    fleet.feed(&gate);
    (fleet, gate)
}

const MANY: Limits = Limits { jobs_max: 100, tenant_jobs_max: 100 };

fn job(tenant: &str, class: ServiceClass, cost: u64) -> WaitingJob {
    let group = Group { models: vec![(model(), None)], adapter: None, regions: None };
    let flow = FlowKey { tenant_id: tenant.parse().expect("a tenant"), class };
    WaitingJob { group: Arc::new(group), flow, weight: 1, cost }
}

fn enter(gate: &Arc<JobGate>, job: WaitingJob) -> QueuePosition {
    let label = Label {
        correlation_id: CorrelationId(uuid::Uuid::from_u128(1)),
        tenant_id: job.flow.tenant_id.clone(),
        class: job.flow.class,
        model: model(),
        prompt_tokens: 1,
    };
    gate.enter(job, label).expect("few wait")
}

#[tokio::test]
async fn a_job_that_is_given_back_keeps_its_place() {
    let (fleet, gate) = gate(MANY);
    let mut position = enter(&gate, job("acme", ServiceClass::Standard, 10));
    fleet.count_reserved(WORKER, false, false);
    let mut turn = position.turn().await.map_err(|_| ()).expect("its turn");
    turn.pass();
    fleet.count_reserved(WORKER, false, true);
    position = turn.give_back().expect("it waits again");
    assert_eq!((gate.list(10).total, gate.is_quiet()), (1, false));
    fleet.count_reserved(WORKER, false, false);
    let turn = position.turn().await.map_err(|_| ()).expect("its turn again");
    drop((turn, position));
    assert!(gate.is_quiet() && gate.state.lock().queue.is_clean());
}

#[test]
fn a_job_is_known_to_wait_before_it_looks_for_a_free_slot() {
    let (fleet, gate) = gate(MANY);
    thread::scope(|scope| {
        // Nobody can look at the workers meanwhile.
        let held = fleet.hold();
        let entered = scope.spawn(|| enter(&gate, job("acme", ServiceClass::Standard, 10)));
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while gate.is_quiet() && std::time::Instant::now() < until {
            thread::yield_now();
        }
        let is_quiet = gate.is_quiet();
        drop(held);
        assert!(!is_quiet, "whoever frees a slot now would wake nobody");
        drop(entered.join().expect("no panic"));
    });
}

#[tokio::test(start_paused = true)]
async fn a_job_starts_at_once_on_a_worker_that_is_taken_back() {
    let (fleet, gate) = gate(MANY);
    let (other, until) = (PublicKey([2; 32]), Instant::now() + Duration::from_mins(1));
    fleet.update(HealthReport { worker_id: other, pub_key: other, ..report() }, Instant::now());
    fleet.set_aside(other, until);
    let mut position = enter(&gate, job("acme", ServiceClass::Standard, 10));
    assert!(position.turn().now_or_never().is_none(), "a busy worker is better than one that is set aside");
    fleet.take_back(other, until);
    assert!(position.turn().now_or_never().is_some(), "no later look is needed");
}

#[tokio::test(start_paused = true)]
async fn a_shed_job_is_told_when_its_own_turn_would_come() {
    let (fleet, gate) = gate(Limits { jobs_max: 5, tenant_jobs_max: 5 });
    // Somebody waits all the time, so that the speed is known: ten tokens a second.
    let _patient = enter(&gate, job("patient", ServiceClass::Batch, 1_000));
    for _ in 0..5 {
        let mut position = enter(&gate, job("noisy", ServiceClass::Standard, 10));
        time::advance(Duration::from_secs(1)).await;
        fleet.count_reserved(WORKER, false, false);
        let turn = position.turn().await.map_err(|_| ()).expect("its turn");
        fleet.count_reserved(WORKER, false, true);
        drop(turn);
    }
    let _others: Vec<_> = (0..3).map(|_| enter(&gate, job("noisy", ServiceClass::Standard, 100))).collect();
    let mut shed = enter(&gate, job("noisy", ServiceClass::Batch, 10));
    let _newcomer = enter(&gate, job("acme", ServiceClass::Interactive, 1));
    let Err(Shed::OverShare { retry_after }) = shed.turn().await else { panic!("it gives way") };
    assert!(retry_after >= Duration::from_secs(5), "{retry_after:?}");
}

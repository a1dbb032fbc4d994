//! How a worker behaves on a machine that people work on.

use std::time::Duration;

use async_trait::async_trait;
use engine::{MockOptions, ModelRuntime as _};
use parking_lot::Mutex;
use protocol::control::{MODEL_MOVE, ModelMove, ModelResidency, ResidencyState};
use protocol::health::{Activity, ModelState};
use protocol::infer::{InferRequest, Input};
use protocol::{ErrorCode, Topic};
use rpc::CallError;
use tether_worker::Config;
use tether_worker::activity::{ActivityConfig, Manner, Signals, Surroundings};
use tokio::time::{self, Instant};

use crate::{SECOND, Scene, config, key, next, read, region, request, slow};

/// The person at the machine, and what the machine says of itself: tests set both.
#[derive(Default)]
pub(crate) struct Owner(Mutex<Signals>);

#[async_trait]
impl Surroundings for Owner {
    async fn look(&self, _: &ActivityConfig) -> Signals {
        *self.0.lock()
    }
}

impl Owner {
    fn set(&self, change: impl FnOnce(&mut Signals)) {
        change(&mut self.0.lock());
    }

    fn person_types(&self) {
        self.set(|signals| signals.idle = Some(Duration::ZERO));
    }

    fn person_leaves(&self) {
        self.set(|signals| signals.idle = Some(SECOND * 300));
    }
}

fn guest() -> Config {
    let rules = ActivityConfig { in_use: Manner::Pause, on_battery: Manner::Deprioritise, ..ActivityConfig::default() };
    Config { activity: rules, ..config() }
}

/// Looks follow each other within two seconds, and a report follows soon.
const SOON: Duration = Duration::from_secs(3);

#[tokio::test(start_paused = true)]
async fn while_somebody_uses_the_machine_the_worker_is_paused_and_its_memory_is_free() {
    let scene = Scene::ready(guest(), MockOptions::default()).await;
    assert_eq!(scene.orchestrator.last().activity, Activity::Accepting);
    scene.world.owner.person_types();
    time::sleep(SOON * 2).await;
    let report = scene.orchestrator.last();
    assert_eq!((report.activity, report.draining), (Activity::Paused, false));
    let refusal = scene.refusal(&request()).await;
    assert_eq!(refusal.code, ErrorCode::WorkerStopping);
    assert!(!refusal.message.contains("stopping"), "it stays: {}", refusal.message);
    assert!(scene.runtime.load_state().is_empty(), "models are unloaded");
    assert!(!scene.is_found_under(&Topic::Presence(region())).await);
    scene.world.owner.person_leaves();
    time::sleep(SOON).await;
    let report = scene.orchestrator.last();
    assert_eq!((report.activity, report.model_cache[0].state), (Activity::Accepting, ModelState::Ready));
    assert!(scene.is_found_under(&Topic::Presence(region())).await);
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert!(!chunks.is_empty() && error.is_none(), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn running_answers_get_a_moment_and_are_then_handed_over() {
    let scene = Scene::ready(guest(), slow()).await;
    let with =
        |max_tokens| InferRequest { input: Input { max_tokens: Some(max_tokens), ..request().input }, ..request() };
    let mut short = scene.open(&with(20)).await.expect("accepted");
    let mut long = scene.open(&request()).await.expect("accepted");
    next(&mut short).await.expect("it runs").expect("and well");
    next(&mut long).await.expect("it runs").expect("and well");
    scene.world.owner.person_types();
    let begun = Instant::now();
    let (_, error) = read(short).await;
    assert_eq!(error, None, "it ends by itself");
    let (_, error) = read(long).await;
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerStopping));
    assert!(begun.elapsed() >= SECOND * 5 && begun.elapsed() <= SECOND * 10, "{:?}", begun.elapsed());
    time::sleep(SOON).await;
    assert!(scene.runtime.load_state().is_empty(), "models are unloaded");
    scene.world.owner.person_leaves();
    time::sleep(SOON).await;
    let (chunks, error) = read(scene.open(&with(20)).await.expect("accepted")).await;
    assert_eq!(error, None, "jobs after the pause are not handed over");
    assert!(chunks.len() >= 20, "{}", chunks.len());
}

#[tokio::test(start_paused = true)]
async fn a_deprioritised_worker_says_so_and_serves() {
    let scene = Scene::ready(guest(), MockOptions::default()).await;
    scene.world.owner.set(|signals| signals.on_battery = true);
    time::sleep(SOON).await;
    assert_eq!(scene.orchestrator.last().activity, Activity::Deprioritised);
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert!(!chunks.is_empty() && error.is_none(), "{error:?}");
    scene.world.owner.set(|signals| signals.on_battery = false);
    time::sleep(SOON).await;
    assert_eq!(scene.orchestrator.last().activity, Activity::Accepting);
}

#[tokio::test(start_paused = true)]
async fn operators_load_no_model_on_a_paused_worker() {
    let scene = Scene::ready(guest(), MockOptions::default()).await;
    scene.world.owner.person_types();
    time::sleep(SOON * 2).await;
    let load = ModelMove { key: key(), load: true, keep_alive_secs: None };
    let worker = scene.handle.worker_id();
    let moved: ModelResidency =
        scene.orchestrator.client.call(worker, MODEL_MOVE, &load, SECOND).await.expect("the worker says");
    assert_eq!(moved.workers[0].state, ResidencyState::Unloaded);
    assert!(moved.workers[0].reason.as_ref().is_some_and(|reason| reason.contains("paused")), "{moved:?}");
    time::sleep(SOON).await;
    assert!(scene.runtime.load_state().is_empty());
}

#[tokio::test(start_paused = true)]
async fn without_rules_nobody_looks_at_the_machine() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    scene.world.owner.person_types();
    time::sleep(SOON * 2).await;
    assert_eq!(scene.orchestrator.last().activity, Activity::Accepting);
}

#[tokio::test(start_paused = true)]
async fn a_paused_worker_stops_like_any_other() {
    let scene = Scene::ready(guest(), MockOptions::default()).await;
    scene.world.owner.person_types();
    time::sleep(SOON * 2).await;
    scene.stop.cancel();
    let Scene { running, orchestrator, .. } = scene;
    running.await.expect("it ends");
    assert!(orchestrator.last().is_last());
}

//! How a worker leaves.

use engine::{MockOptions, ModelRuntime as _};
use protocol::health::HealthReport;
use protocol::infer::{InferRequest, Input};
use protocol::signature::NodeKey;
use protocol::{ErrorCode, Topic};
use rpc::CallError;
use tether_worker::{Config, NotReady};
use tokio::time::{self, Instant};

use crate::{SECOND, Scene, config, key, next, read, region, request, slow};

#[tokio::test(start_paused = true)]
async fn a_stopping_worker_refuses_new_jobs_and_ends_those_it_has() {
    let scene = Scene::ready(config(), slow()).await;
    let short = InferRequest { input: Input { max_tokens: Some(50), ..request().input }, ..request() };
    let mut stream = scene.open(&short).await.expect("accepted");
    next(&mut stream).await.expect("it runs").expect("and well");
    scene.stop.cancel();
    time::sleep(SECOND).await;
    assert_eq!(scene.refusal(&request()).await.code, ErrorCode::WorkerStopping);
    assert!(scene.orchestrator.last().draining);
    assert!(!scene.is_found_under(&Topic::Presence(region())).await);
    assert!(!scene.is_found_under(&Topic::Model(key().model_id, key().version, region())).await);
    let (chunks, error) = read(stream).await;
    assert_eq!((chunks.len(), error), (50, None));
    scene.running.await.expect("it ends");
    assert!(scene.runtime.load_state().is_empty(), "models are unloaded");
}

#[tokio::test(start_paused = true)]
async fn a_job_that_outlasts_the_drain_is_handed_back() {
    let scene = Scene::ready(Config { drain_secs: 2, ..config() }, slow()).await;
    let mut stream = scene.open(&request()).await.expect("accepted");
    next(&mut stream).await.expect("it runs").expect("and well");
    let begin = Instant::now();
    scene.stop.cancel();
    let (_, error) = read(stream).await;
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerStopping));
    scene.running.await.expect("it ends");
    assert!(begin.elapsed() < SECOND * 4, "{:?}", begin.elapsed());
    assert!(scene.metrics.encode().contains("tether_worker_requests_running{model=\"tether-tiny\"} 0"));
}

#[tokio::test(start_paused = true)]
async fn an_idle_worker_leaves_at_once_and_its_last_report_says_so() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    let begin = Instant::now();
    scene.stop.cancel();
    scene.running.await.expect("it ends");
    assert!(begin.elapsed() < SECOND, "{:?}", begin.elapsed());
    let received = scene.orchestrator.received();
    let last = received.last().expect("a report came").report.clone().expect("it is believed");
    assert!(last.is_last(), "it takes no more and has nothing left: {last:?}");
    let last_report = received.iter().find(|received| received.report.as_ref().is_ok_and(HealthReport::is_last));
    assert!(last_report.expect("told").at - begin < SECOND, "orchestrators know within a second");
    for topic in [Topic::Presence(region()), Topic::Model(key().model_id, key().version, region())] {
        let found = scene.world.network.node(&NodeKey::from_seed(&[9; 32])).lookup(&topic).await.expect("a lookup");
        assert!(found.is_empty(), "{topic}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_dropped_leaves_nothing_running() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    scene.running.abort();
    time::sleep(SECOND).await;
    let before = scene.orchestrator.received().len();
    time::sleep(SECOND * 20).await;
    assert!(scene.orchestrator.received().len() <= before + 1);
    assert_eq!(scene.handle.ready().await, Err(NotReady::Stopped));
}

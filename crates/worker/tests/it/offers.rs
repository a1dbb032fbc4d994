//! Models of the worker's own files, as it offers them to the registry.

use std::sync::Arc;

use engine::{MockOptions, ModelRuntime as _};
use parking_lot::Mutex;
use protocol::control::{Empty, MODEL_OFFER, NodeInfo, NodeRole};
use protocol::health::ModelState;
use protocol::model::{ModelOffer, OfferedSource};
use protocol::signature::NodeKey;
use protocol::{Digest, ErrorCode, Topic, WireError};
use rpc::{Membership, Server};
use tether_worker::{Config, NotReady, ServedModel};
use tokio::time;

use crate::{MODEL_BYTES, SECOND, Scene, World, config, model, region, states};

/// A model in a format that has a header.
const GGUF_BYTES: &[u8] = include_bytes!("../../../../models/tiny.gguf");

type Offers = Arc<Mutex<Vec<ModelOffer>>>;

/// A registry that answers every offer alike, and notes them.
pub(crate) fn registry(world: &World, outcome: Result<Empty, WireError>) -> Arc<Mutex<Vec<ModelOffer>>> {
    let transport = world.network.node(&NodeKey::from_seed(&[9; 32]));
    let offers = Arc::new(Mutex::new(Vec::new()));
    let (taken, announced) = (offers.clone(), transport.clone());
    let info = NodeInfo { roles: vec![NodeRole::Registry], region: region(), version: "0".into() };
    let server = Server::new(transport, info).unary(MODEL_OFFER, move |_, offer: ModelOffer| {
        taken.lock().push(offer);
        let outcome = outcome.clone();
        async move { outcome }
    });
    world.tasks.spawn(server.run(world.end.clone(), SECOND));
    world.tasks.spawn(async move { announced.announce(&Topic::Control(region())).await.map(drop) });
    offers
}

async fn scene(config: Config, outcome: Result<Empty, WireError>) -> (Scene, Offers) {
    let mut offers = None;
    let prepare = |world: &World| {
        put(world, GGUF_BYTES);
        offers = Some(registry(world, outcome));
    };
    let scene =
        Scene::build(config, MockOptions::default(), prepare, |runtime| runtime, |_| Membership::unchecked()).await;
    (scene, offers.expect("it was prepared"))
}

fn put(world: &World, bytes: &[u8]) {
    let store = artifact_store::ArtifactStore::in_folder(world.folder.path()).expect("a store");
    store.put(bytes, bytes.len() as u64).expect("put");
}

fn received(offers: &Offers) -> Vec<ModelOffer> {
    offers.lock().clone()
}

fn offer(bytes: &[u8], context_length: u32) -> ModelOffer {
    let source = OfferedSource::Artifact { digest: Digest::of(bytes), bytes: bytes.len() as u64 };
    ModelOffer { key: model().key(), source, context_length, facts: None }
}

#[tokio::test(start_paused = true)]
async fn a_model_is_listed_before_it_is_ready() {
    let (scene, offers) = scene(config(), Ok(Empty {})).await;
    scene.handle.ready().await.expect("it loads");
    assert_eq!(received(&offers), [offer(MODEL_BYTES, 4_096)]);
    time::sleep(SECOND * 60).await;
    assert_eq!(received(&offers).len(), 1, "a listed model is not offered again");
}

#[tokio::test(start_paused = true)]
async fn a_model_that_the_registry_refuses_is_no_ready_model() {
    let refusal = WireError::new(ErrorCode::InvalidValue, "another model has this name");
    let (scene, _) = scene(config(), Err(refusal)).await;
    let Err(NotReady::LoadFailed { reason, .. }) = scene.handle.ready().await else { panic!("it was refused") };
    assert!(reason.contains("another model has this name"), "{reason}");
    time::sleep(SECOND).await;
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Error]);
}

#[tokio::test(start_paused = true)]
async fn without_a_registry_a_model_answers_and_is_listed_when_one_comes() {
    let scene = Scene::new(config(), MockOptions::default()).await;
    scene.handle.ready().await.expect("what is listed already needs no registry");
    let offers = registry(&scene.world, Ok(Empty {}));
    time::sleep(SECOND * 60).await;
    assert_eq!(received(&offers), [offer(MODEL_BYTES, 4_096)]);
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Ready]);
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_comes_late_and_refuses_takes_the_model_away() {
    let scene = Scene::new(config(), MockOptions::default()).await;
    scene.handle.ready().await.expect("it loads");
    registry(&scene.world, Err(WireError::new(ErrorCode::InvalidValue, "another model has this name")));
    time::sleep(SECOND * 60).await;
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Error]);
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_cannot_read_its_store_is_asked_again() {
    let away = WireError::new(ErrorCode::Unavailable, "the registry cannot read its store");
    let (scene, offers) = scene(config(), Err(away)).await;
    scene.handle.ready().await.expect("nothing was refused");
    time::sleep(SECOND * 60).await;
    assert!(received(&offers).len() > 5, "{:?}", received(&offers));
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Ready]);
}

#[tokio::test]
async fn a_model_that_is_loaded_at_its_first_job_is_listed_before_that() {
    let tiny = ServedModel { digest: Some(Digest::of(GGUF_BYTES)), ..model() };
    let config = Config { models: vec![tiny], preload: false, ..config() };
    let (scene, offers) = scene(config, Ok(Empty {})).await;
    while received(&offers).is_empty() {
        time::sleep(SECOND / 100).await;
    }
    let offered = received(&offers);
    let facts = offered[0].facts.clone().expect("the header was read");
    assert_eq!((facts.architecture.as_str(), facts.trained_context), ("llama", 512));
    assert_eq!(offered, [ModelOffer { facts: Some(facts), ..offer(GGUF_BYTES, 512) }]);
    assert!(scene.runtime.load_state().is_empty(), "nobody asked for it");
}

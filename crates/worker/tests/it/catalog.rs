//! Models that operators added, and that nobody named in the worker's settings.

use std::sync::Arc;

use engine::{MockOptions, MockRuntime, ModelRuntime as _};
use parking_lot::Mutex;
use protocol::artifact::{ArtifactFetch, FETCH};
use protocol::control::{CATALOG_LIST, Catalog, Empty, NodeInfo, NodeRole};
use protocol::infer::InferRequest;
use protocol::model::{ModelEntry, ModelKey};
use protocol::signature::NodeKey;
use protocol::{Digest, ErrorCode, Topic, UnixMillis};
use rpc::{ArtifactServer, ArtifactStream, CallError, Membership, Server};
use tether_worker::{CatalogUse, Config, ServedModel};
use tokio::time;

use crate::{SECOND, Scene, World, config, key, next, read, region, request, slow, text};

const OTHER_BYTES: &[u8] = b"what the mock takes for another model";

/// What the registry has, and the worker has not.
const ELSEWHERE: &[u8] = b"what lies in the store of the registry";

/// More than half of a MiB.
fn large(byte: u8) -> Vec<u8> {
    vec![byte; 600 << 10]
}

type Listed = Arc<Mutex<Vec<ModelEntry>>>;

fn entry(name: &str, bytes: &[u8]) -> ModelEntry {
    let (model_id, version) = (name.parse().expect("a name"), "1.0".parse().expect("a version"));
    ModelEntry {
        key: ModelKey { model_id, version },
        digest: Digest::of(bytes),
        bytes: bytes.len() as u64,
        context_length: 1,
        description: String::new(),
        created_at: UnixMillis(0),
        facts: None,
        added: true,
        pin: false,
        keep_alive_secs: None,
    }
}

/// Lets a registry show a list that a test may change.
fn registry(world: &World, listed: Listed) {
    let transport = world.network.node(&NodeKey::from_seed(&[9; 32]));
    let announced = transport.clone();
    let info = NodeInfo { roles: vec![NodeRole::Registry], region: region(), version: "0".into() };
    let given = world.folder.path().join("of-the-registry");
    let store = artifact_store::ArtifactStore::in_folder(given).expect("a store");
    store.put(ELSEWHERE, 1 << 20).expect("put");
    let artifact_server = Arc::new(ArtifactServer::new(store, Membership::unchecked()));
    let server = Server::new(transport, info)
        .unary(CATALOG_LIST, move |_, _: Empty| {
            let models = listed.lock().clone();
            async move { Ok(Catalog { models, ..Catalog::default() }) }
        })
        .stream(FETCH, move |call| {
            let artifact_server = artifact_server.clone();
            async move { artifact_server.serve(call, async |_| Ok(vec!["m".parse().expect("a name")])).await }
        });
    world.tasks.spawn(server.run(world.end.clone(), SECOND));
    world.tasks.spawn(async move { announced.announce(&Topic::Control(region())).await.map(drop) });
}

async fn scene(config: Config, mock: MockOptions) -> (Scene, Listed) {
    let listed: Listed = Arc::default();
    let prepare = |world: &World| {
        let store = artifact_store::ArtifactStore::in_folder(world.folder.path()).expect("the store");
        for bytes in [OTHER_BYTES, &large(b'1'), &large(b'2')] {
            store.put(bytes, 1 << 20).expect("put");
        }
        registry(world, listed.clone());
    };
    let scene = Scene::build(config, mock, prepare, |runtime| runtime, |_| Membership::unchecked()).await;
    scene.handle.ready().await.expect("it loads");
    (scene, listed)
}

fn set(listed: &Listed, models: &[ModelEntry]) {
    *listed.lock() = models.to_vec();
}

fn job(name: &str) -> InferRequest {
    InferRequest { model_id: name.parse().expect("a name"), ..request() }
}

fn supported(scene: &Scene) -> Vec<String> {
    scene.orchestrator.last().supported.iter().map(|key| key.model_id.to_string()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_model_that_was_added_is_served_where_its_file_is_and_loaded_when_it_is_asked_for() {
    let config = Config { catalog: CatalogUse::Local, ..config() };
    let (scene, listed) = scene(config, MockOptions::default()).await;
    let offered = ModelEntry { added: false, ..entry("offered", OTHER_BYTES) };
    set(&listed, &[entry("other", OTHER_BYTES), entry("elsewhere", b"no bytes of this worker"), offered]);
    time::sleep(SECOND * 5).await;
    assert_eq!(supported(&scene), ["tether-tiny", "other"]);
    assert_eq!(scene.runtime.load_state().len(), 1, "nobody has asked for it");
    let (chunks, error) = read(scene.open(&job("other")).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(16)));
}

#[tokio::test(start_paused = true)]
async fn a_model_that_was_removed_is_unloaded_once_its_jobs_have_ended() {
    let (scene, listed) = scene(config(), slow()).await;
    set(&listed, &[entry("other", OTHER_BYTES)]);
    time::sleep(SECOND * 5).await;
    let mut stream = scene.open(&job("other")).await.expect("accepted");
    next(&mut stream).await.expect("it runs").expect("and well");
    set(&listed, &[]);
    time::sleep(SECOND * 5).await;
    assert_eq!(supported(&scene), ["tether-tiny"]);
    assert_eq!(scene.refusal(&job("other")).await.code, ErrorCode::ModelNotHere);
    let (_, error) = read(stream).await;
    assert_eq!(error, None::<CallError>, "a running answer is not cut");
    time::sleep(SECOND).await;
    assert_eq!(scene.handle.ready_models(), [key()]);
    assert_eq!(scene.runtime.load_state().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_the_settings_say_of_a_model_wins_and_a_worker_may_keep_to_them() {
    let (scene, listed) = scene(config(), MockOptions::default()).await;
    set(&listed, &[entry("tether-tiny", OTHER_BYTES)]);
    time::sleep(SECOND * 5).await;
    set(&listed, &[]);
    time::sleep(SECOND * 5).await;
    assert_eq!(supported(&scene), ["tether-tiny"], "it came from the settings and stays");
    let (scene, listed) = self::scene(Config { catalog: CatalogUse::Off, ..config() }, MockOptions::default()).await;
    set(&listed, &[entry("other", OTHER_BYTES)]);
    time::sleep(SECOND * 5).await;
    assert_eq!(supported(&scene), ["tether-tiny"]);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_was_removed_holds_its_memory_until_it_is_unloaded() {
    let one = ServedModel::new(entry("one", &large(b'1')).key, Digest::of(&large(b'1')));
    let config = Config { models: vec![one], memory_max_mib: 1, ..Config::default() };
    let (scene, listed) = scene(config, MockOptions { per_token: SECOND, ..MockOptions::default() }).await;
    set(&listed, &[entry("two", &large(b'2'))]);
    time::sleep(SECOND * 5).await;
    let mut running = scene.open(&job("two")).await.expect("accepted");
    next(&mut running).await.expect("it runs").expect("and well");
    set(&listed, &[]);
    time::sleep(SECOND * 5).await;
    // There is no room for both, so this one waits for the end of the other, and is not refused.
    let waiting = scene.open(&job("one")).await.expect("accepted");
    time::sleep(SECOND * 2).await;
    assert_eq!(scene.runtime.load_state().len(), 1);
    let (ended, answered) = tokio::join!(read(running), read(waiting));
    assert_eq!((ended.1, answered.1), (None, None));
    assert_eq!(text(&answered.0), MockRuntime::text(16));
}

/// Returns what the last report says of models that are to be fetched.
fn to_fetch(scene: &Scene) -> Vec<String> {
    scene.orchestrator.last().to_fetch.iter().map(|key| key.model_id.to_string()).collect()
}

fn has(scene: &Scene, bytes: &[u8]) -> bool {
    let store = artifact_store::ArtifactStore::in_folder(scene.world.folder.path()).expect("the store");
    store.contains(&Digest::of(bytes))
}

#[tokio::test(start_paused = true)]
async fn a_model_whose_file_lies_elsewhere_is_fetched_when_it_is_asked_for_and_given_to_others() {
    let (scene, listed) = scene(config(), MockOptions::default()).await;
    set(&listed, &[entry("elsewhere", ELSEWHERE), entry("other", OTHER_BYTES)]);
    time::sleep(SECOND * 5).await;
    assert_eq!(supported(&scene), ["tether-tiny", "elsewhere", "other"]);
    assert_eq!(to_fetch(&scene), ["elsewhere"]);
    assert!(!has(&scene, ELSEWHERE), "nobody has asked for it");
    let (chunks, error) = read(scene.open(&job("elsewhere")).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(16)));
    assert!(has(&scene, ELSEWHERE));
    time::sleep(SECOND).await;
    assert_eq!(to_fetch(&scene), Vec::<String>::new());
    // Now it is a source itself, of what the list names.
    let ask = |bytes: &[u8]| {
        let wanted = ArtifactFetch { digest: Digest::of(bytes), offset: 5 };
        ArtifactStream::open(&scene.orchestrator.client, scene.handle.worker_id(), wanted)
    };
    let mut stream = ask(ELSEWHERE).await.expect("it gives");
    assert_eq!(stream.next().await.expect("a message").expect("it goes well"), &ELSEWHERE[5..]);
    let refused = ask(crate::MODEL_BYTES).await.expect_err("nobody added that");
    assert!(matches!(refused, CallError::Remote(error) if error.code == ErrorCode::NotFound));
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_held_is_not_offered_and_never_fetched() {
    let config = Config { memory_max_mib: 1, disk_max_mib: 1, ..config() };
    let (scene, listed) = scene(config, MockOptions::default()).await;
    let long = ModelEntry { bytes: 3 << 20, ..entry("too-long", ELSEWHERE) };
    let facts = protocol::model::ModelFacts { memory_bytes: 8 << 20, ..Default::default() };
    let greedy = ModelEntry { facts: Some(facts), ..entry("greedy", b"another one that lies elsewhere") };
    set(&listed, &[long, greedy]);
    time::sleep(SECOND * 5).await;
    assert_eq!(supported(&scene), ["tether-tiny"]);
}

#[tokio::test(start_paused = true)]
async fn the_fetched_file_of_a_model_that_was_removed_is_deleted_a_minute_later_and_no_other() {
    let (scene, listed) = scene(config(), MockOptions::default()).await;
    set(&listed, &[entry("elsewhere", ELSEWHERE), entry("other", OTHER_BYTES)]);
    time::sleep(SECOND * 5).await;
    assert_eq!(read(scene.open(&job("elsewhere")).await.expect("accepted")).await.1, None);
    set(&listed, &[]);
    time::sleep(SECOND * 30).await;
    assert!(has(&scene, ELSEWHERE));
    time::sleep(SECOND * 40).await;
    assert!(!has(&scene, ELSEWHERE));
    assert!(has(&scene, OTHER_BYTES), "it was brought to this machine by its user");
}

#[tokio::test(start_paused = true)]
async fn a_damaged_file_is_fetched_anew() {
    let (scene, listed) = scene(config(), MockOptions::default()).await;
    set(&listed, &[entry("elsewhere", ELSEWHERE)]);
    time::sleep(SECOND * 5).await;
    let digest = Digest::of(ELSEWHERE).to_string();
    let path = scene.world.folder.path().join("sha256").join(&digest[..2]).join(&digest);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    std::fs::write(&path, b"what somebody made of it").expect("written");
    time::sleep(SECOND * 5).await;
    let (chunks, error) = read(scene.open(&job("elsewhere")).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(16)));
    assert_eq!(std::fs::read(&path).expect("it is there"), ELSEWHERE);
}

#[tokio::test(start_paused = true)]
async fn a_file_that_nobody_has_fails_the_job_and_the_report_says_why() {
    let (scene, listed) = scene(config(), MockOptions::default()).await;
    set(&listed, &[entry("nowhere", b"no bytes of anybody here")]);
    time::sleep(SECOND * 5).await;
    let outcome = match scene.open(&job("nowhere")).await {
        Ok(stream) => read(stream).await.1,
        Err(error) => Some(error),
    };
    assert!(outcome.is_some());
    time::sleep(SECOND).await;
    let reports = scene.orchestrator.reports();
    let mut reasons =
        reports.iter().flat_map(|report| &report.model_cache).filter_map(|cached| cached.reason.as_deref());
    assert!(reasons.any(|why| why.contains("could not be fetched")), "{reports:?}");
}

#[tokio::test(start_paused = true)]
async fn what_the_network_pins_is_fetched_loaded_and_kept_unless_the_settings_say_otherwise() {
    let own =
        ServedModel { pin: Some(false), ..ServedModel::new(entry("own", OTHER_BYTES).key, Digest::of(OTHER_BYTES)) };
    let config = Config { models: vec![own], preload: false, ..Config::default() };
    let (scene, listed) = scene(config, MockOptions::default()).await;
    let pinned = |entry: ModelEntry| ModelEntry { pin: true, ..entry };
    set(&listed, &[pinned(entry("elsewhere", ELSEWHERE)), pinned(entry("own", OTHER_BYTES))]);
    time::sleep(SECOND * 10).await;
    let resident = || scene.handle.ready_models().iter().map(|key| key.model_id.to_string()).collect::<Vec<_>>();
    assert_eq!(resident(), ["elsewhere"]);
    time::sleep(SECOND * 3_000).await;
    assert_eq!(resident(), ["elsewhere"]);
    set(&listed, &[ModelEntry { keep_alive_secs: Some(60), ..entry("elsewhere", ELSEWHERE) }]);
    time::sleep(SECOND * 10).await;
    assert_eq!(resident(), Vec::<String>::new(), "it was unused for longer than that");
    assert_eq!(read(scene.open(&job("elsewhere")).await.expect("accepted")).await.1, None);
    time::sleep(SECOND * 50).await;
    assert_eq!(resident(), ["elsewhere"]);
    time::sleep(SECOND * 20).await;
    assert_eq!(resident(), Vec::<String>::new());
}

//! Which models lie in memory: those that are asked for, as far as they fit.

use std::time::Duration;

use engine::memory_plan::VRAM_SPARED_BYTES;
use engine::{MockOptions, MockRuntime, ModelRuntime as _};
use futures_util::future::join_all;
use protocol::Digest;
use protocol::control::{MODEL_MOVE, ModelMove, ModelResidency, ResidencyState};
use protocol::infer::{InferRequest, Input};
use protocol::model::ModelKey;
use rpc::Membership;
use tether_worker::{Config, ServedModel};
use tokio::time::{self, Instant};

use crate::{SECOND, Scene, World, next, read, request, text};

/// More than half of the memory that the worker may use, of which it has one MiB.
const LARGE: usize = 600 << 10;

fn bytes_of(name: &str, length: usize) -> Vec<u8> {
    name.bytes().cycle().take(length).collect()
}

fn served(name: &str, length: usize) -> ServedModel {
    let (model_id, version) = (name.parse().expect("a name"), "1.0".parse().expect("a version"));
    ServedModel::new(ModelKey { model_id, version }, Digest::of(&bytes_of(name, length)))
}

fn job(name: &str) -> InferRequest {
    InferRequest { model_id: name.parse().expect("a name"), ..request() }
}

/// A model's name, its length, and what is changed of its settings.
type Model<'a> = (&'a str, usize, fn(&mut ServedModel));

/// A worker with one MiB of memory for models; the mock takes as much for one as its file is long.
async fn scene(models: &[Model<'_>], mock: MockOptions) -> Scene {
    let put = |world: &World| {
        let store = artifact_store::ArtifactStore::in_folder(world.folder.path()).expect("the store");
        for (name, length, _) in models {
            store.put(&*bytes_of(name, *length), 1 << 30).expect("put");
        }
    };
    let models = models.iter().map(|(name, length, change)| {
        let mut model = served(name, *length);
        change(&mut model);
        model
    });
    let config = Config { models: models.collect(), memory_max_mib: 1, ..Config::default() };
    let scene = Scene::build(config, mock, put, |runtime| runtime, |_| Membership::unchecked()).await;
    // What does not fit beside the others is left out; what never fits is told.
    let _ = scene.handle.ready().await;
    scene
}

fn as_it_is(_: &mut ServedModel) {}

impl Scene {
    fn resident(&self) -> Vec<String> {
        self.handle.ready_models().iter().map(|key| key.model_id.to_string()).collect()
    }

    /// Returns how many loads there were.
    fn loads(&self) -> u64 {
        self.runtime.load_state().iter().map(|snapshot| snapshot.model.0).max().unwrap_or_default()
    }

    async fn is_answered(&self, name: &str) -> bool {
        let (chunks, error) = read(self.open(&job(name)).await.expect("accepted")).await;
        error.is_none() && text(&chunks) == MockRuntime::text(16)
    }
}

#[tokio::test(start_paused = true)]
async fn a_model_that_nobody_uses_is_unloaded_and_comes_back_when_it_is_asked_for() {
    let scene = scene(&[("one", 10, as_it_is)], MockOptions { load: SECOND, ..MockOptions::default() }).await;
    time::sleep(SECOND * 200).await;
    assert!(scene.is_answered("one").await);
    time::sleep(SECOND * 290).await;
    assert_eq!(scene.resident(), ["one"], "five minutes count from the last job");
    time::sleep(SECOND * 20).await;
    assert_eq!(scene.runtime.load_state().len(), 0);
    let report = scene.orchestrator.last();
    assert_eq!((report.supported.len(), report.model_cache.len()), (1, 0), "it is still served");
    assert!(scene.is_answered("one").await);
    assert_eq!(scene.resident(), ["one"]);
}

#[tokio::test(start_paused = true)]
async fn a_model_stays_as_long_as_it_is_told_to() {
    let models: [Model<'_>; 4] = [
        ("for-ever", 10, |model| model.keep_alive_secs = Some(-1)),
        ("pinned", 10, |model| (model.pin, model.keep_alive_secs) = (Some(true), Some(1))),
        ("a-minute", 10, |model| model.keep_alive_secs = Some(60)),
        ("at-once", 10, |model| model.keep_alive_secs = Some(0)),
    ];
    let scene = scene(&models, MockOptions::default()).await;
    time::sleep(SECOND * 30).await;
    assert_eq!(scene.resident(), ["for-ever", "pinned", "a-minute"]);
    time::sleep(SECOND * 3_000).await;
    assert_eq!(scene.resident(), ["for-ever", "pinned"]);
    assert!(scene.is_answered("at-once").await);
    time::sleep(SECOND).await;
    assert_eq!(scene.resident(), ["for-ever", "pinned"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_idle_makes_room_for_what_is_asked_for() {
    let scene =
        scene(&[("one", LARGE, as_it_is), ("two", LARGE, as_it_is), ("small", 10, as_it_is)], slow_load()).await;
    // One of the large ones has no room at the start, and takes nobody's.
    let begun = scene.resident();
    assert!(begun.len() == 2 && begun[1] == "small", "{begun:?}");
    for name in ["one", "two", "one"] {
        assert!(scene.is_answered("small").await);
        assert!(scene.is_answered(name).await);
        assert_eq!(scene.resident(), [name, "small"], "what has just been used stays");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_pinned_makes_room_for_nobody_and_what_never_fits_takes_nobodys_place() {
    let pinned: fn(&mut ServedModel) = |model| model.pin = Some(true);
    let scene =
        scene(&[("one", LARGE, pinned), ("two", LARGE, as_it_is), ("huge", 2 << 20, as_it_is)], slow_load()).await;
    // Whoever comes first, the pinned one gets its place.
    time::sleep(SECOND * 60).await;
    for name in ["two", "huge"] {
        let (chunks, error) = match scene.open(&job(name)).await {
            Ok(stream) => read(stream).await,
            Err(error) => (vec![], Some(error)),
        };
        assert!(chunks.is_empty() && error.is_some(), "{name}");
        assert_eq!(scene.resident(), ["one"]);
        assert!(scene.is_answered("one").await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_running_answer_is_never_cut_to_make_room() {
    let mock = MockOptions { per_token: SECOND, ..slow_load() };
    let scene = scene(&[("one", LARGE, as_it_is), ("two", LARGE, as_it_is)], mock).await;
    let mut running = scene.open(&job("one")).await.expect("accepted");
    next(&mut running).await.expect("it runs").expect("and well");
    let begun = Instant::now();
    let (first, second) = tokio::join!(read(running), scene.is_answered("two"));
    assert!(first.1.is_none() && second, "both are answered");
    assert_eq!(scene.resident(), ["two"]);
    // Sixteen seconds each, a load, and no more than a turn beside them.
    assert!(begun.elapsed() < SECOND * 40, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn under_alternating_load_one_load_serves_many_jobs() {
    let mock = MockOptions { per_token: SECOND / 100, ..slow_load() };
    let scene = scene(&[("one", LARGE, as_it_is), ("two", LARGE, as_it_is)], mock).await;
    // Each has its next job as soon as one is answered. Their jobs end at different times, after 150, 110 and 70 ms, so
    // that a model in its turn is always busy. Without turns the models would change places after one job of each.
    let client = |(name, tokens): (&'static str, u32)| {
        let scene = &scene;
        async move {
            for _ in 0..60 {
                let request = job(name);
                let input = Input { max_tokens: Some(tokens), ..request.input };
                let stream = scene.open(&InferRequest { input, ..request }).await.expect("accepted");
                assert_eq!(read(stream).await.1, None);
            }
        }
    };
    join_all([("one", 16), ("one", 12), ("one", 8), ("two", 16), ("two", 12), ("two", 8)].map(client)).await;
    let (loads, jobs) = (scene.loads(), 6 * 60);
    assert!(loads * 5 <= jobs, "{loads} loads for {jobs} jobs");
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_model_and_leaves_keeps_nobody_out() {
    let mock = MockOptions { per_token: SECOND, ..slow_load() };
    let scene = scene(&[("one", LARGE, as_it_is), ("two", LARGE, as_it_is)], mock).await;
    let mut running = scene.open(&job("one")).await.expect("accepted");
    next(&mut running).await.expect("it runs").expect("and well");
    let waiting = scene.open(&job("two")).await.expect("accepted");
    // Its turn has come, and the first lets no more in.
    time::sleep(SECOND * 5).await;
    drop(waiting);
    let second = time::timeout(SECOND * 20, scene.is_answered("one")).await;
    assert_eq!(second, Ok(true), "it runs beside the first");
    drop(running);
}

fn slow_load() -> MockOptions {
    MockOptions { load: Duration::from_millis(1_500), ..MockOptions::default() }
}

impl Scene {
    async fn move_model(&self, name: &str, load: bool) -> (ResidencyState, Option<String>) {
        self.move_for(name, load, None).await
    }

    async fn move_for(&self, name: &str, load: bool, keep_alive_secs: Option<i64>) -> (ResidencyState, Option<String>) {
        let request = ModelMove { key: served(name, 0).key(), load, keep_alive_secs };
        let worker = self.handle.worker_id();
        let moved: ModelResidency =
            self.orchestrator.client.call(worker, MODEL_MOVE, &request, SECOND).await.expect("the worker says");
        let moved = moved.workers.into_iter().next().expect("its own place");
        (moved.state, moved.reason)
    }
}

#[tokio::test(start_paused = true)]
async fn an_operator_moves_a_model_into_memory_and_out_of_it() {
    let mock = MockOptions { per_token: SECOND, ..slow_load() };
    let scene = scene(&[("one", LARGE, as_it_is), ("two", LARGE, as_it_is)], mock).await;
    let [first, second] = if scene.resident() == ["one"] { ["one", "two"] } else { ["two", "one"] };
    assert_eq!(scene.move_model(first, true).await, (ResidencyState::Loaded, None));
    assert_eq!(scene.move_model(second, true).await, (ResidencyState::Loading, None));
    time::sleep(SECOND * 3).await;
    assert_eq!(scene.resident(), [second], "it took the place of the other, as it does for a job");
    let mut running = scene.open(&job(second)).await.expect("accepted");
    next(&mut running).await.expect("it runs").expect("and well");
    let (state, reason) = scene.move_model(second, false).await;
    assert_eq!((state, reason.as_deref()), (ResidencyState::InUse, Some("a job runs on it")));
    assert_eq!(read(running).await.1, None);
    assert_eq!(scene.move_model(second, false).await, (ResidencyState::Unloaded, None));
    time::sleep(SECOND).await;
    assert_eq!((scene.resident().len(), scene.runtime.load_state().len()), (0, 0));
    assert!(scene.is_answered(first).await, "a model that was unloaded comes back when it is asked for");
}

/// Two models on a GPU that holds one of them, beside what each leaves free there.
async fn on_a_gpu(change: fn(&mut ServedModel)) -> Scene {
    let mock = MockOptions { vram_bytes: VRAM_SPARED_BYTES + (1 << 20), ..MockOptions::default() };
    scene(&[("one", 300 << 10, as_it_is), ("two", 300 << 10, change)], mock).await
}

#[tokio::test(start_paused = true)]
async fn models_make_room_on_a_gpu_as_they_do_in_memory() {
    let scene = on_a_gpu(as_it_is).await;
    // Whichever was verified first is loaded first.
    let first = scene.resident();
    assert_eq!(first.len(), 1, "memory would hold both, and the GPU does not: {first:?}");
    let other = if first == ["one"] { "two" } else { "one" };
    assert!(scene.is_answered(other).await);
    assert_eq!(scene.resident(), [other]);
    // One that is kept off the GPU takes nothing of it.
    let scene = on_a_gpu(|model| model.gpu_layers = Some(0)).await;
    assert_eq!(scene.resident(), ["one", "two"]);
}

#[tokio::test(start_paused = true)]
async fn a_model_beside_one_that_is_pinned_takes_what_the_gpu_has_left_or_says_why_not() {
    let pinned: fn(&mut ServedModel) = |model| model.pin = Some(true);
    let mock = || MockOptions { vram_bytes: VRAM_SPARED_BYTES + (1 << 20), ..MockOptions::default() };
    let scene = scene(&[("one", 300 << 10, pinned), ("two", 300 << 10, as_it_is)], mock()).await;
    assert!(scene.is_answered("two").await, "the processor computes it");
    assert_eq!(scene.resident(), ["one", "two"]);

    let all_layers: fn(&mut ServedModel) = |model| model.gpu_layers = Some(99);
    let scene = self::scene(&[("one", 300 << 10, pinned), ("two", 300 << 10, all_layers)], mock()).await;
    // Whichever was verified first is loaded first; once the pinned one is there, the other is refused when it is asked
    // for.
    let mut not_ready = String::new();
    for _ in 0..100 {
        if let Ok(answer) = scene.open(&job("two")).await {
            read(answer).await;
        }
        if let Err(refusal) = scene.handle.ready().await {
            not_ready = refusal.to_string();
            break;
        }
        time::sleep(SECOND).await;
    }
    assert!(not_ready.contains("gpu_layers asks for 512 MiB of the GPU, of which"), "{not_ready}");
}

#[tokio::test(start_paused = true)]
async fn a_model_is_loaded_for_as_long_as_an_operator_says() {
    let at_once: fn(&mut ServedModel) = |model| model.keep_alive_secs = Some(0);
    let scene = scene(&[("one", 10, at_once)], MockOptions::default()).await;
    time::sleep(SECOND).await;
    let (state, reason) = scene.move_model("one", true).await;
    assert_eq!(state, ResidencyState::Unloaded, "it would be waited for in vain");
    assert!(reason.is_some_and(|why| why.contains("--keep-alive")));
    assert_eq!(scene.move_for("one", true, Some(60)).await.0, ResidencyState::Loading);
    time::sleep(SECOND * 50).await;
    assert_eq!(scene.resident(), ["one"]);
    time::sleep(SECOND * 20).await;
    assert_eq!(scene.resident(), Vec::<String>::new());
    // That was for this time.
    assert!(scene.is_answered("one").await);
    time::sleep(SECOND).await;
    assert_eq!(scene.resident(), Vec::<String>::new());
    scene.move_for("one", true, Some(-1)).await;
    time::sleep(SECOND * 9_999).await;
    assert_eq!(scene.resident(), ["one"]);
    assert_eq!(scene.move_for("one", true, Some(0)).await, (ResidencyState::Unloaded, None));
    time::sleep(SECOND).await;
    assert_eq!(scene.resident(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_request_says_how_long_the_model_stays_and_a_pinned_one_stays() {
    let pinned: fn(&mut ServedModel) = |model| model.pin = Some(true);
    let scene = scene(&[("one", 10, as_it_is), ("pinned", 10, pinned)], MockOptions::default()).await;
    let asked = async |name: &str, keep_alive_secs: Option<i64>| {
        let request = job(name);
        let input = Input { keep_alive_secs, ..request.input };
        let stream = scene.open(&InferRequest { input, ..request }).await.expect("accepted");
        assert_eq!(read(stream).await.1, None);
    };
    asked("one", Some(1_000)).await;
    time::sleep(SECOND * 900).await;
    assert_eq!(scene.resident(), ["one", "pinned"]);
    // The last word counts, and who says nothing changes nothing.
    asked("one", None).await;
    time::sleep(SECOND * 900).await;
    assert_eq!(scene.resident(), ["one", "pinned"]);
    asked("one", Some(0)).await;
    asked("pinned", Some(0)).await;
    time::sleep(SECOND).await;
    assert_eq!(scene.resident(), ["pinned"]);
}

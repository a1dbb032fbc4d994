//! How models come into memory, and back when their engine dies.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use engine::hardware::Hardware;
use engine::{
    EngineError, GenerateRequest, GenerateStream, LoadOptions, LoadSnapshot, LoadedModel, MemoryPlan, MockOptions,
    MockRuntime, ModelId, ModelRuntime, ProgressSink, PromptInput, RuntimeInfo, VerifiedArtifact,
};
use protocol::health::ModelState;
use protocol::{Digest, ErrorCode};
use rpc::CallError;
use rpc::Membership;
use tether_worker::{Config, NotReady, ServedModel};
use tokio::time;

use crate::{SECOND, Scene, config, key, model, next, read, request, slow, states, text};

fn is_one(value: f64) -> bool {
    (value - 1.0).abs() < f64::EPSILON
}

#[tokio::test(start_paused = true)]
async fn a_job_that_comes_during_the_load_is_accepted_at_once_and_waits() {
    let scene = Scene::new(config(), MockOptions { load: SECOND * 10, ..MockOptions::default() }).await;
    // `open` itself insists on an acceptance within 500 ms.
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(16)));
}

#[tokio::test(start_paused = true)]
async fn a_model_that_is_not_preloaded_is_loaded_once_by_its_first_jobs() {
    let lazy = Config { preload: false, ..config() };
    let scene = Scene::new(lazy, MockOptions { load: SECOND * 10, ..MockOptions::default() }).await;
    scene.handle.ready().await.expect("there is nothing to wait for");
    time::sleep(SECOND * 20).await;
    assert!(scene.runtime.load_state().is_empty());
    assert_eq!(scene.orchestrator.last().model_cache, []);
    assert_eq!(scene.orchestrator.last().supported, [key()]);
    let job = request();
    let (first, second) = tokio::join!(scene.open(&job), scene.open(&job));
    for stream in [first, second] {
        assert_eq!(text(&read(stream.expect("accepted")).await.0), MockRuntime::text(16));
    }
    assert_eq!(scene.runtime.load_state().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_cannot_be_loaded_says_why_and_holds_up_no_other() {
    let broken = ServedModel { model_id: "broken".parse().expect("name"), digest: Some(Digest([7; 32])), ..model() };
    let models = vec![broken, model()];
    let scene =
        Scene::new(Config { models, ..config() }, MockOptions { load: SECOND * 5, ..MockOptions::default() }).await;
    let Err(NotReady::LoadFailed { model, reason }) = scene.handle.ready().await else { panic!("one is broken") };
    assert_eq!(model.model_id.as_str(), "broken");
    assert!(reason.contains("is not in the store: there is no file"), "{reason}");
    assert_eq!(scene.handle.ready_models(), [key()]);
    time::sleep(SECOND).await;
    let cached = scene.orchestrator.last().model_cache;
    let cached = cached.iter().find(|model| model.state == ModelState::Error).expect("it is told");
    assert_eq!(cached.reason.as_deref(), Some(&*reason));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_dies_fails_its_job_and_is_loaded_again() {
    let scene = Scene::ready(config(), slow()).await;
    let mut stream = scene.open(&request()).await.expect("accepted");
    next(&mut stream).await.expect("it runs").expect("and well");
    scene.kill_engine().await;
    let (_, error) = read(stream).await;
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerFailed));
    time::sleep(SECOND / 2).await;
    assert!(is_one(scene.metric("tether_engine_deaths_total")));
    let mut stream = scene.open(&request()).await.expect("a new engine is there");
    next(&mut stream).await.expect("it runs").expect("and well");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_dies_while_idle_is_noticed_and_loaded_again() {
    let scene = Scene::ready(config(), MockOptions { load: SECOND, ..MockOptions::default() }).await;
    let before = scene.orchestrator.received().len();
    scene.kill_engine().await;
    time::sleep(SECOND * 3).await;
    let seen: Vec<_> = scene.orchestrator.reports()[before..].iter().flat_map(states).collect();
    assert!(seen.contains(&ModelState::Loading), "{seen:?}");
    assert_eq!(seen.last(), Some(&ModelState::Ready));
    assert!(is_one(scene.metric("tether_engine_deaths_total")));
}

#[tokio::test(start_paused = true)]
async fn a_job_that_finds_its_engine_dead_waits_for_the_next_one() {
    let scene = Scene::ready(config(), MockOptions { load: SECOND * 3, ..MockOptions::default() }).await;
    let before = scene.orchestrator.received().len();
    // Three times in a row, each before anybody has noticed.
    for _ in 0..3 {
        scene.kill_engine().await;
        let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
        assert_eq!((error, text(&chunks)), (None, MockRuntime::text(16)));
    }
    time::sleep(SECOND).await;
    let seen: Vec<_> =
        scene.orchestrator.reports()[before..].iter().flat_map(|report| report.model_cache.clone()).collect();
    assert!(seen.iter().all(|model| model.state != ModelState::Error), "{seen:?}");
    // It takes as long as the last time, so jobs are sent to wait for it.
    let reloading: Vec<_> = seen.iter().filter_map(|model| model.loading).collect();
    assert!(!reloading.is_empty());
    assert!(reloading.iter().all(|load| load.remaining().is_some_and(|left| left <= SECOND * 4)), "{reloading:?}");
}

#[tokio::test(start_paused = true)]
async fn a_job_on_which_two_engines_go_is_given_to_no_third() {
    let scene = odd(|runtime| runtime.is_gone = true).await;
    scene.handle.ready().await.expect("the model loads");
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!(chunks, []);
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerFailed));
    assert!((scene.metric("tether_engine_deaths_total") - 2.0).abs() < f64::EPSILON);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_fails_before_the_first_token_fails_the_job_without_a_chunk() {
    let scene = Scene::ready(config(), MockOptions { fail_first: 1, ..MockOptions::default() }).await;
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!(chunks, []);
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerFailed));
    // One failure may be the request's; the engine stays.
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(16)));
    assert!(scene.metric("tether_engine_deaths_total") < 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_dies_in_mid_answer_has_sent_what_it_had() {
    let scene = Scene::ready(config(), MockOptions { die_first: 1, die_after: 5, ..MockOptions::default() }).await;
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!(text(&chunks), MockRuntime::text(5));
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerFailed));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_fails_three_jobs_in_a_row_is_replaced() {
    let scene = Scene::ready(config(), MockOptions { fail_first: 3, ..MockOptions::default() }).await;
    let before = scene.runtime.load_state()[0].model;
    for _ in 0..3 {
        let (_, error) = read(scene.open(&request()).await.expect("accepted")).await;
        assert!(error.is_some());
    }
    time::sleep(SECOND).await;
    assert!(is_one(scene.metric("tether_engine_deaths_total")));
    let after = scene.runtime.load_state();
    assert_eq!(after.len(), 1);
    assert_ne!(after[0].model, before);
}

#[tokio::test(start_paused = true)]
async fn a_tampered_artifact_never_loads() {
    let scene =
        Scene::build(config(), MockOptions::default(), Scene::tamper, |runtime| runtime, |_| Membership::unchecked())
            .await;
    let not_ready = scene.handle.ready().await.expect_err("it must not load");
    assert!(matches!(&not_ready, NotReady::LoadFailed { model, .. } if *model == key()), "{not_ready}");
    time::sleep(SECOND * 120).await;
    assert!(scene.runtime.load_state().is_empty());
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Error]);
    assert!(is_one(scene.metric("tether_artifact_verify_failures_total")));
    let error = scene.refusal(&request()).await;
    assert_eq!(error.code, ErrorCode::WorkerFailed);
    assert!(!error.message.contains("sha256"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_artifact_that_is_put_back_is_loaded_without_a_restart() {
    let scene =
        Scene::build(config(), MockOptions::default(), Scene::tamper, |runtime| runtime, |_| Membership::unchecked())
            .await;
    scene.handle.ready().await.expect_err("it must not load");
    let store = artifact_store::ArtifactStore::in_folder(scene.world.folder.path()).expect("the store");
    store.put(crate::MODEL_BYTES, 1024).expect("put");
    time::sleep(SECOND * 31).await;
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Ready]);
}

#[tokio::test(start_paused = true)]
async fn an_engine_whose_answer_just_stops_fails_the_job() {
    let scene = odd(|runtime| runtime.is_mute = true).await;
    scene.handle.ready().await.expect("the model loads");
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!(chunks, []);
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerFailed));
}

#[tokio::test(start_paused = true)]
async fn a_model_that_does_not_fit_is_not_loaded_and_its_jobs_go_elsewhere() {
    let scene = odd(|runtime| runtime.is_too_large = true).await;
    let not_ready = scene.handle.ready().await.expect_err("it does not fit");
    assert!(
        matches!(&not_ready, NotReady::LoadFailed { reason, .. } if reason.contains("of memory, and")),
        "{not_ready}"
    );
    time::sleep(SECOND).await;
    assert!(scene.runtime.load_state().is_empty());
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Error]);
    assert_eq!(scene.refusal(&request()).await.code, ErrorCode::WorkerFailed);
}

#[tokio::test(start_paused = true)]
async fn the_progress_of_a_load_is_reported_about_once_a_second() {
    let scene = odd(|runtime| runtime.pause = Some(SECOND / 10)).await;
    time::sleep(SECOND * 12).await;
    let reports = scene.orchestrator.reports();
    let loading: Vec<_> = reports.iter().filter_map(|report| report.model_cache.first()?.loading).collect();
    assert!((8..=16).contains(&loading.len()), "{loading:?}");
    assert!(
        loading.windows(2).all(|pair| pair[0].percent <= pair[1].percent && pair[0].elapsed_ms <= pair[1].elapsed_ms)
    );
    let last = loading.last().expect("some");
    assert!(last.percent > 80 && last.bytes == crate::MODEL_BYTES.len() as u64, "{last:?}");
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Ready]);
    assert_eq!(scene.orchestrator.last().model_cache[0].loading, None);
}

/// Sets a scene with an engine that is odd in some way.
async fn odd(make_odd: impl FnOnce(&mut Odd)) -> Scene {
    let wrap = |mock| {
        let mut runtime = Odd { mock, is_mute: false, is_too_large: false, is_gone: false, pause: None };
        make_odd(&mut runtime);
        Arc::new(runtime) as Arc<dyn ModelRuntime>
    };
    Scene::build(config(), MockOptions::default(), |_| {}, wrap, |_| Membership::unchecked()).await
}

/// Does as the mock does, but for its oddities.
struct Odd {
    mock: Arc<MockRuntime>,
    /// Ends every answer without a word.
    is_mute: bool,
    /// Needs more memory than there is.
    is_too_large: bool,
    /// Is gone when a job comes.
    is_gone: bool,
    /// Pauses at each hundredth of a load.
    pause: Option<Duration>,
}

#[async_trait]
impl ModelRuntime for Odd {
    fn describe(&self) -> RuntimeInfo {
        self.mock.describe()
    }

    async fn hardware(&self) -> Hardware {
        self.mock.hardware().await
    }

    async fn estimate(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<MemoryPlan, EngineError> {
        self.mock.estimate(artifact, options).await
    }

    async fn load(
        &self,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError> {
        if self.is_too_large {
            return Err(EngineError::OutOfMemory { needed_bytes: 2, available_bytes: 1 });
        }
        if let Some(pause) = self.pause {
            for hundredth in 1_u8..100 {
                progress(f32::from(hundredth) / 100.0);
                time::sleep(pause).await;
            }
        }
        self.mock.load(artifact, options, progress).await
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        self.mock.unload(model).await
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        if self.is_gone {
            self.mock.unload(request.model).await?;
            return Err(EngineError::NotLoaded);
        }
        if self.is_mute { Ok(GenerateStream::channel(1).1) } else { self.mock.generate(request).await }
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        self.mock.count_tokens(model, input).await
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        self.mock.load_state()
    }
}

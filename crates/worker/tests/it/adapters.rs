//! How adapters are attached to a model that runs, and taken off again.

use std::sync::Arc;

use artifact_store::ArtifactStore;
use async_trait::async_trait;
use engine::hardware::Hardware;
use engine::{
    AdapterId, EngineError, GenerateRequest, GenerateStream, LoadOptions, LoadSnapshot, LoadedModel, MemoryPlan,
    MockOptions, MockRuntime, ModelId, ModelRuntime, ProgressSink, PromptInput, RuntimeInfo, VerifiedArtifact,
};
use parking_lot::Mutex;
use protocol::health::ModelState;
use protocol::infer::{EmbedInput, InferRequest, Input};
use protocol::{AdapterName, Digest, ErrorCode};
use rpc::Membership;
use tether_worker::{Config, ServedAdapter, ServedModel};
use tokio::time;

use crate::{SECOND, Scene, config, model, read, request, states};

/// What was asked of the engine, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Add(AdapterId, String),
    Remove(AdapterId),
    Generate(Option<AdapterId>),
}

type Calls = Arc<Mutex<Vec<Call>>>;

fn name(text: &str) -> AdapterName {
    text.parse().expect("a name")
}

/// A worker with the adapters `a`, `b` and `missing`, the last without a file, and room for so many at once.
async fn scene(adapters_max: u32, mock: MockOptions) -> (Scene, Calls) {
    let adapters = ["a", "b", "missing"]
        .map(|text| ServedAdapter { name: name(text), digest: Digest::of(text.as_bytes()) })
        .to_vec();
    let config = Config { models: vec![ServedModel { adapters, adapters_max, ..model() }], ..config() };
    let calls = Calls::default();
    let recorded = calls.clone();
    let wrap = |mock| Arc::new(Attaching { mock, calls: recorded }) as Arc<dyn ModelRuntime>;
    let store = |world: &crate::World| {
        let store = ArtifactStore::in_folder(world.folder.path()).expect("a store");
        for bytes in [b"a", b"b"] {
            store.put(bytes.as_slice(), 1).expect("put");
        }
    };
    let scene = Scene::build(config, mock, store, wrap, |_| Membership::unchecked()).await;
    scene.handle.ready().await.expect("the model loads");
    time::sleep(SECOND / 2).await;
    (scene, calls)
}

fn with(adapter: &str) -> InferRequest {
    InferRequest { input: Input { adapter: Some(name(adapter)), ..request().input }, ..request() }
}

impl Scene {
    async fn answer_with(&self, adapter: &str) {
        let (_, error) = read(self.open(&with(adapter)).await.expect("accepted")).await;
        assert_eq!(error, None);
    }
}

fn calls_of(calls: &Calls) -> Vec<Call> {
    calls.lock().clone()
}

fn add(id: u64, adapter: &str) -> Call {
    Call::Add(AdapterId(id), Digest::of(adapter.as_bytes()).to_string())
}

#[tokio::test(start_paused = true)]
async fn an_adapter_is_attached_once_by_its_first_jobs_and_then_at_hand() {
    let (scene, calls) = scene(4, MockOptions::default()).await;
    let report = scene.orchestrator.last();
    let served: Vec<_> = report.adapters.iter().map(|key| key.adapter.as_str()).collect();
    assert_eq!((served, report.model_cache[0].adapters.clone()), (vec!["a", "b", "missing"], vec![]));
    tokio::join!(scene.answer_with("a"), scene.answer_with("a"));
    let uses = Call::Generate(Some(AdapterId(1)));
    assert_eq!(calls_of(&calls), [add(1, "a"), uses.clone(), uses]);
    time::sleep(SECOND / 2).await;
    assert_eq!(scene.orchestrator.last().model_cache[0].adapters, [name("a")]);
}

#[tokio::test(start_paused = true)]
async fn the_adapter_unused_for_longest_is_taken_off_for_another() {
    let (scene, calls) = scene(1, MockOptions::default()).await;
    scene.answer_with("a").await;
    scene.answer_with("b").await;
    let [a, b] = [1, 2].map(AdapterId);
    let expected = [add(1, "a"), Call::Generate(Some(a)), Call::Remove(a), add(2, "b"), Call::Generate(Some(b))];
    assert_eq!(calls_of(&calls), expected);
}

#[tokio::test(start_paused = true)]
async fn an_adapter_in_use_is_not_taken_off() {
    let (scene, calls) = scene(1, MockOptions { per_token: SECOND, ..MockOptions::default() }).await;
    tokio::join!(scene.answer_with("a"), async {
        time::sleep(SECOND * 2).await;
        scene.answer_with("b").await;
    });
    let [a, b] = [1, 2].map(AdapterId);
    let expected = [add(1, "a"), Call::Generate(Some(a)), Call::Remove(a), add(2, "b"), Call::Generate(Some(b))];
    assert_eq!(calls_of(&calls), expected, "one after the other");
}

#[tokio::test(start_paused = true)]
async fn another_engine_gets_its_adapters_again() {
    let (scene, calls) = scene(4, MockOptions::default()).await;
    scene.answer_with("a").await;
    scene.kill_engine().await;
    time::sleep(SECOND * 3).await;
    assert_eq!(scene.orchestrator.last().model_cache[0].adapters, []);
    scene.answer_with("a").await;
    assert_eq!(calls_of(&calls)[2..], [add(2, "a"), Call::Generate(Some(AdapterId(2)))]);
}

#[tokio::test(start_paused = true)]
async fn an_adapter_that_cannot_be_had_is_no_fault_of_its_model() {
    let (scene, calls) = scene(1, MockOptions::default()).await;
    for adapter in ["missing", "unheard-of"] {
        let refusal = scene.refusal(&with(adapter)).await;
        assert_eq!(refusal.code, ErrorCode::ModelNotHere, "{refusal}");
    }
    assert_eq!(calls_of(&calls), []);
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Ready]);
    scene.answer_with("a").await;
}

const PIRATE: &[u8] = include_bytes!("../../../../models/tiny-lora-pirate.gguf");

/// A worker whose model has the adapter `pirate` pinned, with real files behind both.
async fn pinned_scene(model_bytes: &'static [u8]) -> (Scene, Calls) {
    let pirate = ServedAdapter { name: name("pirate"), digest: Digest::of(PIRATE) };
    let pinned = ServedModel {
        digest: Some(Digest::of(model_bytes)),
        pinned_adapter: Some(pirate.name.clone()),
        adapters: vec![pirate],
        ..model()
    };
    let config = Config { models: vec![pinned], ..config() };
    let calls = Calls::default();
    let recorded = calls.clone();
    let wrap = |mock| Arc::new(Attaching { mock, calls: recorded }) as Arc<dyn ModelRuntime>;
    let store = |world: &crate::World| {
        let store = ArtifactStore::in_folder(world.folder.path()).expect("a store");
        for bytes in [model_bytes, PIRATE] {
            store.put(bytes, 64 << 20).expect("put");
        }
    };
    let scene = Scene::build(config, MockOptions::default(), store, wrap, |_| Membership::unchecked()).await;
    scene.handle.ready().await.expect("the model loads");
    time::sleep(SECOND / 2).await;
    (scene, calls)
}

#[tokio::test(start_paused = true)]
async fn a_pinned_adapter_is_part_of_the_weights_and_needs_no_attaching() {
    let (scene, calls) = pinned_scene(include_bytes!("../../../../models/tiny.gguf")).await;
    let report = scene.orchestrator.last();
    assert_eq!(report.pinned, report.adapters);
    assert_eq!(report.model_cache[0].adapters, [name("pirate")], "at hand from the start");
    scene.answer_with("pirate").await;
    assert_eq!(calls_of(&calls), [Call::Generate(None)]);
    for other in [request(), with("a")] {
        let refusal = scene.refusal(&other).await;
        assert_eq!(refusal.code, ErrorCode::ModelNotHere, "{refusal}");
    }
    let texts = vec![EmbedInput::Text("x".into())];
    let vectors = Input { embed: Some(texts), prompt: None, ..with("pirate").input };
    let refusal = scene.refusal(&InferRequest { input: vectors, ..request() }).await;
    assert_eq!((refusal.code, refusal.param.as_deref()), (ErrorCode::UnsupportedParameter, Some("adapter")));
}

#[tokio::test(start_paused = true)]
async fn an_adapter_that_the_weights_cannot_hold_stays_beside_them() {
    let (scene, calls) = pinned_scene(include_bytes!("../../../../models/tiny-q4_0.gguf")).await;
    assert_eq!(scene.orchestrator.last().model_cache[0].adapters, []);
    scene.answer_with("pirate").await;
    let added = Call::Add(AdapterId(1), Digest::of(PIRATE).to_string());
    assert_eq!(calls_of(&calls), [added, Call::Generate(Some(AdapterId(1)))]);
    assert_eq!(scene.refusal(&request()).await.code, ErrorCode::ModelNotHere);
}

/// Answers like the mock, and takes adapters.
struct Attaching {
    mock: Arc<MockRuntime>,
    calls: Calls,
}

impl Attaching {
    fn note(&self, call: impl FnOnce(u64) -> Call) {
        let mut calls = self.calls.lock();
        let added = calls.iter().filter(|call| matches!(call, Call::Add(..))).count() as u64;
        let call = call(added + 1);
        calls.push(call);
    }
}

#[async_trait]
impl ModelRuntime for Attaching {
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
        self.mock.load(artifact, options, progress).await
    }

    async fn add_adapter(&self, _model: ModelId, artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        time::sleep(SECOND / 10).await;
        let mut id = AdapterId(0);
        self.note(|number| {
            id = AdapterId(number);
            Call::Add(id, artifact.sha256)
        });
        Ok(id)
    }

    async fn remove_adapter(&self, _model: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        self.note(|_| Call::Remove(adapter));
        Ok(())
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        self.mock.unload(model).await
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        self.note(|_| Call::Generate(request.adapter));
        self.mock.generate(GenerateRequest { adapter: None, ..request }).await
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        self.mock.count_tokens(model, input).await
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        self.mock.load_state()
    }
}

//! A worker with a mock engine, on a network in memory, seen by an orchestrator that only listens.

mod adapters;
mod catalog;
mod jobs;
mod manners;
mod membership;
mod memory;
mod models;
mod offers;
mod progress;
mod reports;
mod servers;
mod several;
mod stopping;
mod walled;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use artifact_store::ArtifactStore;
use bytes::Bytes;
use engine::{MockOptions, MockRuntime, ModelRuntime};
use observability::Exposition;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use protocol::control::{Empty, NodeInfo, NodeRole, PRESENCE_REPORT};
use protocol::health::{HealthReport, ModelState};
use protocol::infer::{InferChunk, InferRequest, Input, START};
use protocol::model::ModelKey;
use protocol::presence::{self, Facts, HighWater, Rejection};
use protocol::signature::{NodeKey, Signed};
use protocol::{Clock, CorrelationId, Digest, PublicKey, Region, Topic, UnixMillis, WireError, codec};
use rpc::{CallError, Client, Membership, MemoryNetwork, ResponseStream, Server, StreamOptions, Transport};
use tempfile::TempDir;
use tether_worker::{BaseWorker, Config, DiskCalls, ServedModel, WorkerHandle, WorkerParts};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const SECOND: Duration = Duration::from_secs(1);
const MODEL_BYTES: &[u8] = b"what the mock takes for a model";

/// A time of day that goes with Tokio's clock.
struct PausedClock {
    begin: Instant,
}

impl Clock for PausedClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(1_700_000_000_000).after(self.begin.elapsed())
    }
}

/// A report as it came to the orchestrator.
#[derive(Debug, Clone)]
struct Received {
    at: Instant,
    report: Result<HealthReport, Rejection>,
}

#[derive(Default)]
struct Inbox {
    received: Vec<Received>,
    high_water: BTreeMap<PublicKey, HighWater>,
}

/// Takes reports as an orchestrator does, and calls the worker.
struct Orchestrator {
    client: Client,
    inbox: Arc<Mutex<Inbox>>,
}

impl Orchestrator {
    async fn join(network: &MemoryNetwork, seed: u8, world: &World) -> Self {
        let transport = network.node(&NodeKey::from_seed(&[seed; 32]));
        let inbox = Arc::new(Mutex::new(Inbox::default()));
        let info = NodeInfo { roles: vec![NodeRole::Orchestrator], region: region(), version: "0".into() };
        let (taking, clock) = (inbox.clone(), world.clock.clone());
        let server = Server::new(transport.clone(), info).unary(PRESENCE_REPORT, move |caller, signed: Signed| {
            let mut inbox = taking.lock();
            let high_water = inbox.high_water.get(&caller.key).copied();
            let facts = Facts {
                remote_key: caller.key,
                regions: &[region()],
                check_worker: &|_| Ok(()),
                high_water,
                now: clock.now(),
            };
            let report = presence::verify(&signed, &facts);
            if let Ok(report) = &report {
                inbox.high_water.insert(caller.key, HighWater { epoch: report.epoch, seq: report.seq });
            }
            inbox.received.push(Received { at: Instant::now(), report });
            async { Ok(Empty {}) }
        });
        world.tasks.spawn(server.run(world.end.clone(), SECOND));
        transport.announce(&Topic::Control(region())).await.expect("announced");
        Self { client: Client::new(transport), inbox }
    }

    fn received(&self) -> Vec<Received> {
        self.inbox.lock().received.clone()
    }

    fn reports(&self) -> Vec<HealthReport> {
        self.received().into_iter().map(|received| received.report.expect("every report is believed")).collect()
    }

    fn last(&self) -> HealthReport {
        self.reports().pop().expect("a report came")
    }
}

/// What outlives a worker.
struct World {
    network: MemoryNetwork,
    clock: Arc<PausedClock>,
    owner: Arc<manners::Owner>,
    tasks: TaskTracker,
    end: CancellationToken,
    folder: TempDir,
}

/// A worker and an orchestrator.
struct Scene {
    world: World,
    orchestrator: Orchestrator,
    runtime: Arc<MockRuntime>,
    metrics: Exposition,
    transport: Arc<dyn Transport>,
    handle: WorkerHandle,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

fn region() -> Region {
    "local".parse().expect("a region")
}

fn model() -> ServedModel {
    let (model_id, version) = ("tether-tiny".parse().expect("a name"), "1.0".parse().expect("a version"));
    ServedModel::new(ModelKey { model_id, version }, Digest::of(MODEL_BYTES))
}

fn key() -> ModelKey {
    model().key()
}

fn config() -> Config {
    Config { models: vec![model()], ..Config::default() }
}

/// An engine slow enough to look at while it works.
fn slow() -> MockOptions {
    MockOptions { per_token: SECOND / 10, tokens: 1_000, ..MockOptions::default() }
}

impl Scene {
    async fn new(config: Config, mock: MockOptions) -> Self {
        Self::build(config, mock, |_| {}, |runtime| runtime, |_| Membership::unchecked()).await
    }

    /// Sets the scene and waits until the worker is ready.
    async fn ready(config: Config, mock: MockOptions) -> Self {
        let scene = Self::new(config, mock).await;
        scene.handle.ready().await.expect("the model loads");
        // The report of the readiness arrives.
        time::sleep(SECOND / 2).await;
        scene
    }

    async fn build(
        config: Config,
        mock: MockOptions,
        prepare: impl FnOnce(&World),
        wrap: impl FnOnce(Arc<MockRuntime>) -> Arc<dyn ModelRuntime>,
        admit: impl FnOnce(&World) -> Membership,
    ) -> Self {
        Self::build_behind(config, mock, prepare, wrap, admit, |transport| transport).await
    }

    /// Sets the scene with something between the worker and the network.
    async fn build_behind(
        config: Config,
        mock: MockOptions,
        prepare: impl FnOnce(&World),
        wrap: impl FnOnce(Arc<MockRuntime>) -> Arc<dyn ModelRuntime>,
        admit: impl FnOnce(&World) -> Membership,
        wall: impl FnOnce(Arc<dyn Transport>) -> Arc<dyn Transport>,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let artifacts = ArtifactStore::in_folder(folder.path()).expect("a store");
        artifacts.put(MODEL_BYTES, 1024).expect("put");
        let world = World {
            network: MemoryNetwork::new(),
            clock: Arc::new(PausedClock { begin: Instant::now() }),
            owner: Arc::default(),
            tasks: TaskTracker::new(),
            end: CancellationToken::new(),
            folder,
        };
        prepare(&world);
        let orchestrator = Orchestrator::join(&world.network, 2, &world).await;
        let runtime = Arc::new(MockRuntime::new(mock));
        let mut registry = Registry::default();
        let metrics = tether_worker::Metrics::register(&mut registry);
        let node_key = NodeKey::from_seed(&[1; 32]);
        let transport = wall(world.network.node(&node_key));
        let parts = WorkerParts {
            transport: transport.clone(),
            key: node_key,
            epoch: 7,
            clock: world.clock.clone(),
            runtime: wrap(runtime.clone()),
            artifacts,
            disk: DiskCalls::on_threads(),
            metrics,
            membership: admit(&world),
            adoption: None,
            version: "0".into(),
        };
        let worker = BaseWorker::new(config, parts).with_surroundings(world.owner.clone());
        let handle = worker.handle();
        let stop = CancellationToken::new();
        let running = world.tasks.spawn(worker.run(stop.clone()));
        let metrics = Exposition::new(registry);
        Self { world, orchestrator, runtime, metrics, transport, handle, stop, running }
    }

    /// Replaces the stored artifact by other bytes.
    fn tamper(world: &World) {
        let digest = model().digest().to_string();
        let path = world.folder.path().join("sha256").join(&digest[..2]).join(&digest);
        fs::remove_file(&path).expect("it was there");
        fs::write(&path, b"what the mock takes for a mode1").expect("written");
    }

    /// Ends the engine's model under the worker, as the death of its process does.
    async fn kill_engine(&self) {
        let id = self.runtime.load_state()[0].model;
        self.runtime.unload(id).await.expect("it was loaded");
    }

    async fn open(&self, request: &InferRequest) -> Result<ResponseStream, CallError> {
        self.open_within(request, None).await
    }

    async fn open_within(&self, request: &InferRequest, wait: Option<Duration>) -> Result<ResponseStream, CallError> {
        let options = StreamOptions { accept_within: SECOND / 2, deadline: wait, stall: SECOND * 60 };
        let body = Bytes::from(codec::encode(request));
        self.orchestrator.client.open_stream(self.handle.worker_id(), START, body, options).await
    }

    async fn refusal(&self, request: &InferRequest) -> WireError {
        match self.open(request).await {
            Err(CallError::Remote(error)) => error,
            other => panic!("a refusal was expected: {other:?}"),
        }
    }

    /// Returns a metric's value, summed over its labels.
    fn metric(&self, name: &str) -> f64 {
        let text = self.metrics.encode();
        let lines = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' ')));
        lines.map(|line| line.rsplit(' ').next().expect("a value").parse::<f64>().expect("a number")).sum()
    }

    async fn is_found_under(&self, topic: &Topic) -> bool {
        self.transport.lookup(topic).await.expect("the network is up").contains(&self.handle.worker_id())
    }
}

fn request() -> InferRequest {
    let job = InferRequest::new(
        "acme".parse().expect("a tenant"),
        key(),
        Input { prompt: Some("one two three".into()), ..Input::default() },
        CorrelationId(uuid(1)),
        "r".parse().expect("a token"),
        protocol::TraceId([1; 16]),
    );
    InferRequest { attempt: 3, ..job }
}

fn of_tenant(tenant: &str) -> InferRequest {
    InferRequest { tenant_id: tenant.parse().expect("a tenant"), ..request() }
}

fn uuid(number: u8) -> uuid::Uuid {
    uuid::Uuid::from_bytes([number; 16])
}

async fn next(stream: &mut ResponseStream) -> Option<Result<InferChunk, CallError>> {
    let message = stream.next().await?;
    Some(message.map(|bytes| codec::decode(&bytes).expect("a chunk")))
}

/// Reads to the end: the chunks, and the error if there was one.
async fn read(mut stream: ResponseStream) -> (Vec<InferChunk>, Option<CallError>) {
    let mut chunks = Vec::new();
    loop {
        match next(&mut stream).await {
            Some(Ok(chunk)) => chunks.push(chunk),
            Some(Err(error)) => return (chunks, Some(error)),
            None => return (chunks, None),
        }
    }
}

fn text(chunks: &[InferChunk]) -> String {
    chunks.iter().map(|chunk| chunk.payload.text.as_str()).collect()
}

fn states(report: &HealthReport) -> Vec<ModelState> {
    report.model_cache.iter().map(|model| model.state).collect()
}

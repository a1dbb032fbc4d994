//! Tests when workers become routable and when they expire, with paused time.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures_util::FutureExt as _;
use metadata_store::SqliteStore;
use observability::Exposition;
use observability::metrics::register_shed;
use prometheus_client::registry::Registry;
use protocol::control::{Empty, NodeInfo, NodeRole, PRESENCE_DESCRIBE};
use protocol::health::{self, CachedModel, Capacity, EXPIRY, HEARTBEAT, HealthReport, ModelState};
use protocol::model::ModelKey;
use protocol::prefix::PrefixChain;
use protocol::signature::NodeKey;
use protocol::{Digest, Topic, UnixMillis, WireError, codec};
use rpc::{Client, Membership, MemoryNetwork, Server, StreamCall, StreamOptions, Transport};
use tokio_util::task::TaskTracker;

use super::search::Search;
use super::*;
use crate::fleet::Wanted;
use crate::scheduler::Refusal;

const SECOND: Duration = Duration::from_secs(1);

/// A wall clock that follows Tokio's clock.
struct PausedClock(Instant);

impl Clock for PausedClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(1_700_000_000_000).after(self.0.elapsed())
    }
}

struct Scene {
    network: MemoryNetwork,
    clock: Arc<PausedClock>,
    fleet: Arc<Fleet>,
    discovery: Arc<DiscoverySub>,
    search: Arc<Search>,
    client: Client,
    metrics: Metrics,
    exposition: Exposition,
    tasks: TaskTracker,
    stop: CancellationToken,
}

fn region() -> Region {
    "local".parse().expect("region")
}

fn model() -> ModelKey {
    ModelKey { model_id: "m".parse().expect("name"), version: "1.0".parse().expect("version") }
}

fn presence() -> Topic {
    Topic::Presence(region())
}

impl Scene {
    /// Sets up an orchestrator's discovery.
    fn new() -> Self {
        let network = MemoryNetwork::new();
        let clock = Arc::new(PausedClock(Instant::now()));
        let fleet = Arc::new(Fleet::new(region(), vec![]));
        let mut registry = Registry::default();
        let shed = register_shed(&mut registry);
        let metrics = Metrics::register(&mut registry, shed);
        let store = Arc::new(SqliteStore::in_memory().expect("a store"));
        let regions = vec![region()];
        let discovery = DiscoverySub::new(
            fleet.clone(),
            regions.clone(),
            clock.clone(),
            store,
            metrics.clone(),
            Membership::unchecked(),
            vec![],
        );
        let node = network.node(&NodeKey::from_seed(&[200; 32]));
        let client = Client::new(node.clone());
        let search = Arc::new(Search::new(node, client.clone(), fleet.clone(), regions));
        let (discovery, tasks, stop) = (Arc::new(discovery), TaskTracker::new(), CancellationToken::new());
        let taking = discovery.clone();
        let take = move |key, signed: &Signed| taking.take(key, signed).is_ok();
        tasks.spawn(search.clone().run(stop.clone(), take));
        let exposition = Exposition::new(registry);
        Self { network, clock, fleet, discovery, search, client, metrics, exposition, tasks, stop }
    }

    /// Adds a node that announces a topic and returns a report when asked.
    async fn worker(&self, seed: u8, topic: &Topic, change: fn(&mut HealthReport)) -> Worker {
        let key = NodeKey::from_seed(&[seed; 32]);
        let node = self.network.node(&key);
        let (seq, requests) = (Arc::<AtomicU64>::default(), Arc::<AtomicUsize>::default());
        let worker = Worker { key, node: node.clone(), clock: self.clock.clone(), seq, requests, change };
        let answering = worker.clone();
        let server = Server::new(node.clone(), info()).unary(PRESENCE_DESCRIBE, move |_, _: Empty| {
            answering.requests.fetch_add(1, Ordering::SeqCst);
            let signed = answering.sign();
            async { Ok(signed) }
        });
        let server = server.stream("run", |call: StreamCall| async {
            if let Ok(mut reply) = call.accept().await {
                reply.cancelled().await;
            }
        });
        self.tasks.spawn(server.run(self.stop.clone(), SECOND));
        node.announce(topic).await.expect("announced");
        worker
    }

    fn routable(&self) -> usize {
        self.barred().iter().filter(|barred| barred.is_none()).count()
    }

    /// Why each worker gets no job.
    fn barred(&self) -> Vec<Option<Refusal>> {
        let wanted = Wanted {
            model: &model(),
            digest: None,
            adapter: None,
            prefix: &PrefixChain::NONE,
            short_context: 0,
            continuation: None,
            regions: None,
        };
        self.fleet.with_candidates(&[wanted], Instant::now(), |found| found.map(|found| found.barred).collect())
    }
}

#[derive(Clone)]
struct Worker {
    key: NodeKey,
    node: Arc<dyn Transport>,
    clock: Arc<PausedClock>,
    seq: Arc<AtomicU64>,
    requests: Arc<AtomicUsize>,
    change: fn(&mut HealthReport),
}

fn info() -> NodeInfo {
    NodeInfo { roles: vec![NodeRole::Worker], region: region(), version: "0".into() }
}

impl Worker {
    fn sign(&self) -> Signed {
        let (id, now) = (self.key.public_key(), self.clock.now());
        let cached = CachedModel::new(model(), Digest([0; 32]), ModelState::Ready);
        let mut report = HealthReport {
            v: 1,
            worker_id: id,
            pub_key: id,
            region: region(),
            gpu_class: "cpu".into(),
            vram_gb: 0,
            accelerators: vec![],
            capacity: Capacity { slots: 1, running: 0, waiting: 0, queue_max: 1 },
            supported: vec![model()],
            to_fetch: vec![],
            adapters: vec![],
            pinned: vec![],
            model_cache: vec![cached],
            latency_hops: 0,
            draining: false,
            activity: protocol::health::Activity::Accepting,
            continues: true,
            epoch: 1,
            seq: self.seq.fetch_add(1, Ordering::SeqCst),
            issued_at: now,
            not_after: now.after(EXPIRY),
        };
        (self.change)(&mut report);
        self.key.sign(health::KIND, String::from_utf8(codec::encode(&report)).expect("JSON"))
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_does_not_report_is_found_and_asked_within_two_seconds() {
    let scene = Scene::new();
    time::sleep(SECOND / 2).await;
    let worker = scene.worker(1, &presence(), |_| {}).await;
    time::sleep(SECOND * 2).await;
    assert_eq!((scene.routable(), worker.requests()), (1, 1));
    // It never reports, but it is asked whenever it has been silent for too long, so it stays in the fleet.
    for _ in 0..60 {
        time::sleep(SECOND).await;
        assert_eq!(scene.routable(), 1);
    }
    assert!((6..=9).contains(&worker.requests()), "asked {} times in a minute", worker.requests());
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_reports_is_not_asked() {
    let scene = Scene::new();
    let worker = scene.worker(1, &presence(), |_| {}).await;
    for _ in 0..12 {
        scene.discovery.take(worker.key.public_key(), &worker.sign()).expect("believed");
        time::sleep(HEARTBEAT).await;
    }
    assert!(worker.requests() <= 1, "asked {} times", worker.requests());
}

#[tokio::test(start_paused = true)]
async fn a_worker_is_found_under_the_topics_of_the_models_that_others_serve() {
    let scene = Scene::new();
    let key = model();
    let _known = scene.worker(1, &presence(), |_| {}).await;
    let _other = scene.worker(2, &Topic::Model(key.model_id, key.version, region()), |_| {}).await;
    time::sleep(SECOND * 12).await;
    assert_eq!(scene.routable(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_silent_worker_is_gone_after_fifteen_seconds_and_a_leaving_one_at_once() {
    let scene = Scene::new();
    let worker = scene.worker(1, &presence(), |_| {}).await;
    scene.discovery.take(worker.key.public_key(), &worker.sign()).expect("believed");
    assert_eq!(scene.routable(), 1, "routable with its first report");
    scene.network.cut(worker.key.public_key());
    time::sleep(SECOND / 100 * 1499).await;
    assert_eq!(scene.routable(), 1);
    time::sleep(SECOND / 100).await;
    assert_eq!((scene.routable(), scene.fleet.list(Instant::now()).len()), (0, 0));
    scene.discovery.sweep(Instant::now());
    assert_eq!(scene.fleet.len(), 0);

    let leaving = scene.worker(2, &Topic::Control(region()), |report| report.draining = report.seq > 0).await;
    scene.discovery.take(leaving.key.public_key(), &leaving.sign()).expect("believed");
    assert_eq!(scene.routable(), 1);
    scene.discovery.take(leaving.key.public_key(), &leaving.sign()).expect("believed");
    assert_eq!((scene.routable(), scene.fleet.len()), (0, 0));
    assert_eq!(scene.metrics.workers_live.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_worker_whose_clock_is_off_keeps_its_jobs_and_gets_no_new_one_for_a_named_reason() {
    let scene = Scene::new();
    let late = |report: &mut HealthReport| {
        if report.seq > 0 {
            (report.issued_at, report.not_after) = (UnixMillis(0), UnixMillis(0).after(EXPIRY));
        }
    };
    let worker = scene.worker(1, &presence(), late).await;
    time::sleep(SECOND * 3).await;
    assert_eq!(scene.routable(), 1);
    let key = worker.key.public_key();
    let minute = StreamOptions { accept_within: SECOND, deadline: None, stall: SECOND * 60 };
    let mut job = scene.client.open_stream(key, "run", bytes::Bytes::new(), minute).await.expect("accepted");
    for _ in 0..12 {
        time::sleep(HEARTBEAT).await;
        let rejected = scene.discovery.take(key, &worker.sign());
        assert_eq!(rejected, Err(Rejection::Skew));
        scene.discovery.sweep(Instant::now());
    }
    assert!(job.next().now_or_never().is_none(), "the job runs on");
    assert_eq!(scene.barred(), [Some(Refusal::ClockSkew)]);
    scene.network.cut(key);
    time::sleep(EXPIRY).await;
    scene.discovery.sweep(Instant::now());
    assert_eq!(scene.fleet.len(), 0, "it is gone, whatever its clock says");
}

#[tokio::test(start_paused = true)]
async fn strangers_under_a_workers_topic_are_asked_rarely_and_hold_nobody_up() {
    let scene = Scene::new();
    let mut strangers = vec![];
    for seed in 20..80 {
        // The first half answers with another node's report, the second half is cut off and never answers.
        let change = |report: &mut HealthReport| report.worker_id = PublicKey([9; 32]);
        strangers.push(scene.worker(seed, &presence(), change).await);
        if seed >= 50 {
            scene.network.cut(NodeKey::from_seed(&[seed; 32]).public_key());
        }
    }
    let deaf = scene.network.node(&NodeKey::from_seed(&[90; 32]));
    deaf.announce(&presence()).await.expect("announced");
    let _worker = scene.worker(1, &presence(), |_| {}).await;
    time::sleep(SECOND * 10).await;
    assert_eq!(scene.routable(), 1);
    time::sleep(SECOND * 590).await;
    let requests: usize = strangers.iter().map(Worker::requests).sum();
    assert!((30..=30 * 14).contains(&requests), "asked {requests} times in ten minutes");
    let unbound = format!("tether_presence_rejected_total{{reason=\"unbound\"}} {requests}");
    assert!(scene.exposition.encode().contains(&unbound), "{unbound}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_refuses_is_no_worker_until_it_reports_by_itself() {
    let scene = Scene::new();
    let key = NodeKey::from_seed(&[1; 32]);
    let node = scene.network.node(&key);
    let server = Server::new(node.clone(), info()).unary(PRESENCE_DESCRIBE, |_, _: Empty| async {
        Err::<Empty, _>(WireError::new(protocol::ErrorCode::NotEnrolled, "not for you"))
    });
    scene.tasks.spawn(server.run(scene.stop.clone(), SECOND));
    node.announce(&presence()).await.expect("announced");
    time::sleep(SECOND * 30).await;
    assert_eq!(scene.routable(), 0);
    let worker =
        Worker { key, node, clock: scene.clock.clone(), seq: Arc::default(), requests: Arc::default(), change: |_| {} };
    scene.discovery.take(worker.key.public_key(), &worker.sign()).expect("believed");
    scene.search.greet(worker.node.public_key());
    assert_eq!(scene.routable(), 1);
}

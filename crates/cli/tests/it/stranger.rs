//! A node without a certificate, that says of itself whatever helps to be given work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use protocol::control::{
    Empty, Fleet, NodeInfo, NodeRole, POOL_STATE, PRESENCE_DESCRIBE, PRESENCE_REPORT, PoolState, PoolStateRequest,
};
use protocol::health::{self, CachedModel, Capacity, HealthReport, ModelState};
use protocol::infer::{InferRequest, START, SUBMIT};
use protocol::model::ModelKey;
use protocol::signature::{NodeKey, Signed};
use protocol::{Clock as _, CorrelationId, ErrorCode, PublicKey, Topic, WireError, codec};
use rpc::transport::hyperswarm::{HyperswarmTransport, KnownPeers, Options};
use rpc::{CallError, Client, Server, StreamOptions, SystemClock, Transport as _};
use tether_cli::tiny_model;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::mesh::{LOOPBACK, Mesh, until};

const TIMEOUT: Duration = Duration::from_secs(10);

/// A node without a certificate: worker, orchestrator, gateway and registry by its own account.
pub(crate) struct Stranger {
    key: NodeKey,
    network: Arc<HyperswarmTransport>,
    seen: Arc<Seen>,
    tasks: TaskTracker,
    end: CancellationToken,
}

/// What others wanted of it.
#[derive(Default)]
struct Seen {
    /// How it is.
    requests: AtomicUsize,
    /// Jobs and reports.
    accepted: AtomicUsize,
    seq: AtomicU64,
}

impl Stranger {
    /// Puts it on the network, under the topics of workers and of the services.
    pub(crate) async fn start(mesh: &Mesh) -> Self {
        let key = NodeKey::from_seed(&[77; 32]);
        let options = Options {
            listen: LOOPBACK.parse().expect("an address"),
            bootstrap: mesh.pool.bootstrap.iter().map(|text| text.parse().expect("an address")).collect(),
            known: KnownPeers::default(),
            public_address: None,
            is_client: false,
        };
        let network = HyperswarmTransport::start(options, &key).await.expect("on the network");
        let (seen, tasks, end) = (Arc::<Seen>::default(), TaskTracker::new(), CancellationToken::new());
        let roles = vec![NodeRole::Worker, NodeRole::Orchestrator, NodeRole::Gateway, NodeRole::Registry];
        let info = NodeInfo { roles, region: region(), version: "0".to_owned() };
        let [asked, reported, started, submitted] = std::array::from_fn(|_| seen.clone());
        let signer = key.clone();
        let server = Server::new(network.clone(), info)
            .unary(PRESENCE_DESCRIBE, move |_, _: Empty| {
                asked.requests.fetch_add(1, Ordering::Relaxed);
                let signed = asked.report(&signer);
                async move { Ok(signed) }
            })
            .unary(PRESENCE_REPORT, move |_, _: Signed| {
                reported.accepted.fetch_add(1, Ordering::Relaxed);
                async { Ok(Empty {}) }
            })
            .unary(POOL_STATE, |_, request: PoolStateRequest| async move {
                Ok(PoolState { version: request.version, revocations: None, stamp: None })
            })
            .stream(START, move |call| started.take(call))
            .stream(SUBMIT, move |call| submitted.take(call));
        tasks.spawn(server.run(end.clone(), Duration::ZERO));
        for topic in [Topic::Presence(region()), Topic::Control(region())] {
            network.announce(&topic).await.expect("announced");
        }
        Self { key, network, seen, tasks, end }
    }

    /// Waits until somebody found it and asked how it is.
    pub(crate) async fn until_requested(&self) {
        until("an orchestrator asks the stranger how it is", || self.seen.requests.load(Ordering::Relaxed) > 0).await;
    }

    /// Jobs and reports it was given.
    pub(crate) fn accepted(&self) -> usize {
        self.seen.accepted.load(Ordering::Relaxed)
    }

    /// Asks for what only members get, and returns how it was refused.
    pub(crate) async fn refusals(&self, worker: PublicKey, orchestrator: PublicKey) -> Vec<(&'static str, String)> {
        let client = Client::new(self.network.clone());
        let report = self.seen.report(&self.key);
        let job = Bytes::from(codec::encode(&job()));
        let options = StreamOptions { accept_within: TIMEOUT, deadline: None, stall: TIMEOUT };
        let started = client.open_stream(worker, START, job.clone(), options).await;
        let submitted = client.open_stream(orchestrator, SUBMIT, job, options).await;
        let listed = client.call::<_, Fleet>(orchestrator, protocol::control::FLEET_LIST, &Empty {}, TIMEOUT).await;
        let reported = client.call::<_, Empty>(orchestrator, PRESENCE_REPORT, &report, TIMEOUT).await;
        let described = client.call::<_, Signed>(worker, PRESENCE_DESCRIBE, &Empty {}, TIMEOUT).await;
        vec![
            ("a job for a worker", refusal(started)),
            ("a job for an orchestrator", refusal(submitted)),
            ("the list of workers", refusal(listed)),
            ("a report", refusal(reported)),
            ("how a worker is", refusal(described)),
        ]
    }

    /// Takes it off the network.
    pub(crate) async fn stop(self) {
        self.end.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.network.stop().await;
    }
}

impl Seen {
    /// Signs a report of a worker whom any job would suit.
    fn report(&self, key: &NodeKey) -> Signed {
        let (worker_id, issued_at) = (key.public_key(), SystemClock.now());
        let report = HealthReport {
            v: 1,
            worker_id,
            pub_key: worker_id,
            region: region(),
            gpu_class: "cpu".into(),
            vram_gb: 0,
            accelerators: vec![],
            capacity: Capacity { slots: 64, running: 0, waiting: 0, queue_max: 64 },
            supported: vec![model()],
            to_fetch: vec![],
            adapters: vec![],
            pinned: vec![],
            model_cache: vec![CachedModel {
                tokens_per_second: 1e6,
                ..CachedModel::new(model(), tiny_model::digest(), ModelState::Ready)
            }],
            latency_hops: 0,
            draining: false,
            activity: protocol::health::Activity::Accepting,
            continues: true,
            epoch: 1,
            seq: self.seq.fetch_add(1, Ordering::Relaxed) + 1,
            issued_at,
            not_after: issued_at.after(health::EXPIRY),
        };
        key.sign(health::KIND, String::from_utf8(codec::encode(&report)).expect("JSON"))
    }

    fn take(self: &Arc<Self>, call: rpc::StreamCall) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        async move { call.refuse(WireError::new(ErrorCode::WorkerFull, "no")).await }
    }
}

fn region() -> protocol::Region {
    "local".parse().expect("a region")
}

fn model() -> ModelKey {
    tiny_model::key()
}

fn job() -> InferRequest {
    let input = protocol::infer::Input { prompt: Some("Hello".to_owned()), ..Default::default() };
    InferRequest::new(
        "default".parse().expect("a tenant"),
        model(),
        input,
        CorrelationId(uuid::Uuid::from_bytes([9; 16])),
        "stranger".parse().expect("a token"),
        protocol::TraceId([9; 16]),
    )
}

fn refusal<T>(outcome: Result<T, CallError>) -> String {
    match outcome {
        Ok(_) => "nothing was refused".to_owned(),
        Err(CallError::Remote(error)) => error.code.as_str().to_owned(),
        Err(error) => error.to_string(),
    }
}

//! Every service of a network on its own node, brought in by invites, on a memory network and in paused time: a
//! registry, an orchestrator, workers with a mock engine, and a client of a gateway's node.

use std::sync::Arc;
use std::time::Duration;

use artifact_store::ArtifactStore;
use engine::{MockOptions, MockRuntime};
use gateway::{Gateway, GatewayParts};
use metadata_store::{RegistryStore, SqliteStore};
use orchestrator::scheduler::affinity::Weights;
use orchestrator::{Orchestrator, OrchestratorParts};
use protocol::control::{
    Decision, Empty, ExplainRequest, FLEET_LIST, Fleet, InviteCreate, JOB_EXPLAIN, NODE_REVOKE, NodeRevoke,
    NodeRevoked, NodeRole, Scope, TokenCreate,
};
use protocol::infer::{InferChunk, InferRequest, Input, SUBMIT};
use protocol::membership::transcript::VERSIONS;
use protocol::membership::{Invite, Versions};
use protocol::model::ModelKey;
use protocol::signature::NodeKey;
use protocol::{Clock, CorrelationId, Digest, PublicKey, Region, Topic, UnixMillis, codec};
use registry::{CertificateAuthority, CertificateAuthorityParts, Pepper, Registry, RegistryParts, TokenIssuer};
use rpc::{
    CallError, Client, Directory, Enrolment, Membership, MembershipTask, MemoryNetwork, ResponseStream, StreamOptions,
};
use tempfile::TempDir;
use tether_cli::metrics::Metrics;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use worker::{BaseWorker, DiskCalls, ServedModel, WorkerParts};

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const HOUR: Duration = Duration::from_hours(1);
const MODEL_BYTES: &[u8] = b"what the mock takes for a model";
const PEPPER: Pepper = Pepper([9; 32]);

/// A time of day that goes with Tokio's clock.
struct PausedClock(Instant);

impl Clock for PausedClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(1_700_000_000_000).after(self.0.elapsed())
    }
}

/// A network with a registry, an orchestrator, two workers and a client of a gateway's node.
pub(crate) struct Network {
    pub(crate) memory: MemoryNetwork,
    clock: Arc<dyn Clock>,
    store: Arc<dyn RegistryStore>,
    authority: CertificateAuthority,
    pub(crate) registry: PublicKey,
    pub(crate) orchestrator: PublicKey,
    pub(crate) workers: Vec<PublicKey>,
    gateway: Client,
    tasks: TaskTracker,
    folder: TempDir,
    versions: fn(NodeRole) -> Versions,
}

pub(crate) fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed(&[seed; 32])
}

pub(crate) fn region() -> Region {
    "local".parse().expect("region")
}

pub(crate) fn model() -> ServedModel {
    let (model_id, version) = ("tether-tiny".parse().expect("name"), "1.0".parse().expect("version"));
    ServedModel::new(ModelKey { model_id, version }, Digest::of(MODEL_BYTES))
}

/// Returns a job of a tenant, named by a number.
pub(crate) fn job(number: u128, input: Input) -> InferRequest {
    InferRequest::new(
        "acme".parse().expect("tenant"),
        model().key().clone(),
        input,
        CorrelationId(uuid::Uuid::from_u128(number)),
        "r".parse().expect("token"),
        protocol::TraceId([1; 16]),
    )
}

impl Network {
    pub(crate) async fn start(certificate_life: Duration) -> Self {
        Self::start_with(certificate_life, MockOptions::default()).await
    }

    /// Starts a network whose engines behave so.
    pub(crate) async fn start_with(certificate_life: Duration, mock: MockOptions) -> Self {
        Self::start_speaking(certificate_life, mock, |_| VERSIONS).await
    }

    /// Starts a network whose orchestrator, gateway and workers speak versions of the protocol by their role. The
    /// registry speaks those of this program.
    pub(crate) async fn start_speaking(
        certificate_life: Duration,
        mock: MockOptions,
        versions: fn(NodeRole) -> Versions,
    ) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(PausedClock(Instant::now()));
        let store: Arc<dyn RegistryStore> = Arc::new(SqliteStore::in_memory().expect("a store"));
        let (memory, tasks) = (MemoryNetwork::new(), TaskTracker::new());
        let registry = key(1).public_key();
        let parts = CertificateAuthorityParts::new(key(100), store.clone(), clock.clone(), PEPPER, registry);
        let authority = CertificateAuthority::new(CertificateAuthorityParts { certificate_life, ..parts });
        let parts = RegistryParts {
            transport: memory.node(&key(1)),
            region: region(),
            clock: clock.clone(),
            store: store.clone(),
            artifacts: None,
            pepper: PEPPER,
            authority: authority.clone(),
            version: "0".into(),
        };
        tasks.spawn(async move { Registry::run(parts, CancellationToken::new()).await.expect("runs") });
        let gateway = Client::new(memory.node(&key(3)));
        let (orchestrator, folder) = (key(2).public_key(), tempfile::tempdir().expect("a folder"));
        let mut network = Self {
            memory,
            clock,
            store,
            authority,
            registry,
            orchestrator,
            workers: vec![],
            gateway,
            tasks,
            folder,
            versions,
        };
        network.add_orchestrator().await;
        let as_gateway = network.join(3, NodeRole::Gateway).await;
        let node = network.memory.node(&key(3));
        network.gateway = Client::new(node.clone()).with_membership(as_gateway);
        let (directory, directory_task) = Directory::new(node, network.gateway.clone(), Topic::Control(region()));
        network.tasks.spawn(directory_task.run(CancellationToken::new()));
        let keeping_up = MembershipTask::new(network.gateway.clone(), directory);
        network.tasks.spawn(keeping_up.run(CancellationToken::new()));
        for seed in [10, 11] {
            let membership = network.join(seed, NodeRole::Worker).await;
            network.add_worker(seed, membership, mock.clone());
        }
        network
    }

    /// Has an operator invite a node, and the node join.
    async fn join(&self, seed: u8, role: NodeRole) -> Membership {
        let request = InviteCreate {
            token: String::new(),
            roles: vec![role],
            regions: vec![region()],
            models: vec![],
            name: format!("node {seed}"),
            valid_secs: None,
            bootstrap: vec![],
        };
        let invite: Invite = self.authority.invite(request).await.expect("made").invite.parse().expect("well formed");
        let newcomer = Client::new(self.memory.node(&key(seed)));
        let enrolment = Enrolment::redeem(&newcomer, &invite, "", &*self.clock).await.expect("joined");
        let path = self.folder.path().join(format!("{seed}.json"));
        enrolment.save(&path).expect("kept");
        let membership = enrolment.membership(&path, key(seed).public_key(), self.clock.clone()).expect("good");
        membership.speaking((self.versions)(role))
    }

    async fn add_orchestrator(&self) {
        let membership = self.join(2, NodeRole::Orchestrator).await;
        let parts = OrchestratorParts {
            transport: self.memory.node(&key(2)),
            region: region(),
            clock: self.clock.clone(),
            store: Arc::new(SqliteStore::in_memory().expect("a store")),
            metrics: Metrics::new().orchestrator,
            membership,
            sealing_key: orchestrator::SealingKey([7; 32]),
            version: "0".into(),
        };
        // The engines are equal: what was measured of them does not count.
        let weights = Weights { speed: 0.0, ..Weights::default() };
        let config = orchestrator::Config { weights, ..orchestrator::Config::default() };
        self.tasks.spawn(async move {
            Orchestrator::run(config, parts, CancellationToken::new()).await.expect("runs");
        });
    }

    fn add_worker(&mut self, seed: u8, membership: Membership, mock: MockOptions) {
        let artifacts = ArtifactStore::in_folder(self.folder.path().join(seed.to_string())).expect("a store");
        artifacts.put(MODEL_BYTES, 1024).expect("put");
        let parts = WorkerParts {
            transport: self.memory.node(&key(seed)),
            key: key(seed),
            epoch: 1,
            clock: self.clock.clone(),
            runtime: Arc::new(MockRuntime::new(mock)),
            artifacts,
            disk: DiskCalls::on_threads(),
            metrics: Metrics::new().worker,
            membership,
            adoption: None,
            version: "0".into(),
        };
        let worker = BaseWorker::new(worker::Config { models: vec![model()], ..worker::Config::default() }, parts);
        self.workers.push(key(seed).public_key());
        self.tasks.spawn(worker.run(CancellationToken::new()));
    }

    /// Starts a gateway, to be asked without HTTP.
    pub(crate) async fn add_gateway(&self, seed: u8) -> Gateway {
        let membership = self.join(seed, NodeRole::Gateway).await;
        let metrics = Metrics::new();
        let parts = GatewayParts {
            transport: self.memory.node(&key(seed)),
            clock: self.clock.clone(),
            metrics: metrics.gateway,
            exposition: metrics.exposition,
            membership,
            folder_secret: None,
            api_key_file: None,
            version: "0".into(),
        };
        let config = gateway::Config { bind: ([127, 0, 0, 1], 0).into(), ..gateway::Config::default() };
        let gateway = Gateway::new(config, parts);
        let running = gateway.clone();
        self.tasks.spawn(async move { running.run(CancellationToken::new()).await.expect("runs") });
        gateway
    }

    /// Puts a new registry on the network in the place of the one that was cut off.
    pub(crate) fn restart_registry(&self) {
        let parts = RegistryParts {
            transport: self.memory.node(&key(1)),
            region: region(),
            clock: self.clock.clone(),
            store: self.store.clone(),
            artifacts: None,
            pepper: PEPPER,
            authority: self.authority.clone(),
            version: "0".into(),
        };
        self.tasks.spawn(async move { Registry::run(parts, CancellationToken::new()).await.expect("runs") });
    }

    /// Returns what issues and revokes API keys.
    pub(crate) fn tokens(&self) -> TokenIssuer {
        TokenIssuer::new(self.store.clone(), self.clock.clone(), PEPPER)
    }

    pub(crate) async fn fleet(&self) -> Vec<PublicKey> {
        let listed = self.gateway.call::<_, Fleet>(self.orchestrator, FLEET_LIST, &Empty {}, SECOND * 5).await;
        listed.expect("a gateway may ask").workers.into_iter().map(|worker| worker.report.worker_id).collect()
    }

    /// Submits a job as the gateway and reads its answer; returns how many chunks came.
    pub(crate) async fn answer(&self, number: u128) -> Result<usize, CallError> {
        let prompt = Input { prompt: Some("one two three".into()), ..Input::default() };
        Ok(self.chunks(&job(number, prompt)).await?.len())
    }

    /// Submits a job as the gateway and reads its answer.
    pub(crate) async fn chunks(&self, request: &InferRequest) -> Result<Vec<InferChunk>, CallError> {
        let mut stream = self.open(request).await?;
        let mut chunks = vec![];
        while let Some(chunk) = stream.next().await {
            chunks.push(codec::decode(&chunk?).expect("a chunk"));
        }
        Ok(chunks)
    }

    /// Submits a job as the gateway and leaves its answer to be read.
    pub(crate) async fn open(&self, request: &InferRequest) -> Result<ResponseStream, CallError> {
        let options = StreamOptions { accept_within: SECOND * 10, deadline: None, stall: SECOND * 10 };
        self.gateway.open_stream(self.orchestrator, SUBMIT, codec::encode(request).into(), options).await
    }

    /// Returns how a job was placed.
    pub(crate) async fn explain(&self, request: &InferRequest) -> Decision {
        let asked = ExplainRequest { correlation_id: request.correlation_id };
        let decision = self.gateway.call(self.orchestrator, JOB_EXPLAIN, &asked, SECOND * 5).await;
        decision.expect("a gateway may ask")
    }

    pub(crate) async fn revoke(&self, node: PublicKey) {
        let new = TokenCreate {
            tenant_id: "ops".parse().expect("tenant"),
            name: String::new(),
            scopes: vec![Scope::Admin],
            expires_at: None,
            requests_per_minute: None,
        };
        let token = self.tokens().issue(new).await.expect("issued").token;
        let request = NodeRevoke { token, public_key: node };
        // From a node that is nobody: the operator's token counts.
        let laptop = Client::new(self.memory.node(&key(99)));
        let revoked = laptop.call::<_, NodeRevoked>(self.registry, NODE_REVOKE, &request, SECOND * 5).await;
        assert!(revoked.expect("revoked").found);
    }
}

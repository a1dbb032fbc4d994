//! Every service of a network on its own node, brought in by invites, on a memory network and in paused time.

use std::sync::Arc;
use std::time::Duration;

use artifact_store::ArtifactStore;
use engine::{MockOptions, MockRuntime};
use metadata_store::{MetadataStore, SqliteStore};
use observability::Metrics;
use orchestrator::{Orchestrator, OrchestratorParts};
use protocol::admission::{CERTIFICATE_LIFE, Invite};
use protocol::control::{
    Empty, FLEET_LIST, Fleet, InviteCreate, NODE_REVOKE, NodeRevoke, NodeRevoked, NodeRole, Scope, TokenCreate,
};
use protocol::infer::{InferRequest, Input, SUBMIT};
use protocol::signature::NodeKey;
use protocol::{Clock, CorrelationId, Digest, PublicKey, Region, Topic, UnixMillis, codec};
use registry::{AdmissionOffice, AdmissionParts, Pepper, Registry, RegistryParts, TokenOffice};
use rpc::{CallError, Client, Directory, Enrolment, Membership, MembershipTask, MemoryNetwork, StreamOptions};
use tempfile::TempDir;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use worker::{BaseWorker, ServedModel, WorkerParts};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);
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
struct Network {
    memory: MemoryNetwork,
    clock: Arc<dyn Clock>,
    store: Arc<dyn MetadataStore>,
    office: AdmissionOffice,
    registry: PublicKey,
    orchestrator: PublicKey,
    workers: Vec<PublicKey>,
    gateway: Client,
    tasks: TaskTracker,
    folder: TempDir,
}

fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed(&[seed; 32])
}

fn region() -> Region {
    "local".parse().expect("region")
}

fn model() -> ServedModel {
    ServedModel {
        model_id: "tether-tiny".parse().expect("name"),
        version: "1.0".parse().expect("version"),
        digest: Digest::of(MODEL_BYTES),
        context_length: 0,
        threads: 0,
        gpu_layers: 0,
    }
}

impl Network {
    async fn start(certificate_life: Duration) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(PausedClock(Instant::now()));
        let store: Arc<dyn MetadataStore> = Arc::new(SqliteStore::in_memory().expect("a store"));
        let (memory, tasks) = (MemoryNetwork::new(), TaskTracker::new());
        let registry = key(1).public_key();
        let parts = AdmissionParts::new(key(100), store.clone(), clock.clone(), PEPPER, registry);
        let office = AdmissionOffice::new(AdmissionParts { certificate_life, ..parts });
        let parts = RegistryParts {
            transport: memory.node(&key(1)),
            region: region(),
            clock: clock.clone(),
            store: store.clone(),
            pepper: PEPPER,
            admission: office.clone(),
            version: "0".into(),
        };
        tasks.spawn(async move { Registry::run(parts, CancellationToken::new()).await.expect("runs") });
        let gateway = Client::new(memory.node(&key(3)));
        let (orchestrator, folder) = (key(2).public_key(), tempfile::tempdir().expect("a folder"));
        let mut network =
            Self { memory, clock, store, office, registry, orchestrator, workers: vec![], gateway, tasks, folder };
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
            network.add_worker(seed, membership);
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
        let invite: Invite = self.office.invite(request).await.expect("made").invite.parse().expect("well formed");
        let newcomer = Client::new(self.memory.node(&key(seed)));
        let enrolment = Enrolment::redeem(&newcomer, &invite, "", &*self.clock).await.expect("joined");
        let path = self.folder.path().join(format!("{seed}.json"));
        enrolment.save(&path).expect("kept");
        enrolment.membership(&path, key(seed).public_key(), self.clock.clone()).expect("good")
    }

    async fn add_orchestrator(&self) {
        let membership = self.join(2, NodeRole::Orchestrator).await;
        let parts = OrchestratorParts {
            transport: self.memory.node(&key(2)),
            region: region(),
            clock: self.clock.clone(),
            store: Arc::new(SqliteStore::in_memory().expect("a store")),
            metrics: Metrics::new(),
            membership,
            version: "0".into(),
        };
        // Rules that were known once stand while the registry is away.
        let config = orchestrator::Config { policy_cache_secs: 1_000_000, ..orchestrator::Config::default() };
        self.tasks.spawn(async move {
            Orchestrator::run(config, parts, CancellationToken::new()).await.expect("runs");
        });
    }

    fn add_worker(&mut self, seed: u8, membership: Membership) {
        let artifacts = ArtifactStore::in_folder(self.folder.path().join(seed.to_string())).expect("a store");
        artifacts.put(MODEL_BYTES, 1024).expect("put");
        let parts = WorkerParts {
            transport: self.memory.node(&key(seed)),
            key: key(seed),
            epoch: 1,
            clock: self.clock.clone(),
            runtime: Arc::new(MockRuntime::new(MockOptions::default())),
            artifacts,
            metrics: Metrics::new(),
            membership,
            version: "0".into(),
        };
        let worker = BaseWorker::new(worker::Config { models: vec![model()], ..worker::Config::default() }, parts);
        self.workers.push(key(seed).public_key());
        self.tasks.spawn(worker.run(CancellationToken::new()));
    }

    async fn fleet(&self) -> Vec<PublicKey> {
        let listed = self.gateway.call::<_, Fleet>(self.orchestrator, FLEET_LIST, &Empty {}, SECOND * 5).await;
        listed.expect("a gateway may ask").workers.into_iter().map(|worker| worker.report.worker_id).collect()
    }

    /// Submits a job as the gateway and reads its answer; returns how many chunks came.
    async fn answer(&self, number: u128) -> Result<usize, CallError> {
        let request = InferRequest {
            tenant_id: "acme".parse().expect("tenant"),
            model_id: model().model_id,
            version: model().version,
            input: Input { prompt: Some("one two three".into()), ..Input::default() },
            correlation_id: CorrelationId(uuid::Uuid::from_u128(number)),
            retry_token: "r".parse().expect("token"),
            trace_id: protocol::TraceId([1; 16]),
            attempt: 1,
            deadline_ms: None,
        };
        let options = StreamOptions { accept_within: SECOND * 10, deadline: None, stall: SECOND * 10 };
        let body = codec::encode(&request).into();
        let mut stream = self.gateway.open_stream(self.orchestrator, SUBMIT, body, options).await?;
        let mut chunks = 0;
        while let Some(chunk) = stream.next().await {
            chunk?;
            chunks += 1;
        }
        Ok(chunks)
    }

    async fn revoke(&self, node: PublicKey) {
        let new = TokenCreate {
            tenant_id: "ops".parse().expect("tenant"),
            name: String::new(),
            scopes: vec![Scope::Admin],
            expires_at: None,
            requests_per_minute: None,
        };
        let office = TokenOffice::new(self.store.clone(), self.clock.clone(), PEPPER);
        let token = office.issue(new).await.expect("issued").token;
        let request = NodeRevoke { token, public_key: node };
        // From a node that is nobody: the operator's token counts.
        let laptop = Client::new(self.memory.node(&key(99)));
        let revoked = laptop.call::<_, NodeRevoked>(self.registry, NODE_REVOKE, &request, SECOND * 5).await;
        assert!(revoked.expect("revoked").found);
    }
}

#[tokio::test(start_paused = true)]
async fn invited_nodes_find_each_other_and_work() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    time::sleep(SECOND * 2).await;
    assert_eq!(network.fleet().await.len(), 2, "routable within two seconds");
    assert!(network.answer(1).await.expect("answered") > 1);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_worker_is_out_of_the_network_within_five_seconds() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    time::sleep(SECOND * 10).await;
    let expelled = network.workers[0];
    network.revoke(expelled).await;
    let begun = Instant::now();
    while network.fleet().await.contains(&expelled) {
        assert!(begun.elapsed() <= SECOND * 5, "still there after {:?}", begun.elapsed());
        time::sleep(SECOND / 20).await;
    }
    time::sleep(SECOND * 60).await;
    assert_eq!(network.fleet().await, [network.workers[1]], "and it stays out");
    assert!(network.answer(1).await.expect("answered") > 1);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_orchestrator_gets_no_worker_within_five_seconds() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    time::sleep(SECOND * 10).await;
    network.answer(1).await.expect("answered");
    network.revoke(network.orchestrator).await;
    time::sleep(SECOND * 5).await;
    // It learns so itself, and its workers know better than to serve it.
    let outcome = network.answer(2).await;
    assert!(outcome.is_err(), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn certificates_renew_themselves_and_the_network_goes_on() {
    let network = Network::start(HOUR).await;
    time::sleep(HOUR * 3).await;
    assert_eq!(network.fleet().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_network_goes_on_while_its_registry_is_away() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    time::sleep(SECOND * 10).await;
    network.answer(1).await.expect("answered");
    network.memory.cut(network.registry);
    time::sleep(HOUR).await;
    assert_eq!(network.fleet().await.len(), 2);
    assert!(network.answer(2).await.expect("answered") > 1);
}

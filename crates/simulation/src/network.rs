//! The nodes of a simulated network: a registry, orchestrators, gateways and workers, each of which can crash and
//! start again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use artifact_store::ArtifactStore;
use async_trait::async_trait;
use gateway::{Gateway, GatewayParts};
use metadata_store::{RegistryStore, SqliteStore};
use observability::Exposition;
use observability::metrics::register_shed;
use orchestrator::{Orchestrator, OrchestratorParts, SealingKey};
use parking_lot::Mutex;
use prometheus_client::registry::Registry as Metrics;
use protocol::control::{NodeRole, Scope, TokenCreate};
use protocol::membership::Certificate;
use protocol::model::ModelKey;
use protocol::signature::NodeKey;
use protocol::{Clock, Digest, PublicKey, Region, UnixMillis};
use registry::{CertificateAuthority, CertificateAuthorityParts, Pepper, Registry, RegistryParts, TokenIssuer};
use rpc::{Client, Membership, MemoryNetwork};
use tempfile::TempDir;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use worker::activity::{ActivityConfig, Manner, Signals, Surroundings};
use worker::{BaseWorker, CatalogUse, DiskCalls, ServedModel, WorkerParts};

use crate::faulty_store::{Disk, FaultyStore};
use crate::faulty_transport::Links;
use crate::findings::Findings;
use crate::scripted_engine::{EngineTrouble, ScriptedEngine};

const PEPPER: Pepper = Pepper([9; 32]);
const MODELS: [&str; 2] = ["alpha", "beta"];
pub const TENANTS: [&str; 2] = ["acme", "umbrella"];
const TIME_OF_DAY: UnixMillis = UnixMillis(1_700_000_000_000);
/// How long after one node the next one starts.
const START_EVERY: Duration = Duration::from_millis(500);
/// Jobs that a worker runs, and jobs that wait there.
pub const SLOTS: u32 = 3;
pub const QUEUE_MAX: u32 = 3;

/// A node of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Registry,
    Orchestrator(u8),
    Gateway(u8),
    Worker(u8),
    Client(u8),
}

impl Node {
    fn seed(self) -> u8 {
        match self {
            Self::Registry => 1,
            Self::Orchestrator(number) => 10 + number,
            Self::Gateway(number) => 20 + number,
            Self::Worker(number) => 30 + number,
            Self::Client(number) => 60 + number,
        }
    }

    fn role(self) -> Option<NodeRole> {
        match self {
            Self::Registry => Some(NodeRole::Registry),
            Self::Orchestrator(_) => Some(NodeRole::Orchestrator),
            Self::Gateway(_) => Some(NodeRole::Gateway),
            Self::Worker(_) => Some(NodeRole::Worker),
            Self::Client(_) => None,
        }
    }

    fn key(self) -> NodeKey {
        NodeKey::from_seed(&[self.seed(); 32])
    }

    pub fn public_key(self) -> PublicKey {
        self.key().public_key()
    }
}

/// A time of day that goes with Tokio's clock and may be wrong.
struct NodeClock {
    begun: Instant,
    skew_ms: Arc<AtomicI64>,
}

impl Clock for NodeClock {
    fn now(&self) -> UnixMillis {
        let UnixMillis(now) = TIME_OF_DAY.after(self.begun.elapsed());
        UnixMillis(now.saturating_add_signed(self.skew_ms.load(Ordering::Relaxed)))
    }
}

/// The person whose machine a worker runs on.
#[derive(Default)]
pub struct Owner {
    uses_it: AtomicBool,
}

impl Owner {
    pub fn use_machine(&self, uses_it: bool) {
        self.uses_it.store(uses_it, Ordering::Relaxed);
    }
}

#[async_trait]
impl Surroundings for Owner {
    async fn look(&self, _: &ActivityConfig) -> Signals {
        Signals { idle: self.uses_it.load(Ordering::Relaxed).then_some(Duration::ZERO), ..Signals::default() }
    }
}

/// How many nodes there are, and how they behave.
#[derive(Debug, Clone)]
pub struct Shape {
    pub orchestrators: u8,
    pub gateways: u8,
    pub workers: u8,
    /// The pace of each worker.
    pub per_token: Vec<Duration>,
}

/// What a simulated network is made of.
pub struct Network {
    pub links: Links,
    pub shape: Shape,
    memory: MemoryNetwork,
    begun: Instant,
    tasks: TaskTracker,
    findings: Findings,
    folder: TempDir,
    registry: Arc<dyn RegistryStore>,
    authority: CertificateAuthority,
    pub disks: Vec<Disk>,
    /// The running orchestrators, each with its hold on its disk.
    orchestrators: Vec<Option<(CancellationToken, Arc<FaultyStore>)>>,
    /// The running gateways, for clients that need no network to reach them.
    gateways: Arc<Mutex<Vec<Option<Gateway>>>>,
    gateway_stops: Vec<Option<CancellationToken>>,
    clients: Vec<u8>,
    workers: Vec<Option<CancellationToken>>,
    epochs: Vec<u64>,
    pub troubles: Vec<Arc<EngineTrouble>>,
    pub owners: Vec<Arc<Owner>>,
    skews: Vec<Arc<AtomicI64>>,
    stop: CancellationToken,
}

pub fn region() -> Region {
    "local".parse().expect("a region")
}

/// Returns the models of the network.
pub fn models() -> Vec<ModelKey> {
    let key =
        |name: &str| ModelKey { model_id: name.parse().expect("a name"), version: "1.0".parse().expect("a version") };
    MODELS.iter().map(|name| key(name)).collect()
}

fn bytes_of(model: &ModelKey) -> Vec<u8> {
    format!("what the engine takes for the model {model}").into_bytes()
}

fn root() -> NodeKey {
    NodeKey::from_seed(&[250; 32])
}

fn membership_of(node: Node, clock: Arc<dyn Clock>) -> Membership {
    let certificate = Certificate {
        v: protocol::membership::certificate::VERSION,
        serial: node.seed().into(),
        pool: root().public_key(),
        public_key: node.public_key(),
        roles: node.role().into_iter().collect(),
        regions: vec![],
        models: vec![],
        not_before: UnixMillis(TIME_OF_DAY.0 - 86_400_000),
        not_after: TIME_OF_DAY.after(Duration::from_hours(48)),
    };
    let signed = certificate.sign(&root());
    let membership = Membership::new(root().public_key(), node.public_key(), signed, clock);
    membership.expect("a good certificate").ask_registry(Node::Registry.public_key())
}

impl Network {
    pub async fn start(shape: Shape, findings: Findings) -> Self {
        let begun = Instant::now();
        let skew_ms = Arc::new(AtomicI64::new(0));
        let clock: Arc<dyn Clock> = Arc::new(NodeClock { begun, skew_ms });
        let registry: Arc<dyn RegistryStore> = Arc::new(SqliteStore::in_memory().expect("memory is there"));
        let of_registry = Node::Registry.public_key();
        let parts = CertificateAuthorityParts::new(root(), registry.clone(), clock, PEPPER, of_registry);
        let workers = usize::from(shape.workers);
        let mut network = Self {
            links: Links::default(),
            memory: MemoryNetwork::new(),
            begun,
            tasks: TaskTracker::new(),
            disks: (0..shape.orchestrators).map(|_| Disk::new(findings.clone())).collect(),
            findings,
            folder: tempfile::tempdir().expect("a folder"),
            registry,
            authority: CertificateAuthority::new(parts),
            orchestrators: (0..shape.orchestrators).map(|_| None).collect(),
            gateways: Arc::new(Mutex::new(vec![None; usize::from(shape.gateways)])),
            gateway_stops: vec![None; usize::from(shape.gateways)],
            clients: vec![],
            workers: vec![None; workers],
            epochs: vec![0; workers],
            troubles: (0..workers).map(|_| Arc::default()).collect(),
            owners: (0..workers).map(|_| Arc::default()).collect(),
            skews: (0..workers).map(|_| Arc::default()).collect(),
            shape,
            stop: CancellationToken::new(),
        };
        network.start_registry();
        for number in 0..network.shape.orchestrators {
            network.start_orchestrator(number);
        }
        for number in 0..network.shape.gateways {
            network.start_gateway(number);
        }
        for number in 0..network.shape.workers {
            time::sleep(START_EVERY).await;
            network.start_worker(number);
        }
        network
    }

    fn clock(&self, skew_ms: Arc<AtomicI64>) -> Arc<dyn Clock> {
        Arc::new(NodeClock { begun: self.begun, skew_ms })
    }

    fn right_clock(&self) -> Arc<dyn Clock> {
        self.clock(Arc::default())
    }

    pub fn start_registry(&mut self) {
        let parts = RegistryParts {
            transport: self.links.over(self.memory.node(&Node::Registry.key())),
            region: region(),
            clock: self.right_clock(),
            store: self.registry.clone(),
            artifacts: None,
            pepper: PEPPER,
            authority: self.authority.clone(),
            version: "0".into(),
        };
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            // A registry that was cut off ends with an error.
            let _ = Registry::run(parts, stop).await;
        });
    }

    pub fn start_orchestrator(&mut self, number: u8) {
        let node = Node::Orchestrator(number);
        let (stop, store) = (self.stop.child_token(), self.disks[usize::from(number)].open());
        let mut metrics = Metrics::default();
        let shed = register_shed(&mut metrics);
        let clock = self.right_clock();
        let parts = OrchestratorParts {
            transport: self.links.over(self.memory.node(&node.key())),
            region: region(),
            membership: membership_of(node, clock.clone()),
            clock,
            store: store.clone(),
            sealing_key: SealingKey([7; 32]),
            metrics: orchestrator::Metrics::register(&mut metrics, shed),
            version: "0".into(),
        };
        let config = orchestrator::Config {
            stall_secs: 10,
            token_stall_secs: 20,
            caller_stall_secs: 10,
            deadline_secs: 30,
            lease_secs: 15,
            ..orchestrator::Config::default()
        };
        self.orchestrators[usize::from(number)] = Some((stop.clone(), store));
        self.tasks.spawn(async move {
            let _ = Orchestrator::run(config, parts, stop).await;
        });
    }

    pub fn start_gateway(&mut self, number: u8) {
        let node = Node::Gateway(number);
        let mut metrics = Metrics::default();
        let shed = register_shed(&mut metrics);
        let clock = self.right_clock();
        let parts = GatewayParts {
            transport: self.links.over(self.memory.node(&node.key())),
            membership: membership_of(node, clock.clone()),
            clock,
            metrics: gateway::Metrics::register(&mut metrics, shed),
            exposition: Exposition::new(metrics),
            folder_secret: None,
            api_key_file: None,
            version: "0".into(),
        };
        let rate_limit = gateway::RateLimitConfig { requests_per_minute: 0, burst: 1 };
        let config = gateway::Config {
            bind: ([127, 0, 0, 1], 0).into(),
            request_deadline_secs: 30,
            stall_timeout_secs: 15,
            rate_limit,
            ..gateway::Config::default()
        };
        let gateway = Gateway::new(config, parts);
        let (index, stop) = (usize::from(number), self.stop.child_token());
        self.gateways.lock()[index] = Some(gateway.clone());
        self.gateway_stops[index] = Some(stop.clone());
        self.tasks.spawn(async move {
            let _ = gateway.run(stop).await;
        });
    }

    pub fn start_worker(&mut self, number: u8) {
        let (node, index) = (Node::Worker(number), usize::from(number));
        self.epochs[index] += 1;
        let artifacts = ArtifactStore::in_folder(self.folder.path().join(number.to_string())).expect("a folder");
        let served = models().into_iter().map(|model| {
            let bytes = bytes_of(&model);
            artifacts.put(&bytes[..], 1024).expect("a place in the folder");
            ServedModel::new(model, Digest::of(&bytes))
        });
        let config = worker::Config {
            models: served.collect(),
            catalog: CatalogUse::Off,
            slots: SLOTS,
            queue_max: QUEUE_MAX,
            preload: true,
            memory_max_mib: 1024,
            activity: ActivityConfig { in_use: Manner::Pause, hand_over_secs: 1, ..ActivityConfig::default() },
            ..worker::Config::default()
        };
        let clock = self.clock(self.skews[index].clone());
        let engine =
            ScriptedEngine::new(self.shape.per_token[index], self.findings.clone(), self.troubles[index].clone());
        let parts = WorkerParts {
            transport: self.links.over(self.memory.node(&node.key())),
            key: node.key(),
            epoch: self.epochs[index],
            membership: membership_of(node, clock.clone()),
            clock,
            runtime: Arc::new(engine),
            artifacts,
            disk: DiskCalls::at_once(),
            metrics: worker::Metrics::register(&mut Metrics::default()),
            adoption: None,
            version: "0".into(),
        };
        let stop = self.stop.child_token();
        self.workers[index] = Some(stop.clone());
        let worker = BaseWorker::new(config, parts).with_surroundings(self.owners[index].clone());
        self.tasks.spawn(worker.run(stop));
    }

    /// Ends a node without warning: its network and its disk are gone at once, so that nothing of it counts any more.
    pub fn crash(&mut self, node: Node) {
        self.links.kill(node.public_key());
        self.memory.cut(node.public_key());
        match node {
            Node::Orchestrator(number) => {
                if let Some((stop, store)) = self.orchestrators[usize::from(number)].take() {
                    store.cut();
                    stop.cancel();
                }
            }
            Node::Worker(number) => {
                if let Some(stop) = self.workers[usize::from(number)].take() {
                    stop.cancel();
                }
            }
            Node::Gateway(number) => {
                self.gateways.lock()[usize::from(number)] = None;
                if let Some(stop) = self.gateway_stops[usize::from(number)].take() {
                    stop.cancel();
                }
            }
            Node::Registry | Node::Client(_) => {}
        }
    }

    /// Starts a node again that crashed.
    pub fn restart(&mut self, node: Node) {
        match node {
            Node::Registry => self.start_registry(),
            Node::Orchestrator(number) => self.start_orchestrator(number),
            Node::Worker(number) => self.start_worker(number),
            Node::Gateway(number) => self.start_gateway(number),
            Node::Client(_) => {}
        }
    }

    /// Sets a worker's clock wrong.
    pub fn skew(&self, worker: u8, skew_ms: i64) {
        self.skews[usize::from(worker)].store(skew_ms, Ordering::Relaxed);
    }

    /// Returns the gateways, to be asked without a network between. One that has crashed is missing.
    pub fn gateways(&self) -> Arc<Mutex<Vec<Option<Gateway>>>> {
        self.gateways.clone()
    }

    /// Returns a client of a node of its own.
    pub fn client(&mut self, number: u8) -> Client {
        self.clients.push(number);
        Client::new(self.links.over(self.memory.node(&Node::Client(number).key())))
    }

    /// Returns the nodes that faults can befall: all services, workers and clients.
    pub fn nodes(&self) -> Vec<Node> {
        let Shape { orchestrators, gateways, workers, .. } = self.shape;
        let services = (0..orchestrators).map(Node::Orchestrator).chain((0..gateways).map(Node::Gateway));
        let clients = self.clients.iter().copied().map(Node::Client);
        let workers = (0..workers).map(Node::Worker);
        std::iter::once(Node::Registry).chain(services).chain(workers).chain(clients).collect()
    }

    /// Makes an API key of a tenant.
    pub async fn token(&self, tenant: &str) -> String {
        let issuer = TokenIssuer::new(self.registry.clone(), self.right_clock(), PEPPER);
        let new = TokenCreate {
            tenant_id: tenant.parse().expect("a tenant"),
            name: String::new(),
            scopes: vec![Scope::Infer],
            expires_at: None,
            requests_per_minute: None,
        };
        issuer.issue(new).await.expect("the store works").token
    }
}

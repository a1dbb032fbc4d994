//! The whole network in one process: registry, orchestrator, workers and gateway, each a node with a key of its own.
//! They run as tasks here, and as processes elsewhere. If the network listens on UDP, other machines can join it;
//! otherwise its nodes communicate in memory.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use engine::ModelRuntime;
use futures_util::future::join_all;
use metadata_store::{JobStore, RegistryStore, Store};
use protocol::Clock;
use protocol::control::{InviteCreate, NodeRole};
use protocol::model::{ModelEntry, ModelKey};
use protocol::signature::NodeKey;
use registry::{CertificateAuthority, CertificateAuthorityParts, Grant, TokenIssuer};
use rpc::transport::hyperswarm::{HyperswarmTransport, KnownPeers, Options};
use rpc::{Membership, MemoryNetwork, SystemClock, Transport};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use worker::{CatalogUse, WorkerHandle};

use crate::addresses;
use crate::data_folder::{DataFolder, FolderLock};
use crate::local_models;
use crate::metrics::Metrics;
use crate::node::{Pool, at_last_port};
use crate::services::{Services, first_key, open_job_store, open_registry_store, run_gateway};
use crate::settings::{NetworkSettings, Settings, any_port};
use crate::tiny_model;

/// What a network needs besides its settings.
pub struct Supplies<'a> {
    /// Creates the runtime of a worker.
    pub runtime: &'a dyn Fn() -> anyhow::Result<Arc<dyn ModelRuntime>>,
    /// Models to register besides the built-in one.
    pub models: Vec<ModelEntry>,
}

pub struct Network {
    pub address: SocketAddr,
    /// Whether the gateway uses TLS.
    pub tls: bool,
    /// The first API key, which has the admin scope.
    pub api_key: String,
    /// Whether the key was created by this start.
    pub key_is_new: bool,
    pub workers: Vec<WorkerHandle>,
    /// Metrics of all services.
    pub metrics: Metrics,
    /// An invite for a worker, if other machines may join.
    pub invite: Option<String>,
    data: DataFolder,
    stores: Vec<Arc<dyn Store>>,
    tiers: Vec<Tier>,
    medium: Medium,
    _lock: FolderLock,
}

/// Services that stop together. Tiers that dispatch work stop before those that run it.
struct Tier {
    stop: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Tier {
    fn new() -> Self {
        Self { stop: CancellationToken::new(), tasks: JoinSet::new() }
    }

    async fn end(&mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        let mut outcome = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            outcome = outcome.and(ended.context("a service broke down").flatten());
        }
        outcome
    }
}

impl Network {
    /// Starts every service on a data folder.
    pub async fn start(settings: &Settings, data: &DataFolder, supplies: Supplies<'_>) -> anyhow::Result<Self> {
        data.create()?;
        let lock = data.lock(&["registry", "orchestrator", "gateway", "worker"])?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let registry_store = open_registry_store(&data.registry_store())?;
        let orchestrator_store = open_job_store(&data.orchestrator_store())?;
        let tokens = TokenIssuer::new(registry_store.clone(), clock.clone(), data.pepper()?);
        let (api_key, key_is_new) = first_key(data, &tokens).await?;
        let mut models = supplies.models;
        models.push(tiny_model::entry(clock.now()));
        registry::catalog::register(&*registry_store, models).await?;
        registry_store.put_adapter(tiny_model::adapter_entry(clock.now())).await?;
        let mut settings = settings.clone();
        local_models::settle_versions(&mut settings.worker.models, &*registry_store).await?;

        let workers = settings.workers.max(u32::from(settings.adopt.is_some()));
        let keys = Keys::of(data, workers)?;
        let mut medium = Medium::of(&settings, data);
        let registry_end = medium.node(&keys.registry, "registry").await?;
        let mut parts = CertificateAuthorityParts::new(
            data.root_key()?,
            registry_store.clone(),
            clock.clone(),
            data.pepper()?,
            keys.registry.public_key(),
        );
        parts.bootstrap = medium.bootstrap();
        if parts.bootstrap.is_empty() {
            data.forget_pool(keys.registry.public_key())?;
        } else {
            // Operators find the registry by this file, as in a network of processes.
            data.write_pool(&Pool { registry: keys.registry.public_key(), bootstrap: parts.bootstrap.clone() })?;
        }
        let authority = CertificateAuthority::new(parts);
        let invite = if medium.is_open() { Some(invite_worker(&authority).await?) } else { None };
        let metrics = Metrics::new();
        let tls = settings.gateway.tls_cert.is_some();
        let services = Services { settings, data: data.clone(), metrics: metrics.clone(), clock };
        let mut stage = Stage { services, medium, keys, authority };
        let registries = stage.registry(registry_end, registry_store.clone());
        let orchestrators = stage.orchestrator(orchestrator_store.clone()).await?;
        let (workers, handles) = stage.workers(&*orchestrator_store, supplies.runtime).await?;
        let (gateways, address) = stage.gateway().await?;
        let stores: [Arc<dyn Store>; 2] = [orchestrator_store, registry_store];
        Ok(Self {
            address,
            tls,
            api_key,
            key_is_new,
            workers: handles,
            metrics,
            invite,
            medium: stage.medium,
            data: data.clone(),
            stores: stores.into(),
            tiers: vec![gateways, orchestrators, workers, registries],
            _lock: lock,
        })
    }

    /// Returns the gateway's URL for this machine.
    pub fn url(&self) -> String {
        addresses::urls(self.address, self.tls).swap_remove(0)
    }

    /// Returns the served models: the user's first, and the built-in one last.
    pub fn served_models(&self) -> Vec<ModelKey> {
        let mut served: Vec<ModelKey> = self.workers.iter().flat_map(WorkerHandle::served_models).collect();
        served.sort_by_key(|key| (*key == tiny_model::key(), key.clone()));
        served.dedup();
        served
    }

    /// Waits until every worker has loaded its models and serves the added ones, and the orchestrator knows.
    pub async fn ready(&self) -> anyhow::Result<()> {
        for worker in &self.workers {
            worker.ready().await?;
            worker.has_catalog().await;
        }
        let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
        // A loaded model gets jobs only once a report has listed it.
        let known = &self.metrics.orchestrator;
        let awaited = || known.workers_live.get() < self.workers.len() as i64 || known.workers_loading.get() > 0;
        while awaited() {
            if tokio::time::Instant::now() >= deadline {
                bail!("the workers did not report within 15 s that they are ready");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Waits until a service ends by itself, which is always an error.
    pub async fn broken(&mut self) -> anyhow::Error {
        let ends =
            self.tiers.iter_mut().filter(|tier| !tier.tasks.is_empty()).map(|tier| Box::pin(tier.tasks.join_next()));
        match futures_util::future::select_all(ends).await.0 {
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => anyhow::Error::new(error).context("a service broke down"),
            Some(Ok(Ok(()))) | None => anyhow::anyhow!("a service ended by itself"),
        }
    }

    /// Stops every service, those that dispatch work first, and closes the stores.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let mut outcome = Ok(());
        for tier in &mut self.tiers {
            outcome = outcome.and(tier.end().await);
        }
        self.medium.leave().await;
        for store in &self.stores {
            outcome = outcome.and(store.close().await.context("could not close a store"));
        }
        self.data.forget_address();
        outcome
    }
}

/// Creates an invite with which one other machine joins as a worker.
async fn invite_worker(authority: &CertificateAuthority) -> anyhow::Result<String> {
    let new = InviteCreate {
        token: String::new(),
        roles: vec![NodeRole::Worker],
        regions: vec![],
        models: vec![],
        name: String::new(),
        valid_secs: None,
        bootstrap: vec![],
    };
    Ok(authority.invite(new).await.context("could not make an invite")?.invite)
}

/// How the nodes of the process communicate.
enum Medium {
    /// In memory, out of reach of other machines.
    Memory(MemoryNetwork),
    /// Over UDP, within reach of other machines.
    Udp(Udp),
}

/// The transports of the nodes on a UDP network.
struct Udp {
    listen: SocketAddrV4,
    settings: NetworkSettings,
    data: DataFolder,
    /// The first one is the registry's, and the bootstrap node of the others.
    ends: Vec<Arc<HyperswarmTransport>>,
}

impl Medium {
    fn of(settings: &Settings, data: &DataFolder) -> Self {
        match settings.network.up_listen {
            None => Self::Memory(MemoryNetwork::new()),
            Some(listen) => {
                let (settings, data) = (settings.network.clone(), data.clone());
                Self::Udp(Udp { listen, settings, data, ends: vec![] })
            }
        }
    }

    fn is_open(&self) -> bool {
        matches!(self, Self::Udp(_))
    }

    /// Returns the bootstrap addresses for other machines.
    fn bootstrap(&self) -> Vec<String> {
        match self {
            Self::Memory(_) => vec![],
            Self::Udp(udp) => {
                udp.ends.first().map(|registry| registry.reachable_address().to_string()).into_iter().collect()
            }
        }
    }

    /// Adds a node to the network. The registry must be the first.
    async fn node(&mut self, key: &NodeKey, name: &str) -> anyhow::Result<Arc<dyn Transport>> {
        let begin_at = self.bootstrap();
        match self {
            Self::Memory(memory) => Ok(memory.node(key)),
            Self::Udp(udp) => udp.node(key, name, &begin_at).await,
        }
    }

    async fn leave(&self) {
        if let Self::Udp(Udp { ends, .. }) = self {
            join_all(ends.iter().map(|end| end.stop())).await;
        }
    }
}

impl Udp {
    async fn node(&mut self, key: &NodeKey, name: &str, begin_at: &[String]) -> anyhow::Result<Arc<dyn Transport>> {
        // Other machines find the network at the registry's port; the other nodes take any port.
        let listen = if self.ends.is_empty() { self.listen } else { any_port(self.listen) };
        let options = Options {
            listen,
            bootstrap: self.settings.and(begin_at).bootstrap_addresses().await?,
            known: KnownPeers::default(),
            public_address: self.settings.public_address,
            is_client: false,
        };
        let start = async |listen| HyperswarmTransport::start(Options { listen, ..options.clone() }, key).await;
        let end = at_last_port(listen, self.data.listen_address(name), start).await?;
        let address = end.local_address();
        let local = if address.ip().is_unspecified() { Ipv4Addr::LOCALHOST } else { *address.ip() };
        self.data.write_listen_address(name, SocketAddrV4::new(local, address.port()))?;
        self.ends.push(end.clone());
        Ok(end)
    }
}

/// What the services of one network share while they are started.
struct Stage {
    services: Services,
    medium: Medium,
    keys: Keys,
    authority: CertificateAuthority,
}

impl Stage {
    async fn enrol(&self, key: &NodeKey, role: NodeRole, name: &str) -> anyhow::Result<Membership> {
        enrol(&self.authority, self.services.clock.clone(), key, Grant::of(role, name)).await
    }

    fn registry(&self, transport: Arc<dyn Transport>, store: Arc<dyn RegistryStore>) -> Tier {
        let (services, authority) = (self.services.clone(), self.authority.clone());
        let mut tier = Tier::new();
        let stop = tier.stop.clone();
        tier.tasks.spawn(async move { services.registry(transport, store, authority, stop).await });
        tier
    }

    async fn orchestrator(&mut self, store: Arc<dyn JobStore>) -> anyhow::Result<Tier> {
        let transport = self.medium.node(&self.keys.orchestrator, "orchestrator").await?;
        let services = self.services.clone();
        let membership = self.enrol(&self.keys.orchestrator, NodeRole::Orchestrator, "orchestrator").await?;
        let mut tier = Tier::new();
        let stop = tier.stop.clone();
        tier.tasks.spawn(async move { services.orchestrator(transport, store, membership, stop).await });
        Ok(tier)
    }

    /// Starts the workers. Earlier versions counted their starts in the orchestrator's store, so the count in the data
    /// folder may be lower than the epochs of reports that an orchestrator has accepted. The store's mark may lag one
    /// start behind.
    async fn workers(
        &mut self,
        store: &dyn JobStore,
        runtime: &dyn Fn() -> anyhow::Result<Arc<dyn ModelRuntime>>,
    ) -> anyhow::Result<(Tier, Vec<WorkerHandle>)> {
        let mut tier = Tier::new();
        let mut handles = vec![];
        let believed: BTreeMap<_, _> = store.high_waters().await?.into_iter().collect();
        for (key, number) in self.keys.workers.clone().iter().zip(1..) {
            let name = format!("worker-{number}");
            let above = believed.get(&key.public_key()).map_or(0, |mark| mark.epoch + 1);
            let epoch = self.services.data.next_epoch(&name, above)?;
            let membership = self.enrol(key, NodeRole::Worker, &name).await?;
            let transport = self.medium.node(key, &name).await?;
            let mut services = self.services.clone();
            if services.settings.workers == 0 {
                // This worker exists for the adopted servers only.
                services.settings.worker.models.clear();
                services.settings.worker.catalog = CatalogUse::Off;
            }
            if number > 1 {
                // A server's slots must be counted once, so only the first worker serves it.
                services.settings.worker.models.retain(|model| model.remote.is_none());
                services.settings.adopt = None;
            }
            let worker = services.worker(transport, key, epoch, membership, runtime()?)?;
            handles.push(worker.handle());
            let stop = tier.stop.clone();
            tier.tasks.spawn(async move {
                worker.run(stop).await;
                Ok(())
            });
        }
        Ok((tier, handles))
    }

    async fn gateway(&mut self) -> anyhow::Result<(Tier, SocketAddr)> {
        let membership = self.enrol(&self.keys.gateway, NodeRole::Gateway, "gateway").await?;
        let transport = self.medium.node(&self.keys.gateway, "gateway").await?;
        let open = self.services.gateway(transport, membership).await?;
        let address = open.address();
        let mut tier = Tier::new();
        let stop = tier.stop.clone();
        tier.tasks.spawn(run_gateway(open, stop));
        Ok((tier, address))
    }
}

/// Enrols a node of this process: its operator has the root key and needs no invite.
async fn enrol(
    authority: &CertificateAuthority,
    clock: Arc<dyn Clock>,
    key: &NodeKey,
    grant: Grant,
) -> anyhow::Result<Membership> {
    let (own_key, name) = (key.public_key(), grant.name.clone());
    let certificate = authority.certify(own_key, grant).await;
    let certificate = certificate.with_context(|| format!("could not certify the {name}"))?;
    let membership = Membership::new(authority.pool(), own_key, certificate, clock)?;
    membership.take_revocations(&authority.revocations().await?)?;
    Ok(membership)
}

/// The key of each node.
struct Keys {
    registry: NodeKey,
    orchestrator: NodeKey,
    gateway: NodeKey,
    workers: Vec<NodeKey>,
}

impl Keys {
    fn of(data: &DataFolder, workers: u32) -> anyhow::Result<Self> {
        Ok(Self {
            registry: data.node_key("registry")?,
            orchestrator: data.node_key("orchestrator")?,
            gateway: data.node_key("gateway")?,
            workers: (1..=workers)
                .map(|number| data.node_key(&format!("worker-{number}")))
                .collect::<Result<_, _>>()?,
        })
    }
}

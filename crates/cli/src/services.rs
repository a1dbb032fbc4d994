//! Builds each service from a node's parts: in one process on a memory network, or in a process of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use artifact_store::ArtifactStore;
use engine::ModelRuntime;
use gateway::{Gateway, GatewayError, GatewayParts, OpenGateway};
use metadata_store::{JobStore, RegistryStore, SqliteStore, StoreOptions};
use orchestrator::{Orchestrator, OrchestratorParts};
use protocol::Clock;
use protocol::control::{Scope, TokenCreate};
use protocol::signature::NodeKey;
use registry::{CertificateAuthority, Registry, RegistryParts, TokenIssuer};
use rpc::{Membership, Transport};
use tokio_util::sync::CancellationToken;
use tracing::info;
use worker::{Adoption, BaseWorker, DiskCalls, WorkerParts};

use crate::data_folder::DataFolder;
use crate::metrics::Metrics;
use crate::settings::Settings;
use crate::tiny_model;

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What all services of a process share.
#[derive(Clone)]
pub struct Services {
    /// The settings in force.
    pub settings: Settings,
    pub data: DataFolder,
    pub metrics: Metrics,
    pub clock: Arc<dyn Clock>,
}

impl Services {
    /// Runs a registry until `stop`.
    pub async fn registry(
        &self,
        transport: Arc<dyn Transport>,
        store: Arc<dyn RegistryStore>,
        authority: CertificateAuthority,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let parts = RegistryParts {
            transport,
            region: self.settings.region.clone(),
            clock: self.clock.clone(),
            store,
            artifacts: Some(
                ArtifactStore::in_folder(self.data.artifacts()).context("could not open the artifact store")?,
            ),
            pepper: self.data.pepper()?,
            authority,
            version: VERSION.to_owned(),
        };
        Registry::run(parts, stop).await.context("the registry stopped")
    }

    /// Runs an orchestrator until `stop`.
    pub async fn orchestrator(
        &self,
        transport: Arc<dyn Transport>,
        store: Arc<dyn JobStore>,
        membership: Membership,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let parts = OrchestratorParts {
            transport,
            region: self.settings.region.clone(),
            clock: self.clock.clone(),
            store,
            metrics: self.metrics.orchestrator.clone(),
            membership,
            sealing_key: self.data.sealing_key()?,
            version: VERSION.to_owned(),
        };
        Orchestrator::run(self.settings.orchestrator.clone(), parts, stop).await.context("the orchestrator stopped")
    }

    pub fn worker(
        &self,
        transport: Arc<dyn Transport>,
        key: &NodeKey,
        epoch: u64,
        membership: Membership,
        runtime: Arc<dyn ModelRuntime>,
    ) -> anyhow::Result<BaseWorker> {
        let artifacts = ArtifactStore::in_folder(self.data.artifacts()).context("could not open the artifact store")?;
        let parts = WorkerParts {
            transport,
            key: key.clone(),
            epoch,
            clock: self.clock.clone(),
            runtime,
            artifacts: tiny_model::embedded_in(artifacts),
            disk: DiskCalls::on_threads(),
            metrics: self.metrics.worker.clone(),
            membership,
            adoption: self.settings.adopt.as_deref().map(Adoption::new).transpose()?,
            version: VERSION.to_owned(),
        };
        Ok(BaseWorker::new(self.settings.worker.clone(), parts))
    }

    /// Binds a gateway's address.
    pub async fn gateway(&self, transport: Arc<dyn Transport>, membership: Membership) -> anyhow::Result<OpenGateway> {
        let parts = GatewayParts {
            transport,
            clock: self.clock.clone(),
            metrics: self.metrics.gateway.clone(),
            exposition: self.metrics.exposition.clone(),
            membership,
            version: VERSION.to_owned(),
            folder_secret: Some(self.data.make_gateway_secret()?),
            api_key_file: Some(self.data.api_key_file()),
        };
        let open = match self.open_gateway(&parts).await {
            Err(GatewayError::Bind { address, source }) => {
                bail!("could not listen on {address}: {source}; choose another address with --bind HOST:PORT")
            }
            opened => opened?,
        };
        self.data.write_address(open.address(), self.settings.gateway.tls_cert.as_deref())?;
        Ok(open)
    }

    /// Binds the address. If any port will do, prefers the gateway's last one, so that its clients still find it.
    async fn open_gateway(&self, parts: &GatewayParts) -> Result<OpenGateway, GatewayError> {
        let config = self.settings.gateway.clone();
        if let (0, Some(port)) = (config.bind.port(), self.data.last_port()) {
            let bind = SocketAddr::new(config.bind.ip(), port);
            match Gateway::new(gateway::Config { bind, ..config.clone() }, parts.clone()).bind().await {
                Err(GatewayError::Bind { .. }) => {}
                opened => return opened,
            }
        }
        Gateway::new(config, parts.clone()).bind().await
    }
}

/// Runs a gateway until `stop`. SIGHUP makes it reload its TLS files.
pub async fn run_gateway(open: OpenGateway, stop: CancellationToken) -> anyhow::Result<()> {
    let gateway = open.gateway().clone();
    let mut hangups = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).context("no signals")?;
    let reloading = async {
        while hangups.recv().await.is_some() {
            info!("SIGHUP: looking at the TLS files");
            gateway.reload();
        }
    };
    let (outcome, _) = tokio::join!(
        async { open.run(stop.clone()).await.context("the gateway stopped") },
        stop.run_until_cancelled(reloading)
    );
    outcome
}

/// Opens the file of an orchestrator.
pub fn open_job_store(path: &Path) -> anyhow::Result<Arc<dyn JobStore>> {
    Ok(Arc::new(SqliteStore::open(path, StoreOptions::default())?))
}

/// Opens the file of a registry.
pub fn open_registry_store(path: &Path) -> anyhow::Result<Arc<dyn RegistryStore>> {
    Ok(Arc::new(SqliteStore::open(path, StoreOptions::default())?))
}

/// Returns the API key in the data folder, or creates one with every scope.
pub async fn first_key(data: &DataFolder, tokens: &TokenIssuer) -> anyhow::Result<(String, bool)> {
    if let Some(key) = data.api_key().filter(|key| !key.is_empty()) {
        return Ok((key, false));
    }
    let new = TokenCreate {
        tenant_id: "default".parse().expect("a well-formed tenant"),
        name: "made at first start".to_owned(),
        scopes: vec![Scope::Infer, Scope::Admin],
        expires_at: None,
        requests_per_minute: None,
    };
    let key = tokens.issue(new).await?.token;
    let path = data.api_key_file();
    rpc::identity::write_private(&path, format!("{key}\n").as_bytes())
        .with_context(|| format!("could not write {}", path.display()))?;
    Ok((key, true))
}

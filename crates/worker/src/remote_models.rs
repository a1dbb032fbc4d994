//! Models of servers: of adopted ones, and of those that the worker starts itself on an artifact.
//!
//! An adopted model is offered to the registry, so that clients can name it, and is served only once it is listed. If
//! the registry refuses it, because another model has the name or this worker may not serve it, it gets no job.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use engine::remote::{AddressError, RemoteRuntime, ServerAddress};
use engine::{EngineError, LoadOptions, LoadedModel, ModelId, ModelRuntime as _};
use parking_lot::Mutex;
use protocol::model::{ModelKey, ModelOffer, OfferedSource};
use tokio::fs;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::config::{RemoteServer, ServedModel};
use crate::model_facts;
use crate::offers::{OfferError, Offers};
use crate::own_server::OwnServer;

/// How long to wait for a registry to be found.
const REGISTRY_WITHIN: Duration = Duration::from_secs(10);

/// How long a server that the worker starts may take to load its model.
const START_WITHIN: Duration = Duration::from_mins(10);
/// How many ports are tried for such a server.
const STARTS_MAX: u32 = 3;
/// How often such a server is polled meanwhile, and the timeout of each poll.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Attaches servers' models, and offers them to registries.
pub(crate) struct RemoteModels {
    runtime: Arc<RemoteRuntime>,
    /// Also offers models of artifacts.
    pub(crate) offers: Offers,
    /// The servers that this worker started, by model.
    own: Mutex<BTreeMap<ModelId, OwnServer>>,
}

/// Why a server's model cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("the server's address is of no use: {0}")]
    Address(#[from] AddressError),
    #[error("the server's API key could not be read: {0}")]
    Key(#[from] io::Error),
    #[error("the server could not be started: {0}")]
    Start(io::Error),
    #[error("the server ended before it answered")]
    Ended,
    #[error(
        "another program listens on port {0}, which was meant for the server; if the server runs elsewhere, such as in a \
         container, start it yourself and set `remote`"
    )]
    Stranger(u16),
    #[error("the server did not answer within {} s", START_WITHIN.as_secs())]
    Silent,
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Offer(#[from] OfferError),
}

impl RemoteModels {
    pub(crate) fn new(runtime: Arc<RemoteRuntime>, offers: Offers) -> Self {
        Self { runtime, offers, own: Mutex::default() }
    }

    /// Attaches a server's model, and has it listed.
    pub(crate) async fn attach(
        &self,
        key: &ModelKey,
        server: &RemoteServer,
        options: &LoadOptions,
    ) -> Result<LoadedModel, AttachError> {
        let api_key = match &server.api_key_file {
            Some(file) => Some(read_key(file).await?),
            None => None,
        };
        let address = ServerAddress::new(&server.base_url, api_key)?;
        let (loaded, facts) = self.runtime.attach(address, &server.model, options).await?;
        let facts = facts.map(model_facts::to_protocol);
        let source = OfferedSource::Server { served_as: server.model.clone() };
        let offer = ModelOffer { key: key.clone(), source, context_length: loaded.context_length, facts };
        if let Err(error) = self.offers.make(&offer, REGISTRY_WITHIN).await {
            // It was attached just now, and nobody knows of it.
            let _ = self.runtime.unload(loaded.id).await;
            return Err(error.into());
        }
        Ok(loaded)
    }

    /// Starts a server on a verified file, and attaches its model. If another program takes the server's port first,
    /// the server is started anew on another one.
    pub(crate) async fn start(
        &self,
        served: &ServedModel,
        model: &File,
        options: &LoadOptions,
    ) -> Result<LoadedModel, AttachError> {
        for _ in 1..STARTS_MAX {
            match self.start_once(served, model, options).await {
                Err(AttachError::Stranger(port)) => warn!(port, "another program took a server's port; trying another"),
                outcome => return outcome,
            }
        }
        self.start_once(served, model, options).await
    }

    async fn start_once(
        &self,
        served: &ServedModel,
        model: &File,
        options: &LoadOptions,
    ) -> Result<LoadedModel, AttachError> {
        let model = model.try_clone().map_err(AttachError::Start)?;
        let paths = served.server_sandbox.then(|| served.server_paths.clone());
        let mut server = OwnServer::start(&served.server_command, model, paths).map_err(AttachError::Start)?;
        let address = ServerAddress::new(&server.base_url(), None)?;
        let listening = async {
            while !server.has_ended() {
                let survey = self.runtime.survey(&address, ASK_EVERY).await.ok();
                if let Some(listed) = survey.and_then(|survey| survey.models.into_iter().next()) {
                    return Ok(listed.name);
                }
                sleep(ASK_EVERY).await;
            }
            Err(AttachError::Ended)
        };
        let name = timeout(START_WITHIN, listening).await.map_err(|_| AttachError::Silent)??;
        // Prompts are sent only to the server that has the verified file.
        if !server.has_its_port() {
            return Err(AttachError::Stranger(server.port()));
        }
        let (loaded, _) = self.runtime.attach(address, &name, options).await?;
        let loaded = LoadedModel { pid: server.pid(), sandbox: server.sandbox(), ..loaded };
        // If the server could not bind its port, another program responded there.
        if server.has_ended() {
            let _ = self.runtime.unload(loaded.id).await;
            return Err(AttachError::Ended);
        }
        self.own.lock().insert(loaded.id, server);
        Ok(loaded)
    }

    /// Ends the server of a model, if this worker started it.
    pub(crate) fn end(&self, model: ModelId) {
        self.own.lock().remove(&model);
    }
}

async fn read_key(file: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(file).await?.trim().to_owned())
}

//! Models of adopted servers: attached, and offered to the registry, so that clients can name them.
//!
//! A model answers here only once the registry lists it: what it refuses, because the name is another model's or not
//! this worker's to serve, gets no job.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use engine::remote::{AddressError, RemoteRuntime, ServerAddress};
use engine::{EngineError, LoadOptions, LoadedModel, ModelRuntime as _};
use protocol::WireError;
use protocol::control::{Empty, MODEL_OFFER, NodeRole};
use protocol::model::{ModelKey, ModelOffer};
use rpc::{CallError, Client, Directory};
use tokio::fs;

use crate::config::RemoteServer;

/// How long a registry may take to be found, and then to answer.
const REGISTRY_WITHIN: Duration = Duration::from_secs(10);

/// Attaches models, and tells registries.
pub(crate) struct RemoteModels {
    runtime: Arc<RemoteRuntime>,
    client: Client,
    directory: Directory,
}

/// Why a server's model is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("the server's address is of no use: {0}")]
    Address(#[from] AddressError),
    #[error("the server's API key could not be read: {0}")]
    Key(#[from] io::Error),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the registry does not list it: {0}")]
    Refused(WireError),
    #[error("no registry answers")]
    NoRegistry,
}

impl RemoteModels {
    pub(crate) fn new(runtime: Arc<RemoteRuntime>, client: Client, directory: Directory) -> Self {
        Self { runtime, client, directory }
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
        let loaded = self.runtime.attach(address, &server.model, options).await?;
        let (served_as, context_length) = (server.model.clone(), loaded.context_length);
        if let Err(error) = self.offer(&ModelOffer { key: key.clone(), served_as, context_length }).await {
            // It was attached just now, and nobody knows of it.
            let _ = self.runtime.unload(loaded.id).await;
            return Err(error);
        }
        Ok(loaded)
    }

    async fn offer(&self, offer: &ModelOffer) -> Result<(), AttachError> {
        self.directory.wait_for(NodeRole::Registry, REGISTRY_WITHIN).await;
        for registry in self.directory.find(NodeRole::Registry) {
            match self.client.call::<_, Empty>(registry, MODEL_OFFER, offer, REGISTRY_WITHIN).await {
                Ok(Empty {}) => return Ok(()),
                Err(CallError::Remote(refusal)) => return Err(AttachError::Refused(refusal)),
                // The next one may answer.
                Err(_) => {}
            }
        }
        Err(AttachError::NoRegistry)
    }
}

async fn read_key(file: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(file).await?.trim().to_owned())
}

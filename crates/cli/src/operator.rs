//! Asks a network's registry as its operator: by RPC, with the API key of this data folder.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use protocol::PublicKey;
use protocol::signature::NodeKey;
use rpc::transport::hyperswarm::{HyperswarmTransport, KnownPeers, Options};
use rpc::{CallError, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::data_folder::DataFolder;
use crate::settings::{Env, Settings};

/// How long a registry may take, the way to it included.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks a network's registry.
pub struct Operator {
    /// The API key to show.
    pub token: String,
    registry: PublicKey,
    client: Client,
    network: Arc<HyperswarmTransport>,
}

impl Operator {
    /// Finds the registry of the network that this data folder belongs to.
    pub async fn find(settings: &Settings, data: &DataFolder, env: &Env) -> anyhow::Result<Self> {
        let pool = data.pool()?.with_context(|| {
            format!("{} belongs to no network of processes; start one with `tether registry`", data.path().display())
        })?;
        let token = env.get("TETHER_API_KEY").map(str::to_owned).or_else(|| data.api_key());
        let token = token.filter(|token| !token.is_empty()).with_context(|| {
            format!("no API key is at hand: {} is missing, and TETHER_API_KEY empty", data.api_key_file().display())
        })?;
        // Nobody is to find this one: it asks, and is gone.
        let network = client_network(settings, data, &pool.bootstrap, &random_key()?).await?;
        Ok(Self { token, registry: pool.registry, client: Client::new(network.clone()), network })
    }

    /// Asks the registry.
    pub async fn ask<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: &Request,
    ) -> anyhow::Result<Reply> {
        let reply = self.client.call(self.registry, method, request, PATIENCE).await;
        reply.map_err(|error| match error {
            CallError::Remote(refusal) => anyhow!("the registry refused: {}", refusal.message),
            error => anyhow!("the registry {} cannot be asked: {error}", self.registry.short()),
        })
    }

    /// Leaves the network.
    pub async fn leave(self) {
        self.network.stop().await;
    }
}

/// Makes a key for a node that nobody needs to know again.
pub fn random_key() -> anyhow::Result<NodeKey> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).context("could not draw random bytes")?;
    Ok(NodeKey::from_seed(&seed))
}

/// Joins a network for some questions.
pub async fn client_network(
    settings: &Settings,
    data: &DataFolder,
    bootstrap: &[String],
    key: &NodeKey,
) -> anyhow::Result<Arc<HyperswarmTransport>> {
    let roles = ["registry", "gateway", "orchestrator", "worker"];
    let mut bootstrap = settings.network.and(bootstrap).bootstrap_addresses().await?;
    // A node of this folder knows the way even when every bootstrap node is gone.
    bootstrap.extend(roles.iter().filter_map(|role| data.listen_address(role)));
    let options = Options {
        listen: crate::settings::any_port(settings.network.listen),
        bootstrap,
        known: KnownPeers::merged(roles.iter().map(|role| KnownPeers::read(&data.known_peers(role)))),
        is_client: true,
    };
    HyperswarmTransport::start(options, key).await.context("could not open a UDP socket")
}

//! One node of a network of processes: its key and its transport.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use protocol::signature::NodeKey;
use protocol::{Clock, PublicKey};
use rpc::transport::hyperswarm::{HyperswarmTransport, KnownPeers, Options};
use rpc::{Enrolment, Membership, Transport};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::data_folder::DataFolder;
use crate::settings::{NetworkSettings, Settings};

/// How often the addresses of known peers are saved.
const KEEP_EVERY: Duration = Duration::from_secs(30);
/// The delay before they are first saved, so that a node that is killed early knows them too.
const KEEP_FIRST: Duration = Duration::from_secs(2);

/// One node of a network of processes.
pub struct Node {
    pub key: NodeKey,
    /// Its role, which names its files in the data folder.
    pub name: &'static str,
    network: Arc<HyperswarmTransport>,
    settings: NetworkSettings,
    data: DataFolder,
}

/// How operators find a network. Saved in the data folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pool {
    /// The registry's public key.
    pub registry: PublicKey,
    /// Addresses of bootstrap nodes, `host:port`.
    pub bootstrap: Vec<String>,
}

impl Node {
    /// Starts a node. `bootstrap` has addresses besides those of the settings.
    pub async fn start(
        settings: &Settings,
        data: &DataFolder,
        name: &'static str,
        bootstrap: &[String],
    ) -> anyhow::Result<Self> {
        let key = data.node_key(name)?;
        let options = Options {
            listen: settings.network.listen,
            bootstrap: settings.network.and(bootstrap).bootstrap_addresses().await?,
            known: KnownPeers::read(&data.known_peers(name)),
            public_address: settings.network.public_address,
            is_client: false,
        };
        let start = async |listen| HyperswarmTransport::start(Options { listen, ..options.clone() }, &key).await;
        let network = at_last_port(settings.network.listen, data.listen_address(name), start).await?;
        let address = network.local_address();
        let local = if address.ip().is_unspecified() { Ipv4Addr::LOCALHOST } else { *address.ip() };
        data.write_listen_address(name, SocketAddrV4::new(local, address.port()))?;
        Ok(Self { key, name, network, settings: settings.network.clone(), data: data.clone() })
    }

    pub fn public_key(&self) -> PublicKey {
        self.key.public_key()
    }

    /// Returns the node's transport, for services.
    pub fn transport(&self) -> Arc<dyn Transport> {
        self.network.clone()
    }

    /// Returns the UDP address at which other machines reach this node, as far as it can tell.
    pub fn address(&self) -> SocketAddrV4 {
        self.network.reachable_address()
    }

    /// Returns the bootstrap addresses, each with whether it responds.
    pub async fn reachable(&self, bootstrap: &[String]) -> anyhow::Result<Vec<(SocketAddrV4, bool)>> {
        let addresses = self.settings.and(bootstrap).bootstrap_addresses().await?;
        let checks = addresses.iter().map(async |address| (*address, self.network.responds(*address).await));
        Ok(join_all(checks).await)
    }

    /// Saves the known peers from time to time, so that the node finds them again without a bootstrap node.
    pub async fn keep_peers(&self, stop: &CancellationToken) {
        let mut wait = KEEP_FIRST;
        while stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_some() {
            self.keep_peers_now();
            wait = KEEP_EVERY;
        }
    }

    fn keep_peers_now(&self) {
        let known = self.network.known_peers();
        let path = self.data.known_peers(self.name);
        // If no peer is known now, what an earlier run saved is better than nothing.
        if known != KnownPeers::default()
            && let Err(error) = known.write(&path)
        {
            warn!(%error, path = %path.display(), "could not write the known peers down");
        }
    }

    /// Takes the node off the network.
    pub async fn stop(&self) {
        self.keep_peers_now();
        self.network.stop().await;
    }

    /// Returns the node's membership in its pool. The error explains how to enrol it.
    pub fn membership(&self, clock: Arc<dyn Clock>) -> anyhow::Result<Membership> {
        let path = self.data.enrolment(self.name);
        let enrolment = enrolment(&self.data, self.name)?;
        Ok(enrolment.membership(&path, self.public_key(), clock)?)
    }
}

/// Starts a node. If it may take any port, prefers its last one, at which other nodes know it.
pub async fn at_last_port<T>(
    listen: SocketAddrV4,
    last: Option<SocketAddrV4>,
    start: impl AsyncFn(SocketAddrV4) -> io::Result<T>,
) -> anyhow::Result<T> {
    if let (0, Some(last)) = (listen.port(), last) {
        match start(SocketAddrV4::new(*listen.ip(), last.port())).await {
            Ok(started) => return Ok(started),
            Err(error) => {
                warn!(%error, "UDP port {} of the last start cannot be had; others may have to search for this node", last.port());
            }
        }
    }
    start(listen)
        .await
        .with_context(|| format!("could not listen on UDP {listen}; choose another address with --listen"))
}

/// Reads a node's enrolment. The error explains how to enrol it.
pub fn enrolment(data: &DataFolder, name: &str) -> anyhow::Result<Enrolment> {
    match Enrolment::load(&data.enrolment(name))? {
        Some(enrolment) => Ok(enrolment),
        None => bail!(
            "this {name} belongs to no network; run `tether invite --role {name}` on the registry's machine, and the \
             line that it prints here"
        ),
    }
}

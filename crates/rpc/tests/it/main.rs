//! Calls and streams between nodes, most of them on a memory network.

mod artifacts;
mod calls;
mod connections;
mod crowds;
mod hostile;
mod hyperswarm;
mod limits;
mod membership;
mod streams;
mod versions;

use std::sync::Arc;
use std::time::Duration;

use protocol::control::{NodeInfo, NodeRole};
use protocol::signature::NodeKey;
use tether_rpc::{Client, MemoryNetwork, Server, StreamOptions, Transport};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A server and a client on one network.
struct Pair {
    network: MemoryNetwork,
    server: Arc<dyn Transport>,
    client: Client,
    stop: CancellationToken,
    tasks: TaskTracker,
}

fn info() -> NodeInfo {
    NodeInfo { roles: vec![NodeRole::Worker], region: "local".parse().expect("region"), version: "0".into() }
}

fn pair(build: impl FnOnce(Server) -> Server) -> Pair {
    let network = MemoryNetwork::new();
    let server = network.node(&NodeKey::from_seed(&[1; 32]));
    let client = Client::new(network.node(&NodeKey::from_seed(&[2; 32])));
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    tasks.spawn(build(Server::new(server.clone(), info())).run(stop.clone(), Duration::from_secs(1)));
    Pair { network, server, client, stop, tasks }
}

fn options() -> StreamOptions {
    StreamOptions {
        accept_within: Duration::from_millis(500),
        deadline: Some(Duration::from_mins(1)),
        stall: Duration::from_secs(10),
    }
}

//! A thousand workers in one process, as an orchestrator sees them: each has a key, a certificate, a UDP socket and a
//! connection of its own, introduces itself, and reports every five seconds. None of them runs anything.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use protocol::control::{Empty, NODE_DESCRIBE, NodeInfo, PRESENCE_REPORT};
use protocol::health::{self, CachedModel, Capacity, EXPIRY, HEARTBEAT, HealthReport, ModelState};
use protocol::signature::{NodeKey, Signed};
use protocol::{Clock as _, PublicKey, codec};
use rpc::transport::hyperswarm::{HyperswarmTransport, KnownPeers, Options};
use rpc::{Client, Membership, SystemClock};
use serde::{Deserialize, Serialize};
use tether_cli::commands::async_runtime;
use tether_cli::tiny_model;
use tokio::task::JoinSet;
use tokio::time;

/// How often a worker asks the nodes it found what they are, as `rpc::announce` does.
const DESCRIBE_EVERY: Duration = Duration::from_secs(2);
const DEADLINE: Duration = Duration::from_secs(10);

/// What the process of the fleet is told.
#[derive(Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) pool: PublicKey,
    pub(crate) orchestrator: PublicKey,
    pub(crate) address: std::net::SocketAddrV4,
    /// Whether each worker also asks the orchestrator every two seconds what it is, as workers do.
    pub(crate) describes: bool,
    pub(crate) workers: Vec<Recruit>,
}

/// One worker: the seed of its key in hex, and its certificate.
#[derive(Serialize, Deserialize)]
pub(crate) struct Recruit {
    pub(crate) seed: protocol::Digest,
    pub(crate) certificate: Signed,
}

/// Runs the fleet of a plan until the process is ended.
pub(crate) fn run(plan: &Path) {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let all = rustix::process::Rlimit { current: files.maximum, maximum: files.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, all).unwrap();
    let plan: Plan = serde_json::from_slice(&std::fs::read(plan).unwrap()).unwrap();
    async_runtime(1).unwrap().block_on(async move {
        let Plan { pool, orchestrator, address, describes, workers } = plan;
        let mut tasks = JoinSet::new();
        // Spread over one heartbeat, as they would be.
        let gap = HEARTBEAT / workers.len() as u32;
        for Recruit { seed, certificate } in workers {
            let key = NodeKey::from_seed(&seed.0);
            tasks.spawn(work(key, pool, certificate, orchestrator, address, describes));
            time::sleep(gap.max(Duration::from_millis(10))).await;
        }
        tasks.join_all().await;
    });
}

async fn work(
    key: NodeKey,
    pool: PublicKey,
    certificate: Signed,
    orchestrator: PublicKey,
    address: std::net::SocketAddrV4,
    describes: bool,
) {
    let options = Options {
        listen: "127.0.0.1:0".parse().unwrap(),
        bootstrap: vec![address],
        known: KnownPeers { nodes: vec![], peers: [(orchestrator, vec![address])].into() },
        public_address: None,
        is_client: true,
    };
    let transport = HyperswarmTransport::start(options, &key).await.unwrap();
    let membership = Membership::new(pool, key.public_key(), certificate, Arc::new(SystemClock)).unwrap();
    let client = Client::new(transport).with_membership(membership);
    let reporting = async {
        let mut ticks = time::interval(HEARTBEAT);
        for seq in 1.. {
            ticks.tick().await;
            let body = String::from_utf8(codec::encode(&report(&key, seq))).unwrap();
            let signed = key.sign(health::KIND, body);
            if let Err(error) = client.call::<_, Empty>(orchestrator, PRESENCE_REPORT, &signed, DEADLINE).await {
                eprintln!("a report was not taken: {error}");
            }
        }
    };
    let describing = async {
        if !describes {
            return;
        }
        let mut ticks = time::interval(DESCRIBE_EVERY);
        loop {
            ticks.tick().await;
            if let Err(error) = client.call::<_, NodeInfo>(orchestrator, NODE_DESCRIBE, &Empty {}, DEADLINE).await {
                eprintln!("the orchestrator did not say what it is: {error}");
            }
        }
    };
    tokio::join!(reporting, describing);
}

fn report(key: &NodeKey, seq: u64) -> HealthReport {
    let (worker_id, issued_at) = (key.public_key(), SystemClock.now());
    HealthReport {
        v: 1,
        worker_id,
        pub_key: worker_id,
        region: "local".parse().unwrap(),
        gpu_class: "cpu".to_owned(),
        vram_gb: 0,
        accelerators: vec!["avx2".to_owned(), "avx512-vnni".to_owned()],
        capacity: Capacity { slots: 4, running: 0, waiting: 0, queue_max: 64 },
        supported: vec![tiny_model::key()],
        to_fetch: vec![],
        adapters: vec![],
        pinned: vec![],
        model_cache: vec![CachedModel {
            tokens_per_second: 123.4,
            ..CachedModel::new(tiny_model::key(), tiny_model::digest(), ModelState::Ready)
        }],
        latency_hops: 0,
        draining: false,
        activity: protocol::health::Activity::Accepting,
        continues: true,
        epoch: 1,
        seq,
        issued_at,
        not_after: issued_at.after(EXPIRY),
    }
}

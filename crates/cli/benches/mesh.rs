//! What a network of processes costs: `cargo bench -p tether --bench mesh`, or with the names of some figures behind
//! `--`: `latency chunks fleet idle`.
//!
//! This file runs itself again as each node. Bootstrap node, registry, orchestrator and gateway are the program as it
//! is; the worker holds a mock engine of fixed pace. They speak over Hyperswarm on loopback.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "support/baseline.rs"]
mod baseline;
#[path = "support/client.rs"]
mod client;
#[path = "support/fleet.rs"]
mod fleet;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{LoadOptions, MockRuntime, ModelRuntime};
use metadata_store::RegistryStore;
use protocol::control::{Fleet, NodeRole};
use protocol::health::ModelState;
use protocol::signature::{NodeKey, Signed};
use registry::{CertificateAuthority, CertificateAuthorityParts, Grant};
use rpc::{Enrolment, SystemClock};
use tether_cli::args::Common;
use tether_cli::client::GatewayClient;
use tether_cli::commands::async_runtime;
use tether_cli::data_folder::DataFolder;
use tether_cli::metrics::Metrics;
use tether_cli::node::Node;
use tether_cli::processes::Processes;
use tether_cli::services::{Services, open_job_store, open_registry_store};
use tether_cli::settings::{self, Env};

use baseline::{cpu_of, direct, mock, mock_alone, percentile, tiny_artifact, two_commits};
use client::{Client, run_clients};
use fleet::{Plan, Recruit};

// As the program has it: memory is part of what is measured.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 1000;
const WARM_UP: usize = 100;
/// Between two tokens of the mock engine, where chunks are counted.
const PACE: Duration = Duration::from_millis(2);
/// The nodes that a request passes.
const HOPS: [&str; 3] = ["gateway", "orchestrator", "worker"];
const FLEET: u32 = 1000;
const READY: Duration = Duration::from_mins(1);
const SETTINGS: &str = "[gateway]\nbind = \"127.0.0.1:0\"\nconnections_per_address_max = 0\n\
                        [gateway.rate_limit]\nrequests_per_minute = 0\n[worker]\nslots = 128\n";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--with-parent") {
        let signal = Some(rustix::process::Signal::TERM);
        rustix::process::set_parent_process_death_signal(signal).unwrap();
    }
    match arguments.first().map(String::as_str) {
        Some("worker") => work(&arguments),
        Some("fleet-of") => fleet::run(Path::new(&arguments[1])),
        Some("bootstrap" | "registry" | "orchestrator" | "gateway") => return tether_cli::commands::main(),
        _ => measure(&arguments),
    }
    ExitCode::SUCCESS
}

fn measure(arguments: &[String]) {
    let chosen = |name: &str| {
        let mut names = arguments.iter().filter(|argument| !argument.starts_with("--")).peekable();
        names.peek().is_none() || names.any(|argument| argument == name)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    println!("one process a node, over Hyperswarm on loopback; figures are medians unless they say otherwise\n");
    if chosen("latency") {
        latency(&runtime, &folder.path().join("latency"));
    }
    if chosen("chunks") {
        chunks(&runtime, folder.path());
    }
    if chosen("idle") {
        idle(&runtime, &folder.path().join("idle"));
    }
    if chosen("fleet") {
        for describes in [false, true] {
            a_thousand_workers(&runtime, &folder.path().join(format!("fleet-{describes}")), describes);
        }
    }
}

/// A network of processes on this machine.
struct Mesh {
    processes: Processes,
    address: String,
    key: String,
}

impl Mesh {
    /// Starts bootstrap node, registry, orchestrator and gateway, and a worker of a pace.
    async fn start(folder: &Path, pace: Duration) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let settings = folder.join("tether.toml");
        std::fs::write(&settings, SETTINGS).unwrap();
        let settings = settings.to_str().unwrap();
        let mut processes = Processes::below(folder).unwrap();
        let common = ["--listen", "127.0.0.1:0", "--config", settings];
        processes.start("bootstrap", &[&["bootstrap"], &common[..]].concat()).unwrap();
        let bootstrap = processes.listening("bootstrap", "bootstrap").await.unwrap().to_string();
        let enrolments = ["orchestrator", "gateway", "worker"];
        enrol(&processes, &enrolments, &bootstrap).await;
        let common = [&common[..], &["--bootstrap", &bootstrap]].concat();
        for role in ["registry", "orchestrator", "gateway"] {
            processes.start(role, &[&[role], &common[..]].concat()).unwrap();
        }
        let pace = pace.as_micros().to_string();
        processes.start("worker", &["worker", "--config", settings, "--pace", &pace]).unwrap();
        let url = processes.wait_for("gateway", READY, DataFolder::address).await.unwrap();
        let key = processes.wait_for("registry", READY, |data| data.api_key().filter(|key| !key.is_empty()));
        let key = key.await.unwrap();
        let mut mesh = Self { processes, address: url.trim_start_matches("http://").to_owned(), key };
        mesh.wait_for_workers(1).await;
        mesh
    }

    /// Waits until as many workers are ready.
    async fn wait_for_workers(&mut self, count: usize) {
        let client = GatewayClient::new(format!("http://{}", self.address), Some(self.key.clone())).unwrap();
        let deadline = Instant::now() + READY;
        loop {
            let fleet: Result<Fleet, _> = client.get("/admin/v1/nodes").await;
            let ready = fleet.iter().flat_map(|fleet| &fleet.workers);
            let ready = ready.filter(|worker| worker.report.model_cache.iter().any(|m| m.state == ModelState::Ready));
            let ready = ready.count();
            if ready >= count {
                return;
            }
            for name in HOPS.iter().chain(&["registry"]) {
                self.processes.check(name).unwrap();
            }
            assert!(Instant::now() < deadline, "{ready} of {count} workers are ready");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn pid(&self, name: &str) -> u32 {
        self.processes.pid(name).unwrap()
    }

    /// CPU seconds of each node that a request passes.
    fn cpu(&self) -> [f64; 3] {
        HOPS.map(|name| cpu_of(self.pid(name)))
    }

    fn client(&self) -> Client {
        Client::connect(&self.address, &self.key)
    }

    fn run_clients(&self, clients: usize, requests: usize, tokens: u32, stream: bool) -> usize {
        run_clients(&self.address, &self.key, clients, requests, tokens, stream)
    }
}

/// Makes nodes members of the registry's network, as its operator may, before it runs.
async fn enrol(processes: &Processes, roles: &[&'static str], bootstrap: &str) {
    let data = processes.data("registry");
    data.create().unwrap();
    let (authority, registry, store) = authority(&data);
    let revocations = authority.revocations().await.unwrap();
    for name in roles {
        let own = processes.data(name);
        own.create().unwrap();
        let role = match *name {
            "orchestrator" => NodeRole::Orchestrator,
            "gateway" => NodeRole::Gateway,
            _ => NodeRole::Worker,
        };
        let certificate = authority.certify(own.node_key(name).unwrap().public_key(), Grant::of(role, *name));
        let enrolment = Enrolment {
            pool: authority.pool(),
            registry: registry.public_key(),
            bootstrap: vec![bootstrap.to_owned()],
            certificate: certificate.await.unwrap(),
            revocations: revocations.clone(),
        };
        enrolment.save(&own.enrolment(name)).unwrap();
    }
    store.close().await.unwrap();
}

fn authority(data: &DataFolder) -> (CertificateAuthority, NodeKey, Arc<dyn RegistryStore>) {
    let store = open_registry_store(&data.registry_store()).unwrap();
    let registry = data.node_key("registry").unwrap();
    let (root, pepper) = (data.root_key().unwrap(), data.pepper().unwrap());
    let parts =
        CertificateAuthorityParts::new(root, store.clone(), Arc::new(SystemClock), pepper, registry.public_key());
    (CertificateAuthority::new(parts), registry, store)
}

/// Runs a worker over a mock engine until the process is ended.
fn work(arguments: &[String]) {
    let argument = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name).unwrap();
        arguments[at + 1].clone()
    };
    let (folder, config) = (PathBuf::from(argument("--data-dir")), PathBuf::from(argument("--config")));
    let pace = Duration::from_micros(argument("--pace").parse().unwrap());
    let common = Common { config: Some(config), data_dir: Some(folder.clone()), ..Common::default() };
    let settings = settings::load(&common, &Env::default(), &[("network.listen", "127.0.0.1:0".into())]).unwrap();
    let data = DataFolder::at(folder);
    async_runtime(settings.threads).unwrap().block_on(async {
        let bootstrap = Enrolment::load(&data.enrolment("worker")).unwrap().unwrap().bootstrap;
        let node = Node::start(&settings, &data, "worker", &bootstrap).await.unwrap();
        let services = Services { settings, data: data.clone(), metrics: Metrics::new(), clock: Arc::new(SystemClock) };
        let (epoch, membership) =
            (data.next_epoch("worker", 0).unwrap(), node.membership(Arc::new(SystemClock)).unwrap());
        let runtime: Arc<dyn ModelRuntime> = Arc::new(MockRuntime::new(mock(pace)));
        let worker = services.worker(node.transport(), &node.key, epoch, membership, runtime).unwrap();
        worker.run(tokio_util::sync::CancellationToken::new()).await;
    });
}

/// Latency of one client's requests, beside the store's two commits and the mock itself.
fn latency(runtime: &tokio::runtime::Runtime, folder: &Path) {
    let mut mesh = runtime.block_on(Mesh::start(folder, Duration::ZERO));
    let mut client = mesh.client();
    let store = open_job_store(&folder.join("baseline.db")).unwrap();
    let engine = MockRuntime::new(mock(Duration::ZERO));
    let loaded = runtime.block_on(engine.load(tiny_artifact(), LoadOptions::default(), engine::no_progress())).unwrap();
    let mut times: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for round in 0..WARM_UP + ROUNDS {
        let whole = client.ask(1, false).total;
        let streamed = client.ask(1, true).first;
        let (reserve, finalise) = runtime.block_on(two_commits(&*store, round as u128 + 1));
        let alone = runtime.block_on(direct(&engine, loaded.id));
        if round >= WARM_UP {
            for (name, time) in [
                ("whole", whole),
                ("streamed", streamed),
                ("reserve", reserve),
                ("both", reserve + finalise),
                ("alone", alone),
            ] {
                times.entry(name).or_default().push(time);
            }
        }
    }
    let row = |name: &str, label: &str| {
        let [least, p50, p99] = [0, 50, 99].map(|percent| percentile(&times[name], percent));
        println!("{label:<32}{p50:>8.3} ms   least {least:.3}, p99 {p99:.3}");
    };
    let median = |name: &str| percentile(&times[name], 50);
    row("whole", "non-streamed request");
    row("both", "  two durable commits");
    row("alone", "  the mock engine alone");
    let added = median("whole") - median("both") - median("alone");
    println!("  ADDED beside them             {added:>8.3} ms   (bar 1)");
    row("streamed", "time to first token, streamed");
    row("reserve", "  the reserving commit");
    println!("  ADDED in all                  {:>8.3} ms\n", median("streamed") - median("alone"));
    runtime.block_on(mesh.processes.stop()).unwrap();
}

/// CPU time of the nodes that an answer passes.
fn chunks(runtime: &tokio::runtime::Runtime, folder: &Path) {
    const TOKENS: u32 = 400;
    for streams in [1, 8, 64] {
        let folder = folder.join(format!("chunks-{streams}"));
        let mut mesh = runtime.block_on(Mesh::start(&folder, PACE));
        let rounds = if streams == 1 { 5 } else { 3 };
        mesh.run_clients(streams, 2, 50, true);
        let before = mesh.cpu();
        let requests = streams * if streams == 1 { 200 } else { 10 };
        mesh.run_clients(streams, requests / streams, 1, false);
        let between = mesh.cpu();
        let events = mesh.run_clients(streams, rounds, TOKENS, true);
        let after = mesh.cpu();
        let per_request = [0, 1, 2].map(|hop| (between[hop] - before[hop]) / requests as f64);
        let per_chunk = [0, 1, 2].map(|hop| {
            (after[hop] - between[hop] - per_request[hop] * (streams * rounds) as f64) / events as f64 * 1e6
        });
        let alone = mock_alone(streams, TOKENS, PACE) * 1e6;
        let micros = |seconds: [f64; 3]| seconds.iter().sum::<f64>() * 1e6;
        println!("CPU a request, {streams:>2} at once       {:>8.0} µs", micros(per_request));
        let [gateway, orchestrator, worker] = per_chunk;
        println!(
            "CPU a chunk, {streams:>2} streams         {:>8.1} µs   gateway {gateway:.1}, orchestrator {orchestrator:.1}, \
             worker {worker:.1}",
            per_chunk.iter().sum::<f64>()
        );
        println!("  the mock engine alone         {alone:>8.1} µs");
        let bar = if streams == 64 { "   (bar 60)" } else { "" };
        println!("  ADDED over three hops         {:>8.1} µs{bar}", per_chunk.iter().sum::<f64>() - alone);
        runtime.block_on(mesh.processes.stop()).unwrap();
    }
    println!();
}

/// Memory and CPU time of each node while nobody asks anything.
fn idle(runtime: &tokio::runtime::Runtime, folder: &Path) {
    const SETTLE: Duration = Duration::from_secs(10);
    const WATCHED: Duration = Duration::from_secs(20);
    let mut mesh = runtime.block_on(Mesh::start(folder, PACE));
    std::thread::sleep(SETTLE);
    let names = ["bootstrap", "registry", "orchestrator", "gateway", "worker"];
    let before = names.map(|name| whole_cpu_of(mesh.pid(name)));
    std::thread::sleep(WATCHED);
    for (name, before) in names.into_iter().zip(before) {
        let pid = mesh.pid(name);
        let share = (whole_cpu_of(pid) - before) / WATCHED.as_secs_f64() * 100.0;
        println!("idle {name:<14}{:>8.1} MB   {share:.2} % of a core", megabytes_of(pid));
    }
    println!();
    runtime.block_on(mesh.processes.stop()).unwrap();
}

/// An orchestrator with a thousand live workers.
fn a_thousand_workers(runtime: &tokio::runtime::Runtime, folder: &Path, describes: bool) {
    const WATCHED: Duration = Duration::from_secs(20);
    let mut mesh = runtime.block_on(Mesh::start(folder, PACE));
    let pid = mesh.pid("orchestrator");
    let alone = megabytes_of(pid);
    let data = mesh.processes.data("orchestrator");
    let plan = Plan {
        pool: Enrolment::load(&data.enrolment("orchestrator")).unwrap().unwrap().pool,
        orchestrator: data.node_key("orchestrator").unwrap().public_key(),
        address: data.listen_address("orchestrator").unwrap(),
        describes,
        workers: recruits(&mesh.processes.data("registry")),
    };
    let path = folder.join("plan.json");
    std::fs::write(&path, serde_json::to_vec(&plan).unwrap()).unwrap();
    mesh.processes.start("fleet", &["fleet-of", path.to_str().unwrap()]).unwrap();
    runtime.block_on(mesh.wait_for_workers(FLEET as usize + 1));
    std::thread::sleep(Duration::from_secs(10));
    let before = whole_cpu_of(pid);
    std::thread::sleep(WATCHED);
    let share = (whole_cpu_of(pid) - before) / WATCHED.as_secs_f64() * 100.0;
    runtime.block_on(mesh.wait_for_workers(FLEET as usize + 1));
    let what = if describes { "reports, and asks what it is" } else { "reports alone" };
    println!("orchestrator with {FLEET} workers: {what}");
    println!("  memory                        {:>8.1} MB   (bar 150; {alone:.1} without them)", megabytes_of(pid));
    println!("  CPU                           {share:>8.2} % of a core   (bar 10)");
    let complaints = std::fs::read_to_string(folder.join("fleet/log")).unwrap_or_default();
    println!("  complaints of the workers     {:>8}", complaints.lines().count());
    if let Some(first) = complaints.lines().next() {
        println!("    {first}");
    }
    let _ = mesh.processes.kill("fleet");
    runtime.block_on(mesh.processes.stop()).unwrap();
}

/// Certified workers. Their seeds count up: nobody else uses this pool.
fn recruits(registry: &DataFolder) -> Vec<Recruit> {
    let root = registry.root_key().unwrap();
    (1..=FLEET)
        .map(|number| {
            let mut seed = [7; 32];
            seed[..4].copy_from_slice(&number.to_le_bytes());
            let certificate = certificate(&root, NodeKey::from_seed(&seed), u64::from(number) + 1_000);
            Recruit { seed: protocol::Digest(seed), certificate }
        })
        .collect()
}

fn certificate(root: &NodeKey, worker: NodeKey, serial: u64) -> Signed {
    use protocol::Clock as _;
    use protocol::membership::{CERTIFICATE_LIFE, Certificate, certificate};
    let now = SystemClock.now();
    let certificate = Certificate {
        v: certificate::VERSION,
        serial,
        pool: root.public_key(),
        public_key: worker.public_key(),
        roles: vec![NodeRole::Worker],
        regions: vec![],
        models: vec![],
        not_before: now,
        not_after: now.after(CERTIFICATE_LIFE),
    };
    certificate.sign(root)
}

/// CPU seconds a process has used, threads that have ended included, in steps of the kernel's clock.
fn whole_cpu_of(process: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ticks as f64 / 100.0
}

/// Resident memory of a process.
fn megabytes_of(process: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0 / 1e6
}

//! What the network costs a request: `cargo bench -p tether --bench network`.
//!
//! The network runs in a process of its own over a mock engine of fixed pace, so that its CPU time can be told from
//! the client's. Each figure stands beside what it is compared with, taken in turns in the same run.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "support/baseline.rs"]
mod baseline;
#[path = "support/client.rs"]
mod client;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use engine::{LoadOptions, MockRuntime, ModelRuntime};
use tether_cli::commands::async_runtime;
use tether_cli::data_folder::DataFolder;
use tether_cli::network::{Network, Supplies};
use tether_cli::services::open_job_store;
use tether_cli::settings::Settings;
use tokio_util::sync::CancellationToken;

use baseline::{cpu_of, direct, mock, mock_alone, percentile, tiny_artifact, two_commits};
use client::{Client, run_clients};

const ROUNDS: usize = 1500;
const WARM_UP: usize = 200;
/// Between two tokens of the mock engine, where chunks are counted.
const PACE_US: u64 = 2000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, serve, folder, pace] = &arguments[..]
        && serve == "serve"
    {
        return serve_network(Path::new(folder), pace.parse().unwrap());
    }
    let folder = tempfile::tempdir().unwrap();
    println!("figures are medians unless they say otherwise; {ROUNDS} rounds, one client\n");
    one_client(folder.path());
    println!();
    cpu(folder.path());
}

fn serve_network(folder: &Path, pace_us: u64) {
    let runtime = async_runtime(0).unwrap();
    runtime.block_on(async {
        let mut settings = Settings::default();
        settings.gateway.bind.set_port(0);
        settings.gateway.rate_limit.requests_per_minute = 0;
        settings.worker.slots = 128;
        // All clients of the benchmark have one address.
        settings.gateway.connections_per_address_max = 0;
        let make = || -> anyhow::Result<Arc<dyn ModelRuntime>> {
            Ok(Arc::new(MockRuntime::new(mock(Duration::from_micros(pace_us)))))
        };
        let supplies = Supplies { runtime: &make, models: vec![] };
        let network = Network::start(&settings, &DataFolder::at(folder), supplies).await.unwrap();
        network.ready().await.unwrap();
        println!("{} {}", network.address, network.api_key);
        // Until the parent closes our stdin.
        let stop = CancellationToken::new();
        let waiter = stop.clone();
        std::thread::spawn(move || {
            let _ = std::io::stdin().read(&mut [0]);
            waiter.cancel();
        });
        stop.cancelled().await;
        network.stop().await.unwrap();
    });
}

/// A network in a process of its own.
struct Server {
    child: Child,
    address: String,
    key: String,
}

impl Server {
    fn start(folder: &Path, pace_us: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["serve".as_ref(), folder.as_os_str(), pace_us.to_string().as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (address, key) = line.trim().split_once(' ').unwrap();
        Self { address: address.to_owned(), key: key.to_owned(), child }
    }

    fn cpu(&self) -> f64 {
        cpu_of(self.child.id())
    }

    fn client(&self) -> Client {
        Client::connect(&self.address, &self.key)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Latency of one client's requests, beside the store's two commits and the mock itself.
fn one_client(folder: &Path) {
    let server = Server::start(&folder.join("one"), 0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut client = server.client();
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
    let longest = times["whole"].iter().chain(&times["streamed"]).max().copied().unwrap();
    let stalls = times["whole"].iter().chain(&times["streamed"]).filter(|time| time.as_millis() >= 40).count();
    let median = |name: &str| percentile(&times[name], 50);
    let percentile_99 = |name: &str| percentile(&times[name], 99);
    println!("non-streamed request            {:>8.3} ms   p99 {:.3}", median("whole"), percentile_99("whole"));
    println!("  two durable commits           {:>8.3} ms   p99 {:.3}", median("both"), percentile_99("both"));
    println!("  the mock engine alone         {:>8.3} ms", median("alone"));
    println!(
        "  ADDED beside them             {:>8.3} ms   (bar 0.3)",
        median("whole") - median("both") - median("alone")
    );
    println!("time to first token, streamed   {:>8.3} ms   p99 {:.3}", median("streamed"), percentile_99("streamed"));
    println!("  the reserving commit          {:>8.3} ms", median("reserve"));
    println!("  ADDED in all                  {:>8.3} ms   (bar 1)", median("streamed") - median("alone"));
    println!(
        "requests of 40 ms and more      {stalls:>8} of {}, longest {:.1} ms",
        ROUNDS * 2,
        longest.as_secs_f64() * 1e3
    );
}

/// CPU time of the network's process, with several clients at once.
fn cpu(folder: &Path) {
    const CLIENTS: usize = 8;
    const REQUESTS: usize = 500;
    const TOKENS: u32 = 400;
    let server = Server::start(&folder.join("cpu"), 0);
    run_clients(&server.address, &server.key, CLIENTS, 50, 1, false);
    let before = server.cpu();
    run_clients(&server.address, &server.key, CLIENTS, REQUESTS, 1, false);
    let per_request = (server.cpu() - before) / (CLIENTS * REQUESTS) as f64;
    println!("CPU a request, {CLIENTS} clients       {:>8.0} µs   (bar 300)", per_request * 1e6);
    drop(server);

    for streams in [1, 64] {
        let server = Server::start(&folder.join(format!("cpu{streams}")), PACE_US);
        run_clients(&server.address, &server.key, streams, 1, 50, true);
        let before = server.cpu();
        let events = run_clients(&server.address, &server.key, streams, 3, TOKENS, true);
        let per_chunk = (server.cpu() - before - per_request * (streams * 3) as f64) / events as f64 * 1e6;
        let alone = mock_alone(streams, TOKENS, Duration::from_micros(PACE_US)) * 1e6;
        println!("CPU a chunk, {streams:>2} streams         {per_chunk:>8.1} µs");
        println!("  the mock engine alone         {alone:>8.1} µs");
        println!("  ADDED                         {:>8.1} µs   (bar 15)", per_chunk - alone);
    }
}

//! What the network costs a request: `cargo bench -p tether --bench network`.
//!
//! The network runs in a process of its own over a mock engine of fixed pace, so that its CPU time can be told from
//! the client's. Each figure stands beside what it is compared with, taken in turns in the same run.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{GenerateRequest, LoadOptions, MockOptions, MockRuntime, ModelRuntime, PromptInput, Sampling};
use metadata_store::{JobKey, MetadataStore, NewJob, Settlement, TerminalState};
use protocol::{CorrelationId, PublicKey, TraceId, UnixMillis};
use tether_cli::commands::async_runtime;
use tether_cli::data_folder::DataFolder;
use tether_cli::network::{Network, Supplies, open_store};
use tether_cli::settings::Settings;
use tether_cli::tiny_model;
use tokio_util::sync::CancellationToken;

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

/// Mock answers: nothing to wait for, so that all time is the network's.
fn mock(pace: Duration) -> MockOptions {
    MockOptions {
        first_token: Duration::ZERO,
        per_token: pace,
        tokens: 10_000,
        context_length: 100_000,
        ..MockOptions::default()
    }
}

fn serve_network(folder: &Path, pace_us: u64) {
    let runtime = async_runtime(0).unwrap();
    runtime.block_on(async {
        let mut settings = Settings::default();
        settings.gateway.bind.set_port(0);
        settings.gateway.rate_limit.requests_per_minute = 0;
        settings.worker.slots = 128;
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
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { reader: BufReader::new(stream.try_clone().unwrap()), stream, key: self.key.clone() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// A client that does as little as a client can, over one kept-alive connection.
struct Client {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
    key: String,
}

struct Heard {
    first: Duration,
    total: Duration,
    events: usize,
    longest_gap: Duration,
}

impl Client {
    fn ask(&mut self, tokens: u32, stream: bool) -> Heard {
        let body = format!(
            r#"{{"model":"tether-tiny","messages":[{{"role":"user","content":"hello there"}}],"max_tokens":{tokens},"stream":{stream}}}"#
        );
        let began = Instant::now();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.key,
            body.len()
        );
        self.stream.write_all(head.as_bytes()).unwrap();
        let mut line = String::new();
        let mut length = None;
        loop {
            line.clear();
            self.reader.read_line(&mut line).unwrap();
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                length = Some(value.trim().parse::<usize>().unwrap());
            }
            assert!(!line.starts_with("HTTP/1.1") || line.contains(" 200 "), "{line}");
            if line == "\r\n" {
                break;
            }
        }
        let mut heard = Heard { first: began.elapsed(), total: Duration::ZERO, events: 0, longest_gap: Duration::ZERO };
        if let Some(length) = length {
            let mut body = vec![0; length];
            self.reader.read_exact(&mut body).unwrap();
        } else {
            self.read_events(began, &mut heard);
        }
        heard.total = began.elapsed();
        heard
    }

    fn read_events(&mut self, began: Instant, heard: &mut Heard) {
        let mut last = began;
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line).unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            self.reader.read_exact(&mut chunk).unwrap();
            if size == 0 {
                return;
            }
            let text = std::str::from_utf8(&chunk).unwrap();
            let contents = text.matches("\"delta\":{\"content\":\"").count();
            if contents > 0 {
                let now = Instant::now();
                if heard.events == 0 {
                    heard.first = began.elapsed();
                } else {
                    heard.longest_gap = heard.longest_gap.max(now - last);
                }
                last = now;
                heard.events += contents;
            }
        }
    }
}

/// CPU seconds a process has used, from the scheduler's own count of nanoseconds.
fn cpu_of(process: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let nanoseconds = |task: std::fs::DirEntry| -> u64 {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0)
    };
    tasks.flatten().map(nanoseconds).sum::<u64>() as f64 / 1e9
}

/// Latency of one client's requests, beside the store's two commits and the mock itself.
fn one_client(folder: &Path) {
    let server = Server::start(&folder.join("one"), 0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut client = server.client();
    let store = open_store(&folder.join("baseline.db")).unwrap();
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
    run_clients(&server, CLIENTS, 50, 1, false);
    let before = server.cpu();
    run_clients(&server, CLIENTS, REQUESTS, 1, false);
    let per_request = (server.cpu() - before) / (CLIENTS * REQUESTS) as f64;
    println!("CPU a request, {CLIENTS} clients       {:>8.0} µs   (bar 300)", per_request * 1e6);
    drop(server);

    for streams in [1, 64] {
        let server = Server::start(&folder.join(format!("cpu{streams}")), PACE_US);
        run_clients(&server, streams, 1, 50, true);
        let before = server.cpu();
        let events = run_clients(&server, streams, 3, TOKENS, true);
        let per_chunk = (server.cpu() - before - per_request * (streams * 3) as f64) / events as f64 * 1e6;
        let alone = mock_alone(streams, TOKENS) * 1e6;
        println!("CPU a chunk, {streams:>2} streams         {per_chunk:>8.1} µs");
        println!("  the mock engine alone         {alone:>8.1} µs");
        println!("  ADDED                         {:>8.1} µs   (bar 15)", per_chunk - alone);
    }
}

/// CPU seconds an event of the mock engine takes by itself.
fn mock_alone(streams: usize, tokens: u32) -> f64 {
    let runtime = async_runtime(0).unwrap();
    runtime.block_on(async {
        let engine = Arc::new(MockRuntime::new(mock(Duration::from_micros(PACE_US))));
        let options = LoadOptions { slots: 128, ..LoadOptions::default() };
        let loaded = engine.load(tiny_artifact(), options, engine::no_progress()).await.unwrap();
        let before = cpu_of(std::process::id());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..streams {
            let engine = engine.clone();
            tasks.spawn(async move {
                let request = GenerateRequest { max_tokens: Some(tokens), ..hello(loaded.id) };
                let mut stream = engine.generate(request).await.unwrap();
                let mut events = 0;
                while stream.next().await.is_some() {
                    events += 1;
                }
                events
            });
        }
        let events: usize = tasks.join_all().await.into_iter().sum();
        (cpu_of(std::process::id()) - before) / events as f64
    })
}

fn run_clients(server: &Server, clients: usize, requests: usize, tokens: u32, stream: bool) -> usize {
    let threads: Vec<_> = (0..clients)
        .map(|_| {
            let mut client = server.client();
            std::thread::spawn(move || (0..requests).map(|_| client.ask(tokens, stream).events).sum::<usize>())
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).sum()
}

async fn two_commits(store: &dyn MetadataStore, number: u128) -> (Duration, Duration) {
    let key = JobKey {
        tenant_id: "bench".parse().unwrap(),
        correlation_id: CorrelationId(uuid::Uuid::from_u128(number)),
        retry_token: "r".parse().unwrap(),
    };
    let worker_id = PublicKey([1; 32]);
    let now = UnixMillis(1);
    let job = NewJob {
        key: key.clone(),
        trace_id: TraceId([1; 16]),
        model: tiny_model::key(),
        region: "local".parse().unwrap(),
        worker_id,
        worker_capacity: 100,
        attempt: 1,
        now,
        lease_until: UnixMillis(u64::from(u32::MAX)),
        request_fingerprint: [0; 32],
    };
    let began = Instant::now();
    store.reserve(job).await.unwrap();
    let reserved = began.elapsed();
    let settlement = Settlement {
        key,
        attempt: 1,
        worker_id,
        state: TerminalState::Completed,
        finish_reason: None,
        error: None,
        usage: None,
        now,
    };
    let began = Instant::now();
    store.finalise(settlement).await.unwrap();
    (reserved, began.elapsed())
}

async fn direct(engine: &MockRuntime, model: engine::ModelId) -> Duration {
    let began = Instant::now();
    let mut stream = engine.generate(hello(model)).await.unwrap();
    while stream.next().await.is_some() {}
    began.elapsed()
}

fn hello(model: engine::ModelId) -> GenerateRequest {
    GenerateRequest {
        model,
        input: PromptInput::Text("hello there".into()),
        sampling: Sampling::default(),
        stop: vec![],
        max_tokens: Some(1),
        ignore_eos: false,
    }
}

fn tiny_artifact() -> engine::VerifiedArtifact {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(tiny_model::BYTES).unwrap();
    let bytes = tiny_model::BYTES.len() as u64;
    engine::VerifiedArtifact { file, sha256: tiny_model::digest().to_string(), bytes }
}

/// Milliseconds.
fn percentile(times: &[Duration], percent: usize) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)].as_secs_f64() * 1e3
}

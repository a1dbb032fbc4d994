//! The whole way, beside the Node packages: connections by key, echoes, large replies, announcements found.
//!
//! `[ANCHOR_THREADS=1] cargo bench -p tether-hyperswarm --bench anchor -- [fast]`
//!
//! Network, server and client are processes of their own, all on this machine. Where Node and `interop/hyperswarm` are
//! installed, its peers measure the same (`anchor.js`) right before and right after, so that neither side has the
//! quieter machine; the last column says how much more, or how much sooner, this crate does it than the better of the
//! two.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used, clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::json;
use tether_hyperswarm::crypto::{KeyPair, PublicKey};
use tether_hyperswarm::hyperdht::{Config, ConnectOptions, HyperDht, ServerOptions};
use tether_hyperswarm::rpc::{Options, Requests, Rpc, decode_buffer, encode_buffer};
use tokio::runtime::{Builder, Runtime};

const NODES: usize = 5;
const BLOB_BYTES: usize = 64 * 1024;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let runtime = runtime();
    match &arguments[..] {
        [role] if role == "network" => runtime.block_on(network()),
        [role, bootstrap] if role == "server" => runtime.block_on(server(bootstrap.parse().unwrap())),
        [role, bootstrap, key, scale] if role == "client" => {
            // A task, as users have it: what `block_on` runs itself is woken across threads.
            let client = runtime.spawn(client(bootstrap.parse().unwrap(), key.clone(), scale.parse().unwrap()));
            println!("{}", json!(runtime.block_on(client).unwrap()));
        }
        _ => compare(if arguments.iter().any(|argument| argument == "fast") { 10 } else { 1 }),
    }
}

/// Each process has one thread for everything with `ANCHOR_THREADS=1`, and otherwise as many as there are processors.
fn runtime() -> Runtime {
    let is_single = std::env::var("ANCHOR_THREADS").is_ok_and(|threads| threads == "1");
    let mut builder = if is_single { Builder::new_current_thread() } else { Builder::new_multi_thread() };
    builder.enable_all().build().unwrap()
}

/// What was measured under one name.
#[derive(Debug, Clone, Default, serde::Serialize, Deserialize)]
#[serde(default)]
struct Measured {
    count: usize,
    p50_ms: f64,
    p99_ms: f64,
    per_second: Option<f64>,
    megabytes_per_second: Option<f64>,
}

type Results = BTreeMap<String, Measured>;

/// The names in the order in which they are measured and shown.
const NAMES: [&str; 6] = [
    "connect_and_echo",
    "echo_sequential",
    "echo_64_in_flight",
    "blob64k_1_in_flight",
    "blob64k_16_in_flight",
    "announce_to_lookup",
];

fn compare(scale: usize) {
    let before = node(scale);
    let rust = rust(scale);
    let after = before.as_ref().and_then(|_| node(scale));
    println!("{:<22} {:>24} {:>24} {:>24} {:>8}", "", "Rust", "Node before", "Node after", "ratio");
    for name in NAMES {
        let of = |results: &Option<Results>| results.as_ref().map(|results| results[name].clone());
        let (own, others) = (rust[name].clone(), [of(&before), of(&after)]);
        let best = others.iter().flatten().map(|other| ratio(&own, other)).reduce(f64::min);
        let columns = others.map(|other| other.map_or_else(String::new, |other| shown(&other)));
        let ratio = best.map_or_else(String::new, |best| format!("{best:.2}"));
        println!("{name:<22} {:>24} {:>24} {:>24} {ratio:>8}", shown(&own), columns[0], columns[1]);
    }
}

/// The measure that counts, and the latency behind it.
fn shown(measured: &Measured) -> String {
    match measured {
        Measured { megabytes_per_second: Some(speed), p50_ms, .. } => format!("{speed:.1} MB/s, p50 {p50_ms:.3}"),
        Measured { per_second: Some(rate), p50_ms, .. } => format!("{rate:.0}/s, p50 {p50_ms:.3}"),
        Measured { p50_ms, p99_ms, .. } => format!("p50 {p50_ms:.2}, p99 {p99_ms:.1} ms"),
    }
}

/// How many times better `own` is.
fn ratio(own: &Measured, other: &Measured) -> f64 {
    match (own.per_second, other.per_second) {
        (Some(own), Some(other)) => own / other,
        _ => other.p50_ms / own.p50_ms,
    }
}

/// Lets the Node packages measure themselves, where they are installed.
fn node(scale: usize) -> Option<Results> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../interop/hyperswarm");
    if !folder.join("node_modules").is_dir() {
        eprintln!("the Node packages are not installed (make interop): nothing to compare with");
        return None;
    }
    let options = json!({ "nodes": NODES, "fast": scale > 1 }).to_string();
    let output =
        Command::new("node").arg(folder.join("anchor.js")).arg(options).stderr(Stdio::inherit()).output().ok()?;
    let measured: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    serde_json::from_value(measured["results"].clone()).ok()
}

/// Runs network, server and client as processes.
fn rust(scale: usize) -> Results {
    let (_network, bootstrap) = Role::start(&["network"]);
    let (mut server, key) = Role::start(&["server", &bootstrap]);
    let client = Command::new(std::env::current_exe().unwrap())
        .args(["client", &bootstrap, &key, &scale.to_string()])
        .stdout(Stdio::piped())
        .stdin(Stdio::piped())
        .spawn();
    let mut client = client.unwrap();
    // The client has the server announce topics, through this process.
    let mut results = None;
    for line in BufReader::new(client.stdout.take().unwrap()).lines().map_while(Result::ok) {
        match line.strip_prefix("announce ") {
            Some(topic) => writeln!(server.stdin, "{topic}").unwrap(),
            None => results = serde_json::from_str(&line).ok(),
        }
    }
    client.wait().unwrap();
    results.expect("the client measured")
}

/// A child process, which ends when its stdin closes.
struct Role {
    child: Child,
    stdin: ChildStdin,
}

impl Role {
    /// Starts a role and returns the first line that it prints.
    fn start(arguments: &[&str]) -> (Self, String) {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let stdin = child.stdin.take().unwrap();
        (Self { child, stdin }, line.trim().to_owned())
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The lines of stdin, read by a thread of their own.
fn lines() -> tokio::sync::mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        std::io::stdin().lines().map_while(Result::ok).try_for_each(|line| sender.send(line)).ok();
    });
    receiver
}

async fn start(bootstrap: &[SocketAddrV4], ephemeral: bool) -> HyperDht {
    let config = Config {
        bind: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0),
        bootstrap: bootstrap.to_vec(),
        ephemeral,
        firewalled: Some(false),
        ..Config::default()
    };
    let dht = HyperDht::start(config).unwrap();
    dht.bootstrapped().await;
    dht
}

async fn network() {
    let mut nodes = vec![start(&[], false).await];
    let first = nodes[0].local_address();
    while nodes.len() < NODES {
        nodes.push(start(&[first], false).await);
    }
    println!("{first}");
    let mut lines = lines();
    while lines.recv().await.is_some() {}
}

async fn server(bootstrap: SocketAddrV4) {
    let dht = start(&[bootstrap], true).await;
    let keys = KeyPair::generate();
    let server = dht.listen(keys.clone(), ServerOptions::default()).await.unwrap();
    let key = keys.public_key();
    println!("{}", hex::encode(key.as_bytes()));
    tokio::spawn(async move {
        while let Some(stream) = server.accept().await {
            let (_, requests) = Rpc::over(stream, key.as_bytes(), &Options::default()).unwrap();
            tokio::spawn(serve(requests));
        }
    });
    let mut lines = lines();
    while let Some(topic) = lines.recv().await {
        dht.announce([topic.parse().unwrap(); 32], &keys, &[]).await.unwrap();
    }
}

async fn serve(requests: Requests) {
    let blob = encode_buffer(&vec![7; BLOB_BYTES]);
    while let Some(request) = requests.next().await {
        if request.method() == "blob64k" {
            request.ok(&blob).ok();
        } else {
            let value = request.value().clone();
            request.ok(&value).ok();
        }
    }
}

async fn client(bootstrap: SocketAddrV4, key: String, scale: usize) -> Results {
    let dht = start(&[bootstrap], true).await;
    let keys = KeyPair::generate();
    let server = PublicKey(hex::decode(key).unwrap().try_into().unwrap());
    let payload = encode_buffer(&[5; 100]);
    let mut results = Results::new();

    let mut connects = Vec::new();
    for _ in 0..50 / scale {
        let start = Instant::now();
        let (rpc, _requests) = connect(&dht, &keys, server).await;
        rpc.request("echo", &payload).await.unwrap();
        connects.push(start.elapsed());
        drop(rpc);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    results.insert("connect_and_echo".into(), summary(connects, None, 0));

    let (rpc, _requests) = connect(&dht, &keys, server).await;
    let (rpc, payload) = (&rpc, &payload);
    let echo = || async move { drop(rpc.request("echo", payload).await.unwrap()) };
    let blob = || async move {
        let answer = rpc.request("blob64k", payload).await.unwrap();
        assert_eq!(decode_buffer(&answer).unwrap().len(), BLOB_BYTES);
    };
    measured(2_000 / scale, 1, 0, &echo).await;
    results.insert("echo_sequential".into(), measured(20_000 / scale, 1, 0, &echo).await);
    results.insert("echo_64_in_flight".into(), measured(60_000 / scale, 64, 0, &echo).await);
    for parallel in [1, 16] {
        let name = format!("blob64k_{parallel}_in_flight");
        results.insert(name, measured(3_000 / scale, parallel, BLOB_BYTES, &blob).await);
    }

    let mut found = Vec::new();
    for index in 1..=20 / scale as u8 {
        let start = Instant::now();
        println!("announce {index}");
        while !is_found(&dht, [index; 32]).await {}
        found.push(start.elapsed());
        // The announcement is stored elsewhere, too, before the next one begins.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    results.insert("announce_to_lookup".into(), summary(found, None, 0));
    results
}

async fn connect(dht: &HyperDht, keys: &KeyPair, server: PublicKey) -> (Rpc, Requests) {
    let stream = dht.connect(keys, server, ConnectOptions::default()).await.unwrap();
    Rpc::over(stream, server.as_bytes(), &Options::default()).unwrap()
}

async fn is_found(dht: &HyperDht, topic: [u8; 32]) -> bool {
    let mut lookup = dht.lookup(topic);
    while let Some(reply) = lookup.next().await {
        if !reply.peers.is_empty() {
            return true;
        }
    }
    false
}

async fn measured<F: Future>(times: usize, parallel: usize, bytes: usize, act: &impl Fn() -> F) -> Measured {
    let left = &AtomicUsize::new(times);
    let start = Instant::now();
    let work = |_| async move {
        let mut latencies = Vec::with_capacity(times / parallel + 1);
        while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            let asked = Instant::now();
            act().await;
            latencies.push(asked.elapsed());
        }
        latencies
    };
    let latencies: Vec<_> = join_all((0..parallel).map(work)).await.concat();
    summary(latencies, Some(start.elapsed()), bytes * times)
}

fn summary(mut latencies: Vec<Duration>, elapsed: Option<Duration>, bytes: usize) -> Measured {
    latencies.sort();
    let at =
        |part: f64| latencies[((latencies.len() as f64 * part) as usize).min(latencies.len() - 1)].as_secs_f64() * 1e3;
    let elapsed = elapsed.map(|elapsed| elapsed.as_secs_f64());
    Measured {
        count: latencies.len(),
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        per_second: elapsed.map(|elapsed| latencies.len() as f64 / elapsed),
        megabytes_per_second: elapsed.filter(|_| bytes > 0).map(|elapsed| bytes as f64 / elapsed / 1e6),
    }
}

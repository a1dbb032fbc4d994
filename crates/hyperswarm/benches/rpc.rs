//! Speed of sealed messages, and of requests between two sockets: in one process, and in two.
//!
//! `cargo bench -p tether-hyperswarm --bench rpc -- [seal] [echo] [processes]`

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddrV4;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tether_hyperswarm::crypto::PublicKey;
use tether_hyperswarm::crypto::noise::Session;
use tether_hyperswarm::rpc::{Options, Requests, Rpc};
use tether_hyperswarm::secret_stream::{self, Opener, Sealer, SecretStream};
use tether_hyperswarm::udx::{Socket, Stream, StreamOptions, Udx};
use tokio::runtime::Runtime;

const SERVER: [u8; 32] = [7; 32];

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    if let [role, port, id] = &asked[..]
        && role == "serve"
    {
        return serve(&format!("127.0.0.1:{port}"), id);
    }
    let wants = |name: &str| asked.is_empty() || asked.iter().any(|argument| argument == name);
    if wants("seal") {
        sealing(100, 100_000);
        sealing(64 * 1024, 1_000);
    }
    if wants("echo") {
        echo_in_one_process();
    }
    if wants("processes") {
        echo_between_processes();
    }
}

/// Keys as a handshake would leave them behind.
fn session(is_initiator: bool) -> Session {
    let (tx, rx) = if is_initiator { ([1; 32], [2; 32]) } else { ([2; 32], [1; 32]) };
    Session { is_initiator, local_key: PublicKey(SERVER), remote_key: PublicKey(SERVER), tx, rx, hash: [5; 64] }
}

fn sealing(bytes: usize, rounds: u32) {
    let (mut sealer, first_frame) = Sealer::new(&session(true), [3; 24]);
    let mut opener = Opener::new(&session(false));
    opener.feed(&first_frame);
    let message = vec![9; bytes];
    let mut frames = BytesMut::new();
    // The best of many rounds, because other programs only ever make one slower.
    let (mut sealed, mut opened) = (Duration::MAX, Duration::MAX);
    for _ in 0..rounds {
        let start = Instant::now();
        let stream: [_; 10] = std::array::from_fn(|_| {
            sealer.seal(&[1, 0], &[&message], &mut frames).unwrap();
            frames.split().freeze()
        });
        sealed = sealed.min(start.elapsed() / 10);
        let start = Instant::now();
        for datagram in stream.iter().flat_map(|frame| frame.chunks(1400)) {
            opener.feed(datagram);
            while opener.pop().unwrap().is_some() {}
        }
        opened = opened.min(start.elapsed() / 10);
    }
    println!("{bytes} bytes: seal {sealed:?}, open {opened:?} a message");
}

fn runtime(threads: usize) -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap()
}

fn bind() -> (Socket, Stream) {
    let udx = Udx::new();
    let (socket, _datagrams) = udx.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let stream = udx.stream(StreamOptions::default());
    (socket, stream)
}

fn rpc(stream: Stream, is_initiator: bool) -> (Rpc, Requests) {
    let stream = SecretStream::new(stream, session(is_initiator), secret_stream::Options::default());
    Rpc::over(stream, &SERVER, &Options::default()).unwrap()
}

async fn answer(requests: Requests) {
    let big = vec![8; 64 * 1024];
    while let Some(request) = requests.next().await {
        let is_big = request.method() == "big";
        let (value, reply) = request.into_parts();
        reply.ok(if is_big { &big } else { &value }).unwrap();
    }
}

fn echo_in_one_process() {
    for threads in [1, 2] {
        println!("one process, {threads} threads");
        runtime(threads).block_on(async {
            let ((one, mine), (other, theirs)) = (bind(), bind());
            mine.connect(&one, theirs.id(), other.local_address());
            theirs.connect(&other, mine.id(), one.local_address());
            let ((client, _unused), (_server, requests)) = (rpc(mine, true), rpc(theirs, false));
            tokio::spawn(answer(requests));
            tokio::spawn(measure(client)).await.unwrap();
        });
    }
}

fn echo_between_processes() {
    for threads in [1, 2] {
        println!("two processes, {threads} threads each");
        runtime(threads).block_on(async {
            let (socket, stream) = bind();
            let mut server = Command::new(std::env::current_exe().unwrap())
                .args(["serve", &socket.local_address().port().to_string(), &format!("{}/{threads}", stream.id())])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
            let (port, id) = line.trim().split_once(' ').unwrap();
            let address: SocketAddrV4 = format!("127.0.0.1:{port}").parse().unwrap();
            stream.connect(&socket, id.parse().unwrap(), address);
            let (client, _unused) = rpc(stream, true);
            tokio::spawn(measure(client)).await.unwrap();
            server.kill().unwrap();
            server.wait().unwrap();
        });
    }
}

fn serve(client: &str, id: &str) {
    let (id, threads) = id.split_once('/').unwrap();
    runtime(threads.parse().unwrap()).block_on(async {
        let (socket, stream) = bind();
        stream.connect(&socket, id.parse().unwrap(), client.parse().unwrap());
        println!("{} {}", socket.local_address().port(), stream.id());
        std::io::stdout().flush().unwrap();
        let (_server, requests) = rpc(stream, false);
        tokio::spawn(answer(requests)).await.unwrap();
    });
}

async fn measure(client: Rpc) {
    for (method, in_flight, requests) in
        [("echo", 1, 20_000), ("echo", 64, 300_000), ("big", 1, 2_000), ("big", 16, 8_000)]
    {
        let start = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..in_flight {
            let client = client.clone();
            tasks.spawn(async move {
                let mut times = Vec::new();
                for _ in 0..requests / in_flight {
                    let start = Instant::now();
                    client.request(method, &[9; 100]).await.unwrap();
                    times.push(start.elapsed());
                }
                times
            });
        }
        let mut times = tasks.join_all().await.concat();
        let rate = times.len() as f64 / start.elapsed().as_secs_f64();
        times.sort_unstable();
        let (half, most) = (times[times.len() / 2], times[times.len() * 99 / 100]);
        println!("  {method}, {in_flight} in flight: {rate:.0}/s, p50 {half:?}, p99 {most:?}");
    }
}

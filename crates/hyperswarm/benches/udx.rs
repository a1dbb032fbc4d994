//! Round trips and throughput of UDX over loopback, between two runtimes in one process: `cargo bench -p
//! tether-hyperswarm --bench udx`. Both sides on threads of their own, as two processes would be.

#![expect(clippy::print_stdout, reason = "the figures are what this program is for")]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tether_hyperswarm::udx::{Socket, Stream, StreamOptions, Udx};
use tokio::task::JoinSet;

const TIME_PER_RUN: Duration = Duration::from_secs(3);
const ANY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);

fn main() {
    println!("echo of 100 bytes, one after another");
    report_times(measure(1, |mut streams| async move { echo(streams.remove(0), 100).await }));
    println!("echo of 64 KiB, one after another");
    report_times(measure(1, |mut streams| async move { echo(streams.remove(0), 64 * 1024).await }));
    println!("echo of 100 bytes on 64 streams at once");
    report_times(measure(64, |streams| async move {
        let mut tasks = JoinSet::new();
        for stream in streams {
            tasks.spawn(echo(stream, 100));
        }
        tasks.join_all().await.concat()
    }));
    println!("one way, one stream");
    measure(1, |mut streams| async move { one_way(streams.remove(0)).await });
    println!("one way, 64 streams");
    measure(64, |streams| async move {
        let mut tasks = JoinSet::new();
        for stream in streams {
            tasks.spawn(one_way(stream));
        }
        tasks.join_all().await;
    });
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

/// Runs `client` with connected streams whose other sides echo, on a thread of their own, what comes in frames of the
/// size that the first four bytes tell, and swallow what comes in frames of size zero.
fn measure<R: Send + 'static, F: Future<Output = R>>(streams: usize, client: impl FnOnce(Vec<Stream>) -> F) -> R {
    let (to_client, from_server) = mpsc::channel::<(SocketAddrV4, Vec<u32>)>();
    let (to_server, from_client) = mpsc::channel::<(SocketAddrV4, Vec<u32>)>();
    let server = std::thread::spawn(move || {
        runtime().block_on(async {
            let (_socket, made) = make(streams, &to_client, &from_client);
            let mut tasks = JoinSet::new();
            for stream in made {
                tasks.spawn(serve(stream));
            }
            tasks.join_all().await;
        });
    });
    let result = runtime().block_on(async {
        let (_socket, made) = make(streams, &to_server, &from_server);
        let before = Instant::now();
        let watched = made.clone();
        let result = client(made).await;
        let mut received = 0;
        for stream in watched {
            received += stream.stats().bytes_sent;
            if streams == 1 {
                println!("  {:?}", stream.stats());
            }
            stream.end();
            stream.closed().await;
        }
        println!("  {:.0} MB/s sent", received as f64 / before.elapsed().as_secs_f64() / 1e6);
        result
    });
    server.join().expect("the server ends");
    result
}

fn make(
    count: usize,
    tell: &mpsc::Sender<(SocketAddrV4, Vec<u32>)>,
    hear: &mpsc::Receiver<(SocketAddrV4, Vec<u32>)>,
) -> (Socket, Vec<Stream>) {
    let udx = Udx::new();
    let (socket, _) = udx.bind(ANY).expect("binds");
    let streams: Vec<_> = (0..count).map(|_| udx.stream(StreamOptions::default())).collect();
    tell.send((socket.local_address(), streams.iter().map(Stream::id).collect())).expect("tells");
    let (address, ids) = hear.recv().expect("hears");
    for (stream, id) in streams.iter().zip(ids) {
        stream.connect(&socket, id, address);
    }
    (socket, streams)
}

/// Echoes every byte until the end, or swallows all when the first byte is 1.
async fn serve(stream: Stream) {
    let mut swallows = None;
    while let Ok(Some(bytes)) = stream.read().await {
        if !*swallows.get_or_insert(bytes[0] == 1) {
            stream.write(bytes).expect("is open");
        }
    }
    stream.end();
    stream.closed().await;
}

async fn echo(stream: Stream, length: usize) -> Vec<Duration> {
    let message = Bytes::from(vec![0; length]);
    let mut times = Vec::new();
    let end = Instant::now() + TIME_PER_RUN;
    while Instant::now() < end {
        let started = Instant::now();
        stream.write(message.clone()).expect("is open");
        let mut left = length;
        while left > 0 {
            left -= stream.read().await.expect("is open").expect("has no end").len();
        }
        times.push(started.elapsed());
    }
    times
}

async fn one_way(stream: Stream) {
    let message = Bytes::from(vec![1; 64 * 1024]);
    let end = Instant::now() + TIME_PER_RUN;
    while Instant::now() < end {
        stream.room().await.expect("is open");
        stream.write(message.clone()).expect("is open");
    }
}

fn report_times(mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let rate = times.len() as f64 / TIME_PER_RUN.as_secs_f64();
    println!("  {rate:.0} round trips/s, p50 {:.1?}, p99 {:.1?}, most {:.1?}", at(0.5), at(0.99), at(1.0));
}

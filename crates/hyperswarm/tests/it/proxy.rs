//! A UDP proxy that loses, doubles and reorders datagrams, the same ones for the same seed.

use std::collections::HashMap;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// What happens on the way, in parts of a hundred, in each direction.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
    pub(crate) delayed: u64,
    pub(crate) seed: u64,
}

/// Stands before a server. Each client gets a socket of its own behind the proxy, so that the server tells them apart.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddrV4,
    pub(crate) counts: Arc<Counts>,
    _stop: DropGuard,
}

/// How many datagrams went which way.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) passed: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) doubled: AtomicU64,
    pub(crate) delayed: AtomicU64,
}

struct Road {
    faults: Faults,
    state: u64,
    counts: Arc<Counts>,
    tasks: TaskTracker,
}

impl Road {
    fn new(faults: Faults, salt: u64, counts: Arc<Counts>, tasks: TaskTracker) -> Self {
        Self { faults, state: faults.seed.wrapping_mul(2).wrapping_add(salt), counts, tasks }
    }

    /// The next number below `bound` (SplitMix64).
    fn below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    async fn carry(&mut self, bytes: &[u8], through: &Arc<UdpSocket>, to: SocketAddr) {
        if self.below(100) < self.faults.lost {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.counts.passed.fetch_add(1, Ordering::Relaxed);
        if self.below(100) < self.faults.doubled {
            self.counts.doubled.fetch_add(1, Ordering::Relaxed);
            let _ = through.send_to(bytes, to).await;
        }
        if self.below(100) < self.faults.delayed {
            self.counts.delayed.fetch_add(1, Ordering::Relaxed);
            let (through, bytes) = (through.clone(), bytes.to_vec());
            let later = Duration::from_millis(1 + self.below(20));
            self.tasks.spawn(async move {
                time::sleep(later).await;
                let _ = through.send_to(&bytes, to).await;
            });
            return;
        }
        let _ = through.send_to(bytes, to).await;
    }
}

impl Proxy {
    /// Carries datagrams to `target` and back.
    ///
    /// Of the DHT's requests only handshakes pass, so that nobody finds a way around.
    pub(crate) async fn start(target: SocketAddrV4, faults: Faults) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a socket"));
        let SocketAddr::V4(address) = front.local_addr().expect("an address") else { panic!("IPv4 was asked for") };
        let counts = Arc::<Counts>::default();
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        tasks.spawn(stop.clone().run_until_cancelled_owned(forward(
            front,
            target,
            faults,
            counts.clone(),
            stop.clone(),
        )));
        Self { address, counts, _stop: stop.drop_guard() }
    }
}

async fn forward(
    front: Arc<UdpSocket>,
    target: SocketAddrV4,
    faults: Faults,
    counts: Arc<Counts>,
    stop: CancellationToken,
) {
    let tasks = TaskTracker::new();
    let mut there = Road::new(faults, 0, counts.clone(), tasks.clone());
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut buffer = vec![0; 65536];
    loop {
        let Ok((length, client)) = front.recv_from(&mut buffer).await else { continue };
        let bytes = &buffer[..length];
        if is_other_request(bytes) {
            continue;
        }
        if !backs.contains_key(&client) {
            let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a socket"));
            let road = Road::new(faults, 1 + backs.len() as u64, counts.clone(), tasks.clone());
            tasks.spawn(stop.clone().run_until_cancelled_owned(bring_back(back.clone(), front.clone(), client, road)));
            backs.insert(client, back);
        }
        there.carry(bytes, &backs[&client], target.into()).await;
    }
}

async fn bring_back(back: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr, mut road: Road) {
    let mut buffer = vec![0; 65536];
    loop {
        let Ok((length, _)) = back.recv_from(&mut buffer).await else { continue };
        if !is_other_request(&buffer[..length]) {
            road.carry(&buffer[..length], &front, client).await;
        }
    }
}

/// Returns whether these are a request of the DHT other than `PEER_HANDSHAKE`.
fn is_other_request(bytes: &[u8]) -> bool {
    let [3, flags, ..] = bytes else { return false };
    let id = if flags & 1 == 0 { 0 } else { 32 };
    let token = if flags & 2 == 0 { 0 } else { 32 };
    flags & 4 != 0 || bytes.get(10 + id + token) != Some(&0)
}

//! How a client comes by its connections, and what it does about dead ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use protocol::control::{Empty, NODE_PING, NodeInfo, NodeRole};
use protocol::signature::NodeKey;
use protocol::{PublicKey, Topic, WireError};
use tether_rpc::transport::{Channel, Connection, Incoming, RequestError, TransportError};
use tether_rpc::{CallError, Client, Directory, MemoryNetwork, Server, StreamCall, StreamOptions, Transport};
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::{info, options, pair};

const SECOND: Duration = Duration::from_secs(1);

/// A transport whose dials are counted, and take a while, and that may find nobody.
struct Slow {
    inner: Arc<dyn Transport>,
    takes: Duration,
    dials: Arc<AtomicUsize>,
    blind: Arc<AtomicBool>,
}

#[async_trait]
impl Transport for Slow {
    fn public_key(&self) -> PublicKey {
        self.inner.public_key()
    }

    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError> {
        self.dials.fetch_add(1, Ordering::SeqCst);
        time::sleep(self.takes).await;
        self.inner.connect(peer).await
    }

    async fn accept(&self) -> Option<Arc<dyn Connection>> {
        self.inner.accept().await
    }

    async fn announce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.announce(topic).await
    }

    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.unannounce(topic).await
    }

    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError> {
        if self.blind.load(Ordering::SeqCst) { Ok(vec![]) } else { self.inner.lookup(topic).await }
    }
}

struct Scene {
    network: MemoryNetwork,
    peer: PublicKey,
    transport: Arc<dyn Transport>,
    client: Client,
    dials: Arc<AtomicUsize>,
    blind: Arc<AtomicBool>,
    tasks: TaskTracker,
}

impl Scene {
    fn new(takes: Duration) -> Self {
        let network = MemoryNetwork::new();
        let dials = Arc::<AtomicUsize>::default();
        let inner = network.node(&NodeKey::from_seed(&[2; 32]));
        let blind = Arc::<AtomicBool>::default();
        let transport = Arc::new(Slow { inner, takes, dials: dials.clone(), blind: blind.clone() });
        let client = Client::new(transport.clone());
        let peer = NodeKey::from_seed(&[1; 32]).public_key();
        Self { network, peer, transport, client, dials, blind, tasks: TaskTracker::new() }
    }

    fn serve(&self) {
        let node = self.network.node(&NodeKey::from_seed(&[1; 32]));
        self.tasks.spawn(Server::new(node, info()).run(CancellationToken::new(), SECOND));
    }

    async fn ping(&self, within: Duration) -> Result<Empty, CallError> {
        self.client.call(self.peer, NODE_PING, &Empty {}, within).await
    }

    fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }
}

#[tokio::test(start_paused = true)]
async fn many_who_wait_for_a_peer_dial_it_once() {
    let scene = Scene::new(SECOND);
    scene.serve();
    let all = futures_util::future::join_all((0..50).map(|_| scene.ping(SECOND * 2))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(scene.dials(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_dial_outlives_the_calls_that_give_up_on_it() {
    let scene = Scene::new(SECOND);
    scene.serve();
    for _ in 0..3 {
        assert_eq!(scene.ping(SECOND / 4).await, Err(CallError::Deadline));
    }
    scene.ping(SECOND / 2).await.expect("the first dial is done by then");
    assert_eq!(scene.dials(), 1);
}

#[tokio::test(start_paused = true)]
async fn opening_a_connection_does_not_use_up_the_time_to_accept() {
    let scene = Scene::new(SECOND * 2);
    scene.serve();
    let begun = Instant::now();
    let late = scene.client.open_stream(scene.peer, "none", bytes::Bytes::new(), options()).await;
    assert!(matches!(late, Err(CallError::Remote(_))), "it was reached: {late:?}");
    assert!(begun.elapsed() >= SECOND * 2);
    // The deadline of the whole holds all the same.
    let scene = Scene::new(SECOND * 2);
    scene.serve();
    let brief = StreamOptions { deadline: Some(SECOND), ..options() };
    let late = scene.client.open_stream(scene.peer, "none", bytes::Bytes::new(), brief).await;
    assert_eq!(late.expect_err("too late"), CallError::Deadline);
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_hangs_is_given_up() {
    let scene = Scene::new(SECOND * 3600);
    let begun = Instant::now();
    assert_eq!(scene.ping(SECOND * 60).await, Err(CallError::Unreachable { peer: scene.peer }));
    assert_eq!(begun.elapsed(), SECOND * 5);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_cannot_be_reached_is_dialled_ever_more_rarely() {
    let scene = Scene::new(Duration::ZERO);
    let begun = Instant::now();
    while begun.elapsed() < SECOND * 30 {
        assert_eq!(scene.ping(SECOND).await, Err(CallError::Unreachable { peer: scene.peer }));
        time::sleep(SECOND / 100).await;
    }
    assert!((8..=14).contains(&scene.dials()), "{} dials in 30 s", scene.dials());
    // It comes back, and is found within five seconds, or at once where it shows itself.
    scene.serve();
    let back = Instant::now();
    scene.client.forgive(scene.peer);
    scene.ping(SECOND).await.expect("dialled at once");
    assert!(back.elapsed() < SECOND / 10);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_comes_back_is_found_within_five_seconds() {
    let scene = Scene::new(Duration::ZERO);
    for _ in 0..3000 {
        let _ = scene.ping(SECOND).await;
        time::sleep(SECOND / 100).await;
    }
    scene.serve();
    let back = Instant::now();
    while scene.ping(SECOND).await.is_err() {
        time::sleep(SECOND / 100).await;
    }
    assert!(back.elapsed() <= SECOND * 5, "{:?}", back.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_peer_fell_silent_is_asked_before_it_is_used_again() {
    // A node that takes connections and never reads them, as one whose process hangs.
    let scene = Scene::new(Duration::ZERO);
    let dead = scene.network.node(&NodeKey::from_seed(&[1; 32]));
    assert_eq!(scene.ping(SECOND).await, Err(CallError::Deadline));
    let begun = Instant::now();
    assert_eq!(scene.ping(SECOND * 10).await, Err(CallError::Deadline), "a new connection is no better");
    assert!(begun.elapsed() >= SECOND * 10);
    assert_eq!(scene.dials(), 2, "the first was given up after half a second without an answer");
    drop(dead);
    scene.serve();
    scene.ping(SECOND * 2).await.expect("the node was started anew");
}

/// A node whose process can be stopped: it then takes no connection and reads nothing, and its peers notice nothing
/// else.
struct Pausing {
    inner: Arc<dyn Transport>,
    runs: watch::Receiver<bool>,
    /// Whether it takes new connections even so, as a node does that has given up its old ones.
    takes_new: bool,
}

struct PausingConnection {
    inner: Arc<dyn Connection>,
    runs: watch::Receiver<bool>,
}

async fn until_it_runs(runs: &watch::Receiver<bool>) {
    runs.clone().wait_for(|runs| *runs).await.expect("the test goes on");
}

#[async_trait]
impl Transport for Pausing {
    fn public_key(&self) -> PublicKey {
        self.inner.public_key()
    }

    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError> {
        self.inner.connect(peer).await
    }

    async fn accept(&self) -> Option<Arc<dyn Connection>> {
        let inner = self.inner.accept().await?;
        if self.takes_new && !*self.runs.borrow() {
            return Some(inner);
        }
        until_it_runs(&self.runs).await;
        Some(Arc::new(PausingConnection { inner, runs: self.runs.clone() }))
    }

    async fn announce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.announce(topic).await
    }

    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.unannounce(topic).await
    }

    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError> {
        self.inner.lookup(topic).await
    }
}

#[async_trait]
impl Connection for PausingConnection {
    fn remote_key(&self) -> PublicKey {
        self.inner.remote_key()
    }

    fn secret(&self) -> [u8; 32] {
        self.inner.secret()
    }

    async fn request(&self, method: &str, body: Bytes) -> Result<Bytes, RequestError> {
        self.inner.request(method, body).await
    }

    async fn open_channel(&self) -> Result<Box<dyn Channel>, TransportError> {
        self.inner.open_channel().await
    }

    async fn next(&self) -> Option<Incoming> {
        let next = self.inner.next().await;
        until_it_runs(&self.runs).await;
        next
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }

    fn close(&self) {
        self.inner.close();
    }
}

/// A scene whose peer can be stopped. It answers `count` with a message a second for ten seconds.
fn pausing() -> (Scene, watch::Sender<bool>) {
    scene_with_pauses(false)
}

fn scene_with_pauses(takes_new: bool) -> (Scene, watch::Sender<bool>) {
    let scene = Scene::new(Duration::ZERO);
    let (stop, runs) = watch::channel(true);
    let inner = scene.network.node(&NodeKey::from_seed(&[1; 32]));
    let node = Arc::new(Pausing { inner, runs: runs.clone(), takes_new });
    let server = Server::new(node, info()).stream("count", move |call: StreamCall| {
        let runs = runs.clone();
        async move {
            let mut reply = call.accept().await.expect("caller is there");
            for number in 0..10 {
                until_it_runs(&runs).await;
                if reply.send(&[number]).await.is_err() {
                    return;
                }
                time::sleep(SECOND).await;
            }
            let _ = reply.finish().await;
        }
    });
    scene.tasks.spawn(server.run(CancellationToken::new(), SECOND));
    (scene, stop)
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_pauses_loses_no_stream_and_gets_no_new_call_meanwhile() {
    let (scene, stop) = pausing();
    let mut stream = scene.client.open_stream(scene.peer, "count", Bytes::new(), options()).await.expect("accepted");
    assert_eq!(stream.next().await, Some(Ok(Bytes::from_static(&[0]))));
    stop.send_replace(false);
    let begun = Instant::now();
    while begun.elapsed() < SECOND * 5 {
        assert_eq!(scene.ping(SECOND).await, Err(CallError::Deadline), "callers try elsewhere");
    }
    stop.send_replace(true);
    scene.ping(SECOND).await.expect("it goes on");
    for number in 1..10 {
        assert_eq!(stream.next().await, Some(Ok(Bytes::copy_from_slice(&[number]))));
    }
    assert_eq!(stream.next().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_cut_off_loses_the_streams_of_its_retired_connections_too() {
    let (scene, stop) = pausing();
    let mut stream = scene.client.open_stream(scene.peer, "count", Bytes::new(), options()).await.expect("accepted");
    stop.send_replace(false);
    for _ in 0..3 {
        assert_eq!(scene.ping(SECOND).await, Err(CallError::Deadline));
    }
    stop.send_replace(true);
    scene.ping(SECOND).await.expect("on a new connection");
    assert!(scene.dials() >= 2);
    scene.client.disconnect(scene.peer);
    let end = loop {
        match stream.next().await {
            Some(Ok(_)) => {}
            end => break end,
        }
    };
    assert_eq!(end, Some(Err(CallError::Closed)));
}

#[tokio::test(start_paused = true)]
async fn a_check_tells_a_new_connection_from_an_old_one() {
    let (scene, stop) = pausing();
    let first = scene.client.check(scene.peer, SECOND).await.expect("it responds");
    time::sleep(SECOND).await;
    assert_eq!(scene.client.check(scene.peer, SECOND).await, Ok(first));
    stop.send_replace(false);
    assert_eq!(scene.client.check(scene.peer, SECOND).await, Err(CallError::Deadline));
    stop.send_replace(true);
    assert_eq!(scene.client.check(scene.peer, SECOND).await, Ok(first), "the old one is still good");
}

#[tokio::test(start_paused = true)]
async fn a_process_that_was_stopped_checks_its_connections_before_it_uses_them() {
    let (scene, stop) = scene_with_pauses(true);
    scene.tasks.spawn(scene.client.clone().watch_for_pauses(CancellationToken::new()));
    scene.ping(SECOND).await.expect("well");
    time::advance(SECOND * 20).await;
    scene.ping(SECOND).await.expect("well");
    assert_eq!(scene.dials(), 1, "a good connection stays");
    // Meanwhile the peer has given up the connection, and nobody says so.
    stop.send_replace(false);
    time::advance(SECOND * 20).await;
    let begun = Instant::now();
    let long = StreamOptions { accept_within: SECOND * 100, ..options() };
    let refused = scene.client.open_stream(scene.peer, "none", Bytes::new(), long).await.expect_err("unknown");
    assert!(matches!(refused, CallError::Remote(_)), "{refused:?}");
    assert!(begun.elapsed() <= SECOND, "{:?}", begun.elapsed());
    assert_eq!(scene.dials(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_process_that_watches_no_more_sees_no_pauses() {
    let (scene, stop) = scene_with_pauses(true);
    let end = CancellationToken::new();
    let watch = scene.tasks.spawn(scene.client.clone().watch_for_pauses(end.clone()));
    scene.ping(SECOND).await.expect("well");
    end.cancel();
    watch.await.expect("it ends");
    time::advance(SECOND * 20).await;
    stop.send_replace(false);
    assert_eq!(scene.ping(SECOND).await, Err(CallError::Deadline), "the connection is used as it is");
}

#[tokio::test(start_paused = true)]
async fn a_slow_method_costs_its_peer_no_connection() {
    let pair = pair(|server| server.unary("hang", |_, _: Empty| std::future::pending::<Result<Empty, WireError>>()));
    let peer = pair.server.public_key();
    let hang = || pair.client.call::<_, Empty>(peer, "hang", &Empty {}, SECOND);
    let ahead = pair.client.call::<_, Empty>(peer, "hang", &Empty {}, SECOND * 10);
    let others = async {
        for _ in 0..3 {
            assert_eq!(hang().await, Err(CallError::Deadline));
        }
    };
    let (ahead, ()) = tokio::join!(ahead, others);
    assert_eq!(ahead, Err(CallError::Deadline), "it was not cut off when others gave up");
}

#[tokio::test(start_paused = true)]
async fn who_answers_stays_known_when_lookups_find_nobody_any_more() {
    let scene = Scene::new(Duration::ZERO);
    scene.serve();
    let topic = Topic::Control("local".parse().expect("region"));
    let announced = scene.network.node(&NodeKey::from_seed(&[7; 32]));
    announced.announce(&topic).await.expect("announced");
    let server = Server::new(announced.clone(), info()).run(CancellationToken::new(), SECOND);
    scene.tasks.spawn(server);
    let (directory, task) = Directory::new(scene.transport.clone(), scene.client.clone(), topic);
    scene.tasks.spawn(task.run(CancellationToken::new()));
    assert!(directory.wait_for(NodeRole::Worker, SECOND).await);
    scene.blind.store(true, Ordering::SeqCst);
    time::sleep(SECOND * 60).await;
    assert_eq!(directory.find(NodeRole::Worker), [announced.public_key()]);
    scene.network.cut(announced.public_key());
    time::sleep(SECOND * 5).await;
    assert_eq!(directory.find(NodeRole::Worker), []);
}

/// A transport that remembers a peer, and to which some peers are silent.
struct Remembering {
    inner: Arc<dyn Transport>,
    remembered: Vec<PublicKey>,
    silent: Vec<PublicKey>,
}

#[async_trait]
impl Transport for Remembering {
    fn public_key(&self) -> PublicKey {
        self.inner.public_key()
    }

    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError> {
        if self.silent.contains(&peer) {
            std::future::pending::<()>().await;
        }
        self.inner.connect(peer).await
    }

    async fn accept(&self) -> Option<Arc<dyn Connection>> {
        self.inner.accept().await
    }

    async fn announce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.announce(topic).await
    }

    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.unannounce(topic).await
    }

    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError> {
        self.inner.lookup(topic).await
    }

    fn remembered(&self) -> Vec<PublicKey> {
        self.remembered.clone()
    }
}

/// Adds a node of these roles that answers, under a topic where one is given.
async fn serving(scene: &Scene, seed: u8, role: NodeRole, topic: Option<&Topic>) -> PublicKey {
    let node = scene.network.node(&NodeKey::from_seed(&[seed; 32]));
    if let Some(topic) = topic {
        node.announce(topic).await.expect("announced");
    }
    let info = NodeInfo { roles: vec![role], ..info() };
    scene.tasks.spawn(Server::new(node.clone(), info).run(CancellationToken::new(), SECOND));
    node.public_key()
}

#[tokio::test(start_paused = true)]
async fn peers_of_an_earlier_run_are_found_though_no_lookup_finds_them() {
    let scene = Scene::new(Duration::ZERO);
    let topic = Topic::Control("local".parse().expect("region"));
    let orchestrator = serving(&scene, 7, NodeRole::Orchestrator, None).await;
    let worker = serving(&scene, 8, NodeRole::Worker, None).await;
    let gone = NodeKey::from_seed(&[9; 32]).public_key();
    let inner = scene.network.node(&NodeKey::from_seed(&[3; 32]));
    let node = Arc::new(Remembering { inner, remembered: vec![gone, worker, orchestrator], silent: vec![gone] });
    let (directory, task) = Directory::new(node.clone(), Client::new(node), topic);
    scene.tasks.spawn(task.run(CancellationToken::new()));
    assert!(directory.wait_for(NodeRole::Orchestrator, SECOND / 10).await);
    time::sleep(SECOND * 30).await;
    assert_eq!(directory.find(NodeRole::Orchestrator), [orchestrator]);
    assert_eq!(directory.find(NodeRole::Worker), [], "workers are followed by their reports");
}

#[tokio::test(start_paused = true)]
async fn who_is_gone_holds_up_nobody_and_one_that_was_lost_is_found_again_soon() {
    let scene = Scene::new(Duration::ZERO);
    let topic = Topic::Control("local".parse().expect("region"));
    let gone = scene.network.node(&NodeKey::from_seed(&[9; 32]));
    gone.announce(&topic).await.expect("announced");
    let orchestrator = serving(&scene, 7, NodeRole::Orchestrator, Some(&topic)).await;
    serving(&scene, 6, NodeRole::Registry, Some(&topic)).await;
    let inner = scene.network.node(&NodeKey::from_seed(&[3; 32]));
    let node = Arc::new(Remembering { inner, remembered: vec![], silent: vec![gone.public_key()] });
    let (directory, task) = Directory::new(node.clone(), Client::new(node), topic.clone());
    scene.tasks.spawn(task.run(CancellationToken::new()));
    assert!(directory.wait_for(NodeRole::Orchestrator, SECOND / 10).await, "one that is silent is on the topic too");

    gone.unannounce(&topic).await.expect("off the topic");
    time::sleep(SECOND * 30).await;
    scene.network.cut(orchestrator);
    let lost = async {
        while !directory.find(NodeRole::Orchestrator).is_empty() {
            time::sleep(SECOND / 100).await;
        }
    };
    time::timeout(SECOND * 5, lost).await.expect("it is noticed");
    serving(&scene, 7, NodeRole::Orchestrator, Some(&topic)).await;
    // The others are still known, and yet it is looked for.
    let begun = Instant::now();
    let mut changed = directory.clone();
    while directory.find(NodeRole::Orchestrator).is_empty() {
        assert!(time::timeout(SECOND * 10, changed.changed()).await.is_ok_and(|fresh| fresh));
    }
    assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
}

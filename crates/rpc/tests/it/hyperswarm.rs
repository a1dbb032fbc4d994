//! Calls and streams between nodes of a Hyperswarm network, over real sockets of this machine.

use std::future::pending;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyperswarm::crypto::{self, KeyPair};
use hyperswarm::hyperdht::{Config, ConnectOptions, HyperDht};
use hyperswarm::rpc::{
    DECODE_ERROR, Options as RpcOptions, REQUEST_ERROR, RequestError as HyperswarmError, Rpc, UNKNOWN_METHOD,
    decode_buffer, encode_buffer,
};
use protocol::control::{Empty, NODE_PING};
use protocol::signature::NodeKey;
use protocol::{ErrorCode, PublicKey, Topic, WireError};
use tether_rpc::transport::hyperswarm::{BootstrapNode, HyperswarmTransport, KnownPeers, Options};
use tether_rpc::transport::{Connection, Incoming, RequestError, TransportError};
use tether_rpc::{CallError, Client, Server, StreamCall, StreamOptions, Transport};
use tokio::sync::Notify;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::{info, options};

const LOOPBACK: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
const SECOND: Duration = Duration::from_secs(1);
/// Real sockets on a busy machine need a long timeout.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A network: a node that everyone knows, and services that run on others.
struct Swarm {
    bootstrap: HyperDht,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Swarm {
    fn new() -> Self {
        let bootstrap = HyperDht::bootstrapper(LOOPBACK).expect("a socket");
        Self { bootstrap, tasks: TaskTracker::new(), stop: CancellationToken::new() }
    }

    async fn node(&self, seed: u8) -> Arc<HyperswarmTransport> {
        start(seed, vec![self.bootstrap.local_address()], KnownPeers::default()).await
    }

    /// Serves on a node until the end of the test.
    fn serve(&self, node: &Arc<HyperswarmTransport>, build: impl FnOnce(Server) -> Server) -> PublicKey {
        let transport: Arc<dyn Transport> = node.clone();
        let server = build(Server::new(transport, info()));
        self.tasks.spawn(server.run(self.stop.clone(), SECOND));
        node.public_key()
    }

    /// Connects one node to another, and returns both ends.
    async fn connection(&self) -> (Arc<HyperswarmTransport>, Arc<HyperswarmTransport>, [Arc<dyn Connection>; 2]) {
        let (callee, caller) = (self.node(1).await, self.node(2).await);
        let dialled = caller.connect(callee.public_key()).await.expect("connected");
        let accepted = soon(callee.accept()).await.expect("accepted");
        assert_eq!((dialled.remote_key(), accepted.remote_key()), (callee.public_key(), caller.public_key()));
        (callee, caller, [dialled, accepted])
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn start(seed: u8, bootstrap: Vec<SocketAddrV4>, known: KnownPeers) -> Arc<HyperswarmTransport> {
    let options = Options { listen: LOOPBACK, bootstrap, known, public_address: None, is_client: false };
    let node = HyperswarmTransport::start(options, &key(seed)).await.expect("a socket");
    node.bootstrapped().await;
    node
}

fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed(&[seed; 32])
}

fn topic() -> Topic {
    Topic::Control("local".parse().expect("region"))
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    time::timeout(TIMEOUT, work).await.expect("in time")
}

/// Answers a stream with its request.
async fn echo(call: StreamCall) {
    let body = call.body.clone();
    if let Ok(mut reply) = call.accept().await
        && reply.send(&body).await.is_ok()
    {
        let _ = reply.finish().await;
    }
}

async fn streamed(client: &Client, peer: PublicKey, method: &str, body: Bytes) -> Result<Vec<Bytes>, CallError> {
    let patient = StreamOptions { accept_within: TIMEOUT, ..options() };
    let mut stream = client.open_stream(peer, method, body, patient).await?;
    let mut messages = vec![];
    while let Some(message) = stream.next().await {
        messages.push(message?);
    }
    Ok(messages)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_without_a_third_find_each_other() {
    let first = start(1, vec![], KnownPeers::default()).await;
    let second = start(2, vec![first.local_address()], KnownPeers::default()).await;
    first.announce(&topic()).await.expect("announced");
    second.announce(&topic()).await.expect("announced");
    let found = async |node: &HyperswarmTransport, other: PublicKey| {
        while !node.lookup(&topic()).await.expect("looked up").contains(&other) {
            time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon(found(&first, second.public_key())).await;
    // What the first announced lies with the second alone.
    soon(found(&second, first.public_key())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_only_calls_finds_and_calls_others_and_is_not_found() {
    let swarm = Swarm::new();
    let callee = swarm.node(1).await;
    let key_of_callee = swarm.serve(&callee, |server| server);
    callee.announce(&topic()).await.expect("announced");
    let bootstrap = vec![swarm.bootstrap.local_address()];
    let options =
        Options { listen: LOOPBACK, bootstrap, known: KnownPeers::default(), public_address: None, is_client: true };
    let caller = HyperswarmTransport::start(options, &key(2)).await.expect("a socket");
    assert_eq!(caller.lookup(&topic()).await, Ok(vec![key_of_callee]));
    let client = Client::new(caller.clone());
    client.call::<_, Empty>(key_of_callee, NODE_PING, &Empty {}, TIMEOUT).await.expect("an answer");
    assert!(caller.accept().await.is_none());
    assert!(callee.connect(caller.public_key()).await.is_err());
}

#[tokio::test]
async fn a_node_is_found_by_topic_and_answers_calls_and_streams() {
    let swarm = Swarm::new();
    let (worker, caller) = (swarm.node(1).await, swarm.node(2).await);
    let peer = swarm.serve(&worker, |server| server.stream("echo", echo));
    assert_eq!(caller.lookup(&topic()).await, Ok(vec![]));
    worker.announce(&topic()).await.expect("announced");
    assert_eq!(caller.lookup(&topic()).await, Ok(vec![peer]));

    let client = Client::new(caller);
    client.call::<_, Empty>(peer, NODE_PING, &Empty {}, TIMEOUT).await.expect("a reply");
    let answer = streamed(&client, peer, "echo", Bytes::from_static(b"\"hello\"")).await;
    assert_eq!(answer, Ok(vec![Bytes::from_static(b"\"hello\"")]));
}

#[tokio::test]
async fn a_node_behind_a_router_names_its_public_address() {
    let public_address = Some(Ipv4Addr::new(203, 0, 113, 7));
    let options =
        Options { listen: LOOPBACK, bootstrap: vec![], known: KnownPeers::default(), public_address, is_client: false };
    let node = HyperswarmTransport::start(options, &key(1)).await.expect("a socket");
    let expected = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 7), node.local_address().port());
    assert_eq!(node.reachable_address(), expected);
    let bootstrap = BootstrapNode::start(LOOPBACK, vec![], public_address).expect("a socket");
    assert_eq!(bootstrap.reachable_address().ip(), expected.ip());
}

#[tokio::test]
async fn a_node_that_leaves_a_topic_is_not_found_there() {
    let swarm = Swarm::new();
    let (worker, caller) = (swarm.node(1).await, swarm.node(2).await);
    // Twice is once.
    worker.announce(&topic()).await.expect("announced");
    worker.announce(&topic()).await.expect("announced");
    assert_eq!(caller.lookup(&topic()).await, Ok(vec![worker.public_key()]));
    worker.unannounce(&topic()).await.expect("taken back");
    assert_eq!(caller.lookup(&topic()).await, Ok(vec![]));
    worker.announce(&topic()).await.expect("announced");
    assert_eq!(caller.lookup(&topic()).await, Ok(vec![worker.public_key()]));
    // So is one that stops.
    worker.stop().await;
    assert_eq!(caller.lookup(&topic()).await, Ok(vec![]));
}

#[tokio::test]
async fn an_error_comes_whole() {
    let full = || {
        WireError::new(ErrorCode::WorkerFull, "no place is free, \"really\"")
            .with_param("max_tokens")
            .with_retry_after(Duration::from_millis(1250))
    };
    let swarm = Swarm::new();
    let (worker, caller) = (swarm.node(1).await, swarm.node(2).await);
    let peer = swarm.serve(&worker, |server| {
        server
            .unary("full", move |_, _: Empty| async move { Err::<Empty, _>(full()) })
            .stream("full", move |call: StreamCall| async move { call.refuse(full()).await })
    });
    let client = Client::new(caller);
    let unary = client.call::<_, Empty>(peer, "full", &Empty {}, TIMEOUT).await;
    assert_eq!(unary, Err(CallError::Remote(full())));
    assert_eq!(streamed(&client, peer, "full", Bytes::from_static(b"{}")).await, Err(CallError::Remote(full())));
    let unknown = client.call::<_, Empty>(peer, "nonsense", &Empty {}, TIMEOUT).await;
    assert!(matches!(&unknown, Err(CallError::Remote(error)) if error.code == ErrorCode::UnknownMethod), "{unknown:?}");
}

fn text(bytes: usize) -> String {
    ('a'..='z').cycle().take(bytes).collect()
}

#[tokio::test]
async fn long_messages_arrive_whole_and_too_long_ones_are_refused() {
    let swarm = Swarm::new();
    let (worker, caller) = (swarm.node(1).await, swarm.node(2).await);
    let peer = swarm.serve(&worker, |server| {
        server
            .unary("echo", |_, text: String| async move { Ok(text) })
            .stream("echo", echo)
            .unary("is whole", |_, received: String| async move { Ok(received == text(received.len())) })
            .stream("is whole", |call: StreamCall| async move {
                let is_whole = call.body == text(call.body.len());
                if let Ok(mut reply) = call.accept().await {
                    reply.send(&Bytes::from(is_whole.to_string())).await.expect("the caller listens");
                    let _ = reply.finish().await;
                }
            })
    });
    let client = Client::new(caller);
    for bytes in [0, 64 * 1024, 1024 * 1024] {
        let text = text(bytes);
        let unary = client.call::<_, String>(peer, "echo", &text, TIMEOUT).await;
        assert!(unary.as_ref() == Ok(&text), "{bytes}: {:?}", unary.err());
        let body = Bytes::from(text);
        let answer = streamed(&client, peer, "echo", body.clone()).await;
        assert!(answer.as_deref() == Ok(&[body]), "{bytes}: {:?}", answer.err());
    }
    let long = text((16 << 20) - 200);
    assert_eq!(client.call(peer, "is whole", &long, TIMEOUT).await, Ok(true));
    // Far more than may lie unread: the connection waits for its reader.
    let answer = streamed(&client, peer, "is whole", text(4 << 20).into()).await;
    assert_eq!(answer, Ok(vec![Bytes::from_static(b"true")]));

    // This fits into a call, but not into a message of the connection.
    let refused = client.call::<_, String>(peer, "echo", &text((16 << 20) - 2), TIMEOUT).await;
    assert!(matches!(&refused, Err(CallError::Remote(error)) if error.code == ErrorCode::RequestTooLarge));
    client.call::<_, Empty>(peer, NODE_PING, &Empty {}, TIMEOUT).await.expect("the connection is as good as before");
}

#[tokio::test]
async fn hundreds_of_streams_begin_at_once_in_one_connection() {
    let swarm = Swarm::new();
    let (worker, caller) = (swarm.node(1).await, swarm.node(2).await);
    let peer = swarm.serve(&worker, |server| server.stream("echo", echo));
    let client = Client::new(caller);
    client.connect(peer).await.expect("connected");
    let all = (0..500).map(|number| {
        let (client, body) = (&client, Bytes::from(number.to_string().repeat(500)));
        async move {
            let patient = StreamOptions { accept_within: TIMEOUT, ..options() };
            let mut stream = client.open_stream(peer, "echo", body.clone(), patient).await.expect("accepted");
            assert_eq!(stream.next().await, Some(Ok(body)));
            assert_eq!(stream.next().await, None);
        }
    });
    soon(futures_util::future::join_all(all)).await;
}

#[tokio::test]
async fn a_request_that_is_sent_before_a_stream_is_taken_before_it() {
    let swarm = Swarm::new();
    let (_callee, _caller, [dialled, accepted]) = swarm.connection().await;
    for _ in 0..50 {
        let both = async {
            let mut request = std::pin::pin!(dialled.request("first", Bytes::from_static(b"{}")));
            let polled = futures_util::poll!(&mut request);
            assert!(polled.is_pending(), "the reply cannot be here");
            let channel = dialled.open_channel().await.expect("open");
            assert!(channel.send(Bytes::from_static(b"second")).await);
            request.await.expect("a reply");
        };
        let taking = async {
            let Some(Incoming::Request { method, reply, .. }) = accepted.next().await else { panic!("out of order") };
            assert_eq!(method, "first");
            let Some(Incoming::Channel(channel)) = accepted.next().await else { panic!("out of order") };
            assert_eq!(channel.receive().await.as_deref(), Some(b"second".as_slice()));
            assert_eq!(channel.try_receive(), None);
            reply.send(Ok(Bytes::from_static(b"{}")));
        };
        soon(async { tokio::join!(both, taking) }).await;
    }
}

#[tokio::test]
async fn both_ends_notice_that_one_closed_the_connection() {
    let swarm = Swarm::new();
    for by_dialler in [true, false] {
        let (callee, caller, [dialled, accepted]) = swarm.connection().await;
        let channel = dialled.open_channel().await.expect("open");
        let Some(Incoming::Channel(theirs)) = soon(accepted.next()).await else { panic!("a stream was opened") };
        let waiting = dialled.request("wait", Bytes::from_static(b"{}"));
        let taking = async {
            let Some(Incoming::Request { mut reply, .. }) = accepted.next().await else { panic!("it was sent") };
            if by_dialler { &dialled } else { &accepted }.close();
            reply.closed().await;
            assert!(accepted.next().await.is_none());
        };
        let (waited, ()) = soon(async { tokio::join!(waiting, taking) }).await;
        assert_eq!(waited, Err(RequestError::Transport(TransportError::Closed)));
        assert!(soon(dialled.next()).await.is_none());
        assert!(dialled.is_closed() && accepted.is_closed());
        assert_eq!((soon(channel.receive()).await, soon(theirs.receive()).await), (None, None));
        assert!(dialled.open_channel().await.is_err());
        callee.stop().await;
        caller.stop().await;
    }
}

#[tokio::test]
async fn a_node_that_stops_closes_its_connections() {
    let swarm = Swarm::new();
    let (callee, _caller, [dialled, accepted]) = swarm.connection().await;
    drop(accepted);
    let begun = Instant::now();
    callee.stop().await;
    drop(callee);
    assert!(soon(dialled.next()).await.is_none());
    assert!(dialled.is_closed() && begun.elapsed() < SECOND * 5, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_connection_that_nobody_holds_ends_once_nothing_is_under_way() {
    let swarm = Swarm::new();
    let (_callee, _caller, [dialled, accepted]) = swarm.connection().await;
    let channel = dialled.open_channel().await.expect("open");
    let Some(Incoming::Channel(theirs)) = soon(accepted.next()).await else { panic!("a stream was opened") };
    drop(dialled);
    assert!(channel.send(Bytes::from_static(b"still")).await);
    assert_eq!(soon(theirs.receive()).await.as_deref(), Some(b"still".as_slice()));
    assert!(!accepted.is_closed());
    drop(channel);
    assert_eq!(soon(theirs.receive()).await, None);
    assert!(soon(accepted.next()).await.is_none());
}

#[tokio::test]
async fn a_call_that_is_given_up_is_for_another_node() {
    let swarm = Swarm::new();
    let (_callee, _caller, [dialled, accepted]) = swarm.connection().await;
    let taking = async {
        let Some(Incoming::Request { reply, .. }) = accepted.next().await else { panic!("it was sent") };
        drop(reply);
    };
    let request = dialled.request("any", Bytes::from_static(b"{}"));
    let (answer, ()) = soon(async { tokio::join!(request, taking) }).await;
    assert!(matches!(&answer, Err(RequestError::Remote(error)) if error.code == ErrorCode::Unavailable), "{answer:?}");
}

#[tokio::test]
async fn work_that_nobody_waits_for_is_dropped_with_the_connection() {
    let begun = Arc::<Notify>::default();
    let tasks = TaskTracker::new();
    let (notify, held) = (begun.clone(), tasks.clone());
    let work = move |_, _: Empty| {
        let (notify, token): (_, TaskTrackerToken) = (notify.clone(), held.token());
        async move {
            notify.notify_one();
            let never: Empty = pending().await;
            drop(token);
            Ok(never)
        }
    };
    let swarm = Swarm::new();
    let (worker, caller) = (swarm.node(1).await, swarm.node(2).await);
    let peer = swarm.serve(&worker, |server| server.unary_while_wanted("work", work));
    let client = Client::new(caller);
    let call = client.call::<_, Empty>(peer, "work", &Empty {}, TIMEOUT);
    let closing = async {
        begun.notified().await;
        client.disconnect(peer);
    };
    let (answer, ()) = soon(async { tokio::join!(call, closing) }).await;
    assert_eq!(answer, Err(CallError::Closed));
    tasks.close();
    soon(tasks.wait()).await;
}

#[tokio::test]
async fn a_peer_that_only_speaks_hyperswarm_rpc_is_answered() {
    let swarm = Swarm::new();
    let worker = swarm.node(1).await;
    let peer = swarm.serve(&worker, |server| {
        server.unary("length", |_, text: String| async move {
            if text.is_empty() {
                return Err(WireError::new(ErrorCode::InvalidValue, "it is empty").with_param("text"));
            }
            Ok(text.len())
        })
    });
    let config = Config { bind: LOOPBACK, bootstrap: vec![swarm.bootstrap.local_address()], ..Config::default() };
    let dht = HyperDht::start(config).expect("a socket");
    let key_pair = KeyPair::from_seed(&[9; 32]);
    let stream = dht.connect(&key_pair, crypto::PublicKey(peer.0), ConnectOptions::default()).await.expect("connected");
    let (rpc, _requests) = Rpc::over(stream, &peer.0, &RpcOptions::default()).expect("open");

    let value = soon(rpc.request("length", &encode_buffer(b"\"four\""))).await.expect("answered");
    assert_eq!(decode_buffer(&value).expect("a buffer"), "4");
    // One that expects no answer harms nobody.
    rpc.event("length", &encode_buffer(b"\"four\"")).await.expect("sent");
    let outcome = |answer| match answer {
        Err(HyperswarmError::Remote(error)) => {
            let cause = error.cause.unwrap_or_default();
            (error.code, cause.code, cause.message)
        }
        other => panic!("an error was expected: {other:?}"),
    };
    let empty = outcome(soon(rpc.request("length", &encode_buffer(b"\"\""))).await);
    assert_eq!(empty, (REQUEST_ERROR.to_owned(), "invalid_value".to_owned(), "it is empty".to_owned()));
    assert_eq!(outcome(soon(rpc.request("nonsense", &encode_buffer(b"{}"))).await).0, UNKNOWN_METHOD);
    assert_eq!(outcome(soon(rpc.request("length", b"\"no prefix\"")).await).0, DECODE_ERROR);
}

#[tokio::test]
async fn a_node_that_knew_its_peers_finds_them_when_every_bootstrap_node_is_gone() {
    let swarm = Swarm::new();
    let (worker, caller, other) = (swarm.node(1).await, swarm.node(2).await, swarm.node(3).await);
    let peer = swarm.serve(&worker, |server| server);
    worker.announce(&topic()).await.expect("announced");
    let client = Client::new(caller.clone());
    client.call::<_, Empty>(peer, NODE_PING, &Empty {}, TIMEOUT).await.expect("a reply");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("peers");
    assert_eq!(KnownPeers::read(&file), KnownPeers::default());
    caller.known_peers().write(&file).expect("written");
    let gone = vec![swarm.bootstrap.local_address()];
    client.disconnect(peer);
    drop(client);
    caller.stop().await;
    drop(caller);
    swarm.bootstrap.stop().await;

    let known = KnownPeers::read(&file);
    assert!(known.peers.contains_key(&peer) && known.nodes.contains(&worker.local_address()), "{known:?}");
    let caller = start(2, gone, known).await;
    let begun = Instant::now();
    let client = Client::new(caller.clone());
    client.call::<_, Empty>(peer, NODE_PING, &Empty {}, SECOND * 5).await.expect("a reply");
    assert!(begun.elapsed() < SECOND * 2, "{:?}", begun.elapsed());
    assert_eq!(caller.lookup(&topic()).await, Ok(vec![peer]), "the third node keeps the announcement");
    drop(other);
}

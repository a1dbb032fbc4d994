//! Tests nodes of this crate against each other over real sockets on this host.

use std::collections::HashSet;

use tokio::time::{self, Instant};

use super::handshake::{Handshake, Mode};
use super::noise_payload::{NoisePayload, Refusal, UdxInfo};
use super::*;
use crate::crypto::noise::Initiator;
use crate::crypto::{hash, namespace};
use crate::dht_rpc::Call;

const LOOPBACK: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 0);

fn keys(seed: u8) -> KeyPair {
    KeyPair::from_seed(&[seed; 32])
}

/// Starts three persistent nodes.
async fn network() -> (Vec<HyperDht>, Vec<SocketAddrV4>) {
    let first = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let bootstrap = vec![first.local_address()];
    let mut nodes = vec![first];
    for _ in 0..2 {
        let config = Config {
            bind: LOOPBACK,
            bootstrap: bootstrap.clone(),
            ephemeral: false,
            firewalled: Some(false),
            ..Config::default()
        };
        nodes.push(HyperDht::start(config).unwrap());
    }
    for node in &nodes {
        node.bootstrapped().await;
    }
    (nodes, bootstrap)
}

async fn member(bootstrap: &[SocketAddrV4], firewalled: Option<bool>) -> HyperDht {
    let config = Config { bind: LOOPBACK, bootstrap: bootstrap.to_vec(), firewalled, ..Config::default() };
    let node = HyperDht::start(config).unwrap();
    node.bootstrapped().await;
    node
}

/// Echoes everything on every connection.
fn echo(server: Server) -> tokio_util::task::AbortOnDropHandle<()> {
    let tasks = TaskTracker::new();
    let echoing = tasks.clone();
    tokio_util::task::AbortOnDropHandle::new(tasks.spawn(async move {
        while let Some(connection) = server.accept().await {
            echoing.spawn(async move {
                while let Ok(Some(message)) = connection.receive().await {
                    connection.send(&[&message]).unwrap();
                }
                connection.end();
                connection.closed().await;
            });
        }
    }))
}

async fn round_trip(connection: &SecretStream, message: &[u8]) {
    connection.send(&[message]).unwrap();
    let echoed = time::timeout(Duration::from_secs(10), connection.receive()).await;
    assert_eq!(echoed.unwrap().unwrap().as_deref(), Some(message));
}

fn through(addresses: &[SocketAddrV4]) -> ConnectOptions {
    ConnectOptions { relay_addresses: addresses.to_vec(), ..ConnectOptions::default() }
}

#[tokio::test]
async fn a_client_that_was_told_the_servers_address_connects_to_it() {
    let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let server = node.listen(keys(1), ServerOptions::default()).await.unwrap();
    let client = member(&[], None).await;

    let options = through(&[node.local_address()]);
    let connection = client.connect(&keys(2), keys(1).public_key(), options).await.unwrap();
    let accepted = server.accept().await.unwrap();
    assert_eq!(accepted.remote_key(), keys(2).public_key());
    assert_eq!(connection.remote_key(), keys(1).public_key());
    assert_eq!(accepted.handshake_hash(), connection.handshake_hash());
    accepted.send(&[b"hello"]).unwrap();
    assert_eq!(connection.receive().await.unwrap().as_deref(), Some(b"hello".as_slice()));
    // The client remembers where it found the server.
    assert_eq!(client.known_addresses(), [(keys(1).public_key(), vec![node.local_address()])]);
}

#[tokio::test]
async fn a_client_that_a_server_turns_away_hears_so_at_once() {
    let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let welcome = keys(2).public_key();
    let options = ServerOptions {
        firewall: Some(Arc::new(move |key, address| {
            assert!(address.ip().is_loopback());
            *key != welcome
        })),
        ..ServerOptions::default()
    };
    let _server = echo(node.listen(keys(1), options).await.unwrap());
    let client = member(&[], None).await;

    let started = Instant::now();
    let refused = client.connect(&keys(3), keys(1).public_key(), through(&[node.local_address()])).await;
    assert_eq!(refused.err(), Some(ConnectError::Refused(Refusal::Aborted)));
    assert!(started.elapsed() < Duration::from_secs(1));
    let connection = client.connect(&keys(2), keys(1).public_key(), through(&[node.local_address()])).await;
    round_trip(&connection.unwrap(), b"hello").await;
}

#[tokio::test]
async fn one_key_connects_again_and_again_and_side_by_side() {
    let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let _server = echo(node.listen(keys(1), ServerOptions::default()).await.unwrap());
    let client = member(&[], None).await;
    let mut connections = Vec::new();
    for round in 0..20_u8 {
        let options = through(&[node.local_address()]);
        let connection = client.connect(&keys(2), keys(1).public_key(), options).await.unwrap();
        round_trip(&connection, &[round; 2000]).await;
        if round % 2 == 0 {
            connections.push(connection);
        }
    }
    let hashes: HashSet<_> = connections.iter().map(|connection| *connection.handshake_hash()).collect();
    assert_eq!(hashes.len(), 10);
    for connection in &connections {
        round_trip(connection, b"still here").await;
    }
}

#[tokio::test]
async fn a_node_connects_to_its_own_server() {
    let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let _server = echo(node.listen(keys(1), ServerOptions::default()).await.unwrap());
    let connection = node.connect(&keys(2), keys(1).public_key(), ConnectOptions::default()).await.unwrap();
    round_trip(&connection, b"hello").await;
}

#[tokio::test]
async fn relays_that_are_gone_do_not_hold_up_those_that_are_there() {
    let (_nodes, bootstrap) = network().await;
    let host = member(&bootstrap, Some(false)).await;
    let _server = echo(host.listen(keys(1), ServerOptions::default()).await.unwrap());
    let mut gone = Vec::new();
    for _ in 0..4 {
        let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
        gone.push(node.local_address());
        node.stop().await;
    }
    let client = member(&bootstrap, None).await;
    let started = Instant::now();
    let connection = client.connect(&keys(2), keys(1).public_key(), through(&gone)).await.unwrap();
    round_trip(&connection, b"hello").await;
    assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
}

#[tokio::test]
async fn one_key_listens_once_per_node_and_again_after_closing() {
    let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let server = node.listen(keys(1), ServerOptions::default()).await.unwrap();
    let second = node.listen(keys(1), ServerOptions::default()).await;
    assert_eq!(second.err(), Some(ListenError::AlreadyListening));
    server.close().await;
    assert!(server.accept().await.is_none());
    node.listen(keys(1), ServerOptions::default()).await.unwrap();
    node.stop().await;
    let stopped = node.listen(keys(1), ServerOptions::default()).await;
    assert_eq!(stopped.err(), Some(ListenError::Stopped));
}

/// A handshake as a client sends it, for a stream that does not exist.
fn handshake(client: &KeyPair, server: PublicKey) -> Call {
    let payload = NoisePayload {
        udx: Some(UdxInfo { reusable_socket: false, id: 7, seq: 0 }),
        secret_stream: true,
        ..NoisePayload::default()
    };
    let mut initiator = Initiator::new(client, server, &namespace("hyperswarm/dht", 0)).unwrap();
    let noise = initiator.send(&payload.encode()).unwrap();
    let value = Handshake { mode: Mode::FromClient, noise: &noise, peer_address: None, relay_address: None };
    Call {
        target: Some(hash(&[server.as_bytes()])),
        value: Some(value.encode().into()),
        ..Call::new(commands::PEER_HANDSHAKE)
    }
}

#[tokio::test]
async fn every_copy_of_a_handshake_gets_the_same_answer_and_none_becomes_a_connection_by_itself() {
    let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let server = node.listen(keys(1), ServerOptions::default()).await.unwrap();
    let (one, other) = (member(&[], None).await, member(&[], None).await);
    let call = handshake(&keys(2), keys(1).public_key());

    let mut answers = HashSet::new();
    for client in [&one, &one, &other] {
        let reply = client.rpc().request(call.clone(), node.local_address()).await.unwrap();
        answers.insert(reply.value.unwrap());
    }
    assert_eq!(answers.len(), 1);
    let next = one.rpc().request(handshake(&keys(2), keys(1).public_key()), node.local_address()).await;
    assert!(answers.insert(next.unwrap().value.unwrap()), "another handshake gets another answer");
    assert!(time::timeout(Duration::from_millis(200), server.accept()).await.is_err());
}

#[tokio::test]
async fn connections_that_nobody_accepts_are_closed() {
    let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let options = ServerOptions { backlog_max: 1, ..ServerOptions::default() };
    let server = node.listen(keys(1), options).await.unwrap();
    let client = member(&[], None).await;
    let client_keys = keys(2);
    let connect = || client.connect(&client_keys, keys(1).public_key(), through(&[node.local_address()]));
    let first = connect().await.unwrap();
    let second = connect().await.unwrap();
    time::timeout(Duration::from_secs(5), second.closed()).await.unwrap();
    let accepted = server.accept().await.unwrap();
    assert_eq!(accepted.handshake_hash(), first.handshake_hash());
}

#[tokio::test]
async fn a_server_that_is_gone_is_reported_in_time() {
    let gone = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let address = gone.local_address();
    gone.stop().await;
    let client = member(&[], None).await;
    let options = ConnectOptions { timeout: Duration::from_millis(300), ..through(&[address]) };
    let started = Instant::now();
    let error = client.connect(&keys(2), keys(1).public_key(), options).await.err();
    assert_eq!(error, Some(ConnectError::Timeout(Step::Handshake)));
    assert!(started.elapsed() < Duration::from_secs(1));
    let nobody = client.connect(&keys(2), keys(1).public_key(), ConnectOptions::default()).await.err();
    assert_eq!(nobody, Some(ConnectError::PeerNotFound));
}

#[tokio::test]
async fn a_node_without_the_server_is_no_way_to_it() {
    let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let client = member(&[], None).await;
    let failed = client.connect(&keys(2), keys(1).public_key(), through(&[node.local_address()])).await;
    assert_eq!(failed.err(), Some(ConnectError::HandshakeFailed));
    let invalid = PublicKey([0; 32]);
    let failed = client.connect(&keys(2), invalid, through(&[node.local_address()])).await;
    assert_eq!(failed.err(), Some(ConnectError::InvalidKey));
}

#[tokio::test]
async fn a_client_finds_a_server_through_the_table_and_connects_through_its_relays() {
    let (nodes, bootstrap) = network().await;
    for firewalled in [Some(false), Some(true)] {
        let host = member(&bootstrap, firewalled).await;
        let server = host.listen(keys(1), ServerOptions::default()).await.unwrap();
        let relays: Vec<_> = nodes.iter().map(HyperDht::local_address).collect();
        assert!(server.relay_addresses().iter().any(|address| relays.contains(address)));
        let _echo = echo(server);
        for firewalled in [Some(false), Some(true)] {
            let client = member(&bootstrap, firewalled).await;
            let connection = client.connect(&keys(2), keys(1).public_key(), ConnectOptions::default()).await.unwrap();
            round_trip(&connection, &vec![7; 100_000]).await;
            assert!(!client.known_addresses().is_empty());
        }
        host.stop().await;
    }
}

#[tokio::test]
async fn a_first_node_on_every_address_of_its_machine_is_found_and_keeps_records() {
    let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
    let first = HyperDht::bootstrapper(any).unwrap();
    let _echo = echo(first.listen(keys(1), ServerOptions::default()).await.unwrap());
    let port = first.local_address().port();
    let outside = first.reachable_address();
    for way in [outside, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)] {
        let config = Config { bind: any, bootstrap: vec![way], ..Config::default() };
        let client = HyperDht::start(config).unwrap();
        client.bootstrapped().await;
        let connection = client.connect(&keys(2), keys(1).public_key(), ConnectOptions::default()).await.unwrap();
        round_trip(&connection, b"hello").await;
    }

    // Members know the bootstrap node by the address that it was given. They announce themselves to it and find each
    // other.
    let member = || Config {
        bind: any,
        bootstrap: vec![outside],
        ephemeral: false,
        firewalled: Some(false),
        ..Config::default()
    };
    let (one, other) = (HyperDht::start(member()).unwrap(), HyperDht::start(member()).unwrap());
    let _server = echo(one.listen(keys(3), ServerOptions::default()).await.unwrap());
    assert!(one.announce([7; 32], &keys(3), &[]).await.unwrap().contains(&outside));
    let mut replies = other.lookup([7; 32]);
    let mut found = Vec::new();
    while let Some(reply) = replies.next().await {
        found.extend(reply.peers.into_iter().map(|peer| (reply.from, peer.public_key)));
    }
    assert!(found.contains(&(outside, keys(3).public_key())), "{found:?}");
    let connection = other.connect(&keys(4), keys(3).public_key(), ConnectOptions::default()).await.unwrap();
    round_trip(&connection, b"hello").await;
}

#[tokio::test]
async fn a_first_node_that_is_named_among_its_own_bootstrap_nodes_is_the_first_all_the_same() {
    let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
    let port = std::net::UdpSocket::bind(any).unwrap().local_addr().unwrap().port();
    let bind = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
    let itself = crate::dht_rpc::reachable(bind);
    let config =
        Config { bind, bootstrap: vec![itself], ephemeral: false, firewalled: Some(false), ..Config::default() };
    let first = HyperDht::start(config).unwrap();
    assert_eq!(first.rpc().id(), Some(crate::dht_rpc::node_id(itself)));
}

#[tokio::test]
async fn a_client_goes_on_to_the_next_relay_when_one_is_gone_or_silent() {
    let (nodes, bootstrap) = network().await;
    let host = member(&bootstrap, Some(false)).await;
    let _server = echo(host.listen(keys(1), ServerOptions::default()).await.unwrap());
    // One node is gone, one never knew the server, and one does not forward handshakes.
    let gone = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let nowhere = gone.local_address();
    gone.stop().await;
    let clueless = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let silent = HyperDht::bootstrapper(LOOPBACK).unwrap();
    let (inbox, _kept) = tokio::sync::mpsc::channel(1);
    silent.shared.request_handler.open(hash(&[keys(1).public_key().as_bytes()]), keys(9).public_key(), inbox);

    let client = member(&bootstrap, None).await;
    let options = through(&[nowhere, clueless.local_address(), silent.local_address()]);
    let started = Instant::now();
    let connection = client.connect(&keys(2), keys(1).public_key(), options).await.unwrap();
    round_trip(&connection, b"hello").await;
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    drop(nodes);
}

#[tokio::test]
async fn a_server_that_starts_again_with_its_key_is_found_again() {
    let (_nodes, bootstrap) = network().await;
    let client = member(&bootstrap, None).await;
    for round in 0..3_u8 {
        let host = member(&bootstrap, Some(false)).await;
        let server = echo(host.listen(keys(1), ServerOptions::default()).await.unwrap());
        let connection = client.connect(&keys(2), keys(1).public_key(), ConnectOptions::default()).await.unwrap();
        round_trip(&connection, &[round; 10]).await;
        host.stop().await;
        // The client notices without waiting for a timeout.
        let end = time::timeout(Duration::from_secs(2), connection.receive()).await.unwrap();
        assert!(matches!(end, Err(_) | Ok(None)), "{end:?}");
        drop(server);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_clients_connect_at_once() {
    let (_nodes, bootstrap) = network().await;
    let host = member(&bootstrap, Some(false)).await;
    let _server = echo(host.listen(keys(1), ServerOptions::default()).await.unwrap());
    let client = member(&bootstrap, None).await;
    let clients = (0..50_u8).map(|number| {
        let client = client.clone();
        async move {
            let key_pair = keys(100 + number);
            let connection = client.connect(&key_pair, keys(1).public_key(), ConnectOptions::default()).await.unwrap();
            round_trip(&connection, &[number; 3000]).await;
        }
    });
    let started = Instant::now();
    futures_util::future::join_all(clients).await;
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_stopped_server_is_forgotten_by_its_relays() {
    let (_nodes, bootstrap) = network().await;
    let host = member(&bootstrap, Some(false)).await;
    let server = host.listen(keys(1), ServerOptions::default()).await.unwrap();
    let client = member(&bootstrap, None).await;
    assert!(client.find_peer(&keys(1).public_key()).next().await.is_some());
    server.close().await;
    assert!(client.find_peer(&keys(1).public_key()).next().await.is_none());
    let error = client.connect(&keys(2), keys(1).public_key(), ConnectOptions::default()).await.err();
    assert_eq!(error, Some(ConnectError::PeerNotFound));
}

#[tokio::test]
async fn clients_hear_of_a_stop_even_when_the_program_ends_at_once() {
    let (sender, address) = tokio::sync::oneshot::channel();
    let program = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let node = HyperDht::bootstrapper(LOOPBACK).unwrap();
            let server = node.listen(keys(1), ServerOptions::default()).await.unwrap();
            sender.send(node.local_address()).unwrap();
            let _connection = server.accept().await.unwrap();
            node.stop().await;
        });
    });
    let client = member(&[], None).await;
    let options = through(&[address.await.unwrap()]);
    let connection = client.connect(&keys(2), keys(1).public_key(), options).await.unwrap();
    time::timeout(Duration::from_secs(2), connection.closed()).await.unwrap();
    program.join().unwrap();
}

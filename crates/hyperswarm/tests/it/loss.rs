//! Connections over a network that loses, doubles and reorders datagrams in both directions.

use std::sync::atomic::Ordering;

use tether_hyperswarm::crypto;

use crate::net::{Kind, Net};
use crate::pattern::pattern;
use crate::peers::{Client, Server, Target, World};
use crate::proxy::{Faults, Proxy};

/// Everything between client and server passes the proxy: they share no DHT, so the client knows no other way.
async fn all_arrives(client: World, server: World, lost: u64, seed: u64) {
    let kind = |world| if world == World::Node { Kind::Node } else { Kind::Rust };
    let (near, far) = (Net::start(kind(client)).await, Net::start(kind(server)).await);
    let server = Server::start(server, &far.bootstrap(), 1).await;
    let client = Client::start(client, &near.bootstrap(), 2).await;
    let proxy = Proxy::start(server.address(), Faults { lost, doubled: 2, delayed: 2, seed }).await;
    let target = Target { key: server.target().key, relay: Some(proxy.address) };
    client.connect("main", &target).await.expect("connected");
    for length in [0, 100, 65_536] {
        let value = pattern(length);
        assert!(client.request("main", "echo", &value).await.expect("an answer") == value);
    }
    assert_eq!(client.concurrent("main", 500, &pattern(100)).await, Ok(500));
    let hash = crypto::hash(&[&pattern(1_000_000)]);
    assert_eq!(client.hash_of_pattern("main", 1_000_000).await, Ok(hash.to_vec()));
    assert_eq!(client.fetch_pattern("main", 1_000_000).await, Ok(true));
    client.disconnect("main").await;
    assert_eq!(client.visit(&target, 20, 2).await, [""; 0]);
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let counts = &proxy.counts;
    assert!(count(&counts.passed) > 1_000, "{counts:?}");
    assert!([&counts.lost, &counts.doubled, &counts.delayed].iter().all(|counter| count(counter) > 5), "{counts:?}");
}

#[tokio::test]
async fn rust_to_rust_one_in_a_hundred_lost() {
    all_arrives(World::Rust, World::Rust, 1, 11).await;
}

#[tokio::test]
async fn rust_to_rust_five_in_a_hundred_lost() {
    all_arrives(World::Rust, World::Rust, 5, 12).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn rust_to_node_one_in_a_hundred_lost() {
    all_arrives(World::Rust, World::Node, 1, 13).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn rust_to_node_five_in_a_hundred_lost() {
    all_arrives(World::Rust, World::Node, 5, 14).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn node_to_rust_one_in_a_hundred_lost() {
    all_arrives(World::Node, World::Rust, 1, 15).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn node_to_rust_five_in_a_hundred_lost() {
    all_arrives(World::Node, World::Rust, 5, 16).await;
}

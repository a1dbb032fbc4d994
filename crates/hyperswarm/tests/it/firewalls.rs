//! Peers of which one may be behind a firewall, as far as it knows; the other one is open.

use crate::net::{Kind, Net};
use crate::peers::{Client, Server, World};

async fn meets(client: (World, bool), server: (World, bool), kind: Kind) {
    let net = Net::start(kind).await;
    let server = Server::start_behind(server.1, server.0, &net.bootstrap(), 1).await;
    let client = Client::start_behind(client.1, client.0, &net.bootstrap(), 2).await;
    for round in 0..5 {
        client.connect("main", &server.target()).await.unwrap_or_else(|failure| panic!("round {round}: {failure:?}"));
        assert_eq!(client.request("main", "echo", b"hello").await, Ok(b"hello".to_vec()));
        client.disconnect("main").await;
    }
}

#[tokio::test]
async fn a_firewalled_rust_client_meets_an_open_rust_server() {
    meets((World::Rust, true), (World::Rust, false), Kind::Rust).await;
}

#[tokio::test]
async fn an_open_rust_client_meets_a_firewalled_rust_server() {
    meets((World::Rust, false), (World::Rust, true), Kind::Rust).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn a_firewalled_rust_client_meets_an_open_node_server() {
    meets((World::Rust, true), (World::Node, false), Kind::Mixed).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn a_firewalled_node_client_meets_an_open_rust_server() {
    meets((World::Node, true), (World::Rust, false), Kind::Mixed).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn an_open_rust_client_meets_a_firewalled_node_server() {
    meets((World::Rust, false), (World::Node, true), Kind::Mixed).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn an_open_node_client_meets_a_firewalled_rust_server() {
    meets((World::Node, false), (World::Rust, true), Kind::Mixed).await;
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn an_open_node_client_meets_a_firewalled_node_server() {
    meets((World::Node, false), (World::Node, true), Kind::Node).await;
}

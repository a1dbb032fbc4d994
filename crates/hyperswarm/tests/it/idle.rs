//! A connection that nobody uses stays.

use std::time::Duration;

use tokio::time;

use crate::net::Kind;
use crate::peers::World;
use crate::scenarios::Pair;

async fn stays_for_a_minute(client: World, server: World, kind: Kind) {
    let pair = Pair::connected(client, server, kind).await;
    assert_eq!(pair.client.request("main", "echo", b"before").await, Ok(b"before".to_vec()));
    time::sleep(Duration::from_mins(1)).await;
    assert!(pair.client.is_open("main").await);
    assert_eq!(pair.client.request("main", "echo", b"after").await, Ok(b"after".to_vec()));
    assert_eq!(pair.server.connections().await, (1, 1), "it is the same connection");
    // The announcement lives, too: another client finds the way.
    pair.client.connect("second", &pair.target).await.expect("found");
}

#[tokio::test]
#[ignore = "needs Node: make interop"]
async fn a_connection_outlives_a_minute_of_silence() {
    tokio::join!(
        stays_for_a_minute(World::Rust, World::Node, Kind::Node),
        stays_for_a_minute(World::Node, World::Rust, Kind::Mixed),
        stays_for_a_minute(World::Rust, World::Rust, Kind::Rust),
    );
}

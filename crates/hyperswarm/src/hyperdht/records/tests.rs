//! Tests of stored records with networks of real nodes on this host.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

use super::*;
use crate::dht_rpc::tests::{address_of, local};
use crate::dht_rpc::{Config, DhtRequest, Handler, UNKNOWN_COMMAND};
use crate::hyperdht::persistent::{Limits, Store};
use crate::hyperdht::router::Router;
use crate::udx::Udx;

/// Answers requests from a store.
pub(in crate::hyperdht) struct Keeper {
    pub(in crate::hyperdht) kept: Mutex<(Store, Router)>,
}

impl Default for Keeper {
    fn default() -> Self {
        Self { kept: Mutex::new((Store::new(Limits::default(), 1), Router::default())) }
    }
}

impl Handler for Keeper {
    fn on_request(&self, request: DhtRequest) {
        let mut kept = self.kept.lock();
        let (store, router) = &mut *kept;
        if !store.on_request(&request, router, Instant::now()) {
            request.error(UNKNOWN_COMMAND);
        }
    }
}

/// A node and its store.
#[derive(Clone)]
pub(in crate::hyperdht) struct TestNode {
    pub(in crate::hyperdht) dht: DhtRpc,
    pub(in crate::hyperdht) keeper: Arc<Keeper>,
}

impl TestNode {
    pub(in crate::hyperdht) fn start(config: Config) -> Self {
        let keeper = Arc::new(Keeper::default());
        Self { dht: DhtRpc::start(config, Udx::new(), keeper.clone()).unwrap(), keeper }
    }

    pub(in crate::hyperdht) fn address(&self) -> SocketAddrV4 {
        address_of(&self.dht)
    }

    pub(in crate::hyperdht) fn knows_route(&self, public_key: &PublicKey) -> bool {
        self.keeper.kept.lock().1.relay(&hash(&[public_key.as_bytes()]), Instant::now()).is_some()
    }
}

pub(in crate::hyperdht) async fn network(size: usize) -> Vec<TestNode> {
    let first = TestNode::start(local(&[]));
    first.dht.bootstrapped().await;
    let bootstrap = [first.address()];
    let mut nodes = vec![first];
    for _ in 1..size {
        let node = TestNode::start(local(&bootstrap));
        node.dht.bootstrapped().await;
        nodes.push(node);
    }
    nodes
}

pub(in crate::hyperdht) async fn guest(bootstrap: SocketAddrV4) -> TestNode {
    let node = TestNode::start(Config { ephemeral: Some(true), ..local(&[bootstrap]) });
    node.dht.bootstrapped().await;
    node
}

pub(in crate::hyperdht) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("it takes no longer than twenty seconds")
}

pub(in crate::hyperdht) async fn announcers(dht: &DhtRpc, topic: Id) -> Vec<PublicKey> {
    let mut lookup = lookup(dht, topic, Vec::new());
    let mut keys = Vec::new();
    while let Some(found) = lookup.next().await {
        keys.extend(found.peers.into_iter().map(|peer| peer.public_key));
    }
    keys.sort_unstable();
    keys.dedup();
    keys
}

pub(in crate::hyperdht) async fn stop_all(nodes: Vec<TestNode>) {
    for node in nodes {
        node.dht.stop().await;
    }
}

#[tokio::test]
async fn what_is_announced_is_found_until_it_is_taken_back() {
    let nodes = network(10).await;
    let (announcer, seeker) = (guest(nodes[0].address()).await, guest(nodes[0].address()).await);
    let (key_pair, other, topic) = (KeyPair::generate(), KeyPair::generate(), [7; 32]);
    let relays: Vec<SocketAddrV4> = vec!["10.0.0.1:1".parse().unwrap(); 5];
    let holders = within(announce(&announcer.dht, topic, &key_pair, &relays, Vec::new())).await.unwrap();
    assert_eq!(holders.len(), 10);
    within(announce(&announcer.dht, topic, &other, &[], holders)).await.unwrap();

    let mut expected = vec![key_pair.public_key(), other.public_key()];
    expected.sort_unstable();
    assert_eq!(within(announcers(&seeker.dht, topic)).await, expected);
    let first = within(lookup(&seeker.dht, topic, Vec::new()).next()).await.unwrap();
    let peer = first.peers.iter().find(|peer| peer.public_key == key_pair.public_key()).unwrap();
    assert_eq!(peer.relay_addresses, relays[..3], "a node keeps three relays");

    assert_eq!(within(unannounce(&announcer.dht, topic, &key_pair)).await, 10);
    assert_eq!(within(announcers(&seeker.dht, topic)).await, [other.public_key()]);
    stop_all([nodes, vec![announcer, seeker]].concat()).await;
}

#[tokio::test]
async fn values_are_found_by_hash_and_by_key() {
    let nodes = network(6).await;
    let (writer, reader) = (guest(nodes[0].address()).await, guest(nodes[0].address()).await);
    let hello = Bytes::from_static(b"hello");
    let target = within(immutable_put(&writer.dht, hello.clone())).await.unwrap();
    assert_eq!(within(immutable_get(&reader.dht, target)).await, Some(hello.clone()));
    assert_eq!(within(immutable_get(&reader.dht, [1; 32])).await, None);
    let long = Bytes::from(vec![0; VALUE_LENGTH_MAX + 1]);
    assert_eq!(within(immutable_put(&writer.dht, long.clone())).await, Err(StoreError::TooLong));

    let key_pair = KeyPair::generate();
    let key = key_pair.public_key();
    within(mutable_put(&writer.dht, &key_pair, 5, hello.clone())).await.unwrap();
    within(mutable_put(&writer.dht, &key_pair, 5, hello.clone())).await.unwrap();
    let other = Bytes::from_static(b"other");
    assert_eq!(within(mutable_put(&writer.dht, &key_pair, 5, other.clone())).await, Err(StoreError::NumberReused));
    assert_eq!(within(mutable_put(&writer.dht, &key_pair, 4, other.clone())).await, Err(StoreError::NumberTooLow));
    assert_eq!(within(mutable_put(&writer.dht, &key_pair, 6, long)).await, Err(StoreError::TooLong));
    assert_eq!(within(mutable_get(&reader.dht, &key, 0, true)).await.unwrap().value, hello);
    assert_eq!(within(mutable_get(&reader.dht, &key, 6, true)).await, None);
    within(mutable_put(&writer.dht, &key_pair, 6, other.clone())).await.unwrap();
    assert_eq!(within(mutable_get(&reader.dht, &key, 6, false)).await.unwrap().value, other);
    stop_all([nodes, vec![writer, reader]].concat()).await;
}

#[tokio::test]
async fn nothing_can_be_announced_where_nobody_is() {
    let alone = TestNode::start(local(&[]));
    let announced = within(announce(&alone.dht, [7; 32], &KeyPair::generate(), &[], Vec::new())).await;
    assert_eq!(announced, Err(StoreError::NoNodes));
    alone.dht.stop().await;
}

#[tokio::test]
async fn records_outlive_the_bootstrap_node() {
    let mut nodes = network(6).await;
    let announcer = guest(nodes[0].address()).await;
    let (key_pair, topic) = (KeyPair::generate(), [7; 32]);
    within(announce(&announcer.dht, topic, &key_pair, &[], Vec::new())).await.unwrap();
    nodes.remove(0).dht.stop().await;
    let start = Instant::now();
    let found = within(lookup(&nodes[2].dht, topic, Vec::new()).next()).await.unwrap();
    assert_eq!(found.peers[0].public_key, key_pair.public_key());
    assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
    stop_all([nodes, vec![announcer]].concat()).await;
}

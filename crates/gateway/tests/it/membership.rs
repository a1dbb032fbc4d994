//! Whom a gateway believes, of those it finds by topic.

use std::sync::Arc;
use std::time::Duration;

use protocol::Clock as _;
use protocol::control::NodeRole;
use protocol::membership::{Certificate, RevocationList, certificate};
use protocol::signature::NodeKey;
use rpc::{Membership, SystemClock};

use crate::{Network, config, expect_error};

fn root() -> NodeKey {
    NodeKey::from_seed(&[100; 32])
}

fn member(key: &NodeKey, role: NodeRole) -> Membership {
    let (pool, now) = (root().public_key(), SystemClock.now());
    let certificate = Certificate {
        v: certificate::VERSION,
        serial: 1,
        pool,
        public_key: key.public_key(),
        roles: vec![role],
        regions: vec![],
        models: vec![],
        not_before: now,
        not_after: now.after(Duration::from_hours(1)),
    };
    Membership::new(pool, key.public_key(), certificate.sign(&root()), Arc::new(SystemClock)).expect("good")
}

fn gateway() -> Membership {
    member(&NodeKey::from_seed(&[9; 32]), NodeRole::Gateway)
}

#[tokio::test(flavor = "multi_thread")]
async fn orchestrators_and_registries_without_a_certificate_are_ignored() {
    let network = Network::start_as(config(), gateway(), |_, _| Membership::unchecked()).await;
    expect_error(network.chat("hello").await, 503, "unavailable", None).await;
    assert!(network.fake.jobs.lock().is_empty());
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_another_role_is_none_for_this_one() {
    let as_workers = |key: &NodeKey, _| member(key, NodeRole::Worker);
    let network = Network::start_as(config(), gateway(), as_workers).await;
    expect_error(network.chat("hello").await, 503, "unavailable", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certified_peers_are_asked_until_they_are_revoked() {
    let membership = gateway();
    let network = Network::start_as(config(), membership.clone(), member).await;
    assert_eq!(network.chat("hello").await.status(), 200);
    let orchestrator = NodeKey::from_seed(&[2; 32]).public_key();
    let list = RevocationList { version: 1, keys: [orchestrator].into(), ..RevocationList::empty(root().public_key()) };
    membership.take_revocations(&list.sign(&root())).expect("good");
    let jobs = network.fake.jobs.lock().len();
    expect_error(network.chat("hello").await, 503, "unavailable", None).await;
    assert_eq!(network.fake.jobs.lock().len(), jobs);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_was_started_without_its_registry_says_so() {
    let without_registry = |key: &NodeKey, role| match role {
        NodeRole::Registry => Membership::unchecked(),
        _ => member(key, role),
    };
    let network = Network::start_as(config(), gateway(), without_registry).await;
    let ready = network.get("/readyz").await;
    assert_eq!(ready.status(), 503);
    let text = ready.text().await.expect("text");
    assert!(text.contains("no registry has answered since this gateway was started"), "{text}");
    network.end().await;
}

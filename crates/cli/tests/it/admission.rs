//! Nodes that join by invites, are expelled, and renew their certificates.

use protocol::admission::CERTIFICATE_LIFE;
use tokio::time::{self, Instant};

use crate::memory_network::{HOUR, Network, SECOND};

#[tokio::test(start_paused = true)]
async fn invited_nodes_find_each_other_and_work() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    time::sleep(SECOND * 2).await;
    assert_eq!(network.fleet().await.len(), 2, "routable within two seconds");
    assert!(network.answer(1).await.expect("answered") > 1);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_worker_is_out_of_the_network_within_five_seconds() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    time::sleep(SECOND * 10).await;
    let expelled = network.workers[0];
    network.revoke(expelled).await;
    let begun = Instant::now();
    while network.fleet().await.contains(&expelled) {
        assert!(begun.elapsed() <= SECOND * 5, "still there after {:?}", begun.elapsed());
        time::sleep(SECOND / 20).await;
    }
    time::sleep(SECOND * 60).await;
    assert_eq!(network.fleet().await, [network.workers[1]], "and it stays out");
    assert!(network.answer(1).await.expect("answered") > 1);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_orchestrator_gets_no_worker_within_five_seconds() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    time::sleep(SECOND * 10).await;
    network.answer(1).await.expect("answered");
    network.revoke(network.orchestrator).await;
    time::sleep(SECOND * 5).await;
    // It learns so itself, and its workers know better than to serve it.
    let outcome = network.answer(2).await;
    assert!(outcome.is_err(), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn certificates_renew_themselves_and_the_network_goes_on() {
    let network = Network::start(HOUR).await;
    time::sleep(HOUR * 3).await;
    assert_eq!(network.fleet().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_network_goes_on_while_its_registry_is_away() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    time::sleep(SECOND * 10).await;
    network.answer(1).await.expect("answered");
    network.memory.cut(network.registry);
    time::sleep(HOUR).await;
    assert_eq!(network.fleet().await.len(), 2);
    assert!(network.answer(2).await.expect("answered") > 1);
}

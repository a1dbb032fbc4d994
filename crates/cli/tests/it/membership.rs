//! Nodes that join by invites, are expelled, and renew their certificates.

use engine::MockOptions;
use gateway::Gateway;
use protocol::ErrorCode;
use protocol::control::{NodeRole, Scope, TokenCreate};
use protocol::membership::transcript::VERSIONS;
use protocol::membership::{CERTIFICATE_LIFE, Versions};
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
    time::sleep(SECOND * 580).await;
    assert_eq!(network.fleet().await.len(), 2);
    assert!(network.answer(2).await.expect("answered") > 1);
    // Ten minutes after its rules were last confirmed, no tenant gets anything more.
    time::sleep(SECOND * 30).await;
    assert!(network.answer(3).await.is_err());
}

/// Asks a gateway to let a key's request in. Says how long that took, and why not.
async fn admit(gateway: &Gateway, token: &str) -> (time::Duration, Result<(), protocol::WireError>) {
    let began = Instant::now();
    let context = gateway.context(None, None).expect("random bytes");
    let admitted = gateway.admit(Some(token), context).await.map(drop);
    (began.elapsed(), admitted)
}

fn new_token() -> TokenCreate {
    let tenant_id = "acme".parse().expect("tenant");
    let (scopes, name) = (vec![Scope::Infer], String::new());
    TokenCreate { tenant_id, name, scopes, expires_at: None, requests_per_minute: Some(0) }
}

#[tokio::test(start_paused = true)]
async fn a_gateway_goes_on_for_ten_minutes_without_its_registry_and_then_refuses_everything() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    let gateway = network.add_gateway(4).await;
    let token = network.tokens().issue(new_token()).await.expect("issued").token;
    time::sleep(SECOND * 10).await;
    admit(&gateway, &token).await.1.expect("a good key");
    network.memory.cut(network.registry);
    let cut = Instant::now();
    while cut.elapsed() < SECOND * 590 {
        let (took, admitted) = admit(&gateway, &token).await;
        assert_eq!(admitted, Ok(()), "after {:?}", cut.elapsed());
        assert!(took < SECOND * 4, "{took:?} after {:?}", cut.elapsed());
        assert!(took < SECOND || cut.elapsed() < SECOND * 15, "nobody waits for a registry that is known to be away");
        time::sleep(SECOND * 7).await;
    }
    time::sleep(SECOND * 20).await;
    let refused = admit(&gateway, &token).await.1.expect_err("closed");
    assert_eq!(refused.code, ErrorCode::Unavailable);
    assert!(refused.message.contains("no registry has answered for 600 s"), "{refused}");

    network.restart_registry();
    time::sleep(SECOND * 15).await;
    admit(&gateway, &token).await.1.expect("open again");
}

#[tokio::test(start_paused = true)]
async fn a_key_revoked_in_the_registrys_absence_is_out_within_five_seconds_of_its_return() {
    let network = Network::start(CERTIFICATE_LIFE).await;
    let gateway = network.add_gateway(4).await;
    let (tokens, new) = (network.tokens(), new_token());
    let created = tokens.issue(new).await.expect("issued");
    time::sleep(SECOND * 10).await;
    admit(&gateway, &created.token).await.1.expect("a good key");
    network.memory.cut(network.registry);
    time::sleep(SECOND * 60).await;
    tokens.revoke(&created.key_id).await.expect("revoked");
    admit(&gateway, &created.token).await.1.expect("nobody can know");
    network.restart_registry();
    // A peer that was away is dialled again within five seconds; from then on it answers.
    time::sleep(SECOND * 6).await;
    let back = Instant::now();
    while admit(&gateway, &created.token).await.1.is_ok() {
        assert!(back.elapsed() <= SECOND * 5, "still good after {:?}", back.elapsed());
        time::sleep(SECOND / 10).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_network_serves_while_the_nodes_of_one_role_speak_the_version_before() {
    const BEFORE: Versions = Versions { oldest: VERSIONS.oldest - 1, newest: VERSIONS.newest - 1 };
    const NEXT: Versions = Versions { oldest: VERSIONS.oldest + 1, newest: VERSIONS.newest + 1 };
    let older: [fn(NodeRole) -> Versions; 4] = [
        |role| if role == NodeRole::Orchestrator { BEFORE } else { VERSIONS },
        |role| if role == NodeRole::Gateway { BEFORE } else { VERSIONS },
        |role| if role == NodeRole::Worker { BEFORE } else { VERSIONS },
        // All but the registry.
        |_| NEXT,
    ];
    for (number, versions) in (1..).zip(older) {
        let network = Network::start_speaking(CERTIFICATE_LIFE, MockOptions::default(), versions).await;
        time::sleep(SECOND * 2).await;
        assert_eq!(network.fleet().await.len(), 2, "network {number}");
        assert!(network.answer(number).await.expect("answered") > 1, "network {number}");
    }
}

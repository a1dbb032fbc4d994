use super::*;
use crate::dht_rpc::Config;
use crate::dht_rpc::tests::local;
use crate::hyperdht::records::find_peer;
use crate::hyperdht::records::tests::{Keeper, TestNode, announcers, guest, network, stop_all, within};
use crate::hyperdht::router::Router;

const QUICK: Pace =
    Pace { check: Duration::from_millis(100), renewal: Duration::from_mins(1), retry: Duration::from_millis(50) };

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "it never came true that {what}");
        time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_server_is_found_at_three_relays_until_it_stops() {
    let nodes = network(8).await;
    let (host, seeker) = (guest(nodes[0].address()).await, guest(nodes[0].address()).await);
    let (key_pair, tasks) = (KeyPair::generate(), TaskTracker::new());
    let key = key_pair.public_key();
    let announcer = Announcer::start_at(QUICK, host.dht.clone(), key_pair, &tasks);
    within(announcer.announced()).await;

    let relays = announcer.relays();
    assert_eq!(relays.len(), 3);
    assert_eq!(nodes.iter().filter(|node| node.knows_route(&key)).count(), 3);
    assert!(relays.iter().all(|relay| relay.peer_address == host.address() && announcer.is_relay(relay.relay_address)));
    assert_eq!(announcer.relay_addresses().len(), 3);
    assert_eq!(announcer.relay_addresses()[0], host.address(), "the server itself comes first");
    let found = within(find_peer(&seeker.dht, &key, Vec::new()).next()).await.unwrap();
    assert_eq!(found.peer.public_key, key);
    assert!(announcer.is_relay(found.from));

    within(announcer.stop()).await;
    assert_eq!(nodes.iter().filter(|node| node.knows_route(&key)).count(), 0);
    assert_eq!(within(find_peer(&seeker.dht, &key, Vec::new()).next()).await, None);
    stop_all([nodes, vec![host, seeker]].concat()).await;
}

#[tokio::test]
async fn a_relay_that_forgets_or_dies_is_replaced() {
    let mut nodes = network(8).await;
    let host = guest(nodes[0].address()).await;
    let (key_pair, tasks) = (KeyPair::generate(), TaskTracker::new());
    let key = key_pair.public_key();
    let announcer = Announcer::start_at(QUICK, host.dht.clone(), key_pair, &tasks);
    within(announcer.announced()).await;

    let forgetful = nodes.iter().find(|node| node.knows_route(&key)).unwrap();
    forgetful.keeper.kept.lock().1 = Router::default();
    until("the relay knows the server again", || forgetful.knows_route(&key)).await;

    let dying = nodes.iter().position(|node| node.knows_route(&key)).unwrap();
    nodes.remove(dying).dht.stop().await;
    until("there are three relays again", || nodes.iter().filter(|node| node.knows_route(&key)).count() == 3).await;
    within(announcer.stop()).await;
    stop_all([nodes, vec![host]].concat()).await;
}

#[tokio::test]
async fn a_server_that_starts_alone_is_announced_once_somebody_is_there() {
    let udx = crate::udx::Udx::new();
    let (reserved, datagrams) = udx.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let late = reserved.local_address();
    drop((reserved, datagrams));
    let host = TestNode::start(Config { ephemeral: Some(true), ..local(&[late]) });
    let (key_pair, tasks) = (KeyPair::generate(), TaskTracker::new());
    let key = key_pair.public_key();
    let announcer = Announcer::start_at(QUICK, host.dht.clone(), key_pair, &tasks);
    within(announcer.announced()).await;
    assert!(announcer.relays().is_empty());

    let node = TestNode::start(Config { port: late.port(), any_port: false, ..local(&[]) });
    until("the node knows the server", || node.knows_route(&key)).await;
    within(announcer.stop()).await;
    stop_all(vec![host, node]).await;
}

#[tokio::test]
async fn a_topic_is_announced_again_when_the_nodes_that_kept_it_start_anew() {
    let nodes = network(4).await;
    let (host, seeker) = (guest(nodes[0].address()).await, guest(nodes[0].address()).await);
    let (key_pair, tasks, topic) = (KeyPair::generate(), TaskTracker::new(), [7; 32]);
    let key = key_pair.public_key();
    let announcer = TopicAnnouncer::start_at(
        QUICK,
        host.dht.clone(),
        topic,
        key_pair,
        Arc::new(|| vec!["9.9.9.9:9".parse().unwrap()]),
        &tasks,
    );
    within(announcer.announced()).await;
    assert_eq!(within(announcers(&seeker.dht, topic)).await, [key]);

    for node in &nodes {
        *node.keeper.kept.lock() = Keeper::default().kept.into_inner();
    }
    assert_eq!(within(announcers(&seeker.dht, topic)).await, []);
    let noticed = async {
        while announcers(&seeker.dht, topic).await.is_empty() {
            time::sleep(Duration::from_millis(200)).await;
        }
    };
    within(noticed).await;

    within(announcer.stop()).await;
    assert_eq!(within(announcers(&seeker.dht, topic)).await, []);
    stop_all([nodes, vec![host, seeker]].concat()).await;
}

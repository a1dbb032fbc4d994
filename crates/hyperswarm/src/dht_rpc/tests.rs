//! Tests with networks of real nodes on this host.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::timeout;

use super::*;

/// Echoes the value of command 7, and relays command 8 to the node in its value.
#[derive(Default)]
pub(crate) struct Echo {
    requests: AtomicUsize,
}

impl Handler for Echo {
    fn on_request(&self, request: DhtRequest) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        match request.command {
            7 => request.reply(request.value.as_deref()),
            8 => {
                let value = request.value.clone().unwrap_or_default();
                let mut decoder = crate::compact_encoding::Decoder::new(&value);
                match (decoder.ipv4(), decoder.ipv4()) {
                    // Forward to the next node, with the address of the node that asked.
                    (Ok(next), Err(_)) => {
                        let mut forward = Vec::new();
                        crate::compact_encoding::Encoder::write_ipv4(&mut forward, next);
                        crate::compact_encoding::Encoder::write_ipv4(&mut forward, request.from);
                        request.relay(&forward, next);
                    }
                    // Send it back to its sender, which answers the node that asked.
                    (Ok(_), Ok(asker)) if asker != request.from && request.to != asker => {
                        let mut back = Vec::new();
                        crate::compact_encoding::Encoder::write_ipv4(&mut back, asker);
                        crate::compact_encoding::Encoder::write_ipv4(&mut back, asker);
                        crate::compact_encoding::Encoder::write_byte(&mut back, 1);
                        if value.len() == 12 {
                            request.relay(&back, request.from);
                        } else {
                            let options = ReplyOptions { to: Some(asker), ..ReplyOptions::bare() };
                            request.reply_with(Some(b"relayed"), &options);
                        }
                    }
                    _ => request.error(99),
                }
            }
            _ => request.error(UNKNOWN_COMMAND),
        }
    }
}

pub(crate) fn local(bootstrap: &[SocketAddrV4]) -> Config {
    Config {
        host: Ipv4Addr::LOCALHOST,
        port: 0,
        bootstrap: bootstrap.to_vec(),
        ephemeral: Some(false),
        firewalled: false,
        ..Config::default()
    }
}

pub(crate) fn address_of(node: &DhtRpc) -> SocketAddrV4 {
    node.server_socket().local_address()
}

pub(crate) fn start(config: Config) -> DhtRpc {
    DhtRpc::start(config, Udx::new(), Arc::new(Echo::default())).unwrap()
}

/// Starts nodes that use the first of them as their bootstrap node.
pub(crate) async fn network(size: usize) -> Vec<DhtRpc> {
    let first = start(local(&[]));
    first.bootstrapped().await;
    let bootstrap = [address_of(&first)];
    let mut nodes = vec![first];
    for _ in 1..size {
        let node = start(local(&bootstrap));
        node.bootstrapped().await;
        nodes.push(node);
    }
    nodes
}

pub(crate) async fn stop_all(nodes: Vec<DhtRpc>) {
    for node in nodes {
        node.stop().await;
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("it takes no longer than twenty seconds")
}

#[tokio::test]
async fn nodes_meet_and_find_the_closest_of_all() {
    let nodes = network(40).await;
    assert!(nodes.iter().all(DhtRpc::is_persistent));
    assert!(nodes.iter().all(|node| node.remote_address() == Some(address_of(node))));

    let target = [0x42; 32];
    let mut expected: Vec<_> = nodes[1..].iter().map(address_of).collect();
    expected.sort_by_key(|node| routing_table::distance(&target, &node_id(*node)));
    expected.truncate(10);
    let closest = within(nodes[0].query(Query::find_node(target)).closest()).await;
    let found: Vec<_> = closest.iter().map(|reply| reply.from).collect();
    assert_eq!(found[..10], expected);
    stop_all(nodes).await;
}

#[tokio::test]
async fn a_request_is_answered_with_a_token_that_is_accepted() {
    let nodes = network(3).await;
    let to = address_of(&nodes[2]);
    let call = Call { value: Some(Bytes::from_static(b"hello")), target: Some([1; 32]), ..Call::new(7) };
    let reply = within(nodes[1].request(call.clone(), to)).await.unwrap();
    assert_eq!(reply.value.as_deref(), Some(&b"hello"[..]));
    assert_eq!(reply.from_id, nodes[2].id());
    assert_eq!(reply.to, address_of(&nodes[1]));
    assert!(!reply.closer_nodes.is_empty());

    let again = within(nodes[1].request(Call { token: reply.token, ..call.clone() }, to)).await.unwrap();
    assert_eq!(again.error, 0);
    let forged = within(nodes[1].request(Call { token: Some([9; 32]), ..call }, to)).await.unwrap();
    assert_eq!(forged.error, INVALID_TOKEN);
    assert!(forged.token.is_some() && forged.value.is_none());
    stop_all(nodes).await;
}

#[tokio::test]
async fn an_unknown_command_is_an_error() {
    let nodes = network(2).await;
    let reply = within(nodes[1].request(Call::new(77), address_of(&nodes[0]))).await.unwrap();
    assert_eq!(reply.error, UNKNOWN_COMMAND);
    let unknown = Call::new(77);
    let reply = within(nodes[1].node.request(&unknown, address_of(&nodes[0]), RequestOptions::default(), true));
    assert_eq!(reply.await.unwrap().error, UNKNOWN_COMMAND);
    stop_all(nodes).await;
}

#[tokio::test]
async fn a_relayed_request_is_answered_by_the_node_that_was_asked() {
    let nodes = network(3).await;
    let mut value = Vec::new();
    crate::compact_encoding::Encoder::write_ipv4(&mut value, address_of(&nodes[2]));
    let call = Call { value: Some(value.into()), ..Call::new(8) };
    let asker = start(Config { ephemeral: None, ..local(&[address_of(&nodes[0])]) });
    let reply = within(asker.request(call, address_of(&nodes[1]))).await.unwrap();
    assert_eq!(reply.value.as_deref(), Some(&b"relayed"[..]));
    assert_eq!(reply.from, address_of(&nodes[1]));
    asker.stop().await;
    stop_all(nodes).await;
}

#[tokio::test]
async fn a_silent_node_times_out_and_leaves_the_table() {
    let mut nodes = network(3).await;
    let dead = nodes.pop().unwrap();
    let address = address_of(&dead);
    dead.stop().await;
    assert!(nodes[0].routing_nodes().contains(&address));
    assert_eq!(within(nodes[0].ping(address, RequestOptions::default())).await, Err(DhtRequestError::Timeout));
    assert!(!nodes[0].routing_nodes().contains(&address));

    // A node that failed recently does not delay a query.
    let start = Instant::now();
    within(nodes[0].query(Query::find_node([1; 32])).closest()).await;
    assert!(start.elapsed() < Duration::from_millis(250), "{:?}", start.elapsed());
    stop_all(nodes).await;
}

#[tokio::test]
async fn a_node_with_an_open_port_notices_that_it_has_no_firewall() {
    let nodes = network(6).await;
    let node = start(Config {
        firewalled: true,
        ephemeral: None,
        stable_after: Duration::from_secs(5),
        ..local(&[address_of(&nodes[0])])
    });
    assert!(node.is_firewalled());
    assert_eq!(node.socket(), node.client_socket());
    within(node.bootstrapped()).await;
    within(async {
        while !node.is_persistent() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert!(!node.is_firewalled());
    assert_eq!(node.socket(), node.server_socket());
    assert_eq!(node.id(), Some(node_id(address_of(&node))));
    assert_eq!(node.remote_address(), Some(address_of(&node)));
    node.stop().await;
    stop_all(nodes).await;
}

#[tokio::test]
async fn an_ephemeral_node_stays_out_of_the_tables() {
    let nodes = network(3).await;
    let guest = start(Config { ephemeral: Some(true), ..local(&[address_of(&nodes[0])]) });
    within(guest.bootstrapped()).await;
    within(guest.query(Query::find_node([1; 32])).closest()).await;
    assert!(guest.id().is_none());
    assert!(nodes.iter().all(|node| !node.routing_nodes().contains(&address_of(&guest))));
    guest.stop().await;
    stop_all(nodes).await;
}

#[tokio::test]
async fn the_network_outlives_its_bootstrap_nodes_and_lets_old_acquaintances_in() {
    let mut nodes = network(8).await;
    let bootstrap = address_of(&nodes[0]);
    nodes.remove(0).stop().await;
    let survivor = &nodes[3];
    let closest = within(survivor.query(Query::find_node([3; 32])).closest()).await;
    assert_eq!(closest.len(), 6);

    let known = survivor.routing_nodes();
    let returning = start(Config { known_nodes: known, ..local(&[bootstrap]) });
    within(returning.bootstrapped()).await;
    assert!(within(returning.query(Query::find_node([4; 32])).closest()).await.len() >= 6);
    returning.stop().await;
    stop_all(nodes).await;
}

#[tokio::test]
async fn bootstrap_nodes_that_name_each_other_form_one_network_whoever_starts_first() {
    let udx = Udx::new();
    let (reserved, _) = udx.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let late = reserved.local_address();
    let first = start(local(&[late]));
    reserved.close();
    drop(reserved);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let second = start(Config { any_port: false, port: late.port(), ..local(&[address_of(&first)]) });
    within(second.bootstrapped()).await;
    assert!(first.is_persistent() && second.is_persistent());
    assert!(second.routing_nodes().contains(&address_of(&first)));
    // The first node takes the second one in once that has answered a ping.
    within(async {
        while !first.routing_nodes().contains(&late) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    stop_all(vec![first, second]).await;
}

#[tokio::test]
async fn a_dropped_query_asks_nobody_any_more() {
    let nodes = network(30).await;
    let mut query = nodes[5].query(Query::new([9; 32], 7));
    within(query.next()).await.unwrap();
    drop(query);
    tokio::time::sleep(Duration::from_millis(50)).await;
    nodes[5].node.with(|state| assert!(state.is_quiet()));
    stop_all(nodes).await;
}

#[tokio::test]
async fn a_delayed_ping_is_answered_late() {
    let nodes = network(2).await;
    let start = Instant::now();
    within(nodes[1].delayed_ping(address_of(&nodes[0]), Duration::from_millis(120))).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(120));
    stop_all(nodes).await;
}

#[tokio::test]
async fn stopping_ends_requests_that_wait() {
    let nodes = network(2).await;
    let nobody = "127.0.0.1:9".parse().unwrap();
    let (one, other) = (nodes[1].clone(), nodes[1].clone());
    let request = async move { one.request(Call::new(7), nobody).await };
    let stop = async move {
        tokio::time::sleep(Duration::from_millis(20)).await;
        other.stop().await;
    };
    let (result, ()) = within(futures_util::future::join(request, stop)).await;
    assert_eq!(result, Err(DhtRequestError::Stopped));
    assert_eq!(nodes[1].request(Call::new(7), nobody).await, Err(DhtRequestError::Stopped));
    stop_all(nodes).await;
}

#[tokio::test]
async fn a_flood_of_requests_goes_unanswered() {
    let nodes = network(1).await;
    let quiet = start(Config { requests_per_second: 1, requests_burst: 5, ..local(&[]) });
    let once = || RequestOptions { retries: Some(0), timeout: Some(Duration::from_millis(100)), ..Default::default() };
    let pings = (0..20).map(|_| nodes[0].ping(address_of(&quiet), once()));
    let answered = within(futures_util::future::join_all(pings)).await.into_iter().flatten().count();
    assert_eq!(answered, 5);
    quiet.stop().await;
    stop_all(nodes).await;
}

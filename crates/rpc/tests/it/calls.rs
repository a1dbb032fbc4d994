use std::time::Duration;

use protocol::control::{Empty, NODE_DESCRIBE, NodeInfo, NodeRole};
use protocol::signature::NodeKey;
use protocol::{ErrorCode, Topic, WireError};
use tether_rpc::{CallError, Client, Directory};

use crate::{info, pair};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn a_call_brings_its_reply() {
    let pair = pair(|server| server.unary("double", |_, number: u32| async move { Ok(number * 2) }));
    let reply: u32 = pair.client.call(pair.server.public_key(), "double", &21, SECOND).await.expect("answered");
    assert_eq!(reply, 42);
}

#[tokio::test(start_paused = true)]
async fn every_node_says_what_it_is() {
    let pair = pair(|server| server);
    let reply: NodeInfo =
        pair.client.call(pair.server.public_key(), NODE_DESCRIBE, &Empty {}, SECOND).await.expect("answered");
    assert_eq!(reply, info());
}

#[tokio::test(start_paused = true)]
async fn errors_of_the_peer_arrive_with_their_code() {
    let pair = pair(|server| {
        server.unary("refuse", |_, _: Empty| async { Err::<Empty, _>(WireError::new(ErrorCode::NotEnrolled, "no")) })
    });
    let peer = pair.server.public_key();
    let refused = pair.client.call::<_, Empty>(peer, "refuse", &Empty {}, SECOND).await;
    assert_eq!(refused, Err(CallError::Remote(WireError::new(ErrorCode::NotEnrolled, "no"))));
    let malformed = pair.client.call::<_, Empty>(peer, "refuse", &7, SECOND).await.expect_err("not an object");
    assert!(matches!(malformed, CallError::Remote(WireError { code: ErrorCode::InvalidValue, .. })), "{malformed}");
    let unknown = pair.client.call::<_, Empty>(peer, "nothing", &Empty {}, SECOND).await.expect_err("no method");
    assert!(matches!(unknown, CallError::Remote(WireError { code: ErrorCode::UnknownMethod, .. })), "{unknown}");
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_no_longer_than_its_deadline() {
    let pair = pair(|server| server.unary("hang", |_, _: Empty| std::future::pending::<Result<Empty, WireError>>()));
    let before = tokio::time::Instant::now();
    let late = pair.client.call::<_, Empty>(pair.server.public_key(), "hang", &Empty {}, SECOND).await;
    assert_eq!(late, Err(CallError::Deadline));
    assert_eq!(before.elapsed(), SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_cut_off_fails_the_calls_under_way_and_the_next() {
    let pair = pair(|server| server.unary("hang", |_, _: Empty| std::future::pending::<Result<Empty, WireError>>()));
    let peer = pair.server.public_key();
    let hanging = pair.client.call::<_, Empty>(peer, "hang", &Empty {}, SECOND);
    let cut = async {
        tokio::time::sleep(SECOND / 10).await;
        pair.network.cut(peer);
    };
    let (outcome, ()) = tokio::join!(hanging, cut);
    assert_eq!(outcome, Err(CallError::Closed));
    let next = pair.client.call::<_, Empty>(peer, "hang", &Empty {}, SECOND).await;
    assert_eq!(next, Err(CallError::Unreachable { peer }));
}

#[tokio::test(start_paused = true)]
async fn one_call_too_many_is_refused_and_not_queued() {
    let pair = pair(|server| {
        server.calls_max(1).unary("hang", |_, _: Empty| std::future::pending::<Result<Empty, WireError>>())
    });
    let peer = pair.server.public_key();
    let first = pair.client.call::<_, Empty>(peer, "hang", &Empty {}, SECOND);
    let second = async {
        tokio::time::sleep(SECOND / 10).await;
        pair.client.call::<_, Empty>(peer, "hang", &Empty {}, SECOND).await
    };
    let (first, second) = tokio::join!(first, second);
    assert_eq!(first, Err(CallError::Deadline));
    assert!(matches!(second, Err(CallError::Remote(WireError { code: ErrorCode::Unavailable, .. }))), "{second:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_lets_calls_end() {
    let pair = pair(|server| {
        server.unary("slow", |_, _: Empty| async {
            tokio::time::sleep(SECOND / 2).await;
            Ok(Empty {})
        })
    });
    let slow = pair.client.call::<_, Empty>(pair.server.public_key(), "slow", &Empty {}, SECOND);
    let stop = async {
        tokio::time::sleep(SECOND / 10).await;
        pair.stop.cancel();
    };
    let (outcome, ()) = tokio::join!(slow, stop);
    assert_eq!(outcome, Ok(Empty {}));
    pair.tasks.close();
    pair.tasks.wait().await;
}

#[tokio::test(start_paused = true)]
async fn a_directory_knows_who_announces_and_forgets_who_left() {
    let pair = pair(|server| server);
    let topic = Topic::Control("local".parse().expect("region"));
    pair.server.announce(&topic).await.expect("announced");
    let node = pair.network.node(&NodeKey::from_seed(&[3; 32]));
    let (mut directory, task) = Directory::new(node.clone(), Client::new(node), topic);
    pair.tasks.spawn(task.run(pair.stop.clone()));
    assert!(directory.wait_for(NodeRole::Worker, SECOND).await);
    assert_eq!(directory.find(NodeRole::Worker), [pair.server.public_key()]);
    assert_eq!(directory.find(NodeRole::Registry), []);
    assert!(directory.changed().await);
    pair.network.cut(pair.server.public_key());
    assert!(directory.changed().await);
    assert_eq!(directory.find(NodeRole::Worker), []);
}

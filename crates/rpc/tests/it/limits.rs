//! What callers may take of a server, and what they are told beyond it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use protocol::control::{Empty, NODE_PING};
use protocol::signature::NodeKey;
use protocol::{ErrorCode, WireError};
use tether_rpc::{CallError, Client, ServerLimits, StreamCall, Transport};
use tokio::time;

use crate::{Pair, options, pair};

const SECOND: Duration = Duration::from_secs(1);

fn code(error: CallError) -> ErrorCode {
    match error {
        CallError::Remote(error) => error.code,
        other => panic!("an answer was expected: {other:?}"),
    }
}

/// Another node of the pair's network.
fn node(pair: &Pair, seed: u8) -> Arc<dyn Transport> {
    pair.network.node(&NodeKey::from_seed(&[seed; 32]))
}

async fn swallow(call: StreamCall) {
    if let Ok(reply) = call.accept().await {
        let _ = reply.finish().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_stranger_may_send_less_than_a_member() {
    let member = NodeKey::from_seed(&[2; 32]).public_key();
    let pair = pair(|server| {
        server
            .unary("length", |_, text: String| async move { Ok(text.len()) })
            .stream("swallow", swallow)
            .body_limit(move |key| if key == member { 16 << 20 } else { 1000 })
    });
    let peer = pair.server.public_key();
    let stranger = Client::new(node(&pair, 3));
    let (short, long) = ("x".repeat(900), "x".repeat(1100));
    for (client, text, expected) in [
        (&pair.client, &long, Ok(1100)),
        (&stranger, &short, Ok(900)),
        (&stranger, &long, Err(ErrorCode::RequestTooLarge)),
    ] {
        let got = client.call::<_, usize>(peer, "length", text, SECOND).await;
        assert_eq!(got.map_err(code), expected);
    }
    // One that is refused while its parts still come is told why as well.
    for bytes in [1100, 100_000, 10 << 20] {
        let refused = stranger.open_stream(peer, "swallow", Bytes::from(vec![b'x'; bytes]), options()).await;
        assert_eq!(code(refused.expect_err("too long")), ErrorCode::RequestTooLarge, "{bytes}");
    }
    pair.client.open_stream(peer, "swallow", Bytes::from(vec![b'x'; 10 << 20]), options()).await.expect("taken");
}

#[tokio::test(start_paused = true)]
async fn strangers_leave_the_calls_of_members_alone() {
    let member = NodeKey::from_seed(&[2; 32]).public_key();
    let limits = ServerLimits { strangers_calls_max: 3, ..ServerLimits::default() };
    let pair = pair(|server| {
        let hang = |_, _: Empty| std::future::pending::<Result<Empty, WireError>>();
        server.unary("hang", hang).limits(limits).body_limit(move |key| if key == member { 16 << 20 } else { 1000 })
    });
    let peer = pair.server.public_key();
    let stranger = node(&pair, 3);
    // Two channels that say nothing and a call that takes its time.
    let connection = stranger.connect(peer).await.expect("connected");
    let _mute = [connection.open_channel().await.expect("open"), connection.open_channel().await.expect("open")];
    let client = Client::new(stranger.clone());
    let held = client.call::<_, Empty>(peer, "hang", &Empty {}, SECOND * 5);
    let others = async {
        time::sleep(SECOND).await;
        let refused = client.call::<_, Empty>(peer, NODE_PING, &Empty {}, SECOND).await;
        assert_eq!(code(refused.expect_err("a fourth")), ErrorCode::Unavailable);
        pair.client.call::<_, Empty>(peer, NODE_PING, &Empty {}, SECOND).await.expect("a member's");
    };
    let (held, ()) = tokio::join!(held, others);
    assert_eq!(held, Err(CallError::Deadline));
    // What was never said is given up on after ten seconds.
    time::sleep(SECOND * 10).await;
    client.call::<_, Empty>(peer, NODE_PING, &Empty {}, SECOND).await.expect("there is room again");
}

#[tokio::test(start_paused = true)]
async fn a_stranger_with_many_silent_streams_leaves_calls_to_other_strangers() {
    let limits = ServerLimits { strangers_calls_max: 64, strangers_calls_per_peer_max: 8, ..ServerLimits::default() };
    let pair = pair(|server| server.limits(limits).body_limit(|_| 1000));
    let peer = pair.server.public_key();
    let greedy = node(&pair, 3);
    let (mut connections, mut silent) = (vec![], vec![]);
    for _ in 0..2 {
        let connection = greedy.connect(peer).await.expect("connected");
        for _ in 0..100 {
            silent.push(connection.open_channel().await.expect("open"));
        }
        connections.push(connection);
    }
    time::sleep(SECOND).await;
    let ping = |client: Client| async move { client.call::<_, Empty>(peer, NODE_PING, &Empty {}, SECOND).await };
    ping(Client::new(node(&pair, 4))).await.expect("another stranger's");
    assert_eq!(code(ping(Client::new(greedy.clone())).await.expect_err("its part is used up")), ErrorCode::Unavailable);
    time::sleep(SECOND * 10).await;
    ping(Client::new(greedy)).await.expect("the silent streams were given up on");
}

#[tokio::test(start_paused = true)]
async fn requests_beyond_the_room_are_refused_and_the_room_is_given_back() {
    let limits = ServerLimits { body_bytes_max: 2500, ..ServerLimits::default() };
    let pair = pair(|server| {
        let slow = |_, text: String| async move {
            time::sleep(SECOND).await;
            Ok(text.len())
        };
        server.unary("slow", slow).stream("swallow", swallow).limits(limits)
    });
    let peer = pair.server.public_key();
    let text = "x".repeat(1000);
    let call = || pair.client.call::<_, usize>(peer, "slow", &text, SECOND * 5);
    let (one, two, three) = tokio::join!(call(), call(), call());
    let (taken, refused): (Vec<_>, Vec<_>) = [one, two, three].into_iter().partition(Result::is_ok);
    assert_eq!((taken.len(), refused.len()), (2, 1));
    assert!(refused.into_iter().all(|refused| code(refused.expect_err("no room")) == ErrorCode::Unavailable));
    assert_eq!(call().await, Ok(1000));
    let long = pair.client.open_stream(peer, "swallow", Bytes::from(vec![b'x'; 200_000]), options()).await;
    assert_eq!(code(long.expect_err("no room")), ErrorCode::Unavailable);
    assert_eq!(call().await, Ok(1000), "a request cut short gives its room back");
}

#[tokio::test(start_paused = true)]
async fn a_connection_too_many_is_told_so_and_another_takes_its_place_later() {
    let limits = ServerLimits { connections_max: 1, ..ServerLimits::default() };
    let pair = pair(|server| server.limits(limits));
    let peer = pair.server.public_key();
    let ping = |client: Client| async move { client.call::<_, Empty>(peer, NODE_PING, &Empty {}, SECOND).await };
    ping(pair.client.clone()).await.expect("the first");
    let other = Client::new(node(&pair, 3));
    assert_eq!(code(ping(other.clone()).await.expect_err("the second")), ErrorCode::Unavailable);
    pair.client.disconnect(peer);
    time::sleep(SECOND * 2).await;
    ping(other).await.expect("there is room");
}

#[tokio::test(start_paused = true)]
async fn a_peers_newest_connection_takes_the_place_of_its_oldest_idle_one() {
    let limits = ServerLimits { connections_per_peer_max: 2, ..ServerLimits::default() };
    let pair = pair(|server| server.limits(limits));
    let peer = pair.server.public_key();
    let transport = node(&pair, 3);
    let mut held = vec![];
    for _ in 0..3 {
        held.push(transport.connect(peer).await.expect("connected"));
        time::sleep(SECOND / 10).await;
    }
    let closed: Vec<bool> = held.iter().map(|connection| connection.is_closed()).collect();
    assert_eq!(closed, [true, false, false]);
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_calls_is_closed_after_a_while_and_one_with_calls_is_not() {
    let limits = ServerLimits { idle: SECOND * 60, ..ServerLimits::default() };
    let pair = pair(|server| {
        let slow = |_, _: Empty| async {
            time::sleep(SECOND * 300).await;
            Ok(Empty {})
        };
        server.unary("slow", slow).limits(limits)
    });
    let peer = pair.server.public_key();
    let other = node(&pair, 3);
    let idle = other.connect(peer).await.expect("connected");
    let busy = pair.client.call::<_, Empty>(peer, "slow", &Empty {}, SECOND * 400);
    let look = async {
        time::sleep(SECOND * 59).await;
        assert!(!idle.is_closed());
        time::sleep(SECOND * 62).await;
        assert!(idle.is_closed());
    };
    let (busy, ()) = tokio::join!(busy, look);
    assert_eq!(busy, Ok(Empty {}));
    // The client notices, and opens another.
    time::sleep(SECOND * 125).await;
    pair.client.call::<_, Empty>(peer, NODE_PING, &Empty {}, SECOND).await.expect("answered");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_refuses_new_calls_while_old_ones_end() {
    let pair = pair(|server| {
        server.unary("slow", |_, _: Empty| async {
            time::sleep(SECOND / 2).await;
            Ok(Empty {})
        })
    });
    let peer = pair.server.public_key();
    let slow = pair.client.call::<_, Empty>(peer, "slow", &Empty {}, SECOND);
    let late = async {
        time::sleep(SECOND / 10).await;
        pair.stop.cancel();
        time::sleep(SECOND / 10).await;
        let late = pair.client.call::<_, Empty>(peer, NODE_PING, &Empty {}, SECOND).await;
        let stream = pair.client.open_stream(peer, "any", Bytes::new(), options()).await;
        (code(late.expect_err("stopping")), code(stream.expect_err("stopping")))
    };
    let (slow, late) = tokio::join!(slow, late);
    assert_eq!((slow, late), (Ok(Empty {}), (ErrorCode::Unavailable, ErrorCode::Unavailable)));
    pair.tasks.close();
    pair.tasks.wait().await;
}

#[tokio::test(start_paused = true)]
async fn work_that_nobody_waits_for_any_more_is_dropped_where_its_method_says_so() {
    let done = Arc::new(AtomicUsize::new(0));
    let count = done.clone();
    let pair = pair(move |server| {
        let work = move |_, _: Empty| {
            let count = count.clone();
            async move {
                time::sleep(SECOND).await;
                count.fetch_add(1, Ordering::SeqCst);
                Ok::<_, WireError>(Empty {})
            }
        };
        server.unary("finished", work.clone()).unary_while_wanted("wanted", work)
    });
    let peer = pair.server.public_key();
    for method in ["finished", "wanted"] {
        let late = pair.client.call::<_, Empty>(peer, method, &Empty {}, SECOND / 2).await;
        assert_eq!(late, Err(CallError::Deadline));
    }
    time::sleep(SECOND * 5).await;
    assert_eq!(done.load(Ordering::SeqCst), 1);
}

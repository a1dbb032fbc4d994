use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use protocol::{ErrorCode, WireError};
use tether_rpc::{CallError, ResponseStream, StreamCall};
use tokio::sync::Notify;

use crate::{options, pair};

/// Answers with the request, cut into messages of `size` bytes.
async fn echo(call: StreamCall, size: usize) {
    let body = call.body.clone();
    let Ok(mut reply) = call.accept().await else { return };
    for message in body.chunks(size) {
        if reply.send(message).await.is_err() {
            return;
        }
    }
    let _ = reply.finish().await;
}

async fn collect(mut stream: ResponseStream) -> Result<Vec<Bytes>, CallError> {
    let mut messages = vec![];
    while let Some(message) = stream.next().await {
        messages.push(message?);
    }
    Ok(messages)
}

#[tokio::test(start_paused = true)]
async fn messages_arrive_whole_and_in_order() {
    let pair = pair(|server| server.stream("echo", |call| echo(call, 3)));
    let stream = pair.client.open_stream(pair.server.public_key(), "echo", "abcdefgh".into(), options()).await;
    assert_eq!(collect(stream.expect("accepted")).await.expect("complete"), ["abc", "def", "gh"]);
}

#[tokio::test(start_paused = true)]
async fn requests_and_messages_longer_than_a_frame_are_cut_and_joined() {
    let pair = pair(|server| server.stream("echo", |call| echo(call, usize::MAX)));
    let body: Bytes = (0..1_000_000u32).map(|number| number as u8).collect();
    let stream = pair.client.open_stream(pair.server.public_key(), "echo", body.clone(), options()).await;
    assert_eq!(collect(stream.expect("accepted")).await.expect("complete"), [body]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_arrives_instead_of_an_acceptance() {
    let refusal = WireError::new(ErrorCode::WorkerFull, "full");
    let pair = pair(|server| server.stream("busy", |call| call.refuse(WireError::new(ErrorCode::WorkerFull, "full"))));
    let refused = pair.client.open_stream(pair.server.public_key(), "busy", Bytes::new(), options()).await;
    assert_eq!(refused.expect_err("refused"), CallError::Remote(refusal));
}

#[tokio::test(start_paused = true)]
async fn the_patience_for_a_callee_is_not_used_up_by_the_length_of_its_request() {
    let pair = pair(|server| {
        server.stream("slow", |call| async move {
            tokio::time::sleep(Duration::from_secs(7)).await;
            echo(call, usize::MAX).await;
        })
    });
    let open = |mebibytes: usize| {
        let body = Bytes::from(vec![0; mebibytes << 20]);
        pair.client.open_stream(pair.server.public_key(), "slow", body, options())
    };
    collect(open(7).await.expect("accepted")).await.expect("complete");
    assert_eq!(open(6).await.expect_err("too late"), CallError::NotAccepted);
    assert_eq!(open(0).await.expect_err("too late"), CallError::NotAccepted);
}

#[tokio::test(start_paused = true)]
async fn a_callee_that_says_nothing_is_given_up_on() {
    let pair = pair(|server| {
        server.stream("mute", |call| async move {
            std::future::pending::<()>().await;
            drop(call);
        })
    });
    let peer = pair.server.public_key();
    let mute = pair.client.open_stream(peer, "mute", Bytes::new(), options()).await;
    assert_eq!(mute.expect_err("never accepted"), CallError::NotAccepted);
}

#[tokio::test(start_paused = true)]
async fn silence_after_the_acceptance_is_a_stall() {
    let pair = pair(|server| {
        server.stream("stall", |call| async move {
            let _reply = call.accept().await;
            std::future::pending::<()>().await;
        })
    });
    let mut stream =
        pair.client.open_stream(pair.server.public_key(), "stall", Bytes::new(), options()).await.expect("accepted");
    let before = tokio::time::Instant::now();
    assert_eq!(stream.next().await, Some(Err(CallError::Stalled)));
    assert_eq!(before.elapsed(), options().stall);
}

#[tokio::test(start_paused = true)]
async fn a_connection_lost_in_mid_answer_is_an_error_and_not_an_end() {
    let pair = pair(|server| {
        server.stream("vanish", |call| async move {
            let mut reply = call.accept().await.expect("caller is there");
            reply.send(b"one").await.expect("caller reads");
        })
    });
    let stream = pair.client.open_stream(pair.server.public_key(), "vanish", Bytes::new(), options()).await;
    assert_eq!(collect(stream.expect("accepted")).await, Err(CallError::Closed));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_stops_the_callee() {
    let stopped = Arc::new(Notify::new());
    let notify = stopped.clone();
    let pair = pair(move |server| {
        server.stream("endless", move |call| {
            let notify = notify.clone();
            async move {
                let mut reply = call.accept().await.expect("caller is there");
                while reply.send(b"more").await.is_ok() {
                    tokio::task::yield_now().await;
                }
                notify.notify_one();
            }
        })
    });
    let mut stream =
        pair.client.open_stream(pair.server.public_key(), "endless", Bytes::new(), options()).await.expect("accepted");
    stream.next().await.expect("a message").expect("no error");
    drop(stream);
    stopped.notified().await;
}

#[tokio::test(start_paused = true)]
async fn a_callee_waits_for_a_slow_caller_instead_of_filling_memory() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let pair = pair(move |server| {
        server.stream("flood", move |call| {
            let count = count.clone();
            async move {
                let mut reply = call.accept().await.expect("caller is there");
                while reply.send(&vec![0; 60_000]).await.is_ok() {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }
        })
    });
    let mut stream =
        pair.client.open_stream(pair.server.public_key(), "flood", Bytes::new(), options()).await.expect("accepted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ahead = sent.load(Ordering::SeqCst);
    assert!((4..=5).contains(&ahead), "a window of 256 KiB holds no more than 5 such messages, {ahead} were sent");
    for _ in 0..100 {
        stream.next().await.expect("a message").expect("no error");
    }
    assert!(sent.load(Ordering::SeqCst) >= 100);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_cut_off_breaks_its_streams_for_both_ends() {
    let stopped = Arc::new(Notify::new());
    let notify = stopped.clone();
    let pair = pair(move |server| {
        server.stream("stall", move |call| {
            let notify = notify.clone();
            async move {
                let mut reply = call.accept().await.expect("caller is there");
                reply.cancelled().await;
                notify.notify_one();
            }
        })
    });
    let mut stream =
        pair.client.open_stream(pair.server.public_key(), "stall", Bytes::new(), options()).await.expect("accepted");
    pair.network.cut(pair.server.public_key());
    assert_eq!(stream.next().await, Some(Err(CallError::Closed)));
    stopped.notified().await;
}

/// What a callee learns of what its caller has read.
#[derive(Debug, PartialEq)]
struct Learned {
    /// Bytes, before it asks.
    unasked: u64,
    /// Whether all was acknowledged once it asked.
    all: bool,
    bytes: u64,
}

/// Sends messages of three bytes, one each 400 ms, to a caller that does as `read` says and leaves.
async fn learned(messages: usize, read: impl AsyncFnOnce(&mut ResponseStream)) -> Learned {
    let (learned, outcome) = tokio::sync::mpsc::unbounded_channel();
    let pair = pair(move |server| {
        server.stream("count", move |call| {
            let learned = learned.clone();
            async move {
                let mut reply = call.accept().await.expect("caller is there");
                for _ in 0..messages {
                    let _ = reply.send(b"abc").await;
                    tokio::time::sleep(Duration::from_millis(400)).await;
                }
                let unasked = reply.acknowledged();
                let all = reply.wait_until_acknowledged().await.is_ok();
                let _ = learned.send(Learned { unasked, all, bytes: reply.acknowledged() });
            }
        })
    });
    let mut stream =
        pair.client.open_stream(pair.server.public_key(), "count", Bytes::new(), options()).await.expect("accepted");
    stream.acknowledge_reads();
    read(&mut stream).await;
    drop(stream);
    let mut outcome = outcome;
    outcome.recv().await.expect("one call")
}

async fn read_some(stream: &mut ResponseStream, messages: usize) {
    for _ in 0..messages {
        assert_eq!(stream.next().await, Some(Ok(Bytes::from_static(b"abc"))));
    }
}

#[tokio::test(start_paused = true)]
async fn who_reads_on_acknowledges_all_when_asked() {
    let read = async |stream: &mut ResponseStream| {
        read_some(stream, 2).await;
        assert_eq!(stream.next().await, Some(Err(CallError::Closed)));
    };
    assert_eq!(learned(2, read).await, Learned { unasked: 0, all: true, bytes: 6 });
}

#[tokio::test(start_paused = true)]
async fn who_leaves_acknowledges_what_it_has_read_and_not_what_it_only_got() {
    let read = async |stream: &mut ResponseStream| read_some(stream, 2).await;
    let learned = learned(9, read).await;
    assert_eq!((learned.all, learned.bytes), (false, 3));
}

#[tokio::test(start_paused = true)]
async fn who_reads_a_long_answer_acknowledges_it_every_second() {
    let read = async |stream: &mut ResponseStream| {
        read_some(stream, 9).await;
        assert_eq!(stream.next().await, Some(Err(CallError::Closed)));
    };
    let learned = learned(9, read).await;
    assert!((12..27).contains(&learned.unasked), "{learned:?}");
    assert_eq!((learned.all, learned.bytes), (true, 27));
}

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::*;

fn quiet() -> Options {
    Options { keep_alive: None, ..Options::default() }
}

#[tokio::test(start_paused = true)]
async fn messages_arrive_whole_and_in_order() {
    let (client, server) = memory_pair(&quiet());
    client.send(&[b"one ", b"message"]).unwrap();
    client.send(&[b"another"]).unwrap();
    assert_eq!(server.receive().await.unwrap().unwrap(), "one message");
    assert_eq!(server.receive().await.unwrap().unwrap(), "another");
    server.send(&[b"answer"]).unwrap();
    assert_eq!(client.receive().await.unwrap().unwrap(), "answer");
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_open_when_the_other_sides_first_frame_is_here() {
    let (client, server) = memory_pair(&quiet());
    client.opened().await.unwrap();
    server.send(&[b"first"]).unwrap();
    client.opened().await.unwrap();
    assert_eq!(client.receive().await.unwrap().unwrap(), "first");
    drop(client);
    server.opened().await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_receive_loses_nothing() {
    let (client, server) = memory_pair(&quiet());
    let long = vec![7; 100_000];
    for _ in 0..5 {
        assert!(timeout(Duration::from_millis(1), server.receive()).await.is_err());
        // Half of a frame arrives, the read is dropped, then the other half arrives.
        let mut frame = BytesMut::new();
        client.shared.sealing().sealer.seal(&[], &[&long], &mut frame).unwrap();
        let rest = frame.split_off(50_000);
        client.shared.wire.write(frame.freeze()).unwrap();
        assert!(timeout(Duration::from_millis(1), server.receive()).await.is_err());
        client.shared.wire.write(rest.freeze()).unwrap();
        assert_eq!(server.receive().await.unwrap().unwrap(), long);
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_too_long_is_refused_and_the_next_one_goes() {
    let (client, server) = memory_pair(&quiet());
    let long = vec![0; MESSAGE_BYTES_MAX + 1];
    assert_eq!(client.send(&[&long]), Err(SendError::TooLong(TooLong(long.len()))));
    client.send(&[b"short"]).unwrap();
    assert_eq!(server.receive().await.unwrap().unwrap(), "short");
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_is_kept_alive_and_a_busy_one_is_not() {
    let (client, server) = memory_pair(&Options::default());
    assert!(client.shared.wire.read().await.unwrap().is_some(), "the first frame");
    for _ in 0..3 {
        time::sleep(Duration::from_secs(4)).await;
        server.send(&[b"busy"]).unwrap();
        assert_eq!(client.shared.wire.read().await.unwrap().unwrap().len(), 3 + 17 + 4);
    }
    let silent_since = Instant::now();
    assert_eq!(client.shared.wire.read().await.unwrap().unwrap().len(), 3 + 17);
    assert_eq!(silent_since.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn kept_alive_streams_deliver_no_empty_messages() {
    let (client, server) = memory_pair(&Options::default());
    assert!(timeout(Duration::from_mins(1), server.receive()).await.is_err());
    client.send(&[b"awake"]).unwrap();
    assert_eq!(server.receive().await.unwrap().unwrap(), "awake");
}

#[tokio::test(start_paused = true)]
async fn an_end_is_received_after_the_messages() {
    let (client, server) = memory_pair(&quiet());
    client.send(&[b"last"]).unwrap();
    client.end();
    assert_eq!(client.send(&[b"more"]), Err(SendError::Closed));
    assert_eq!(server.receive().await.unwrap().unwrap(), "last");
    assert!(server.receive().await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn an_end_inside_a_message_is_an_error() {
    let (client, server) = memory_pair(&quiet());
    client.shared.wire.write(Bytes::from_static(&[200, 0, 0, 1])).unwrap();
    client.end();
    assert!(matches!(server.receive().await, Err(ReceiveError::CutOff)));
}

#[tokio::test(start_paused = true)]
async fn foreign_bytes_destroy_the_stream() {
    let (client, server) = memory_pair(&quiet());
    client.shared.wire.write(Bytes::from([&[17, 0, 0][..], &[1; 17]].concat())).unwrap();
    assert!(matches!(server.receive().await, Err(ReceiveError::Open(DecryptError::Forged))));
    assert!(matches!(server.receive().await, Err(ReceiveError::Open(DecryptError::Forged))));
    client.closed().await;
    assert_eq!(client.send(&[b"more"]), Err(SendError::Closed));
}

#[tokio::test(start_paused = true)]
async fn the_last_handle_closes_the_stream() {
    let (client, server) = memory_pair(&Options::default());
    drop(client.clone());
    client.send(&[b"still open"]).unwrap();
    drop(client);
    server.closed().await;
}

fn limited(message_bytes_max: usize, budget: &Arc<MessageBudget>) -> (SecretStream, SecretStream) {
    memory_pair(&Options { limits: Some(MessageLimits { message_bytes_max, budget: budget.clone() }), ..quiet() })
}

#[tokio::test(start_paused = true)]
async fn a_message_above_the_limit_waits_for_the_limit_to_be_raised() {
    let (client, server) = limited(1000, &MessageBudget::new(4_000_000));
    client.send(&[b"who I am"]).unwrap();
    client.send(&[&vec![7; 50_000]]).unwrap();
    assert_eq!(server.receive().await.unwrap().unwrap(), "who I am");
    assert!(timeout(Duration::from_secs(3), server.receive()).await.is_err());
    server.allow_messages(50_000);
    assert_eq!(server.receive().await.unwrap().unwrap().len(), 50_000);
    client.send(&[&vec![7; 2_000_000]]).unwrap();
    assert!(timeout(Duration::from_secs(3), server.receive()).await.is_err());
    server.lift_limits();
    assert_eq!(server.receive().await.unwrap().unwrap().len(), 2_000_000);
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_destroyed_if_a_message_stays_above_the_limit() {
    let (client, server) = limited(1000, &MessageBudget::new(1_000_000));
    client.send(&[&[7; 1001]]).unwrap();
    assert!(timeout(Duration::from_secs(3), server.receive()).await.is_err());
    assert!(matches!(server.receive().await, Err(ReceiveError::TooMuch)));
    client.closed().await;
}

#[tokio::test(start_paused = true)]
async fn half_a_message_that_was_there_first_gives_way_to_another_streams() {
    let budget = MessageBudget::new(100_000);
    let [(slow, slow_server), (client, server)] = [(); 2].map(|()| limited(100_000, &budget));
    let mut frame = BytesMut::new();
    slow.shared.sealing().sealer.seal(&[], &[&vec![7; 80_000]], &mut frame).unwrap();
    slow.shared.wire.write(frame.split_to(70_000).freeze()).unwrap();
    assert!(timeout(Duration::from_millis(1), slow_server.receive()).await.is_err());
    client.send(&[&vec![8; 60_000]]).unwrap();
    let message = server.receive().await.unwrap().unwrap();
    assert_eq!(message.len(), 60_000);
    assert!(slow_server.receive().await.is_err());
    // A message that is in use counts as well.
    let (next, next_server) = limited(100_000, &budget);
    next.send(&[&vec![9; 60_000]]).unwrap();
    assert_eq!(next_server.receive().await.unwrap().unwrap().len(), 60_000);
    server.closed().await;
}

#[tokio::test(start_paused = true)]
async fn both_sides_export_the_same_secret_for_each_purpose() {
    let (client, server) = memory_pair(&quiet());
    assert_eq!(client.export(b"one"), server.export(b"one"));
    assert_ne!(client.export(b"one"), client.export(b"two"));
}

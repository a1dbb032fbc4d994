use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::*;
use crate::secret_stream::{self, SendError, memory_pair};

const SOON: Duration = Duration::from_millis(10);

fn streams() -> (SecretStream, SecretStream) {
    memory_pair(&secret_stream::Options { keep_alive: None, ..secret_stream::Options::default() })
}

fn muxes_with(options: Options) -> (Protomux, Protomux) {
    let (client, server) = streams();
    let muxes = (Protomux::new(client, Options::default()), Protomux::new(server, options));
    muxes.0.start();
    muxes.1.start();
    muxes
}

fn muxes() -> (Protomux, Protomux) {
    muxes_with(Options::default())
}

fn with_handshake(handshake: &'static [u8]) -> ChannelOptions {
    ChannelOptions { handshake: Bytes::from_static(handshake), ..ChannelOptions::default() }
}

fn open(mux: &Protomux, protocol: &str) -> Channel {
    mux.open(protocol, b"", ChannelOptions::default()).unwrap()
}

async fn got(channel: &Channel) -> Bytes {
    channel.receive().await.unwrap().payload
}

#[tokio::test(start_paused = true)]
async fn channels_opened_by_both_sides_at_once_are_one() {
    let (client, server) = muxes();
    let mine = client.open("chat", b"id", with_handshake(b"hello")).unwrap();
    let theirs = server.open("chat", b"id", with_handshake(b"welcome")).unwrap();
    mine.send(0, &[b"a", b"b"]).unwrap();
    theirs.send(300, &[b"c"]).unwrap();
    assert_eq!(mine.opened().await.unwrap(), "welcome");
    assert_eq!(theirs.opened().await.unwrap(), "hello");
    assert_eq!(theirs.receive().await.unwrap(), ChannelMessage { kind: 0, payload: "ab".into() });
    assert_eq!(mine.receive().await.unwrap(), ChannelMessage { kind: 300, payload: "c".into() });
}

#[tokio::test(start_paused = true)]
async fn a_paired_protocol_is_accepted_with_what_was_sent_ahead() {
    let (client, server) = muxes();
    let pairing = server.pair("chat", None);
    let mine = client.open("chat", b"room", with_handshake(b"hello")).unwrap();
    mine.send(1, &[b"early"]).unwrap();
    let incoming = pairing.next().await.unwrap();
    assert_eq!((incoming.protocol(), incoming.id(), &incoming.handshake()[..]), ("chat", &b"room"[..], &b"hello"[..]));
    sleep(SOON).await;
    let theirs = incoming.accept(with_handshake(b"welcome")).unwrap();
    assert_eq!(theirs.remote_handshake(), None, "it is there once the reading task got to it");
    assert_eq!(got(&theirs).await, "early");
    assert_eq!(theirs.remote_handshake().unwrap(), "hello");
    assert_eq!(mine.opened().await.unwrap(), "welcome");
}

#[tokio::test(start_paused = true)]
async fn a_pairing_with_an_id_comes_before_one_without() {
    let (client, server) = muxes();
    let (any, one) = (server.pair("chat", None), server.pair("chat", Some(b"1")));
    let _channels =
        (client.open("chat", b"1", ChannelOptions::default()), client.open("chat", b"2", ChannelOptions::default()));
    assert_eq!(one.next().await.unwrap().id(), b"1");
    assert_eq!(any.next().await.unwrap().id(), b"2");
}

#[tokio::test(start_paused = true)]
async fn what_nobody_takes_is_rejected() {
    let (client, server) = muxes();
    let unknown = open(&client, "unknown");
    unknown.closed().await;
    assert!(unknown.opened().await.is_err());
    assert_eq!(unknown.receive().await, None);
    assert_eq!(unknown.send(0, &[b"late"]), Err(SendError::Closed));
    let pairing = server.pair("chat", None);
    let refused = open(&client, "chat");
    pairing.next().await.unwrap().reject();
    refused.closed().await;
    drop(pairing);
    open(&client, "chat").closed().await;
}

#[tokio::test(start_paused = true)]
async fn more_incoming_channels_than_may_wait_are_rejected() {
    let (client, server) = muxes_with(Options { incoming_max: 2, ..Options::default() });
    let pairing = server.pair("chat", None);
    let channels: Vec<_> =
        (0..3).map(|id| client.open("chat", &[1 + id], ChannelOptions::default()).unwrap()).collect();
    channels[2].closed().await;
    assert_eq!(pairing.next().await.unwrap().id(), [1]);
    assert_eq!(pairing.next().await.unwrap().id(), [2]);
}

#[tokio::test(start_paused = true)]
async fn more_channels_than_allowed_are_refused() {
    let (client, server) = muxes_with(Options { channels_max: 1, ..Options::default() });
    let _taken = (open(&client, "taken"), open(&server, "taken"));
    assert_eq!(server.open("taken", b"", ChannelOptions::default()).unwrap_err(), OpenError::Duplicate);
    assert_eq!(server.open("more", b"", ChannelOptions::default()).unwrap_err(), OpenError::TooMany);
    let pairing = server.pair("chat", None);
    let refused = open(&client, "chat");
    assert_eq!(pairing.next().await.unwrap().accept(ChannelOptions::default()).unwrap_err(), AcceptError::TooMany);
    refused.closed().await;
}

#[tokio::test(start_paused = true)]
async fn a_dropped_channel_is_closed_on_both_sides_after_its_messages() {
    let (client, server) = muxes();
    let (mine, theirs) = (open(&client, "chat"), open(&server, "chat"));
    mine.opened().await.unwrap();
    mine.send(0, &[b"last"]).unwrap();
    drop(mine);
    theirs.closed().await;
    assert_eq!(got(&theirs).await, "last");
    assert_eq!(theirs.receive().await, None);
    drop(theirs);
    // The name can be used again.
    let (mine, theirs) = (open(&client, "chat"), open(&server, "chat"));
    mine.send(0, &[b"again"]).unwrap();
    assert_eq!(got(&theirs).await, "again");
}

#[tokio::test(start_paused = true)]
async fn a_slow_consumer_makes_the_peer_wait_and_loses_nothing() {
    let (client, server) = muxes();
    let mine = Arc::new(open(&client, "bulk"));
    let options = ChannelOptions { queue_bytes_max: 100_000, ..ChannelOptions::default() };
    let theirs = server.open("bulk", b"", options).unwrap();
    let sender = Arc::clone(&mine);
    let tasks = TaskTracker::new();
    let sending = tasks.spawn(async move {
        for number in 0..30_u8 {
            sender.room().await.unwrap();
            sender.send(0, &[&vec![number; 50_000]]).unwrap();
        }
    });
    sleep(Duration::from_mins(1)).await;
    assert!(!sending.is_finished(), "queues are bounded");
    for number in 0..30_u8 {
        assert_eq!(got(&theirs).await, vec![number; 50_000]);
    }
    sending.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_overflowing_channel_is_closed_where_it_asked_for_that() {
    let (client, server) = muxes();
    let options = ChannelOptions { queue_bytes_max: 1000, overflow: Overflow::Close, ..ChannelOptions::default() };
    let (mine, theirs) = (open(&client, "credit"), server.open("credit", b"", options).unwrap());
    let (other, others) = (open(&client, "other"), open(&server, "other"));
    for _ in 0..10 {
        mine.send(0, &[&[7; 200]]).unwrap();
    }
    mine.closed().await;
    let mut taken = 0;
    while theirs.receive().await.is_some() {
        taken += 1;
    }
    assert_eq!(taken, 3, "what fitted is still there");
    other.send(0, &[b"unharmed"]).unwrap();
    assert_eq!(got(&others).await, "unharmed");
}

#[tokio::test(start_paused = true)]
async fn reading_waits_while_too_much_is_pending() {
    let (client, server) = muxes_with(Options { pending_bytes_max: 1000, ..Options::default() });
    let pairing = server.pair("chat", None);
    let (mine, other, others) = (open(&client, "chat"), open(&client, "other"), open(&server, "other"));
    for _ in 0..20 {
        mine.send(0, &[&[7; 100]]).unwrap();
    }
    other.send(0, &[b"behind"]).unwrap();
    let incoming = pairing.next().await.unwrap();
    assert!(timeout(Duration::from_mins(1), others.receive()).await.is_err());
    let theirs = incoming.accept(ChannelOptions::default()).unwrap();
    assert_eq!(got(&others).await, "behind");
    for _ in 0..20 {
        assert_eq!(got(&theirs).await.len(), 100);
    }
}

#[tokio::test(start_paused = true)]
async fn a_rejection_ends_the_wait_for_what_is_pending() {
    let (client, server) = muxes_with(Options { pending_bytes_max: 1000, ..Options::default() });
    let pairing = server.pair("chat", None);
    let (mine, other, others) = (open(&client, "chat"), open(&client, "other"), open(&server, "other"));
    mine.send(0, &[&[7; 5000]]).unwrap();
    other.send(0, &[b"behind"]).unwrap();
    let incoming = pairing.next().await.unwrap();
    assert!(timeout(SOON, others.receive()).await.is_err());
    incoming.reject();
    assert_eq!(got(&others).await, "behind");
}

#[tokio::test(start_paused = true)]
async fn corked_messages_go_as_one_batch() {
    let (stream, peer) = streams();
    let mux = Protomux::new(stream, Options::default());
    {
        let _corked = mux.cork();
        let channel = open(&mux, "chat");
        channel.send(0, &[b"two"]).unwrap();
        open(&mux, "other").send(1, &[b"x"]).unwrap();
        channel.send(0, &[b"last"]).unwrap();
        assert!(timeout(SOON, peer.receive()).await.is_err());
        std::mem::forget(channel);
    }
    // The same bytes as protomux 3.12 sends.
    let batch = peer.receive().await.unwrap().unwrap();
    let expected = "0000000801010463686174000001040074776f0000090102056f7468657200";
    assert!(hex::encode(&batch).starts_with(expected), "{}", hex::encode(&batch));
    let receiver = Protomux::new(peer, Options::default());
    let channel = open(&receiver, "chat");
    receiver.handle.shared.state().receive(batch).unwrap();
    receiver.start();
    assert_eq!(got(&channel).await, "two");
    assert_eq!(got(&channel).await, "last");
}

#[tokio::test(start_paused = true)]
async fn a_large_corked_message_goes_alone() {
    let (client, server) = muxes();
    let (mine, theirs) = (open(&client, "bulk"), open(&server, "bulk"));
    mine.opened().await.unwrap();
    let large = vec![7; MESSAGE_BYTES_MAX - 2];
    {
        let _corked = client.cork();
        mine.send(0, &[b"small"]).unwrap();
        mine.send(0, &[&large]).unwrap();
        assert!(matches!(mine.send(0, &[&large, b"x"]), Err(SendError::TooLong(_))));
        mine.send(0, &[b"after"]).unwrap();
    }
    assert_eq!(got(&theirs).await, "small");
    assert_eq!(got(&theirs).await.len(), large.len());
    assert_eq!(got(&theirs).await, "after");
}

#[tokio::test(start_paused = true)]
async fn a_message_too_long_leaves_the_channel_open() {
    let (client, server) = muxes();
    let (mine, theirs) = (open(&client, "chat"), open(&server, "chat"));
    assert!(matches!(mine.send(0, &[&vec![0; MESSAGE_BYTES_MAX]]), Err(SendError::TooLong(_))));
    mine.send(0, &[b"short"]).unwrap();
    assert_eq!(got(&theirs).await, "short");
    let long = ChannelOptions { handshake: vec![0; MESSAGE_BYTES_MAX].into(), ..ChannelOptions::default() };
    assert_eq!(client.open("other", b"", long).unwrap_err(), OpenError::TooLong);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_connection_closes_everything() {
    let (client, server) = muxes();
    let (mine, theirs, pairing) = (open(&client, "chat"), open(&server, "chat"), server.pair("other", None));
    mine.send(0, &[b"last"]).unwrap();
    client.close();
    assert_eq!(got(&theirs).await, "last");
    assert_eq!(theirs.receive().await, None);
    assert!(pairing.next().await.is_none());
    assert_eq!(mine.receive().await, None);
    mine.closed().await;
    assert_eq!(client.open("more", b"", ChannelOptions::default()).unwrap_err(), OpenError::Closed);
    assert_eq!(server.open("more", b"", ChannelOptions::default()).unwrap_err(), OpenError::Closed);
    client.closed().await;
    server.closed().await;
}

#[tokio::test(start_paused = true)]
async fn the_last_handle_ends_the_connection() {
    let (client, server) = muxes();
    let (mine, theirs) = (open(&client, "chat"), open(&server, "chat"));
    drop(client);
    mine.send(0, &[b"still open"]).unwrap();
    assert_eq!(got(&theirs).await, "still open");
    drop(mine);
    server.closed().await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_ends_is_cut_off() {
    let (stream, peer) = streams();
    let mux = Protomux::new(stream, Options::default());
    mux.start();
    drop(mux);
    assert!(timeout(Duration::from_secs(9), peer.closed()).await.is_err());
    timeout(Duration::from_secs(2), peer.closed()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_violation_destroys_the_connection() {
    let (stream, peer) = streams();
    let mux = Protomux::new(stream, Options::default());
    let channel = open(&mux, "chat");
    mux.start();
    peer.send(&[&[0, 2, 9]]).unwrap();
    channel.closed().await;
    peer.closed().await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_no_answers_is_cut_off() {
    let (stream, peer) = streams();
    let mux = Protomux::new(stream, Options::default());
    mux.start();
    // Each open message is answered with a rejection, which the peer never reads.
    let flood = async {
        let open = [0, 1, 1, 1, b'a', 0];
        while peer.room().await.is_ok() && peer.send(&[&open]).is_ok() {}
    };
    timeout(Duration::from_mins(5), flood).await.unwrap();
    mux.closed().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_here_is_taken_without_waiting_and_makes_room() {
    let (client, server) = muxes();
    let mine = open(&client, "chat");
    let options = ChannelOptions { queue_bytes_max: 1, overflow: Overflow::Wait, ..ChannelOptions::default() };
    let theirs = server.open("chat", b"", options).unwrap();
    assert_eq!(theirs.try_receive(), None);
    for word in ["one", "two"] {
        mine.send(0, &[word.as_bytes()]).unwrap();
    }
    sleep(SOON).await;
    assert_eq!(theirs.try_receive().unwrap().payload, "one");
    assert_eq!(theirs.try_receive(), None, "the second found no room");
    sleep(SOON).await;
    assert_eq!(theirs.try_receive().unwrap().payload, "two");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_either_side_ends_is_closed_at_both() {
    for by_client in [true, false] {
        let (client, server) = muxes();
        assert!(!client.is_closed() && !server.is_closed());
        if by_client { &client } else { &server }.close();
        sleep(SOON).await;
        assert!(client.is_closed() && server.is_closed());
        assert_eq!(client.open("chat", b"", ChannelOptions::default()).err(), Some(OpenError::Closed));
    }
}

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use super::*;
use crate::protomux::ChannelOptions;
use crate::secret_stream::{self, memory_pair};

const SERVER: [u8; 32] = [7; 32];
const SOON: Duration = Duration::from_millis(10);

fn streams() -> (SecretStream, SecretStream) {
    memory_pair(&secret_stream::Options { keep_alive: None, ..secret_stream::Options::default() })
}

fn pair_with(client: &Options, server: &Options) -> ((Rpc, Requests), (Rpc, Requests)) {
    let (one, other) = streams();
    (Rpc::over(one, &SERVER, client).unwrap(), Rpc::over(other, &SERVER, server).unwrap())
}

fn pair() -> ((Rpc, Requests), (Rpc, Requests)) {
    pair_with(&Options::default(), &Options::default())
}

/// Answers every request with its own value.
async fn echo(requests: Requests) {
    while let Some(request) = requests.next().await {
        let (value, reply) = request.into_parts();
        reply.ok(&value).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn both_sides_ask_on_one_channel() {
    let ((client, client_requests), (server, server_requests)) = pair();
    let tasks = TaskTracker::new();
    tasks.spawn(echo(client_requests));
    tasks.spawn(echo(server_requests));
    client.opened().await.unwrap();
    assert_eq!(client.request("echo", b"from the client").await.unwrap(), "from the client");
    assert_eq!(server.request("echo", b"from the server").await.unwrap(), "from the server");
    assert_eq!(client.request("echo", b"").await.unwrap(), "");
}

#[tokio::test(start_paused = true)]
async fn answers_find_their_requests_in_any_order() {
    let ((client, _unused), (_server, requests)) = pair();
    let ask = async { tokio::join!(client.request("first", b"1"), client.request("second", b"2")) };
    let answer = async {
        let (first, second) = (requests.next().await.unwrap(), requests.next().await.unwrap());
        assert_eq!((first.method(), &first.value()[..]), ("first", &b"1"[..]));
        assert_eq!((second.method(), &second.value()[..]), ("second", &b"2"[..]));
        second.ok(b"two").unwrap();
        first.ok(b"one").unwrap();
    };
    let ((first, second), ()) = tokio::join!(ask, answer);
    assert_eq!((first.unwrap(), second.unwrap()), ("one".into(), "two".into()));
}

#[tokio::test(start_paused = true)]
async fn errors_come_with_code_and_cause() {
    let ((client, _unused), (_server, requests)) = pair();
    let error = RemoteError::failed(Cause::new("the model is not here", "NO_MODEL"));
    let answer = async { requests.next().await.unwrap().error(&error).unwrap() };
    let (result, ()) = tokio::join!(client.request("run", b""), answer);
    assert_eq!(result, Err(RequestError::Remote(Box::new(error))));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_request_is_answered_with_an_error() {
    let ((client, _unused), (_server, requests)) = pair();
    let (result, ()) = tokio::join!(client.request("run", b""), async { drop(requests.next().await) });
    let Err(RequestError::Remote(error)) = result else { panic!("{result:?}") };
    assert_eq!(error.code, REQUEST_ERROR);
}

#[tokio::test(start_paused = true)]
async fn where_nobody_takes_requests_every_method_is_unknown() {
    let ((client, _unused), (_server, requests)) = pair();
    let early = client.request("early", b"");
    let (early, ()) = tokio::join!(early, async {
        sleep(SOON).await;
        drop(requests);
    });
    assert_eq!(early, Err(RequestError::Remote(Box::new(RemoteError::unknown_method("early")))));
    let late = client.request("late", b"").await;
    assert_eq!(late, Err(RequestError::Remote(Box::new(RemoteError::unknown_method("late")))));
    client.event("ignored", b"").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn events_have_no_response() {
    let ((client, _unused), (_server, requests)) = pair();
    client.event("note", b"value").await.unwrap();
    let event = requests.next().await.unwrap();
    assert!(event.is_event());
    assert_eq!((event.method(), &event.value()[..]), ("note", &b"value"[..]));
    event.ok(b"nowhere").unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_dropped_is_forgotten_and_its_response_too() {
    let ((client, _unused), (_server, requests)) = pair();
    assert!(timeout(SOON, client.request("slow", b"1")).await.is_err());
    let slow = requests.next().await.unwrap();
    let answer = async {
        let next = requests.next().await.unwrap();
        slow.ok(b"late").unwrap();
        next.ok(b"in time").unwrap();
    };
    let (next, ()) = tokio::join!(client.request("next", b"2"), answer);
    assert_eq!(next.unwrap(), "in time");
}

#[tokio::test(start_paused = true)]
async fn a_request_too_long_is_refused_and_the_next_one_goes() {
    let ((client, _unused), (_server, requests)) = pair();
    let long = vec![0; MESSAGE_BYTES_MAX];
    assert_eq!(client.request("measure", &long).await, Err(RequestError::TooLong));
    let longest = &long[..value_bytes_max("measure")];
    let answer = async {
        let request = requests.next().await.unwrap();
        let length = request.value().len().to_string();
        request.ok(length.as_bytes()).unwrap();
    };
    let (result, ()) = tokio::join!(client.request("measure", longest), answer);
    assert_eq!(result.unwrap(), longest.len().to_string());
}

#[tokio::test(start_paused = true)]
async fn a_response_too_long_becomes_an_error() {
    let ((client, _unused), (_server, requests)) = pair();
    let answer = async { requests.next().await.unwrap().ok(&vec![0; MESSAGE_BYTES_MAX]) };
    let (result, answered) = tokio::join!(client.request("big", b""), answer);
    assert_eq!(answered, Err(ReplyError::TooLong));
    let Err(RequestError::Remote(error)) = result else { panic!("{result:?}") };
    assert_eq!(error.code, ENCODE_ERROR);
}

#[tokio::test(start_paused = true)]
async fn no_more_requests_are_taken_than_can_be_worked_on() {
    let server = Options { received_max: 2, ..Options::default() };
    let ((client, _unused), (_server, requests)) = pair_with(&Options::default(), &server);
    let tasks = TaskTracker::new();
    for number in 0..5_u8 {
        let client = client.clone();
        tasks.spawn(async move { client.request("work", &[number]).await });
    }
    let (first, second) = (requests.next().await.unwrap(), requests.next().await.unwrap());
    assert!(timeout(Duration::from_mins(1), requests.next()).await.is_err());
    first.ok(b"").unwrap();
    let third = requests.next().await.unwrap();
    assert_eq!(third.value()[..], [2]);
    assert!(timeout(Duration::from_mins(1), requests.next()).await.is_err());
    // The dropped future above did not consume a request.
    drop((second, third));
    assert_eq!(requests.next().await.unwrap().value()[..], [3]);
}

#[tokio::test(start_paused = true)]
async fn large_requests_wait_for_each_other_and_one_alone_always_fits() {
    let server = Options { received_bytes_max: 1000, ..Options::default() };
    let ((client, _unused), (_server, requests)) = pair_with(&Options::default(), &server);
    let tasks = TaskTracker::new();
    for _ in 0..2 {
        let client = client.clone();
        tasks.spawn(async move { client.request("work", &[7; 5000]).await });
    }
    let first = requests.next().await.unwrap();
    assert!(timeout(Duration::from_mins(1), requests.next()).await.is_err());
    first.ok(b"").unwrap();
    assert_eq!(requests.next().await.unwrap().value().len(), 5000);
}

#[tokio::test(start_paused = true)]
async fn no_more_requests_are_sent_than_may_be_unanswered() {
    let client = Options { sent_max: 2, ..Options::default() };
    let ((client, _unused), (_server, requests)) = pair_with(&client, &Options::default());
    let tasks = TaskTracker::new();
    for _ in 0..3 {
        let client = client.clone();
        tasks.spawn(async move { client.request("work", b"").await });
    }
    let (first, _second) = (requests.next().await.unwrap(), requests.next().await.unwrap());
    assert!(timeout(Duration::from_mins(1), requests.next()).await.is_err());
    first.ok(b"").unwrap();
    requests.next().await.unwrap().ok(b"").unwrap();
}

#[tokio::test(start_paused = true)]
async fn responses_pass_while_requests_wait() {
    let busy = Options { received_max: 64, sent_max: 64, ..Options::default() };
    let ((client, client_requests), (server, server_requests)) = pair_with(&busy, &busy);
    let tasks = TaskTracker::new();
    tasks.spawn(echo(client_requests));
    tasks.spawn(echo(server_requests));
    // Both sides flood each other with far more than the queues between them can hold.
    let value = vec![7; 20_000];
    let flood = |rpc: Rpc| {
        let value = value.clone();
        let asks = (0..100).map(move |_| {
            let (rpc, value) = (rpc.clone(), value.clone());
            async move { rpc.request("echo", &value).await.unwrap() }
        });
        futures_util::future::join_all(asks)
    };
    let both = futures_util::future::join(flood(client), flood(server));
    let (one, other) = timeout(Duration::from_mins(10), both).await.unwrap();
    assert_eq!((one.len(), other.len()), (100, 100));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_no_responses_is_cut_off() {
    let (client, server) = streams();
    let (held, requests) = Rpc::over(server, &SERVER, &Options::default()).unwrap();
    let mut open = vec![0, 1, 1, 12];
    open.extend_from_slice(PROTOCOL.as_bytes());
    open.push(32);
    open.extend_from_slice(&SERVER);
    client.send(&[&open]).unwrap();
    for id in 1..=100 {
        client.send(&[&[1, 0, id, 1, b'm']]).unwrap();
    }
    let value = vec![7; 100_000];
    let mut answered = 0;
    while let Some(request) = requests.next().await {
        let _ = request.ok(&value);
        answered += 1;
    }
    assert!(answered >= 100, "what was taken before is still handed out");
    held.closed().await;
}

#[tokio::test(start_paused = true)]
async fn a_closed_channel_fails_what_waits_and_what_comes() {
    let ((client, client_requests), (server, requests)) = pair();
    let close = async {
        let held = requests.next().await.unwrap();
        server.close();
        held
    };
    let (result, held) = tokio::join!(client.request("work", b""), close);
    assert_eq!(result, Err(RequestError::Closed));
    assert_eq!(held.ok(b"late"), Err(ReplyError::Closed));
    assert!(requests.next().await.is_none());
    assert!(client_requests.next().await.is_none());
    assert_eq!(client.request("work", b"").await, Err(RequestError::Closed));
    client.closed().await;
}

#[tokio::test(start_paused = true)]
async fn another_servers_key_is_refused() {
    let (one, other) = streams();
    let (client, _unused) = Rpc::over(one, &[8; 32], &Options::default()).unwrap();
    let _server = Rpc::over(other, &SERVER, &Options::default()).unwrap();
    assert_eq!(client.request("work", b"").await, Err(RequestError::Closed));
    assert!(client.opened().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn other_protocols_share_the_connection() {
    let (one, other) = streams();
    let muxes = [one, other].map(|stream| Protomux::new(stream, protomux::Options::default()));
    let (client, _unused) = Rpc::open(&muxes[0], &SERVER, &Options::default()).unwrap();
    let (_server, requests) = Rpc::open(&muxes[1], &SERVER, &Options::default()).unwrap();
    assert_eq!(Rpc::open(&muxes[0], &SERVER, &Options::default()).unwrap_err(), OpenError::Duplicate);
    let channels = [0, 1].map(|side: usize| muxes[side].open("bulk", b"", ChannelOptions::default()).unwrap());
    muxes.iter().for_each(Protomux::start);
    let tasks = TaskTracker::new();
    tasks.spawn(echo(requests));
    channels[0].send(5, &[b"bulk"]).unwrap();
    assert_eq!(client.request("echo", b"value").await.unwrap(), "value");
    assert_eq!(channels[1].receive().await.unwrap().payload, "bulk");
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_no_request_destroys_the_connection() {
    let (stream, peer) = streams();
    let (rpc, _requests) = Rpc::over(stream, &SERVER, &Options::default()).unwrap();
    let mut open = vec![0, 1, 1, 12];
    open.extend_from_slice(PROTOCOL.as_bytes());
    open.push(32);
    open.extend_from_slice(&SERVER);
    peer.send(&[&open]).unwrap();
    peer.send(&[&[1, 9, 1]]).unwrap();
    rpc.opened().await.unwrap();
    peer.send(&[&[1, 0, 1, 200]]).unwrap();
    rpc.closed().await;
    peer.closed().await;
}

//! Tests of streams over loopback, and of state machines over a link that loses, duplicates and reorders packets.

#[cfg(target_os = "linux")]
mod closed_port;
mod link;
mod simulation;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use std::sync::Arc;

use bytes::Bytes;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Socket, Stream, StreamClosed, StreamError, StreamOptions, Udx};

pub(crate) const ANY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);

struct Pair {
    here: Stream,
    there: Stream,
    sockets: (Socket, Socket),
}

fn pair() -> Pair {
    let (udx_here, udx_there) = (Udx::new(), Udx::new());
    let (socket_here, _) = udx_here.bind(ANY).unwrap();
    let (socket_there, _) = udx_there.bind(ANY).unwrap();
    let here = udx_here.stream(StreamOptions::default());
    let there = udx_there.stream(StreamOptions::default());
    here.connect(&socket_here, there.id(), socket_there.local_address());
    there.connect(&socket_there, here.id(), socket_here.local_address());
    Pair { here, there, sockets: (socket_here, socket_there) }
}

async fn read_to_end(stream: &Stream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = timeout(Duration::from_secs(10), stream.read()).await.unwrap().unwrap() {
        all.extend_from_slice(&bytes);
    }
    all
}

pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

#[tokio::test]
async fn bytes_arrive_in_order_and_end_both_ways() {
    let pair = pair();
    let sent = pattern(3_000_000);
    for piece in sent.chunks(10_007) {
        pair.here.room().await.unwrap();
        pair.here.write(Bytes::copy_from_slice(piece)).unwrap();
    }
    pair.here.end();
    pair.there.write(Bytes::from_static(b"short answer")).unwrap();
    pair.there.end();
    assert_eq!(read_to_end(&pair.there).await, sent);
    assert_eq!(read_to_end(&pair.here).await, b"short answer");
    pair.here.closed().await;
    pair.there.closed().await;
}

async fn soon<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(10), future).await.expect("comes soon")
}

#[tokio::test]
async fn what_is_not_udx_reaches_the_socket_s_user() {
    let udx = Udx::new();
    let (socket, mut datagrams) = udx.bind(ANY).unwrap();
    let (other, _) = udx.bind(ANY).unwrap();
    other.send(socket.local_address(), b"\x03 a request");
    let datagram = soon(datagrams.recv()).await.unwrap();
    assert_eq!((datagram.from, &datagram.bytes[..]), (other.local_address(), &b"\x03 a request"[..]));
}

#[tokio::test]
async fn datagrams_that_nobody_takes_are_dropped_and_streams_go_on() {
    let pair = pair();
    for _ in 0..5000 {
        pair.sockets.0.send(pair.sockets.1.local_address(), b"unread");
    }
    pair.here.write(Bytes::from_static(b"through")).unwrap();
    assert_eq!(soon(pair.there.read()).await, Ok(Some(Bytes::from_static(b"through"))));
}

#[tokio::test]
async fn a_stream_hears_who_calls_before_it_is_connected() {
    let udx = Udx::new();
    let (socket_here, _) = udx.bind(ANY).unwrap();
    let (socket_there, _) = udx.bind(ANY).unwrap();
    let (here, there) = (udx.stream(StreamOptions::default()), udx.stream(StreamOptions::default()));
    here.connect(&socket_here, there.id(), socket_there.local_address());
    here.write(Bytes::from_static(b"early")).unwrap();
    let first = soon(there.first_packet()).await;
    assert_eq!(first, Some((socket_there.clone(), socket_here.local_address())));
    there.connect(&socket_there, here.id(), socket_here.local_address());
    assert_eq!(soon(there.read()).await, Ok(Some(Bytes::from_static(b"early"))));
    there.write(Bytes::from_static(b"answer")).unwrap();
    assert_eq!(soon(here.read()).await, Ok(Some(Bytes::from_static(b"answer"))));
}

#[tokio::test]
async fn a_firewall_keeps_packets_from_a_stream_that_is_not_connected() {
    let udx = Udx::new();
    let (socket_here, _) = udx.bind(ANY).unwrap();
    let (socket_there, _) = udx.bind(ANY).unwrap();
    let refused = socket_here.local_address();
    let options =
        StreamOptions { firewall: Some(Arc::new(move |_: &Socket, from| from != refused)), ..StreamOptions::default() };
    let (here, there) = (udx.stream(StreamOptions::default()), udx.stream(options));
    here.connect(&socket_here, there.id(), socket_there.local_address());
    here.write(Bytes::from_static(b"unwelcome")).unwrap();
    assert!(timeout(Duration::from_millis(50), there.first_packet()).await.is_err());
}

#[tokio::test]
async fn destroying_resets_the_other_side_and_drops_what_waits() {
    let pair = pair();
    pair.here.write(Bytes::from_static(b"hello")).unwrap();
    assert_eq!(soon(pair.there.read()).await, Ok(Some(Bytes::from_static(b"hello"))));
    pair.here.destroy();
    assert_eq!(soon(pair.there.read()).await, Err(StreamError::Reset));
    assert_eq!(soon(pair.here.read()).await, Err(StreamError::Destroyed));
    assert_eq!(pair.here.write(Bytes::from_static(b"too late")), Err(StreamClosed));
    assert_eq!(soon(pair.there.room()).await, Err(StreamClosed));
    soon(pair.here.closed()).await;
}

#[tokio::test]
async fn dropping_the_last_handle_destroys_an_open_stream() {
    let Pair { here, there, sockets: _sockets } = pair();
    here.write(Bytes::from_static(b"hello")).unwrap();
    assert_eq!(soon(there.read()).await, Ok(Some(Bytes::from_static(b"hello"))));
    let clone = here.clone();
    drop(here);
    clone.write(Bytes::from_static(b"still here")).unwrap();
    assert_eq!(soon(there.read()).await, Ok(Some(Bytes::from_static(b"still here"))));
    drop(clone);
    assert_eq!(soon(there.read()).await, Err(StreamError::Reset));
}

#[tokio::test]
async fn what_was_ended_arrives_although_the_handles_and_socket_are_dropped() {
    let Pair { here, there, sockets: (socket_here, _socket_there) } = pair();
    let sent = pattern(1_000_000);
    here.write(Bytes::from(sent.clone())).unwrap();
    here.end();
    drop((here, socket_here));
    assert_eq!(soon(read_to_end(&there)).await, sent);
}

#[tokio::test]
async fn closing_a_socket_closes_its_streams_on_both_sides() {
    let pair = pair();
    pair.sockets.0.close();
    assert_eq!(soon(pair.here.read()).await, Err(StreamError::SocketClosed));
    assert_eq!(soon(pair.there.read()).await, Err(StreamError::Reset));
    let late = Udx::new().stream(StreamOptions::default());
    late.connect(&pair.sockets.0, 1, pair.sockets.1.local_address());
    assert_eq!(soon(late.read()).await, Err(StreamError::SocketClosed));
}

#[tokio::test]
async fn a_writer_that_asks_for_room_waits_for_a_reader_that_stops() {
    let pair = pair();
    let mut written = 0;
    while timeout(Duration::from_millis(200), pair.here.room()).await.is_ok() {
        pair.here.write(Bytes::from(vec![7; 64 * 1024])).unwrap();
        written += 64 * 1024;
    }
    assert!((4_000_000..5_000_000).contains(&written), "{written} bytes were taken");
    let mut read = 0;
    while read < written {
        read += soon(pair.there.read()).await.unwrap().unwrap().len();
    }
    soon(pair.here.room()).await.unwrap();
}

#[tokio::test]
async fn streams_are_forgotten_when_they_are_gone() {
    let udx = Udx::new();
    let (socket, _) = udx.bind(ANY).unwrap();
    for _ in 0..10 {
        drop(udx.stream(StreamOptions::default()));
    }
    assert!(udx.table.lock().is_empty());
    let (here, there) = (udx.stream(StreamOptions::default()), udx.stream(StreamOptions::default()));
    here.connect(&socket, there.id(), socket.local_address());
    there.connect(&socket, here.id(), socket.local_address());
    here.write(Bytes::from_static(b"x")).unwrap();
    soon(there.read()).await.unwrap();
    here.destroy();
    soon(there.closed()).await;
    assert_eq!(udx.table.by_peer.lock().len(), 1);
    // The side that destroyed the stream lingers to answer late packets.
    let left: Vec<_> = udx.table.lock().keys().copied().collect();
    assert_eq!(left, [here.id()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_share_a_socket() {
    let (udx_here, udx_there) = (Udx::new(), Udx::new());
    let (socket_here, _) = udx_here.bind(ANY).unwrap();
    let (socket_there, _) = udx_there.bind(ANY).unwrap();
    let mut tasks = JoinSet::new();
    for number in 0..1000u32 {
        let (here, there) = (udx_here.stream(StreamOptions::default()), udx_there.stream(StreamOptions::default()));
        here.connect(&socket_here, there.id(), socket_there.local_address());
        there.connect(&socket_there, here.id(), socket_here.local_address());
        tasks.spawn(async move {
            let sent = pattern(number as usize % 100 * 50 + 1);
            here.write(Bytes::from(sent.clone())).unwrap();
            here.end();
            there.end();
            let received = read_to_end(&there).await;
            soon(here.closed()).await;
            received == sent
        });
    }
    assert!(tasks.join_all().await.into_iter().all(|same| same));
}

#[tokio::test]
async fn strangers_on_the_wire_do_no_harm() {
    let pair = pair();
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut datagram = vec![0xff, 1, 63, 0];
    datagram.extend_from_slice(&pair.here.id().wrapping_add(1).to_le_bytes());
    datagram.extend_from_slice(&[0; 12]);
    stranger.send_to(&datagram, pair.sockets.0.local_address()).await.unwrap();
    for length in 0..datagram.len() {
        stranger.send_to(&datagram[..length], pair.sockets.0.local_address()).await.unwrap();
    }
    pair.there.write(Bytes::from_static(b"undisturbed")).unwrap();
    assert_eq!(soon(pair.here.read()).await, Ok(Some(Bytes::from_static(b"undisturbed"))));
}

//! Tests of streams whose peer's port is closed, over loopback, where the kernel sends the ICMP messages.

use std::net::{SocketAddr, SocketAddrV4};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

use super::{ANY, soon};
use crate::udx::packet::{DATA, HEARTBEAT, Header, Packet};
use crate::udx::{Socket, Stream, StreamError, StreamOptions, Udx};

/// The id under which the peer knows the stream.
const REMOTE_ID: u32 = 7;
const MILLISECOND: Duration = Duration::from_millis(1);

/// A stream to a peer whose packets the test writes itself.
struct Scene {
    udx: Udx,
    socket: Socket,
    stream: Stream,
    peer: UdpSocket,
    address: SocketAddrV4,
}

async fn scene() -> Scene {
    let udx = Udx::new();
    let (socket, _) = udx.bind(ANY).unwrap();
    let peer = UdpSocket::bind(ANY).await.unwrap();
    let SocketAddr::V4(address) = peer.local_addr().unwrap() else { panic!("bound to IPv4") };
    let stream = udx.stream(StreamOptions::default());
    stream.connect(&socket, REMOTE_ID, address);
    Scene { udx, socket, stream, peer, address }
}

async fn until_a_message_was_read(socket: &Socket) {
    while !socket.link().had_errors.load(Ordering::Relaxed) {
        sleep(MILLISECOND).await;
    }
}

fn packet(stream_id: u32, kind: u8, ack: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Header { kind, stream_id, window_bytes: 1 << 20, sequence: 0, ack }.encode(0, &mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

#[tokio::test]
async fn a_watched_stream_whose_peer_is_gone_ends_although_nothing_is_sent() {
    let Scene { stream, peer, .. } = scene().await;
    stream.watch(true);
    stream.write(Bytes::from_static(b"a question")).unwrap();
    let mut buffer = [0; 100];
    let (_, here) = soon(peer.recv_from(&mut buffer)).await.unwrap();
    peer.send_to(&packet(stream.id(), 0, 1, b""), here).await.unwrap();
    drop(peer);
    assert_eq!(soon(stream.read()).await, Err(StreamError::PortClosed));
    assert_eq!(stream.error(), Some(StreamError::PortClosed));
}

#[tokio::test]
async fn what_is_in_flight_to_a_closed_port_ends_a_stream_that_is_not_watched() {
    let Scene { stream, peer, .. } = scene().await;
    drop(peer);
    stream.write(Bytes::from_static(b"a question")).unwrap();
    assert_eq!(soon(stream.read()).await, Err(StreamError::PortClosed));
}

#[tokio::test]
async fn a_port_that_is_closed_for_a_moment_ends_nothing() {
    let Scene { socket, stream, peer, address, .. } = scene().await;
    drop(peer);
    stream.write(Bytes::from_static(b"a question")).unwrap();
    soon(until_a_message_was_read(&socket)).await;
    let peer = UdpSocket::bind(address).await.unwrap();
    let mut buffer = [0; 100];
    let (length, here) = soon(peer.recv_from(&mut buffer)).await.unwrap();
    assert!(Packet::decode(&buffer[..length]).is_some_and(|packet| packet.header.stream_id == REMOTE_ID));
    peer.send_to(&packet(stream.id(), 0, 1, b""), here).await.unwrap();
    assert!(timeout(1_000 * MILLISECOND, stream.read()).await.is_err(), "nothing has come, and nothing has ended");
    peer.send_to(&packet(stream.id(), DATA, 1, b"an answer"), here).await.unwrap();
    assert_eq!(soon(stream.read()).await, Ok(Some(Bytes::from_static(b"an answer"))));
}

#[tokio::test]
async fn messages_that_quote_packets_of_no_stream_end_nothing() {
    let Scene { udx, socket, stream, peer, address } = scene().await;
    drop(peer);
    for _ in 0..10 {
        // The host reports each of these, as a stranger could who knows both addresses.
        socket.send(address, &packet(REMOTE_ID + 1, HEARTBEAT, 0, b""));
        socket.send(address, b"not a packet of a stream");
        sleep(80 * MILLISECOND).await;
    }
    soon(until_a_message_was_read(&socket)).await;
    assert_eq!(stream.error(), None);
    assert_eq!(stream.stats().packets_sent, 0, "no probe is sent for them either");
    socket.close();
    soon(udx.closed()).await;
    assert!(udx.table.by_peer.lock().is_empty());
}

#[tokio::test]
async fn errors_of_one_peer_cost_another_no_packet() {
    let Scene { udx, socket, stream, peer, .. } = scene().await;
    let gone = UdpSocket::bind(ANY).await.unwrap();
    let SocketAddr::V4(nowhere) = gone.local_addr().unwrap() else { panic!("bound to IPv4") };
    drop(gone);
    let mut buffer = [0; 100];
    for _ in 0..200 {
        // The kernel reports the first packet's error to whatever call comes next.
        socket.send(nowhere, b"lost");
        socket.send(stream.remote_address().unwrap(), b"not lost");
        let (length, here) = soon(peer.recv_from(&mut buffer)).await.unwrap();
        assert_eq!((&buffer[..length], here), (&b"not lost"[..], SocketAddr::V4(socket.local_address())));
    }
    drop(udx);
}

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use serde_json::Value;
use tether_hyperswarm::udx::{Stream, StreamError, StreamOptions, Udx};
use tokio::net::UdpSocket;
use tokio::time;

use super::{bytes, cases, parsed, read};

const ANY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);

/// A stream of this crate whose peer says what the Node package once said.
struct Replay {
    peer: UdpSocket,
    stream: Stream,
    own: SocketAddr,
    _udx: Udx,
}

impl Replay {
    async fn start() -> Self {
        let udx = Udx::new();
        let (socket, _datagrams) = udx.bind(ANY).expect("a socket");
        let peer = UdpSocket::bind(ANY).await.expect("a socket");
        let SocketAddr::V4(address) = peer.local_addr().expect("an address") else { panic!("IPv4 was asked for") };
        let stream = udx.stream(StreamOptions::default());
        // The golden packets go from stream 0x11111111 to 0x22222222.
        stream.connect(&socket, 0x1111_1111, address);
        Self { peer, stream, own: socket.local_address().into(), _udx: udx }
    }

    /// Sends a packet of the Node peer, addressed to this stream.
    async fn say(&self, packet: &Value) {
        let mut wire = bytes(&packet["bytes"]);
        wire[4..8].copy_from_slice(&self.stream.id().to_le_bytes());
        self.peer.send_to(&wire, self.own).await.expect("sent");
    }

    /// Returns the next packet of this crate's stream.
    async fn heard(&self) -> Vec<u8> {
        let mut buffer = vec![0; 2048];
        let heard = time::timeout(Duration::from_secs(5), self.peer.recv(&mut buffer)).await;
        buffer.truncate(heard.expect("in time").expect("received"));
        buffer
    }
}

fn packets<'a>(scene: &'a Value, side: &str) -> Vec<&'a Value> {
    cases(scene).iter().filter(|packet| packet["from"] == side).collect()
}

fn has(packet: &Value, name: &str) -> bool {
    cases_or_none(&packet["names"]).iter().any(|one| one == name)
}

fn cases_or_none(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

/// The window tells how much the reader left unread, which is for the reader to say.
fn without_window(mut packet: Vec<u8>) -> String {
    packet[8..12].fill(0);
    hex::encode(packet)
}

#[tokio::test]
async fn data_is_acknowledged_as_libudx_does_with_and_without_a_gap() {
    let golden = read("udx");
    let scene = &golden["loss"];
    let replay = Replay::start().await;
    let data: Vec<_> = packets(scene, "left").into_iter().filter(|packet| has(packet, "data")).collect();
    let acks: Vec<_> = packets(scene, "right").into_iter().filter(|packet| !has(packet, "destroy")).collect();
    // The second packet came last, and every other one told of the gap.
    let order = [0, 2, 3, 4, 5, 1];
    assert_eq!((data.len(), acks.len()), (order.len(), order.len()));
    for (at, ack) in order.into_iter().zip(acks) {
        replay.say(data[at]).await;
        assert_eq!(without_window(replay.heard().await), without_window(bytes(&ack["bytes"])), "after {at}");
    }
    let sent: Vec<u8> = data.iter().flat_map(|packet| bytes(&packet["payload"])).collect();
    let mut read = Vec::new();
    while read.len() < sent.len() {
        read.extend_from_slice(&replay.stream.read().await.expect("no error").expect("more"));
    }
    assert_eq!(read, sent);
}

#[tokio::test]
async fn padding_is_skipped_and_a_heartbeat_is_answered() {
    let golden = read("udx");
    let replay = Replay::start().await;
    for packet in packets(&golden["probe"], "left").into_iter().filter(|packet| has(packet, "data")) {
        replay.say(packet).await;
        let ack = replay.heard().await;
        let next = parsed::<u32>(&packet["seq"]) + 1;
        assert_eq!((ack.len(), ack[2], &ack[16..20]), (20, 0, &next.to_le_bytes()[..]), "{packet}");
        assert_eq!(replay.stream.read().await, Ok(Some(bytes(&packet["payload"]).into())));
    }
    let mut heartbeat = packets(&golden["probe"], "right").into_iter().filter(|packet| has(packet, "heartbeat"));
    let mut heartbeat = heartbeat.next().expect("one").clone();
    let mut wire = bytes(&heartbeat["bytes"]);
    // As if it came from the other side: nothing of this stream's is acknowledged, the next packet is the fourth.
    wire[12..20].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0]);
    heartbeat["bytes"] = hex::encode(wire).into();
    replay.say(&heartbeat).await;
    let answer = replay.heard().await;
    assert_eq!((answer[2], &answer[16..20]), (0, &3_u32.to_le_bytes()[..]));
}

#[tokio::test]
async fn the_first_packets_are_those_of_libudx() {
    let golden = read("udx");
    let data = packets(&golden["echo"], "left").into_iter().find(|packet| has(packet, "data")).expect("one");
    let replay = Replay::start().await;
    replay.stream.write(bytes(&data["payload"]).into()).expect("open");
    let mut expected = bytes(&data["bytes"]);
    expected[4..8].copy_from_slice(&0x1111_1111_u32.to_le_bytes());
    assert_eq!(hex::encode(replay.heard().await), hex::encode(expected));
}

#[tokio::test]
async fn an_end_is_the_end_and_a_destroy_an_error() {
    let golden = read("udx");
    let replay = Replay::start().await;
    let mut packets_of_left =
        packets(&golden["echo"], "left").into_iter().filter(|packet| has(packet, "data") || has(packet, "end"));
    replay.say(packets_of_left.next().expect("data")).await;
    assert_eq!(replay.stream.read().await, Ok(Some("hello".into())));
    let mut end = packets_of_left.next().expect("an end").clone();
    let mut wire = bytes(&end["bytes"]);
    // Nothing was written here, so nothing is acknowledged.
    wire[16..20].fill(0);
    end["bytes"] = hex::encode(wire).into();
    replay.say(&end).await;
    assert_eq!(replay.stream.read().await, Ok(None));

    let replay = Replay::start().await;
    let left = packets(&golden["destroyed"], "left");
    for packet in &left {
        replay.say(packet).await;
    }
    assert!(has(left[1], "destroy"));
    let outcome = loop {
        match replay.stream.read().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert_eq!(outcome, Err(StreamError::Reset));
}

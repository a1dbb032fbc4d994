//! How requests are told apart: each ambiguous one has one outcome, and no byte of a body becomes a request.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::{Network, fake};

/// Sends bytes and reads until the gateway closes the connection.
async fn until_closed(network: &Network, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(network.address).await.expect("connected");
    let _ = stream.write_all(bytes).await;
    read_to_end(&mut stream).await
}

async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut answer = vec![];
    // A reset ends the connection as well.
    let end = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    let _ = end.expect("the gateway closes the connection");
    answer
}

/// A request with these headers and this body, and bytes after it that would be a second request.
fn followed(headers: &str, body: &str) -> String {
    format!(
        "POST /infer HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n{headers}\r\n{body}\
         GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n",
        fake::token(1)
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_two_lengths_is_read_by_its_chunks_and_ends_the_connection() {
    let network = Network::start().await;
    let chunked = "2\r\n{}\r\n0\r\n\r\n";
    for headers in [
        "content-length: 4\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 4\r\n",
        "content-length: 4\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n",
    ] {
        let answer = until_closed(&network, followed(headers, chunked).as_bytes()).await;
        let answer = String::from_utf8_lossy(&answer);
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{headers:?}: {answer}");
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("connection: close"), "{headers:?}: {answer}");
        assert!(!answer.contains("smuggled"), "{headers:?}: {answer}");
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_length_is_unclear_is_refused_and_ends_the_connection() {
    let network = Network::start().await;
    for headers in [
        "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "transfer-encoding: xchunked\r\n",
        "transfer-encoding : chunked\r\n",
        "transfer-encoding:\x0bchunked\r\n",
        "content-length: 2\r\ncontent-length: 3\r\n",
        "content-length: 2, 3\r\n",
        "content-length: +2\r\n",
        "content-length: 0x2\r\n",
        "content-length : 2\r\n",
        "x-a: b\r\n content-length: 2\r\n",
        "x-a: b\r\n\tc\r\ncontent-length: 2\r\n",
        "content-length: 2\r\n 3\r\n",
        "x-a: b\0c\r\ncontent-length: 2\r\n",
        "x-a: b\rcontent-length: 2\r\n",
    ] {
        let answer = until_closed(&network, followed(headers, "{}").as_bytes()).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 400"), "{headers:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{headers:?}: {answer}");
    }
    let old = followed("transfer-encoding: chunked\r\n", "0\r\n\r\n").replacen("HTTP/1.1", "HTTP/1.0", 1);
    let answer = until_closed(&network, old.as_bytes()).await;
    assert!(answer.starts_with(b"HTTP/1.0 400") || answer.starts_with(b"HTTP/1.1 400"));
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_bad_chunks_ends_the_connection() {
    let network = Network::start().await;
    for body in ["ffffffffffffffff0\r\n{}\r\n", "2 \n{}\r\n0\r\n\r\n", "-2\r\n{}\r\n0\r\n\r\n", "2\r\n{}x\r\n0\r\n\r\n"]
    {
        let answer = until_closed(&network, followed("transfer-encoding: chunked\r\n", body).as_bytes()).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.contains("smuggled") && answer.matches("HTTP/1.1 ").count() <= 1, "{body:?}: {answer}");
    }
    network.end().await;
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const ENHANCE_YOUR_CALM: u8 = 0xb;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A field that is not indexed, by its position in the static table or its name.
fn field(index: u8, name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
    if index > 0 { [&[index][..], &text(value)].concat() } else { [&[0][..], &text(name), &text(value)].concat() }
}

/// The header block of a request. Its method is GET (2) or POST (3).
fn block(method: u8, path: &str) -> Vec<u8> {
    let authorization = format!("Bearer {}", fake::token(1));
    let mut block = vec![0x80 | method, 0x86];
    block.extend(field(4, "", path));
    block.extend(field(1, "", "x"));
    block.extend(field(0, "authorization", &authorization));
    block.extend(field(0, "content-type", "application/json"));
    block
}

/// Returns whether frames contain a GOAWAY with this reason.
fn goes_away(mut frames: &[u8], reason: u8) -> bool {
    while let [a, b, c, kind, _, _, _, _, _, rest @ ..] = frames {
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        if *kind == GO_AWAY && rest.get(4..8) == Some(&[0, 0, 0, reason]) {
            return true;
        }
        frames = rest.get(length..).unwrap_or_default();
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_taken_back_before_they_are_accepted_end_the_connection() {
    let network = Network::start().await;
    let mut bytes = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    for number in 0..2_000 {
        let stream = 2 * number + 1;
        bytes.extend(frame(HEADERS, END_STREAM | END_HEADERS, stream, &block(2, "/v1/models")));
        bytes.extend(frame(RESET, 0, stream, &[0, 0, 0, 8]));
    }
    let answer = until_closed(&network, &bytes).await;
    assert!(goes_away(&answer, ENHANCE_YOUR_CALM));
    assert_eq!(network.chat("hi").await.status(), 200, "others are served");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_taken_back_before_they_are_answered_end_the_connection() {
    let network = Network::start().await;
    let mut stream = TcpStream::connect(network.address).await.expect("connected");
    stream.set_nodelay(true).expect("set");
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.expect("sent");
    let mut taken_back = 0;
    let mut buffer = [0; 4096];
    for number in 0..2_000_u32 {
        let id = 2 * number + 1;
        // The body never comes, so the request is not answered. The ping shows that it was accepted.
        let request = frame(HEADERS, END_HEADERS, id, &block(3, "/infer"));
        let ping = frame(PING, 0, 0, &[0; 8]);
        if stream.write_all(&[request, ping].concat()).await.is_err()
            || stream.read(&mut buffer).await.unwrap_or(0) == 0
        {
            break;
        }
        let _ = stream.write_all(&frame(RESET, 0, id, &[0, 0, 0, 8])).await;
        taken_back += 1;
    }
    assert!((400..1_500).contains(&taken_back), "{taken_back} requests were taken back");
    read_to_end(&mut stream).await;
    network.end().await;
}

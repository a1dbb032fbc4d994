use std::time::{Duration, Instant};

use hyper_util::rt::{TokioExecutor, TokioIo};
use tether_gateway::Config;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::{Network, chat_body, config, expect_error, fake};

/// Sends bytes and reads until the connection closes or nothing more comes for `timeout`.
async fn exchange(network: &Network, bytes: &[u8], pause: Duration) -> String {
    let mut stream = TcpStream::connect(network.address).await.expect("connected");
    let _ = stream.write_all(bytes).await;
    read(&mut stream, pause).await
}

/// Reads until the connection ends, or nothing more comes for so long after the first bytes.
async fn read(stream: &mut TcpStream, pause: Duration) -> String {
    let (mut text, mut wait) = (vec![], LONG);
    let mut buffer = [0; 4096];
    while let Ok(Ok(count @ 1..)) = tokio::time::timeout(wait, stream.read(&mut buffer)).await {
        text.extend_from_slice(&buffer[..count]);
        wait = pause;
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// The head of a chat request with some more header lines.
fn head(more: &str) -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n{more}\r\n",
        fake::token(1)
    )
}

const SOON: Duration = Duration::from_millis(500);
/// Far longer than a gateway waits in these tests, also on a machine under load.
const LONG: Duration = Duration::from_secs(20);
/// Far longer than a machine under load needs to pass a cancellation on.
const TOLD_WITHIN: Duration = Duration::from_mins(1);

#[tokio::test(flavor = "multi_thread")]
async fn a_body_too_long_is_refused_by_its_length_and_while_it_is_read() {
    let network = Network::start_with(Config { body_bytes_max: 100_000, ..config() }).await;
    let announced = exchange(&network, head("content-length: 100001\r\n").as_bytes(), LONG).await;
    assert!(announced.starts_with("HTTP/1.1 413"), "{announced}");
    assert!(announced.contains("request_too_large"), "{announced}");
    let mut chunked = head("transfer-encoding: chunked\r\n").into_bytes();
    for _ in 0..20 {
        chunked.extend_from_slice(format!("2710\r\n{}\r\n", " ".repeat(10_000)).as_bytes());
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    let read = exchange(&network, &chunked, SOON).await;
    assert!(read.starts_with("HTTP/1.1 413"), "{read}");
    let whole = network.request(reqwest::Method::POST, "/v1/chat/completions").bearer_auth(fake::token(1));
    let whole = whole.header("content-type", "application/json").body(vec![b' '; 1_000_000]);
    expect_error(whole.send().await.expect("answered, not reset"), 413, "request_too_large", None).await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_waits_to_be_asked_for_its_body_is_refused_at_once() {
    let network = Network::start().await;
    let head = head("content-length: 99999999\r\nexpect: 100-continue\r\n");
    let answer = exchange(&network, head.as_bytes(), LONG).await;
    // Waiting for the body would end with 408.
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_head_closes_the_connection() {
    let network = Network::start().await;
    for beginning in [&b""[..], b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"] {
        let began = Instant::now();
        let answer = exchange(&network, beginning, LONG).await;
        let took = began.elapsed();
        assert_eq!(answer, "");
        assert!(took > Duration::from_millis(900), "{took:?}");
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_trickles_in_is_not_waited_for_longer() {
    let network = Network::start().await;
    let mut stream = TcpStream::connect(network.address).await.expect("connected");
    let began = Instant::now();
    for byte in b"GET /healthz HTTP/1.1\r\nx-a: ".iter().cycle() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if stream.write_all(&[*byte]).await.is_err() {
            break;
        }
        assert!(began.elapsed() < LONG, "still open");
    }
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stops_coming_is_a_timeout() {
    let network = Network::start().await;
    let answer = exchange(&network, format!("{}{{", head("content-length: 50\r\n")).as_bytes(), LONG).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("request_timeout") && answer.contains("connection: close"), "{answer}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_outlives_the_time_for_a_head_but_not_its_own() {
    let network = Network::start_with(Config { idle_timeout_secs: 3, ..config() }).await;
    let mut stream = TcpStream::connect(network.address).await.expect("connected");
    let request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    assert!(read(&mut stream, SOON).await.starts_with("HTTP/1.1 200"));
    tokio::time::sleep(Duration::from_millis(1300)).await;
    stream.write_all(request).await.expect("still open");
    assert!(read(&mut stream, SOON).await.starts_with("HTTP/1.1 200"));
    let began = Instant::now();
    assert_eq!(read(&mut stream, LONG).await, "");
    let took = began.elapsed();
    assert!(took > Duration::from_secs(2), "{took:?}");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_http_is_answered_or_dropped_and_nothing_breaks() {
    let network = Network::start().await;
    let many = format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{}\r\n", "x-a: b\r\n".repeat(101));
    let long = format!("GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: {}\r\n\r\n", "b".repeat(70_000));
    let path = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "b".repeat(70_000));
    for (bytes, status) in [
        (&b"\x00\xff\x16\x03\x01 nonsense\r\n\r\n"[..], "400"),
        (b"GET / HTTP/9.9\r\n\r\n", "400"),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", "400"),
        (b"POST /infer HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc", "400"),
        (b"POST /infer HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", "400"),
        (many.as_bytes(), "431"),
        (long.as_bytes(), "431"),
        (path.as_bytes(), "4"),
    ] {
        let answer = exchange(&network, bytes, LONG).await;
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{shown:?}: {answer}");
    }
    let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0xff; 100]].concat();
    exchange(&network, &preface, LONG).await;
    assert_eq!(network.chat("hi").await.status(), 200);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_too_many_is_turned_away() {
    let network = Network::start_with(Config { connections_max: 1, header_timeout_secs: 10, ..config() }).await;
    let held = TcpStream::connect(network.address).await.expect("connected");
    let request = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    // The gateway takes the first connection, and notices its end, some time after its client has moved on.
    let until = async |status: &str| loop {
        let answer = exchange(&network, request, LONG).await;
        if answer.starts_with(&format!("HTTP/1.1 {status}")) {
            break answer;
        }
    };
    let answer = until("503").await;
    assert!(answer.contains("\"code\":\"unavailable\""), "{answer}");
    drop(held);
    until("200").await;
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_client_that_takes_back_a_request_cancels_its_job() {
    let network = Network::start().await;
    let stream = TcpStream::connect(network.address).await.expect("connected");
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    network.tasks.spawn(async move { drop(connection.await) });
    for streamed in [true, false] {
        let mut body = chat_body("silent");
        body["stream"] = streamed.into();
        let request = http::Request::post(format!("http://{}/v1/chat/completions", network.address))
            .header("authorization", format!("Bearer {}", fake::token(1)))
            .header("content-type", "application/json")
            .body(body.to_string())
            .expect("a request");
        let mut responding = Box::pin(sender.send_request(request));
        tokio::select! {
            biased;
            // A streamed answer may have begun as well by then.
            () = network.fake.arrived.notified() => {}
            _ = &mut responding => panic!("the job has not arrived"),
        }
        if streamed {
            drop(responding.await.expect("it begins"));
        } else {
            drop(responding);
        }
        let cancelled = network.fake.cancelled.notified();
        tokio::time::timeout(TOLD_WITHIN, cancelled).await.expect("the orchestrator is told");
    }
    drop(sender);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_has_just_connected_gets_its_answer_from_a_gateway_that_stops() {
    let network = Network::start().await;
    network.get("/v1/models").await;
    let mut connected = vec![];
    for _ in 0..50 {
        connected.push(TcpStream::connect(network.address).await.expect("connected"));
    }
    network.gateway_stop.cancel();
    let body = chat_body("hi").to_string();
    let request = head(&format!("connection: close\r\ncontent-length: {}\r\n", body.len())) + &body;
    for stream in &mut connected {
        stream.write_all(request.as_bytes()).await.expect("the connection is open");
    }
    for stream in &mut connected {
        let answer = read(stream, LONG).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    network.end().await;
}

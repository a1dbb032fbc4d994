//! Limits of each client address, also behind proxies.

use std::sync::atomic::Ordering;

use protocol::token::{ApiToken, RANDOM_BYTES, TokenKind};
use reqwest::{Method, Response};
use tether_gateway::{Config, MetricsAccess};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::{Network, chat_body, config, expect_error, fake};

/// Connects from an address of this machine.
async fn connect_from(network: &Network, from: [u8; 4]) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((from, 0).into()).expect("an address of this machine");
    socket.connect(network.address).await.expect("connected")
}

/// Asks whether the gateway is alive, over an open connection.
async fn head_of_answer(stream: &mut TcpStream) -> String {
    let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut buffer = [0; 2048];
    let count = stream.read(&mut buffer).await.expect("answered, not reset");
    String::from_utf8_lossy(&buffer[..count]).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_with_many_connections_leaves_the_others_theirs() {
    let limits = Config { connections_max: 8, connections_per_address_max: 6, ..config() };
    let network = Network::start_with(Config { idle_timeout_secs: 60, ..limits }).await;
    let mut held = vec![];
    for _ in 0..6 {
        let mut stream = connect_from(&network, [127, 0, 0, 1]).await;
        assert!(head_of_answer(&mut stream).await.starts_with("HTTP/1.1 200"));
        held.push(stream);
    }
    let refused = head_of_answer(&mut connect_from(&network, [127, 0, 0, 1]).await).await;
    assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1"), "{refused}");
    assert!(refused.contains("reuse them"), "{refused}");
    let other = head_of_answer(&mut connect_from(&network, [127, 0, 0, 2]).await).await;
    assert!(other.starts_with("HTTP/1.1 200"), "{other}");
    drop(held);
    while !head_of_answer(&mut connect_from(&network, [127, 0, 0, 1]).await).await.starts_with("HTTP/1.1 200") {}
    network.end().await;
}

fn behind_a_proxy() -> Config {
    Config { trusted_proxies: vec!["127.0.0.0/8".parse().expect("a network")], ..config() }
}

/// Shows a token as a client whose address is in a header.
async fn show(network: &Network, client: &str, token: &str) -> Response {
    let request = network.request(Method::GET, "/v1/models").bearer_auth(token);
    request.header("x-forwarded-for", client).send().await.expect("answered")
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_guesses_behind_a_proxy_does_not_hold_up_its_other_clients() {
    let network = Network::start_with(behind_a_proxy()).await;
    for _ in 0..10 {
        assert_eq!(show(&network, "192.0.2.1", "tth_live_guess").await.status(), 401);
    }
    assert_eq!(show(&network, "203.0.113.1, 192.0.2.1", "tth_live_guess").await.status(), 429);
    assert_eq!(show(&network, "192.0.2.2", "tth_live_guess").await.status(), 401);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_a_proxy_says_who_the_client_is() {
    let network = Network::start().await;
    for last in 0..10 {
        assert_eq!(show(&network, &format!("192.0.2.{last}"), "tth_live_guess").await.status(), 401);
    }
    assert_eq!(show(&network, "192.0.2.99", "tth_live_guess").await.status(), 429);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_behind_a_proxy_has_so_many_requests_at_once_and_the_proxy_any_number() {
    let network = Network::start_with(Config { connections_per_address_max: 2, ..behind_a_proxy() }).await;
    let begin = async |client: &str| {
        let mut body = chat_body("silent");
        body["stream"] = true.into();
        let request = network.post("/v1/chat/completions", &body).header("forwarded", format!("for={client}"));
        request.send().await.expect("answered")
    };
    let running = [begin("192.0.2.1").await, begin("192.0.2.1").await];
    let refused = expect_error(begin("192.0.2.1").await, 429, "rate_limit_exceeded", None).await;
    assert_eq!(refused["retry-after"], "1");
    let others = [begin("192.0.2.2").await, begin("192.0.2.3").await];
    assert!(running.iter().chain(&others).all(|response| response.status() == 200));
    drop(running);
    while begin("192.0.2.1").await.status() != 200 {}
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxys_health_checks_pass_whatever_its_clients_do() {
    let network = Network::start_with(Config { connections_per_address_max: 2, ..behind_a_proxy() }).await;
    // A client that writes the header which the proxy does not write counts as the proxy.
    let begin = async || {
        let mut body = chat_body("silent");
        body["stream"] = true.into();
        let request = network.post("/v1/chat/completions", &body).header("forwarded", "for=203.0.113.5");
        request.header("x-forwarded-for", "192.0.2.1").send().await.expect("answered")
    };
    let running = [begin().await, begin().await];
    expect_error(begin().await, 429, "rate_limit_exceeded", None).await;
    assert_eq!(network.request(Method::GET, "/v1/models").send().await.expect("answered").status(), 429);
    for path in ["/healthz", "/health", "/readyz"] {
        let checked = network.request(Method::GET, path).send().await.expect("answered");
        assert_eq!(checked.status(), 200, "{path}");
    }
    drop(running);
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_random_tokens_cost_the_registry_a_hundred_questions_at_most() {
    let network = Network::start_with(Config { connections_per_address_max: 0, ..config() }).await;
    for number in 0..1_000_u32 {
        let mut random = [9; RANDOM_BYTES];
        random[..4].copy_from_slice(&number.to_le_bytes());
        let token = ApiToken::generate(TokenKind::Live, &random).to_string();
        let guessed = network.request(Method::GET, "/v1/models").bearer_auth(token).send().await.expect("answered");
        assert!([401, 429].contains(&guessed.status().as_u16()), "{}", guessed.status());
        if number == 500 {
            let first = network.get("/v1/models").await;
            assert_eq!(first.status(), 429, "nothing tells a new token from a wrong one");
            assert_eq!(network.get("/v1/models").await.status(), 200, "until it returns");
        }
    }
    let asked = network.fake.token_checks.load(Ordering::Relaxed);
    assert!(asked <= 100, "{asked} questions");
    network.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_for_this_machine_and_for_operators() {
    let read = async |network: &Network, client: Option<&str>, token: Option<String>| {
        let mut request = network.request(Method::GET, "/metrics");
        if let Some(client) = client {
            request = request.header("x-forwarded-for", client);
        }
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        request.send().await.expect("answered")
    };
    let (outside, tenant, operator) = (Some("192.0.2.1"), Some(fake::token(1)), Some(fake::token(4)));
    let network = Network::start().await;
    assert_eq!(read(&network, None, None).await.status(), 200);
    // A proxy of this machine that the settings do not name, and a page whose name was pointed at this machine.
    for (name, value) in [("x-forwarded-for", "127.0.0.1"), ("via", "1.1 proxy"), ("host", "evil.example:7070")] {
        let request = network.request(Method::GET, "/metrics").header(name, value);
        expect_error(request.send().await.expect("answered"), 401, "invalid_api_key", None).await;
    }
    network.end().await;
    let network = Network::start_with(behind_a_proxy()).await;
    for words_of_a_client in [None, Some("nonsense"), Some("127.0.0.1")] {
        expect_error(read(&network, words_of_a_client, None).await, 401, "invalid_api_key", None).await;
    }
    expect_error(read(&network, outside, None).await, 401, "invalid_api_key", None).await;
    expect_error(read(&network, outside, tenant).await, 403, "insufficient_scope", None).await;
    let read_by_operator = read(&network, outside, operator.clone()).await;
    assert_eq!(read_by_operator.status(), 200);
    assert!(read_by_operator.text().await.expect("text").ends_with("# EOF\n"));
    network.end().await;

    let network = Network::start_with(Config { metrics_access: MetricsAccess::Operators, ..config() }).await;
    expect_error(read(&network, None, None).await, 401, "invalid_api_key", None).await;
    assert_eq!(read(&network, None, operator).await.status(), 200);
    network.end().await;
    let network = Network::start_with(Config { metrics_access: MetricsAccess::Anyone, ..behind_a_proxy() }).await;
    assert_eq!(read(&network, outside, None).await.status(), 200);
    network.end().await;
}

#[test]
fn a_network_of_proxies_is_a_network_or_an_address() {
    let read = |text: &str| serde_json::from_value::<tether_gateway::ProxyNetwork>(text.into());
    for good in ["10.0.0.0/8", "192.0.2.7", "2001:db8::/32", "::1"] {
        read(good).expect(good);
    }
    let error = read("10.0.0.0/33").expect_err("too long").to_string();
    assert!(error.contains("\"10.0.0.0/33\" is not a network such as 10.0.0.0/8"), "{error}");
    assert!(read("proxy.example.com").is_err());
}

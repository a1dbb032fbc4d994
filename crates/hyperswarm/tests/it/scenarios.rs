//! What every pair of peers must be able to do, on every DHT.

use std::time::Duration;

use tether_hyperswarm::crypto;
use tokio::time;

use crate::failure::Failure;
use crate::net::{Kind, Net};
use crate::pattern::pattern;
use crate::peers::{Client, Records, Server, Target, World, until};

const NAME: &str = "main";

/// A server and a client that met on a DHT.
pub(crate) struct Pair {
    pub(crate) net: Net,
    pub(crate) server: Server,
    pub(crate) client: Client,
    pub(crate) target: Target,
}

impl Pair {
    pub(crate) async fn start(client: World, server: World, kind: Kind) -> Self {
        let net = Net::start(kind).await;
        let server = Server::start(server, &net.bootstrap(), 1).await;
        let client = Client::start(client, &net.bootstrap(), 2).await;
        let target = server.target();
        Self { net, server, client, target }
    }

    pub(crate) async fn connected(client: World, server: World, kind: Kind) -> Self {
        let pair = Self::start(client, server, kind).await;
        pair.client.connect(NAME, &pair.target).await.expect("the server is found");
        pair
    }

    async fn echo(&self, value: &[u8]) {
        let answer = self.client.request(NAME, "echo", value).await.expect("an answer");
        assert!(answer == value, "{} bytes came back as {}", value.len(), answer.len());
    }
}

pub(crate) async fn requests_are_answered(pair: Pair) {
    for length in [0, 1, 100, 1132, 1133, 65_536, 300_000] {
        pair.echo(&pattern(length)).await;
    }
    assert_eq!(pair.client.request(NAME, "blob64k", b"").await.expect("an answer"), pattern(65_536));
    assert_eq!(pair.client.concurrent(NAME, 500, &pattern(100)).await, Ok(500));
    // A slow answer is overtaken.
    let (slow, quick) = tokio::join!(pair.client.request(NAME, "delay", b"300"), async {
        let start = time::Instant::now();
        pair.echo(b"quick").await;
        start.elapsed()
    });
    assert_eq!(slow, Ok(b"300".to_vec()));
    assert!(quick < Duration::from_millis(250), "{quick:?}");
}

pub(crate) async fn requests_pass_in_batches_and_events_without_answer(pair: Pair) {
    assert_eq!(pair.client.batch(NAME, 50).await, Ok(true));
    for index in 0..20_u8 {
        pair.client.event(NAME, &[index; 30]).await.expect("sent");
    }
    pair.echo(b"after the events").await;
    let events = pair.server.events().await;
    assert_eq!(events, (0..20_u8).map(|index| vec![index; 30]).collect::<Vec<_>>());
    // The one that was called may ask, too.
    assert_eq!(pair.server.ask("answer", b"me").await, [b"answered me".to_vec()]);
}

pub(crate) async fn errors_tell_code_cause_and_context(pair: Pair) {
    let failed = pair.client.request(NAME, "fail", b"this").await.expect_err("it fails");
    let cause = Failure {
        message: "refused this".into(),
        code: Some("E_REFUSED".into()),
        context: Some("the context".into()),
        cause: None,
    };
    let expected = Failure {
        message: "Request failed".into(),
        code: Some("REQUEST_ERROR".into()),
        context: None,
        cause: Some(Box::new(cause)),
    };
    assert_eq!(failed, expected);
    let plain = pair.client.request(NAME, "fail_without_code", b"").await.expect_err("it fails");
    let cause = Failure { message: "plain".into(), ..Failure::default() };
    assert_eq!(plain, Failure { cause: Some(Box::new(cause)), ..expected.clone() });
    let unknown = pair.client.request(NAME, "nobody", b"").await.expect_err("it fails");
    let expected = Failure {
        message: "Unknown method 'nobody'".into(),
        code: Some("UNKNOWN_METHOD".into()),
        context: None,
        cause: None,
    };
    assert_eq!(unknown, expected);
    pair.echo(b"still there").await;
}

/// The largest message that a secret stream carries.
const MESSAGE_MAX: usize = 16_777_198;
/// Channel, type, request id, the name `hash` with its length, the value's length.
const REQUEST_FRAMING: usize = 1 + 1 + 1 + 5 + 5;
/// Channel, type, bitfield, request id, the value's length.
const RESPONSE_FRAMING: usize = 1 + 1 + 1 + 1 + 5;

pub(crate) async fn the_largest_message_passes_and_one_byte_more_is_refused(pair: Pair, client: World, server: World) {
    let largest = MESSAGE_MAX - REQUEST_FRAMING;
    let hash = crypto::hash(&[&pattern(largest)]);
    assert_eq!(pair.client.hash_of_pattern(NAME, largest).await, Ok(hash.to_vec()));
    assert_eq!(pair.client.fetch_pattern(NAME, MESSAGE_MAX - RESPONSE_FRAMING).await, Ok(true));
    // A Node peer ends the connection over one byte more, and there it is its own affair.
    if client == World::Rust {
        assert!(pair.client.hash_of_pattern(NAME, largest + 1).await.is_err());
        pair.echo(b"still there").await;
    }
    if server == World::Rust {
        assert!(pair.client.fetch_pattern(NAME, MESSAGE_MAX - RESPONSE_FRAMING + 1).await.is_err());
        pair.echo(b"still there").await;
    }
}

pub(crate) async fn two_hundred_connections_in_a_row_and_beside_each_other(pair: Pair) {
    assert_eq!(pair.client.visit(&pair.target, 100, 1).await, [""; 0]);
    assert_eq!(pair.client.visit(&pair.target, 100, 10).await, [""; 0]);
    let (_, opened) = pair.server.connections().await;
    assert!(opened >= 200, "{opened}");
    until("every connection is closed", async || pair.server.connections().await.0 == 0).await;
}

pub(crate) async fn a_client_comes_back_with_its_key_twenty_times(pair: Pair) {
    for round in 0..20 {
        pair.client.connect(NAME, &pair.target).await.unwrap_or_else(|failure| panic!("round {round}: {failure:?}"));
        pair.echo(format!("round {round}").as_bytes()).await;
        pair.client.disconnect(NAME).await;
    }
}

pub(crate) async fn a_server_that_listens_again_is_found_again(pair: Pair, server: World) {
    pair.client.connect(NAME, &pair.target).await.expect("connected");
    pair.echo(b"before").await;
    pair.server.drop_connections().await;
    until("the client notices", async || !pair.client.is_open(NAME).await).await;
    pair.server.listen_again().await;
    pair.client.connect(NAME, &pair.target).await.expect("connected again");
    pair.echo(b"after").await;
    // Another process with the same key, at another address. The connection to the first is dead, and may not know it
    // yet.
    let Pair { net, server: first, client, target } = pair;
    first.stop().await;
    let _second = Server::start(server, &net.bootstrap(), 1).await;
    client.connect("successor", &target).await.expect("connected to the successor");
    assert_eq!(client.request("successor", "echo", b"from the successor").await, Ok(b"from the successor".to_vec()));
}

pub(crate) async fn records_of_one_are_found_by_the_other(pair: Pair) {
    let Pair { server, client, target, net: _net } = pair;
    let client_key = records_pass(&server, &client, 0x51).await;
    assert_eq!(client_key, target.key);
    records_pass(&client, &server, 0x52).await;
}

/// Returns the key of `giver`.
async fn records_pass(giver: &impl Records, finder: &impl Records, mark: u8) -> [u8; 32] {
    let topic = [mark; 32];
    assert!(finder.lookup(topic).await.is_empty());
    giver.announce(topic).await;
    let found = finder.lookup(topic).await;
    assert_eq!(found.len(), 1);
    let value = vec![mark; 900];
    let hash = giver.immutable_put(&value).await;
    assert_eq!(hash, crypto::hash(&[&value]));
    assert_eq!(finder.immutable_get(hash).await, Some(value.clone()));
    assert_eq!(finder.immutable_get([mark; 32]).await, None);
    let key = giver.mutable_put(&value, 7).await.expect("stored");
    assert_eq!(found, [key], "announced by whom put the value");
    assert_eq!(finder.mutable_get(key, 0).await, Some((7, value.clone())));
    giver.mutable_put(b"newer", 8).await.expect("stored");
    assert_eq!(finder.mutable_get(key, 8).await, Some((8, b"newer".to_vec())));
    assert_eq!(finder.mutable_get(key, 9).await, None);
    // What goes back is stored nowhere, whether or not the giver learns of it.
    let _ = giver.mutable_put(b"older", 3).await;
    assert_eq!(finder.mutable_get(key, 0).await, Some((8, b"newer".to_vec())));
    giver.unannounce(topic).await;
    assert!(finder.lookup(topic).await.is_empty());
    key
}

pub(crate) async fn the_network_outlives_its_first_node(mut pair: Pair, client: World) {
    pair.net.kill_first().await;
    pair.client.connect(NAME, &pair.target).await.expect("the others know the way");
    pair.echo(b"without the first").await;
    let topic = [0x61; 32];
    pair.server.announce(topic).await;
    assert_eq!(pair.client.lookup(topic).await, [pair.target.key]);
    // A newcomer that knows the dead one, too.
    let late = Client::start(client, &pair.net.bootstrap(), 9).await;
    late.connect(NAME, &pair.target).await.expect("the others know the way");
    assert_eq!(late.request(NAME, "echo", b"late").await, Ok(b"late".to_vec()));
}

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use tether_hyperswarm::protomux::{self, ChannelMessage, ChannelOptions, Protomux};
use tether_hyperswarm::rpc::{self, Cause, RemoteError, RequestError, Rpc};
use tether_hyperswarm::secret_stream::{self, SecretStream};
use tether_hyperswarm::udx::{StreamOptions, Udx};
use tokio::time;
use tokio_util::task::TaskTracker;

use super::secret_stream::session;
use super::{bytes, cases, optional_bytes, parsed, read};

const ANY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);

/// Two ends of a connection: the first plays what a Node peer said, the second is to be tested.
fn connection() -> (SecretStream, Protomux) {
    let udx = Udx::new();
    let bind = || udx.bind(ANY).expect("a socket").0;
    let (here, there) = (bind(), bind());
    let (left, right) = (udx.stream(StreamOptions::default()), udx.stream(StreamOptions::default()));
    left.connect(&here, right.id(), there.local_address());
    right.connect(&there, left.id(), here.local_address());
    let options = secret_stream::Options::default;
    let peer = SecretStream::new(left, session(true), options());
    let mux = Protomux::new(SecretStream::new(right, session(false), options()), protomux::Options::default());
    // The sockets live as long as the streams need them.
    TaskTracker::new().spawn(async move {
        let _sockets = (udx, here, there);
        time::sleep(Duration::from_mins(1)).await;
    });
    (peer, mux)
}

async fn heard(peer: &SecretStream) -> String {
    let message = time::timeout(Duration::from_secs(5), peer.receive()).await.expect("in time");
    hex::encode(message.expect("no error").expect("a message"))
}

async fn hears_nothing(peer: &SecretStream) {
    assert!(time::timeout(Duration::from_millis(100), peer.receive()).await.is_err(), "something was sent");
}

fn say(peer: &SecretStream, frame: &Value) {
    peer.send(&[&bytes(frame)]).expect("open");
}

#[tokio::test]
async fn a_channel_opens_takes_messages_and_batches_and_closes() {
    let golden = read("protomux");
    let frames = &golden["cases"];
    let (peer, mux) = connection();
    let id = bytes(&golden["id"]);
    let pairing = mux.pair("tether/test", Some(&id));
    mux.start();
    for name in ["open", "open_without_id", "message_before_open", "message", "batch_of_one", "batch"] {
        say(&peer, &frames[name]);
    }
    let incoming = pairing.next().await.expect("a channel");
    assert_eq!((incoming.protocol(), incoming.id()), ("tether/test", &id[..]));
    let channel = incoming.accept(ChannelOptions::default()).expect("free");
    // The channel without id waits for nobody here, and is rejected; its message in the batch goes nowhere.
    let mut answers = [heard(&peer).await, heard(&peer).await];
    answers.sort();
    assert_eq!(answers, [frames["open"].as_str().expect("bytes").to_owned(), "000202".to_owned()]);
    let counting = |length: usize| (0..length).map(|index| index as u8).collect::<Bytes>();
    let expected = [(0, "pipelined".into()), (1, counting(300)), (0, counting(3))];
    let batch = [(0, counting(3)), (1, counting(300)), (0, Bytes::new())];
    for (kind, payload) in expected.into_iter().chain(batch) {
        assert_eq!(channel.receive().await, Some(ChannelMessage { kind, payload }));
    }
    // What this side says is what Node says.
    channel.send(0, &[b"pipe", b"lined"]).expect("open");
    assert_eq!(heard(&peer).await, frames["message_before_open"].as_str().expect("bytes"));
    {
        let _corked = mux.cork();
        channel.send(0, &[&counting(3)]).expect("open");
    }
    let one = heard(&peer).await;
    assert!(one == frames["batch_of_one"].as_str().expect("bytes") || one == "0100000102", "{one}");
    // The peer's first channel, which it calls 1.
    say(&peer, &Value::from("000301"));
    assert_eq!(channel.receive().await, None);
}

#[tokio::test]
async fn a_batch_of_this_side_is_that_of_node() {
    let golden = read("protomux");
    let (peer, mux) = connection();
    mux.start();
    let counting = |length: usize| (0..length).map(|index| index as u8).collect::<Bytes>();
    let first = mux.open("tether/test", &bytes(&golden["id"]), ChannelOptions::default()).expect("free");
    assert_eq!(heard(&peer).await, golden["cases"]["open"].as_str().expect("bytes"));
    let second = mux.open("no id", &[], ChannelOptions::default()).expect("free");
    assert_eq!(heard(&peer).await, golden["cases"]["open_without_id"].as_str().expect("bytes"));
    let options = ChannelOptions { handshake: counting(4), ..ChannelOptions::default() };
    let third = mux.open("tether/test", &[0, 1], options).expect("free");
    assert_eq!(heard(&peer).await, golden["cases"]["open_with_handshake"].as_str().expect("bytes"));
    {
        let _corked = mux.cork();
        first.send(0, &[&counting(3)]).expect("open");
        first.send(1, &[&counting(300)]).expect("open");
        second.send(0, &[&[0x50, 0x51]]).expect("open");
        first.send(0, &[]).expect("open");
    }
    assert_eq!(heard(&peer).await, golden["cases"]["batch"].as_str().expect("bytes"));
    third.close();
    assert_eq!(heard(&peer).await, "000303");
}

#[tokio::test]
async fn strange_frames_are_dropped_or_end_the_connection_as_in_node() {
    let golden = read("protomux");
    let (peer, mux) = connection();
    mux.start();
    for frame in cases(&golden["dropped"]["frames"]) {
        say(&peer, frame);
    }
    hears_nothing(&peer).await;
    say(&peer, &golden["cases"]["open"]);
    assert_eq!(heard(&peer).await, golden["cases"]["reject"].as_str().expect("bytes"));
    let ending = cases(&golden["ending"]).iter().map(|case| &case["bytes"]).chain([&golden["skipped_id"]["bytes"]]);
    for frame in ending {
        let (peer, mux) = connection();
        mux.start();
        say(&peer, frame);
        time::timeout(Duration::from_secs(5), mux.closed()).await.unwrap_or_else(|_| panic!("{frame} is borne"));
    }
}

/// Answers as the Node server behind the golden answers did.
async fn serve(requests: rpc::Requests) {
    while let Some(request) = requests.next().await {
        let value = request.value().clone();
        let cause = Cause { context: "the context".into(), ..Cause::new("the cause", "E_CAUSE") };
        let answered = match (request.method(), rpc::decode_buffer(&value)) {
            ("nobody", _) => request.error(&RemoteError::unknown_method("nobody")),
            (_, Err(_)) => request.error(&RemoteError::not_decoded(Cause::new("Out of bounds", ""))),
            ("fails", _) => request.error(&RemoteError::failed(cause)),
            _ => request.ok(&value),
        };
        answered.expect("open");
    }
}

#[tokio::test]
async fn requests_are_answered_with_the_frames_of_node() {
    let golden = read("rpc");
    let (peer, mux) = connection();
    let (_rpc, requests) =
        Rpc::open(&mux, &bytes(&golden["server_public_key"]), &rpc::Options::default()).expect("new");
    mux.start();
    TaskTracker::new().spawn(serve(requests));
    assert_eq!(heard(&peer).await, golden["open"].as_str().expect("bytes"));
    say(&peer, &golden["open"]);
    for name in ["echo", "empty", "fails", "unknown", "undecodable"] {
        let case = &golden["answered"][name];
        say(&peer, &case["request"]);
        assert_eq!(heard(&peer).await, case["answers"][0].as_str().expect("bytes"), "{name}");
    }
    say(&peer, &golden["answered"]["event"]["request"]);
    hears_nothing(&peer).await;
    // Both requests of a batch are answered; in how many frames is for the server to say.
    say(&peer, &golden["answered"]["batch"]["request"]);
    let first = heard(&peer).await;
    if first != golden["answered"]["batch"]["answers"][0].as_str().expect("bytes") {
        assert_eq!([first, heard(&peer).await], ["010100060109", "010100070109"]);
    }
}

#[tokio::test]
async fn every_error_of_node_is_understood() {
    let golden = read("rpc");
    let (peer, mux) = connection();
    let (rpc, _requests) =
        Rpc::open(&mux, &bytes(&golden["server_public_key"]), &rpc::Options::default()).expect("new");
    mux.start();
    assert_eq!(heard(&peer).await, golden["open"].as_str().expect("bytes"));
    say(&peer, &golden["open"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for case in cases(&golden["errors"]) {
        let asked = rpc.request("echo", &[]);
        let answer = async {
            let request = heard(&peer).await;
            let id = bytes(&Value::from(request))[2];
            // The golden response is to request 9.
            let mut response = [&[1, 1][..], &bytes(&case["bytes"])].concat();
            assert_eq!(response[3], 9);
            response[3] = id;
            peer.send(&[&response]).expect("open");
        };
        let (answered, ()) = tokio::join!(asked, answer);
        let cause = case["cause"].is_object().then(|| Cause {
            message: text(&case["cause"]["message"]),
            code: text(&case["cause"]["code"]),
            context: text(&case["cause"]["context"]),
        });
        let expected = RemoteError { message: text(&case["message"]), code: text(&case["code"]), cause };
        assert_eq!(answered, Err(RequestError::Remote(Box::new(expected))), "{case}");
    }
}

#[tokio::test]
async fn requests_are_written_as_node_writes_them() {
    let golden = read("rpc");
    for case in cases(&golden["requests"]).iter().filter(|case| parsed::<u64>(&case["id"]) <= 1) {
        let (peer, mux) = connection();
        let opened = Rpc::open(&mux, &bytes(&golden["server_public_key"]), &rpc::Options::default());
        let (rpc, _requests) = opened.expect("new");
        mux.start();
        assert_eq!(heard(&peer).await, golden["open"].as_str().expect("bytes"));
        say(&peer, &golden["open"]);
        let (method, value) = (case["method"].as_str().expect("a name"), bytes(&case["value"]));
        let asked = async {
            match case["id"].as_u64() {
                Some(0) => rpc.event(method, &value).await.expect("sent"),
                _ => drop(time::timeout(Duration::from_millis(300), rpc.request(method, &value)).await),
            }
        };
        let (frame, ()) = tokio::join!(heard(&peer), asked);
        assert_eq!(frame, format!("0100{}", case["bytes"].as_str().expect("bytes")));
    }
    for case in cases(&golden["values"]) {
        let value = optional_bytes(&case["value"]).unwrap_or_default();
        assert_eq!(rpc::encode_buffer(&value), bytes(&case["bytes"]));
        assert_eq!(rpc::decode_buffer(&bytes(&case["bytes"]).into()), Ok(value.into()));
    }
}

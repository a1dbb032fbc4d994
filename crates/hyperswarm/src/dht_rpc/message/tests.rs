use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

fn address(text: &str) -> SocketAddrV4 {
    text.parse().unwrap()
}

fn request() -> Request<'static> {
    Request {
        tid: 0x1234,
        to: address("1.2.3.4:49737"),
        id: None,
        token: None,
        internal: false,
        command: 0,
        target: None,
        value: None,
    }
}

fn response() -> Response<'static> {
    Response {
        tid: 0x1234,
        to: address("5.6.7.8:257"),
        id: None,
        token: None,
        closer_nodes: Vec::new(),
        error: 0,
        value: None,
    }
}

/// Checks encoding and decoding against bytes that `dht-rpc` 6.27 wrote.
fn assert_wire(message: &Message<'_>, wire: &str) {
    let mut bytes = Vec::new();
    match message {
        Message::Request(request) => request.encode(&mut bytes),
        Message::Response(response) => response.encode(&mut bytes),
    }
    assert_eq!(hex::encode(&bytes), wire);
    assert_eq!(Message::decode(&bytes).as_ref(), Ok(message));
}

#[test]
fn requests_are_those_of_the_node_package() {
    let (nines, sevens, fives) = ("09".repeat(32), "07".repeat(32), "05".repeat(32));
    assert_wire(
        &Message::Request(Request { internal: true, command: FIND_NODE, target: Some([5; 32]), ..request() }),
        &format!("030c34120102030449c202{fives}"),
    );
    assert_wire(
        &Message::Request(Request { internal: true, id: Some([9; 32]), ..request() }),
        &format!("030534120102030449c2{nines}00"),
    );
    let announce = Request {
        id: Some([9; 32]),
        token: Some([7; 32]),
        command: 4,
        target: Some([5; 32]),
        value: Some(b"hello"),
        ..request()
    };
    assert_wire(&Message::Request(announce), &format!("031b34120102030449c2{nines}{sevens}04{fives}0568656c6c6f"));
    assert_wire(
        &Message::Request(Request { command: 300, value: Some(b""), ..request() }),
        "031034120102030449c2fd2c0100",
    );
}

#[test]
fn responses_are_those_of_the_node_package() {
    let full = Response {
        id: Some([9; 32]),
        token: Some([7; 32]),
        closer_nodes: vec![address("10.0.0.1:1"), address("10.0.0.2:65535")],
        ..response()
    };
    let (nines, sevens) = ("09".repeat(32), "07".repeat(32));
    let wire =
        |flags: &str, rest: &str| format!("13{flags}3412050607080101{nines}{sevens}020a00000101000a000002ffff{rest}");
    assert_wire(&Message::Response(Response { value: Some(b"value"), ..full.clone() }), &wire("17", "0576616c7565"));
    assert_wire(&Message::Response(Response { error: INVALID_TOKEN, ..full }), &wire("0f", "02"));
    assert_wire(&Message::Response(response()), "13003412050607080101");
    assert_wire(&Message::Response(Response { error: 300, ..response() }), "13083412050607080101fd2c01");
}

#[test]
fn an_id_is_the_hash_of_the_address() {
    assert_eq!(
        hex::encode(node_id(address("127.0.0.1:49737"))),
        "d1dcf835b0d62b9230c41393cb96a34f5f8b9f814f421ca3382dfc1678022e0e"
    );
}

#[test]
fn another_version_is_refused() {
    assert!(Message::decode(&hex::decode("020034120506070801010000").unwrap()).is_err());
    assert!(Message::decode(&[]).is_err());
}

#[test]
fn a_response_with_too_many_nodes_is_refused() {
    let mut bytes = hex::decode("13043412050607080101").unwrap();
    bytes.write_uint(65);
    bytes.extend_from_slice(&[1; 65 * 6]);
    assert!(Message::decode(&bytes).is_err());
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        tid: u16,
        ip: u32,
        port: u16,
        id: Option<Id>,
        token: Option<Token>,
        internal: bool,
        command in 0_u64..1 << 53,
        target: Option<Id>,
        value in option::of(vec(any::<u8>(), 0..1_200)),
        nodes in vec((any::<u32>(), any::<u16>()), 0..20),
        error in 0_u64..1 << 53,
    ) {
        let to = SocketAddrV4::new(ip.into(), port);
        let value = value.as_deref();
        let mut bytes = Vec::new();
        let request = Request { tid, to, id, token, internal, command, target, value };
        request.encode(&mut bytes);
        prop_assert_eq!(Message::decode(&bytes), Ok(Message::Request(request)));

        bytes.clear();
        let closer_nodes = nodes.into_iter().map(|(ip, port)| SocketAddrV4::new(ip.into(), port)).collect();
        let response = Response { tid, to, id, token, closer_nodes, error, value };
        response.encode(&mut bytes);
        prop_assert_eq!(Message::decode(&bytes), Ok(Message::Response(response)));
    }

    #[test]
    fn foreign_bytes_never_panic(kind in prop_oneof![Just(0x03_u8), Just(0x13_u8)], flags: u8, tail: Vec<u8>) {
        let mut bytes = vec![kind, flags];
        bytes.extend_from_slice(&tail);
        let _ = Message::decode(&bytes);
    }
}

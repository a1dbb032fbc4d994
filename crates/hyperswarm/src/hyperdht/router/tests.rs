use super::*;

const TARGET: Target = [1; 32];

fn address(text: &str) -> SocketAddrV4 {
    text.parse().unwrap()
}

fn client() -> Origin {
    Origin { from: address("10.0.0.1:1000"), tid: 7 }
}

fn server() -> Origin {
    Origin { from: address("10.0.0.2:2000"), tid: 7 }
}

fn relay() -> Origin {
    Origin { from: address("10.0.0.3:3000"), tid: 7 }
}

fn value(mode: Mode, peer: Option<SocketAddrV4>, relay: Option<SocketAddrV4>) -> Vec<u8> {
    Handshake { mode, noise: b"noise", peer_address: peer, relay_address: relay }.encode()
}

fn router_with_route(now: Instant) -> Router {
    let mut router = Router::default();
    router.learn(TARGET, server().from, Bytes::from_static(b"record"), now);
    router
}

fn router_with_server() -> Router {
    let mut router = Router::default();
    assert!(router.add_server(TARGET, Bytes::from_static(b"record")));
    router
}

#[test]
fn a_relay_passes_a_handshake_to_the_server_and_the_answer_to_the_client() {
    let now = Instant::now();
    let mut router = router_with_route(now);

    let question = value(Mode::FromClient, None, None);
    let there = router.on_handshake(&TARGET, &question, client(), now);
    let expected = value(Mode::FromRelay, Some(client().from), None);
    assert_eq!(there, Decision::Forward { value: expected, to: server().from });

    let answer = value(Mode::FromServer, Some(client().from), None);
    let expected = value(Mode::Reply, Some(server().from), None);
    let back = router.on_handshake(&TARGET, &answer, server(), now);
    assert_eq!(back, Decision::Respond { value: expected, to: client().from });
}

#[test]
fn a_relay_answers_nobody_who_did_not_ask() {
    let now = Instant::now();
    let mut router = router_with_route(now);
    let answer = value(Mode::FromServer, Some(client().from), None);
    assert_eq!(router.on_handshake(&TARGET, &answer, server(), now), Decision::Drop);

    router.on_handshake(&TARGET, &value(Mode::FromClient, None, None), client(), now);
    let other_number = Origin { tid: 8, ..server() };
    assert_eq!(router.on_handshake(&TARGET, &answer, other_number, now), Decision::Drop);
    assert_eq!(router.on_handshake(&[2; 32], &answer, server(), now), Decision::Drop);
    let victim = value(Mode::FromServer, Some(address("10.9.9.9:9")), None);
    assert_eq!(router.on_handshake(&TARGET, &victim, server(), now), Decision::Drop);
    assert_eq!(router.on_handshake(&TARGET, &answer, server(), now + PASSAGE), Decision::Drop);
}

#[test]
fn a_second_relay_names_the_first() {
    let now = Instant::now();
    let mut router = router_with_route(now);
    let from_first = value(Mode::FromRelay, Some(client().from), None);
    let expected = value(Mode::FromSecondRelay, Some(client().from), Some(relay().from));
    let decision = router.on_handshake(&TARGET, &from_first, relay(), now);
    assert_eq!(decision, Decision::Forward { value: expected, to: server().from });
}

#[test]
fn a_node_that_knows_no_way_points_closer_and_follows_nobodys_address() {
    let now = Instant::now();
    let mut router = Router::default();
    let named = value(Mode::FromClient, None, Some(address("10.9.9.9:9")));
    assert_eq!(router.on_handshake(&TARGET, &named, client(), now), Decision::PointCloser);
    let relayed = value(Mode::FromRelay, Some(client().from), None);
    assert_eq!(router.on_handshake(&TARGET, &relayed, relay(), now), Decision::Drop);
}

#[test]
fn a_server_answers_the_way_the_handshake_came() {
    let now = Instant::now();
    let mut router = router_with_server();
    let mut back = |value: Vec<u8>, origin| match router.on_handshake(&TARGET, &value, origin, now) {
        Decision::Serve { noise, back } => {
            assert_eq!(noise, b"noise");
            Some((back, back.decide(b"answer")))
        }
        Decision::Drop => None,
        other => panic!("{other:?}"),
    };
    let answer = |mode, peer_address| Handshake { mode, noise: b"answer", peer_address, relay_address: None }.encode();

    // A client cannot answer on behalf of another one.
    let (way, decision) = back(value(Mode::FromClient, Some(address("9.9.9.9:9")), None), client()).unwrap();
    assert_eq!(way, Back::ToClient { client: client().from });
    assert_eq!(decision, Decision::Respond { value: answer(Mode::Reply, None), to: client().from });

    let (_, decision) = back(value(Mode::FromRelay, Some(client().from), None), relay()).unwrap();
    let value_back = answer(Mode::FromServer, Some(client().from));
    assert_eq!(decision, Decision::Forward { value: value_back.clone(), to: relay().from });

    let first = address("10.0.0.4:4000");
    let (_, decision) = back(value(Mode::FromSecondRelay, Some(client().from), Some(first)), relay()).unwrap();
    assert_eq!(decision, Decision::Forward { value: value_back, to: first });

    for (mode, peer, first) in [
        (Mode::FromRelay, None, None),
        (Mode::FromSecondRelay, Some(client().from), None),
        (Mode::FromServer, Some(client().from), None),
        (Mode::Reply, None, None),
    ] {
        assert_eq!(back(value(mode, peer, first), relay()), None);
    }
}

#[test]
fn hole_punches_go_to_the_servers_machine_alone() {
    let now = Instant::now();
    let mut router = router_with_route(now);
    let value = |mode, peer_address| Holepunch { mode, id: 3, payload: b"note", peer_address }.encode();
    let mut decide = |value: Vec<u8>, origin| router.on_holepunch(&TARGET, &value, origin, now);

    let elsewhere = value(Mode::FromClient, Some(address("10.9.9.9:2000")));
    assert_eq!(decide(elsewhere, client()), Decision::Drop);
    let other_port = address("10.0.0.2:2001");
    assert_eq!(
        decide(value(Mode::FromClient, Some(other_port)), client()),
        Decision::Forward { value: value(Mode::FromRelay, Some(client().from)), to: other_port }
    );
    let from_puncher = Origin { from: other_port, tid: 7 };
    assert_eq!(
        decide(value(Mode::FromServer, Some(client().from)), from_puncher),
        Decision::Respond { value: value(Mode::Reply, Some(other_port)), to: client().from }
    );
    assert_eq!(decide(value(Mode::FromRelay, Some(client().from)), relay()), Decision::Drop);
}

#[test]
fn records_are_those_of_own_servers_and_of_live_routes() {
    let now = Instant::now();
    let mut router = router_with_route(now);
    assert_eq!(router.record(&TARGET, now).as_deref(), Some(b"record".as_slice()));
    assert_eq!(router.relay(&TARGET, now), Some(server().from));
    assert_eq!(router.record(&TARGET, now + Duration::from_mins(20)), None);
    router.forget(&TARGET);
    assert_eq!(router.record(&TARGET, now), None);

    let mut router = router_with_server();
    assert!(router.record(&TARGET, now).is_some());
    assert_eq!(router.relay(&TARGET, now), None);
    assert!(!router.add_server(TARGET, Bytes::new()), "one key, one server");
    router.remove_server(&TARGET);
    assert_eq!(router.record(&TARGET, now), None);
}

#[test]
fn one_machine_cannot_push_more_handshakes_through_than_allowed() {
    let now = Instant::now();
    let mut router = router_with_route(now);
    let value = value(Mode::FromClient, None, None);
    let passed = (0..3000)
        .filter(|tid| {
            let origin = Origin { tid: *tid, ..client() };
            router.on_handshake(&TARGET, &value, origin, now) != Decision::Drop
        })
        .count();
    assert_eq!(passed, 1024);
}

#[test]
fn what_passes_through_is_bounded_and_the_oldest_gives_way() {
    let now = Instant::now();
    let mut router = router_with_route(now);
    let value = value(Mode::FromClient, None, None);
    let from = |number: u32| SocketAddrV4::new((0x0b00_0000 + number).into(), 1);
    let count = PASSAGES_MAX as u32;
    for number in 0..=count {
        let origin = Origin { from: from(number), tid: 1 };
        assert_ne!(router.on_handshake(&TARGET, &value, origin, now), Decision::Drop);
    }
    assert_eq!(router.passages.len(), PASSAGES_MAX);
    assert!(!router.is_passing(&TARGET, from(0), 1, now));
    assert!(router.is_passing(&TARGET, from(1), 1, now) && router.is_passing(&TARGET, from(count), 1, now));
}

/// Counts the handshakes that a server would answer, of 5,000 that one host sends and says to be this client's.
fn served(router: &mut Router, from: &str, client: &str, now: Instant) -> usize {
    let value = value(Mode::FromRelay, Some(address(client)), None);
    let origin = Origin { from: address(from), tid: 7 };
    let is_served = |_: &u32| matches!(router.on_handshake(&TARGET, &value, origin, now), Decision::Serve { .. });
    (0..5_000).filter(is_served).count()
}

#[test]
fn a_sender_that_names_this_host_as_its_client_is_limited_all_the_same() {
    let now = Instant::now();
    let mut router = router_with_server();
    assert_eq!(served(&mut router, "10.0.0.1:1", "127.0.0.1:1", now), 256);
    assert_eq!(served(&mut router, "127.0.0.1:1", "10.0.0.1:1", now), 5_000, "a test network on one host is not");
}

#[test]
fn nobody_spends_the_handshakes_of_the_host_that_they_name() {
    let now = Instant::now();
    let mut router = router_with_server();
    served(&mut router, "10.0.0.66:1", "10.0.0.1:1", now);
    let direct = value(Mode::FromClient, None, None);
    assert!(matches!(router.on_handshake(&TARGET, &direct, client(), now), Decision::Serve { .. }));
    let relayed = value(Mode::FromRelay, Some(client().from), None);
    assert!(matches!(router.on_handshake(&TARGET, &relayed, relay(), now), Decision::Serve { .. }));
    // The same at a second relay, which passes handshakes on.
    let mut router = router_with_route(now);
    let attacker = Origin { from: address("10.0.0.66:1"), tid: 7 };
    (0..5_000).for_each(|_| drop(router.on_handshake(&TARGET, &relayed, attacker, now)));
    assert_ne!(router.on_handshake(&TARGET, &relayed, relay(), now), Decision::Drop);
}

mod foreign {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn values_never_panic(value: Vec<u8>, is_server: bool) {
            let now = Instant::now();
            let mut router = if is_server { router_with_server() } else { router_with_route(now) };
            let _ = router.on_handshake(&TARGET, &value, client(), now);
            let _ = router.on_holepunch(&TARGET, &value, client(), now);
        }
    }
}

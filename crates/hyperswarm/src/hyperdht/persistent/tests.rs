use proptest::prelude::*;

use super::*;
use crate::compact_encoding::Encoder;
use crate::crypto::KeyPair;

const NODE: Id = [9; 32];
const TOKEN: Token = [7; 32];
const TOPIC: Id = [5; 32];

struct Shelf {
    store: Store,
    router: Router,
    now: Instant,
}

impl Shelf {
    fn new() -> Self {
        Self { store: Store::new(Limits::default(), 1), router: Router::default(), now: Instant::now() }
    }

    fn ask(&mut self, command: u64, target: &Id, value: Option<&[u8]>) -> Answer {
        let from = "1.2.3.4:5".parse().unwrap();
        let question = Question { command, target: Some(target), token: Some(&TOKEN), value, from, node: &NODE };
        self.store.answer(question, &mut self.router, self.now)
    }

    fn lookup(&mut self, target: &Id) -> Vec<Peer> {
        match self.ask(LOOKUP, target, None) {
            Answer::Value(Some(value)) => LookupReply::decode(&value).unwrap().peers,
            Answer::Value(None) => Vec::new(),
            other => panic!("{other:?}"),
        }
    }
}

fn key_pair(number: u8) -> KeyPair {
    KeyPair::from_seed(&[number; 32])
}

fn peer(key_pair: &KeyPair) -> Peer {
    Peer { public_key: key_pair.public_key(), relay_addresses: Vec::new() }
}

fn signed(purpose: Purpose, target: &Id, key_pair: &KeyPair) -> Vec<u8> {
    Announcement::sign(purpose, peer(key_pair), Audience { target, node: &NODE, token: &TOKEN }, key_pair).encode()
}

#[tokio::test(start_paused = true)]
async fn an_announcement_is_found_for_twenty_minutes() {
    let mut shelf = Shelf::new();
    let value = signed(Purpose::Announce, &TOPIC, &key_pair(1));
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&value)), Answer::Done);
    assert_eq!(shelf.lookup(&TOPIC), [peer(&key_pair(1))]);
    assert_eq!(shelf.lookup(&[6; 32]), []);
    shelf.now += Duration::from_mins(20);
    assert_eq!(shelf.lookup(&TOPIC), []);
}

#[tokio::test(start_paused = true)]
async fn at_most_twenty_peers_are_named() {
    let mut shelf = Shelf::new();
    for number in 0..25 {
        let value = signed(Purpose::Announce, &TOPIC, &key_pair(number));
        assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&value)), Answer::Done);
    }
    assert_eq!(shelf.lookup(&TOPIC).len(), 20);
}

#[tokio::test(start_paused = true)]
async fn an_announcement_for_another_node_or_topic_is_dropped() {
    let mut shelf = Shelf::new();
    let elsewhere = Audience { target: &TOPIC, node: &[8; 32], token: &TOKEN };
    let value = Announcement::sign(Purpose::Announce, peer(&key_pair(1)), elsewhere, &key_pair(1)).encode();
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&value)), Answer::Silence);
    let value = signed(Purpose::Announce, &[6; 32], &key_pair(1));
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&value)), Answer::Silence);
    let value = signed(Purpose::Unannounce, &TOPIC, &key_pair(1));
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&value)), Answer::Silence);
    assert_eq!(shelf.lookup(&TOPIC), []);
}

#[tokio::test(start_paused = true)]
async fn without_a_token_nothing_is_stored() {
    let mut shelf = Shelf::new();
    let value = signed(Purpose::Announce, &TOPIC, &key_pair(1));
    let from = "1.2.3.4:5".parse().unwrap();
    for command in [ANNOUNCE, UNANNOUNCE, MUTABLE_PUT, IMMUTABLE_PUT] {
        let question = Question { command, target: Some(&TOPIC), token: None, value: Some(&value), from, node: &NODE };
        assert_eq!(shelf.store.answer(question, &mut shelf.router, shelf.now), Answer::Silence);
    }
}

#[tokio::test(start_paused = true)]
async fn only_its_owner_takes_an_announcement_back() {
    let mut shelf = Shelf::new();
    shelf.ask(ANNOUNCE, &TOPIC, Some(&signed(Purpose::Announce, &TOPIC, &key_pair(1))));
    let stranger = signed(Purpose::Unannounce, &TOPIC, &key_pair(2));
    assert_eq!(shelf.ask(UNANNOUNCE, &TOPIC, Some(&stranger)), Answer::Done);
    assert_eq!(shelf.lookup(&TOPIC).len(), 1);
    let mut forged = Announcement::decode(&stranger).unwrap();
    forged.peer = Some(peer(&key_pair(1)));
    assert_eq!(shelf.ask(UNANNOUNCE, &TOPIC, Some(&forged.encode())), Answer::Silence);
    let owner = signed(Purpose::Unannounce, &TOPIC, &key_pair(1));
    assert_eq!(shelf.ask(UNANNOUNCE, &TOPIC, Some(&owner)), Answer::Done);
    assert_eq!(shelf.lookup(&TOPIC), []);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_announces_its_own_key_becomes_a_route() {
    let mut shelf = Shelf::new();
    let server = key_pair(1);
    let target = hash(&[server.public_key().as_bytes()]);
    assert_eq!(shelf.ask(FIND_PEER, &target, None), Answer::Value(None));
    shelf.ask(ANNOUNCE, &target, Some(&signed(Purpose::Announce, &target, &server)));
    assert_eq!(shelf.router.relay(&target, shelf.now), Some("1.2.3.4:5".parse().unwrap()));
    assert_eq!(shelf.ask(FIND_PEER, &target, None), Answer::Value(Some(peer(&server).encode().into())));
    assert_eq!(shelf.lookup(&target), [peer(&server)], "a lookup names the server as well");
    shelf.ask(UNANNOUNCE, &target, Some(&signed(Purpose::Unannounce, &target, &server)));
    assert_eq!(shelf.ask(FIND_PEER, &target, None), Answer::Value(None));
}

#[tokio::test(start_paused = true)]
async fn whoever_knows_the_link_before_renews_without_a_signature() {
    let mut shelf = Shelf::new();
    let links: Vec<[u8; 32]> = std::iter::successors(Some([1; 32]), |link| Some(hash(&[link]))).take(3).collect();
    let server = key_pair(1);
    let audience = Audience { target: &TOPIC, node: &NODE, token: &TOKEN };
    let mut announcement = Announcement::sign(Purpose::Announce, peer(&server), audience, &server);
    announcement.refresh = Some(links[2]);
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&announcement.encode())), Answer::Silence, "it is signed as well");

    let signable = {
        let mut message = [0; 64];
        message[..32].copy_from_slice(&crate::crypto::namespace("hyperswarm/dht", 4));
        message[32..].copy_from_slice(&hash(&[&TOPIC, &NODE, &TOKEN, &peer(&server).encode(), &links[2]]));
        message
    };
    announcement.signature = Some(server.sign(&signable));
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&announcement.encode())), Answer::Done);

    let renewal = |link| Announcement { peer: None, refresh: Some(link), signature: None, bump: 0 }.encode();
    shelf.now += Duration::from_mins(15);
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&renewal(links[0]))), Answer::Silence, "one link at a time");
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&renewal(links[1]))), Answer::Done);
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&renewal(links[1]))), Answer::Silence, "each link serves once");
    shelf.now += Duration::from_mins(15);
    assert_eq!(shelf.lookup(&TOPIC).len(), 1);
    assert_eq!(shelf.ask(ANNOUNCE, &TOPIC, Some(&renewal(links[0]))), Answer::Done);
}

#[tokio::test(start_paused = true)]
async fn a_mutable_value_is_replaced_only_by_a_higher_number() {
    let mut shelf = Shelf::new();
    let owner = key_pair(1);
    let target = hash(&[owner.public_key().as_bytes()]);
    let put = |seq, value: &'static str| MutableValue::sign(seq, value.into(), &owner).encode_put(&owner.public_key());
    let seq_min = |seq| {
        let mut value = Vec::new();
        value.write_uint(seq);
        value
    };
    assert_eq!(shelf.ask(MUTABLE_PUT, &target, Some(&put(2, "two"))), Answer::Value(None));
    assert_eq!(shelf.ask(MUTABLE_PUT, &target, Some(&put(2, "two"))), Answer::Value(None));
    assert_eq!(shelf.ask(MUTABLE_PUT, &target, Some(&put(2, "zwei"))), Answer::Error(16));
    assert_eq!(shelf.ask(MUTABLE_PUT, &target, Some(&put(1, "one"))), Answer::Error(17));
    let kept = MutableValue::sign(2, "two".into(), &owner).encode();
    assert_eq!(shelf.ask(MUTABLE_GET, &target, Some(&seq_min(2))), Answer::Value(Some(kept.into())));
    assert_eq!(shelf.ask(MUTABLE_GET, &target, Some(&seq_min(3))), Answer::Value(None));
    assert_eq!(shelf.ask(MUTABLE_PUT, &TOPIC, Some(&put(3, "three"))), Answer::Silence, "another's place");
    let mut forged = put(3, "three");
    forged[34] ^= 1;
    assert_eq!(shelf.ask(MUTABLE_PUT, &target, Some(&forged)), Answer::Silence);
    shelf.now += Duration::from_hours(48);
    assert_eq!(shelf.ask(MUTABLE_GET, &target, Some(&seq_min(0))), Answer::Value(None));
}

#[tokio::test(start_paused = true)]
async fn an_immutable_value_stands_under_its_hash_alone() {
    let mut shelf = Shelf::new();
    let target = hash(&[b"hello"]);
    assert_eq!(shelf.ask(IMMUTABLE_PUT, &TOPIC, Some(b"hello")), Answer::Silence);
    assert_eq!(shelf.ask(IMMUTABLE_PUT, &target, Some(b"hello")), Answer::Value(None));
    assert_eq!(shelf.ask(IMMUTABLE_GET, &target, None), Answer::Value(Some("hello".into())));
    let long = vec![0; VALUE_LENGTH_MAX + 1];
    assert_eq!(shelf.ask(IMMUTABLE_PUT, &hash(&[&long]), Some(&long)), Answer::Silence);
}

proptest! {
    #[test]
    fn foreign_bytes_never_panic(command in 0_u64..12, value: Option<Vec<u8>>, target: Id) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut shelf = Shelf::new();
            shelf.ask(command, &target, value.as_deref());
        });
    }
}

use serde_json::Value;
use tether_hyperswarm::crypto::{KeyPair, PublicKey};
use tether_hyperswarm::hyperdht::commands;
use tether_hyperswarm::hyperdht::records::{
    Announcement, Audience, LookupReply, MutableValue, Peer, Purpose, SEQ_REUSED, SEQ_TOO_LOW,
};

use super::{bytes, cases, fixed, optional_fixed, parsed, read};

fn peer(case: &Value) -> Peer {
    Peer { public_key: PublicKey(fixed(&case["public_key"])), relay_addresses: parsed(&case["relay_addresses"]) }
}

#[test]
fn commands_and_errors_have_the_numbers_of_hyperdht() {
    let golden = read("records");
    let number = |list: &str, name: &str| golden[list][name].as_u64().expect("a number");
    for (name, command) in [
        ("PEER_HANDSHAKE", commands::PEER_HANDSHAKE),
        ("PEER_HOLEPUNCH", commands::PEER_HOLEPUNCH),
        ("FIND_PEER", commands::FIND_PEER),
        ("LOOKUP", commands::LOOKUP),
        ("ANNOUNCE", commands::ANNOUNCE),
        ("UNANNOUNCE", commands::UNANNOUNCE),
        ("MUTABLE_PUT", commands::MUTABLE_PUT),
        ("MUTABLE_GET", commands::MUTABLE_GET),
        ("IMMUTABLE_PUT", commands::IMMUTABLE_PUT),
        ("IMMUTABLE_GET", commands::IMMUTABLE_GET),
    ] {
        assert_eq!(command, number("commands", name), "{name}");
    }
    assert_eq!([SEQ_REUSED, SEQ_TOO_LOW], [number("errors", "SEQ_REUSED"), number("errors", "SEQ_TOO_LOW")]);
}

#[test]
fn peers_are_written_alike() {
    let golden = read("records");
    for case in cases(&golden["peers"]).iter().chain([&golden["find_peer"]["peer"]]) {
        assert_eq!(peer(case).encode(), bytes(&case["bytes"]));
        assert_eq!(Peer::decode(&bytes(&case["bytes"])), Ok(peer(case)));
    }
}

#[test]
fn announcements_are_signed_and_verified_alike() {
    for case in cases(&read("records")["announcements"]) {
        let keys = KeyPair::from_seed(&fixed(&case["seed"]));
        let (target, node, token) = (fixed(&case["target"]), fixed(&case["node_id"]), fixed(&case["token"]));
        let audience = || Audience { target: &target, node: &node, token: &token };
        let (purpose, other) = match case["kind"].as_str() {
            Some("announce") => (Purpose::Announce, Purpose::Unannounce),
            _ => (Purpose::Unannounce, Purpose::Announce),
        };
        let expected = Announcement {
            peer: Some(peer(&case["peer"])),
            refresh: optional_fixed(&case["refresh"]),
            signature: optional_fixed(&case["signature"]),
            bump: parsed(&case["bump"]),
        };
        assert_eq!(expected.encode(), bytes(&case["value"]), "{case}");
        let read = Announcement::decode(&bytes(&case["value"])).expect("sound");
        assert_eq!(read, expected);
        assert_eq!(read.verified(purpose, audience()), expected.peer.as_ref());
        assert_eq!(read.verified(other, audience()), None, "each purpose has signatures of its own");
        assert_eq!(read.verified(purpose, Audience { token: &[0; 32], ..audience() }), None);
        if expected.refresh.is_none() && expected.bump == 0 {
            assert_eq!(Announcement::sign(purpose, peer(&case["peer"]), audience(), &keys), expected);
        }
    }
}

#[test]
fn a_refresh_alone_is_understood() {
    let golden = read("records");
    let case = &golden["refresh_only"];
    let read = Announcement::decode(&bytes(&case["value"])).expect("sound");
    assert_eq!(read, Announcement { peer: None, refresh: optional_fixed(&case["refresh"]), signature: None, bump: 0 });
}

#[test]
fn lookups_are_answered_alike_and_the_bump_may_be_left_out() {
    let golden = read("records");
    for case in cases(&golden["lookups"]) {
        let list = case["peers"].as_array().expect("a list");
        let records: Vec<_> = list.iter().map(|peer| bytes(&peer["bytes"])).collect();
        assert_eq!(LookupReply::encode(&records, parsed(&case["bump"])), bytes(&case["value"]));
        let read = LookupReply::decode(&bytes(&case["value"])).expect("sound");
        assert_eq!(read, LookupReply { peers: list.iter().map(peer).collect(), bump: parsed(&case["bump"]) });
    }
    let early = LookupReply::decode(&bytes(&golden["lookup_without_bump"])).expect("sound");
    assert_eq!((early.peers.len(), early.bump), (2, 0));
}

#[test]
fn mutable_values_are_signed_and_verified_alike() {
    for case in cases(&read("records")["mutables"]) {
        let keys = KeyPair::from_seed(&fixed(&case["seed"]));
        let signed = MutableValue::sign(parsed(&case["seq"]), bytes(&case["value"]).into(), &keys);
        assert_eq!(signed.signature, fixed(&case["signature"]));
        assert!(signed.is_of(&keys.public_key()) && !signed.is_of(&PublicKey([7; 32])));
        assert_eq!(signed.encode(), bytes(&case["reply"]));
        assert_eq!(signed.encode_put(&keys.public_key()), bytes(&case["put"]));
        assert_eq!(MutableValue::decode_put(&bytes(&case["put"])), Ok((keys.public_key(), signed.clone())));
        assert_eq!(MutableValue::decode(&bytes(&case["reply"])), Ok(signed));
    }
}

//! The Node packages `noise-handshake` 4.2.0 and `noise-curve-ed` 2.1.0 made the test vectors in this folder.

use serde::Deserialize;

use super::*;
use crate::crypto::{keyed_hash, namespace};

#[derive(Deserialize)]
struct Handshake {
    initiator_seed: String,
    responder_seed: String,
    initiator_ephemeral: String,
    responder_ephemeral: String,
    prologue: String,
    first_payload: String,
    second_payload: String,
    first_message: String,
    second_message: String,
    hash: String,
    initiator_tx: String,
    initiator_rx: String,
    holepunch_secret: String,
}

#[derive(Deserialize)]
struct GoldenPoint {
    point: String,
    out: Option<String>,
}

fn keys(seed: &str) -> KeyPair {
    KeyPair::from_seed(&hex::decode(seed).unwrap().try_into().unwrap())
}

#[test]
fn both_sides_speak_as_the_node_packages_do() {
    let handshakes: Vec<Handshake> = serde_json::from_str(include_str!("handshakes.json")).unwrap();
    assert_eq!(handshakes.len(), 3);
    for golden in handshakes {
        let prologue = hex::decode(&golden.prologue).unwrap();
        assert_eq!(prologue, namespace("hyperswarm/dht", 0));
        let (local, remote) = (keys(&golden.initiator_seed), keys(&golden.responder_seed));
        let mut initiator =
            Initiator::with_ephemeral(&local, remote.public_key(), &prologue, keys(&golden.initiator_ephemeral))
                .unwrap();
        let mut responder = Responder::with_ephemeral(&remote, &prologue, keys(&golden.responder_ephemeral));

        let first = initiator.send(&hex::decode(&golden.first_payload).unwrap()).unwrap();
        assert_eq!(hex::encode(&first), golden.first_message);
        let (payload, caller) = responder.receive(&first).unwrap();
        assert_eq!(hex::encode(payload), golden.first_payload);
        assert_eq!(caller, local.public_key());
        let (second, at_responder) = responder.send(&hex::decode(&golden.second_payload).unwrap()).unwrap();
        assert_eq!(hex::encode(&second), golden.second_message);
        let (payload, at_initiator) = initiator.receive(&second).unwrap();
        assert_eq!(hex::encode(payload), golden.second_payload);

        assert_eq!(hex::encode(at_initiator.hash), golden.hash);
        assert_eq!(hex::encode(at_initiator.tx), golden.initiator_tx);
        assert_eq!(hex::encode(at_initiator.rx), golden.initiator_rx);
        assert_eq!(at_initiator.hash, at_responder.hash);
        assert_eq!((at_initiator.tx, at_initiator.rx), (at_responder.rx, at_responder.tx));
        assert_eq!(at_initiator.remote_key, at_responder.local_key);
        let secret = keyed_hash(&at_initiator.hash, &[&namespace("hyperswarm/dht", 1)]);
        assert_eq!(hex::encode(secret), golden.holepunch_secret);
    }
}

#[test]
fn the_points_that_libsodium_refuses_are_refused() {
    let points: Vec<GoldenPoint> = serde_json::from_str(include_str!("points.json")).unwrap();
    let local = KeyPair::from_seed(&[1; 32]);
    for golden in points {
        let point = PublicKey(hex::decode(&golden.point).unwrap().try_into().unwrap());
        let shared = Point::new(point).ok().map(|point| hex::encode(*exchange(&local, &point)));
        assert_eq!(shared, golden.out, "point {}", golden.point);
    }
}

#[test]
fn a_forged_answer_does_not_spoil_the_handshake() {
    let (local, remote) = (KeyPair::from_seed(&[1; 32]), KeyPair::from_seed(&[2; 32]));
    let mut initiator = Initiator::new(&local, remote.public_key(), b"prologue").unwrap();
    let first = initiator.send(b"hello").unwrap();
    let mut responder = Responder::new(&remote, b"prologue");
    responder.receive(&first).unwrap();
    let (second, _) = responder.send(b"world").unwrap();

    let mut forged = second.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(initiator.receive(&forged).err(), Some(NoiseError::Sealed));
    assert_eq!(initiator.receive(&second[..40]).err(), Some(NoiseError::Length));
    assert_eq!(initiator.receive(&second).unwrap().0, b"world");
}

#[test]
fn a_message_for_someone_else_or_another_use_is_refused() {
    let (local, remote) = (KeyPair::from_seed(&[1; 32]), KeyPair::from_seed(&[2; 32]));
    let first = Initiator::new(&local, remote.public_key(), b"prologue").unwrap().send(b"hello").unwrap();
    let refusal = |keys: &KeyPair, prologue: &[u8]| Responder::new(keys, prologue).receive(&first).err();
    assert_eq!(refusal(&local, b"prologue"), Some(NoiseError::Sealed));
    assert_eq!(refusal(&remote, b"other"), Some(NoiseError::Sealed));
    assert_eq!(refusal(&remote, b"prologue"), None);
}

#[test]
fn a_message_altered_anywhere_is_refused() {
    let (local, remote) = (KeyPair::from_seed(&[1; 32]), KeyPair::from_seed(&[2; 32]));
    let first = Initiator::new(&local, remote.public_key(), b"").unwrap().send(b"hello").unwrap();
    for index in 0..first.len() {
        let mut altered = first.clone();
        altered[index] ^= 1;
        assert!(Responder::new(&remote, b"").receive(&altered).is_err(), "byte {index}");
        assert!(Responder::new(&remote, b"").receive(&first[..index]).is_err(), "cut at {index}");
    }
}

use tether_hyperswarm::crypto::noise::{Initiator, Responder};
use tether_hyperswarm::crypto::{KeyPair, PublicKey, hash, keyed_hash, namespace, secretbox};
use tether_hyperswarm::hyperdht::holepunch::holepunch_secret;

use super::{bytes, cases, fixed, read};

#[test]
fn seeds_make_the_same_keys() {
    for case in cases(&read("crypto")["key_pairs"]) {
        let pair = KeyPair::from_seed(&fixed(&case["seed"]));
        assert_eq!(pair.public_key(), PublicKey(fixed(&case["public_key"])));
        assert_eq!(hash(&[&pair.public_key().0]), fixed(&case["target"]));
    }
}

#[test]
fn hashes_are_the_same_with_and_without_key() {
    let golden = read("crypto");
    for case in cases(&golden["hashes"]) {
        assert_eq!(hash(&[&bytes(&case["input"])]), fixed(&case["hash"]));
    }
    for case in cases(&golden["keyed_hashes"]) {
        assert_eq!(keyed_hash(&bytes(&case["key"]), &[&bytes(&case["input"])]), fixed(&case["hash"]));
    }
    for case in cases(&golden["namespaces"]) {
        let (name, id) = (case["name"].as_str().expect("a name"), case["id"].as_u64().expect("an id"));
        assert_eq!(namespace(name, id as u8), fixed(&case["value"]), "{case}");
    }
    let ids = &golden["stream_ids"];
    let handshake = bytes(&ids["handshake_hash"]);
    for (id, role) in [(0, "initiator"), (1, "responder")] {
        assert_eq!(keyed_hash(&handshake, &[&namespace("hyperswarm/secret-stream", id)]), fixed(&ids[role]));
    }
}

#[test]
fn both_roles_shake_hands_as_noise_handshake_does() {
    for case in cases(&read("noise")["handshakes"]) {
        let pair = |field: &str| KeyPair::from_seed(&fixed(&case[field]));
        let (client, server) = (pair("initiator_seed"), pair("responder_seed"));
        let prologue = bytes(&case["prologue"]);
        let ephemeral = pair("initiator_ephemeral_seed");
        let mut initiator =
            Initiator::with_ephemeral(&client, server.public_key(), &prologue, ephemeral).expect("a sound key");
        let mut responder = Responder::with_ephemeral(&server, &prologue, pair("responder_ephemeral_seed"));
        let first = initiator.send(&bytes(&case["payload1"])).expect("sound keys");
        assert_eq!(first, bytes(&case["message1"]));
        let (payload, remote) = responder.receive(&first).expect("a sound message");
        assert_eq!((payload, remote), (bytes(&case["payload1"]), client.public_key()));
        let (second, there) = responder.send(&bytes(&case["payload2"])).expect("sound keys");
        assert_eq!(second, bytes(&case["message2"]));
        let (payload, here) = initiator.receive(&second).expect("a sound message");
        assert_eq!(payload, bytes(&case["payload2"]));
        for (session, side) in [(here, &case["initiator"]), (there, &case["responder"])] {
            assert_eq!(session.tx, fixed(&side["tx"]));
            assert_eq!(session.rx, fixed(&side["rx"]));
            assert_eq!(session.hash, fixed(&side["hash"]));
            assert_eq!(session.remote_key.0, fixed(&side["remote_public_key"]));
            assert_eq!(holepunch_secret(&session), fixed(&side["holepunch_secret"]));
        }
    }
}

#[test]
fn a_bent_handshake_is_refused() {
    let golden = read("noise");
    let case = &golden["handshakes"][0];
    let server = KeyPair::from_seed(&fixed(&case["responder_seed"]));
    let message = bytes(&case["message1"]);
    for at in 0..message.len() {
        let mut bent = message.clone();
        bent[at] ^= 1;
        assert!(Responder::new(&server, &bytes(&case["prologue"])).receive(&bent).is_err(), "byte {at}");
    }
}

#[test]
fn sealed_messages_open() {
    let golden = read("holepunch_payload");
    let secret = fixed(&golden["secret"]);
    for case in cases(&golden["cases"]) {
        let sealed = bytes(&case["sealed"]);
        assert_eq!(secretbox::open(&secret, &sealed), Some(bytes(&case["bytes"])));
        let own = secretbox::seal(&secret, &bytes(&case["bytes"]));
        assert_eq!(own.len(), sealed.len());
        assert_eq!(secretbox::open(&secret, &own), Some(bytes(&case["bytes"])));
    }
}

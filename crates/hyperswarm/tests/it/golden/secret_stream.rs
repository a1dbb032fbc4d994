use bytes::BytesMut;
use serde_json::Value;
use tether_hyperswarm::crypto::PublicKey;
use tether_hyperswarm::crypto::noise::Session;
use tether_hyperswarm::secret_stream::{DecryptError, Opener, Sealer};

use super::{bytes, cases, fixed, read};

/// One end of the connection that the golden handshake made.
pub(super) fn session(is_initiator: bool) -> Session {
    let golden = read("secret_stream");
    let (tx, rx) = (fixed(&golden["initiator_tx"]), fixed(&golden["initiator_rx"]));
    Session {
        is_initiator,
        local_key: PublicKey([u8::from(is_initiator); 32]),
        remote_key: PublicKey([u8::from(!is_initiator); 32]),
        tx: if is_initiator { tx } else { rx },
        rx: if is_initiator { rx } else { tx },
        hash: fixed(&golden["handshake_hash"]),
    }
}

fn counting(length: usize) -> Vec<u8> {
    (0..length).map(|index| index as u8).collect()
}

/// All that one side sent, and the messages in it.
fn sent(side: &Value) -> (Vec<u8>, Vec<Vec<u8>>) {
    let frames = cases(&side["frames"]);
    let first = bytes(&side["first_frame"]);
    let wire = frames.iter().fold(first, |wire, frame| [wire, bytes(&frame["frame"])].concat());
    (wire, frames.iter().map(|frame| bytes(&frame["plain"])).collect())
}

#[test]
fn messages_are_sealed_into_the_same_frames() {
    for side in cases(&read("secret_stream")["sides"]) {
        let (mut sealer, first) = Sealer::new(&session(side["initiator"] == true), fixed(&side["header"]));
        assert_eq!(hex::encode(first), side["first_frame"].as_str().expect("bytes"));
        for case in cases(&side["frames"]) {
            let (mut frame, plain) = (BytesMut::new(), bytes(&case["plain"]));
            let (head, tail) = plain.split_at(plain.len() / 3);
            sealer.seal(head, &[tail], &mut frame).expect("short enough");
            assert_eq!(hex::encode(&frame), case["frame"].as_str().expect("bytes"));
        }
        let (mut frame, long) = (BytesMut::new(), &side["long_frame"]);
        sealer.seal(&[], &[&counting(70_000)], &mut frame).expect("short enough");
        assert_eq!(frame.len() as u64, long["length"].as_u64().expect("a number"));
        assert_eq!(frame[..40], bytes(&long["start"]));
        assert_eq!(frame[frame.len() - 40..], bytes(&long["end"]));
    }
}

#[test]
fn frames_open_to_the_messages_however_they_are_cut() {
    for side in cases(&read("secret_stream")["sides"]) {
        let (wire, messages) = sent(side);
        for step in [1, 7, 59, wire.len()] {
            let mut opener = Opener::new(&session(side["initiator"] != true));
            let mut opened = Vec::new();
            for piece in wire.chunks(step) {
                opener.feed(piece);
                while let Some(message) = opener.pop().expect("genuine") {
                    opened.push(message.to_vec());
                }
            }
            // Empty messages keep the connection alive and say nothing.
            let said: Vec<_> = messages.iter().filter(|message| !message.is_empty()).cloned().collect();
            assert_eq!(opened, said);
            assert!(opener.is_between_messages());
        }
    }
}

#[test]
fn a_frame_of_the_own_side_or_a_bent_one_is_refused() {
    for side in cases(&read("secret_stream")["sides"]) {
        let (wire, _) = sent(side);
        let is_initiator = side["initiator"] == true;
        let mut opener = Opener::new(&session(is_initiator));
        opener.feed(&wire);
        assert_eq!(opener.pop(), Err(DecryptError::WrongHeader));
        for at in [3, 34, 59 + 3, wire.len() - 1] {
            let mut bent = wire.clone();
            bent[at] ^= 1;
            let mut opener = Opener::new(&session(!is_initiator));
            opener.feed(&bent);
            let refused = std::iter::repeat_with(|| opener.pop()).find(|popped| !matches!(popped, Ok(Some(_))));
            assert!(matches!(refused, Some(Err(_))), "byte {at}");
        }
    }
}

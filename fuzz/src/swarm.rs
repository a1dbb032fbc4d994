//! The readers of the Hyperswarm crate.

use hyperswarm::compact_encoding::{Decoder, Encoder as _, uint_size};
use hyperswarm::crypto::KeyPair;
use hyperswarm::crypto::noise::{Initiator, Responder, Session};
use hyperswarm::dht_rpc::Message;
use hyperswarm::hyperdht::handshake::Handshake;
use hyperswarm::hyperdht::holepunch::{Holepunch, HolepunchPayload};
use hyperswarm::hyperdht::noise_payload::NoisePayload;
use hyperswarm::hyperdht::records::{Announcement, LookupReply, MutableValue, Peer};
use hyperswarm::secret_stream::Opener;

/// Values of every kind; the first byte says which.
pub fn compact_value(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else { return };
    let mut decoder = Decoder::new(rest);
    match kind % 8 {
        0 => {
            if let Ok(value) = decoder.uint() {
                let mut written = Vec::new();
                written.write_uint(value);
                assert_eq!(written.len(), uint_size(value));
                assert_eq!(Decoder::new(&written).uint(), Ok(value));
            }
        }
        1 => drop(decoder.buffer().map(|buffer| assert!(buffer.len() < rest.len()))),
        2 => drop(decoder.string()),
        3 => drop(decoder.array(256, Decoder::ipv4)),
        4 => drop(decoder.array(256, Decoder::ipv6)),
        5 => drop(decoder.array(256, |item| item.string().map(str::len))),
        6 => drop(decoder.fixed::<64>()),
        _ => drop((decoder.u16(), decoder.u32(), decoder.u64(), decoder.optional_buffer().is_ok())),
    }
}

/// A datagram of the DHT.
pub fn dht_message(bytes: &[u8]) {
    let Ok(message) = Message::decode(bytes) else { return };
    let mut written = Vec::new();
    match &message {
        Message::Request(request) => request.encode(&mut written),
        Message::Response(response) => response.encode(&mut written),
    }
    assert_eq!(Message::decode(&written), Ok(message));
}

/// What a request of the DHT carries to connect two peers; the first byte says what it is read as.
pub fn dht_connection(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => {
            if let Ok(handshake) = Handshake::decode(rest) {
                assert_eq!(Handshake::decode(&handshake.encode()), Ok(handshake));
            }
        }
        1 => {
            if let Ok(holepunch) = Holepunch::decode(rest) {
                assert_eq!(Holepunch::decode(&holepunch.encode()), Ok(holepunch));
            }
        }
        2 => {
            if let Ok(payload) = HolepunchPayload::decode(rest) {
                assert_eq!(HolepunchPayload::decode(&payload.encode()), Ok(payload));
            }
        }
        _ => assert_eq!(HolepunchPayload::open(rest, &[7; 32]), None, "nobody guesses a seal"),
    }
}

/// What a node of the DHT stores and finds; the first byte says what it is read as.
pub fn dht_record(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else { return };
    match kind % 5 {
        0 => {
            if let Ok(peer) = Peer::decode(rest) {
                assert_eq!(Peer::decode(&peer.encode()), Ok(peer));
            }
        }
        1 => {
            if let Ok(announcement) = Announcement::decode(rest) {
                assert_eq!(Announcement::decode(&announcement.encode()), Ok(announcement));
            }
        }
        2 => {
            if let Ok(reply) = LookupReply::decode(rest) {
                let records: Vec<_> = reply.peers.iter().map(Peer::encode).collect();
                assert_eq!(LookupReply::decode(&LookupReply::encode(&records, reply.bump)), Ok(reply));
            }
        }
        3 => {
            if let Ok(value) = MutableValue::decode(rest) {
                assert_eq!(MutableValue::decode(&value.encode()), Ok(value));
            }
        }
        _ => {
            if let Ok((key, value)) = MutableValue::decode_put(rest) {
                let _ = value.is_of(&key);
                assert_eq!(MutableValue::decode_put(&value.encode_put(&key)), Ok((key, value)));
            }
        }
    }
}

/// What is said inside a handshake.
pub fn noise_payload(bytes: &[u8]) {
    let Ok(payload) = NoisePayload::decode(bytes) else { return };
    if payload.is_compatible() {
        assert_eq!(NoisePayload::decode(&payload.encode()), Ok(payload));
    }
}

const PROLOGUE: &[u8] = b"fuzz";

/// The first message of a handshake at a server, and the second at a client.
pub fn noise_message(bytes: &[u8]) {
    let [server, client, ephemeral] = [1, 2, 3].map(|seed| KeyPair::from_seed(&[seed; 32]));
    let _ = Responder::new(&server, PROLOGUE).receive(bytes);
    let key = server.public_key();
    let Ok(mut initiator) = Initiator::with_ephemeral(&client, key, PROLOGUE, ephemeral) else { return };
    if initiator.send(b"hello").is_ok() {
        assert!(initiator.receive(bytes).is_err(), "nobody guesses an answer");
    }
}

/// Frames of an encrypted connection: as they come, and after a sound first frame.
pub fn secret_frames(bytes: &[u8]) {
    let keys = [4, 5].map(|seed| KeyPair::from_seed(&[seed; 32]).public_key());
    let session = |is_initiator| Session {
        is_initiator,
        local_key: keys[0],
        remote_key: keys[1],
        tx: [6; 32],
        rx: [6; 32],
        hash: [7; 64],
    };
    let (_, first) = hyperswarm::secret_stream::Sealer::new(&session(true), [8; 24]);
    for opening in [&[][..], &first[..]] {
        let mut opener = Opener::new(&session(false));
        opener.feed(opening);
        for piece in bytes.chunks(bytes.len() / 3 + 1) {
            opener.feed(piece);
            while let Ok(Some(message)) = opener.pop() {
                assert!(message.len() < bytes.len());
            }
        }
    }
}

/// Packets of a UDX stream, among them what this side does meanwhile.
pub fn udx_packets(bytes: &[u8]) {
    hyperswarm::udx::fuzzing::play(bytes);
}

/// Frames of a connection with channels, and this side's responses.
pub fn mux_frames(bytes: &[u8]) {
    hyperswarm::protomux::fuzzing::play(bytes);
}

/// A request or a response.
pub fn rpc_message(bytes: &[u8]) {
    hyperswarm::rpc::fuzzing::read(bytes);
}

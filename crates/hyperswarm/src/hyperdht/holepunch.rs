//! The value of a PEER_HOLEPUNCH request: an encrypted message with which two firewalled peers agree on how to reach
//! each other.
//!
//! Relays forward these values. This crate does not punch holes itself.

use std::net::SocketAddrV4;

use super::handshake::Mode;
use super::noise_payload::{ADDRESSES_MAX, Firewall};
use crate::compact_encoding::{DecodeError, Decoder, Encoder};
use crate::crypto::noise::Session;
use crate::crypto::{keyed_hash, namespace, secretbox};

/// The value of a PEER_HOLEPUNCH request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holepunch<'a> {
    /// Who sent it.
    pub mode: Mode,
    /// The id of the server's handshake that this belongs to.
    pub id: u64,
    /// An encrypted [`HolepunchPayload`].
    pub payload: &'a [u8],
    /// The address of the end that the receiver does not see.
    pub peer_address: Option<SocketAddrV4>,
}

impl<'a> Holepunch<'a> {
    /// Decodes a value.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        let flags = decoder.uint()?;
        Ok(Self {
            mode: Mode::from_code(decoder.uint()?)?,
            id: decoder.uint()?,
            payload: decoder.buffer()?,
            peer_address: (flags & 1 != 0).then(|| decoder.ipv4()).transpose()?,
        })
    }

    /// Encodes the value.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.payload.len() + 24);
        bytes.write_uint(self.peer_address.is_some().into());
        bytes.write_uint(self.mode.code());
        bytes.write_uint(self.id);
        bytes.write_buffer(self.payload);
        if let Some(address) = self.peer_address {
            bytes.write_ipv4(address);
        }
        bytes
    }
}

const CONNECTED: u64 = 1;
const PUNCHING: u64 = 2;
const ADDRESSES: u64 = 4;
const REMOTE_ADDRESS: u64 = 8;
const TOKEN: u64 = 16;
const REMOTE_TOKEN: u64 = 32;

/// What one peer reports to the other about its firewall and its next step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HolepunchPayload {
    /// Zero, or the reason why the sender gives up.
    pub error: u64,
    /// What the sender knows about its firewall.
    pub firewall: Firewall,
    /// The sender's message counter, so that an outdated message has no effect.
    pub round: u64,
    /// Whether the sender has a connection.
    pub connected: bool,
    /// Whether the sender is punching, or is willing to.
    pub punching: bool,
    /// The sender's addresses as seen from outside.
    pub addresses: Option<Vec<SocketAddrV4>>,
    /// The address at which the sender opened its NAT for the receiver.
    pub remote_address: Option<SocketAddrV4>,
    /// A token that proves the receiver's address when the receiver returns it.
    pub token: Option<[u8; 32]>,
    /// The receiver's token, returned to it.
    pub remote_token: Option<[u8; 32]>,
}

impl HolepunchPayload {
    /// Decodes a message.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        let flags = decoder.uint()?;
        let has = |flag| flags & flag != 0;
        Ok(Self {
            error: decoder.uint()?,
            firewall: Firewall::from_code(decoder.uint()?),
            round: decoder.uint()?,
            connected: has(CONNECTED),
            punching: has(PUNCHING),
            addresses: has(ADDRESSES).then(|| decoder.array(ADDRESSES_MAX, Decoder::ipv4)).transpose()?,
            remote_address: has(REMOTE_ADDRESS).then(|| decoder.ipv4()).transpose()?,
            token: has(TOKEN).then(|| decoder.fixed()).transpose()?,
            remote_token: has(REMOTE_TOKEN).then(|| decoder.fixed()).transpose()?,
        })
    }

    /// Encodes the message.
    pub fn encode(&self) -> Vec<u8> {
        let mut flags = 0;
        for (set, flag) in [
            (self.connected, CONNECTED),
            (self.punching, PUNCHING),
            (self.addresses.is_some(), ADDRESSES),
            (self.remote_address.is_some(), REMOTE_ADDRESS),
            (self.token.is_some(), TOKEN),
            (self.remote_token.is_some(), REMOTE_TOKEN),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let mut bytes = Vec::new();
        bytes.write_uint(flags);
        bytes.write_uint(self.error);
        bytes.write_uint(self.firewall.code());
        bytes.write_uint(self.round);
        if let Some(addresses) = &self.addresses {
            bytes.write_array(addresses, |bytes, address| bytes.write_ipv4(*address));
        }
        if let Some(address) = self.remote_address {
            bytes.write_ipv4(address);
        }
        for token in [self.token, self.remote_token].into_iter().flatten() {
            bytes.write_raw(&token);
        }
        bytes
    }

    /// Encrypts the message for the other end of a handshake.
    pub fn seal(&self, secret: &[u8; 32]) -> Vec<u8> {
        secretbox::seal(secret, &self.encode())
    }

    /// Decrypts a message; `None` unless the other end made it.
    pub fn open(sealed: &[u8], secret: &[u8; 32]) -> Option<Self> {
        Self::decode(&secretbox::open(secret, sealed)?).ok()
    }
}

/// Returns the key that encrypts hole punch messages between the two ends of a handshake.
pub fn holepunch_secret(session: &Session) -> [u8; 32] {
    keyed_hash(&session.hash, &[&namespace("hyperswarm/dht", 1)])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hyperdht::golden::golden;

    #[test]
    fn values_are_those_of_the_node_package() {
        let from_client = Holepunch {
            mode: Mode::FromClient,
            id: 5,
            payload: &[9; 4],
            peer_address: Some("1.2.3.4:5".parse().unwrap()),
        };
        let reply = Holepunch { mode: Mode::Reply, id: 0, payload: &[9; 4], peer_address: None };
        for (name, value) in [("from_client", from_client), ("reply", reply)] {
            let bytes = golden("holepunch", name);
            assert_eq!(hex::encode(value.encode()), hex::encode(&bytes));
            assert_eq!(Holepunch::decode(&bytes), Ok(value));
        }
    }

    #[test]
    fn notes_are_those_of_the_node_package() {
        let full = HolepunchPayload {
            error: 3,
            firewall: Firewall::Consistent,
            round: 4,
            connected: true,
            punching: true,
            addresses: Some(vec!["1.2.3.4:5".parse().unwrap()]),
            remote_address: Some("6.7.8.9:10".parse().unwrap()),
            token: Some([1; 32]),
            remote_token: Some([2; 32]),
        };
        for (name, value) in [("smallest", HolepunchPayload::default()), ("full", full)] {
            let bytes = golden("holepunch_payload", name);
            assert_eq!(hex::encode(value.encode()), hex::encode(&bytes));
            assert_eq!(HolepunchPayload::decode(&bytes), Ok(value));
        }
    }

    #[test]
    fn a_note_opens_with_the_secret_it_was_sealed_with_alone() {
        let note = HolepunchPayload { round: 3, punching: true, ..HolepunchPayload::default() };
        let sealed = note.seal(&[1; 32]);
        assert_eq!(HolepunchPayload::open(&sealed, &[1; 32]), Some(note));
        assert_eq!(HolepunchPayload::open(&sealed, &[2; 32]), None);
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Holepunch::decode(&bytes);
            let _ = HolepunchPayload::decode(&bytes);
        }
    }
}

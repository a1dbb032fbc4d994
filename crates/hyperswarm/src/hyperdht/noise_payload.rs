//! The payload of the Noise handshake messages: how to reach the sender, and on which UDX stream.

use std::net::{SocketAddrV4, SocketAddrV6};

use crate::compact_encoding::{DecodeError, Decoder, Encoder};
use crate::crypto::PublicKey;

/// The maximum number of addresses read from one list. The Node package lists every interface of its host.
pub(super) const ADDRESSES_MAX: usize = 256;

const VERSION: u64 = 1;

const HOLEPUNCH: u64 = 1;
const ADDRESSES4: u64 = 2;
const ADDRESSES6: u64 = 4;
const UDX: u64 = 8;
const SECRET_STREAM: u64 = 16;
const RELAY_THROUGH: u64 = 32;
const RELAY_ADDRESSES: u64 = 64;

/// What a peer knows about its own firewall.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Firewall {
    /// Not known yet.
    #[default]
    Unknown,
    /// Anyone can send to the peer.
    Open,
    /// Every destination sees the peer at the same address.
    Consistent,
    /// Every destination sees the peer at a different port.
    Random,
}

impl Firewall {
    pub(super) fn code(self) -> u64 {
        match self {
            Self::Unknown => 0,
            Self::Open => 1,
            Self::Consistent => 2,
            Self::Random => 3,
        }
    }

    pub(super) fn from_code(code: u64) -> Self {
        match code {
            1 => Self::Open,
            2 => Self::Consistent,
            // The Node package also treats an unknown kind as the worst one.
            3.. => Self::Random,
            0 => Self::Unknown,
        }
    }
}

/// Why a server refuses a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The server does not admit this client, or cannot serve it.
    Aborted,
    /// The two speak different versions.
    VersionMismatch,
    /// The server is busy.
    TryLater,
    /// A code that this crate does not know.
    Other(u64),
}

impl Refusal {
    fn code(self) -> u64 {
        match self {
            Self::Aborted => 1,
            Self::VersionMismatch => 2,
            Self::TryLater => 3,
            Self::Other(code) => code,
        }
    }

    fn from_code(code: u64) -> Option<Self> {
        Some(match code {
            0 => return None,
            1 => Self::Aborted,
            2 => Self::VersionMismatch,
            3 => Self::TryLater,
            other => Self::Other(other),
        })
    }
}

/// A relay of the server, and the server's address as that relay sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayInfo {
    /// The relay.
    pub relay_address: SocketAddrV4,
    /// The server's address as the relay sees it.
    pub peer_address: SocketAddrV4,
}

/// How to agree on a hole punch with the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HolepunchInfo {
    /// The server's id of this handshake.
    pub id: u64,
    /// The relays to agree through.
    pub relays: Vec<RelayInfo>,
}

/// The sender's end of the UDX stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdxInfo {
    /// Whether the sender can use its socket for other streams of the same peer.
    pub reusable_socket: bool,
    /// The id of the sender's stream.
    pub id: u32,
    /// The first sequence number. Always zero so far.
    pub seq: u64,
}

/// A third peer that both ends connect to when they find no direct route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayThrough {
    /// The third peer.
    pub public_key: PublicKey,
    /// The token that pairs the two connections at the third peer.
    pub token: [u8; 32],
}

/// The payload of a Noise handshake message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoisePayload {
    /// The sender's version. If it is another one, the rest is not decoded.
    pub version: u64,
    /// Why the sender refuses, if it does.
    pub refusal: Option<Refusal>,
    /// The sender's firewall.
    pub firewall: Firewall,
    /// How to punch a hole, if the sender is firewalled.
    pub holepunch: Option<HolepunchInfo>,
    /// The addresses at which the sender may be reached, best first.
    pub addresses4: Vec<SocketAddrV4>,
    /// The same for IPv6.
    pub addresses6: Vec<SocketAddrV6>,
    /// The sender's stream.
    pub udx: Option<UdxInfo>,
    /// Whether the sender encrypts the stream (secret stream version 1).
    pub secret_stream: bool,
    /// The peer that relays the stream, if the sender wants one.
    pub relay_through: Option<RelayThrough>,
    /// The addresses at which to ask for the sender next time.
    pub relay_addresses: Vec<SocketAddrV4>,
}

impl Default for NoisePayload {
    fn default() -> Self {
        Self {
            version: VERSION,
            refusal: None,
            firewall: Firewall::Unknown,
            holepunch: None,
            addresses4: Vec::new(),
            addresses6: Vec::new(),
            udx: None,
            secret_stream: false,
            relay_through: None,
            relay_addresses: Vec::new(),
        }
    }
}

impl NoisePayload {
    /// Makes a refusal.
    pub fn refusal(refusal: Refusal) -> Self {
        Self { refusal: Some(refusal), ..Self::default() }
    }

    /// Returns whether this crate understands the sender's version.
    pub fn is_compatible(&self) -> bool {
        self.version == VERSION
    }

    /// Decodes a payload.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        let version = decoder.uint()?;
        if version != VERSION {
            return Ok(Self { version, ..Self::default() });
        }
        let flags = decoder.uint()?;
        let has = |flag| flags & flag != 0;
        Ok(Self {
            version,
            refusal: Refusal::from_code(decoder.uint()?),
            firewall: Firewall::from_code(decoder.uint()?),
            holepunch: has(HOLEPUNCH).then(|| decode_holepunch(&mut decoder)).transpose()?,
            addresses4: if has(ADDRESSES4) { decoder.array(ADDRESSES_MAX, Decoder::ipv4)? } else { Vec::new() },
            addresses6: if has(ADDRESSES6) { decoder.array(ADDRESSES_MAX, Decoder::ipv6)? } else { Vec::new() },
            udx: has(UDX).then(|| decode_udx(&mut decoder)).transpose()?,
            secret_stream: has(SECRET_STREAM).then(|| decoder.uint()).transpose()?.is_some(),
            relay_through: has(RELAY_THROUGH).then(|| decode_relay_through(&mut decoder)).transpose()?,
            relay_addresses: if has(RELAY_ADDRESSES) {
                decoder.array(ADDRESSES_MAX, Decoder::ipv4)?
            } else {
                Vec::new()
            },
        })
    }

    /// Encodes the payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut flags = 0;
        for (set, flag) in [
            (self.holepunch.is_some(), HOLEPUNCH),
            (!self.addresses4.is_empty(), ADDRESSES4),
            (!self.addresses6.is_empty(), ADDRESSES6),
            (self.udx.is_some(), UDX),
            (self.secret_stream, SECRET_STREAM),
            (self.relay_through.is_some(), RELAY_THROUGH),
            (!self.relay_addresses.is_empty(), RELAY_ADDRESSES),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let mut bytes = Vec::with_capacity(128);
        bytes.write_uint(self.version);
        bytes.write_uint(flags);
        bytes.write_uint(self.refusal.map_or(0, Refusal::code));
        bytes.write_uint(self.firewall.code());
        if let Some(holepunch) = &self.holepunch {
            bytes.write_uint(holepunch.id);
            bytes.write_array(&holepunch.relays, |bytes, relay| {
                bytes.write_ipv4(relay.relay_address);
                bytes.write_ipv4(relay.peer_address);
            });
        }
        if !self.addresses4.is_empty() {
            bytes.write_array(&self.addresses4, |bytes, address| bytes.write_ipv4(*address));
        }
        if !self.addresses6.is_empty() {
            bytes.write_array(&self.addresses6, |bytes, address| bytes.write_ipv6(*address));
        }
        if let Some(udx) = &self.udx {
            bytes.write_uint(1);
            bytes.write_uint(udx.reusable_socket.into());
            bytes.write_uint(udx.id.into());
            bytes.write_uint(udx.seq);
        }
        if self.secret_stream {
            bytes.write_uint(1);
        }
        if let Some(relay) = &self.relay_through {
            bytes.write_uint(1);
            bytes.write_uint(0);
            bytes.write_raw(relay.public_key.as_bytes());
            bytes.write_raw(&relay.token);
        }
        if !self.relay_addresses.is_empty() {
            bytes.write_array(&self.relay_addresses, |bytes, address| bytes.write_ipv4(*address));
        }
        bytes
    }
}

fn decode_holepunch(decoder: &mut Decoder<'_>) -> Result<HolepunchInfo, DecodeError> {
    let id = decoder.uint()?;
    let relays = decoder
        .array(ADDRESSES_MAX, |relay| Ok(RelayInfo { relay_address: relay.ipv4()?, peer_address: relay.ipv4()? }))?;
    Ok(HolepunchInfo { id, relays })
}

fn decode_udx(decoder: &mut Decoder<'_>) -> Result<UdxInfo, DecodeError> {
    let _version = decoder.uint()?;
    let features = decoder.uint()?;
    let id = u32::try_from(decoder.uint()?).map_err(|_| DecodeError::Invalid("the stream id is too large"))?;
    Ok(UdxInfo { reusable_socket: features & 1 != 0, id, seq: decoder.uint()? })
}

fn decode_relay_through(decoder: &mut Decoder<'_>) -> Result<RelayThrough, DecodeError> {
    let _version = decoder.uint()?;
    let _flags = decoder.uint()?;
    Ok(RelayThrough { public_key: PublicKey(decoder.fixed()?), token: decoder.fixed()? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hyperdht::golden::golden;

    fn address(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    fn client() -> NoisePayload {
        NoisePayload {
            firewall: Firewall::Open,
            addresses4: vec![address("127.0.0.1:49737")],
            udx: Some(UdxInfo { reusable_socket: false, id: 0x1234_5678, seq: 0 }),
            secret_stream: true,
            ..NoisePayload::default()
        }
    }

    #[test]
    fn payloads_are_those_of_the_node_package() {
        let relay = |relay, peer| RelayInfo { relay_address: address(relay), peer_address: address(peer) };
        let full = NoisePayload {
            refusal: Some(Refusal::TryLater),
            firewall: Firewall::Consistent,
            holepunch: Some(HolepunchInfo {
                id: 300,
                relays: vec![relay("1.2.3.4:5", "6.7.8.9:10"), relay("11.12.13.14:15", "16.17.18.19:20")],
            }),
            addresses4: vec![address("127.0.0.1:49737"), address("10.0.0.1:1")],
            addresses6: vec!["[2001:db8::1]:443".parse().unwrap()],
            udx: Some(UdxInfo { reusable_socket: true, id: u32::MAX, seq: 7 }),
            secret_stream: true,
            relay_through: Some(RelayThrough { public_key: PublicKey([1; 32]), token: [2; 32] }),
            relay_addresses: vec![address("1.1.1.1:65535")],
            ..NoisePayload::default()
        };
        let smallest = NoisePayload::refusal(Refusal::Aborted);
        for (name, value) in [("smallest", smallest), ("client", client()), ("full", full)] {
            let bytes = golden("noise_payload", name);
            assert_eq!(hex::encode(value.encode()), hex::encode(&bytes));
            assert_eq!(NoisePayload::decode(&bytes), Ok(value));
        }
    }

    #[test]
    fn of_another_version_nothing_but_the_version_is_read() {
        let payload = NoisePayload::decode(&[2, 255, 255]).unwrap();
        assert!(!payload.is_compatible());
        assert_eq!(payload.udx, None);
    }

    #[test]
    fn a_payload_cut_short_is_refused() {
        let bytes = client().encode();
        for length in 0..bytes.len() {
            assert!(NoisePayload::decode(&bytes[..length]).is_err(), "cut at {length}");
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>) {
            if let Ok(payload) = NoisePayload::decode(&bytes) {
                let _ = payload.encode();
            }
        }
    }
}

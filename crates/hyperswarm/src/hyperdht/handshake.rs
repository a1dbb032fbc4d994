//! The value of a PEER_HANDSHAKE request: a Noise message between a client and a server, direct or through relays.

use std::net::SocketAddrV4;

use crate::compact_encoding::{DecodeError, Decoder, Encoder};

const PEER_ADDRESS: u64 = 1;
const RELAY_ADDRESS: u64 = 2;

/// Who sent a message, which determines how its receiver handles it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// From the client, to a relay or to the server itself.
    FromClient,
    /// From the server, back to the relay that asked.
    FromServer,
    /// From the client's relay, to the server or to the server's relay.
    FromRelay,
    /// From the server's relay to the server, when the client used another relay.
    FromSecondRelay,
    /// To the client.
    Reply,
}

impl Mode {
    pub(crate) fn code(self) -> u64 {
        match self {
            Self::FromClient => 0,
            Self::FromServer => 1,
            Self::FromRelay => 2,
            Self::FromSecondRelay => 3,
            Self::Reply => 4,
        }
    }

    pub(crate) fn from_code(code: u64) -> Result<Self, DecodeError> {
        Ok(match code {
            0 => Self::FromClient,
            1 => Self::FromServer,
            2 => Self::FromRelay,
            3 => Self::FromSecondRelay,
            4 => Self::Reply,
            _ => return Err(DecodeError::Invalid("the mode is unknown")),
        })
    }
}

/// The value of a PEER_HANDSHAKE request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake<'a> {
    /// Who sent it.
    pub mode: Mode,
    /// The Noise message, which only the two ends can decrypt.
    pub noise: &'a [u8],
    /// The address of the end that the receiver does not see: the client's for a server, the server's for a client.
    pub peer_address: Option<SocketAddrV4>,
    /// The client's relay, if it is not the server's.
    pub relay_address: Option<SocketAddrV4>,
}

impl<'a> Handshake<'a> {
    /// Decodes a value.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        let flags = decoder.uint()?;
        Ok(Self {
            mode: Mode::from_code(decoder.uint()?)?,
            noise: decoder.buffer()?,
            peer_address: (flags & PEER_ADDRESS != 0).then(|| decoder.ipv4()).transpose()?,
            relay_address: (flags & RELAY_ADDRESS != 0).then(|| decoder.ipv4()).transpose()?,
        })
    }

    /// Encodes the value.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.noise.len() + 24);
        let peer = self.peer_address.map_or(0, |_| PEER_ADDRESS);
        let relay = self.relay_address.map_or(0, |_| RELAY_ADDRESS);
        bytes.write_uint(peer | relay);
        bytes.write_uint(self.mode.code());
        bytes.write_buffer(self.noise);
        for address in [self.peer_address, self.relay_address].into_iter().flatten() {
            bytes.write_ipv4(address);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hyperdht::golden::golden;

    #[test]
    fn values_are_those_of_the_node_package() {
        let from_client = Handshake { mode: Mode::FromClient, noise: &[7; 3], peer_address: None, relay_address: None };
        let from_second_relay = Handshake {
            mode: Mode::FromSecondRelay,
            noise: &[7; 300],
            peer_address: Some("1.2.3.4:5".parse().unwrap()),
            relay_address: Some("6.7.8.9:10".parse().unwrap()),
        };
        for (name, value) in [("from_client", from_client), ("from_second_relay", from_second_relay)] {
            let bytes = golden("handshake", name);
            assert_eq!(hex::encode(value.encode()), hex::encode(&bytes));
            assert_eq!(Handshake::decode(&bytes), Ok(value));
        }
    }

    #[test]
    fn an_unknown_mode_is_refused() {
        assert!(Handshake::decode(&[0, 5, 0]).is_err());
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Handshake::decode(&bytes);
        }
    }
}

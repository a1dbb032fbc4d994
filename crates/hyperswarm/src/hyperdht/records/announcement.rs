//! Wire format of announcements and of lookup replies.

use std::net::SocketAddrV4;

use crate::compact_encoding::{DecodeError, Decoder, Encoder};
use crate::crypto::{KeyPair, PublicKey, hash, namespace};
use crate::dht_rpc::{Id, Token};
use crate::hyperdht::commands::{ANNOUNCE, UNANNOUNCE};

/// No honest announcement has more relays than this. Nodes store three.
const RELAYS_MAX: usize = 32;

/// No honest response has more peers than this. Nodes send twenty.
const PEERS_MAX: usize = 64;

/// A peer that announced itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The peer's public key.
    pub public_key: PublicKey,
    /// Nodes that know a route to it.
    pub relay_addresses: Vec<SocketAddrV4>,
}

impl Peer {
    /// Decodes the record of a peer.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::read(&mut Decoder::new(bytes))
    }

    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(33 + 6 * self.relay_addresses.len());
        self.write(&mut bytes);
        bytes
    }

    fn read(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let public_key = PublicKey(decoder.fixed()?);
        Ok(Self { public_key, relay_addresses: decoder.array(RELAYS_MAX, Decoder::ipv4)? })
    }

    fn write(&self, out: &mut impl Encoder) {
        out.write_raw(self.public_key.as_bytes());
        out.write_array(&self.relay_addresses, |out, address| out.write_ipv4(*address));
    }
}

/// What an announcement's signature is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To announce a peer.
    Announce,
    /// To remove an announcement.
    Unannounce,
}

/// What a signature is bound to: one node, for as long as its token is valid.
#[derive(Debug, Clone, Copy)]
pub struct Audience<'a> {
    /// The target under which the peer is announced.
    pub target: &'a Id,
    /// The id of the node that stores the announcement.
    pub node: &'a Id,
    /// The token that the node issued.
    pub token: &'a Token,
}

/// The value of an ANNOUNCE or UNANNOUNCE request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// The announced peer. `None` if an earlier announcement is only renewed.
    pub peer: Option<Peer>,
    /// The next link of a hash chain. A sender that reveals its preimage may renew the announcement.
    pub refresh: Option<[u8; 32]>,
    /// The peer's signature.
    pub signature: Option<[u8; 64]>,
    /// When the peer last asked to be noticed again. Not signed.
    pub bump: u64,
}

impl Announcement {
    /// Makes and signs an announcement, or its removal.
    pub fn sign(purpose: Purpose, peer: Peer, audience: Audience<'_>, key_pair: &KeyPair) -> Self {
        let signature = key_pair.sign(&signable(purpose, &peer, None, audience));
        Self { peer: Some(peer), refresh: None, signature: Some(signature), bump: 0 }
    }

    /// Returns the peer if the announcement has its signature for this purpose and node.
    pub fn verified(&self, purpose: Purpose, audience: Audience<'_>) -> Option<&Peer> {
        let (peer, signature) = (self.peer.as_ref()?, self.signature.as_ref()?);
        let message = signable(purpose, peer, self.refresh.as_ref(), audience);
        peer.public_key.verify(&message, signature).then_some(peer)
    }

    /// Decodes an announcement.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        let flags = decoder.uint()?;
        Ok(Self {
            peer: (flags & 1 != 0).then(|| Peer::read(&mut decoder)).transpose()?,
            refresh: (flags & 2 != 0).then(|| decoder.fixed()).transpose()?,
            signature: (flags & 4 != 0).then(|| decoder.fixed()).transpose()?,
            bump: (flags & 8 != 0).then(|| decoder.uint()).transpose()?.unwrap_or_default(),
        })
    }

    /// Encodes the announcement.
    pub fn encode(&self) -> Vec<u8> {
        let flags = u8::from(self.peer.is_some())
            | u8::from(self.refresh.is_some()) << 1
            | u8::from(self.signature.is_some()) << 2
            | u8::from(self.bump > 0) << 3;
        let mut bytes = Vec::with_capacity(160);
        bytes.write_byte(flags);
        if let Some(peer) = &self.peer {
            peer.write(&mut bytes);
        }
        if let Some(refresh) = &self.refresh {
            bytes.write_raw(refresh);
        }
        if let Some(signature) = &self.signature {
            bytes.write_raw(signature);
        }
        if self.bump > 0 {
            bytes.write_uint(self.bump);
        }
        bytes
    }
}

/// The response to a LOOKUP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LookupReply {
    /// The peers that announced the topic.
    pub peers: Vec<Peer>,
    /// When one of them last asked to be noticed again.
    pub bump: u64,
}

impl LookupReply {
    /// Decodes a response.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        let peers = decoder.array(PEERS_MAX, Peer::read)?;
        Ok(Self { peers, bump: if decoder.is_empty() { 0 } else { decoder.uint()? } })
    }

    /// Encodes a response with these peers, whose records are encoded already.
    pub fn encode(records: &[impl AsRef<[u8]>], bump: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(10 + records.iter().map(|record| record.as_ref().len()).sum::<usize>());
        bytes.write_array(records, |out, record| out.write_raw(record.as_ref()));
        bytes.write_uint(bump);
        bytes
    }
}

fn signable(purpose: Purpose, peer: &Peer, refresh: Option<&[u8; 32]>, audience: Audience<'_>) -> [u8; 64] {
    let command = match purpose {
        Purpose::Announce => ANNOUNCE,
        Purpose::Unannounce => UNANNOUNCE,
    };
    let refresh = refresh.map_or(&[][..], |refresh| refresh);
    let mut message = [0; 64];
    message[..32].copy_from_slice(&namespace("hyperswarm/dht", command as u8));
    message[32..].copy_from_slice(&hash(&[audience.target, audience.node, audience.token, &peer.encode(), refresh]));
    message
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const AUDIENCE: Audience<'static> = Audience { target: &[5; 32], node: &[9; 32], token: &[7; 32] };

    fn key_pair() -> KeyPair {
        KeyPair::from_seed(&[1; 32])
    }

    fn peer() -> Peer {
        let relay_addresses = vec!["10.0.0.1:1".parse().unwrap(), "10.0.0.2:65535".parse().unwrap()];
        Peer { public_key: key_pair().public_key(), relay_addresses }
    }

    const PEER: &str = "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c020a00000101000a000002ffff";

    #[test]
    fn announcements_are_those_of_the_node_package() {
        let announced = Announcement::sign(Purpose::Announce, peer(), AUDIENCE, &key_pair());
        assert_eq!(
            hex::encode(announced.encode()),
            format!(
                "05{PEER}78fba468b5155499d961f48134a0078d0c00889efb2c28f68c06ccd964259266ff933f128510d0104a5dbf6961a526\
                 375674020d3ff3c2c6a6fcadd628527601"
            )
        );
        let no_relays = Peer { relay_addresses: Vec::new(), ..peer() };
        let taken_back = Announcement::sign(Purpose::Unannounce, no_relays, AUDIENCE, &key_pair());
        assert_eq!(
            hex::encode(taken_back.encode()),
            format!(
                "05{}0056246baa7d67b9a7c4e08b66f3595760b183c2d28128cda4568b3a66ead3c3b445994b00be221ba6749b24bde5db3bc7\
                 bd8dfd3d8a4c56a00d07d2fe74d01709",
                &PEER[..64]
            )
        );
    }

    #[test]
    fn a_signature_holds_for_one_purpose_node_and_chain() {
        let bytes = hex::decode(format!(
            "0f{PEER}{}496f85324afd0acbd32a5708bf402389bddb7e4f7eed376d5bb131345c785de23d223c84e90178403032395340c32f66fd\
             4942309da9a60233d36a598af0b800fde803",
            "06".repeat(32)
        ))
        .unwrap();
        let announcement = Announcement::decode(&bytes).unwrap();
        assert_eq!((announcement.refresh, announcement.bump), (Some([6; 32]), 1_000));
        assert_eq!(announcement.encode(), bytes);
        assert_eq!(announcement.verified(Purpose::Announce, AUDIENCE), Some(&peer()));
        assert_eq!(announcement.verified(Purpose::Unannounce, AUDIENCE), None);
        assert_eq!(announcement.verified(Purpose::Announce, Audience { node: &[8; 32], ..AUDIENCE }), None);
        assert_eq!(announcement.verified(Purpose::Announce, Audience { token: &[8; 32], ..AUDIENCE }), None);
        let other_chain = Announcement { refresh: None, ..announcement };
        assert_eq!(other_chain.verified(Purpose::Announce, AUDIENCE), None);
    }

    #[test]
    fn lookup_replies_are_those_of_the_node_package() {
        let other = Peer { public_key: KeyPair::from_seed(&[2; 32]).public_key(), relay_addresses: Vec::new() };
        let bytes = LookupReply::encode(&[peer().encode(), other.encode()], 0);
        assert_eq!(
            hex::encode(&bytes),
            format!("02{PEER}8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b3940000")
        );
        assert_eq!(LookupReply::decode(&bytes), Ok(LookupReply { peers: vec![peer(), other], bump: 0 }));
        assert!(LookupReply::decode(&bytes[..bytes.len() - 1]).is_ok(), "older nodes send no bump");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            key: [u8; 32],
            relays in vec((any::<u32>(), any::<u16>()), 0..8),
            with_peer: bool,
            refresh: Option<[u8; 32]>,
            bump in 0_u64..1 << 53,
        ) {
            let relay_addresses = relays.into_iter().map(|(ip, port)| SocketAddrV4::new(ip.into(), port)).collect();
            let peer = with_peer.then_some(Peer { public_key: PublicKey(key), relay_addresses });
            let signature = with_peer.then_some([3; 64]);
            let announcement = Announcement { peer, refresh, signature, bump };
            prop_assert_eq!(Announcement::decode(&announcement.encode()), Ok(announcement));
        }

        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Announcement::decode(&bytes);
            let _ = LookupReply::decode(&bytes);
            let _ = Peer::decode(&bytes);
        }
    }
}

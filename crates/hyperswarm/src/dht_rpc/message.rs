//! Wire format of `dht-rpc` version 3: a datagram is a request or a response.

use std::net::SocketAddrV4;

use crate::compact_encoding::{DecodeError, Decoder, Encoder};
use crate::crypto::hash;

/// A position in the DHT: the hash of a node's address, or the target of a request.
pub type Id = [u8; 32];

/// A token that a node issues to an address, and requires before it stores anything for that address.
pub type Token = [u8; 32];

/// Error code: the node does not know the command.
pub const UNKNOWN_COMMAND: u64 = 1;
/// Error code: the node did not issue the token to this address, or it has expired.
pub const INVALID_TOKEN: u64 = 2;

/// Asks for a response.
pub(crate) const PING: u64 = 0;
/// Asks for a response to another port of the same host.
pub(crate) const PING_NAT: u64 = 1;
/// Asks for the nodes closest to a target.
pub(crate) const FIND_NODE: u64 = 2;
/// Reports to a node that another node, which it returned, does not respond.
pub(crate) const DOWN_HINT: u64 = 3;
/// Asks for a response after a delay.
pub(crate) const DELAYED_PING: u64 = 4;

const REQUEST: u8 = 0x03;
const RESPONSE: u8 = 0x13;

/// No honest response has more nodes than this (a row of the routing table holds 20).
const CLOSER_NODES_MAX: usize = 64;

/// Returns the id of the node at an address. Deriving ids from addresses makes them hard to choose.
pub fn node_id(address: SocketAddrV4) -> Id {
    let mut bytes = [0; 6];
    bytes[..4].copy_from_slice(&address.ip().octets());
    bytes[4..].copy_from_slice(&address.port().to_le_bytes());
    hash(&[&bytes])
}

/// A datagram of either kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// A request.
    Request(Request<'a>),
    /// A response.
    Response(Response<'a>),
}

impl<'a> Message<'a> {
    /// Decodes a datagram. Bytes after the message are ignored, as in the Node package.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        match decoder.u8()? {
            REQUEST => Request::decode(&mut decoder).map(Self::Request),
            RESPONSE => Response::decode(&mut decoder).map(Self::Response),
            _ => Err(DecodeError::Invalid("neither a request nor a response of version 3")),
        }
    }
}

/// A request as it is on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request<'a> {
    /// The transaction id, which ties the response to the request.
    pub tid: u16,
    /// The receiver's address, from which the receiver learns its own.
    pub to: SocketAddrV4,
    /// The sender's id, if the sender is persistent.
    pub id: Option<Id>,
    /// The token that the receiver issued to the sender before.
    pub token: Option<Token>,
    /// Whether the command is one of `dht-rpc` itself.
    pub internal: bool,
    /// The command.
    pub command: u64,
    /// What the command is about.
    pub target: Option<Id>,
    /// The value, in the command's format.
    pub value: Option<&'a [u8]>,
}

impl<'a> Request<'a> {
    fn decode(decoder: &mut Decoder<'a>) -> Result<Self, DecodeError> {
        let flags = decoder.uint()?;
        Ok(Self {
            tid: decoder.u16()?,
            to: decoder.ipv4()?,
            id: when(flags & 1, || decoder.fixed())?,
            token: when(flags & 2, || decoder.fixed())?,
            internal: flags & 4 != 0,
            command: decoder.uint()?,
            target: when(flags & 8, || decoder.fixed())?,
            value: when(flags & 16, || decoder.buffer())?,
        })
    }

    /// Appends the encoded datagram.
    pub fn encode(&self, out: &mut impl Encoder) {
        let flags = flag(self.id.is_some(), 1)
            | flag(self.token.is_some(), 2)
            | flag(self.internal, 4)
            | flag(self.target.is_some(), 8)
            | flag(self.value.is_some(), 16);
        out.write_raw(&[REQUEST, flags]);
        out.write_uint16(self.tid);
        out.write_ipv4(self.to);
        self.id.iter().for_each(|id| out.write_raw(id));
        self.token.iter().for_each(|token| out.write_raw(token));
        out.write_uint(self.command);
        self.target.iter().for_each(|target| out.write_raw(target));
        self.value.iter().for_each(|value| out.write_buffer(value));
    }
}

/// A response as it is on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response<'a> {
    /// The transaction id of the request.
    pub tid: u16,
    /// The address of the node that asked, as the sender sees it.
    pub to: SocketAddrV4,
    /// The sender's id, if the sender is persistent.
    pub id: Option<Id>,
    /// The token to send back with a request to store something.
    pub token: Option<Token>,
    /// Nodes closer to the target. Also empty if the response has no list of nodes.
    pub closer_nodes: Vec<SocketAddrV4>,
    /// The error code, or 0.
    pub error: u64,
    /// The value, in the command's format.
    pub value: Option<&'a [u8]>,
}

impl<'a> Response<'a> {
    fn decode(decoder: &mut Decoder<'a>) -> Result<Self, DecodeError> {
        let flags = decoder.uint()?;
        Ok(Self {
            tid: decoder.u16()?,
            to: decoder.ipv4()?,
            id: when(flags & 1, || decoder.fixed())?,
            token: when(flags & 2, || decoder.fixed())?,
            closer_nodes: when(flags & 4, || decoder.array(CLOSER_NODES_MAX, Decoder::ipv4))?.unwrap_or_default(),
            error: when(flags & 8, || decoder.uint())?.unwrap_or_default(),
            value: when(flags & 16, || decoder.buffer())?,
        })
    }

    /// Appends the encoded datagram.
    pub fn encode(&self, out: &mut impl Encoder) {
        let flags = flag(self.id.is_some(), 1)
            | flag(self.token.is_some(), 2)
            | flag(!self.closer_nodes.is_empty(), 4)
            | flag(self.error > 0, 8)
            | flag(self.value.is_some(), 16);
        out.write_raw(&[RESPONSE, flags]);
        out.write_uint16(self.tid);
        out.write_ipv4(self.to);
        self.id.iter().for_each(|id| out.write_raw(id));
        self.token.iter().for_each(|token| out.write_raw(token));
        if !self.closer_nodes.is_empty() {
            out.write_uint(self.closer_nodes.len() as u64);
            self.closer_nodes.iter().for_each(|node| out.write_ipv4(*node));
        }
        if self.error > 0 {
            out.write_uint(self.error);
        }
        self.value.iter().for_each(|value| out.write_buffer(value));
    }
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

fn when<T>(flag: u64, read: impl FnOnce() -> Result<T, DecodeError>) -> Result<Option<T>, DecodeError> {
    if flag == 0 { Ok(None) } else { read().map(Some) }
}

#[cfg(test)]
mod tests;

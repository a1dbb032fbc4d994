//! The datagrams of `dht-rpc`: a request or a response, version 3.

use std::net::SocketAddrV4;

use crate::compact_encoding::{DecodeError, Decoder, Encoder};
use crate::crypto::hash;

/// A place in the table: the hash of a node's address, or what a request looks for.
pub type Id = [u8; 32];

/// What a node gave to an address, and expects back before it stores anything for it.
pub type Token = [u8; 32];

/// The request names no command that the node knows.
pub const UNKNOWN_COMMAND: u64 = 1;
/// The token is not (or no longer) one that the node gave to this address.
pub const INVALID_TOKEN: u64 = 2;

/// Asks for a sign of life.
pub(crate) const PING: u64 = 0;
/// Asks for a sign of life at another port of the same host.
pub(crate) const PING_NAT: u64 = 1;
/// Asks for the nodes closest to a target.
pub(crate) const FIND_NODE: u64 = 2;
/// Tells a node that one it named does not answer.
pub(crate) const DOWN_HINT: u64 = 3;
/// Asks for a sign of life after a while.
pub(crate) const DELAYED_PING: u64 = 4;

const REQUEST: u8 = 0x03;
const RESPONSE: u8 = 0x13;

/// More nodes than this are in no honest response (a table row holds 20).
const CLOSER_NODES_MAX: usize = 64;

/// Returns the id of the node at an address: what makes ids hard to choose.
pub fn node_id(address: SocketAddrV4) -> Id {
    let mut bytes = [0; 6];
    bytes[..4].copy_from_slice(&address.ip().octets());
    bytes[4..].copy_from_slice(&address.port().to_le_bytes());
    hash(&[&bytes])
}

/// A datagram of either kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// Asks.
    Request(Request<'a>),
    /// Answers.
    Response(Response<'a>),
}

impl<'a> Message<'a> {
    /// Reads a datagram. What follows the message is ignored, as the Node package does.
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
    /// Ties the response to the request.
    pub tid: u16,
    /// Whom the sender sends to: how the receiver learns its own address.
    pub to: SocketAddrV4,
    /// The sender's id, where it is a lasting part of the table.
    pub id: Option<Id>,
    /// What the receiver gave to the sender before.
    pub token: Option<Token>,
    /// Whether the command is one of the table's own.
    pub internal: bool,
    /// What to do.
    pub command: u64,
    /// What it is about.
    pub target: Option<Id>,
    /// The rest, as the command wants it.
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

    /// Appends the datagram.
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
    /// The request's.
    pub tid: u16,
    /// The asker's address as the sender sees it.
    pub to: SocketAddrV4,
    /// The sender's id, where it is a lasting part of the table.
    pub id: Option<Id>,
    /// What to send back before anything is stored.
    pub token: Option<Token>,
    /// Nodes closer to the target. Empty as well where none were sent.
    pub closer_nodes: Vec<SocketAddrV4>,
    /// Why the request was refused, or 0.
    pub error: u64,
    /// The rest, as the command wants it.
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

    /// Appends the datagram.
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

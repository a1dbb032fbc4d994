//! Reads and writes the records that nodes store for others: peer announcements, and mutable and immutable values.

mod announcement;
mod mutable_value;

use std::net::SocketAddrV4;

use bytes::Bytes;
use futures_util::future::join_all;

pub use self::announcement::{Announcement, Audience, LookupReply, Peer, Purpose};
pub use self::mutable_value::MutableValue;
use super::commands::{
    ANNOUNCE, FIND_PEER, IMMUTABLE_GET, IMMUTABLE_PUT, LOOKUP, MUTABLE_GET, MUTABLE_PUT, UNANNOUNCE,
};
use super::persistent::{PEERS_MAX, VALUE_LENGTH_MAX};
use crate::compact_encoding::Encoder;
use crate::crypto::{KeyPair, PublicKey, hash};
use crate::dht_rpc::{Call, DhtReply, DhtRpc, INVALID_TOKEN, Id, Query, QueryStream, Token};

/// Error code: another value is stored under the same sequence number.
pub const SEQ_REUSED: u64 = 16;
/// Error code: a value with a higher sequence number is stored.
pub const SEQ_TOO_LOW: u64 = 17;

/// Why nothing was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No node that could store it responded.
    #[error("no node took it")]
    NoNodes,
    /// Another value is stored under the same sequence number.
    #[error("the number stands for another value")]
    NumberReused,
    /// A value with a higher sequence number is stored.
    #[error("a value with a higher number is stored")]
    NumberTooLow,
    /// The value exceeds the length that nodes store.
    #[error("the value is longer than {VALUE_LENGTH_MAX} bytes")]
    TooLong,
}

/// A peer, and a node that knows a route to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundPeer {
    /// The peer as it announced itself.
    pub peer: Peer,
    /// The node that knows the route.
    pub from: SocketAddrV4,
    /// This node's address as that node sees it.
    pub to: SocketAddrV4,
}

/// Peers that announced a topic, and a node that stores their announcements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundTopic {
    /// The peers: at most 20, chosen at random if there are more.
    pub peers: Vec<Peer>,
    /// The node that stores the announcements.
    pub from: SocketAddrV4,
    /// This node's address as that node sees it.
    pub to: SocketAddrV4,
}

/// A stream of the nodes that know a route to a peer.
pub struct FindPeer {
    query: QueryStream,
}

impl FindPeer {
    /// Waits for the next node that knows the peer. Cancel safe.
    pub async fn next(&mut self) -> Option<FoundPeer> {
        loop {
            let reply = self.query.next().await?;
            if let Some(peer) = reply.value.as_deref().and_then(|value| Peer::decode(value).ok()) {
                return Some(FoundPeer { peer, from: reply.from, to: reply.to });
            }
        }
    }
}

/// A stream of the nodes that know peers of a topic.
pub struct Lookup {
    query: QueryStream,
}

impl Lookup {
    /// Waits for the next node that knows at least one peer. Cancel safe.
    pub async fn next(&mut self) -> Option<FoundTopic> {
        loop {
            let reply = self.query.next().await?;
            if let Some(found) = reply.value.as_deref().and_then(|value| LookupReply::decode(value).ok()) {
                return Some(FoundTopic { peers: found.peers, from: reply.from, to: reply.to });
            }
        }
    }
}

/// Searches for the nodes that know a route to a server. `nodes` are asked first.
pub fn find_peer(dht: &DhtRpc, public_key: &PublicKey, nodes: Vec<SocketAddrV4>) -> FindPeer {
    let target = hash(&[public_key.as_bytes()]);
    FindPeer { query: dht.query(Query::new(target, FIND_PEER).starting_at(nodes)) }
}

/// Searches for the peers that announced a topic. `nodes` are asked first.
pub fn lookup(dht: &DhtRpc, topic: Id, nodes: Vec<SocketAddrV4>) -> Lookup {
    Lookup { query: dht.query(Query::new(topic, LOOKUP).starting_at(nodes)) }
}

/// Announces a peer under a topic. Returns the nodes that store the announcement, which they do for about twenty
/// minutes.
pub async fn announce(
    dht: &DhtRpc,
    topic: Id,
    key_pair: &KeyPair,
    relay_addresses: &[SocketAddrV4],
    nodes: Vec<SocketAddrV4>,
) -> Result<Vec<SocketAddrV4>, StoreError> {
    let closest = dht.query(Query::new(topic, LOOKUP).starting_at(nodes)).closest().await;
    let peer = Peer { public_key: key_pair.public_key(), relay_addresses: relay_addresses.to_vec() };
    let kept = join_all(closest.iter().map(|reply| announce_to(dht, topic, key_pair, &peer, reply))).await;
    let nodes: Vec<_> = kept.into_iter().flatten().map(|reply| reply.from).collect();
    if nodes.is_empty() { Err(StoreError::NoNodes) } else { Ok(nodes) }
}

/// Removes an announcement from every node that has it. Returns how many nodes confirmed.
pub async fn unannounce(dht: &DhtRpc, topic: Id, key_pair: &KeyPair) -> usize {
    let mut query = dht.query(Query::new(topic, LOOKUP));
    let mut holders = Vec::new();
    while let Some(reply) = query.next().await {
        let found = reply.value.as_deref().and_then(|value| LookupReply::decode(value).ok());
        // A full response may omit this peer by chance, so its sender is asked as well.
        let names = |peers: &[Peer]| {
            peers.len() >= PEERS_MAX || peers.iter().any(|peer| peer.public_key == key_pair.public_key())
        };
        if found.is_some_and(|found| names(&found.peers)) {
            holders.push(reply);
        }
    }
    let confirmed = join_all(holders.iter().map(|reply| unannounce_from(dht, topic, key_pair, reply))).await;
    confirmed.into_iter().flatten().count()
}

/// Announces a peer to a node that responded to a FIND_PEER or LOOKUP. Returns the node's confirmation.
pub(super) async fn announce_to(
    dht: &DhtRpc,
    target: Id,
    key_pair: &KeyPair,
    peer: &Peer,
    reply: &DhtReply,
) -> Option<DhtReply> {
    commit(dht, ANNOUNCE, target, reply, |node, token| {
        let audience = Audience { target: &target, node, token };
        Announcement::sign(Purpose::Announce, peer.clone(), audience, key_pair).encode().into()
    })
    .await
    .filter(|reply| reply.error == 0)
}

/// Removes an announcement from a node that responded to a FIND_PEER or LOOKUP. Returns the node's confirmation.
pub(super) async fn unannounce_from(
    dht: &DhtRpc,
    target: Id,
    key_pair: &KeyPair,
    reply: &DhtReply,
) -> Option<DhtReply> {
    let peer = Peer { public_key: key_pair.public_key(), relay_addresses: Vec::new() };
    commit(dht, UNANNOUNCE, target, reply, |node, token| {
        let audience = Audience { target: &target, node, token };
        Announcement::sign(Purpose::Unannounce, peer.clone(), audience, key_pair).encode().into()
    })
    .await
    .filter(|reply| reply.error == 0)
}

/// Stores a value under its hash, and returns the hash.
pub async fn immutable_put(dht: &DhtRpc, value: Bytes) -> Result<Id, StoreError> {
    if value.len() > VALUE_LENGTH_MAX {
        return Err(StoreError::TooLong);
    }
    let target = hash(&[&value]);
    let closest = dht.query(Query::new(target, IMMUTABLE_GET)).closest().await;
    store(dht, IMMUTABLE_PUT, target, &closest, &value).await.map(|()| target)
}

/// Returns the value with this hash, as soon as one node has it.
pub async fn immutable_get(dht: &DhtRpc, target: Id) -> Option<Bytes> {
    let mut query = dht.query(Query::new(target, IMMUTABLE_GET));
    loop {
        let value = query.next().await?.value;
        if let Some(value) = value.filter(|value| hash(&[value]) == target) {
            return Some(value);
        }
    }
}

/// Stores a value under a key. `seq` must be higher than that of the value it replaces.
pub async fn mutable_put(dht: &DhtRpc, key_pair: &KeyPair, seq: u64, value: Bytes) -> Result<(), StoreError> {
    if value.len() > VALUE_LENGTH_MAX {
        return Err(StoreError::TooLong);
    }
    let public_key = key_pair.public_key();
    let target = hash(&[public_key.as_bytes()]);
    let closest = dht.query(mutable_query(target, 0)).closest().await;
    let put = MutableValue::sign(seq, value, key_pair).encode_put(&public_key);
    store(dht, MUTABLE_PUT, target, &closest, &put.into()).await
}

/// Returns the value under a key whose sequence number is at least `seq_min`: the newest of all responses if
/// `wants_latest`, else the first one found.
pub async fn mutable_get(
    dht: &DhtRpc,
    public_key: &PublicKey,
    seq_min: u64,
    wants_latest: bool,
) -> Option<MutableValue> {
    let mut query = dht.query(mutable_query(hash(&[public_key.as_bytes()]), seq_min));
    let mut latest: Option<MutableValue> = None;
    while let Some(reply) = query.next().await {
        let Some(found) = reply.value.as_deref().and_then(|value| MutableValue::decode(value).ok()) else { continue };
        let is_newer = found.seq >= seq_min && latest.as_ref().is_none_or(|latest| found.seq > latest.seq);
        if is_newer && found.is_of(public_key) {
            latest = Some(found);
            if !wants_latest {
                break;
            }
        }
    }
    latest
}

fn mutable_query(target: Id, seq_min: u64) -> Query {
    let mut value = Vec::with_capacity(9);
    value.write_uint(seq_min);
    Query::new(target, MUTABLE_GET).with_value(value.into())
}

/// Stores the same value at all these nodes. One success is enough.
async fn store(dht: &DhtRpc, command: u64, target: Id, closest: &[DhtReply], value: &Bytes) -> Result<(), StoreError> {
    let puts = closest.iter().map(|reply| commit(dht, command, target, reply, |_, _| value.clone()));
    let answers: Vec<_> = join_all(puts).await.into_iter().flatten().map(|reply| reply.error).collect();
    if answers.contains(&0) {
        Ok(())
    } else if answers.contains(&SEQ_TOO_LOW) {
        Err(StoreError::NumberTooLow)
    } else if answers.contains(&SEQ_REUSED) {
        Err(StoreError::NumberReused)
    } else {
        Err(StoreError::NoNodes)
    }
}

/// Asks a node that issued a token to store something. If the token has expired meanwhile, it is replaced once.
async fn commit(
    dht: &DhtRpc,
    command: u64,
    target: Id,
    reply: &DhtReply,
    value: impl Fn(&Id, &Token) -> Bytes,
) -> Option<DhtReply> {
    let node = reply.from_id?;
    let mut token = reply.token?;
    let mut is_second = false;
    loop {
        let call = Call { command, target: Some(target), token: Some(token), value: Some(value(&node, &token)) };
        let answer = dht.request(call, reply.from).await.ok()?;
        match answer.token {
            Some(fresh) if answer.error == INVALID_TOKEN && !is_second => {
                token = fresh;
                is_second = true;
            }
            _ => return Some(answer),
        }
    }
}

#[cfg(test)]
pub(super) mod tests;

//! Stores records for other nodes and responds to requests for them, on a persistent node.
//!
//! Free of I/O: [`Store::answer`] takes a request and the time, and returns the response.

use std::net::SocketAddrV4;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use self::topics::Topics;
use super::commands::{
    ANNOUNCE, FIND_PEER, IMMUTABLE_GET, IMMUTABLE_PUT, LOOKUP, MUTABLE_GET, MUTABLE_PUT, UNANNOUNCE,
};
use super::records::{Announcement, Audience, LookupReply, MutableValue, Peer, Purpose, SEQ_REUSED, SEQ_TOO_LOW};
use super::router::Router;
use crate::compact_encoding::Decoder;
use crate::crypto::{PublicKey, hash};
use crate::dht_rpc::{AgingMap, DhtRequest, Id, ReplyOptions, Token};

mod topics;

/// How many relay addresses of a peer are stored.
const RELAYS_KEPT: usize = 3;

/// The maximum number of peers in a response.
pub(super) const PEERS_MAX: usize = 20;

/// The maximum length of a stored value. With the fields around it, the response fits in a datagram that no network
/// fragments.
pub const VALUE_LENGTH_MAX: usize = 1_000;

/// How much is stored, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The maximum number of announcements.
    pub announcements_max: usize,
    /// The maximum number of values of each kind.
    pub values_max: usize,
    /// How long an announcement is stored.
    pub announcement_age_max: Duration,
    /// How long a value is stored.
    pub value_age_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            announcements_max: 65_536,
            values_max: 32_768,
            announcement_age_max: Duration::from_mins(20),
            value_age_max: Duration::from_hours(48),
        }
    }
}

/// A request to the store.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The command.
    pub command: u64,
    /// What the command is about.
    pub target: Option<&'a Id>,
    /// The token, already verified.
    pub token: Option<&'a Token>,
    /// The command's value.
    pub value: Option<&'a [u8]>,
    /// The sender's address.
    pub from: SocketAddrV4,
    /// The id of this node.
    pub node: &'a Id,
}

/// A response of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A value, with a token and closer nodes.
    Value(Option<Bytes>),
    /// Confirms the request, without token and closer nodes.
    Done,
    /// An error code.
    Error(u64),
    /// No response, because the request is malformed.
    Silence,
    /// The command is not a storage command.
    UnknownCommand,
}

/// Announcements and values of other nodes.
#[derive(Debug)]
pub struct Store {
    topics: Topics,
    /// Renewable announcements, by the hash of the link that renews them.
    renewals: AgingMap<[u8; 32], Renewal>,
    mutables: AgingMap<Id, Bytes>,
    immutables: AgingMap<Id, Bytes>,
}

#[derive(Debug, Clone)]
struct Renewal {
    target: Id,
    public_key: PublicKey,
    record: Bytes,
}

impl Store {
    /// Makes an empty store. `seed` determines which peers of a full topic are returned.
    pub fn new(limits: Limits, seed: u64) -> Self {
        Self {
            topics: Topics::new(limits.announcements_max, limits.announcement_age_max, seed),
            renewals: AgingMap::new(limits.announcements_max, limits.announcement_age_max),
            mutables: AgingMap::new(limits.values_max, limits.value_age_max),
            immutables: AgingMap::new(limits.values_max, limits.value_age_max),
        }
    }

    /// Responds to a request of another node. Returns `false` if this node is not persistent or does not know the
    /// command.
    pub fn on_request(&mut self, request: &DhtRequest, router: &mut Router, now: Instant) -> bool {
        let Some(node) = &request.local_id else { return false };
        let question = Question {
            command: request.command,
            target: request.target.as_ref(),
            token: request.token.as_ref(),
            value: request.value.as_deref(),
            from: request.from,
            node,
        };
        match self.answer(question, router, now) {
            Answer::Value(value) => request.reply(value.as_deref()),
            Answer::Done => request.reply_with(None, &ReplyOptions::bare()),
            Answer::Error(code) => request.error(code),
            Answer::Silence => {}
            Answer::UnknownCommand => return false,
        }
        true
    }

    /// Decides on the response.
    pub fn answer(&mut self, question: Question<'_>, router: &mut Router, now: Instant) -> Answer {
        let Some(target) = question.target else { return Answer::Silence };
        match question.command {
            FIND_PEER => Answer::Value(router.record(target, now)),
            LOOKUP => self.on_lookup(target, router, now),
            ANNOUNCE => self.on_announce(question, router, now).map_or(Answer::Silence, |()| Answer::Done),
            UNANNOUNCE => self.on_unannounce(question, router).map_or(Answer::Silence, |()| Answer::Done),
            MUTABLE_GET => self.on_mutable_get(target, question.value, now).unwrap_or(Answer::Silence),
            MUTABLE_PUT => self.on_mutable_put(question, now).unwrap_or(Answer::Silence),
            IMMUTABLE_GET => Answer::Value(self.immutables.get(target, now).cloned()),
            IMMUTABLE_PUT => self.on_immutable_put(question, now).unwrap_or(Answer::Silence),
            _ => Answer::UnknownCommand,
        }
    }

    /// Returns the peers that announced a topic here, or a random selection if there are too many.
    pub fn peers(&mut self, topic: &Id, now: Instant) -> Vec<Peer> {
        let records = self.topics.draw(topic, PEERS_MAX, now);
        records.iter().filter_map(|record| Peer::decode(record).ok()).collect()
    }

    /// Removes an announcement that this node made to itself.
    pub fn unannounce(&mut self, target: &Id, public_key: &PublicKey, router: &mut Router) {
        if hash(&[public_key.as_bytes()]) == *target {
            router.forget(target);
        }
        self.topics.remove(target, public_key);
    }

    fn on_lookup(&mut self, target: &Id, router: &Router, now: Instant) -> Answer {
        let mut records = self.topics.draw(target, PEERS_MAX, now);
        if records.len() < PEERS_MAX {
            records.extend(router.record(target, now));
        }
        Answer::Value((!records.is_empty()).then(|| LookupReply::encode(&records, 0).into()))
    }

    fn on_announce(&mut self, question: Question<'_>, router: &mut Router, now: Instant) -> Option<()> {
        let (target, token) = (question.target?, question.token?);
        let announcement = Announcement::decode(question.value?).ok()?;
        if announcement.peer.is_none() {
            return self.renew(&announcement.refresh?, question.from, router, now);
        }
        let audience = Audience { target, node: question.node, token };
        let peer = announcement.verified(Purpose::Announce, audience)?;
        let kept = Peer {
            public_key: peer.public_key,
            relay_addresses: peer.relay_addresses.iter().copied().take(RELAYS_KEPT).collect(),
        };
        let renewal = Renewal { target: *target, public_key: kept.public_key, record: kept.encode().into() };
        self.keep(&renewal, question.from, router, now);
        if let Some(refresh) = announcement.refresh {
            self.renewals.insert(refresh, renewal, now);
        }
        Some(())
    }

    /// Renews an announcement for a sender that reveals the preimage of its last link.
    fn renew(&mut self, link: &[u8; 32], from: SocketAddrV4, router: &mut Router, now: Instant) -> Option<()> {
        let last = hash(&[link]);
        let renewal = self.renewals.get(&last, now)?.clone();
        self.keep(&renewal, from, router, now);
        self.renewals.remove(&last);
        self.renewals.insert(*link, renewal, now);
        Some(())
    }

    fn keep(&mut self, renewal: &Renewal, from: SocketAddrV4, router: &mut Router, now: Instant) {
        let Renewal { target, public_key, record } = renewal;
        // A peer that announces itself under its own key is reached through this node from now on.
        if hash(&[public_key.as_bytes()]) == *target {
            self.topics.remove(target, public_key);
            router.learn(*target, from, record.clone(), now);
            return;
        }
        self.topics.insert(*target, *public_key, record.clone(), *from.ip(), now);
    }

    fn on_unannounce(&mut self, question: Question<'_>, router: &mut Router) -> Option<()> {
        let (target, token) = (question.target?, question.token?);
        let announcement = Announcement::decode(question.value?).ok()?;
        let audience = Audience { target, node: question.node, token };
        let public_key = announcement.verified(Purpose::Unannounce, audience)?.public_key;
        self.unannounce(target, &public_key, router);
        Some(())
    }

    fn on_mutable_get(&self, target: &Id, value: Option<&[u8]>, now: Instant) -> Option<Answer> {
        let wanted = Decoder::new(value?).uint().ok()?;
        let kept = self.mutables.get(target, now);
        let is_new_enough = |kept: &&Bytes| Decoder::new(kept).uint().is_ok_and(|seq| seq >= wanted);
        Some(Answer::Value(kept.filter(is_new_enough).cloned()))
    }

    fn on_mutable_put(&mut self, question: Question<'_>, now: Instant) -> Option<Answer> {
        let (target, _) = (question.target?, question.token?);
        let (public_key, new) = MutableValue::decode_put(question.value?).ok()?;
        let is_valid =
            hash(&[public_key.as_bytes()]) == *target && new.value.len() <= VALUE_LENGTH_MAX && new.is_of(&public_key);
        if !is_valid {
            return None;
        }
        let old = self.mutables.get(target, now).and_then(|old| MutableValue::decode(old).ok());
        if let Some(old) = old {
            if new.seq == old.seq && new.value != old.value {
                return Some(Answer::Error(SEQ_REUSED));
            }
            if new.seq < old.seq {
                return Some(Answer::Error(SEQ_TOO_LOW));
            }
        }
        self.mutables.insert(*target, new.encode().into(), now);
        Some(Answer::Value(None))
    }

    fn on_immutable_put(&mut self, question: Question<'_>, now: Instant) -> Option<Answer> {
        let (target, _, value) = (question.target?, question.token?, question.value?);
        if value.len() > VALUE_LENGTH_MAX || hash(&[value]) != *target {
            return None;
        }
        self.immutables.insert(*target, Bytes::copy_from_slice(value), now);
        Some(Answer::Value(None))
    }
}

#[cfg(test)]
mod tests;

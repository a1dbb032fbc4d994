//! Tracks the channels of a connection: which local id belongs to which remote id. Does no I/O.
//!
//! Each side numbers its own channels from 1. Two channels are paired when both sides open the same protocol and id. An
//! id can be reused once both sides know that its channel is closed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::compact_encoding::{DecodeError, Decoder, Encoder};

/// The id of control messages.
pub(super) const CONTROL: u64 = 0;
pub(super) const BATCH: u8 = 0;
const OPEN: u8 = 1;
const REJECT: u8 = 2;
const CLOSE: u8 = 3;

/// What a pending message costs in addition to its bytes.
pub(super) const MESSAGE_COST_BYTES: usize = 128;
/// The number of events of a batch after which its rest waits until they are handled.
const EVENTS_MAX: usize = 256;
/// The maximum length of a protocol name and of an id that a peer may use.
const NAME_BYTES_MAX: usize = 1024;

/// What identifies a channel. Both sides use the same key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) protocol: String,
    /// Empty if the channel has no id.
    pub(super) id: Vec<u8>,
}

/// This side's handle to a channel.
pub(super) trait Member: Clone {
    /// Prevents further sending. Called before the channel's id becomes free.
    fn shut(&self);
}

/// Events to handle, in this order.
#[derive(Debug)]
pub(super) enum Event<M> {
    /// The peer sent a message.
    Message { member: M, kind: u64, payload: Bytes },
    /// The peer opened its side of a channel.
    Opened { member: M, handshake: Bytes },
    /// The peer closed or refused a channel.
    Closed { member: M },
    /// The peer opened a channel that this side has not opened.
    Asked(Ask),
    /// A control message has to be sent.
    Send(Vec<u8>),
}

/// A channel that the peer opened and that waits to be accepted or rejected.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) remote_id: u64,
    /// Distinguishes channels that used the same id one after the other.
    pub(super) serial: u64,
    pub(super) key: Arc<Key>,
    pub(super) handshake: Bytes,
}

/// How the peer violated the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("a channel was opened with an id that is not free")]
    InvalidOpen,
    #[error("a channel was rejected that does not wait for it")]
    InvalidReject,
    #[error("a batch contains a batch")]
    NestedBatch,
}

/// Why this side cannot open a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    Duplicate,
    TooMany,
}

/// A channel's id, and the open message to send before anything else on the channel.
#[derive(Debug)]
pub(super) struct Announced {
    pub(super) local_id: u64,
    pub(super) message: Vec<u8>,
}

enum Local<M> {
    Free,
    /// The peer has not responded yet. Without a member the channel is closed here, but its id is not free yet.
    Opening {
        key: Arc<Key>,
        member: Option<M>,
    },
    Open {
        key: Arc<Key>,
        remote_id: u64,
        member: M,
    },
}

enum Remote {
    Free,
    Asked { ask: Ask, pending: Vec<(u64, Bytes)>, cost: usize },
    Open { local_id: u64 },
}

/// The channels of one key.
#[derive(Default)]
struct Group {
    /// This side's channels that wait for the peer's.
    opening: VecDeque<u64>,
    /// The peer's channels that wait for this side's.
    asked: VecDeque<u64>,
    /// The number of this side's channels that are not closed.
    members: usize,
}

/// The rest of a batch, and the channel of its next item.
struct Batch {
    items: Bytes,
    remote_id: u64,
}

/// All channels of a connection.
pub(super) struct State<M> {
    local: Vec<Local<M>>,
    free: Vec<u64>,
    remote: Vec<Remote>,
    groups: HashMap<Arc<Key>, Group>,
    events: VecDeque<Event<M>>,
    unread: Option<Batch>,
    channels_max: usize,
    pending_bytes_max: usize,
    asked: usize,
    pending_bytes: usize,
    serial: u64,
}

impl<M: Member> State<M> {
    pub(super) fn new(channels_max: usize, pending_bytes_max: usize) -> Self {
        Self {
            local: Vec::new(),
            free: Vec::new(),
            remote: Vec::new(),
            groups: HashMap::new(),
            events: VecDeque::new(),
            unread: None,
            channels_max,
            pending_bytes_max,
            asked: 0,
            pending_bytes: 0,
            serial: 0,
        }
    }

    /// Changes how many bytes pending channels may hold before nothing more is read.
    pub(super) fn set_pending_bytes_max(&mut self, bytes: usize) {
        self.pending_bytes_max = bytes;
    }

    /// Opens a channel. If the peer has opened it already, the two are paired at once.
    pub(super) fn open(&mut self, key: Key, handshake: &[u8], member: M) -> Result<Announced, Refusal> {
        let key = Arc::new(key);
        let group = self.groups.get(&key);
        if group.is_some_and(|group| group.members > 0) {
            return Err(Refusal::Duplicate);
        }
        match group.and_then(|group| group.asked.front().copied()) {
            Some(remote_id) => self.answer(remote_id, handshake, member),
            None => {
                let local_id = self.claim(Local::Opening { key: Arc::clone(&key), member: Some(member) })?;
                let group = self.groups.entry(Arc::clone(&key)).or_default();
                group.opening.push_back(local_id);
                group.members += 1;
                Ok(Announced { local_id, message: open_message(local_id, &key, handshake) })
            }
        }
    }

    /// Accepts a channel of the peer, unless it is gone.
    pub(super) fn accept(&mut self, ask: &Ask, handshake: &[u8], member: M) -> Option<Result<Announced, Refusal>> {
        self.is_waiting(ask).then(|| self.answer(ask.remote_id, handshake, member))
    }

    /// Rejects a channel of the peer, unless it is gone. Returns the control message.
    pub(super) fn reject(&mut self, ask: &Ask) -> Option<Vec<u8>> {
        self.is_waiting(ask).then(|| {
            self.take_asked(ask.remote_id);
            control(REJECT, ask.remote_id)
        })
    }

    /// Closes one of this side's channels. Returns the control message, which must be sent before any channel is
    /// opened.
    ///
    /// The member must be shut, and must still own the id: the id of a closed channel may belong to another one.
    pub(super) fn close(&mut self, local_id: u64) -> Option<Vec<u8>> {
        let slot = self.local.get_mut(index(local_id)?)?;
        let key = match std::mem::replace(slot, Local::Free) {
            Local::Free | Local::Opening { member: None, .. } => return None,
            Local::Opening { key, member: Some(_) } => {
                // The peer may be responding on this id, so it stays in use until the response arrives.
                *slot = Local::Opening { key: Arc::clone(&key), member: None };
                key
            }
            Local::Open { key, remote_id, .. } => {
                self.free.push(local_id);
                self.free_remote(remote_id);
                key
            }
        };
        self.leave(&key);
        Some(control(CLOSE, local_id))
    }

    /// Closes all channels without telling the peer, because the connection is gone.
    pub(super) fn shut_all(&mut self) {
        for slot in std::mem::take(&mut self.local) {
            if let Local::Opening { member: Some(member), .. } | Local::Open { member, .. } = slot {
                member.shut();
                self.events.push_back(Event::Closed { member });
            }
        }
        self.free.clear();
        self.remote.clear();
        self.groups.clear();
        self.unread = None;
        self.asked = 0;
        self.pending_bytes = 0;
    }

    /// Processes a message. The previous one must have been read to its end.
    pub(super) fn receive(&mut self, message: Bytes) -> Result<(), Violation> {
        // Peers send empty messages as keep-alives.
        if message.is_empty() {
            return Ok(());
        }
        let mut decoder = Decoder::new(&message);
        let remote_id = decoder.uint()?;
        if remote_id == CONTROL && decoder.rest().first() == Some(&BATCH) {
            decoder.u8()?;
            let remote_id = decoder.uint()?;
            self.unread = Some(Batch { items: rest_of(&message, &decoder), remote_id });
            return self.read_on();
        }
        self.receive_one(remote_id, rest_of(&message, &decoder))
    }

    /// Reads more of a batch, until there are enough events. A few bytes of a batch may cause many events.
    pub(super) fn read_on(&mut self) -> Result<(), Violation> {
        let Some(Batch { items, mut remote_id }) = self.unread.take() else { return Ok(()) };
        let mut decoder = Decoder::new(&items);
        while !decoder.is_empty() {
            if self.events.len() >= EVENTS_MAX || self.is_crowded() {
                let items = rest_of(&items, &decoder);
                self.unread = Some(Batch { items, remote_id });
                return Ok(());
            }
            let item = decoder.buffer()?;
            if item.is_empty() {
                remote_id = decoder.uint()?;
                continue;
            }
            if remote_id == CONTROL && item.first() == Some(&BATCH) {
                return Err(Violation::NestedBatch);
            }
            // A slice of a large batch would keep the whole batch in memory, so a small item is copied.
            let is_large_part = item.len() >= items.len() / 4;
            let item = if is_large_part { items.slice_ref(item) } else { Bytes::copy_from_slice(item) };
            self.receive_one(remote_id, item)?;
        }
        Ok(())
    }

    /// Returns whether part of a batch is unread.
    pub(super) fn has_unread(&self) -> bool {
        self.unread.is_some()
    }

    /// Returns whether pending channels hold so many bytes that nothing more may be read.
    pub(super) fn is_crowded(&self) -> bool {
        self.pending_bytes > self.pending_bytes_max
    }

    /// Swaps the events with an empty list.
    pub(super) fn swap_events(&mut self, events: &mut VecDeque<Event<M>>) {
        std::mem::swap(&mut self.events, events);
    }

    /// Returns whether there are events to handle.
    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Processes one message, which has a kind and a payload.
    fn receive_one(&mut self, remote_id: u64, message: Bytes) -> Result<(), Violation> {
        let mut decoder = Decoder::new(&message);
        let kind = decoder.uint()?;
        let payload = rest_of(&message, &decoder);
        if remote_id == CONTROL {
            return self.receive_control(kind, &payload);
        }
        match index(remote_id).and_then(|index| self.remote.get_mut(index)) {
            // This side closed the channel, and the peer did not know yet.
            None | Some(Remote::Free) => {}
            Some(Remote::Asked { pending, cost, .. }) => {
                let added = MESSAGE_COST_BYTES + payload.len();
                *cost += added;
                self.pending_bytes += added;
                pending.push((kind, payload));
            }
            Some(Remote::Open { local_id }) => {
                let slot = index(*local_id).and_then(|index| self.local.get(index));
                if let Some(Local::Open { member, .. }) = slot {
                    self.events.push_back(Event::Message { member: member.clone(), kind, payload });
                }
            }
        }
        Ok(())
    }

    fn receive_control(&mut self, kind: u64, payload: &Bytes) -> Result<(), Violation> {
        let mut decoder = Decoder::new(payload);
        match u8::try_from(kind) {
            Ok(OPEN) => {
                let remote_id = decoder.uint()?;
                let protocol = decoder.string()?;
                let id = decoder.optional_buffer()?.unwrap_or_default();
                self.opened_by_peer(remote_id, protocol, id, rest_of(payload, &decoder))
            }
            Ok(REJECT) => self.rejected_by_peer(decoder.uint()?),
            Ok(CLOSE) => {
                let remote_id = decoder.uint()?;
                self.closed_by_peer(remote_id);
                Ok(())
            }
            // Later versions may define more control messages.
            _ => Ok(()),
        }
    }

    fn opened_by_peer(&mut self, remote_id: u64, protocol: &str, id: &[u8], handshake: Bytes) -> Result<(), Violation> {
        let index = index(remote_id).ok_or(Violation::InvalidOpen)?;
        // Ids increase by one, and only when no other is free. Rejected ids are free as soon as the peer learns of it.
        if index == self.remote.len() && index < self.remote_ids_max() {
            self.remote.push(Remote::Free);
        }
        if !matches!(self.remote.get(index), Some(Remote::Free)) {
            return Err(Violation::InvalidOpen);
        }
        let key = Key { protocol: protocol.to_owned(), id: id.to_owned() };
        if let Some(local_id) = self.groups.get_mut(&key).and_then(|group| group.opening.pop_front()) {
            self.pair(local_id, remote_id, handshake);
            return Ok(());
        }
        let too_long = protocol.len() > NAME_BYTES_MAX || id.len() > NAME_BYTES_MAX;
        if too_long || self.asked >= self.channels_max {
            self.events.push_back(Event::Send(control(REJECT, remote_id)));
            return Ok(());
        }
        self.serial += 1;
        let cost = MESSAGE_COST_BYTES + protocol.len() + id.len() + handshake.len();
        let key = Arc::new(key);
        let ask = Ask { remote_id, serial: self.serial, key: Arc::clone(&key), handshake };
        self.groups.entry(key).or_default().asked.push_back(remote_id);
        self.remote[index] = Remote::Asked { ask: ask.clone(), pending: Vec::new(), cost };
        self.asked += 1;
        self.pending_bytes += cost;
        self.events.push_back(Event::Asked(ask));
        Ok(())
    }

    /// Pairs one of this side's channels, the first of its group, with one of the peer's.
    fn pair(&mut self, local_id: u64, remote_id: u64, handshake: Bytes) {
        let Some(index) = index(local_id) else { return };
        match std::mem::replace(&mut self.local[index], Local::Free) {
            Local::Opening { key, member: Some(member) } => {
                self.local[index] = Local::Open { key, remote_id, member: member.clone() };
                self.set_remote(remote_id, Remote::Open { local_id });
                self.events.push_back(Event::Opened { member, handshake });
            }
            // The channel was closed here meanwhile. The peer learns so from the messages that are already in flight.
            Local::Opening { key, member: None } => {
                self.free.push(local_id);
                self.collect(&key);
            }
            slot => self.local[index] = slot,
        }
    }

    fn rejected_by_peer(&mut self, local_id: u64) -> Result<(), Violation> {
        let slot = index(local_id).and_then(|index| self.local.get_mut(index)).ok_or(Violation::InvalidReject)?;
        let (key, member) = match std::mem::replace(slot, Local::Free) {
            Local::Opening { key, member } => (key, member),
            other => {
                *slot = other;
                return Err(Violation::InvalidReject);
            }
        };
        if let Some(group) = self.groups.get_mut(&key) {
            group.opening.retain(|other| *other != local_id);
        }
        match member {
            Some(member) => {
                member.shut();
                self.events.push_back(Event::Closed { member });
                self.leave(&key);
            }
            None => self.collect(&key),
        }
        self.free.push(local_id);
        Ok(())
    }

    fn closed_by_peer(&mut self, remote_id: u64) {
        let Some(remote) = index(remote_id).and_then(|index| self.remote.get(index)) else { return };
        match remote {
            Remote::Free => {}
            Remote::Asked { .. } => {
                self.take_asked(remote_id);
                // The peer can reuse the id once this side has responded on it.
                self.events.push_back(Event::Send(control(REJECT, remote_id)));
            }
            Remote::Open { local_id } => {
                let local_id = *local_id;
                self.free_remote(remote_id);
                let Some(slot) = index(local_id).and_then(|index| self.local.get_mut(index)) else { return };
                if let Local::Open { key, member, .. } = std::mem::replace(slot, Local::Free) {
                    member.shut();
                    self.free.push(local_id);
                    self.events.push_back(Event::Closed { member });
                    self.leave(&key);
                }
            }
        }
    }

    fn is_waiting(&self, ask: &Ask) -> bool {
        let remote = index(ask.remote_id).and_then(|index| self.remote.get(index));
        matches!(remote, Some(Remote::Asked { ask: waiting, .. }) if waiting.serial == ask.serial)
    }

    /// Opens a channel of this side for one that the peer opened.
    fn answer(&mut self, remote_id: u64, handshake: &[u8], member: M) -> Result<Announced, Refusal> {
        let local_id = self.claim(Local::Free)?;
        let Some((ask, pending)) = self.take_asked(remote_id) else {
            self.free.push(local_id);
            return Err(Refusal::Duplicate);
        };
        let key = ask.key;
        let message = open_message(local_id, &key, handshake);
        self.groups.entry(Arc::clone(&key)).or_default().members += 1;
        self.local[local_id as usize - 1] = Local::Open { key, remote_id, member: member.clone() };
        self.set_remote(remote_id, Remote::Open { local_id });
        self.events.push_back(Event::Opened { member: member.clone(), handshake: ask.handshake });
        for (kind, payload) in pending {
            self.events.push_back(Event::Message { member: member.clone(), kind, payload });
        }
        Ok(Announced { local_id, message })
    }

    /// Removes a pending channel of the peer, and frees its id.
    fn take_asked(&mut self, remote_id: u64) -> Option<(Ask, Vec<(u64, Bytes)>)> {
        let slot = self.remote.get_mut(index(remote_id)?)?;
        match std::mem::replace(slot, Remote::Free) {
            Remote::Asked { ask, pending, cost } => {
                self.asked -= 1;
                self.pending_bytes -= cost;
                if let Some(group) = self.groups.get_mut(&ask.key) {
                    group.asked.retain(|other| *other != remote_id);
                }
                self.collect(&ask.key);
                Some((ask, pending))
            }
            other => {
                *slot = other;
                None
            }
        }
    }

    /// Claims a free id of this side.
    fn claim(&mut self, slot: Local<M>) -> Result<u64, Refusal> {
        if let Some(local_id) = self.free.pop() {
            self.local[local_id as usize - 1] = slot;
            return Ok(local_id);
        }
        if self.local.len() >= self.channels_max {
            return Err(Refusal::TooMany);
        }
        self.local.push(slot);
        Ok(self.local.len() as u64)
    }

    fn set_remote(&mut self, remote_id: u64, remote: Remote) {
        if let Some(slot) = index(remote_id).and_then(|index| self.remote.get_mut(index)) {
            *slot = remote;
        }
    }

    fn free_remote(&mut self, remote_id: u64) {
        self.set_remote(remote_id, Remote::Free);
    }

    fn leave(&mut self, key: &Arc<Key>) {
        if let Some(group) = self.groups.get_mut(key) {
            group.members -= 1;
        }
        self.collect(key);
    }

    fn collect(&mut self, key: &Arc<Key>) {
        let is_empty = |group: &Group| group.members == 0 && group.opening.is_empty() && group.asked.is_empty();
        if self.groups.get(key).is_some_and(is_empty) {
            self.groups.remove(key);
        }
    }

    /// A peer that opens many channels at once learns of rejections late, so it may use more ids than channels.
    fn remote_ids_max(&self) -> usize {
        self.channels_max.saturating_mul(4).max(4096)
    }
}

/// Returns the index of an id. Ids start at 1.
fn index(id: u64) -> Option<usize> {
    usize::try_from(id.checked_sub(1)?).ok()
}

fn rest_of(message: &Bytes, decoder: &Decoder) -> Bytes {
    message.slice(message.len() - decoder.rest().len()..)
}

/// Control messages are built without the id that precedes them.
fn control(kind: u8, id: u64) -> Vec<u8> {
    let mut message = vec![kind];
    message.write_uint(id);
    message
}

fn open_message(local_id: u64, key: &Key, handshake: &[u8]) -> Vec<u8> {
    let mut message = control(OPEN, local_id);
    message.write_string(&key.protocol);
    message.write_buffer(&key.id);
    message.write_raw(handshake);
    message
}

#[cfg(test)]
mod tests;

//! Where a channel's messages go.

use std::collections::VecDeque;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::channel::Responder;
use super::state::MESSAGE_COST_BYTES;

/// What became of a message.
pub(crate) enum Delivery {
    /// It was taken.
    Taken,
    /// It was taken, and something was sent in answer.
    Answered,
    /// There is no room. The connection waits until there is.
    Full(Bytes),
    /// There is no room, and there should be: the channel is to be closed.
    Overflow,
    /// The protocol does not allow it: the connection is to be destroyed.
    Invalid,
}

/// Takes a channel's messages from the task that reads the connection. Nothing here may block.
pub(crate) trait Inbox: Send + Sync + 'static {
    /// Takes a message.
    fn deliver(&self, responder: Responder<'_>, kind: u64, payload: Bytes) -> Delivery;

    /// Waits until a message that found no room is worth another try.
    fn room(&self) -> BoxFuture<'_, ()>;

    /// Learns that no more messages come. Whoever waits for them, or for room, goes on.
    fn shut(&self);
}

/// What happens when a consumer does not keep up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// The whole connection waits, and in the end the peer.
    Wait,
    /// This channel is closed. For protocols in which a peer may send only what it was invited to.
    Close,
}

/// A message of a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelMessage {
    /// Which of the protocol's messages it is.
    pub kind: u64,
    /// Its content.
    pub payload: Bytes,
}

/// Keeps messages until the consumer asks for them.
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    bytes_max: usize,
    overflow: Overflow,
    readable: Notify,
    writable: Notify,
}

#[derive(Default)]
struct Waiting {
    messages: VecDeque<ChannelMessage>,
    bytes: usize,
    is_writer_waiting: bool,
    is_shut: bool,
}

impl Queue {
    pub(super) fn new(bytes_max: usize, overflow: Overflow) -> Self {
        Self { waiting: Mutex::default(), bytes_max, overflow, readable: Notify::new(), writable: Notify::new() }
    }

    /// Returns the next message, or `None` when no more come. Cancel safe.
    pub(super) async fn next(&self) -> Option<ChannelMessage> {
        loop {
            let readable = self.readable.notified();
            {
                let mut waiting = self.waiting();
                if let Some(message) = self.pop(&mut waiting) {
                    return Some(message);
                }
                if waiting.is_shut {
                    // Whoever else waits learns it too.
                    self.readable.notify_one();
                    return None;
                }
            }
            readable.await;
        }
    }

    /// Returns the next message if one is here.
    pub(super) fn try_next(&self) -> Option<ChannelMessage> {
        self.pop(&mut self.waiting())
    }

    fn pop(&self, waiting: &mut Waiting) -> Option<ChannelMessage> {
        let message = waiting.messages.pop_front()?;
        waiting.bytes -= cost(&message.payload);
        if waiting.is_writer_waiting && waiting.bytes <= self.bytes_max / 2 {
            waiting.is_writer_waiting = false;
            self.writable.notify_one();
        }
        Some(message)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock()
    }
}

impl Inbox for Queue {
    fn deliver(&self, _responder: Responder<'_>, kind: u64, payload: Bytes) -> Delivery {
        let mut waiting = self.waiting();
        if waiting.is_shut {
            return Delivery::Taken;
        }
        let cost = cost(&payload);
        // A message alone always fits, however long.
        if waiting.bytes > 0 && waiting.bytes + cost > self.bytes_max {
            return match self.overflow {
                Overflow::Close => Delivery::Overflow,
                Overflow::Wait => {
                    waiting.is_writer_waiting = true;
                    Delivery::Full(payload)
                }
            };
        }
        waiting.bytes += cost;
        waiting.messages.push_back(ChannelMessage { kind, payload });
        drop(waiting);
        self.readable.notify_one();
        Delivery::Taken
    }

    fn room(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.writable.notified())
    }

    fn shut(&self) {
        self.waiting().is_shut = true;
        self.readable.notify_one();
        self.writable.notify_one();
    }
}

fn cost(payload: &Bytes) -> usize {
    payload.len() + MESSAGE_COST_BYTES
}

//! The queue of received messages of a channel.

use std::collections::VecDeque;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::channel::Responder;
use super::state::MESSAGE_COST_BYTES;

/// The result of delivering a message.
pub(crate) enum Delivery {
    /// The message was accepted.
    Taken,
    /// The message was accepted, and a response was sent.
    Answered,
    /// The queue is full. The connection waits until it has space.
    Full(Bytes),
    /// The queue is full although the peer should not have filled it: the channel must be closed.
    Overflow,
    /// The message violates the protocol: the connection must be destroyed.
    Invalid,
}

/// Accepts a channel's messages from the task that reads the connection. No method may block.
pub(crate) trait Inbox: Send + Sync + 'static {
    /// Delivers a message.
    fn deliver(&self, responder: Responder<'_>, kind: u64, payload: Bytes) -> Delivery;

    /// Waits until a message that did not fit is worth another try.
    fn room(&self) -> BoxFuture<'_, ()>;

    /// Signals that no more messages follow, and wakes all tasks that wait for messages or for space.
    fn shut(&self);
}

/// What happens when a consumer does not keep up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// The whole connection waits, which eventually makes the peer wait (backpressure).
    Wait,
    /// The channel is closed. For protocols in which a peer may send only as much as it was granted.
    Close,
}

/// A message of a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelMessage {
    /// The message's kind within the protocol.
    pub kind: u64,
    /// The payload.
    pub payload: Bytes,
}

/// Queues messages until the consumer takes them.
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

    /// Returns the next message, or `None` when no more follow. Cancel safe.
    pub(super) async fn next(&self) -> Option<ChannelMessage> {
        loop {
            let readable = self.readable.notified();
            {
                let mut waiting = self.waiting();
                if let Some(message) = self.pop(&mut waiting) {
                    return Some(message);
                }
                if waiting.is_shut {
                    // Wakes the next task that waits.
                    self.readable.notify_one();
                    return None;
                }
            }
            readable.await;
        }
    }

    /// Returns the next message if one has arrived.
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
        // A single message is always accepted, however long.
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

//! The pending requests of a channel, in both directions.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, oneshot};

use super::codec::{EVENT, REQUEST, RESPONSE, Request, Response, encode_error};
use super::error::RemoteError;
use crate::protomux::{Delivery, Inbox, Responder};

/// What a queued request costs in addition to its bytes.
const REQUEST_COST_BYTES: usize = 128;

type Answer = Result<Bytes, Box<RemoteError>>;

/// Matches responses to requests, and queues the peer's requests.
pub(super) struct Calls {
    sent: Mutex<Sent>,
    received: Mutex<Received>,
    requests_max: usize,
    bytes_max: AtomicUsize,
    readable: Notify,
    writable: Notify,
}

struct Sent {
    id: u64,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    is_shut: bool,
}

#[derive(Default)]
struct Received {
    queue: VecDeque<Request>,
    /// The number of requests that are queued or have no response yet, and their bytes.
    requests: usize,
    bytes: usize,
    is_writer_waiting: bool,
    is_unwanted: bool,
    is_shut: bool,
}

impl Calls {
    pub(super) fn new(requests_max: usize, bytes_max: usize) -> Self {
        Self {
            sent: Mutex::new(Sent { id: 0, waiting: HashMap::new(), is_shut: false }),
            received: Mutex::default(),
            requests_max: requests_max.max(1),
            bytes_max: bytes_max.into(),
            readable: Notify::new(),
            writable: Notify::new(),
        }
    }

    /// Assigns an id to a request. Returns it with the receiver of the response, or `None` if the channel is closed.
    pub(super) fn begin(&self) -> Option<(u64, oneshot::Receiver<Answer>)> {
        let mut sent = self.sent();
        if sent.is_shut {
            return None;
        }
        let (sender, answer) = oneshot::channel();
        sent.id += 1;
        let id = sent.id;
        sent.waiting.insert(id, sender);
        Some((id, answer))
    }

    /// Discards the response to a request, should it still arrive.
    pub(super) fn forget(&self, id: u64) {
        self.sent().waiting.remove(&id);
    }

    /// Returns the peer's next request, or `None` when no more follow. Cancel safe.
    pub(super) async fn next(&self) -> Option<Request> {
        loop {
            let readable = self.readable.notified();
            {
                let mut received = self.received();
                if let Some(request) = received.queue.pop_front() {
                    return Some(request);
                }
                if received.is_shut {
                    // Wakes the next task that waits.
                    self.readable.notify_one();
                    return None;
                }
            }
            readable.await;
        }
    }

    /// Changes the maximum number of bytes of the peer's requests.
    pub(super) fn set_bytes_max(&self, bytes_max: usize) {
        let mut received = self.received();
        self.bytes_max.store(bytes_max, Ordering::Relaxed);
        if std::mem::take(&mut received.is_writer_waiting) {
            self.writable.notify_one();
        }
    }

    /// Frees the capacity of a request that got its response.
    pub(super) fn settle(&self, bytes: usize) {
        let mut received = self.received();
        received.requests -= 1;
        received.bytes -= bytes;
        if std::mem::take(&mut received.is_writer_waiting) {
            self.writable.notify_one();
        }
    }

    /// Makes every further request fail, because no task takes requests any more. Returns the queued ones.
    pub(super) fn refuse(&self) -> Vec<Request> {
        let mut received = self.received();
        received.is_unwanted = true;
        self.writable.notify_one();
        received.queue.drain(..).collect()
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock()
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        self.received.lock()
    }

    fn take_request(&self, responder: Responder<'_>, message: Bytes) -> Delivery {
        let Ok(request) = Request::decode(&message) else { return Delivery::Invalid };
        let mut received = self.received();
        if received.is_shut {
            return Delivery::Taken;
        }
        if received.is_unwanted {
            drop(received);
            return refuse(responder, &request);
        }
        let cost = cost(&request);
        let is_full =
            received.requests >= self.requests_max || received.bytes + cost > self.bytes_max.load(Ordering::Relaxed);
        // A single request is always accepted, however long.
        if is_full && received.requests > 0 {
            received.is_writer_waiting = true;
            return Delivery::Full(message);
        }
        received.requests += 1;
        received.bytes += cost;
        received.queue.push_back(request);
        drop(received);
        self.readable.notify_one();
        Delivery::Taken
    }

    fn take_response(&self, message: &Bytes) -> Delivery {
        let Ok(response) = Response::decode(message) else { return Delivery::Invalid };
        let waiting = self.sent().waiting.remove(&response.id);
        if let Some(waiting) = waiting {
            // If the caller is gone, the response is discarded like any late one.
            let _ = waiting.send(response.result);
        }
        Delivery::Taken
    }
}

impl Inbox for Calls {
    fn deliver(&self, responder: Responder<'_>, kind: u64, payload: Bytes) -> Delivery {
        match kind {
            REQUEST => self.take_request(responder, payload),
            RESPONSE => self.take_response(&payload),
            // Later versions may define more kinds of message.
            _ => Delivery::Taken,
        }
    }

    fn room(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.writable.notified())
    }

    fn shut(&self) {
        let waiting = {
            let mut sent = self.sent();
            sent.is_shut = true;
            std::mem::take(&mut sent.waiting)
        };
        // Wakes the tasks that wait for a response, which will not arrive.
        drop(waiting);
        self.received().is_shut = true;
        self.readable.notify_one();
        self.writable.notify_one();
    }
}

/// Returns what a request counts towards the limit while it is pending.
pub(super) fn cost(request: &Request) -> usize {
    request.method.len() + request.value.len() + REQUEST_COST_BYTES
}

fn refuse(responder: Responder<'_>, request: &Request) -> Delivery {
    if request.id == EVENT {
        return Delivery::Taken;
    }
    let method = std::str::from_utf8(&request.method).unwrap_or_default();
    let error = encode_error(request.id, &RemoteError::unknown_method(method));
    // Sending fails if the channel is closed or the response is too long. In either case the peer cannot be told.
    let _ = responder.send(RESPONSE, &[&error]);
    Delivery::Answered
}

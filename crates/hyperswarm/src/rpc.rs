//! Requests and responses on a [`Protomux`], compatible with the Node packages `protomux-rpc` and `@hyperswarm/rpc`.
//!
//! Both sides open the channel at once, named by the server's public key, and either may ask the other. There are no
//! deadlines here: whoever drops a request has it forgotten, and a late response is dropped.

mod calls;
mod codec;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod value;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::timeout;

pub use self::error::{
    Cause, DECODE_ERROR, ENCODE_ERROR, REQUEST_ERROR, RemoteError, ReplyError, RequestError, UNKNOWN_METHOD,
};
pub use self::value::{decode_buffer, decode_string, encode_buffer, encode_string};

use self::calls::{Calls, cost};
use self::codec::{EVENT, REQUEST, RESPONSE, Request, encode_error};
use crate::protomux::{self, Head, Inbox, OpenError, Outlet, Protomux};
use crate::secret_stream::{Closed, MESSAGE_BYTES_MAX, SecretStream, SendError};

/// The protocol's name on a connection.
pub const PROTOCOL: &str = "protomux-rpc";

/// How much of a value's limit a request or a response needs for itself, besides its method's name.
const OVERHEAD_BYTES: usize = 64;

/// Returns the longest value that surely fits into a request for a method, or into its response.
pub fn value_bytes_max(method: &str) -> usize {
    MESSAGE_BYTES_MAX.saturating_sub(OVERHEAD_BYTES + method.len())
}

/// How an [`Rpc`] behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many requests of this side may be unanswered at once. Further ones wait.
    ///
    /// As long as the peer takes as many, neither side stops to read while it waits for the other.
    pub sent_max: usize,
    /// How many requests of the peer may be unanswered at once. Then the connection is not read.
    pub received_max: usize,
    /// How many bytes those may have. One request always fits.
    pub received_bytes_max: usize,
    /// How long the peer may take no responses before its channel is closed.
    pub stall: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { sent_max: 1024, received_max: 1024, received_bytes_max: 64 * 1024 * 1024, stall: Duration::from_mins(1) }
    }
}

/// Asks the peer. Clones share the channel, which closes when all of its handles are gone: this and its clones, the
/// [`Requests`], and every request that is not answered yet.
#[derive(Clone)]
pub struct Rpc {
    shared: Arc<Shared>,
}

struct Shared {
    outlet: Outlet,
    calls: Arc<Calls>,
    sent: Semaphore,
    stall: Duration,
}

impl Rpc {
    /// Opens the channel for the server whose public key is `id`. Both sides give the same.
    pub fn open(mux: &Protomux, id: &[u8], options: &Options) -> Result<(Self, Requests), OpenError> {
        let calls = Arc::new(Calls::new(options.received_max, options.received_bytes_max));
        let outlet = mux.open_with(PROTOCOL, id, &[], Arc::clone(&calls) as Arc<dyn Inbox>)?;
        let sent = Semaphore::new(options.sent_max.clamp(1, Semaphore::MAX_PERMITS));
        let shared = Arc::new(Shared { outlet, calls, sent, stall: options.stall });
        Ok((Self { shared: Arc::clone(&shared) }, Requests { shared }))
    }

    /// Opens the channel as the only one of a connection, and begins to read.
    pub fn over(stream: SecretStream, id: &[u8], options: &Options) -> Result<(Self, Requests), OpenError> {
        let mux = Protomux::new(stream, protomux::Options::default());
        let opened = Self::open(&mux, id, options)?;
        mux.start();
        Ok(opened)
    }

    /// Asks for a method and waits for the response's value. Has no deadline of its own.
    ///
    /// Dropping the future forgets the request; the peer still works on it.
    pub async fn request(&self, method: &str, value: &[u8]) -> Result<Bytes, RequestError> {
        let shared = &*self.shared;
        let _slot = shared.sent.acquire().await.map_err(|_| RequestError::Closed)?;
        shared.outlet.room().await.map_err(|Closed| RequestError::Closed)?;
        let (id, answer) = shared.calls.begin().ok_or(RequestError::Closed)?;
        let mut waiting = Waiting { calls: &shared.calls, id, is_answered: false };
        shared.send_request(id, method, value)?;
        let answer = answer.await;
        waiting.is_answered = true;
        answer.map_err(|_| RequestError::Closed)?.map_err(RequestError::Remote)
    }

    /// Sends a request that has no response.
    pub async fn event(&self, method: &str, value: &[u8]) -> Result<(), RequestError> {
        self.shared.outlet.room().await.map_err(|Closed| RequestError::Closed)?;
        self.shared.send_request(EVENT, method, value)
    }

    /// Waits until the peer opened its side, which says that it knows this server.
    pub async fn opened(&self) -> Result<(), Closed> {
        self.shared.outlet.opened().await.map(drop)
    }

    /// Closes the channel. What waits for a response learns that none comes.
    pub fn close(&self) {
        self.shared.outlet.close();
    }

    /// Waits until the channel is closed, by either side or with the connection.
    pub async fn closed(&self) {
        self.shared.outlet.closed().await;
    }
}

impl fmt::Debug for Rpc {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Rpc").finish_non_exhaustive()
    }
}

impl Shared {
    fn send_request(&self, id: u64, method: &str, value: &[u8]) -> Result<(), RequestError> {
        let head = Head::of([id, method.len() as u64]);
        self.outlet.send(REQUEST, &[head.as_ref(), method.as_bytes(), value]).map_err(|error| match error {
            SendError::TooLong(_) => RequestError::TooLong,
            SendError::Closed => RequestError::Closed,
        })
    }

    fn send_error(&self, id: u64, error: &RemoteError) -> Result<(), ReplyError> {
        self.outlet.send(RESPONSE, &[&encode_error(id, error)]).map_err(|error| match error {
            SendError::TooLong(_) => ReplyError::TooLong,
            SendError::Closed => ReplyError::Closed,
        })
    }
}

/// Forgets a request whose future was dropped.
struct Waiting<'a> {
    calls: &'a Calls,
    id: u64,
    is_answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.calls.forget(self.id);
        }
    }
}

/// What the peer asks. Dropping it has every further request answered as of an unknown method.
pub struct Requests {
    shared: Arc<Shared>,
}

impl Requests {
    /// Returns the next request, or `None` when the channel is closed. Cancel safe.
    pub async fn next(&self) -> Option<IncomingRequest> {
        let shared = &self.shared;
        // A peer that takes no responses gets no more of them.
        if timeout(shared.stall, shared.outlet.room()).await.is_err() {
            shared.outlet.close();
        }
        let request = shared.calls.next().await?;
        Some(IncomingRequest::new(request, Arc::clone(shared)))
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        for request in self.shared.calls.refuse() {
            IncomingRequest::new(request, Arc::clone(&self.shared)).unknown_method();
        }
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Requests").finish_non_exhaustive()
    }
}

/// A request of the peer.
#[derive(Debug)]
pub struct IncomingRequest {
    method: Bytes,
    value: Bytes,
    reply: Reply,
}

impl IncomingRequest {
    fn new(request: Request, shared: Arc<Shared>) -> Self {
        let cost_bytes = cost(&request);
        let reply = Reply { shared, id: request.id, cost_bytes, is_done: request.id == EVENT };
        Self { method: request.method, value: request.value, reply }
    }

    /// Returns the name of the method.
    pub fn method(&self) -> &str {
        std::str::from_utf8(&self.method).unwrap_or_default()
    }

    /// Returns the value as it was sent. How it is encoded is for both sides to agree on.
    pub fn value(&self) -> &Bytes {
        &self.value
    }

    /// Returns whether the peer expects no response.
    pub fn is_event(&self) -> bool {
        self.reply.id == EVENT
    }

    /// Takes apart what to work on and how to respond.
    pub fn into_parts(self) -> (Bytes, Reply) {
        (self.value, self.reply)
    }

    /// Responds with a value.
    pub fn ok(self, value: &[u8]) -> Result<(), ReplyError> {
        self.reply.ok(value)
    }

    /// Responds with an error.
    pub fn error(self, error: &RemoteError) -> Result<(), ReplyError> {
        self.reply.error(error)
    }

    /// Responds that there is no such method.
    pub fn unknown_method(self) {
        let error = RemoteError::unknown_method(self.method());
        // A closed channel needs no word.
        let _ = self.reply.error(&error);
    }
}

/// Responds to a request, once. Dropping it responds with an error. The response to an event goes nowhere.
pub struct Reply {
    shared: Arc<Shared>,
    id: u64,
    cost_bytes: usize,
    is_done: bool,
}

impl Reply {
    /// Waits until no response can be sent any more, because the channel is closed. Cancel safe.
    ///
    /// A peer that forgets a request does not say so.
    pub async fn closed(&self) {
        self.shared.outlet.closed().await;
    }

    /// Responds with a value. If it is too long, the peer learns that instead.
    pub fn ok(mut self, value: &[u8]) -> Result<(), ReplyError> {
        if std::mem::replace(&mut self.is_done, true) {
            return Ok(());
        }
        // No flag is set.
        match self.shared.outlet.send(RESPONSE, &[Head::of([0, self.id]).as_ref(), value]) {
            Ok(()) => Ok(()),
            Err(SendError::Closed) => Err(ReplyError::Closed),
            Err(SendError::TooLong(too_long)) => {
                let error = RemoteError::not_encoded(Cause::new(too_long.to_string(), ""));
                self.shared.send_error(self.id, &error)?;
                Err(ReplyError::TooLong)
            }
        }
    }

    /// Responds with an error. If it is too long, the peer learns only that the request failed.
    pub fn error(mut self, error: &RemoteError) -> Result<(), ReplyError> {
        if std::mem::replace(&mut self.is_done, true) {
            return Ok(());
        }
        let result = self.shared.send_error(self.id, error);
        if result == Err(ReplyError::TooLong) {
            self.shared.send_error(self.id, &RemoteError::failed(Cause::default()))?;
        }
        result
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_done {
            let error = RemoteError::failed(Cause::new("the request was dropped", ""));
            // A closed channel needs no word.
            let _ = self.shared.send_error(self.id, &error);
        }
        self.shared.calls.settle(self.cost_bytes);
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Reply").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

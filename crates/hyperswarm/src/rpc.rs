//! Requests and responses on a [`Protomux`], compatible with the Node packages `protomux-rpc` and `@hyperswarm/rpc`.
//!
//! Both sides open the channel at once. Its name is the server's public key, and either side may send requests. This
//! module sets no deadlines: a caller gives up on a request by dropping it, and a response that arrives later is
//! discarded.

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

/// The protocol name of the channel.
pub const PROTOCOL: &str = "protomux-rpc";

/// How many bytes of a message a request or a response needs, in addition to the value and the method's name.
const OVERHEAD_BYTES: usize = 64;

/// Returns the maximum length of a value that is certain to fit in a request for a method, or in its response.
pub fn value_bytes_max(method: &str) -> usize {
    MESSAGE_BYTES_MAX.saturating_sub(OVERHEAD_BYTES + method.len())
}

/// Options of an [`Rpc`].
#[derive(Debug, Clone)]
pub struct Options {
    /// The maximum number of requests of this side without a response. Further ones wait.
    ///
    /// If the peer accepts as many, the two sides cannot deadlock by both pausing their reads.
    pub sent_max: usize,
    /// The maximum number of requests of the peer without a response. Beyond it, reading from the connection pauses.
    pub received_max: usize,
    /// The maximum number of bytes of those requests. A single request is always accepted.
    pub received_bytes_max: usize,
    /// How long the peer may go without reading responses before its channel is closed.
    pub stall: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { sent_max: 1024, received_max: 1024, received_bytes_max: 64 * 1024 * 1024, stall: Duration::from_mins(1) }
    }
}

/// Sends requests to the peer. Clones share the channel, which closes when all of its handles are dropped: this and its
/// clones, the [`Requests`], and every request without a response.
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
    /// Opens the channel for the server whose public key is `id`. Both sides must use the same id.
    pub fn open(mux: &Protomux, id: &[u8], options: &Options) -> Result<(Self, Requests), OpenError> {
        let calls = Arc::new(Calls::new(options.received_max, options.received_bytes_max));
        let outlet = mux.open_with(PROTOCOL, id, &[], Arc::clone(&calls) as Arc<dyn Inbox>)?;
        let sent = Semaphore::new(options.sent_max.clamp(1, Semaphore::MAX_PERMITS));
        let shared = Arc::new(Shared { outlet, calls, sent, stall: options.stall });
        Ok((Self { shared: Arc::clone(&shared) }, Requests { shared }))
    }

    /// Opens the channel as the only one of a connection, and starts reading.
    pub fn over(stream: SecretStream, id: &[u8], options: &Options) -> Result<(Self, Requests), OpenError> {
        let mux = Protomux::new(stream, protomux::Options::default());
        let opened = Self::open(&mux, id, options)?;
        mux.start();
        Ok(opened)
    }

    /// Sends a request and waits for the value of the response. Has no deadline of its own.
    ///
    /// Dropping the future abandons the request, but the peer still processes it.
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

    /// Sends a request that expects no response.
    pub async fn event(&self, method: &str, value: &[u8]) -> Result<(), RequestError> {
        self.shared.outlet.room().await.map_err(|Closed| RequestError::Closed)?;
        self.shared.send_request(EVENT, method, value)
    }

    /// Changes [`Options::received_bytes_max`] of this connection.
    pub fn set_received_bytes_max(&self, bytes: usize) {
        self.shared.calls.set_bytes_max(bytes);
    }

    /// Waits until the peer has opened its side, which confirms that it knows this server.
    pub async fn opened(&self) -> Result<(), Closed> {
        self.shared.outlet.opened().await.map(drop)
    }

    /// Closes the channel. Pending requests fail.
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

/// Removes a request whose future was dropped.
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

/// The requests of the peer. Once this is dropped, every further request gets the unknown-method error.
pub struct Requests {
    shared: Arc<Shared>,
}

impl Requests {
    /// Returns the next request, or `None` when the channel is closed. Cancel safe.
    pub async fn next(&self) -> Option<IncomingRequest> {
        let shared = &self.shared;
        // A peer that does not read responses gets no more of them.
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

/// A request from the peer.
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

    /// Returns the encoded value. The two sides must agree on its encoding.
    pub fn value(&self) -> &Bytes {
        &self.value
    }

    /// Returns whether the peer expects no response.
    pub fn is_event(&self) -> bool {
        self.reply.id == EVENT
    }

    /// Splits the request into its value and the reply.
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

    /// Responds that the method does not exist.
    pub fn unknown_method(self) {
        let error = RemoteError::unknown_method(self.method());
        // On a closed channel the peer need not be told.
        let _ = self.reply.error(&error);
    }
}

/// Responds to a request, once. Dropping it responds with an error. A response to an event is discarded.
pub struct Reply {
    shared: Arc<Shared>,
    id: u64,
    cost_bytes: usize,
    is_done: bool,
}

impl Reply {
    /// Waits until the channel is closed, so that no response can be sent any more. Cancel safe.
    ///
    /// A peer that abandons a request does not report it.
    pub async fn closed(&self) {
        self.shared.outlet.closed().await;
    }

    /// Responds with a value. If the value is too long, the peer gets an error instead.
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

    /// Responds with an error. If the error is too long, the peer only learns that the request failed.
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
            // On a closed channel the peer need not be told.
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

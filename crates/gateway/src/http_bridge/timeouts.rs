//! Timeouts of a client connection: for sending a head, reading an answer, and being idle.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{self, Instant};

use super::reset_limit::Unanswered;
use crate::config::{Config, seconds};
use crate::origin_permits::OriginPermit;

/// The timeouts of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionTimeouts {
    /// For receiving a request's head, and for the TLS handshake.
    pub(super) head: Duration,
    idle: Duration,
    /// For writing while the client does not read its answer.
    write: Duration,
}

impl ConnectionTimeouts {
    pub(super) fn of(config: &Config) -> Self {
        Self {
            head: seconds(config.header_timeout_secs),
            idle: seconds(config.idle_timeout_secs),
            write: seconds(config.write_timeout_secs),
        }
    }
}

/// The activity of a connection. Times are milliseconds since it was opened, plus one; 0 means never.
#[derive(Debug)]
pub(super) struct Activity {
    begun: Instant,
    requests: AtomicUsize,
    /// When the connection last became idle: when it was opened, or when a request ended.
    idle_since: AtomicU64,
    /// When the head that is being received began.
    head_since: AtomicU64,
    /// When writing became blocked because the client does not read its answer.
    blocked_since: AtomicU64,
    http2: AtomicBool,
}

/// A snapshot of [`Activity`].
#[derive(Debug, Clone, Copy, Default)]
struct Facts {
    requests: usize,
    idle_since: u64,
    head_since: u64,
    blocked_since: u64,
    http2: bool,
}

/// The next step of [`Activity::watch`].
#[derive(Debug, PartialEq, Eq)]
enum Watch {
    /// Close the connection, for this reason.
    Close(&'static str),
    /// Check again after this time.
    Wait(Duration),
}

/// Decides whether a connection has exceeded a timeout. A pure function of its snapshot and the current millisecond.
fn judge(facts: Facts, timeouts: ConnectionTimeouts, now: u64) -> Watch {
    let left = |since: u64, limit: Duration| {
        let end = since.saturating_add(limit.as_millis() as u64);
        Duration::from_millis(end.saturating_sub(now))
    };
    let mut waits = vec![];
    if facts.blocked_since > 0 {
        waits.push((left(facts.blocked_since, timeouts.write), "the answer is not read"));
    }
    if facts.requests == 0 {
        waits.push((left(facts.idle_since, timeouts.idle), "idle"));
        // HTTP/2 connections carry traffic between requests too.
        if facts.head_since > 0 && !facts.http2 {
            waits.push((left(facts.head_since, timeouts.head), "the head takes too long"));
        }
    }
    let soonest = waits.into_iter().min();
    match soonest {
        Some((Duration::ZERO, reason)) => Watch::Close(reason),
        Some((wait, _)) => Watch::Wait(wait.min(timeouts.shortest())),
        None => Watch::Wait(timeouts.shortest()),
    }
}

impl ConnectionTimeouts {
    /// Returns the longest sleep between two checks. A wait that begins during the sleep is noticed within this time.
    fn shortest(self) -> Duration {
        self.head.min(self.idle).min(self.write).max(Duration::from_millis(100)) / 2
    }
}

impl Activity {
    pub(super) fn begin() -> Self {
        Self {
            begun: Instant::now(),
            requests: AtomicUsize::new(0),
            idle_since: AtomicU64::new(1),
            // The timeout for the first head starts with the connection.
            head_since: AtomicU64::new(1),
            blocked_since: AtomicU64::new(0),
            http2: AtomicBool::new(false),
        }
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64 + 1
    }

    /// Counts a request as being answered until the guard is dropped.
    pub(super) fn request(self: &Arc<Self>, http2: bool) -> RequestGuard {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.head_since.store(0, Ordering::Relaxed);
        if http2 {
            self.http2.store(true, Ordering::Relaxed);
        }
        RequestGuard(self.clone())
    }

    /// Waits until the connection exceeds a timeout, and returns the reason.
    pub(super) async fn watch(&self, timeouts: ConnectionTimeouts) -> &'static str {
        loop {
            match judge(self.facts(), timeouts, self.now()) {
                Watch::Close(reason) => return reason,
                Watch::Wait(wait) => time::sleep(wait).await,
            }
        }
    }

    fn facts(&self) -> Facts {
        Facts {
            requests: self.requests.load(Ordering::Relaxed),
            idle_since: self.idle_since.load(Ordering::Relaxed),
            head_since: self.head_since.load(Ordering::Relaxed),
            blocked_since: self.blocked_since.load(Ordering::Relaxed),
            http2: self.http2.load(Ordering::Relaxed),
        }
    }

    fn has_read(&self) {
        if self.requests.load(Ordering::Relaxed) == 0 && self.head_since.load(Ordering::Relaxed) == 0 {
            self.head_since.store(self.now(), Ordering::Relaxed);
        }
    }

    fn has_written(&self, blocked: bool) {
        let since = self.blocked_since.load(Ordering::Relaxed);
        if blocked && since == 0 {
            self.blocked_since.store(self.now(), Ordering::Relaxed);
        } else if !blocked && since != 0 {
            self.blocked_since.store(0, Ordering::Relaxed);
        }
    }
}

/// Counts as a request being answered until it is dropped.
#[derive(Debug)]
pub(super) struct RequestGuard(Arc<Activity>);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.idle_since.store(self.0.now(), Ordering::Relaxed);
        self.0.head_since.store(0, Ordering::Relaxed);
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that records its traffic in an [`Activity`].
pub(super) struct Watched<S> {
    stream: S,
    activity: Arc<Activity>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, activity: Arc<Activity>) -> Self {
        Self { stream, activity }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.activity.has_read();
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.activity.has_written(outcome.is_pending());
        outcome
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.activity.has_written(outcome.is_pending());
        outcome
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A response body that counts its request as being answered until it is sent.
pub(super) struct TrackedBody {
    body: Body,
    unanswered: Unanswered,
    _guard: RequestGuard,
    _permit: Option<OriginPermit>,
}

impl TrackedBody {
    pub(super) fn new(
        body: Body,
        guard: RequestGuard,
        permit: Option<OriginPermit>,
        mut unanswered: Unanswered,
    ) -> Self {
        // Nobody polls a body that has ended.
        if http_body::Body::is_end_stream(&body) {
            unanswered.answered();
        }
        Self { body, unanswered, _guard: guard, _permit: permit }
    }
}

impl http_body::Body for TrackedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(None)) || http_body::Body::is_end_stream(&self.body) {
            self.unanswered.answered();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUTS: ConnectionTimeouts = ConnectionTimeouts {
        head: Duration::from_secs(10),
        idle: Duration::from_secs(75),
        write: Duration::from_mins(1),
    };

    fn judged(facts: Facts, now_secs: u64) -> Option<&'static str> {
        match judge(facts, TIMEOUTS, now_secs * 1000) {
            Watch::Close(reason) => Some(reason),
            Watch::Wait(wait) => {
                assert!(wait > Duration::ZERO && wait <= TIMEOUTS.shortest());
                None
            }
        }
    }

    #[test]
    fn each_way_of_being_slow_has_its_own_limit() {
        let head = Facts { idle_since: 1, head_since: 1, ..Facts::default() };
        assert_eq!((judged(head, 9), judged(head, 11)), (None, Some("the head takes too long")));
        let idle = Facts { idle_since: 1, ..Facts::default() };
        assert_eq!((judged(idle, 74), judged(idle, 76)), (None, Some("idle")));
        let blocked = Facts { requests: 1, blocked_since: 1, ..Facts::default() };
        assert_eq!((judged(blocked, 59), judged(blocked, 61)), (None, Some("the answer is not read")));
    }

    #[test]
    fn a_request_under_way_is_neither_idle_nor_a_slow_head() {
        let busy = Facts { requests: 1, idle_since: 1, head_since: 1, ..Facts::default() };
        assert_eq!(judged(busy, 10_000), None);
    }

    #[test]
    fn what_http2_says_between_requests_is_no_head() {
        let facts = Facts { idle_since: 60_000, head_since: 60_000, http2: true, ..Facts::default() };
        assert_eq!(judged(facts, 100), None);
        assert_eq!(judged(facts, 136), Some("idle"));
    }
}

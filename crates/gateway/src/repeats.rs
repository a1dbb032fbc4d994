//! Finds the requests that repeat an earlier one: by a key of the client, or because an official SDK tries again.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use protocol::{Digest, ErrorCode, RetryToken, TenantId, WireError};
use tokio::time::Instant;

/// How long a job goes on for an SDK whose connection was lost. By default, official SDKs wait for up to 1 s before a
/// try.
pub(crate) const SDK_LINGER: Duration = Duration::from_secs(2);
/// How soon after the end of a connection an SDK tries again, at most.
const RETRIED_WITHIN: Duration = Duration::from_secs(10);
/// How long a request of an SDK is remembered. By default, SDKs wait for an answer for as long.
const REMEMBERED: Duration = Duration::from_mins(10);
/// The most requests of SDKs that are remembered.
const REMEMBERED_MAX: usize = 4096;

/// What a request says of repeats.
#[derive(Debug, Default)]
pub(crate) struct Repeat {
    /// The retry token that stands for the client's `Idempotency-Key`.
    pub(crate) key: Option<RetryToken>,
    /// An official SDK sent it, and repeats it if it gets no answer.
    pub(crate) sdk: Option<SdkCall>,
}

impl Repeat {
    /// Names the header in an error about its key.
    pub(crate) fn name_key(&self, mut error: WireError) -> WireError {
        if error.code == ErrorCode::IdempotencyKeyReused && self.key.is_some() {
            error.param = Some("Idempotency-Key".to_owned());
        }
        error
    }
}

/// A request of an official SDK.
#[derive(Debug)]
pub(crate) struct SdkCall {
    /// Whether the SDK says that it tries again.
    pub(crate) is_retry: bool,
    /// When its connection ended.
    pub(crate) connection: ConnectionEnd,
}

/// When a connection ended, or a request on one that carries several.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConnectionEnd {
    ended_at: Arc<OnceLock<Instant>>,
    /// The connection that carries the request.
    connection: Option<Arc<OnceLock<Instant>>>,
}

impl ConnectionEnd {
    /// Returns the end of a request that its client can take back without closing the connection (HTTP/2).
    pub(crate) fn of_stream(&self) -> Self {
        Self { ended_at: Arc::default(), connection: Some(self.ended_at.clone()) }
    }

    /// Records that the connection ends now, or that the client takes the request back.
    pub(crate) fn record(&self) {
        let _ = self.ended_at.set(Instant::now());
    }

    /// Records that the connection ends when the guard is dropped.
    pub(crate) fn guard(&self) -> ConnectionGuard {
        ConnectionGuard(self.clone())
    }

    fn is_within(&self, time: Duration, now: Instant) -> bool {
        let ends = [Some(&self.ended_at), self.connection.as_ref()].into_iter().flatten();
        let first = ends.filter_map(|end| end.get()).min();
        first.is_some_and(|ended_at| now.duration_since(*ended_at) <= time)
    }
}

/// Records the end of a connection when it is dropped.
pub(crate) struct ConnectionGuard(ConnectionEnd);

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.0.record();
    }
}

/// The last requests of SDKs, so that their retries are recognised: of the same tenant, with the same content, and only
/// shortly after the first one's connection ended. Equal requests beside each other are not retries.
#[derive(Default)]
pub(crate) struct SdkRequests {
    requests: Mutex<VecDeque<Remembered>>,
}

struct Remembered {
    tenant_id: TenantId,
    content: Digest,
    token: RetryToken,
    connection: ConnectionEnd,
    until: Instant,
}

impl SdkRequests {
    /// Remembers a request and returns its token: that of the request it repeats, or else `new`.
    pub(crate) fn token(&self, tenant_id: &TenantId, content: Digest, call: &SdkCall, new: RetryToken) -> RetryToken {
        let now = Instant::now();
        let mut requests = self.requests.lock();
        while requests.front().is_some_and(|oldest| oldest.until <= now || requests.len() >= REMEMBERED_MAX) {
            requests.pop_front();
        }
        let is_first = |known: &Remembered| {
            let is_gone = known.connection.is_within(RETRIED_WITHIN, now);
            is_gone && known.content == content && known.tenant_id == *tenant_id
        };
        let first = call.is_retry.then(|| requests.iter().rposition(is_first)).flatten();
        let token = first.and_then(|first| requests.remove(first)).map_or(new, |first| first.token);
        requests.push_back(Remembered {
            tenant_id: tenant_id.clone(),
            content,
            token: token.clone(),
            connection: call.connection.clone(),
            until: now + REMEMBERED,
        });
        token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scene {
        requests: SdkRequests,
        sent: u32,
    }

    impl Scene {
        fn send(&mut self, tenant: &str, content: &str, call: &SdkCall) -> String {
            self.sent += 1;
            let (tenant, new) = (tenant.parse().expect("tenant"), self.sent.to_string().parse().expect("token"));
            self.requests.token(&tenant, Digest::of(content.as_bytes()), call, new).as_str().to_owned()
        }
    }

    fn call(is_retry: bool) -> SdkCall {
        SdkCall { is_retry, connection: ConnectionEnd::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_is_recognised_once_the_first_connection_is_gone() {
        let mut scene = Scene { requests: SdkRequests::default(), sent: 0 };
        let (first, other) = (call(false), call(false));
        assert_eq!(scene.send("acme", "x", &first), "1");
        assert_eq!(scene.send("acme", "x", &call(true)), "2", "the first connection is there");
        assert_eq!(scene.send("acme", "y", &other), "3");
        drop(first.connection.guard());
        drop(other.connection.guard());
        assert_eq!(scene.send("acme", "x", &call(false)), "4", "it says that it is no retry");
        assert_eq!(scene.send("evil", "x", &call(true)), "5", "another tenant");
        let second = call(true);
        assert_eq!(scene.send("acme", "x", &second), "1");
        assert_eq!(scene.send("acme", "x", &call(true)), "7", "one retry of each request at a time");
        drop(second.connection.guard());
        assert_eq!(scene.send("acme", "x", &call(true)), "1", "the second retry");
        assert_eq!(scene.send("acme", "y", &call(true)), "3");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_by_itself_or_with_its_connection() {
        let mut scene = Scene { requests: SdkRequests::default(), sent: 0 };
        let connection = ConnectionEnd::default();
        let stream = || SdkCall { is_retry: false, connection: connection.of_stream() };
        let (reset, other) = (stream(), stream());
        assert_eq!((scene.send("acme", "x", &reset), scene.send("acme", "y", &other)), ("1".into(), "2".into()));
        reset.connection.record();
        assert_eq!(scene.send("acme", "x", &call(true)), "1");
        assert_eq!(scene.send("acme", "y", &call(true)), "4", "the other stream goes on");
        drop(connection.guard());
        assert_eq!(scene.send("acme", "y", &call(true)), "2");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_ended_long_ago_is_not_repeated() {
        let mut scene = Scene { requests: SdkRequests::default(), sent: 0 };
        let (old, new) = (call(false), call(false));
        for call in [&old, &new] {
            scene.send("acme", "x", call);
            drop(call.connection.guard());
            tokio::time::advance(RETRIED_WITHIN).await;
        }
        assert_eq!(scene.send("acme", "x", &call(true)), "2", "the latest counts");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(scene.send("acme", "x", &call(true)), "4");
    }

    #[tokio::test(start_paused = true)]
    async fn few_requests_are_remembered_and_not_for_long() {
        let mut scene = Scene { requests: SdkRequests::default(), sent: 0 };
        let gone = call(false);
        drop(gone.connection.guard());
        for _ in 0..2 * REMEMBERED_MAX {
            scene.send("acme", "x", &gone);
        }
        assert_eq!(scene.requests.requests.lock().len(), REMEMBERED_MAX);
        tokio::time::advance(REMEMBERED).await;
        let sent = scene.sent + 1;
        assert_eq!(scene.send("acme", "x", &call(true)), sent.to_string());
        assert_eq!(scene.requests.requests.lock().len(), 1);
    }
}

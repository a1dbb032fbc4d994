//! Limits how many requests a client may start and take back (the HTTP/2 rapid reset attack, CVE-2023-44487).

use std::sync::Arc;

use rpc::rate_limit::{Quota, RateLimit};
use tokio_util::sync::CancellationToken;

use crate::repeats::ConnectionEnd;
use crate::request_context::Origin;

/// Requests that an address may take back before their answer is sent. Clients that give up an answer stay far below.
const RESETS: Quota = Quota { burst: 500, per_minute: 600 };

/// Counts the requests that each address took back before their answer was sent. Clones share the counts.
#[derive(Clone)]
pub(super) struct ResetLimit {
    resets: Arc<RateLimit<Origin>>,
}

/// A request that counts as taken back if this is dropped before [`Unanswered::answered`].
pub(super) struct Unanswered {
    limit: ResetLimit,
    origin: Option<Origin>,
    excess: CancellationToken,
    end: ConnectionEnd,
}

impl ResetLimit {
    pub(super) fn new() -> Self {
        Self { resets: Arc::new(RateLimit::new()) }
    }

    /// Watches a request. If it is taken back, its end is recorded, and if it is one too many, `excess` is cancelled.
    pub(super) fn watch(&self, origin: Origin, excess: CancellationToken, end: ConnectionEnd) -> Unanswered {
        Unanswered { limit: self.clone(), origin: Some(origin), excess, end }
    }
}

impl Unanswered {
    /// Counts the request as answered.
    pub(super) fn answered(&mut self) {
        self.origin = None;
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        let Some(origin) = self.origin else { return };
        self.end.record();
        if !self.limit.resets.take(origin, RESETS).allowed {
            self.excess.cancel();
        }
    }
}

//! One model on one server: its load from this node, and its counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::dialect::Dialect;
use super::http_client::ServerAddress;
use crate::model_runtime::{Counters, EngineError, LoadSnapshot, LoadedModel, TokenUsage};

/// The weight of one answer's speed in the moving average.
const SPEED_WEIGHT: f32 = 0.2;

/// A model on a server.
#[derive(Debug)]
pub(super) struct Attached {
    /// The description that its caller received.
    pub(super) loaded: LoadedModel,
    pub(super) server: ServerAddress,
    /// Its name on the server.
    pub(super) name: String,
    pub(super) dialect: Dialect,
    /// Requests that may wait in addition to those in its slots.
    pub(super) queue_max: u32,
    /// Cancelled when the model is unloaded.
    pub(super) unloaded: CancellationToken,
    active: AtomicU32,
    done: Mutex<Done>,
}

#[derive(Debug, Default)]
struct Done {
    counters: Counters,
    tokens_per_second: f32,
}

/// A request's permit, which is released on drop.
#[derive(Debug)]
pub(super) struct RequestPermit(pub(super) Arc<Attached>);

impl Attached {
    pub(super) fn new(
        loaded: LoadedModel,
        server: ServerAddress,
        name: String,
        dialect: Dialect,
        queue_max: u32,
        unloaded: CancellationToken,
    ) -> Self {
        let (active, done) = (AtomicU32::new(0), Mutex::default());
        Self { loaded, server, name, dialect, queue_max, unloaded, active, done }
    }

    /// Takes a permit for one more request.
    pub(super) fn enter(self: &Arc<Self>) -> Result<RequestPermit, EngineError> {
        let most = self.loaded.slots.saturating_add(self.queue_max);
        let one_more = |active: u32| (active < most).then_some(active + 1);
        let entered = self.active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        entered.map(|_| RequestPermit(self.clone())).map_err(|_| EngineError::Busy)
    }

    /// Returns its load and counters.
    pub(super) fn snapshot(&self) -> LoadSnapshot {
        let active = self.active.load(Ordering::Relaxed);
        let done = self.done.lock();
        LoadSnapshot {
            model: self.loaded.id,
            slots: self.loaded.slots,
            running: active.min(self.loaded.slots),
            waiting: active.saturating_sub(self.loaded.slots),
            kv_usage: 0.0,
            tokens_per_second: done.tokens_per_second,
            counters: done.counters,
            beats: 0,
        }
    }
}

impl RequestPermit {
    /// Counts a completed answer that ended `within` this time after its first piece.
    pub(super) fn count(&self, usage: TokenUsage, within: Duration) {
        let mut done = self.0.done.lock();
        let counters = &mut done.counters;
        counters.prompt_tokens += u64::from(usage.prompt_tokens.saturating_sub(usage.cached_tokens));
        counters.generated_tokens += u64::from(usage.completion_tokens);
        counters.prefix_queries += u64::from(usage.prompt_tokens);
        counters.prefix_hits += u64::from(usage.cached_tokens);
        counters.completed += 1;
        // The time of the first token belongs to prefill.
        let speed = usage.completion_tokens.saturating_sub(1) as f32 / within.as_secs_f32();
        if speed.is_finite() && speed > 0.0 {
            let before = done.tokens_per_second;
            done.tokens_per_second = if before == 0.0 { speed } else { before + SPEED_WEIGHT * (speed - before) };
        }
    }

    /// Counts an answer whose reader is gone.
    pub(super) fn count_cancelled(&self) {
        self.0.done.lock().counters.cancelled += 1;
    }
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

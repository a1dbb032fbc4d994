//! Updates the metrics and writes the log line of each request, exactly once, however it ends.

use std::time::Duration;

use observability::metrics::{ModelLabel, ReasonLabel};
use prometheus_client::metrics::histogram::Histogram;
use protocol::infer::FinishReason;
use protocol::model::ModelEntry;
use protocol::policy::ServiceClass;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, TraceId};
use tokio::time::Instant;
use tracing::info;

use crate::metrics::{Metrics, RequestLabel, TenantClassLabel};

/// A request under way. Dropping it counts and logs the request, as cancelled unless an outcome was set.
pub(crate) struct RequestRecord {
    metrics: Metrics,
    started: Instant,
    pub(crate) correlation_id: CorrelationId,
    pub(crate) trace_id: TraceId,
    /// How urgent the request is, once it was read.
    pub(crate) class: Option<ServiceClass>,
    key_id: String,
    /// Empty until the model is known to be in the catalogue, so that labels stay bounded.
    model: String,
    outcome: &'static str,
    finish_reason: &'static str,
    first_piece: Option<Duration>,
    last_piece: Option<Instant>,
    inter_token_latency: Option<Histogram>,
    /// Whether an earlier request began the answer. It uses no more tokens, and its speed says nothing of the network.
    is_replay: bool,
    /// Tokens used so far, also for answers that were cancelled or broke off.
    usage: TokenUsage,
}

impl RequestRecord {
    pub(crate) fn new(metrics: Metrics, started: Instant, correlation_id: CorrelationId, trace_id: TraceId) -> Self {
        Self {
            metrics,
            started,
            correlation_id,
            trace_id,
            class: None,
            key_id: String::new(),
            model: String::new(),
            outcome: "cancelled",
            finish_reason: "",
            first_piece: None,
            last_piece: None,
            inter_token_latency: None,
            is_replay: false,
            usage: TokenUsage::default(),
        }
    }

    pub(crate) fn replays(&mut self) {
        self.is_replay = true;
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    pub(crate) fn first_piece(&self) -> Option<Duration> {
        self.first_piece
    }

    pub(crate) fn of_key(&mut self, key_id: &str) {
        key_id.clone_into(&mut self.key_id);
    }

    pub(crate) fn of_model(&mut self, entry: &ModelEntry) {
        entry.key.model_id.as_str().clone_into(&mut self.model);
    }

    /// Records a piece's usage, except for the completion tokens, which are counted as they arrive.
    pub(crate) fn prompt(&mut self, usage: TokenUsage) {
        if !self.is_replay {
            self.usage = TokenUsage { completion_tokens: self.usage.completion_tokens, ..usage };
        }
    }

    /// Records the arrival of `count` tokens.
    pub(crate) fn tokens(&mut self, count: u32) {
        if !self.is_replay {
            self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(count);
        }
    }

    /// Records the arrival of content, for the latency metrics.
    pub(crate) fn piece(&mut self) {
        if self.is_replay {
            return;
        }
        let now = Instant::now();
        match self.last_piece.replace(now) {
            None => {
                let wait = now - self.started;
                self.first_piece = Some(wait);
                let label = ModelLabel { model: self.model.clone() };
                self.metrics.time_to_first_token.get_or_create(&label).observe(wait.as_secs_f64());
                // Looked up once: this is observed for every piece.
                self.inter_token_latency = Some(self.metrics.inter_token_latency.get_or_create(&label).clone());
            }
            Some(last) => {
                if let Some(histogram) = &self.inter_token_latency {
                    histogram.observe((now - last).as_secs_f64());
                }
            }
        }
    }

    pub(crate) fn completed(&mut self, reason: FinishReason, usage: TokenUsage) {
        self.finish_reason = reason.as_str();
        if self.is_replay {
            self.outcome = "replayed";
        } else {
            self.outcome = "completed";
            self.usage = usage;
        }
    }

    /// Records a request for something that is kept, which uses no tokens.
    pub(crate) fn answered(&mut self) {
        self.outcome = "answered";
        self.is_replay = true;
    }

    /// Records that a job runs on without its client.
    pub(crate) fn accepted(&mut self) {
        self.outcome = "accepted";
        self.is_replay = true;
    }

    pub(crate) fn failed(&mut self, code: ErrorCode) {
        self.outcome = code.as_str();
        match code {
            ErrorCode::RateLimitExceeded | ErrorCode::InsufficientQuota => {
                let tenant_class = self.class.map_or("unknown", ServiceClass::as_str);
                self.metrics.throttled.get_or_create(&TenantClassLabel { tenant_class }).inc();
            }
            ErrorCode::NoCapacity | ErrorCode::BreakerOpen | ErrorCode::ModelLoading | ErrorCode::Unavailable => {
                self.metrics.shed.get_or_create(&ReasonLabel { reason: code.as_str() }).inc();
            }
            _ => {}
        }
    }
}

/// Returns the tokens per second, rounded to one decimal. Returns `None` if there are fewer than two tokens or no time
/// between them.
fn tokens_per_second(tokens: u32, took: Duration) -> Option<f64> {
    let per_second = f64::from(tokens.checked_sub(1)?) / took.as_secs_f64();
    (per_second.is_finite() && per_second > 0.0).then(|| (per_second * 10.0).round() / 10.0)
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let model = if self.model.is_empty() { "unknown".to_owned() } else { std::mem::take(&mut self.model) };
        let generating =
            self.first_piece.zip(self.last_piece).map(|(first, last)| last.duration_since(self.started + first));
        let tokens_per_second = generating.and_then(|took| tokens_per_second(self.usage.completion_tokens, took));
        let first_ms = self.first_piece.map(|wait| wait.as_millis() as u64);
        info!(
            correlation_id = %self.correlation_id,
            trace_id = %self.trace_id,
            key_id = self.key_id,
            model,
            outcome = self.outcome,
            ms = took.as_millis() as u64,
            first_ms,
            prompt_tokens = self.usage.prompt_tokens,
            cached_tokens = self.usage.cached_tokens,
            completion_tokens = self.usage.completion_tokens,
            tokens_per_second,
            "request"
        );
        let label = RequestLabel { model, outcome: self.outcome, finish_reason: self.finish_reason };
        self.metrics.requests.get_or_create(&label).inc();
        if !self.is_replay {
            self.metrics.request_duration.get_or_create(&ModelLabel { model: label.model }).observe(took.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use observability::metrics::Shed;
    use prometheus_client::registry::Registry;

    use super::*;

    fn record() -> RequestRecord {
        let correlation_id = CorrelationId(uuid::Uuid::from_u128(1));
        let metrics = Metrics::register(&mut Registry::default(), Shed::default());
        RequestRecord::new(metrics, Instant::now(), correlation_id, TraceId([1; 16]))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_cancelled_took_what_came_of_it() {
        let mut record = record();
        record.prompt(TokenUsage { prompt_tokens: 7, completion_tokens: 0, cached_tokens: 3, reasoning_tokens: 0 });
        record.tokens(2);
        record.tokens(1);
        assert_eq!(
            record.usage,
            TokenUsage { prompt_tokens: 7, completion_tokens: 3, cached_tokens: 3, reasoning_tokens: 0 }
        );
        assert_eq!(record.outcome, "cancelled");
        let whole = TokenUsage { prompt_tokens: 7, completion_tokens: 4, cached_tokens: 3, reasoning_tokens: 0 };
        record.completed(FinishReason::Stop, whole);
        assert_eq!((record.usage, record.outcome), (whole, "completed"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_sent_again_uses_no_tokens() {
        let mut record = record();
        record.replays();
        record.tokens(2);
        record.piece();
        record.completed(FinishReason::Stop, TokenUsage { prompt_tokens: 7, ..TokenUsage::default() });
        assert_eq!((record.usage, record.outcome, record.first_piece), (TokenUsage::default(), "replayed", None));
    }

    #[test]
    fn speed_is_measured_between_the_first_token_and_the_last() {
        let second = Duration::from_secs(1);
        assert_eq!(tokens_per_second(0, second), None);
        assert_eq!(tokens_per_second(1, second), None);
        assert_eq!(tokens_per_second(4, Duration::ZERO), None);
        assert_eq!(tokens_per_second(4, second * 9), Some(0.3));
        assert_eq!(tokens_per_second(101, second), Some(100.0));
    }
}

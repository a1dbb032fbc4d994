//! What is counted and logged of a request, once, however it ends.

use std::time::Duration;

use observability::Metrics;
use observability::metrics::{ModelLabel, ReasonLabel, RequestLabel};
use prometheus_client::metrics::histogram::Histogram;
use protocol::model::ModelEntry;
use protocol::{CorrelationId, ErrorCode, TraceId};
use tokio::time::Instant;
use tracing::info;

use crate::answer::End;

/// A request under way. Dropping it counts and logs it: as cancelled, unless an end was noted.
pub(crate) struct RequestRecord {
    metrics: Metrics,
    started: Instant,
    pub(crate) correlation_id: CorrelationId,
    pub(crate) trace_id: TraceId,
    key_id: String,
    /// Empty until the model is known to be in the catalogue, so that labels stay bounded.
    model: String,
    outcome: &'static str,
    finish_reason: &'static str,
    first_piece: Option<Duration>,
    last_piece: Option<Instant>,
    inter_token_latency: Option<Histogram>,
    completion_tokens: u32,
}

impl RequestRecord {
    pub(crate) fn new(metrics: Metrics, started: Instant, correlation_id: CorrelationId, trace_id: TraceId) -> Self {
        Self {
            metrics,
            started,
            correlation_id,
            trace_id,
            key_id: String::new(),
            model: String::new(),
            outcome: "cancelled",
            finish_reason: "",
            first_piece: None,
            last_piece: None,
            inter_token_latency: None,
            completion_tokens: 0,
        }
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    pub(crate) fn of_key(&mut self, key_id: &str) {
        key_id.clone_into(&mut self.key_id);
    }

    pub(crate) fn of_model(&mut self, entry: &ModelEntry) {
        entry.key.model_id.as_str().clone_into(&mut self.model);
    }

    /// Notes that text arrived.
    pub(crate) fn piece(&mut self) {
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

    pub(crate) fn completed(&mut self, end: &End) {
        self.outcome = "completed";
        self.finish_reason = end.reason.as_str();
        self.completion_tokens = end.usage.completion_tokens;
    }

    pub(crate) fn failed(&mut self, code: ErrorCode) {
        self.outcome = code.as_str();
        match code {
            ErrorCode::RateLimitExceeded => {
                self.metrics.throttled.inc();
            }
            ErrorCode::NoCapacity | ErrorCode::BreakerOpen | ErrorCode::ModelLoading | ErrorCode::Unavailable => {
                self.metrics.shed.get_or_create(&ReasonLabel { reason: code.as_str() }).inc();
            }
            _ => {}
        }
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let model = if self.model.is_empty() { "unknown".to_owned() } else { std::mem::take(&mut self.model) };
        let first_ms = self.first_piece.map(|wait| wait.as_millis() as u64);
        info!(
            correlation_id = %self.correlation_id,
            trace_id = %self.trace_id,
            key_id = self.key_id,
            model,
            outcome = self.outcome,
            ms = took.as_millis() as u64,
            first_ms,
            completion_tokens = self.completion_tokens,
            "request"
        );
        let label = RequestLabel { model, outcome: self.outcome, finish_reason: self.finish_reason };
        self.metrics.requests.get_or_create(&label).inc();
        self.metrics.request_duration.get_or_create(&ModelLabel { model: label.model }).observe(took.as_secs_f64());
    }
}

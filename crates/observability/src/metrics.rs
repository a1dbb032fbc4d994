//! All metrics of the program, in one registry.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::metric_names as names;

/// A gauge with a fractional value.
pub type Ratio = Gauge<f64, AtomicU64>;

/// Labels of one model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModelLabel {
    pub model: String,
}

/// Labels of a finished request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabel {
    /// The model asked for; `unknown` where it is not in the catalogue, to keep the labels bounded.
    pub model: String,
    /// `completed`, `cancelled`, or an error's code.
    pub outcome: &'static str,
    /// `stop`, `length` or nothing.
    pub finish_reason: &'static str,
}

/// Labels of a circuit breaker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BreakerLabel {
    pub model: String,
    pub region: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    pub reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PhaseLabel {
    /// `pre_token` or `mid_stream`.
    pub phase: &'static str,
}

/// All metrics of the program. Clones share them: services update them, and the gateway exposes them.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<parking_lot::Mutex<Registry>>,
    pub requests_running: Family<ModelLabel, Gauge>,
    pub requests_waiting: Family<ModelLabel, Gauge>,
    pub kv_cache_usage: Family<ModelLabel, Ratio>,
    pub decode_steps: Family<ModelLabel, Counter>,
    pub engine_cancelled: Family<ModelLabel, Counter>,
    pub engine_deaths: Family<ModelLabel, Counter>,
    pub prompt_tokens: Family<ModelLabel, Counter>,
    pub generation_tokens: Family<ModelLabel, Counter>,
    pub prefix_cache_queries: Family<ModelLabel, Counter>,
    pub prefix_cache_hits: Family<ModelLabel, Counter>,
    pub drafted_tokens: Family<ModelLabel, Counter>,
    pub accepted_tokens: Family<ModelLabel, Counter>,
    pub requests: Family<RequestLabel, Counter>,
    pub time_to_first_token: Family<ModelLabel, Histogram>,
    pub inter_token_latency: Family<ModelLabel, Histogram>,
    pub request_duration: Family<ModelLabel, Histogram>,
    pub breaker_state: Family<BreakerLabel, Gauge>,
    pub breaker_transitions: Family<BreakerLabel, Counter>,
    pub retries: Family<ReasonLabel, Counter>,
    pub retries_exhausted: Counter,
    pub failovers: Family<PhaseLabel, Counter>,
    pub shed: Family<ReasonLabel, Counter>,
    pub throttled: Counter,
    pub reservations_active: Gauge,
    pub presence_rejected: Family<ReasonLabel, Counter>,
    pub workers_live: Gauge,
    pub workers_loading: Gauge,
    pub registry_silence: Ratio,
    pub artifact_verify_failures: Counter,
}

/// Bucket bounds in seconds, as in vLLM's time to first token.
const FIRST_TOKEN_BUCKETS: [f64; 19] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 80.0, 2560.0];
/// Bucket bounds in seconds, as in vLLM's time between tokens.
const INTER_TOKEN_BUCKETS: [f64; 13] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5];
/// Bucket bounds of a request's duration in seconds, doubling as in the OpenTelemetry GenAI conventions.
const DURATION_BUCKETS: [f64; 14] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];

impl Metrics {
    /// Creates the registry and registers every metric.
    pub fn new() -> Self {
        let metrics = Self {
            registry: Arc::default(),
            requests_running: Family::default(),
            requests_waiting: Family::default(),
            kv_cache_usage: Family::default(),
            decode_steps: Family::default(),
            engine_cancelled: Family::default(),
            engine_deaths: Family::default(),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
            prefix_cache_queries: Family::default(),
            prefix_cache_hits: Family::default(),
            drafted_tokens: Family::default(),
            accepted_tokens: Family::default(),
            requests: Family::default(),
            time_to_first_token: Family::new_with_constructor(|| Histogram::new(FIRST_TOKEN_BUCKETS)),
            inter_token_latency: Family::new_with_constructor(|| Histogram::new(INTER_TOKEN_BUCKETS)),
            request_duration: Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS)),
            breaker_state: Family::default(),
            breaker_transitions: Family::default(),
            retries: Family::default(),
            retries_exhausted: Counter::default(),
            failovers: Family::default(),
            shed: Family::default(),
            throttled: Counter::default(),
            reservations_active: Gauge::default(),
            presence_rejected: Family::default(),
            workers_live: Gauge::default(),
            workers_loading: Gauge::default(),
            registry_silence: Ratio::default(),
            artifact_verify_failures: Counter::default(),
        };
        metrics.register();
        metrics
    }

    #[rustfmt::skip] // One line per metric.
    fn register(&self) {
        let mut registry = self.registry.lock();
        let registry = &mut *registry;
        registry.register(names::REQUESTS_RUNNING, "Running requests", self.requests_running.clone());
        registry.register(names::REQUESTS_WAITING, "Requests in the queues of workers", self.requests_waiting.clone());
        registry.register(names::KV_CACHE_USAGE, "Fraction of the KV cache in use", self.kv_cache_usage.clone());
        registry.register(names::DECODE_STEPS, "Decode steps of the engines", self.decode_steps.clone());
        registry.register(names::ENGINE_CANCELLED, "Generations cancelled by their caller", self.engine_cancelled.clone());
        registry.register(names::ENGINE_DEATHS, "Engine processes that died", self.engine_deaths.clone());
        registry.register(names::PROMPT_TOKENS, "Prompt tokens evaluated", self.prompt_tokens.clone());
        registry.register(names::GENERATION_TOKENS, "Tokens generated", self.generation_tokens.clone());
        registry.register(names::PREFIX_CACHE_QUERIES, "Prompt tokens looked up in the prefix cache", self.prefix_cache_queries.clone());
        registry.register(names::PREFIX_CACHE_HITS, "Prompt tokens found in the prefix cache", self.prefix_cache_hits.clone());
        registry.register(names::DRAFTED_TOKENS, "Draft tokens (speculative decoding)", self.drafted_tokens.clone());
        registry.register(names::ACCEPTED_TOKENS, "Draft tokens that were accepted", self.accepted_tokens.clone());
        registry.register(names::REQUESTS, "Finished requests", self.requests.clone());
        registry.register(names::TIME_TO_FIRST_TOKEN, "Seconds from the request to its first token", self.time_to_first_token.clone());
        registry.register(names::INTER_TOKEN_LATENCY, "Seconds between chunks of an answer", self.inter_token_latency.clone());
        registry.register(names::REQUEST_DURATION, "Seconds from the request to its end", self.request_duration.clone());
        registry.register(names::BREAKER_STATE, "0 closed, 1 open, 2 half-open", self.breaker_state.clone());
        registry.register(names::BREAKER_TRANSITIONS, "State transitions of circuit breakers", self.breaker_transitions.clone());
        registry.register(names::RETRIES, "Attempts after the first", self.retries.clone());
        registry.register(names::RETRIES_EXHAUSTED, "Jobs whose attempts were exhausted", self.retries_exhausted.clone());
        registry.register(names::FAILOVERS, "Jobs that went to another worker", self.failovers.clone());
        registry.register(names::SHED, "Requests refused for lack of capacity", self.shed.clone());
        registry.register(names::THROTTLED, "Requests refused by a rate limit", self.throttled.clone());
        registry.register(names::RESERVATIONS_ACTIVE, "Reservations held", self.reservations_active.clone());
        registry.register(names::PRESENCE_REJECTED, "Rejected health reports", self.presence_rejected.clone());
        registry.register(names::WORKERS_LIVE, "Live workers", self.workers_live.clone());
        registry.register(names::WORKERS_LOADING, "Live workers that are loading a model", self.workers_loading.clone());
        registry.register(names::REGISTRY_SILENCE, "Seconds since a registry last answered this gateway", self.registry_silence.clone());
        registry.register(names::ARTIFACT_VERIFY_FAILURES, "Artifacts whose bytes do not match their digest", self.artifact_verify_failures.clone());
    }

    /// Adds metrics that are collected only when they are exposed.
    pub fn register_collector(&self, collector: Box<dyn Collector>) {
        self.registry.lock().register_collector(collector);
    }

    /// Encodes all metrics in the OpenMetrics 1.0 text format, which Prometheus scrapes.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("writing to a string does not fail");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Metrics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown_under_its_conventional_name() {
        let metrics = Metrics::new();
        let label = RequestLabel { model: "tether-tiny".into(), outcome: "completed", finish_reason: "stop" };
        metrics.requests.get_or_create(&label).inc();
        let text = metrics.encode();
        let line = "tether_requests_total{model=\"tether-tiny\",outcome=\"completed\",finish_reason=\"stop\"} 1";
        assert!(text.contains(line), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}

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
    pub artifact_verify_failures: Counter,
    pub shed: Family<ReasonLabel, Counter>,
    pub requests: Family<RequestLabel, Counter>,
    pub time_to_first_token: Family<ModelLabel, Histogram>,
    pub inter_token_latency: Family<ModelLabel, Histogram>,
    pub request_duration: Family<ModelLabel, Histogram>,
    pub throttled: Counter,
    pub registry_silence: Ratio,
    pub breaker_state: Family<BreakerLabel, Gauge>,
    pub breaker_transitions: Family<BreakerLabel, Counter>,
    pub retries: Family<ReasonLabel, Counter>,
    pub retries_exhausted: Counter,
    pub failovers: Family<PhaseLabel, Counter>,
    pub reservations_active: Gauge,
    pub presence_rejected: Family<ReasonLabel, Counter>,
    pub workers_live: Gauge,
    pub workers_loading: Gauge,
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
            artifact_verify_failures: Counter::default(),
            shed: Family::default(),
            requests: Family::default(),
            time_to_first_token: Family::new_with_constructor(|| Histogram::new(FIRST_TOKEN_BUCKETS)),
            inter_token_latency: Family::new_with_constructor(|| Histogram::new(INTER_TOKEN_BUCKETS)),
            request_duration: Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS)),
            throttled: Counter::default(),
            registry_silence: Ratio::default(),
            breaker_state: Family::default(),
            breaker_transitions: Family::default(),
            retries: Family::default(),
            retries_exhausted: Counter::default(),
            failovers: Family::default(),
            reservations_active: Gauge::default(),
            presence_rejected: Family::default(),
            workers_live: Gauge::default(),
            workers_loading: Gauge::default(),
        };
        metrics.register();
        metrics
    }

    /// Names and help texts of all metrics. Dashboards and alerts rely on the names; counters end in `_total` when
    /// exported.
    #[rustfmt::skip] // One line per metric.
    fn register(&self) {
        let mut registry = self.registry.lock();
        let registry = &mut *registry;
        registry.register("tether_worker_requests_running", "Running requests", self.requests_running.clone());
        registry.register("tether_worker_requests_waiting", "Requests in the queues of workers", self.requests_waiting.clone());
        registry.register("tether_worker_kv_cache_usage_ratio", "Fraction of the KV cache in use", self.kv_cache_usage.clone());
        registry.register("tether_engine_decode_steps", "Decode steps of the engines", self.decode_steps.clone());
        registry.register("tether_engine_cancelled", "Generations cancelled by their caller", self.engine_cancelled.clone());
        registry.register("tether_engine_deaths", "Engine processes that died", self.engine_deaths.clone());
        registry.register("tether_prompt_tokens", "Prompt tokens evaluated", self.prompt_tokens.clone());
        registry.register("tether_generation_tokens", "Tokens generated", self.generation_tokens.clone());
        registry.register("tether_prefix_cache_queries", "Prompt tokens looked up in the prefix cache", self.prefix_cache_queries.clone());
        registry.register("tether_prefix_cache_hits", "Prompt tokens found in the prefix cache", self.prefix_cache_hits.clone());
        registry.register("tether_engine_drafted_tokens", "Draft tokens (speculative decoding)", self.drafted_tokens.clone());
        registry.register("tether_engine_accepted_tokens", "Draft tokens that were accepted", self.accepted_tokens.clone());
        registry.register("tether_artifact_verify_failures", "Artifacts whose bytes do not match their digest", self.artifact_verify_failures.clone());
        registry.register("tether_shed", "Requests refused for lack of capacity", self.shed.clone());
        registry.register("tether_requests", "Finished requests", self.requests.clone());
        registry.register("tether_time_to_first_token_seconds", "Seconds from the request to its first token", self.time_to_first_token.clone());
        registry.register("tether_inter_token_latency_seconds", "Seconds between chunks of an answer", self.inter_token_latency.clone());
        registry.register("tether_request_duration_seconds", "Seconds from the request to its end", self.request_duration.clone());
        registry.register("tether_throttled", "Requests refused by a rate limit", self.throttled.clone());
        registry.register("tether_registry_silence_seconds", "Seconds since a registry last answered this gateway", self.registry_silence.clone());
        registry.register("tether_breaker_state", "0 closed, 1 open, 2 half-open", self.breaker_state.clone());
        registry.register("tether_breaker_transitions", "State transitions of circuit breakers", self.breaker_transitions.clone());
        registry.register("tether_retries", "Attempts after the first", self.retries.clone());
        registry.register("tether_retries_exhausted", "Jobs whose attempts were exhausted", self.retries_exhausted.clone());
        registry.register("tether_failovers", "Jobs that went to another worker", self.failovers.clone());
        registry.register("tether_reservations_active", "Reservations held", self.reservations_active.clone());
        registry.register("tether_presence_rejected", "Rejected health reports", self.presence_rejected.clone());
        registry.register("tether_workers_live", "Live workers", self.workers_live.clone());
        registry.register("tether_workers_loading", "Live workers that are loading a model", self.workers_loading.clone());
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

    /// Metrics with one sample of each.
    fn all() -> Metrics {
        let metrics = Metrics::new();
        let model = ModelLabel { model: "m".into() };
        for gauge in [&metrics.requests_running, &metrics.requests_waiting] {
            gauge.get_or_create(&model).inc();
        }
        metrics.kv_cache_usage.get_or_create(&model).set(0.5);
        for counter in [
            &metrics.decode_steps,
            &metrics.engine_cancelled,
            &metrics.engine_deaths,
            &metrics.prompt_tokens,
            &metrics.generation_tokens,
            &metrics.prefix_cache_queries,
            &metrics.prefix_cache_hits,
            &metrics.drafted_tokens,
            &metrics.accepted_tokens,
        ] {
            counter.get_or_create(&model).inc();
        }
        for histogram in [&metrics.time_to_first_token, &metrics.inter_token_latency, &metrics.request_duration] {
            histogram.get_or_create(&model).observe(1.0);
        }
        let request = RequestLabel { model: "m".into(), outcome: "completed", finish_reason: "stop" };
        metrics.requests.get_or_create(&request).inc();
        let breaker = BreakerLabel { model: "m".into(), region: "r".into() };
        metrics.breaker_state.get_or_create(&breaker).set(1);
        metrics.breaker_transitions.get_or_create(&breaker).inc();
        for counter in [&metrics.retries, &metrics.shed, &metrics.presence_rejected] {
            counter.get_or_create(&ReasonLabel { reason: "x" }).inc();
        }
        metrics.failovers.get_or_create(&PhaseLabel { phase: "pre_token" }).inc();
        metrics
    }

    /// Dashboards and alerts rely on these lines: a change of one is a change of the interface.
    #[test]
    fn names_types_help_and_labels_are_those_that_dashboards_rely_on() {
        assert_eq!(all().encode(), include_str!("metrics/exposition.txt"));
    }

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

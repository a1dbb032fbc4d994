//! Metrics of gateways.

use observability::metrics::{ModelLabel, Ratio, Shed, register};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

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

/// Labels of a request that repeats another one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabel {
    /// How the repeat was recognised: `key`, or `sdk_retry`.
    pub source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TenantClassLabel {
    /// The class of the request; `unknown` if it was refused before it was read.
    pub tenant_class: &'static str,
}

/// Metrics of a gateway. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub shed: Shed,
    pub requests: Family<RequestLabel, Counter>,
    pub time_to_first_token: Family<ModelLabel, Histogram>,
    pub inter_token_latency: Family<ModelLabel, Histogram>,
    pub request_duration: Family<ModelLabel, Histogram>,
    pub throttled: Family<TenantClassLabel, Counter>,
    pub idempotent_replays: Family<SourceLabel, Counter>,
    pub registry_silence: Ratio,
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
    /// Creates the metrics and registers them. `shed` is registered already, because orchestrators count it too.
    #[rustfmt::skip] // One line per metric.
    pub fn register(registry: &mut Registry, shed: Shed) -> Self {
        let first_token = Family::new_with_constructor((|| Histogram::new(FIRST_TOKEN_BUCKETS)) as fn() -> Histogram);
        let inter_token = Family::new_with_constructor((|| Histogram::new(INTER_TOKEN_BUCKETS)) as fn() -> Histogram);
        let duration = Family::new_with_constructor((|| Histogram::new(DURATION_BUCKETS)) as fn() -> Histogram);
        // Dashboards expect the counter before the first refusal.
        let throttled = Family::default();
        drop(throttled.get_or_create(&TenantClassLabel { tenant_class: "unknown" }));
        Self {
            shed,
            requests: register(registry, "tether_requests", "Finished requests", Family::default()),
            time_to_first_token: register(registry, "tether_time_to_first_token_seconds", "Seconds from the request to its first token", first_token),
            inter_token_latency: register(registry, "tether_inter_token_latency_seconds", "Seconds between chunks of an answer", inter_token),
            request_duration: register(registry, "tether_request_duration_seconds", "Seconds from the request to its end", duration),
            throttled: register(registry, "tether_throttled", "Requests refused by a rate limit", throttled),
            idempotent_replays: register(registry, "tether_idempotent_replays", "Requests that got the answer of an earlier one", Family::default()),
            registry_silence: register(registry, "tether_registry_silence_seconds", "Seconds since a registry last answered this gateway", Ratio::default()),
        }
    }
}

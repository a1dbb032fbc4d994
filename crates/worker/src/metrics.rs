//! Metrics of workers and their engines.

use observability::metrics::{ModelLabel, Ratio, register};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Metrics of a worker. Clones share them, and the workers of one process add to the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
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
}

impl Metrics {
    /// Creates the metrics and registers them.
    #[rustfmt::skip] // One line per metric.
    pub fn register(registry: &mut Registry) -> Self {
        Self {
            requests_running: register(registry, "tether_worker_requests_running", "Running requests", Family::default()),
            requests_waiting: register(registry, "tether_worker_requests_waiting", "Requests in the queues of workers", Family::default()),
            kv_cache_usage: register(registry, "tether_worker_kv_cache_usage_ratio", "Fraction of the KV cache in use", Family::default()),
            decode_steps: register(registry, "tether_engine_decode_steps", "Decode steps of the engines", Family::default()),
            engine_cancelled: register(registry, "tether_engine_cancelled", "Generations cancelled by their caller", Family::default()),
            engine_deaths: register(registry, "tether_engine_deaths", "Engine processes that died", Family::default()),
            prompt_tokens: register(registry, "tether_prompt_tokens", "Prompt tokens evaluated", Family::default()),
            generation_tokens: register(registry, "tether_generation_tokens", "Tokens generated", Family::default()),
            prefix_cache_queries: register(registry, "tether_prefix_cache_queries", "Prompt tokens looked up in the prefix cache", Family::default()),
            prefix_cache_hits: register(registry, "tether_prefix_cache_hits", "Prompt tokens found in the prefix cache", Family::default()),
            drafted_tokens: register(registry, "tether_engine_drafted_tokens", "Draft tokens (speculative decoding)", Family::default()),
            accepted_tokens: register(registry, "tether_engine_accepted_tokens", "Draft tokens that were accepted", Family::default()),
            artifact_verify_failures: register(registry, "tether_artifact_verify_failures", "Artifacts whose bytes do not match their digest", Counter::default()),
        }
    }
}

//! The names of metrics, as used by dashboards and alerts. Counters end in `_total` when exported.

/// Requests that are generating, by model.
pub const REQUESTS_RUNNING: &str = "tether_worker_requests_running";
/// Requests that wait at a worker.
pub const REQUESTS_WAITING: &str = "tether_worker_requests_waiting";
/// Share of the KV cache in use.
pub const KV_CACHE_USAGE: &str = "tether_worker_kv_cache_usage_ratio";
/// Batches evaluated by engines.
pub const DECODE_STEPS: &str = "tether_engine_decode_steps";
/// Generations that their caller cancelled.
pub const ENGINE_CANCELLED: &str = "tether_engine_cancelled";
/// Engine processes that died.
pub const ENGINE_DEATHS: &str = "tether_engine_deaths";
/// Prompt tokens that engines evaluated.
pub const PROMPT_TOKENS: &str = "tether_prompt_tokens";
pub const GENERATION_TOKENS: &str = "tether_generation_tokens";
/// Prompt tokens that engines looked up in the prefix cache.
pub const PREFIX_CACHE_QUERIES: &str = "tether_prefix_cache_queries";
/// Prompt tokens that were found in the prefix cache.
pub const PREFIX_CACHE_HITS: &str = "tether_prefix_cache_hits";
/// Draft tokens that engines verified (speculative decoding).
pub const DRAFTED_TOKENS: &str = "tether_engine_drafted_tokens";
/// Draft tokens that were accepted.
pub const ACCEPTED_TOKENS: &str = "tether_engine_accepted_tokens";
pub const REQUESTS: &str = "tether_requests";
/// Time from the request to its first token.
pub const TIME_TO_FIRST_TOKEN: &str = "tether_time_to_first_token_seconds";
pub const INTER_TOKEN_LATENCY: &str = "tether_inter_token_latency_seconds";
/// Time from the request to its end.
pub const REQUEST_DURATION: &str = "tether_request_duration_seconds";
/// State of a circuit breaker: 0 closed, 1 open, 2 half-open.
pub const BREAKER_STATE: &str = "tether_breaker_state";
/// State changes of a circuit breaker.
pub const BREAKER_TRANSITIONS: &str = "tether_breaker_transitions";
/// Attempts after the first, by the error code of the attempt before.
pub const RETRIES: &str = "tether_retries";
/// Jobs that failed after their last attempt.
pub const RETRIES_EXHAUSTED: &str = "tether_retries_exhausted";
/// Jobs that moved to another worker.
pub const FAILOVERS: &str = "tether_failovers";
/// Requests refused because of load.
pub const SHED: &str = "tether_shed";
/// Requests refused by a rate limit.
pub const THROTTLED: &str = "tether_throttled";
pub const RESERVATIONS_ACTIVE: &str = "tether_reservations_active";
/// Health reports that were dropped.
pub const PRESENCE_REJECTED: &str = "tether_presence_rejected";
pub const WORKERS_LIVE: &str = "tether_workers_live";
/// Live workers that are loading a model.
pub const WORKERS_LOADING: &str = "tether_workers_loading";
/// Seconds since the gateway last had an answer from a registry.
pub const REGISTRY_SILENCE: &str = "tether_registry_silence_seconds";
/// Artifacts whose bytes did not match their digest.
pub const ARTIFACT_VERIFY_FAILURES: &str = "tether_artifact_verify_failures";

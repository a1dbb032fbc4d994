//! Metrics of orchestrators.

use observability::metrics::{ReasonLabel, Shed, register};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Labels of a circuit breaker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BreakerLabel {
    pub model: String,
    pub region: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PhaseLabel {
    /// Whether the answer had begun: `pre_token` or `mid_stream`.
    pub phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HedgeLabel {
    /// What became of a second worker: `won`, `lost` or `failed`, or why none was started: `no_worker` or `no_budget`.
    pub outcome: &'static str,
}

/// Labels of waiting jobs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WaitingLabel {
    pub model: String,
    pub class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ClassLabel {
    pub class: &'static str,
}

/// Bucket bounds of the time in the queue, in seconds.
const QUEUE_WAIT_BUCKETS: [f64; 14] =
    [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];

/// Metrics of an orchestrator. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub shed: Shed,
    pub breaker_state: Family<BreakerLabel, Gauge>,
    pub breaker_transitions: Family<BreakerLabel, Counter>,
    pub retries: Family<ReasonLabel, Counter>,
    pub retries_exhausted: Counter,
    pub failovers: Family<PhaseLabel, Counter>,
    pub hedges: Family<HedgeLabel, Counter>,
    pub waiting: Family<WaitingLabel, Gauge>,
    pub queue_wait: Family<ClassLabel, Histogram>,
    pub degraded: Family<ReasonLabel, Counter>,
    pub reservations_active: Gauge,
    pub dead_letters: Gauge,
    pub dead_letters_unsent: Gauge,
    pub batches_open: Gauge,
    pub batch_lines_open: Gauge,
    pub presence_rejected: Family<ReasonLabel, Counter>,
    pub workers_live: Gauge,
    pub workers_loading: Gauge,
}

impl Metrics {
    /// Creates the metrics and registers them. `shed` is registered already, because gateways count it too.
    #[rustfmt::skip] // One line per metric.
    pub fn register(registry: &mut Registry, shed: Shed) -> Self {
        let queue_wait = Family::new_with_constructor((|| Histogram::new(QUEUE_WAIT_BUCKETS)) as fn() -> Histogram);
        Self {
            shed,
            breaker_state: register(registry, "tether_breaker_state", "0 closed, 1 open, 2 half-open", Family::default()),
            breaker_transitions: register(registry, "tether_breaker_transitions", "State transitions of circuit breakers", Family::default()),
            retries: register(registry, "tether_retries", "Attempts after the first", Family::default()),
            retries_exhausted: register(registry, "tether_retries_exhausted", "Jobs whose attempts were exhausted", Counter::default()),
            failovers: register(registry, "tether_failovers", "Jobs that went to another worker", Family::default()),
            hedges: register(registry, "tether_hedges", "Second workers of jobs whose first was silent", Family::default()),
            waiting: register(registry, "tether_requests_waiting", "Jobs that wait for a free slot", Family::default()),
            queue_wait: register(registry, "tether_queue_wait_seconds", "Seconds that jobs waited for a free slot", queue_wait),
            degraded: register(registry, "tether_degraded", "Jobs that were made cheaper by their tenant's policy", Family::default()),
            reservations_active: register(registry, "tether_reservations_active", "Reservations held", Gauge::default()),
            dead_letters: register(registry, "tether_dlq_depth", "Dead letters kept", Gauge::default()),
            dead_letters_unsent: register(registry, "tether_dlq_unsent", "Dead letters that Redis does not have yet", Gauge::default()),
            batches_open: register(registry, "tether_batches_open", "Batches that have not ended", Gauge::default()),
            batch_lines_open: register(registry, "tether_batch_lines_open", "Lines without a result of batches that have not ended", Gauge::default()),
            presence_rejected: register(registry, "tether_presence_rejected", "Rejected health reports", Family::default()),
            workers_live: register(registry, "tether_workers_live", "Live workers", Gauge::default()),
            workers_loading: register(registry, "tether_workers_loading", "Live workers that are loading a model", Gauge::default()),
        }
    }
}

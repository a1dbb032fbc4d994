//! The metrics of a process: one registry, in which each service's metrics are registered.

use observability::Exposition;
use observability::metrics::register_shed;
use prometheus_client::registry::Registry;

/// Metrics of all services that a process may run. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub worker: worker::Metrics,
    pub gateway: gateway::Metrics,
    pub orchestrator: orchestrator::Metrics,
    /// Exposes all of them.
    pub exposition: Exposition,
}

impl Metrics {
    /// Creates a registry and registers the metrics of every service.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let worker = worker::Metrics::register(&mut registry);
        let shed = register_shed(&mut registry);
        let gateway = gateway::Metrics::register(&mut registry, shed.clone());
        let orchestrator = orchestrator::Metrics::register(&mut registry, shed);
        Self { worker, gateway, orchestrator, exposition: Exposition::new(registry) }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use gateway::metrics::RequestLabel;
    use observability::metrics::{ModelLabel, ReasonLabel};
    use orchestrator::metrics::{BreakerLabel, PhaseLabel};

    use super::*;

    /// Metrics with one sample of each.
    fn all() -> Metrics {
        let metrics = Metrics::new();
        let Metrics { worker, gateway, orchestrator, .. } = &metrics;
        let model = ModelLabel { model: "m".into() };
        for gauge in [&worker.requests_running, &worker.requests_waiting] {
            gauge.get_or_create(&model).inc();
        }
        worker.kv_cache_usage.get_or_create(&model).set(0.5);
        for counter in [
            &worker.decode_steps,
            &worker.engine_cancelled,
            &worker.engine_deaths,
            &worker.prompt_tokens,
            &worker.generation_tokens,
            &worker.prefix_cache_queries,
            &worker.prefix_cache_hits,
            &worker.drafted_tokens,
            &worker.accepted_tokens,
        ] {
            counter.get_or_create(&model).inc();
        }
        for histogram in [&gateway.time_to_first_token, &gateway.inter_token_latency, &gateway.request_duration] {
            histogram.get_or_create(&model).observe(1.0);
        }
        let request = RequestLabel { model: "m".into(), outcome: "completed", finish_reason: "stop" };
        gateway.requests.get_or_create(&request).inc();
        let breaker = BreakerLabel { model: "m".into(), region: "r".into() };
        orchestrator.breaker_state.get_or_create(&breaker).set(1);
        orchestrator.breaker_transitions.get_or_create(&breaker).inc();
        for counter in [&orchestrator.retries, &orchestrator.shed, &orchestrator.presence_rejected] {
            counter.get_or_create(&ReasonLabel { reason: "x" }).inc();
        }
        orchestrator.failovers.get_or_create(&PhaseLabel { phase: "pre_token" }).inc();
        metrics
    }

    /// Dashboards and alerts rely on these lines: a change of one is a change of the interface.
    #[test]
    fn names_types_help_and_labels_are_those_that_dashboards_rely_on() {
        assert_eq!(all().exposition.encode(), include_str!("metrics/exposition.txt"));
    }

    #[test]
    fn the_gateway_and_the_orchestrator_of_one_process_count_shed_requests_together() {
        let metrics = Metrics::new();
        let reason = ReasonLabel { reason: "no_capacity" };
        metrics.gateway.shed.get_or_create(&reason).inc();
        metrics.orchestrator.shed.get_or_create(&reason).inc();
        let text = metrics.exposition.encode();
        assert!(text.contains("tether_shed_total{reason=\"no_capacity\"} 2\n"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}

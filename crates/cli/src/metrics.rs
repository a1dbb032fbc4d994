//! The metrics of a process: one registry, in which the metrics of its services are registered.

use observability::Exposition;
use observability::metrics::register_shed;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::services::VERSION;

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
    /// Creates the metrics of a process that runs every service.
    pub fn new() -> Self {
        Self::of(&["gateway", "orchestrator", "registry", "worker"])
    }

    /// Creates the metrics of a process that runs these roles. It exposes those of no other: what a process does not
    /// know is absent, and not 0.
    pub fn of(roles: &[&str]) -> Self {
        let mut registries = Registries::default();
        registries.exposed.register("tether_build", "Version and roles of this process", build(roles));
        let [runs_worker, runs_gateway, runs_orchestrator] =
            ["worker", "gateway", "orchestrator"].map(|role| roles.contains(&role));
        let worker = worker::Metrics::register(registries.of(runs_worker));
        let shed = register_shed(registries.of(runs_gateway || runs_orchestrator));
        let gateway = gateway::Metrics::register(registries.of(runs_gateway), shed.clone());
        let orchestrator = orchestrator::Metrics::register(registries.of(runs_orchestrator), shed);
        Self { worker, gateway, orchestrator, exposition: Exposition::new(registries.exposed) }
    }
}

/// The metrics of a process, and those of the services that it does not run.
#[derive(Default)]
struct Registries {
    exposed: Registry,
    hidden: Registry,
}

impl Registries {
    fn of(&mut self, is_exposed: bool) -> &mut Registry {
        if is_exposed { &mut self.exposed } else { &mut self.hidden }
    }
}

fn build(roles: &[&str]) -> Info<[(&'static str, String); 2]> {
    Info::new([("version", VERSION.to_owned()), ("roles", roles.join(","))])
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use gateway::metrics::{RequestLabel, SourceLabel};
    use observability::metrics::{ModelLabel, ReasonLabel};
    use orchestrator::metrics::{BreakerLabel, ClassLabel, HedgeLabel, PhaseLabel, WaitingLabel};

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
        gateway.idempotent_replays.get_or_create(&SourceLabel { source: "key" }).inc();
        orchestrator.hedges.get_or_create(&HedgeLabel { outcome: "won" }).inc();
        orchestrator.waiting.get_or_create(&WaitingLabel { model: "m".into(), class: "batch" }).inc();
        orchestrator.queue_wait.get_or_create(&ClassLabel { class: "batch" }).observe(1.0);
        for counter in
            [&orchestrator.retries, &orchestrator.shed, &orchestrator.presence_rejected, &orchestrator.degraded]
        {
            counter.get_or_create(&ReasonLabel { reason: "x" }).inc();
        }
        orchestrator.failovers.get_or_create(&PhaseLabel { phase: "pre_token" }).inc();
        metrics
    }

    /// Dashboards and alerts rely on these lines: a change of one is a change of the interface.
    #[test]
    fn names_types_help_and_labels_are_those_that_dashboards_rely_on() {
        let expected = include_str!("metrics/exposition.txt").replace("VERSION", VERSION);
        assert_eq!(all().exposition.encode(), expected);
    }

    #[test]
    fn a_process_exposes_the_metrics_of_its_own_roles() {
        let names = |role| {
            let metrics = Metrics::of(&[role]);
            metrics.gateway.shed.get_or_create(&ReasonLabel { reason: "x" }).inc();
            metrics.worker.engine_deaths.get_or_create(&ModelLabel { model: "m".into() }).inc();
            metrics.exposition.encode()
        };
        let gateway = names("gateway");
        assert!(gateway.contains("tether_throttled_total{") && gateway.contains("tether_shed_total{"), "{gateway}");
        for foreign in ["tether_workers", "tether_reservations", "tether_breaker", "tether_engine", "tether_worker_"] {
            assert!(!gateway.contains(foreign), "{foreign}: {gateway}");
        }
        let orchestrator = names("orchestrator");
        assert!(orchestrator.contains("tether_workers_live 0") && orchestrator.contains("tether_shed_total{"));
        assert!(!orchestrator.contains("tether_throttled") && !orchestrator.contains("tether_registry_silence"));
        let worker = names("worker");
        assert!(worker.contains("tether_engine_deaths_total{") && !worker.contains("tether_shed"));
        let registry = names("registry");
        assert!(registry.contains("tether_build_info{version=") && registry.contains("roles=\"registry\"} 1"));
        assert_eq!(registry.lines().count(), 4, "{registry}");
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

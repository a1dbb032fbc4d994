//! Counts the engines' work.
//!
//! Engines report totals since their load, and several workers may share the metrics, so only differences are added.

use std::collections::BTreeMap;

use engine::{Counters, LoadSnapshot, ModelId};
use observability::metrics::ModelLabel;

use crate::metrics::Metrics;
use crate::model_loader::{Observation, label};

/// Adds the engines' totals to the metrics.
#[derive(Debug)]
pub(crate) struct EngineMeter {
    metrics: Metrics,
    seen: BTreeMap<ModelId, Seen>,
}

/// The last observation of one engine.
#[derive(Debug, Clone)]
struct Seen {
    label: ModelLabel,
    counters: Counters,
    running: u32,
    waiting: u32,
    kv_usage: f32,
}

impl EngineMeter {
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self { metrics, seen: BTreeMap::new() }
    }

    /// Adds what has happened since the last observation.
    pub(crate) fn add(&mut self, observation: &Observation) {
        let gone: Vec<_> = self.seen.keys().filter(|id| find(observation, **id).is_none()).copied().collect();
        for id in gone {
            self.forget(id);
        }
        for (key, id) in &observation.ready {
            if let Some(snapshot) = find(observation, *id) {
                let seen = self.seen.entry(*id).or_insert_with(|| Seen::nothing(label(key)));
                seen.rise_to(snapshot, &self.metrics);
            }
        }
    }

    /// Subtracts the present load of every engine from the gauges.
    pub(crate) fn clear(&mut self) {
        for id in self.seen.keys().copied().collect::<Vec<_>>() {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: ModelId) {
        if let Some(mut seen) = self.seen.remove(&id) {
            seen.gauge(0, 0, 0.0, &self.metrics);
        }
    }
}

fn find(observation: &Observation, id: ModelId) -> Option<&LoadSnapshot> {
    observation.snapshots.iter().find(|snapshot| snapshot.model == id)
}

impl Seen {
    fn nothing(label: ModelLabel) -> Self {
        Self { label, counters: Counters::default(), running: 0, waiting: 0, kv_usage: 0.0 }
    }

    fn rise_to(&mut self, snapshot: &LoadSnapshot, metrics: &Metrics) {
        let (before, now) = (self.counters, snapshot.counters);
        for (family, before, now) in [
            (&metrics.decode_steps, before.decode_steps, now.decode_steps),
            (&metrics.engine_cancelled, before.cancelled, now.cancelled),
            (&metrics.prompt_tokens, before.prompt_tokens, now.prompt_tokens),
            (&metrics.generation_tokens, before.generated_tokens, now.generated_tokens),
            (&metrics.prefix_cache_queries, before.prefix_queries, now.prefix_queries),
            (&metrics.prefix_cache_hits, before.prefix_hits, now.prefix_hits),
            (&metrics.drafted_tokens, before.drafted_tokens, now.drafted_tokens),
            (&metrics.accepted_tokens, before.accepted_tokens, now.accepted_tokens),
        ] {
            if now > before {
                family.get_or_create(&self.label).inc_by(now - before);
            }
        }
        self.counters = now;
        self.gauge(snapshot.running, snapshot.waiting, snapshot.kv_usage, metrics);
    }

    fn gauge(&mut self, running: u32, waiting: u32, kv_usage: f32, metrics: &Metrics) {
        let difference = |before: u32, now: u32| i64::from(now) - i64::from(before);
        metrics.requests_running.get_or_create(&self.label).inc_by(difference(self.running, running));
        metrics.requests_waiting.get_or_create(&self.label).inc_by(difference(self.waiting, waiting));
        // A ratio cannot be summed over workers: the gauge shows the worker that changed last.
        if self.kv_usage.to_bits() != kv_usage.to_bits() {
            metrics.kv_cache_usage.get_or_create(&self.label).set(f64::from(kv_usage));
        }
        (self.running, self.waiting, self.kv_usage) = (running, waiting, kv_usage);
    }
}

#[cfg(test)]
mod tests {
    use observability::Exposition;
    use prometheus_client::registry::Registry;

    use super::*;

    fn observation(id: u64, running: u32, decode_steps: u64) -> Observation {
        let key = protocol::model::ModelKey {
            model_id: "tether-tiny".parse().expect("name"),
            version: "1.0".parse().expect("version"),
        };
        let snapshot = LoadSnapshot {
            model: ModelId(id),
            slots: 4,
            running,
            waiting: 1,
            kv_usage: 0.5,
            tokens_per_second: 0.0,
            counters: Counters {
                decode_steps,
                prefix_queries: 100,
                prefix_hits: 60,
                drafted_tokens: 9,
                accepted_tokens: 7,
                ..Counters::default()
            },
            beats: 0,
        };
        Observation { ready: vec![(key, ModelId(id))], snapshots: vec![snapshot] }
    }

    fn metrics() -> (Metrics, Exposition) {
        let mut registry = Registry::default();
        (Metrics::register(&mut registry), Exposition::new(registry))
    }

    fn shown(exposition: &Exposition, name: &str) -> String {
        let text = exposition.encode();
        let line = text.lines().find(|line| line.starts_with(&format!("{name}{{"))).expect("it is shown").to_owned();
        line.rsplit(' ').next().expect("a value").to_owned()
    }

    #[test]
    fn workers_that_share_metrics_add_up() {
        let (metrics, exposition) = metrics();
        let (mut first, mut second) = (EngineMeter::new(metrics.clone()), EngineMeter::new(metrics.clone()));
        first.add(&observation(1, 2, 10));
        second.add(&observation(1, 3, 5));
        first.add(&observation(1, 1, 12));
        assert_eq!(shown(&exposition, "tether_engine_decode_steps_total"), "17");
        for (name, total) in [
            ("tether_prefix_cache_queries_total", "200"),
            ("tether_prefix_cache_hits_total", "120"),
            ("tether_engine_drafted_tokens_total", "18"),
            ("tether_engine_accepted_tokens_total", "14"),
        ] {
            assert_eq!(shown(&exposition, name), total, "{name}");
        }
        assert_eq!(shown(&exposition, "tether_worker_requests_running"), "4");
        assert_eq!(shown(&exposition, "tether_worker_requests_waiting"), "2");
    }

    #[test]
    fn an_engine_that_is_replaced_counts_on_from_zero() {
        let (metrics, exposition) = metrics();
        let mut meter = EngineMeter::new(metrics.clone());
        meter.add(&observation(1, 2, 10));
        meter.add(&observation(2, 1, 3));
        assert_eq!(shown(&exposition, "tether_engine_decode_steps_total"), "13");
        assert_eq!(shown(&exposition, "tether_worker_requests_running"), "1");
        meter.clear();
        assert_eq!(shown(&exposition, "tether_worker_requests_running"), "0");
        assert_eq!(shown(&exposition, "tether_worker_kv_cache_usage_ratio"), "0.0");
    }
}

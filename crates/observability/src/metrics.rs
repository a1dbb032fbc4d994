//! What the metrics of all services share. Each service declares its own metrics in its module `metrics`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};

/// A gauge with a fractional value.
pub type Ratio = Gauge<f64, AtomicU64>;

/// Labels of one model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModelLabel {
    pub model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    pub reason: &'static str,
}

/// Requests refused for lack of capacity, by reason. Gateways and orchestrators both count them.
pub type Shed = Family<ReasonLabel, Counter>;

/// Registers a metric and returns it. Dashboards and alerts rely on the names; counters end in `_total` when exported.
pub fn register<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// Registers the counter of shed requests. A registry must have each name once, so the services of a process share it.
pub fn register_shed(registry: &mut Registry) -> Shed {
    register(registry, "tether_shed", "Requests refused for lack of capacity", Shed::default())
}

/// All metrics of a process, as Prometheus reads them. Clones share one registry.
#[derive(Clone)]
pub struct Exposition {
    registry: Arc<Registry>,
    refreshers: Arc<Mutex<Vec<Refresher>>>,
}

/// Sets gauges before they are read.
type Refresher = Box<dyn Fn() + Send + Sync>;

impl Exposition {
    /// Exposes the metrics of a registry. Nothing can be registered later.
    pub fn new(registry: Registry) -> Self {
        Self { registry: Arc::new(registry), refreshers: Arc::default() }
    }

    /// Calls a function before each encoding. It sets gauges whose values are known elsewhere.
    pub fn refresh(&self, set: impl Fn() + Send + Sync + 'static) {
        self.refreshers.lock().push(Box::new(set));
    }

    /// Encodes all metrics in the OpenMetrics 1.0 text format, which Prometheus scrapes.
    pub fn encode(&self) -> String {
        self.refreshers.lock().iter().for_each(|set| set());
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("writing to a string does not fail");
        text
    }
}

impl fmt::Debug for Exposition {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Exposition").field("registry", &self.registry).finish_non_exhaustive()
    }
}

//! Traces, metrics and logs: their names, their context, their export.

pub mod logs;
pub mod metric_names;
pub mod metrics;
pub mod trace_context;

pub use metrics::Metrics;
pub use trace_context::TraceContext;

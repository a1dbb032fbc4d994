//! Traces, metrics and logs: names, context and export.

pub mod logs;
pub mod metrics;
pub mod trace_context;

pub use metrics::Metrics;
pub use trace_context::TraceContext;

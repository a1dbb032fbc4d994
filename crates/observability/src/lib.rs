//! Trace context, logs, and what the metrics of all services share.

pub mod logs;
pub mod metrics;
pub mod trace_context;

pub use metrics::Exposition;
pub use trace_context::TraceContext;

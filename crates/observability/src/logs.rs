//! Structured logs on stderr, as text or as JSON.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt as _;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Pretty,
    /// One JSON object per line.
    Json,
}

/// Why logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is malformed.
    #[error("the log filter {filter:?} is malformed, write for example `info` or `info,tether_gateway=debug`")]
    Filter { filter: String },
    /// Logging was set up before.
    #[error("logs are set up already")]
    Twice,
}

/// Starts logging to stderr. `filter` has the form `info,tether_gateway=debug`.
pub fn init(format: LogFormat, filter: &str) -> Result<(), LogError> {
    let parsed = EnvFilter::try_new(filter).map_err(|_| LogError::Filter { filter: filter.to_owned() })?;
    // A log line that cannot be written, for example because the disk is full or the terminal is gone, is dropped. By
    // default the subscriber would report the error on stderr, which is the same place, and panic.
    let builder =
        tracing_subscriber::fmt().with_env_filter(parsed).with_writer(std::io::stderr).log_internal_errors(false);
    let done = match format {
        LogFormat::Pretty => builder.with_ansi(std::io::stderr().is_terminal()).with_target(false).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
    };
    done.map_err(|_| LogError::Twice)
}

//! Runs one model for a worker, in a process of its own, so that a crash takes nothing else with it.

use super::Outcome;

/// Serves the worker at the other end of the pipe.
#[cfg(feature = "llama")]
pub(super) fn run() -> anyhow::Result<Outcome> {
    observability::logs::init(observability::logs::LogFormat::Pretty, "warn")?;
    engine::process::serve_child(engine::LlamaRuntime::new())?;
    Ok(Outcome::Well)
}

/// Fails: this build has no engine.
#[cfg(not(feature = "llama"))]
pub(super) fn run() -> anyhow::Result<Outcome> {
    anyhow::bail!("this program was built without the feature `llama` and cannot hold models")
}

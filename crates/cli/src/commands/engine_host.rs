//! Runs one model for a worker, in a process of its own, so that a crash takes nothing else with it.

use super::Outcome;

/// Serves the worker at the other end of the pipe.
#[cfg(feature = "llama")]
pub(super) fn run() -> anyhow::Result<Outcome> {
    use anyhow::Context as _;

    observability::logs::init(observability::logs::LogFormat::Pretty, "warn")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("no async runtime")?;
    runtime.block_on(engine::process::serve_child(engine::LlamaRuntime::new()))?;
    Ok(Outcome::Well)
}

/// Fails: this build has no engine.
#[cfg(not(feature = "llama"))]
pub(super) fn run() -> anyhow::Result<Outcome> {
    anyhow::bail!("this program was built without the feature `llama` and cannot hold models")
}

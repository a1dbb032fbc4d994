//! What callers are told when a job goes nowhere.

use std::time::Duration;

use protocol::error_code::LoadingModel;
use protocol::health::LoadProgress;
use protocol::model::ModelKey;
use protocol::{AdapterName, Digest, ErrorCode, WireError, WorkerId};

use crate::scheduler::{Placement, Refusal};

/// Says that a request is given to no further engine.
pub(crate) fn crashes_engines() -> WireError {
    let message = "engines crashed on this request, so it is not run again; change it";
    WireError::new(ErrorCode::RequestCrashesEngine, message)
}

/// Says that no worker takes a job.
pub(crate) fn no_capacity(model: &ModelKey, adapter: Option<&AdapterName>, placement: &Placement) -> WireError {
    let name = adapter.map_or_else(|| model.to_string(), |adapter| format!("{model}:{adapter}"));
    let has_no_adapter = Refusal::NoAdapter.as_str();
    let message = if placement.refused.iter().all(|refused| refused.reason == has_no_adapter) {
        format!("no worker serves {name} now, try again")
    } else {
        format!("every worker that serves {name} is full or unwell, try again")
    };
    WireError::new(ErrorCode::NoCapacity, message).with_retry_after(Duration::from_secs(1))
}

/// Says how far the load of a model is, and when to ask again.
pub(crate) fn model_loading(model: &ModelKey, worker: WorkerId, progress: LoadProgress) -> WireError {
    const USUAL: Duration = Duration::from_secs(5);
    const LONGEST: Duration = Duration::from_secs(30);
    let done = if progress.fetching { "fetched" } else { "loaded" };
    let message = format!("{model} is being {done}, {} % so far, try again", progress.percent.min(100));
    let wait = progress.remaining().unwrap_or(USUAL).clamp(Duration::from_secs(1), LONGEST);
    // A worker's key leads to the worker; its digest does not.
    let node = Digest::of(&worker.0).to_string()[..8].to_owned();
    let loading = LoadingModel { model: model.clone(), node, progress };
    WireError::new(ErrorCode::ModelLoading, message).with_retry_after(wait).with_loading(loading)
}

/// Says that a job of this name is there already.
pub(crate) fn known_already() -> WireError {
    WireError::new(ErrorCode::IdempotencyInProgress, "a job of this retryToken exists, and is not run twice")
        .with_retry_after(Duration::from_secs(1))
}

/// Says that nobody remembers how a job was placed.
pub(crate) fn forgotten() -> WireError {
    WireError::new(ErrorCode::NotFound, "no decision of this job is remembered")
}

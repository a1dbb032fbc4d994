//! The errors that callers get when a job cannot run.

use std::time::Duration;

use metadata_store::{DurableState, JobRecord, TerminalState};
use protocol::error_code::LoadingModel;
use protocol::health::LoadProgress;
use protocol::model::ModelKey;
use protocol::policy::ServiceClass;
use protocol::{AdapterName, Digest, ErrorCode, Region, WireError, WorkerId};

use crate::answers::ANSWER_BYTES_MAX;
use crate::scheduler::{Placement, Refusal};

/// The error of a request that crashed engines and is not run again.
pub(crate) fn crashes_engines() -> WireError {
    let message = "engines crashed on this request, so it is not run again; change it";
    WireError::new(ErrorCode::RequestCrashesEngine, message)
}

/// The error of a job that an operator cancelled.
pub(crate) fn cancelled() -> WireError {
    WireError::new(ErrorCode::CancelledByOperator, "an operator of the network cancelled this request")
}

/// The error of a job without a reader whose answer does not fit into memory and store.
pub(crate) fn too_long_to_store() -> WireError {
    let message = format!("the answer is longer than can be stored ({} MiB)", ANSWER_BYTES_MAX >> 20);
    WireError::new(ErrorCode::InvalidValue, message)
}

/// The error of a job that no worker can take.
pub(crate) fn no_capacity(model: &ModelKey, adapter: Option<&AdapterName>, placement: &Placement) -> WireError {
    let name = adapter.map_or_else(|| model.to_string(), |adapter| format!("{model}:{adapter}"));
    let (no_adapter, region) = (Refusal::NoAdapter.as_str(), Refusal::Region.as_str());
    let message = if placement.refused.iter().all(|refused| refused.reason == no_adapter) {
        format!("no worker serves {name} now, try again")
    } else if placement.refused.iter().all(|refused| refused.reason == region) {
        format!("no worker in the tenant's allowed regions serves {name} now, try again")
    } else {
        format!("every worker that serves {name} is full or unwell, try again")
    };
    WireError::new(ErrorCode::NoCapacity, message).with_retry_after(Duration::from_secs(1))
}

/// The error of a job that may run in none of the regions that the orchestrator uses.
pub(crate) fn residency(allowed: &[Region]) -> WireError {
    let names: Vec<&str> = allowed.iter().map(Region::as_str).collect();
    let message = format!(
        "the tenant's policy allows jobs only in {}, and this part of the network uses no worker there",
        if names.is_empty() { "no region".to_owned() } else { names.join(", ") }
    );
    WireError::new(ErrorCode::ResidencyMismatch, message)
}

/// The error of a job that may not wait for a free slot, or that has to leave the queue for another.
pub(crate) fn queue_full(message: &str, retry_after: Duration) -> WireError {
    WireError::new(ErrorCode::NoCapacity, message).with_retry_after(retry_after)
}

/// The error of a job whose class its tenant may not ask for.
pub(crate) fn class_not_allowed(class: ServiceClass) -> WireError {
    let message = format!("the tenant's policy does not allow the class {}", class.as_str());
    WireError::new(ErrorCode::ClassNotAllowed, message).with_param("service_tier")
}

/// The error of a job whose model is loading: its progress, and when to try again.
pub(crate) fn model_loading(model: &ModelKey, worker: WorkerId, progress: LoadProgress) -> WireError {
    const USUAL: Duration = Duration::from_secs(5);
    const LONGEST: Duration = Duration::from_secs(30);
    let done = if progress.fetching { "fetched" } else { "loaded" };
    let message = format!("{model} is being {done}, {} % so far, try again", progress.percent.min(100));
    let wait = progress.remaining().unwrap_or(USUAL).clamp(Duration::from_secs(1), LONGEST);
    // The worker's key would make the worker reachable; the digest of the key does not.
    let node = Digest::of(&worker.0).to_string()[..8].to_owned();
    let loading = LoadingModel { model: model.clone(), node, progress };
    WireError::new(ErrorCode::ModelLoading, message).with_retry_after(wait).with_loading(loading)
}

/// The error of a job whose key is already in the store, with the fingerprint of the request that came now.
pub(crate) fn repeated(known: &JobRecord, fingerprint: &[u8; 32]) -> WireError {
    match known.state {
        _ if known.request_fingerprint != *fingerprint => reused(),
        DurableState::Reserved => is_running(),
        DurableState::Settled(TerminalState::Dead) => crashes_engines(),
        DurableState::Settled(_) => {
            let message = "the job of this idempotency key has ended, and its answer is not kept; use a new key";
            WireError::new(ErrorCode::IdempotencyKeyReused, message).with_param("retryToken")
        }
    }
}

/// The error of a job whose workers took no calls.
pub(crate) fn worker_unavailable() -> WireError {
    WireError::new(ErrorCode::WorkerFailed, "the workers that were tried did not answer, try again")
}

/// The error of a request under the key of another request.
pub(crate) fn reused() -> WireError {
    let message = "this idempotency key was used for another request; give each request a key of its own";
    WireError::new(ErrorCode::IdempotencyKeyReused, message).with_param("retryToken")
}

/// The error of a repeat whose job runs where its answer cannot be read from the beginning.
pub(crate) fn is_running() -> WireError {
    let message = "a job of this idempotency key is running, and is not run twice";
    WireError::new(ErrorCode::IdempotencyInProgress, message).with_retry_after(Duration::from_secs(1))
}

/// The error of a job that failed in the middle of its answer. A worker's refusal counts as its failure there.
pub(crate) fn in_mid_answer(error: WireError) -> WireError {
    match error.code {
        ErrorCode::WorkerStopping => {
            let message = "the worker was stopped in the middle of the answer, try again";
            WireError::new(ErrorCode::WorkerFailed, message)
        }
        ErrorCode::WorkerFull | ErrorCode::ModelNotHere => {
            WireError::new(ErrorCode::WorkerFailed, "the worker gave up in the middle of the answer, try again")
        }
        _ => error.as_job_failure(),
    }
}

/// The error of a lookup for a decision that is no longer kept.
pub(crate) fn forgotten() -> WireError {
    WireError::new(
        ErrorCode::NotFound,
        "no job of this request is known; an orchestrator keeps them for a limited time",
    )
}

//! Decides which failed jobs get a dead letter, and seals their requests. Deciding is pure.

use metadata_store::{NewDeadLetter, SealedPayload};
use protocol::infer::InferRequest;
use protocol::jobs::{AttemptRecord, DeadLetterCause};
use protocol::{CorrelationId, ErrorCode, TenantId, codec};
use tracing::warn;

use crate::config::Config;
use crate::dispatch::{AttemptEnd, Fault};
use crate::sealing::SealingKey;

/// The longest request that is kept. It has to fit into a message together with its letter.
const REQUEST_BYTES_MAX: usize = 12 * 1024 * 1024;

/// Returns whether the end of an attempt speaks against its request: a worker took the job and failed it without
/// progress. A worker that is full, stops, is killed, loses its engine to a
/// signal from outside, or is cut off says nothing of the request.
pub(crate) fn counts(end: &AttemptEnd, is_dispatched: bool, progressed: bool) -> bool {
    let AttemptEnd::Failed { error, fault, .. } = end else { return false };
    let is_failure =
        matches!(error.code, ErrorCode::WorkerFailed | ErrorCode::InternalError | ErrorCode::EngineCrashed);
    let is_outside =
        matches!(fault, Fault::Unacknowledged | Fault::Ended | Fault::Lost | Fault::EngineKilled | Fault::Leaving);
    is_dispatched && !progressed && is_failure && !is_outside
}

/// Returns why a job that ends so gets a dead letter, or `None` if it gets none.
pub(crate) fn cause(end: &AttemptEnd, history: &[AttemptRecord], attempts_max: u32) -> Option<DeadLetterCause> {
    match end {
        AttemptEnd::Dead { .. } => Some(DeadLetterCause::EnginesCrashed),
        AttemptEnd::Failed { .. } => {
            let since_progress = history.iter().rev().take_while(|attempt| !attempt.progressed);
            let counted = since_progress.filter(|attempt| attempt.counted).count();
            (counted >= attempts_max.max(1) as usize).then_some(DeadLetterCause::AttemptsFailed)
        }
        AttemptEnd::Complete { .. } | AttemptEnd::CallerGone { .. } => None,
    }
}

/// Makes the letter of a job, with its sealed request.
pub(crate) fn letter(
    cause: DeadLetterCause,
    request: &InferRequest,
    history: Vec<AttemptRecord>,
    key: &SealingKey,
    config: &Config,
) -> NewDeadLetter {
    let plain = codec::encode(request);
    let payload = if plain.len() > REQUEST_BYTES_MAX { None } else { seal(key, request, &plain) };
    NewDeadLetter {
        cause,
        history,
        payload,
        letters_max: config.dead_letters_max,
        bytes_max: config.dead_letters_mib.saturating_mul(1024 * 1024),
    }
}

fn seal(key: &SealingKey, request: &InferRequest, plain: &[u8]) -> Option<SealedPayload> {
    let sealed = key.seal(&owner(&request.tenant_id, request.correlation_id), plain);
    if sealed.is_none() {
        warn!("could not draw random bytes, so the request of a dead letter is not kept");
    }
    sealed.map(|sealed| SealedPayload { sealed, plain_bytes: plain.len() as u64 })
}

/// Opens the request of a letter. Returns `None` if it was sealed with another key or for another letter.
pub(crate) fn open(key: &SealingKey, tenant: &TenantId, id: CorrelationId, sealed: &[u8]) -> Option<InferRequest> {
    codec::decode(&key.open(&owner(tenant, id), sealed).ok()?).ok()
}

/// Returns what binds a payload to its letter.
fn owner(tenant: &TenantId, id: CorrelationId) -> Vec<u8> {
    codec::encode(&("dead letter", tenant, id))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use protocol::usage::TokenUsage;
    use protocol::{PublicKey, UnixMillis, WireError};

    use super::*;

    fn failed(code: ErrorCode, fault: Fault) -> AttemptEnd {
        AttemptEnd::Failed { error: WireError::new(code, "x"), fault, usage: TokenUsage::default() }
    }

    fn complete() -> AttemptEnd {
        AttemptEnd::Complete {
            last_chunk: Bytes::new(),
            finish_reason: None,
            usage: TokenUsage::default(),
            silence: std::time::Duration::ZERO,
            overclaims: false,
        }
    }

    #[test]
    fn only_failures_of_a_worker_that_took_the_job_count() {
        for code in ErrorCode::ALL {
            let is_failure =
                matches!(code, ErrorCode::WorkerFailed | ErrorCode::InternalError | ErrorCode::EngineCrashed);
            assert_eq!(counts(&failed(code, Fault::None), true, false), is_failure, "{code}");
            assert_eq!(counts(&failed(code, Fault::Breach), true, false), is_failure, "{code}");
            assert!(!counts(&failed(code, Fault::Lost), true, false), "{code}: killed or cut off");
            assert!(!counts(&failed(code, Fault::EngineKilled), true, false), "{code}: its engine was killed");
            assert!(!counts(&failed(code, Fault::Unacknowledged), true, false), "{code}: it never took the job");
            assert!(!counts(&failed(code, Fault::None), true, true), "{code}: it made progress");
            assert!(!counts(&failed(code, Fault::None), false, false), "{code}: no worker had it");
        }
        assert!(!counts(&AttemptEnd::CallerGone { usage: TokenUsage::default() }, true, false));
        assert!(!counts(&complete(), true, false));
    }

    /// Attempts, one a letter: `c` counts, `p` made progress, `-` is neither.
    fn history(attempts: &str) -> Vec<AttemptRecord> {
        let record = |kind| AttemptRecord {
            attempt: 1,
            worker_id: PublicKey([1; 32]),
            model: protocol::model::ModelKey {
                model_id: "m".parse().expect("a name"),
                version: "1.0".parse().expect("a version"),
            },
            outcome: "worker_failed".to_owned(),
            began_at: UnixMillis(0),
            ended_at: UnixMillis(0),
            progressed: kind == 'p',
            counted: kind == 'c',
        };
        attempts.chars().map(record).collect()
    }

    #[test]
    fn a_letter_is_for_poison_and_for_attempts_without_progress() {
        let dead = AttemptEnd::Dead { error: WireError::new(ErrorCode::RequestCrashesEngine, "x") };
        let last = failed(ErrorCode::WorkerFailed, Fault::None);
        let gone = AttemptEnd::CallerGone { usage: TokenUsage::default() };
        let (crashed, exhausted) = (Some(DeadLetterCause::EnginesCrashed), Some(DeadLetterCause::AttemptsFailed));
        let table = [
            (&dead, "cc", crashed),
            (&dead, "", crashed),
            (&last, "ccc", exhausted),
            (&last, "c-c-c", exhausted),
            (&last, "pccc", exhausted),
            (&last, "cc", None),
            (&last, "c-c", None),
            (&last, "---", None),
            (&last, "ccpc", None),
            (&last, "cccp", None),
            (&last, "", None),
            (&gone, "ccc", None),
            (&complete(), "ccc", None),
        ];
        for (end, attempts, expected) in table {
            assert_eq!(cause(end, &history(attempts), 3), expected, "{end:?} after {attempts:?}");
        }
        assert_eq!(cause(&last, &history("c"), 1), exhausted);
        assert_eq!(cause(&last, &history(""), 0), None);
    }

    fn request() -> InferRequest {
        serde_json::from_value(serde_json::json!({
            "tenantId": "acme", "modelId": "m", "version": "1.0", "input": "a secret",
            "correlationId": "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f", "retryToken": "r",
            "traceId": "01010101010101010101010101010101",
        }))
        .expect("a request")
    }

    #[test]
    fn a_request_is_readable_only_with_its_key_and_for_its_letter() {
        let (key, request) = (SealingKey([7; 32]), request());
        let config = Config::default();
        let letter = letter(DeadLetterCause::EnginesCrashed, &request, vec![], &key, &config);
        let sealed = letter.payload.expect("short enough").sealed;
        assert!(!sealed.windows(6).any(|bytes| bytes == b"secret"));
        let (tenant, id) = (&request.tenant_id, request.correlation_id);
        assert_eq!(open(&key, tenant, id, &sealed), Some(request.clone()));
        assert_eq!(open(&SealingKey([8; 32]), tenant, id, &sealed), None);
        assert_eq!(open(&key, &"other".parse().expect("a tenant"), id, &sealed), None);
        assert_eq!(open(&key, tenant, CorrelationId(uuid::Uuid::nil()), &sealed), None);
        for index in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[index] ^= 1;
            assert_eq!(open(&key, tenant, id, &altered), None);
            assert_eq!(open(&key, tenant, id, &sealed[..index]), None);
        }
    }

    #[test]
    fn a_request_that_is_too_long_is_not_kept() {
        let mut request = request();
        request.input.prompt = Some("x".repeat(REQUEST_BYTES_MAX));
        let key = SealingKey([7; 32]);
        let letter = letter(DeadLetterCause::AttemptsFailed, &request, vec![], &key, &Config::default());
        assert!(letter.payload.is_none());
    }
}

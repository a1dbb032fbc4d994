//! Plain values for tests; each test changes what it is about.

use protocol::control::Scope;
use protocol::jobs::AttemptRecord;
use protocol::model::{AdapterEntry, AdapterKey, ModelEntry, ModelKey};
use protocol::quota::QuotaLimits;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, Digest, PublicKey, TenantId, TraceId, UnixMillis, WorkerId};
use tether_metadata_store::{JobKey, Lease, NewJob, Reassignment, Settlement, TerminalState, TokenRecord};
use uuid::Uuid;

pub(crate) const NOW: UnixMillis = UnixMillis(1_700_000_000_000);
pub(crate) const LEASE: UnixMillis = UnixMillis(1_700_000_030_000);
pub(crate) const USAGE: TokenUsage =
    TokenUsage { prompt_tokens: 11, completion_tokens: 22, cached_tokens: 3, reasoning_tokens: 0 };

pub(crate) fn worker(number: u8) -> WorkerId {
    PublicKey([number; 32])
}

pub(crate) fn tenant(name: &str) -> TenantId {
    name.parse().expect("a tenant's name")
}

pub(crate) fn key(number: u128) -> JobKey {
    JobKey {
        tenant_id: tenant("acme"),
        correlation_id: CorrelationId(Uuid::from_u128(number)),
        retry_token: "retry-1".parse().expect("a retry token"),
    }
}

/// A job on worker 1, which may hold 4.
pub(crate) fn job(number: u128) -> NewJob {
    NewJob {
        key: key(number),
        trace_id: TraceId([9; 16]),
        model: model_key("llama3.1-8b", "1.0"),
        region: "eu-west".parse().expect("a region"),
        worker_id: worker(1),
        worker_capacity: 4,
        attempt: 1,
        now: NOW,
        lease_until: LEASE,
        request_fingerprint: [5; 32],
        limits: QuotaLimits::default(),
        tokens: 1_000,
        counts: true,
    }
}

/// The completion of a job by its first attempt on worker 1.
pub(crate) fn settlement(number: u128) -> Settlement {
    Settlement {
        key: key(number),
        attempt: 1,
        worker_id: worker(1),
        state: TerminalState::Completed,
        finish_reason: None,
        error: None,
        answer: None,
        note: None,
        usage: Some(USAGE),
        is_bounded: true,
        now: NOW,
        history: vec![],
        continued: 0,
        dead_letter: None,
    }
}

/// The move of a job's first attempt to worker 2, which may hold 4.
pub(crate) fn lease(number: u128, attempt: u32) -> Lease {
    Lease { key: key(number), attempt }
}

pub(crate) fn reassignment(number: u128) -> Reassignment {
    Reassignment {
        key: key(number),
        from_attempt: 1,
        model: model_key("llama3.1-8b", "1.0"),
        worker_id: worker(2),
        worker_capacity: 4,
        now: NOW,
        lease_until: LEASE,
        limits: QuotaLimits::default(),
        tokens: 0,
        history: vec![],
    }
}

/// An attempt on a worker that ended so.
pub(crate) fn attempt(number: u32, worker_number: u8, outcome: &str) -> AttemptRecord {
    AttemptRecord {
        attempt: number,
        worker_id: worker(worker_number),
        model: model_key("llama3.1-8b", "1.0"),
        outcome: outcome.to_owned(),
        began_at: NOW,
        ended_at: UnixMillis(NOW.0 + 5),
        progressed: false,
        counted: true,
    }
}

pub(crate) fn model_key(name: &str, version: &str) -> ModelKey {
    ModelKey { model_id: name.parse().expect("a model's name"), version: version.parse().expect("a version") }
}

pub(crate) fn model(name: &str, version: &str) -> ModelEntry {
    ModelEntry {
        facts: None,
        added: false,
        pin: false,
        keep_alive_secs: None,
        key: model_key(name, version),
        digest: Digest([3; 32]),
        bytes: 4_000_000_000,
        context_length: 8192,
        description: "for tests".into(),
        created_at: NOW,
    }
}

pub(crate) fn adapter(model_id: &str, version: &str, name: &str) -> AdapterEntry {
    AdapterEntry {
        key: AdapterKey { model: model_key(model_id, version), adapter: name.parse().expect("an adapter's name") },
        digest: Digest([4; 32]),
        bytes: 4_000_000,
        description: "for tests".into(),
        created_at: NOW,
    }
}

pub(crate) fn token(key_id: &str) -> TokenRecord {
    TokenRecord {
        key_id: key_id.into(),
        tenant_id: tenant("acme"),
        hash: [4; 32],
        scopes: vec![Scope::Infer, Scope::Admin],
        name: "laptop".into(),
        created_at: NOW,
        expires_at: Some(LEASE),
        revoked_at: None,
    }
}

//! What figures stand beside: the mock engine alone, the store's commits, CPU time.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{GenerateRequest, LoadOptions, MockOptions, MockRuntime, ModelRuntime, PromptInput};
use metadata_store::{JobKey, JobStore, NewJob, Settlement, TerminalState};
use protocol::{CorrelationId, PublicKey, TraceId, UnixMillis};
use tether_cli::commands::async_runtime;
use tether_cli::tiny_model;

/// Mock answers: nothing to wait for, so that all time is the network's.
pub(crate) fn mock(pace: Duration) -> MockOptions {
    MockOptions {
        first_token: Duration::ZERO,
        per_token: pace,
        tokens: 10_000,
        context_length: 100_000,
        ..MockOptions::default()
    }
}

/// CPU seconds a process has used, from the scheduler's own count of nanoseconds.
pub(crate) fn cpu_of(process: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let nanoseconds = |task: std::fs::DirEntry| -> u64 {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0)
    };
    tasks.flatten().map(nanoseconds).sum::<u64>() as f64 / 1e9
}

/// CPU seconds an event of the mock engine takes by itself.
pub(crate) fn mock_alone(streams: usize, tokens: u32, pace: Duration) -> f64 {
    let runtime = async_runtime(0).unwrap();
    runtime.block_on(async {
        let engine = Arc::new(MockRuntime::new(mock(pace)));
        let options = LoadOptions { slots: 128, ..LoadOptions::default() };
        let loaded = engine.load(tiny_artifact(), options, engine::no_progress()).await.unwrap();
        let before = cpu_of(std::process::id());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..streams {
            let engine = engine.clone();
            tasks.spawn(async move {
                let request = GenerateRequest { max_tokens: Some(tokens), ..hello(loaded.id) };
                let mut stream = engine.generate(request).await.unwrap();
                let mut events = 0;
                while stream.next().await.is_some() {
                    events += 1;
                }
                events
            });
        }
        let events: usize = tasks.join_all().await.into_iter().sum();
        (cpu_of(std::process::id()) - before) / events as f64
    })
}

/// The two durable commits of a request.
pub(crate) async fn two_commits(store: &dyn JobStore, number: u128) -> (Duration, Duration) {
    let key = JobKey {
        tenant_id: "bench".parse().unwrap(),
        correlation_id: CorrelationId(uuid::Uuid::from_u128(number)),
        retry_token: "r".parse().unwrap(),
    };
    let worker_id = PublicKey([1; 32]);
    let now = UnixMillis(1);
    let job = NewJob {
        key: key.clone(),
        trace_id: TraceId([1; 16]),
        model: tiny_model::key(),
        region: "local".parse().unwrap(),
        worker_id,
        worker_capacity: 100,
        attempt: 1,
        now,
        lease_until: UnixMillis(u64::from(u32::MAX)),
        request_fingerprint: [0; 32],
        limits: protocol::quota::QuotaLimits::default(),
        tokens: 1_000,
        counts: true,
    };
    let began = Instant::now();
    store.reserve(job).await.unwrap();
    let reserved = began.elapsed();
    let settlement = Settlement {
        answer: None,
        note: None,
        key,
        attempt: 1,
        worker_id,
        state: TerminalState::Completed,
        finish_reason: None,
        error: None,
        usage: None,
        is_bounded: false,
        now,
        history: vec![],
        continued: 0,
        dead_letter: None,
    };
    let began = Instant::now();
    store.finalise(settlement).await.unwrap();
    (reserved, began.elapsed())
}

/// One answer of the engine, with nothing in between.
pub(crate) async fn direct(engine: &MockRuntime, model: engine::ModelId) -> Duration {
    let began = Instant::now();
    let mut stream = engine.generate(hello(model)).await.unwrap();
    while stream.next().await.is_some() {}
    began.elapsed()
}

fn hello(model: engine::ModelId) -> GenerateRequest {
    GenerateRequest { max_tokens: Some(1), ..GenerateRequest::new(model, PromptInput::Text("hello there".into())) }
}

/// The artifact that comes with the program.
pub(crate) fn tiny_artifact() -> engine::VerifiedArtifact {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(tiny_model::BYTES).unwrap();
    let bytes = tiny_model::BYTES.len() as u64;
    engine::VerifiedArtifact { file, sha256: tiny_model::digest().to_string(), bytes, parts: vec![] }
}

/// Milliseconds.
pub(crate) fn percentile(times: &[Duration], percent: usize) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)].as_secs_f64() * 1e3
}

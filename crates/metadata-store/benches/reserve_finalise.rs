//! Jobs a second, each reserved and then settled with every write on the disk before it is answered: with and without
//! group commit, and for a tenant with every limit. Pass a folder to measure another disk:
//! `cargo bench -p tether-metadata-store -- /mnt/disk`.

#![expect(clippy::print_stdout, reason = "the figures are what this program is for")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::model::ModelKey;
use protocol::quota::QuotaLimits;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, PublicKey, TraceId, UnixMillis};
use tether_metadata_store::{
    Finalised, JobKey, JobStore, NewJob, Reserved, Settlement, SqliteStore, Store, StoreOptions, TerminalState,
};
use tokio::task::JoinSet;
use uuid::Uuid;

const TIME_PER_RUN: Duration = Duration::from_secs(3);
/// Limits that are never reached.
const LIMITS: QuotaLimits = QuotaLimits {
    requests_per_day: Some(u64::MAX >> 16),
    tokens_per_minute: Some(u64::MAX >> 16),
    tokens_per_day: Some(u64::MAX >> 16),
    concurrent_jobs: Some(1_000),
};

fn main() {
    let folder: PathBuf = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'))
        .map_or_else(|| env!("CARGO_TARGET_TMPDIR").into(), Into::into);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    println!("clients  way                    pairs/s   reserve p50   reserve p99");
    for clients in [1, 8, 64] {
        let group_max = StoreOptions::default().group_max;
        for (way, group_max, limits) in [
            ("one commit each", 1, QuotaLimits::default()),
            ("group commit", group_max, QuotaLimits::default()),
            ("group commit, limits", group_max, LIMITS),
        ] {
            let mut times = runtime.block_on(run(&folder, clients, group_max, limits));
            times.sort_unstable();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
            let rate = times.len() as f64 / TIME_PER_RUN.as_secs_f64();
            println!("{clients:>7}  {way:<20} {rate:>9.0}   {:>11.2?}   {:>11.2?}", at(0.5), at(0.99));
        }
    }
}

/// Returns how long each reservation took.
async fn run(folder: &Path, clients: u16, group_max: usize, limits: QuotaLimits) -> Vec<Duration> {
    let folder = tempfile::tempdir_in(folder).expect("a folder for the file");
    let options = StoreOptions { group_max, ..StoreOptions::default() };
    let store = Arc::new(SqliteStore::open(folder.path().join("bench.db"), options).expect("opens"));
    let end = Instant::now() + TIME_PER_RUN;
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        tasks.spawn(client_loop(Arc::clone(&store), client, limits, end));
    }
    let times = tasks.join_all().await.concat();
    store.close().await.expect("closes");
    times
}

async fn client_loop(store: Arc<SqliteStore>, client: u16, limits: QuotaLimits, end: Instant) -> Vec<Duration> {
    let mut times = Vec::new();
    while Instant::now() < end {
        let job = NewJob { limits, ..job(client, times.len() as u64) };
        let (key, worker_id) = (job.key.clone(), job.worker_id);
        let started = Instant::now();
        assert_eq!(store.reserve(job).await, Ok(Reserved::New));
        times.push(started.elapsed());
        let settlement = Settlement {
            answer: None,
            note: None,
            key,
            attempt: 1,
            worker_id,
            state: TerminalState::Completed,
            finish_reason: None,
            error: None,
            is_bounded: limits.limits_tokens(),
            usage: Some(TokenUsage {
                prompt_tokens: 100,
                completion_tokens: 200,
                cached_tokens: 0,
                reasoning_tokens: 0,
            }),
            now: UnixMillis(2),
            history: vec![],
            continued: 0,
            dead_letter: None,
        };
        assert_eq!(store.finalise(settlement).await, Ok(Finalised::Settled));
    }
    times
}

fn job(client: u16, number: u64) -> NewJob {
    // Ids grow with time, as the UUIDv7 of real jobs do.
    let id = u128::from(number) << 64 | u128::from(client);
    NewJob {
        key: JobKey {
            tenant_id: "tenant".parse().expect("tenant"),
            correlation_id: CorrelationId(Uuid::from_u128(id)),
            retry_token: "retry-token-of-usual-length".parse().expect("token"),
        },
        trace_id: TraceId(id.to_be_bytes()),
        model: ModelKey { model_id: "llama3.1-8b".parse().expect("model"), version: "1.0".parse().expect("version") },
        region: "eu-west".parse().expect("region"),
        worker_id: PublicKey([client as u8 % 16; 32]),
        worker_capacity: 64,
        attempt: 1,
        now: UnixMillis(1),
        lease_until: UnixMillis(60_000),
        request_fingerprint: [7; 32],
        limits: QuotaLimits::default(),
        tokens: 1_000,
        counts: true,
    }
}

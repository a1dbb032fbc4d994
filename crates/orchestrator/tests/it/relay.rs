//! Dead letters reach a Redis stream, each once, whatever becomes of Redis.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metadata_store::{JobError, JobKey, JobStore, NewDeadLetter, NewJob, Settlement, SqliteStore, TerminalState};
use protocol::jobs::{DeadLetterCause, DeadLetterPurge};
use protocol::quota::QuotaLimits;
use protocol::usage::TokenUsage;
use protocol::{Clock as _, CorrelationId, ErrorCode, PublicKey, TraceId, UnixMillis};
use rpc::SystemClock;
use tether_orchestrator::Config;

use crate::redis::Redis;
use crate::stand::{Manner, Stand, model, region, stand_on};

fn id(number: u64) -> CorrelationId {
    CorrelationId(uuid::Uuid::from_u128(1_000 + u128::from(number)))
}

/// Lets a job die in the store.
async fn die(store: &dyn JobStore, number: u64) {
    let (key, worker_id) = (
        JobKey {
            tenant_id: "acme".parse().expect("a tenant"),
            correlation_id: id(number),
            retry_token: "once".parse().expect("a token"),
        },
        PublicKey([1; 32]),
    );
    let job = NewJob {
        key: key.clone(),
        trace_id: TraceId([1; 16]),
        model: model(),
        region: region(),
        worker_id,
        worker_capacity: 1_000,
        attempt: 1,
        now: SystemClock.now(),
        lease_until: UnixMillis(u64::MAX >> 1),
        request_fingerprint: [0; 32],
        limits: QuotaLimits::default(),
        tokens: 0,
        counts: true,
    };
    store.reserve(job).await.expect("reserved");
    let dead_letter = Some(NewDeadLetter {
        cause: DeadLetterCause::AttemptsFailed,
        history: vec![],
        payload: None,
        letters_max: 100,
        bytes_max: 1 << 20,
    });
    let settlement = Settlement {
        key,
        attempt: 1,
        worker_id,
        state: TerminalState::Failed,
        finish_reason: None,
        error: Some(JobError { code: ErrorCode::WorkerFailed, message: "it failed".to_owned() }),
        usage: Some(TokenUsage::default()),
        is_bounded: false,
        answer: None,
        note: None,
        now: SystemClock.now(),
        history: vec![],
        continued: 0,
        dead_letter,
    };
    assert_eq!(store.finalise(settlement).await, Ok(metadata_store::Finalised::Settled));
}

/// Waits until the stream has exactly these letters.
async fn until(redis: &Redis, expected: &[CorrelationId]) {
    let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let found = redis.letters();
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "the stream has {found:?}, not {expected:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn until_metric(stand: &Stand, line: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !stand.metrics.encode().lines().any(|found| found == line) {
        assert!(Instant::now() < deadline, "no {line}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_dead_letter_reaches_the_stream_once_and_a_wiped_redis_is_filled_again() {
    let redis = Redis::start();
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    die(&*store, 1).await;
    let config = Config { redis: redis.config(), ..Config::default() };
    let stand = stand_on(store.clone(), config.clone()).await;
    until(&redis, &[id(1)]).await;

    stand.pair(Manner::Crash(1), Manner::Crash(1)).await;
    let job = stand.job();
    stand.answer(&job).await.expect_err("engines crash on it");
    until(&redis, &[id(1), job.correlation_id]).await;

    // The next orchestrator of the same key and store sends nothing again.
    drop(stand);
    let _stand = stand_on(store.clone(), config).await;
    die(&*store, 2).await;
    until(&redis, &[id(1), job.correlation_id, id(2)]).await;

    redis.run(&["FLUSHALL"]);
    until(&redis, &[id(1), job.correlation_id, id(2)]).await;

    let purge = DeadLetterPurge { correlation_id: Some(job.correlation_id), ..DeadLetterPurge::default() };
    assert_eq!(store.purge_dead_letters(purge).await, Ok(1));
    until(&redis, &[id(1), id(2)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_two_relays_miss_at_the_same_time_is_sent_once() {
    let redis = Redis::start();
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    die(&*store, 1).await;
    // Both find that the letter is missing before either can append it, as a relay does that still runs beside the next
    // one of its orchestrator.
    redis.run(&["CLIENT", "PAUSE", "600000", "WRITE"]);
    let config = Config { redis: redis.config(), ..Config::default() };
    let relays = [stand_on(store.clone(), config.clone()).await, stand_on(store.clone(), config).await];
    let deadline = Instant::now() + Duration::from_mins(1);
    while redis.clients_at("evalsha") < relays.len() {
        assert!(Instant::now() < deadline, "a relay does not come to the letter");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    redis.run(&["CLIENT", "UNPAUSE"]);
    for relay in &relays {
        until_metric(relay, "tether_dlq_unsent 0").await;
    }
    assert_eq!(redis.letters(), [id(1).to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_dies_while_redis_is_away_or_full_is_sent_later() {
    let mut redis = Redis::start();
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    let stand = stand_on(store.clone(), Config { redis: redis.config(), ..Config::default() }).await;
    die(&*store, 1).await;
    until(&redis, &[id(1)]).await;

    redis.kill();
    die(&*store, 2).await;
    until_metric(&stand, "tether_dlq_unsent 1").await;
    redis.start_again();
    until(&redis, &[id(1), id(2)]).await;

    redis.run(&["CONFIG", "SET", "maxmemory", "1"]);
    die(&*store, 3).await;
    die(&*store, 4).await;
    redis.run(&["CONFIG", "SET", "maxmemory", "0"]);
    until(&redis, &[id(1), id(2), id(3), id(4)]).await;
}

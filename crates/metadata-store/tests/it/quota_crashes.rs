//! A process that reserves and settles within quotas is killed again and again. Whenever that happens, no quota is
//! overspent, and what the killed process held is free again once its leases have expired.
//!
//! The long form is `make quotas`.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::quota::{QuotaLimits, QuotaUsage, Window};
use protocol::usage::TokenUsage;
use protocol::{TenantId, UnixMillis};
use rusqlite::Connection;
use tether_metadata_store::{
    Finalised, JobKey, JobStore, NewJob, ReassignError, Reassignment, ReserveError, Reserved, Settlement, SqliteStore,
    StoreOptions, TerminalState,
};
use tokio::task::JoinSet;

use crate::conformance::concurrency::Random;
use crate::conformance::samples::{NOW, job, key, reassignment, settlement, tenant, worker};

const FILE: &str = "TETHER_TEST_QUOTA_FILE";
/// The round, which decides what the victim does and what time it has.
const ROUND: &str = "TETHER_TEST_QUOTA_ROUND";

const CLIENTS: u64 = 32;
/// The victim prints a line after as many operations.
const OPERATIONS_PER_LINE: u64 = 16;
const LEASE: Duration = Duration::from_secs(30);
/// Time passes by as much from one round to the next, so that leases expire and minutes end in between.
const ROUND_TAKES: Duration = Duration::from_secs(20);

/// The tenants, each with limits of another kind. Some are reached in every minute and some once a day.
fn tenants() -> [(TenantId, QuotaLimits); 3] {
    let none = QuotaLimits::default();
    [
        (tenant("by-minute"), QuotaLimits { tokens_per_minute: Some(5_000), ..none }),
        (tenant("by-day"), QuotaLimits { tokens_per_day: Some(200_000), requests_per_day: Some(100_000), ..none }),
        (tenant("by-jobs"), QuotaLimits { concurrent_jobs: Some(5), tokens_per_day: Some(1 << 40), ..none }),
    ]
}

fn time_of(round: u64) -> UnixMillis {
    Window::Day.start(NOW).after(ROUND_TAKES * round as u32)
}

/// Reads a number from the environment.
fn number_in(variable: &str) -> Option<u64> {
    Some(std::env::var_os(variable)?.to_str()?.parse().expect("a number"))
}

fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path, StoreOptions::default()).expect("opens, also after a kill")
}

/// Not a test of its own: the process that the tests below kill.
#[test]
#[ignore = "run in a process of its own by a_killed_process_overspends_no_quota"]
fn victim_that_uses_quotas_until_it_is_killed() {
    let file = std::env::var_os(FILE).expect("started by the tests below");
    let round = number_in(ROUND).expect("a round");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().expect("runtime");
    runtime.block_on(async {
        let store = Arc::new(open(Path::new(&file)));
        let clients = (0..CLIENTS).map(|client| act(store.clone(), round, client)).collect::<JoinSet<_>>();
        clients.join_all().await;
    });
}

/// Reserves, moves and settles jobs, and gives some of them up, for ever.
#[expect(clippy::print_stdout, reason = "its parent reads how far it is")]
async fn act(store: Arc<SqliteStore>, round: u64, client: u64) {
    let mut random = Random(round << 8 | client);
    let now = time_of(round);
    let mut done = 0;
    for number in 0_u64.. {
        let (tenant_id, limits) = tenants()[random.below(3) as usize].clone();
        let key = JobKey { tenant_id, ..key(u128::from(round) << 64 | u128::from(client) << 40 | u128::from(number)) };
        let mut tokens = random.below(1_000);
        let new = NewJob { now, lease_until: now.after(LEASE), limits, tokens, worker_capacity: u32::MAX, ..job(0) };
        done += 1;
        match store.reserve(NewJob { key: key.clone(), ..new }).await {
            Ok(Reserved::New) => {}
            Err(ReserveError::Quota(_)) => continue,
            other => panic!("the key is new: {other:?}"),
        }
        let mut attempt = 1;
        if random.below(4) == 0 {
            let (worker_id, lease_until) = (worker(1), now.after(LEASE));
            let more = random.below(1_500);
            let moved = Reassignment { key: key.clone(), worker_id, lease_until, now, ..reassignment(0) };
            match store.reassign(Reassignment { limits, tokens: more, worker_capacity: u32::MAX, ..moved }).await {
                Ok(()) => (attempt, tokens) = (2, tokens.max(more)),
                Err(ReassignError::Quota(_)) => {}
                other => panic!("nobody else moves it: {other:?}"),
            }
            done += 1;
        }
        match random.below(16) {
            // Given up: its lease expires in a later round.
            0 => {}
            1 => {
                store.release_expired(now, 64).await.expect("releases");
                store.prune(now, 256).await.expect("prunes");
                done += 2;
            }
            what => {
                // It may claim more than was reserved, and is not billed that.
                let usage = TokenUsage { prompt_tokens: random.below(tokens + 20) as u32, ..TokenUsage::default() };
                let state = if what < 5 { TerminalState::Failed } else { TerminalState::Completed };
                let settle = Settlement { key, attempt, state, usage: Some(usage), now, ..settlement(0) };
                assert_eq!(store.finalise(settle).await, Ok(Finalised::Settled));
                done += 1;
            }
        }
        for _ in 0..done / OPERATIONS_PER_LINE {
            println!("done");
        }
        done %= OPERATIONS_PER_LINE;
    }
}

/// Kills victims on one file until they have done so many operations. Returns how many were killed, and how many
/// operations they are known to have done.
async fn kill_until(operations: u64) -> (u64, u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("quotas.db");
    let (mut random, mut done, mut round) = (Random(operations), 0, 0);
    while done < operations {
        done += OPERATIONS_PER_LINE * kill_one(&file, round, 1 + random.below(400));
        check(&file, round).await;
        round += 1;
    }
    (round, done)
}

/// Kills a victim after it has printed so many lines. Returns how many it printed.
fn kill_one(file: &Path, round: u64, lines: u64) -> u64 {
    let mut victim = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "quota_crashes::victim_that_uses_quotas_until_it_is_killed", "--ignored", "--nocapture"])
        .env(FILE, file)
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut printed = BufReader::new(victim.stdout.take().expect("is piped")).lines().map_while(Result::ok);
    let mut count = 0;
    while count < lines {
        let line = printed.next().expect("it goes on until it is killed");
        count += u64::from(line.ends_with("done"));
    }
    victim.kill().expect("is killed");
    count += printed.filter(|line| line.ends_with("done")).count() as u64;
    victim.wait().expect("has ended");
    count
}

/// Checks what a killed victim left behind.
async fn check(file: &Path, round: u64) {
    let store = open(file);
    for (tenant_id, limits) in tenants() {
        let usage = store.quota_usage(&tenant_id, time_of(round)).await.expect("reads");
        let is_within = |taken: u64, limit: Option<u64>| limit.is_none_or(|limit| taken <= limit);
        assert!(is_within(usage.minute_tokens.taken(), limits.tokens_per_minute), "round {round}: {usage:?}");
        assert!(is_within(usage.day_tokens.taken(), limits.tokens_per_day), "round {round}: {usage:?}");
        assert!(is_within(usage.day_requests.taken(), limits.requests_per_day), "round {round}: {usage:?}");
        assert!(limits.concurrent_jobs.is_none_or(|limit| usage.jobs <= limit), "round {round}: {usage:?}");
    }
    drop(store);
    compare(file, round);
    if round % 8 == 7 {
        let store = open(file);
        while !store.release_expired(time_of(round).after(LEASE), 256).await.expect("releases").is_empty() {}
        for (tenant_id, _) in tenants() {
            let QuotaUsage { minute_tokens, day_tokens, day_requests, jobs } =
                store.quota_usage(&tenant_id, time_of(round)).await.expect("reads");
            let held = (minute_tokens.reserved, day_tokens.reserved, day_requests.reserved, jobs);
            assert_eq!(held, (0, 0, 0, 0), "round {round}: every lease has expired");
        }
        drop(store);
        compare(file, round);
    }
}

/// Compares the windows with the reservations and with the ledger.
fn compare(file: &Path, round: u64) {
    let connection = Connection::open(file).expect("opens");
    let number = |sql: &str| -> i64 { connection.query_row(sql, (), |row| row.get(0)).expect(sql) };
    assert_eq!(number("SELECT count(*) FROM quota_windows WHERE min(tokens_reserved, requests_reserved) < 0"), 0);
    let reserved = number("SELECT coalesce(sum(tokens), 0) FROM reservations");
    for window in ["minute", "day"] {
        let sql = format!("SELECT coalesce(sum(tokens_reserved), 0) FROM quota_windows WHERE window = '{window}'");
        assert_eq!(number(&sql), reserved, "round {round}: {window}");
    }
    // All rounds are in one day.
    let spent = number("SELECT coalesce(sum(tokens_spent), 0) FROM quota_windows WHERE window = 'day'");
    assert_eq!(spent, number("SELECT coalesce(sum(prompt_tokens + completion_tokens), 0) FROM usage"), "round {round}");
}

#[tokio::test]
async fn a_killed_process_overspends_no_quota() {
    let (killed, _) = kill_until(15_000).await;
    assert!(killed > 2, "only {killed}");
}

#[tokio::test]
#[ignore = "runs for long: make quotas"]
async fn no_kill_overspends_a_quota_in_a_million_operations() {
    let operations = number_in("OPERATIONS").unwrap_or(1_000_000);
    let began = Instant::now();
    let (killed, done) = kill_until(operations).await;
    println!("{done} operations, {killed} kills, {:.0?}", began.elapsed());
}

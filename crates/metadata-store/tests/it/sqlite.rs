//! What is particular to the SQLite store: its file, its threads, its end.

use std::io::{BufRead as _, BufReader, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;
use tether_metadata_store::{
    DurableState, JobRecord, JobStore, NewJob, OpenError, RegistryStore, ReserveError, Reserved, SqliteStore, Store,
    StoreError, StoreOptions, TerminalState, UsageCursor,
};
use tokio::task::JoinSet;

use crate::conformance::samples::{LEASE, NOW, job, key, settlement, tenant, worker};
use crate::conformance::{Jobs, Registry, Subject, job_store_conforms, registry_store_conforms};

mod in_a_file {
    mod jobs {
        super::super::job_store_conforms!(super::super::jobs_in_a_file);
    }

    mod registry {
        super::super::registry_store_conforms!(super::super::registry_in_a_file);
    }
}

mod in_memory {
    mod jobs {
        super::super::job_store_conforms!(super::super::jobs_in_memory);
    }

    mod registry {
        super::super::registry_store_conforms!(super::super::registry_in_memory);
    }
}

fn jobs_in_a_file() -> Jobs {
    let folder = folder();
    Subject { store: Arc::new(open(&path(&folder)).expect("opens")), _keep: Box::new(folder) }
}

fn registry_in_a_file() -> Registry {
    let folder = folder();
    Subject { store: Arc::new(open(&path(&folder)).expect("opens")), _keep: Box::new(folder) }
}

fn jobs_in_memory() -> Jobs {
    Subject { store: Arc::new(SqliteStore::in_memory().expect("opens")), _keep: Box::new(()) }
}

fn registry_in_memory() -> Registry {
    Subject { store: Arc::new(SqliteStore::in_memory().expect("opens")), _keep: Box::new(()) }
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn path(folder: &TempDir) -> PathBuf {
    folder.path().join("store.db")
}

fn open(path: &Path) -> Result<SqliteStore, OpenError> {
    SqliteStore::open(path, StoreOptions::default())
}

/// Opens a file that must not open.
fn refused(path: &Path) -> OpenError {
    match open(path) {
        Ok(_) => panic!("{} opened", path.display()),
        Err(error) => error,
    }
}

/// Makes a store, and changes its file behind its back.
fn tampered(path: &Path, sql: &str) {
    drop(open(path).expect("opens"));
    Connection::open(path).expect("opens").execute_batch(sql).expect("is SQL");
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart() {
    let folder = folder();
    let store = open(&path(&folder)).expect("opens");
    store.reserve(job(1)).await.expect("reserves");
    store.close().await.expect("closes");
    // The closed store lives on; another may have the file.
    let next = open(&path(&folder)).expect("opens");
    assert!(matches!(next.reserve(job(1)).await, Ok(Reserved::Duplicate(_))));
    assert_eq!(next.reserve(job(2)).await, Ok(Reserved::New));
    drop(next);
    let last = open(&path(&folder)).expect("opens");
    assert!(matches!(last.reserve(job(2)).await, Ok(Reserved::Duplicate(_))));
}

#[test]
fn a_store_in_memory_needs_neither_threads_nor_timers() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let store = SqliteStore::in_memory().expect("opens");
    assert_eq!(runtime.block_on(store.reserve(job(1))), Ok(Reserved::New));
}

#[cfg(unix)]
#[tokio::test]
async fn only_its_owner_can_read_the_file() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = folder();
    let loose = path(&folder);
    std::fs::write(&loose, "").expect("writes");
    std::fs::set_permissions(&loose, std::fs::Permissions::from_mode(0o644)).expect("sets");
    let store = open(&loose).expect("opens");
    store.reserve(job(1)).await.expect("reserves");
    let files: Vec<_> = std::fs::read_dir(folder.path()).expect("lists").map(|entry| entry.expect("reads")).collect();
    assert!(files.len() >= 3, "the file, its log and its lock: {files:?}");
    for file in files {
        let mode = file.metadata().expect("has metadata").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", file.path());
    }
}

#[test]
fn a_file_has_one_store_at_a_time() {
    let folder = folder();
    let first = open(&path(&folder)).expect("opens");
    let error = refused(&path(&folder));
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    drop(first);
    open(&path(&folder)).expect("the file is free again");
}

#[test]
fn a_file_that_another_program_has_locked_is_refused() {
    let folder = folder();
    tampered(&path(&folder), "");
    let other = Connection::open(path(&folder)).expect("opens");
    other.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").expect("locks");
    let options = StoreOptions { busy_timeout: Duration::from_millis(20), ..StoreOptions::default() };
    let error = SqliteStore::open(path(&folder), options).err().expect("is refused");
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
}

#[test]
fn a_place_that_cannot_be_written_is_refused() {
    let folder = folder();
    for path in [folder.path().join("missing/store.db"), folder.path().to_owned()] {
        let error = refused(&path);
        assert!(matches!(error, OpenError::Unwritable { .. }), "{error}");
        assert!(error.to_string().contains("check that the folder exists"), "{error}");
    }
}

#[test]
fn a_file_of_a_newer_program_is_refused() {
    let folder = folder();
    let newer = "INSERT INTO refinery_schema_history VALUES (999, 'future', '2040-01-01T00:00:00Z', '1')";
    tampered(&path(&folder), newer);
    let error = refused(&path(&folder));
    assert!(matches!(error, OpenError::Newer { found: 999, known: 12, .. }), "{error}");
}

#[test]
fn a_file_that_is_no_store_is_refused_and_left_as_it_is() {
    let folder = folder();
    let text = "this is a letter and no database. ".repeat(300);
    std::fs::write(path(&folder), &text).expect("writes");
    let error = refused(&path(&folder));
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("restore a copy"), "{error}");
    assert_eq!(std::fs::read_to_string(path(&folder)).expect("reads"), text);
}

#[tokio::test]
async fn a_file_with_overwritten_pages_is_refused() {
    let folder = folder();
    let store = open(&path(&folder)).expect("opens");
    for number in 0..200 {
        store.reserve(NewJob { worker_capacity: 1000, ..job(number) }).await.expect("reserves");
    }
    drop(store);
    let mut file = std::fs::OpenOptions::new().write(true).open(path(&folder)).expect("opens");
    file.seek(std::io::SeekFrom::Start(4096)).expect("seeks");
    file.write_all(&vec![0xa5; 4096 * 8]).expect("writes");
    let error = refused(&path(&folder));
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
}

#[test]
fn no_damaged_byte_makes_opening_or_reading_panic() {
    let folder = folder();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let store = open(&path(&folder)).expect("opens");
    for number in 0..4 {
        runtime.block_on(store.reserve(job(number))).expect("reserves");
    }
    drop(store);
    let sound = std::fs::read(path(&folder)).expect("reads");
    // Steps over the whole file, with a stride that meets every offset in a page.
    for position in (0..sound.len()).step_by((sound.len() / 150) | 1) {
        let mut damaged = sound.clone();
        damaged[position] ^= 0xff;
        std::fs::write(path(&folder), damaged).expect("writes");
        let options = StoreOptions { verify: position % 2 == 0, ..StoreOptions::default() };
        if let Ok(store) = SqliteStore::open(path(&folder), options) {
            for number in 0..4 {
                let _ = runtime.block_on(store.job(&key(number)));
                let _ = runtime.block_on(store.finalise(settlement(number)));
            }
            let _ = runtime.block_on(store.active_reservations());
            let _ = runtime.block_on(store.usage(&tenant("acme"), UsageCursor::default(), 10));
            assert_ne!(runtime.block_on(store.high_waters()), Err(StoreError::Closed), "a thread panicked");
            assert_ne!(runtime.block_on(store.models()), Err(StoreError::Closed), "a thread panicked");
        }
    }
}

#[tokio::test]
async fn a_row_that_does_not_parse_is_an_error_that_names_the_column() {
    let folder = folder();
    let store = open(&path(&folder)).expect("opens");
    store.reserve(job(1)).await.expect("reserves");
    drop(store);
    for (change, column) in [
        ("region = 'Not A Region'", "region"),
        ("model_version = 'one'", "version"),
        ("created_at = -1", "created_at"),
        ("error_code = 'no_such_code', error_message = ''", "error_code"),
        ("attempt = -7", "attempt"),
    ] {
        Connection::open(path(&folder))
            .expect("opens")
            .execute(&format!("UPDATE jobs SET {change}"), ())
            .expect(change);
        let store = open(&path(&folder)).expect("opens");
        let error = store.job(&key(1)).await.expect_err(change);
        assert!(matches!(&error, StoreError::Damaged { .. }), "{error}");
        if column != "attempt" {
            assert!(error.to_string().contains(column), "{error}");
        }
        let mend = "UPDATE jobs SET region = 'eu-west', model_version = '1.0', created_at = 0, error_code = NULL";
        drop(store);
        Connection::open(path(&folder)).expect("opens").execute(mend, ()).expect("mends");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operation_that_fails_inside_a_group_leaves_the_others_committed() {
    let folder = folder();
    // Fails a reservation when its job is already written: half of the operation.
    let poison = "CREATE TRIGGER poison BEFORE INSERT ON reservations WHEN NEW.lease_until = 666
                  BEGIN SELECT RAISE(ABORT, 'poisoned'); END";
    tampered(&path(&folder), poison);
    let store = Arc::new(open(&path(&folder)).expect("opens"));
    // While another program holds the lock, everything gathers in one group.
    let other = Connection::open(path(&folder)).expect("opens");
    other.execute_batch("BEGIN IMMEDIATE").expect("locks");
    let mut calls = JoinSet::new();
    for number in 0..64 {
        let store = Arc::clone(&store);
        let lease_until = if number % 20 == 7 { protocol::UnixMillis(666) } else { LEASE };
        let job = NewJob { worker_capacity: 100, lease_until, ..job(number) };
        calls.spawn(async move { (number, store.reserve(job).await) });
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    other.execute_batch("COMMIT").expect("unlocks");
    for (number, outcome) in calls.join_all().await {
        let found = store.job(&key(number)).await.expect("reads");
        if number % 20 == 7 {
            assert!(matches!(&outcome, Err(ReserveError::Store(error)) if error.to_string().contains("poisoned")));
            assert_eq!(found, None, "half an operation was left behind");
        } else {
            assert_eq!(outcome, Ok(Reserved::New));
            assert!(found.is_some());
        }
    }
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 61)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses_while_reads_go_on() {
    let folder = folder();
    let options = StoreOptions {
        queue_depth_max: 1,
        // A slow writer must not take what is queued as one group.
        group_max: 1,
        queue_timeout: Duration::from_millis(10),
        busy_timeout: Duration::from_millis(500),
        ..StoreOptions::default()
    };
    let store = Arc::new(SqliteStore::open(path(&folder), options).expect("opens"));
    store.reserve(job(0)).await.expect("reserves");
    let other = Connection::open(path(&folder)).expect("opens");
    other.execute_batch("BEGIN IMMEDIATE").expect("locks");
    let mut calls = JoinSet::new();
    for number in 1..=6 {
        let store = Arc::clone(&store);
        calls.spawn(async move { store.reserve(NewJob { worker_capacity: 9, ..job(number) }).await });
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(store.job(&key(0)).await.expect("reads while a write waits").is_some());
    let outcomes = calls.join_all().await;
    let overloaded = Err(ReserveError::Store(StoreError::Overloaded));
    assert!(outcomes.iter().filter(|outcome| **outcome == overloaded).count() >= 3, "{outcomes:?}");
    let locked = |outcome: &&Result<Reserved, ReserveError>| {
        matches!(outcome, Err(ReserveError::Store(StoreError::Unavailable { .. })))
    };
    assert!(outcomes.iter().filter(locked).count() >= 1, "a wait for a lock ends: {outcomes:?}");
    other.execute_batch("ROLLBACK").expect("unlocks");
    assert_eq!(store.reserve(job(9)).await, Ok(Reserved::New), "the store has recovered");
}

const VICTIM_FILE: &str = "TETHER_TEST_VICTIM_FILE";

/// Not a test of its own: the process that the next test kills. It writes for ever and prints what was acknowledged.
#[test]
#[ignore = "run in a process of its own by a_killed_process_loses_nothing_it_acknowledged"]
fn victim_that_writes_until_it_is_killed() {
    let file = std::env::var_os(VICTIM_FILE).expect("started by the test below");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().expect("runtime");
    runtime.block_on(async {
        let store = Arc::new(open(Path::new(&file)).expect("opens"));
        let mut clients = JoinSet::new();
        for client in 0..16_u128 {
            let store = Arc::clone(&store);
            clients.spawn(async move {
                for number in (client..).step_by(16) {
                    store.reserve(NewJob { worker_capacity: u32::MAX, ..job(number) }).await.expect("reserves");
                    println!("acknowledged {number} reserved");
                    if number % 3 == 0 {
                        store.finalise(settlement(number)).await.expect("settles");
                        println!("acknowledged {number} settled");
                    }
                }
            });
        }
        clients.join_all().await;
    });
}

#[tokio::test]
async fn a_killed_process_loses_nothing_it_acknowledged() {
    let folder = folder();
    for round in 0..3 {
        let file = folder.path().join(format!("round-{round}.db"));
        let mut victim = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "sqlite::victim_that_writes_until_it_is_killed", "--ignored", "--nocapture"])
            .env(VICTIM_FILE, &file)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(victim.stdout.take().expect("is piped")).lines();
        let mut acknowledged = Vec::new();
        let mut note = |line: String| {
            let words: Vec<_> = line.split(' ').collect();
            // The last line may be cut.
            if let ["acknowledged", number, state @ ("reserved" | "settled")] = words.as_slice() {
                acknowledged.push((number.parse::<u128>().expect("a number"), *state == "settled"));
            }
        };
        lines.by_ref().take(150 + 171 * round).map_while(Result::ok).for_each(&mut note);
        victim.kill().expect("is killed");
        lines.map_while(Result::ok).for_each(&mut note);
        victim.wait().expect("has ended");
        assert!(acknowledged.len() > 100, "{acknowledged:?}");

        let store = open(&file).expect("opens after a crash");
        for (number, settled) in &acknowledged {
            let job = store.job(&key(*number)).await.expect("reads").expect("was acknowledged");
            assert!(!settled || job.usage.is_some(), "{number} was settled");
            assert_eq!(job.lease_until.is_none(), job.usage.is_some(), "{number} is whole");
        }

        // The lock on the file proves that nobody else works on these jobs.
        let held: u32 = store.active_reservations().await.expect("reads").iter().map(|(_, count)| count).sum();
        let orphans = store.release_orphans(NOW).await.expect("releases");
        assert!(held > 0 && orphans.len() == held as usize, "{held} {}", orphans.len());
        assert!(orphans.iter().all(|job| job.state == DurableState::Settled(TerminalState::Failed)));
        assert_eq!(store.active_reservations().await, Ok(vec![]));
        let again = NewJob { request_fingerprint: orphans[0].request_fingerprint, ..job_like(&orphans[0]) };
        assert_eq!(store.reserve(again).await, Ok(Reserved::Again { attempt: orphans[0].attempt + 1 }));
        assert_eq!(store.release_orphans(NOW).await, Ok(vec![]), "this one is ours");
    }
}

#[tokio::test]
async fn reservations_of_this_process_are_no_orphans() {
    let folder = folder();
    let store = open(&folder.path().join("own.db")).expect("opens");
    store.reserve(job(1)).await.expect("reserves");
    assert_eq!(store.release_orphans(NOW).await, Ok(vec![]));
    let shared = SqliteStore::in_memory().expect("opens");
    shared.reserve(job(1)).await.expect("reserves");
    assert_eq!(shared.release_orphans(NOW).await, Ok(vec![]));
}

/// The job of a record, as it comes again.
fn job_like(record: &JobRecord) -> NewJob {
    NewJob { key: record.key.clone(), ..job(1) }
}

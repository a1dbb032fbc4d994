//! Opens a store's file: takes the lock, checks for damage, migrates the schema and configures SQLite.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::StoreOptions;

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// Why a store could not be opened, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has the file open.
    #[error("{path} is in use by another process; stop it, or give this one a data folder of its own", path = .path.display())]
    InUse { path: PathBuf },
    /// The file cannot be created, read or written.
    #[error("cannot open {path} for writing: {reason}; check that the folder exists, who owns it, and the free space", path = .path.display())]
    Unwritable {
        path: PathBuf,
        /// The error of the operating system.
        reason: String,
    },
    /// The file is not a store, or is damaged.
    #[error("{path} is damaged: {reason}; move it aside and restore a copy", path = .path.display())]
    Damaged { path: PathBuf, reason: String },
    /// A newer version of the program wrote the file.
    #[error("{path} has schema {found} and this program knows up to {known}; run the newer program, or restore a copy", path = .path.display())]
    Newer {
        path: PathBuf,
        found: i64,
        /// The latest schema version this program knows.
        known: i64,
    },
}

pub(super) struct Opened {
    pub(super) writer: Connection,
    pub(super) reader: Connection,
    /// Keeps other processes from opening the file until dropped.
    pub(super) lock: File,
}

/// Opens the file, or creates it.
pub(super) fn open(path: &Path, options: &StoreOptions) -> Result<Opened, OpenError> {
    let unwritable = |error: io::Error| OpenError::Unwritable { path: path.to_owned(), reason: error.to_string() };
    // The lock has a file of its own, because closing any handle of a SQLite file drops SQLite's locks on it.
    let lock = private_file(&beside(path, ".lock")).map_err(unwritable)?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => OpenError::InUse { path: path.to_owned() },
        TryLockError::Error(error) => unwritable(error),
    })?;
    // SQLite gives its log the same mode as the database file.
    private_file(path).map_err(unwritable)?;
    let explain = |error| explain(path, error);
    let flags = OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut writer = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(explain)?;
    configure_writer(&writer, options).map_err(explain)?;
    if options.verify {
        verify(path, &writer)?;
    }
    migrate(path, &mut writer)?;
    let reader = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(explain)?;
    configure(&reader, options).map_err(explain)?;
    Ok(Opened { writer, reader, lock })
}

/// Makes an empty store in memory.
pub(super) fn open_in_memory() -> Result<Connection, OpenError> {
    let path = Path::new(":memory:");
    let mut connection = Connection::open_in_memory().map_err(|error| explain(path, error))?;
    configure(&connection, &StoreOptions::default()).map_err(|error| explain(path, error))?;
    migrate(path, &mut connection)?;
    Ok(connection)
}

/// Opens a file that only its owner may read and write, and creates it if it is missing.
fn private_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
        let file = options.mode(0o600).open(path)?;
        if file.metadata()?.permissions().mode() & 0o077 != 0 {
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        }
        Ok(file)
    }
    #[cfg(not(unix))]
    options.open(path)
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

fn configure(connection: &Connection, options: &StoreOptions) -> rusqlite::Result<()> {
    connection.busy_timeout(options.busy_timeout)?;
    connection.set_prepared_statement_cache_capacity(64);
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    // KiB, negative by SQLite's convention.
    connection.pragma_update(None, "cache_size", -32 * 1024)
}

fn configure_writer(connection: &Connection, options: &StoreOptions) -> rusqlite::Result<()> {
    configure(connection, options)?;
    let mode: String = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if mode != "wal" {
        return Err(rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN),
            Some(format!("this file system has no write-ahead log, only {mode:?}")),
        ));
    }
    // An acknowledged commit survives a power failure.
    connection.pragma_update(None, "synchronous", "FULL")?;
    // Pages in the log before a checkpoint; above the default, for fewer and larger checkpoints.
    connection.pragma_update(None, "wal_autocheckpoint", 4000)
}

fn verify(path: &Path, connection: &Connection) -> Result<(), OpenError> {
    let found: String =
        connection.query_row("PRAGMA quick_check(1)", (), |row| row.get(0)).map_err(|error| explain(path, error))?;
    if found == "ok" { Ok(()) } else { Err(OpenError::Damaged { path: path.to_owned(), reason: found }) }
}

/// Brings the schema up to date.
fn migrate(path: &Path, connection: &mut Connection) -> Result<(), OpenError> {
    let runner = migrations::migrations::runner();
    let known = runner.get_migrations().iter().map(|migration| i64::from(migration.version())).max().unwrap_or(0);
    let found = schema_version(connection).map_err(|error| explain(path, error))?;
    if found > known {
        return Err(OpenError::Newer { path: path.to_owned(), found, known });
    }
    if found == known {
        return Ok(());
    }
    runner.run(connection).map(|_| ()).map_err(|error| match error.kind() {
        refinery::error::Kind::Connection(_, source) if source.is::<rusqlite::Error>() => {
            OpenError::Unwritable { path: path.to_owned(), reason: source.to_string() }
        }
        _ => OpenError::Damaged { path: path.to_owned(), reason: error.to_string() },
    })
}

/// Returns the version of the schema, 0 for an empty file.
fn schema_version(connection: &Connection) -> rusqlite::Result<i64> {
    if connection.table_exists(None, "refinery_schema_history")? {
        connection.query_row("SELECT coalesce(max(version), 0) FROM refinery_schema_history", (), |row| row.get(0))
    } else {
        Ok(0)
    }
}

fn explain(path: &Path, error: rusqlite::Error) -> OpenError {
    let path = path.to_owned();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => OpenError::InUse { path },
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) | None => {
            OpenError::Damaged { path, reason: error.to_string() }
        }
        Some(_) => OpenError::Unwritable { path, reason: error.to_string() },
    }
}

//! Group commit: one disk sync for all queued writes.

use rusqlite::Connection;

use super::db_thread::{Operation, Task, Tasks};
use crate::store::StoreError;

/// Runs writes until the queue is closed, up to `group_max` operations per commit.
///
/// A group is whatever is queued at that moment. No write is delayed to make it larger, so a lone write is as fast as
/// the disk. While one group is synced, the next one queues up.
pub(super) fn write_all(connection: &Connection, mut tasks: Tasks, group_max: usize) {
    let mut group = Vec::with_capacity(group_max);
    while let Some(task) = tasks.blocking_recv() {
        let mut next = Some(task);
        while let Some(task) = next {
            match task {
                Task::Run(operation) => group.push(operation),
                Task::Close => tasks.close(),
            }
            next = if group.len() < group_max { tasks.try_recv().ok() } else { None };
        }
        if !group.is_empty() {
            commit(connection, &mut group);
        }
    }
}

/// Commits a group and then replies to its callers.
fn commit(connection: &Connection, group: &mut Vec<Box<dyn Operation>>) {
    match together(connection, group) {
        Ok(()) => group.drain(..).for_each(|operation| operation.reply(Ok(()))),
        Err(Failed::Group(error)) => group.drain(..).for_each(|operation| operation.reply(Err(error.clone()))),
        Err(Failed::Operation(error)) if group.len() == 1 => {
            group.drain(..).for_each(|operation| operation.reply(Err(error.clone())));
        }
        Err(Failed::Operation(_)) => {
            let outcomes = apart(connection, group);
            group.drain(..).zip(outcomes).for_each(|(operation, outcome)| operation.reply(outcome));
        }
    }
}

enum Failed {
    /// One operation failed; the others may be run without it.
    Operation(StoreError),
    Group(StoreError),
}

/// Runs a group in one transaction. Savepoints would slow every operation for the sake of rare failures. A refusal is
/// not a failure: it is an outcome, and writes nothing.
fn together(connection: &Connection, group: &mut [Box<dyn Operation>]) -> Result<(), Failed> {
    let group_failed = |error: rusqlite::Error| Failed::Group(error.into());
    execute(connection, "BEGIN IMMEDIATE").map_err(group_failed)?;
    for operation in group {
        if let Err(error) = operation.run(connection) {
            roll_back(connection);
            return Err(Failed::Operation(error.into()));
        }
    }
    execute(connection, "COMMIT").map_err(|error| {
        roll_back(connection);
        group_failed(error)
    })
}

/// Runs a group again in one transaction, with a savepoint for each operation, so that a failed one does not affect the
/// others. Returns the outcome of each.
fn apart(connection: &Connection, group: &mut [Box<dyn Operation>]) -> Vec<Result<(), StoreError>> {
    let try_all = |group: &mut [Box<dyn Operation>]| -> rusqlite::Result<Vec<Result<(), StoreError>>> {
        execute(connection, "BEGIN IMMEDIATE")?;
        let mut outcomes = Vec::with_capacity(group.len());
        for operation in group {
            execute(connection, "SAVEPOINT operation")?;
            let outcome = operation.run(connection);
            if outcome.is_err() {
                // This fails if SQLite rolled back the whole transaction; then the group fails too.
                execute(connection, "ROLLBACK TO operation")?;
            }
            execute(connection, "RELEASE operation")?;
            outcomes.push(outcome.map_err(StoreError::from));
        }
        execute(connection, "COMMIT")?;
        Ok(outcomes)
    };
    try_all(group).unwrap_or_else(|error| {
        roll_back(connection);
        let error = StoreError::from(error);
        group.iter().map(|_| Err(error.clone())).collect()
    })
}

fn roll_back(connection: &Connection) {
    // SQLite rolls back by itself after some errors. If this fails, the next BEGIN returns the error to its callers.
    if !connection.is_autocommit() {
        let _ = execute(connection, "ROLLBACK");
    }
}

fn execute(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute(()).map(|_| ())
}

//! Other names for models.

use protocol::ModelName;
use protocol::model::AliasEntry;
use rusqlite::{Connection, Row, named_params};

use crate::row::{self, integer};

/// Sets what an alias stands for, unless a model has its name.
pub(crate) fn put(connection: &Connection, entry: &AliasEntry) -> rusqlite::Result<bool> {
    let AliasEntry { alias, target, created_at } = entry;
    let written = connection
        .prepare_cached(
            "INSERT INTO aliases (alias, target, created_at)
             SELECT :alias, :target, :created_at WHERE NOT EXISTS (SELECT 1 FROM models WHERE model_id = :alias)
             ON CONFLICT DO UPDATE SET target = excluded.target, created_at = excluded.created_at",
        )?
        .execute(named_params! {
            ":alias": alias.as_str(),
            ":target": target.to_string(),
            ":created_at": integer(created_at.0),
        })?;
    Ok(written == 1)
}

/// Returns every alias.
pub(crate) fn list(connection: &Connection) -> rusqlite::Result<Vec<AliasEntry>> {
    connection.prepare_cached("SELECT * FROM aliases ORDER BY alias")?.query_map((), record)?.collect()
}

/// Forgets an alias.
pub(crate) fn remove(connection: &Connection, alias: &ModelName) -> rusqlite::Result<bool> {
    let removed = connection.prepare_cached("DELETE FROM aliases WHERE alias = ?1")?.execute((alias.as_str(),))?;
    Ok(removed == 1)
}

fn record(row: &Row<'_>) -> rusqlite::Result<AliasEntry> {
    Ok(AliasEntry {
        alias: row::parsed(row, "alias")?,
        target: row::parsed(row, "target")?,
        created_at: row::time(row, "created_at")?,
    })
}

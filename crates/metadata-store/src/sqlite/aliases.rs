//! Aliases of models.

use protocol::ModelName;
use protocol::model::{AliasEntry, ModelRef};
use rusqlite::{Connection, Row, named_params};

use super::row::{self, integer};

/// Sets what an alias stands for, unless a model that is not one of its targets has its name.
pub(super) fn put(connection: &Connection, entry: &AliasEntry) -> rusqlite::Result<bool> {
    let AliasEntry { alias, target: _, alternatives: _, created_at } = entry;
    let targets: Vec<String> = entry.targets().map(ModelRef::to_string).collect();
    let written = connection
        .prepare_cached(
            "INSERT INTO aliases (alias, target, created_at)
             SELECT :alias, :target, :created_at
             WHERE :is_own_name OR NOT EXISTS (SELECT 1 FROM models WHERE model_id = :alias)
             ON CONFLICT DO UPDATE SET target = excluded.target, created_at = excluded.created_at",
        )?
        .execute(named_params! {
            ":alias": alias.as_str(),
            // Names contain no spaces.
            ":target": targets.join(" "),
            ":is_own_name": entry.is_own_name(),
            ":created_at": integer(created_at.0),
        })?;
    Ok(written == 1)
}

pub(super) fn list(connection: &Connection) -> rusqlite::Result<Vec<AliasEntry>> {
    connection.prepare_cached("SELECT * FROM aliases ORDER BY alias")?.query_map((), record)?.collect()
}

pub(super) fn remove(connection: &Connection, alias: &ModelName) -> rusqlite::Result<bool> {
    let removed = connection.prepare_cached("DELETE FROM aliases WHERE alias = ?1")?.execute((alias.as_str(),))?;
    Ok(removed == 1)
}

fn record(row: &Row<'_>) -> rusqlite::Result<AliasEntry> {
    let mut targets = row::parsed_list(row, "target")?.into_iter();
    Ok(AliasEntry {
        alias: row::parsed(row, "alias")?,
        target: targets.next().ok_or_else(|| row::malformed("target", "it names no model"))?,
        alternatives: targets.collect(),
        created_at: row::time(row, "created_at")?,
    })
}

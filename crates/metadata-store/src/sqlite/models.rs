//! The model versions of the catalogue.

use protocol::model::{ModelEntry, ModelKey};
use protocol::{Digest, ModelVersion};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::adapters;
use super::row::{self, integer};
use crate::registry_store::PutModelError;

/// Registers a model version, or updates the context length, description and facts of a registered one. Facts are not
/// removed, and `added` is not reset. A different digest is a conflict.
pub(super) fn put(connection: &Connection, entry: &ModelEntry) -> rusqlite::Result<Result<(), PutModelError>> {
    let ModelEntry { key, digest, bytes, context_length, description, created_at, facts, added, pin, keep_alive_secs } =
        entry;
    let written = connection
        .prepare_cached(
            "INSERT INTO models (model_id, version_major, version_minor, digest, bytes, context_length, description,
                                 created_at, facts, added, pin, keep_alive_secs)
             VALUES (:model_id, :major, :minor, :digest, :bytes, :context_length, :description, :created_at, :facts,
                     :added, :pin, :keep_alive_secs)
             ON CONFLICT DO UPDATE SET context_length = excluded.context_length, description = excluded.description,
                                       facts = coalesce(excluded.facts, facts), added = max(excluded.added, added)
             WHERE digest = excluded.digest",
        )?
        .execute(named_params! {
            ":model_id": key.model_id.as_str(),
            ":major": key.version.major,
            ":minor": key.version.minor,
            ":digest": digest.0,
            ":bytes": integer(*bytes),
            ":context_length": context_length,
            ":description": description,
            ":created_at": integer(created_at.0),
            ":facts": facts.as_ref().map(row::text_of_json),
            ":added": added,
            ":pin": pin,
            ":keep_alive_secs": keep_alive_secs,
        })?;
    if written == 1 {
        return Ok(Ok(()));
    }
    let registered = connection
        .prepare_cached("SELECT digest FROM models WHERE (model_id, version_major, version_minor) = (?1, ?2, ?3)")?
        .query_row((key.model_id.as_str(), key.version.major, key.version.minor), |row| row.get(0))
        .optional()?
        .ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    Ok(Err(PutModelError::Conflict { key: key.clone(), registered: Digest(registered) }))
}

/// Sets how long a model is kept in memory. Returns false if there is no such model version.
pub(super) fn keep(
    connection: &Connection,
    key: &ModelKey,
    pin: bool,
    keep_alive_secs: Option<i64>,
) -> rusqlite::Result<bool> {
    let written = connection
        .prepare_cached(
            "UPDATE models SET pin = ?4, keep_alive_secs = ?5
             WHERE (model_id, version_major, version_minor) = (?1, ?2, ?3)",
        )?
        .execute((key.model_id.as_str(), key.version.major, key.version.minor, pin, keep_alive_secs))?;
    Ok(written == 1)
}

/// Returns every model version.
pub(super) fn list(connection: &Connection) -> rusqlite::Result<Vec<ModelEntry>> {
    connection
        .prepare_cached("SELECT * FROM models ORDER BY model_id, version_major, version_minor")?
        .query_map((), record)?
        .collect()
}

/// Removes a model version and its adapters. Returns false if there is no such model version.
pub(super) fn remove(connection: &Connection, key: &ModelKey) -> rusqlite::Result<bool> {
    adapters::remove_all(connection, key)?;
    let removed = connection
        .prepare_cached("DELETE FROM models WHERE (model_id, version_major, version_minor) = (?1, ?2, ?3)")?
        .execute((key.model_id.as_str(), key.version.major, key.version.minor))?;
    Ok(removed == 1)
}

fn record(row: &Row<'_>) -> rusqlite::Result<ModelEntry> {
    let version = ModelVersion { major: row.get("version_major")?, minor: row.get("version_minor")? };
    Ok(ModelEntry {
        key: ModelKey { model_id: row::parsed(row, "model_id")?, version },
        digest: Digest(row.get("digest")?),
        bytes: row::unsigned(row, "bytes")?,
        context_length: row.get("context_length")?,
        description: row.get("description")?,
        created_at: row::time(row, "created_at")?,
        facts: row::json_or_null(row, "facts")?,
        added: row.get("added")?,
        pin: row.get("pin")?,
        keep_alive_secs: row.get("keep_alive_secs")?,
    })
}

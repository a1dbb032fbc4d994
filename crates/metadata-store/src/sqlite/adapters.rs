//! The `adapters` table: the LoRA adapters of registered models.

use protocol::model::{AdapterEntry, AdapterKey, ModelKey};
use protocol::{Digest, ModelVersion};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::row::{self, integer};
use crate::registry_store::PutAdapterError;

/// Registers an adapter of a model version that is registered.
pub(super) fn put(connection: &Connection, entry: &AdapterEntry) -> rusqlite::Result<Result<(), PutAdapterError>> {
    let AdapterEntry { key: key @ AdapterKey { model, adapter }, digest, bytes, description, created_at } = entry;
    let written = connection
        .prepare_cached(
            "INSERT INTO adapters (model_id, version_major, version_minor, adapter, digest, bytes, description,
                                   created_at)
             SELECT model_id, version_major, version_minor, :adapter, :digest, :bytes, :description, :created_at
             FROM models WHERE (model_id, version_major, version_minor) = (:model_id, :major, :minor)
             ON CONFLICT DO UPDATE SET description = excluded.description WHERE digest = excluded.digest",
        )?
        .execute(named_params! {
            ":model_id": model.model_id.as_str(),
            ":major": model.version.major,
            ":minor": model.version.minor,
            ":adapter": adapter.as_str(),
            ":digest": digest.0,
            ":bytes": integer(*bytes),
            ":description": description,
            ":created_at": integer(created_at.0),
        })?;
    if written == 1 {
        return Ok(Ok(()));
    }
    let registered = connection
        .prepare_cached(
            "SELECT digest FROM adapters
             WHERE (model_id, version_major, version_minor, adapter) = (?1, ?2, ?3, ?4)",
        )?
        .query_row(primary_key(key), |row| row.get(0))
        .optional()?;
    Ok(Err(match registered {
        Some(digest) => PutAdapterError::Conflict { key: key.clone(), registered: Digest(digest) },
        None => PutAdapterError::NoModel { model: model.clone() },
    }))
}

pub(super) fn list(connection: &Connection) -> rusqlite::Result<Vec<AdapterEntry>> {
    connection
        .prepare_cached("SELECT * FROM adapters ORDER BY model_id, version_major, version_minor, adapter")?
        .query_map((), record)?
        .collect()
}

pub(super) fn remove(connection: &Connection, key: &AdapterKey) -> rusqlite::Result<bool> {
    let removed = connection
        .prepare_cached(
            "DELETE FROM adapters WHERE (model_id, version_major, version_minor, adapter) = (?1, ?2, ?3, ?4)",
        )?
        .execute(primary_key(key))?;
    Ok(removed == 1)
}

/// Removes the adapters of a model version.
pub(super) fn remove_all(connection: &Connection, model: &ModelKey) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM adapters WHERE (model_id, version_major, version_minor) = (?1, ?2, ?3)")?
        .execute((model.model_id.as_str(), model.version.major, model.version.minor))
        .map(drop)
}

fn primary_key(key: &AdapterKey) -> (&str, u32, u32, &str) {
    let AdapterKey { model: ModelKey { model_id, version }, adapter } = key;
    (model_id.as_str(), version.major, version.minor, adapter.as_str())
}

fn record(row: &Row<'_>) -> rusqlite::Result<AdapterEntry> {
    let version = ModelVersion { major: row.get("version_major")?, minor: row.get("version_minor")? };
    let model = ModelKey { model_id: row::parsed(row, "model_id")?, version };
    Ok(AdapterEntry {
        key: AdapterKey { model, adapter: row::parsed(row, "adapter")? },
        digest: Digest(row.get("digest")?),
        bytes: row::unsigned(row, "bytes")?,
        description: row.get("description")?,
        created_at: row::time(row, "created_at")?,
    })
}

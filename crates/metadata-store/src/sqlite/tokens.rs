//! API tokens: their public part and a keyed hash of the secret.

use protocol::UnixMillis;
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::row::{self, integer};
use crate::registry_store::{PutTokenError, TokenRecord};

pub(super) fn put(connection: &Connection, token: &TokenRecord) -> rusqlite::Result<Result<(), PutTokenError>> {
    let inserted = connection
        .prepare_cached(
            "INSERT INTO tokens (key_id, tenant_id, hash, scopes, name, created_at, expires_at, revoked_at)
             VALUES (:key_id, :tenant_id, :hash, :scopes, :name, :created_at, :expires_at, :revoked_at)
             ON CONFLICT DO NOTHING",
        )?
        .execute(named_params! {
            ":key_id": token.key_id,
            ":tenant_id": token.tenant_id.as_str(),
            ":hash": token.hash,
            ":scopes": serde_json::to_string(&token.scopes).expect("scopes are plain words"),
            ":name": token.name,
            ":created_at": integer(token.created_at.0),
            ":expires_at": token.expires_at.map(|time| integer(time.0)),
            ":revoked_at": token.revoked_at.map(|time| integer(time.0)),
        })?;
    Ok(if inserted == 1 { Ok(()) } else { Err(PutTokenError::Taken { key_id: token.key_id.clone() }) })
}

pub(super) fn find(connection: &Connection, key_id: &str) -> rusqlite::Result<Option<TokenRecord>> {
    connection.prepare_cached("SELECT * FROM tokens WHERE key_id = ?1")?.query_row((key_id,), record).optional()
}

pub(super) fn list(connection: &Connection) -> rusqlite::Result<Vec<TokenRecord>> {
    connection.prepare_cached("SELECT * FROM tokens ORDER BY created_at, key_id")?.query_map((), record)?.collect()
}

/// Revokes a token; the first revocation keeps its time.
pub(super) fn revoke(connection: &Connection, key_id: &str, now: UnixMillis) -> rusqlite::Result<bool> {
    let revoked = connection
        .prepare_cached("UPDATE tokens SET revoked_at = coalesce(revoked_at, ?2) WHERE key_id = ?1")?
        .execute((key_id, integer(now.0)))?;
    Ok(revoked == 1)
}

fn record(row: &Row<'_>) -> rusqlite::Result<TokenRecord> {
    Ok(TokenRecord {
        key_id: row.get("key_id")?,
        tenant_id: row::parsed(row, "tenant_id")?,
        hash: row.get("hash")?,
        scopes: row::json(row, "scopes")?,
        name: row.get("name")?,
        created_at: row::time(row, "created_at")?,
        expires_at: row::time_or_null(row, "expires_at")?,
        revoked_at: row::time_or_null(row, "revoked_at")?,
    })
}

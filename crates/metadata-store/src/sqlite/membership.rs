//! Membership of the pool: invites, nodes and their certificates, revocations.

use protocol::{InviteId, PublicKey, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};
use serde::Serialize;

use super::row::{self, integer};
use crate::registry_store::{
    InviteRecord, InviteRedemption, NewCertificate, NodeRecord, PutInviteError, Redemption, Revocation,
};

pub(super) fn put_invite(
    connection: &Connection,
    invite: &InviteRecord,
) -> rusqlite::Result<Result<(), PutInviteError>> {
    let inserted = connection
        .prepare_cached(
            "INSERT INTO invites (invite_id, hash, name, roles, regions, models, created_at, expires_at)
             VALUES (:invite_id, :hash, :name, :roles, :regions, :models, :created_at, :expires_at)
             ON CONFLICT DO NOTHING",
        )?
        .execute(named_params! {
            ":invite_id": invite.invite_id.0,
            ":hash": invite.hash,
            ":name": invite.name,
            ":roles": json(&invite.roles),
            ":regions": json(&invite.regions),
            ":models": json(&invite.models),
            ":created_at": integer(invite.created_at.0),
            ":expires_at": integer(invite.expires_at.0),
        })?;
    Ok(if inserted == 1 { Ok(()) } else { Err(PutInviteError::Taken { invite_id: invite.invite_id }) })
}

pub(super) fn invite(connection: &Connection, invite_id: InviteId) -> rusqlite::Result<Option<InviteRecord>> {
    connection
        .prepare_cached("SELECT * FROM invites WHERE invite_id = ?1")?
        .query_row((invite_id.0,), |row| {
            let redeemed_by: Option<[u8; 32]> = row.get("redeemed_by")?;
            let redeemed_at = row::time_or_null(row, "redeemed_at")?;
            Ok(InviteRecord {
                invite_id: InviteId(row.get("invite_id")?),
                hash: row.get("hash")?,
                name: row.get("name")?,
                roles: row::json(row, "roles")?,
                regions: row::json(row, "regions")?,
                models: row::json(row, "models")?,
                created_at: row::time(row, "created_at")?,
                expires_at: row::time(row, "expires_at")?,
                redeemed: redeemed_by.zip(redeemed_at).map(|(node, at)| InviteRedemption { node: PublicKey(node), at }),
            })
        })
        .optional()
}

/// Redeems an invite for a node, unless another node has redeemed it. The caller checks its secret and expiry.
pub(super) fn redeem_invite(
    connection: &Connection,
    invite_id: InviteId,
    node: PublicKey,
    now: UnixMillis,
) -> rusqlite::Result<Redemption> {
    let redeemed = connection
        .prepare_cached(
            "UPDATE invites SET redeemed_by = ?2, redeemed_at = ?3 WHERE invite_id = ?1 AND redeemed_by IS NULL",
        )?
        .execute((invite_id.0, node.0, integer(now.0)))?;
    if redeemed == 1 {
        return Ok(Redemption::Done);
    }
    Ok(match invite(connection, invite_id)?.and_then(|invite| invite.redeemed) {
        Some(before) if before.node == node => Redemption::Again,
        Some(_) => Redemption::Used,
        None => Redemption::Unknown,
    })
}

/// Records a node's next certificate and returns its serial number, greater than all earlier ones.
pub(super) fn put_certificate(connection: &Connection, new: &NewCertificate) -> rusqlite::Result<u64> {
    connection
        .prepare_cached(
            "INSERT INTO nodes (public_key, serial, name, roles, regions, models, joined_at, not_before, not_after)
             VALUES (:public_key, (SELECT coalesce(max(serial), 0) + 1 FROM nodes), :name, :roles, :regions, :models,
                     :now, :not_before, :not_after)
             ON CONFLICT (public_key) DO UPDATE SET serial = excluded.serial, name = excluded.name,
                     roles = excluded.roles, regions = excluded.regions, models = excluded.models,
                     not_before = excluded.not_before, not_after = excluded.not_after
             RETURNING serial",
        )?
        .query_row(
            named_params! {
                ":public_key": new.public_key.0,
                ":name": new.name,
                ":roles": json(&new.roles),
                ":regions": json(&new.regions),
                ":models": json(&new.models),
                ":now": integer(new.now.0),
                ":not_before": integer(new.not_before.0),
                ":not_after": integer(new.not_after.0),
            },
            |row| row::unsigned(row, "serial"),
        )
}

pub(super) fn node(connection: &Connection, public_key: PublicKey) -> rusqlite::Result<Option<NodeRecord>> {
    connection
        .prepare_cached(
            "SELECT nodes.*, revoked_at FROM nodes LEFT JOIN revocations USING (public_key) WHERE public_key = ?1",
        )?
        .query_row((public_key.0,), node_record)
        .optional()
}

/// Returns every node, in order of enrolment.
pub(super) fn nodes(connection: &Connection) -> rusqlite::Result<Vec<NodeRecord>> {
    connection
        .prepare_cached(
            "SELECT nodes.*, revoked_at FROM nodes LEFT JOIN revocations USING (public_key)
             ORDER BY joined_at, public_key",
        )?
        .query_map((), node_record)?
        .collect()
}

/// Renames a node. Returns whether it exists.
pub(super) fn rename_node(connection: &Connection, public_key: PublicKey, name: &str) -> rusqlite::Result<bool> {
    let renamed =
        connection.prepare_cached("UPDATE nodes SET name = ?2 WHERE public_key = ?1")?.execute((public_key.0, name))?;
    Ok(renamed > 0)
}

/// Expels a key and returns the version of the list that names it. A second call changes nothing.
///
/// A version is at least the time of its revocation, so that versions ascend even after a store is lost.
pub(super) fn revoke_node(connection: &Connection, public_key: PublicKey, now: UnixMillis) -> rusqlite::Result<u64> {
    connection
        .prepare_cached(
            "INSERT INTO revocations (public_key, version, revoked_at)
             VALUES (?1, max((SELECT coalesce(max(version), 0) + 1 FROM revocations), ?2), ?2)
             ON CONFLICT (public_key) DO NOTHING",
        )?
        .execute((public_key.0, integer(now.0)))?;
    connection
        .prepare_cached("SELECT version FROM revocations WHERE public_key = ?1")?
        .query_row((public_key.0,), |row| row::unsigned(row, "version"))
}

/// Returns the expelled keys, by version.
pub(super) fn revocations(connection: &Connection) -> rusqlite::Result<Vec<Revocation>> {
    connection
        .prepare_cached("SELECT * FROM revocations ORDER BY version")?
        .query_map((), |row| {
            Ok(Revocation {
                public_key: PublicKey(row.get("public_key")?),
                version: row::unsigned(row, "version")?,
                revoked_at: row::time(row, "revoked_at")?,
            })
        })?
        .collect()
}

fn node_record(row: &Row<'_>) -> rusqlite::Result<NodeRecord> {
    Ok(NodeRecord {
        public_key: PublicKey(row.get("public_key")?),
        serial: row::unsigned(row, "serial")?,
        name: row.get("name")?,
        roles: row::json(row, "roles")?,
        regions: row::json(row, "regions")?,
        models: row::json(row, "models")?,
        joined_at: row::time(row, "joined_at")?,
        not_before: row::time(row, "not_before")?,
        not_after: row::time(row, "not_after")?,
        revoked_at: row::time_or_null(row, "revoked_at")?,
    })
}

fn json<T: Serialize>(words: &T) -> String {
    serde_json::to_string(words).expect("words are plain text")
}

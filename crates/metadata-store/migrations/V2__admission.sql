-- The nodes of the pool, the invites that bring them in, and those that were expelled.

CREATE TABLE invites (
    invite_id   BLOB    NOT NULL PRIMARY KEY,
    -- A keyed hash: the secret itself is in the invite only.
    hash        BLOB    NOT NULL,
    name        TEXT    NOT NULL,
    roles       TEXT    NOT NULL,
    regions     TEXT    NOT NULL,
    models      TEXT    NOT NULL,
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL,
    -- Both set by the one redemption.
    redeemed_by BLOB,
    redeemed_at INTEGER
) STRICT, WITHOUT ROWID;

-- A row for each node that was ever admitted, with its last certificate.
CREATE TABLE nodes (
    public_key BLOB    NOT NULL PRIMARY KEY,
    serial     INTEGER NOT NULL UNIQUE,
    name       TEXT    NOT NULL,
    roles      TEXT    NOT NULL,
    regions    TEXT    NOT NULL,
    models     TEXT    NOT NULL,
    joined_at  INTEGER NOT NULL,
    not_before INTEGER NOT NULL,
    not_after  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Apart from the nodes, so that a key can be expelled that this store has never seen. Rows are never removed.
CREATE TABLE revocations (
    public_key BLOB    NOT NULL PRIMARY KEY,
    version    INTEGER NOT NULL UNIQUE,
    revoked_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

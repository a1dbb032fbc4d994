-- Times are milliseconds since 1970-01-01 UTC. Ids of fixed length are blobs, names are text.

CREATE TABLE jobs (
    -- Never reused, so that a usage record names one job for ever.
    job_id              INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id           TEXT    NOT NULL,
    correlation_id      BLOB    NOT NULL,
    retry_token         TEXT    NOT NULL,
    trace_id            BLOB    NOT NULL,
    model_id            TEXT    NOT NULL,
    model_version       TEXT    NOT NULL,
    region              TEXT    NOT NULL,
    worker_id           BLOB    NOT NULL,
    attempt             INTEGER NOT NULL,
    state               TEXT    NOT NULL CHECK (state IN ('reserved', 'completed', 'failed', 'cancelled', 'dead')),
    finish_reason       TEXT,
    error_code          TEXT,
    error_message       TEXT,
    request_fingerprint BLOB    NOT NULL,
    created_at          INTEGER NOT NULL,
    updated_at          INTEGER NOT NULL,
    UNIQUE (tenant_id, correlation_id, retry_token)
) STRICT;

-- A row for each job that is not settled.
CREATE TABLE reservations (
    job_id      INTEGER PRIMARY KEY REFERENCES jobs (job_id),
    worker_id   BLOB    NOT NULL,
    lease_until INTEGER NOT NULL
) STRICT;

CREATE INDEX reservations_by_worker ON reservations (worker_id);
CREATE INDEX reservations_by_lease ON reservations (lease_until);

-- The ledger. It repeats what it needs of a job, so that it stands when old jobs are cleared away.
CREATE TABLE usage (
    sequence          INTEGER PRIMARY KEY,
    job_id            INTEGER NOT NULL UNIQUE,
    tenant_id         TEXT    NOT NULL,
    correlation_id    BLOB    NOT NULL,
    retry_token       TEXT    NOT NULL,
    model_id          TEXT    NOT NULL,
    model_version     TEXT    NOT NULL,
    region            TEXT    NOT NULL,
    worker_id         BLOB    NOT NULL,
    attempt           INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cached_tokens     INTEGER NOT NULL,
    settled_at        INTEGER NOT NULL
) STRICT;

CREATE INDEX usage_by_tenant ON usage (tenant_id, settled_at, sequence);

CREATE TABLE tokens (
    key_id     TEXT    NOT NULL PRIMARY KEY,
    tenant_id  TEXT    NOT NULL,
    hash       BLOB    NOT NULL,
    scopes     TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER
) STRICT;

CREATE TABLE policies (
    tenant_id TEXT NOT NULL PRIMARY KEY,
    policy    TEXT NOT NULL
) STRICT;

CREATE TABLE models (
    model_id       TEXT    NOT NULL,
    version_major  INTEGER NOT NULL,
    version_minor  INTEGER NOT NULL,
    digest         BLOB    NOT NULL,
    bytes          INTEGER NOT NULL,
    context_length INTEGER NOT NULL,
    description    TEXT    NOT NULL,
    created_at     INTEGER NOT NULL,
    PRIMARY KEY (model_id, version_major, version_minor)
) STRICT, WITHOUT ROWID;

CREATE TABLE epochs (
    node  BLOB    NOT NULL PRIMARY KEY,
    epoch INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Epoch and seq as 16 bytes, big endian: they order as the pair does and hold all of u64.
CREATE TABLE high_waters (
    worker_id BLOB NOT NULL PRIMARY KEY,
    mark      BLOB NOT NULL
) STRICT, WITHOUT ROWID;

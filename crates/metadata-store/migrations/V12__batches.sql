-- Files of tenants, in sealed pieces. The pieces of an uploaded file follow each other; those of a batch's results are
-- its lines.
CREATE TABLE files (
    tenant_id  TEXT    NOT NULL,
    file_id    TEXT    NOT NULL,
    purpose    TEXT    NOT NULL,
    -- uploading, ready, removed, or collecting: the results of a batch that has not ended.
    state      TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    -- Of the file itself, and of what it takes in the store.
    bytes      INTEGER NOT NULL DEFAULT 0,
    pieces     INTEGER NOT NULL DEFAULT 0,
    -- The name that its client gave it.
    sealed     BLOB    NOT NULL,
    PRIMARY KEY (tenant_id, file_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX files_by_expiry ON files (expires_at);

CREATE TABLE file_pieces (
    file_id TEXT    NOT NULL,
    piece   INTEGER NOT NULL,
    sealed  BLOB    NOT NULL,
    PRIMARY KEY (file_id, piece)
) STRICT;

CREATE TABLE batches (
    tenant_id   TEXT    NOT NULL,
    batch_id    TEXT    NOT NULL,
    endpoint    TEXT    NOT NULL,
    input_file  TEXT    NOT NULL,
    output_file TEXT    NOT NULL,
    error_file  TEXT    NOT NULL,
    status      TEXT    NOT NULL,
    -- When it entered each status, as JSON.
    times       TEXT    NOT NULL,
    total       INTEGER NOT NULL DEFAULT 0,
    -- Lines with an answer and with an error, once it has ended; until then, the pieces of its files.
    completed   INTEGER,
    failed      INTEGER,
    results_secs INTEGER NOT NULL,
    -- Its metadata and its errors.
    sealed      BLOB    NOT NULL,
    -- Increases with each claim, so that a gateway whose lease is lost writes nothing more.
    epoch       INTEGER NOT NULL DEFAULT 0,
    holder      BLOB,
    lease_until INTEGER NOT NULL DEFAULT 0,
    -- When it is forgotten; none until it has ended.
    remove_at   INTEGER,
    PRIMARY KEY (tenant_id, batch_id)
) STRICT, WITHOUT ROWID;

-- Those on which somebody is to work.
CREATE INDEX batches_open ON batches (lease_until) WHERE remove_at IS NULL;
CREATE INDEX batches_by_removal ON batches (remove_at) WHERE remove_at IS NOT NULL;

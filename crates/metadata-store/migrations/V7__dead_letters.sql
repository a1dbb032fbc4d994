-- What operators see of jobs after the fact.

-- The attempts that ended, as JSON. NULL for a job whose only attempt did not fail: its row says all.
ALTER TABLE jobs ADD COLUMN history TEXT;
ALTER TABLE jobs ADD COLUMN continued INTEGER NOT NULL DEFAULT 0;

-- The id by which a caller knows its request.
CREATE INDEX jobs_by_correlation ON jobs (correlation_id);
-- Settled jobs are removed when they are old.
CREATE INDEX jobs_by_settlement ON jobs (updated_at) WHERE state <> 'reserved';

-- Failed jobs that are kept for operators. A row repeats what it needs of its job, which is removed earlier. Sequences
-- are never reused and grow in the order of commits, so that a reader can follow the table.
CREATE TABLE dead_letters (
    sequence       INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id      TEXT    NOT NULL,
    correlation_id BLOB    NOT NULL,
    trace_id       BLOB    NOT NULL,
    model_id       TEXT    NOT NULL,
    model_version  TEXT    NOT NULL,
    region         TEXT    NOT NULL,
    cause          TEXT    NOT NULL,
    error_code     TEXT    NOT NULL,
    error_message  TEXT    NOT NULL,
    history        TEXT    NOT NULL,
    created_at     INTEGER NOT NULL,
    died_at        INTEGER NOT NULL,
    -- The request, sealed by the orchestrator; NULL if it was too long.
    payload        BLOB,
    payload_bytes  INTEGER
) STRICT;

CREATE INDEX dead_letters_by_correlation ON dead_letters (correlation_id);

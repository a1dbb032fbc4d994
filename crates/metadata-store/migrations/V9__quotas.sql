-- What each tenant uses in fixed windows of UTC. Jobs reserve what they may use at most, and are settled in the windows
-- in which they were reserved.
CREATE TABLE quota_windows (
    tenant_id         TEXT    NOT NULL,
    window            TEXT    NOT NULL CHECK (window IN ('minute', 'day')),
    window_start      INTEGER NOT NULL,
    tokens_spent      INTEGER NOT NULL DEFAULT 0,
    tokens_reserved   INTEGER NOT NULL DEFAULT 0,
    requests_spent    INTEGER NOT NULL DEFAULT 0,
    requests_reserved INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, window, window_start)
) STRICT, WITHOUT ROWID;

-- What a job holds of its tenant's quotas, and since when.
ALTER TABLE reservations ADD COLUMN tenant_id   TEXT    NOT NULL DEFAULT '';
ALTER TABLE reservations ADD COLUMN tokens      INTEGER NOT NULL DEFAULT 0;
ALTER TABLE reservations ADD COLUMN reserved_at INTEGER NOT NULL DEFAULT 0;

UPDATE reservations SET tenant_id = (SELECT tenant_id FROM jobs WHERE jobs.job_id = reservations.job_id);

CREATE INDEX reservations_by_tenant ON reservations (tenant_id);

-- Sealed answers of completed jobs. A client that asks again under the same token gets its answer from here.
CREATE TABLE answers (
    job_id     INTEGER PRIMARY KEY REFERENCES jobs (job_id) ON DELETE CASCADE,
    expires_at INTEGER NOT NULL,
    sealed     BLOB    NOT NULL
) STRICT;

CREATE INDEX answers_by_expiry ON answers (expires_at);

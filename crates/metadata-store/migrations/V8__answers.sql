-- Sealed answers of completed jobs. A client that asks again under the same token gets its answer from here.
CREATE TABLE answers (
    job_id     INTEGER PRIMARY KEY REFERENCES jobs (job_id) ON DELETE CASCADE,
    expires_at INTEGER NOT NULL,
    sealed     BLOB    NOT NULL
) STRICT;

CREATE INDEX answers_by_expiry ON answers (expires_at);

-- The bytes of all answers, so that nobody has to add them up.
CREATE TABLE answers_size (bytes INTEGER NOT NULL) STRICT;
INSERT INTO answers_size VALUES (0);

CREATE TRIGGER answer_added AFTER INSERT ON answers BEGIN
    UPDATE answers_size SET bytes = bytes + length(NEW.sealed);
END;

CREATE TRIGGER answer_removed AFTER DELETE ON answers BEGIN
    UPDATE answers_size SET bytes = bytes - length(OLD.sealed);
END;

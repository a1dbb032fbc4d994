-- What gateways keep, sealed, with jobs whose answers their tenants can read again. A note is found by the job's id.
CREATE TABLE notes (
    -- Never reused, so that what is chosen to go is not a newer note when it goes.
    note_id        INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id      TEXT    NOT NULL,
    correlation_id BLOB    NOT NULL,
    retry_token    TEXT    NOT NULL,
    created_at     INTEGER NOT NULL,
    expires_at     INTEGER NOT NULL,
    sealed         BLOB    NOT NULL,
    -- Why the job came to no answer, as JSON.
    error          TEXT,
    UNIQUE (tenant_id, correlation_id)
) STRICT;

CREATE INDEX notes_by_expiry ON notes (expires_at);

-- The bytes of all notes, so that nobody has to add them up.
CREATE TABLE notes_size (bytes INTEGER NOT NULL) STRICT;
INSERT INTO notes_size VALUES (0);

CREATE TRIGGER note_added AFTER INSERT ON notes BEGIN
    UPDATE notes_size SET bytes = bytes + length(NEW.sealed);
END;

CREATE TRIGGER note_removed AFTER DELETE ON notes BEGIN
    UPDATE notes_size SET bytes = bytes - length(OLD.sealed);
END;

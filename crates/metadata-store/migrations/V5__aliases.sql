-- Which models an operator added, and other names for models.

ALTER TABLE models ADD COLUMN added INTEGER NOT NULL DEFAULT 0;

CREATE TABLE aliases (
    alias      TEXT    NOT NULL PRIMARY KEY,
    target     TEXT    NOT NULL,
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- The LoRA adapters of model versions.

CREATE TABLE adapters (
    model_id       TEXT    NOT NULL,
    version_major  INTEGER NOT NULL,
    version_minor  INTEGER NOT NULL,
    adapter        TEXT    NOT NULL,
    digest         BLOB    NOT NULL,
    bytes          INTEGER NOT NULL,
    description    TEXT    NOT NULL,
    created_at     INTEGER NOT NULL,
    PRIMARY KEY (model_id, version_major, version_minor, adapter)
) STRICT, WITHOUT ROWID;

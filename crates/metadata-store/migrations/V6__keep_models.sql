-- How long workers keep a model in memory, as an operator said.

ALTER TABLE models ADD COLUMN pin INTEGER NOT NULL DEFAULT 0;
ALTER TABLE models ADD COLUMN keep_alive_secs INTEGER;

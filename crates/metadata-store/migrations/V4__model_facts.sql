-- What a model's file says of it, as JSON; null where nobody has told.

ALTER TABLE models ADD COLUMN facts TEXT;

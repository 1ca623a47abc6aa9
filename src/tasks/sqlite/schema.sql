-- Version 1 of the task store. Later versions only add to it.
CREATE TABLE meta (
  name  TEXT PRIMARY KEY,
  value ANY NOT NULL
) STRICT, WITHOUT ROWID;
-- `change` is the number of the last change. `oldest_writer` is the oldest version of the store whose programs may
-- still write. `hmac_key` is a random key of this store.
INSERT INTO meta VALUES ('change', 0), ('oldest_writer', 1), ('hmac_key', randomblob(32));

-- Which process watches the running tasks of an account.
CREATE TABLE watcher (
  account     TEXT PRIMARY KEY,
  owner       TEXT NOT NULL,
  lease_until INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- One row is one create. Times are in milliseconds since 1970, units in millionths.
CREATE TABLE task (
  seq                 INTEGER PRIMARY KEY,
  ref                 TEXT NOT NULL UNIQUE,
  change              INTEGER NOT NULL,
  state               TEXT NOT NULL,
  owner               TEXT,
  lease_until         INTEGER,
  account             TEXT NOT NULL,
  client              TEXT NOT NULL,
  request_id          TEXT NOT NULL,
  upstream_request_id TEXT,
  task_id             TEXT,
  external_id         TEXT,
  family              TEXT,
  path                TEXT NOT NULL,
  model               TEXT,
  duration            TEXT,
  resolution          TEXT,
  mode                TEXT,
  n                   TEXT,
  audio               TEXT,
  pool                TEXT,
  weight              INTEGER NOT NULL,
  place               INTEGER,
  reserved            INTEGER,
  units               INTEGER,
  request_digest      BLOB,
  key_digest          BLOB,
  created_at          INTEGER NOT NULL,
  sent_at             INTEGER,
  ended_at            INTEGER,
  error               TEXT,
  results             TEXT
) STRICT;

CREATE UNIQUE INDEX task_change ON task (change);
CREATE INDEX task_task_id ON task (task_id) WHERE task_id IS NOT NULL;
CREATE INDEX task_external_id ON task (external_id) WHERE external_id IS NOT NULL;
CREATE INDEX task_request_id ON task (request_id);
CREATE INDEX task_client ON task (client, seq);
CREATE INDEX task_model ON task (model, seq);
CREATE INDEX task_state ON task (state, seq);
CREATE INDEX task_account ON task (account, seq);
CREATE INDEX task_created_at ON task (created_at);
CREATE INDEX task_ended_at ON task (ended_at) WHERE ended_at IS NOT NULL;
-- A key is free again after a refusal.
CREATE UNIQUE INDEX task_key ON task (client, key_digest)
  WHERE key_digest IS NOT NULL AND state NOT IN ('rejected', 'canceled');

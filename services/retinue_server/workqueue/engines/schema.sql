-- Every state can be counted by queue from an index alone, for a start with many tasks.
-- Version 1. Narrow hot rows in `task`, what they carry in `body`; nearly every index is partial, so that a
-- task costs an entry only while it is looked for. Instants named *_ms are wall time; lease_until and attempt_until are the lease clock's.
CREATE TABLE queue (
  no         INTEGER PRIMARY KEY,
  queue_id   TEXT NOT NULL UNIQUE,
  state      INTEGER NOT NULL,
  settings   TEXT NOT NULL,
  create_ms  INTEGER NOT NULL
) STRICT;

CREATE TABLE task (
  seq               INTEGER PRIMARY KEY,
  task_id           TEXT NOT NULL UNIQUE,
  queue             INTEGER NOT NULL,
  state             INTEGER NOT NULL,
  priority          INTEGER NOT NULL,
  create_ms         INTEGER NOT NULL,
  ready_ms          INTEGER NOT NULL,
  expire_ms         INTEGER,
  attempt_ms        INTEGER,
  attempt           INTEGER NOT NULL,
  lease_expirations INTEGER NOT NULL,
  lease_epoch       INTEGER NOT NULL,
  lease_nonce       INTEGER NOT NULL,
  lease_ms          INTEGER NOT NULL,
  lease_until       INTEGER,
  attempt_until     INTEGER,
  worker_id         TEXT NOT NULL,
  lease_request_id  TEXT NOT NULL,
  outcome           INTEGER NOT NULL,
  cancel_requested  INTEGER NOT NULL,
  start_ms          INTEGER,
  end_ms            INTEGER,
  delete_ms         INTEGER,
  idempotency_key   TEXT NOT NULL,
  parent_task_id    TEXT NOT NULL
) STRICT;

CREATE INDEX task_ready     ON task (queue, priority DESC, seq) WHERE state = 2;
CREATE INDEX task_due       ON task (ready_ms, queue, state) WHERE state IN (1, 4);
CREATE INDEX task_leased    ON task (lease_until, queue) WHERE state = 3;
CREATE INDEX task_expiring  ON task (expire_ms) WHERE expire_ms IS NOT NULL AND state IN (1, 2, 4);
CREATE INDEX task_deletable ON task (delete_ms, queue, state) WHERE delete_ms IS NOT NULL;
CREATE INDEX task_listing   ON task (queue, seq);
CREATE UNIQUE INDEX task_key ON task (queue, idempotency_key) WHERE idempotency_key <> '';
CREATE INDEX task_request   ON task (lease_request_id) WHERE lease_request_id <> '';
CREATE INDEX task_parent    ON task (parent_task_id) WHERE parent_task_id <> '';

CREATE TABLE body (
  seq         INTEGER PRIMARY KEY,
  input       BLOB NOT NULL,
  task_type   TEXT NOT NULL,
  labels      TEXT NOT NULL,
  retry       TEXT,
  traceparent TEXT NOT NULL,
  input_blob  TEXT NOT NULL,
  result      BLOB NOT NULL,
  result_blob TEXT NOT NULL,
  failure     TEXT
) STRICT;

CREATE INDEX body_input_blob  ON body (input_blob) WHERE input_blob <> '';
CREATE INDEX body_result_blob ON body (result_blob) WHERE result_blob <> '';

CREATE TABLE request (
  request_id  TEXT PRIMARY KEY,
  fingerprint BLOB NOT NULL,
  reply       BLOB NOT NULL,
  forget_ms   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX request_forget ON request (forget_ms);

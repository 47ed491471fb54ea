-- Version 1. Rules by which these tables are kept small and quick:
--   * `task` has the narrow, hot part of what is not finished, and nearly every index on it is partial. A lease is one
--     update, an extension a HOT one (nothing indexed changes, see lapse_ms), an end one delete.
--   * `body` has the rest of it, written once. Listing, looking up by name and by key go by its indexes, so that leasing
--     doesn't write them.
--   * `history` is appended to: what is finished moves there whole, into the partition of the day on which it is to be
--     forgotten. A day that is past is dropped, not deleted from.
-- Instants named *_ms are milliseconds since 1970; lease_until, attempt_until and lapse_ms are the lease clock's.

CREATE TABLE {schema}.queue (
  queue_id  text COLLATE "C" PRIMARY KEY,
  state     smallint NOT NULL,
  settings  text NOT NULL,
  create_ms bigint NOT NULL
);

-- Rises with every change of a queue, so that a coordinator knows by one look whether it knows them all.
CREATE TABLE {schema}.queue_version (version bigint NOT NULL);
INSERT INTO {schema}.queue_version VALUES (1);

CREATE SEQUENCE {schema}.task_seq AS bigint;

-- Undoes a transaction that went by something which is no longer so; it is run again.
CREATE FUNCTION {schema}.expect(actual bigint, expected bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF actual <> expected THEN
    RAISE EXCEPTION 'another transaction was faster' USING ERRCODE = 'serialization_failure';
  END IF;
END
$$;

CREATE TABLE {schema}.task (
  seq               bigint PRIMARY KEY,
  ready_ms          bigint NOT NULL,
  expire_ms         bigint,
  lease_epoch       bigint NOT NULL DEFAULT 0,
  lease_nonce       bigint NOT NULL DEFAULT 0,
  lease_until       bigint,
  lapse_ms          bigint,  -- when to look whether the lease is over: not later than lease_until, left alone by extensions
  attempt_until     bigint,
  start_ms          bigint,
  end_ms            bigint,
  delete_ms         bigint,
  priority          integer NOT NULL,
  attempt           integer NOT NULL DEFAULT 0,
  lease_expirations integer NOT NULL DEFAULT 0,
  lease_ms          integer NOT NULL DEFAULT 0,
  state             smallint NOT NULL,
  outcome           smallint NOT NULL DEFAULT 0,
  cancel_requested  boolean NOT NULL DEFAULT false,
  queue_id          text COLLATE "C" NOT NULL,
  worker_id         text COLLATE "C" NOT NULL DEFAULT '',
  lease_request_id  text COLLATE "C" NOT NULL DEFAULT ''
) WITH (
  fillfactor = 80,
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
  autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 5000
);

CREATE INDEX task_ready    ON {schema}.task (queue_id, priority DESC, seq) WHERE state = 2;
CREATE INDEX task_due      ON {schema}.task (ready_ms) WHERE state IN (1, 4);
CREATE INDEX task_leased   ON {schema}.task (lapse_ms) WHERE state = 3;
CREATE INDEX task_expiring ON {schema}.task (expire_ms) WHERE expire_ms IS NOT NULL AND state IN (1, 2, 4);
CREATE INDEX task_request  ON {schema}.task (lease_request_id) WHERE lease_request_id <> '';

CREATE TABLE {schema}.body (
  seq             bigint PRIMARY KEY,
  create_ms       bigint NOT NULL,
  attempt_ms      bigint,
  task_id         text COLLATE "C" NOT NULL,
  queue_id        text COLLATE "C" NOT NULL,
  idempotency_key text COLLATE "C" NOT NULL,
  parent_task_id  text COLLATE "C" NOT NULL,
  task_type       text COLLATE "C" NOT NULL,
  labels          text COLLATE "C" NOT NULL,
  retry           text COLLATE "C",
  traceparent     text COLLATE "C" NOT NULL,
  input_blob      text COLLATE "C" NOT NULL,
  result_blob     text COLLATE "C" NOT NULL DEFAULT '',
  failure         text COLLATE "C",
  input           bytea NOT NULL,
  result          bytea NOT NULL DEFAULT ''
) WITH (
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
  autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 5000
);

CREATE UNIQUE INDEX body_task_id ON {schema}.body (task_id);
CREATE UNIQUE INDEX body_key     ON {schema}.body (queue_id, idempotency_key) WHERE idempotency_key <> '';
CREATE INDEX body_listing        ON {schema}.body (queue_id, seq);
CREATE INDEX body_parent         ON {schema}.body (parent_task_id) WHERE parent_task_id <> '';
CREATE INDEX body_input_blob     ON {schema}.body (input_blob) WHERE input_blob <> '';
CREATE INDEX body_result_blob    ON {schema}.body (result_blob) WHERE result_blob <> '';

CREATE TABLE {schema}.history (
  drop_day          integer NOT NULL,  -- the day (of 1970) on which it is forgotten; -1: deleted row by row
  seq               bigint NOT NULL,
  ready_ms          bigint NOT NULL,
  expire_ms         bigint,
  lease_epoch       bigint NOT NULL,
  lease_nonce       bigint NOT NULL,
  lease_until       bigint,
  attempt_until     bigint,
  start_ms          bigint,
  end_ms            bigint,
  delete_ms         bigint,
  create_ms         bigint NOT NULL,
  attempt_ms        bigint,
  priority          integer NOT NULL,
  attempt           integer NOT NULL,
  lease_expirations integer NOT NULL,
  lease_ms          integer NOT NULL,
  state             smallint NOT NULL,
  outcome           smallint NOT NULL,
  cancel_requested  boolean NOT NULL,
  worker_id         text COLLATE "C" NOT NULL,
  lease_request_id  text COLLATE "C" NOT NULL,
  task_id           text COLLATE "C" NOT NULL,
  queue_id          text COLLATE "C" NOT NULL,
  idempotency_key   text COLLATE "C" NOT NULL,
  parent_task_id    text COLLATE "C" NOT NULL,
  task_type         text COLLATE "C" NOT NULL,
  labels            text COLLATE "C" NOT NULL,
  retry             text COLLATE "C",
  traceparent       text COLLATE "C" NOT NULL,
  input_blob        text COLLATE "C" NOT NULL,
  result_blob       text COLLATE "C" NOT NULL,
  failure           text COLLATE "C",
  input             bytea NOT NULL,
  result            bytea NOT NULL
) PARTITION BY RANGE (drop_day);

CREATE INDEX history_seq         ON {schema}.history (seq);
CREATE INDEX history_task_id     ON {schema}.history (task_id);
CREATE INDEX history_listing     ON {schema}.history (queue_id, seq);
CREATE INDEX history_delete      ON {schema}.history USING brin (delete_ms);
CREATE INDEX history_key         ON {schema}.history (queue_id, idempotency_key) WHERE idempotency_key <> '';
CREATE INDEX history_parent      ON {schema}.history (parent_task_id) WHERE parent_task_id <> '';
CREATE INDEX history_input_blob  ON {schema}.history (input_blob) WHERE input_blob <> '';
CREATE INDEX history_result_blob ON {schema}.history (result_blob) WHERE result_blob <> '';

CREATE TABLE {schema}.history_rows PARTITION OF {schema}.history FOR VALUES FROM (-1) TO (0);

CREATE TABLE {schema}.request (
  request_id  text COLLATE "C" PRIMARY KEY,
  forget_ms   bigint NOT NULL,
  fingerprint bytea NOT NULL,
  reply       bytea NOT NULL
);

CREATE INDEX request_forget ON {schema}.request (forget_ms);

-- Blobs, in pieces of one size. An upload's pieces are nobody's until a blob names the upload.
CREATE TABLE {schema}.blob (
  blob_id   text COLLATE "C" PRIMARY KEY,
  upload    text COLLATE "C" NOT NULL,
  size      bigint NOT NULL,
  create_ms bigint NOT NULL,
  used_ms   bigint NOT NULL
) WITH (fillfactor = 80);

CREATE TABLE {schema}.upload (
  upload    text COLLATE "C" PRIMARY KEY,
  create_ms bigint NOT NULL
);

CREATE TABLE {schema}.piece (
  upload text COLLATE "C" NOT NULL,
  number integer NOT NULL,
  data   bytea NOT NULL,
  PRIMARY KEY (upload, number)
);
ALTER TABLE {schema}.piece ALTER data SET STORAGE EXTERNAL;

-- The engine's statements, by name. {schema} is the schema; {row}, {body} and {light} are the columns of a task's row
-- and body (light: without input and result) over `t` (task) and `b` (body, found by {its_body}), {fresh} those of a task that was never leased, {old_row}, {old_body} and {old_light} the
-- same over `h` (history), and {kept} is what of history is still to be seen: a day that is past may not be dropped yet. Arrays come as one literal each; an empty one stands for "the default for all".

-- name: clock
SELECT version, {now_ms} FROM {schema}.queue_version

-- name: queues
SELECT queue_id, state, settings, create_ms FROM {schema}.queue

-- name: touch_queues
UPDATE {schema}.queue_version SET version = version + 1

-- name: insert_queue
INSERT INTO {schema}.queue (queue_id, state, settings, create_ms)
VALUES ($1::text, $2::smallint, $3::text, $4::bigint)

-- name: update_queue
UPDATE {schema}.queue SET state = $2::smallint, settings = $3::text WHERE queue_id = $1::text

-- name: delete_queue
DELETE FROM {schema}.queue WHERE queue_id = $1::text

-- name: insert
-- New tasks, in the order of the arrays.
WITH new AS MATERIALIZED (
  SELECT nextval('{schema}.task_seq') AS seq, n.*
  FROM unnest($1::text[], $2::smallint[], $3::integer[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
              $8::text[], $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[],
              $16::bytea[])
    AS n (queue_id, state, priority, create_ms, ready_ms, expire_ms, attempt_ms,
          task_id, idempotency_key, parent_task_id, task_type, labels, retry, traceparent, input_blob,
          input)
), hot AS (
  INSERT INTO {schema}.task (seq, queue_id, state, priority, ready_ms, expire_ms)
  SELECT seq, queue_id, state, coalesce(priority, 0), ready_ms, expire_ms FROM new
)
INSERT INTO {schema}.body (seq, create_ms, attempt_ms, task_id, queue_id, idempotency_key, parent_task_id, task_type,
                           labels, retry, traceparent, input_blob, input)
SELECT seq, create_ms, attempt_ms, task_id, queue_id, coalesce(idempotency_key, ''), coalesce(parent_task_id, ''),
       coalesce(task_type, ''), coalesce(labels, '{}'), retry, coalesce(traceparent, ''), coalesce(input_blob, ''),
       coalesce(input, '')
FROM new

-- name: insert_alike
-- The same, of tasks that are alike but for what is in the arrays.
WITH new AS MATERIALIZED (
  SELECT nextval('{schema}.task_seq') AS seq, n.*
  FROM unnest($1::text[], $2::bytea[], $3::text[], $4::text[]) AS n (task_id, input, traceparent, idempotency_key)
), hot AS (
  INSERT INTO {schema}.task (seq, queue_id, state, priority, ready_ms, expire_ms)
  SELECT seq, $5::text, $6::smallint, $7::integer, $9::bigint, $10::bigint FROM new
)
INSERT INTO {schema}.body (seq, create_ms, attempt_ms, task_id, queue_id, idempotency_key, parent_task_id, task_type,
                           labels, retry, traceparent, input_blob, input)
SELECT seq, $8::bigint, $11::bigint, task_id, $5::text, coalesce(idempotency_key, ''), $12::text, $13::text,
       $14::text, $15::text, coalesce(traceparent, ''), $16::text, coalesce(input, '')
FROM new

-- name: save
-- Changes unfinished tasks. A lease that is only extended keeps its lapse_ms, so that the update stays HOT.
UPDATE {schema}.task SET
  state = n.state, priority = coalesce(n.priority, 0), ready_ms = n.ready_ms, expire_ms = n.expire_ms,
  attempt = n.attempt, lease_expirations = coalesce(n.lease_expirations, 0), lease_epoch = n.lease_epoch,
  lease_nonce = n.lease_nonce, lease_ms = n.lease_ms,
  lapse_ms = CASE WHEN task.state = 3 AND n.state = 3 AND n.lease_until >= task.lapse_ms THEN task.lapse_ms
                  ELSE n.lease_until END,
  lease_until = n.lease_until, attempt_until = n.attempt_until, worker_id = coalesce(n.worker_id, ''),
  lease_request_id = coalesce(n.lease_request_id, ''), outcome = coalesce(n.outcome, 0),
  cancel_requested = coalesce(n.cancel_requested, false), start_ms = n.start_ms, end_ms = n.end_ms,
  delete_ms = n.delete_ms
FROM unnest($1::bigint[], $2::smallint[], $3::integer[], $4::bigint[], $5::bigint[], $6::integer[], $7::integer[],
            $8::bigint[], $9::bigint[], $10::integer[], $11::bigint[], $12::bigint[], $13::text[], $14::text[],
            $15::smallint[], $16::boolean[], $17::bigint[], $18::bigint[], $19::bigint[])
  AS n (seq, state, priority, ready_ms, expire_ms, attempt, lease_expirations,
        lease_epoch, lease_nonce, lease_ms, lease_until, attempt_until, worker_id, lease_request_id,
        outcome, cancel_requested, start_ms, end_ms, delete_ms)
WHERE task.seq = n.seq

-- name: lease
-- Tasks that were ready, all leased alike.
UPDATE {schema}.task SET
  state = $2::smallint, attempt = $3::integer, lease_epoch = $4::bigint, lease_nonce = $5::bigint,
  lease_ms = $6::integer, lease_until = $7::bigint, lapse_ms = $7::bigint, attempt_until = $8::bigint,
  worker_id = $9::text, lease_request_id = $10::text, start_ms = $11::bigint
WHERE seq = ANY ($1::bigint[])

-- name: version
-- Of what this transaction writes.
SELECT (pg_current_xact_id()::text::bigint & 4294967295)

-- name: prove
-- Raises unless each (they come in order) is still as that transaction wrote it.
SELECT {schema}.expect(count(*), $3::bigint) FROM (
  SELECT version, row_number() OVER (ORDER BY seq) AS place
  FROM (SELECT seq, xmin AS version FROM {schema}.task WHERE seq = ANY ($1::bigint[]) FOR UPDATE) AS found
) AS t
WHERE version = ($2::xid[])[place]

-- name: end
-- Moves leased tasks of a queue that all end alike into history, with what the attempts gave; raises unless each (they
-- come in order) is still as that transaction wrote it. Nothing is joined that the planner could turn round.
WITH hot AS (
  DELETE FROM {schema}.task WHERE seq = ANY ($1::bigint[])
  RETURNING seq, queue_id, ready_ms, expire_ms, lease_epoch, lease_nonce, start_ms, priority, attempt,
            lease_expirations, lease_ms, xmin AS version
), placed AS (
  SELECT *, row_number() OVER (ORDER BY seq) AS place FROM hot
), gone AS (
  DELETE FROM {schema}.body WHERE queue_id = $12::text AND seq = ANY ($1::bigint[])
), moved AS (
  INSERT INTO {schema}.history (
    drop_day, seq, ready_ms, expire_ms, lease_epoch, lease_nonce, start_ms, end_ms, delete_ms, create_ms, attempt_ms,
    priority, attempt, lease_expirations, lease_ms, state, outcome, cancel_requested, worker_id, lease_request_id,
    task_id, queue_id, idempotency_key, parent_task_id, task_type, labels, retry, traceparent, input_blob,
    result_blob, failure, input, result)
  SELECT $7::integer, t.seq, ready_ms, expire_ms, lease_epoch, lease_nonce, start_ms, $10::bigint, $11::bigint,
    create_ms, attempt_ms, priority, attempt, lease_expirations, lease_ms, $8::smallint, $9::smallint, false, '', '',
    task_id, t.queue_id, idempotency_key, parent_task_id, task_type, labels, retry, traceparent, input_blob,
    coalesce(($3::text[])[place], b.result_blob), coalesce(($4::text[])[place], b.failure), input,
    coalesce(($2::bytea[])[place], b.result)
  FROM placed t, {its_body}
  WHERE ($5::xid[])[place] IS NULL OR ($5::xid[])[place] = version
  RETURNING 1
)
SELECT {schema}.expect(count(*), $6::bigint) FROM moved

-- name: finish
-- Moves what has ended into history, with what its last attempt gave.
WITH done AS MATERIALIZED (
  SELECT * FROM unnest($1::bigint[], $2::smallint[], $3::integer[], $4::bigint[], $5::bigint[], $6::integer[],
            $7::integer[], $8::bigint[], $9::bigint[], $10::integer[], $11::bigint[], $12::bigint[], $13::text[],
            $14::text[], $15::smallint[], $16::boolean[], $17::bigint[], $18::bigint[], $19::bigint[],
            $20::integer[], $21::bytea[], $22::text[], $23::text[])
  AS n (seq, state, priority, ready_ms, expire_ms, attempt,
        lease_expirations, lease_epoch, lease_nonce, lease_ms, lease_until, attempt_until, worker_id,
        lease_request_id, outcome, cancel_requested, start_ms, end_ms, delete_ms,
        drop_day, result, result_blob, failure)
), hot AS (
  DELETE FROM {schema}.task WHERE seq = ANY ($1::bigint[])
), n AS (
  DELETE FROM {schema}.body b USING done WHERE b.seq = done.seq
  RETURNING done.*, b.create_ms, b.attempt_ms, b.task_id, b.queue_id, b.idempotency_key, b.parent_task_id, b.task_type,
            b.labels, b.retry, b.traceparent, b.input_blob, b.input, b.result_blob AS old_result_blob,
            b.failure AS old_failure, b.result AS old_result
)
INSERT INTO {schema}.history (
  drop_day, seq, ready_ms, expire_ms, lease_epoch, lease_nonce, lease_until, attempt_until, start_ms, end_ms,
  delete_ms, create_ms, attempt_ms, priority, attempt, lease_expirations, lease_ms, state, outcome, cancel_requested,
  worker_id, lease_request_id, task_id, queue_id, idempotency_key, parent_task_id, task_type, labels, retry,
  traceparent, input_blob, result_blob, failure, input, result)
SELECT
  drop_day, seq, ready_ms, expire_ms, lease_epoch, lease_nonce, lease_until, attempt_until, start_ms, end_ms,
  delete_ms, create_ms, attempt_ms, coalesce(priority, 0), attempt, coalesce(lease_expirations, 0), lease_ms, state,
  coalesce(outcome, 0), coalesce(cancel_requested, false), coalesce(worker_id, ''), coalesce(lease_request_id, ''),
  task_id, queue_id, idempotency_key, parent_task_id, task_type, labels, retry, traceparent, input_blob,
  coalesce(result_blob, old_result_blob), coalesce(failure, old_failure), input, coalesce(result, old_result)
FROM n

-- name: revive
-- Takes tasks out of history again, as they are there.
WITH back AS (
  DELETE FROM {schema}.history WHERE seq = ANY ($1::bigint[]) RETURNING *
), hot AS (
  INSERT INTO {schema}.task (
    seq, ready_ms, expire_ms, lease_epoch, lease_nonce, lease_until, lapse_ms, attempt_until, start_ms, end_ms,
    delete_ms, priority, attempt, lease_expirations, lease_ms, state, outcome, cancel_requested, queue_id, worker_id,
    lease_request_id)
  SELECT seq, ready_ms, expire_ms, lease_epoch, lease_nonce, lease_until, lease_until, attempt_until, start_ms, end_ms,
    delete_ms, priority, attempt, lease_expirations, lease_ms, state, outcome, cancel_requested, queue_id, worker_id,
    lease_request_id
  FROM back
)
INSERT INTO {schema}.body (
  seq, create_ms, attempt_ms, task_id, queue_id, idempotency_key, parent_task_id, task_type, labels, retry,
  traceparent, input_blob, result_blob, failure, input, result)
SELECT seq, create_ms, attempt_ms, task_id, queue_id, idempotency_key, parent_task_id, task_type, labels, retry,
  traceparent, input_blob, result_blob, failure, input, result
FROM back

-- name: save_bodies
-- What an attempt left on a task that goes on.
UPDATE {schema}.body SET
  result = coalesce(n.result, body.result), result_blob = coalesce(n.result_blob, body.result_blob),
  failure = coalesce(n.failure, body.failure)
FROM unnest($1::bigint[], $2::bytea[], $3::text[], $4::text[]) AS n (seq, result, result_blob, failure)
WHERE body.seq = n.seq

-- name: delete_hot
WITH hot AS (DELETE FROM {schema}.task WHERE seq = ANY ($1::bigint[]))
DELETE FROM {schema}.body WHERE seq = ANY ($1::bigint[])

-- name: delete_old
DELETE FROM {schema}.history WHERE seq = ANY ($1::bigint[])

-- name: in_history
SELECT seq FROM {schema}.history WHERE seq = ANY ($1::bigint[])

-- name: ready
-- What is narrow enough to be sent quickly; what a lease has left (its epoch is not 0) is read by `whole`.
WITH t AS MATERIALIZED (
  SELECT seq, queue_id, priority, ready_ms, expire_ms, lease_epoch FROM {schema}.task WHERE queue_id = $1::text AND state = 2
  ORDER BY priority DESC, seq LIMIT $2::integer FOR UPDATE SKIP LOCKED
)
SELECT {fresh} FROM t, {its_body} ORDER BY t.priority DESC, t.seq

-- name: ready_behind
-- The same, within a priority and behind a task (marks.py).
WITH t AS MATERIALIZED (
  SELECT seq, queue_id, priority, ready_ms, expire_ms, lease_epoch FROM {schema}.task
  WHERE queue_id = $1::text AND state = 2 AND priority = $3::integer AND seq > $4::bigint
  ORDER BY seq LIMIT $2::integer FOR UPDATE SKIP LOCKED
)
SELECT {fresh} FROM t, {its_body} ORDER BY t.seq

-- name: whole
SELECT {row}, {body} FROM {schema}.task t, {its_body} WHERE t.seq = ANY ($1::bigint[])

-- name: due
WITH t AS MATERIALIZED (
  SELECT * FROM {schema}.task WHERE state IN (1, 4) AND ready_ms <= $1::bigint AND ready_ms > $3::bigint
  ORDER BY ready_ms, seq LIMIT $2::integer FOR UPDATE SKIP LOCKED
)
SELECT {row} FROM t, {its_body} ORDER BY t.ready_ms, t.seq

-- name: push_lapses
-- Leases that were extended since it was noted when to look: to be looked at when they end now.
WITH t AS MATERIALIZED (
  SELECT seq FROM {schema}.task WHERE state = 3 AND lapse_ms <= $1::bigint AND lapse_ms > $3::bigint
    AND lease_until > $1::bigint
  ORDER BY lapse_ms LIMIT $2::integer FOR UPDATE SKIP LOCKED
)
UPDATE {schema}.task SET lapse_ms = lease_until FROM t WHERE task.seq = t.seq

-- name: lapsed
WITH t AS MATERIALIZED (
  SELECT * FROM {schema}.task WHERE state = 3 AND lapse_ms <= $1::bigint AND lapse_ms > $3::bigint
    AND lease_until <= $1::bigint
  ORDER BY lease_until, seq LIMIT $2::integer FOR UPDATE SKIP LOCKED
)
SELECT {row} FROM t, {its_body} ORDER BY t.lease_until, t.seq

-- name: expired
WITH t AS MATERIALIZED (
  SELECT * FROM {schema}.task WHERE expire_ms IS NOT NULL AND state IN (1, 2, 4) AND expire_ms <= $1::bigint
    AND expire_ms > $3::bigint
  ORDER BY expire_ms, seq LIMIT $2::integer FOR UPDATE SKIP LOCKED
)
SELECT {row} FROM t, {its_body} ORDER BY t.expire_ms, t.seq

-- name: deletable
SELECT {old_row} FROM {schema}.history h WHERE drop_day = -1 AND delete_ms <= $1::bigint
ORDER BY delete_ms, seq LIMIT $2::integer FOR UPDATE SKIP LOCKED

-- name: leased
SELECT {row} FROM {schema}.task t, {its_body}
WHERE t.state = 3 AND t.seq > $1::bigint ORDER BY t.seq LIMIT $2::integer FOR UPDATE OF t

-- name: next_times
-- Each from its floor on.
SELECT least((SELECT min(ready_ms) FROM {schema}.task WHERE state IN (1, 4) AND ready_ms > $1::bigint),
             (SELECT min(expire_ms) FROM {schema}.task
              WHERE expire_ms IS NOT NULL AND state IN (1, 2, 4) AND expire_ms > $2::bigint)),
       (SELECT min(lapse_ms) FROM {schema}.task WHERE state = 3 AND lapse_ms > $3::bigint)

-- name: by_seq
SELECT {row} FROM {schema}.task t, {its_body} WHERE t.seq = ANY ($1::bigint[]) ORDER BY t.seq

-- name: old_by_seq
SELECT {old_row} FROM {schema}.history h WHERE h.seq = ANY ($1::bigint[]) AND {kept} ORDER BY h.seq

-- name: by_id
SELECT {row} FROM {schema}.body b JOIN {schema}.task t USING (seq) WHERE b.task_id = ANY ($1::text[]) ORDER BY t.seq

-- name: old_by_id
SELECT {old_row} FROM {schema}.history h WHERE h.task_id = ANY ($1::text[]) AND {kept} ORDER BY h.seq

-- name: by_key
SELECT {row} FROM {schema}.body b JOIN {schema}.task t USING (seq)
WHERE b.queue_id = $1::text AND b.idempotency_key = ANY ($2::text[]) AND b.idempotency_key <> '' ORDER BY t.seq

-- name: old_by_key
SELECT {old_row} FROM {schema}.history h
WHERE h.queue_id = $1::text AND h.idempotency_key = ANY ($2::text[]) AND h.idempotency_key <> '' AND {kept} ORDER BY h.seq

-- name: lock_name
-- Whoever comes with the same name waits until the first one is through.
SELECT pg_advisory_xact_lock($1::integer, hashtext($2::text))

-- name: by_lease_request
SELECT {row}, {body} FROM {schema}.task t, {its_body}
WHERE t.lease_request_id = $2::text AND t.lease_request_id <> '' AND t.queue_id = $1::text AND t.state = 3
ORDER BY t.priority DESC, t.seq FOR UPDATE OF t

-- name: bodies
SELECT b.seq, {body} FROM {schema}.body b WHERE b.seq = ANY ($1::bigint[])

-- name: old_bodies
SELECT h.seq, {old_body} FROM {schema}.history h WHERE h.seq = ANY ($1::bigint[])

-- name: counts
SELECT state, count(*) FROM {schema}.task WHERE queue_id = $1::text GROUP BY state
UNION ALL
SELECT state, count(*) FROM {schema}.history h WHERE queue_id = $1::text AND {kept} GROUP BY state

-- name: totals
-- The oldest of each priority's first, found by hopping from priority to priority in the index.
WITH RECURSIVE level (priority) AS (
  SELECT max(priority) FROM {schema}.task WHERE queue_id = $1::text AND state = 2
  UNION ALL
  SELECT (SELECT max(t.priority) FROM {schema}.task t
          WHERE t.queue_id = $1::text AND t.state = 2 AND t.priority < level.priority)
  FROM level WHERE level.priority IS NOT NULL
)
SELECT (SELECT min((SELECT t.ready_ms FROM {schema}.task t
                    WHERE t.queue_id = $1::text AND t.state = 2 AND t.priority = level.priority
                    ORDER BY t.seq LIMIT 1))
        FROM level WHERE priority IS NOT NULL),
       (SELECT count(DISTINCT worker_id) FROM {schema}.task WHERE queue_id = $1::text AND state = 3)

-- name: queue
SELECT queue_id, state, settings, create_ms FROM {schema}.queue WHERE queue_id = $1::text

-- name: queues_after
SELECT queue_id, state, settings, create_ms FROM {schema}.queue WHERE queue_id > $1::text
ORDER BY queue_id LIMIT $2::integer

-- name: referenced
SELECT w.id FROM unnest($1::text[]) AS w (id)
WHERE EXISTS (SELECT FROM {schema}.body b WHERE b.input_blob = w.id AND b.input_blob <> '')
   OR EXISTS (SELECT FROM {schema}.body b WHERE b.result_blob = w.id AND b.result_blob <> '')
   OR EXISTS (SELECT FROM {schema}.history h WHERE h.input_blob = w.id AND h.input_blob <> '')
   OR EXISTS (SELECT FROM {schema}.history h WHERE h.result_blob = w.id AND h.result_blob <> '')

-- name: request
SELECT fingerprint, reply FROM {schema}.request WHERE request_id = $1::text

-- name: none_requested
-- Raises if there is one.
SELECT {schema}.expect(count(*), 0) FROM {schema}.request WHERE request_id = ANY ($1::text[])

-- name: save_requests
INSERT INTO {schema}.request (request_id, fingerprint, reply, forget_ms)
SELECT * FROM unnest($1::text[], $2::bytea[], $3::bytea[], $4::bigint[])

-- name: forget_requests
WITH past AS (
  SELECT request_id FROM {schema}.request WHERE forget_ms <= $1::bigint
  ORDER BY forget_ms LIMIT $2::integer FOR UPDATE SKIP LOCKED
), gone AS (
  DELETE FROM {schema}.request USING past WHERE request.request_id = past.request_id RETURNING 1
)
SELECT count(*) FROM gone

-- name: statistics
-- How much is gathered of history's columns, for a partition to be: LIKE leaves that out.
SELECT string_agg(format('ALTER %I SET STATISTICS %s', attname, attstattarget), ', ')
FROM pg_attribute WHERE attrelid = '{schema}.history'::regclass AND attnum > 0 AND NOT attisdropped AND attstattarget >= 0

-- name: begin_upload
INSERT INTO {schema}.upload VALUES ($1::text, {now_ms})

-- name: put_piece
INSERT INTO {schema}.piece VALUES ($1::text, $2::integer, $3::bytea)

-- name: keep_blob
-- The blob as it is kept: with this upload, or as it was.
INSERT INTO {schema}.blob VALUES ($1::text, $2::text, $3::bigint, {now_ms}, {now_ms})
ON CONFLICT (blob_id) DO UPDATE SET used_ms = {now_ms}
RETURNING upload, size, create_ms

-- name: end_upload
DELETE FROM {schema}.upload WHERE upload = $1::text

-- name: drop_pieces
DELETE FROM {schema}.piece WHERE upload = $1::text

-- name: stat_blob
UPDATE {schema}.blob SET used_ms = {now_ms} WHERE blob_id = $1::text RETURNING size, create_ms

-- name: read_blob
SELECT piece.data FROM {schema}.blob LEFT JOIN {schema}.piece ON piece.upload = blob.upload
  AND number BETWEEN $2::integer AND $3::integer
WHERE blob_id = $1::text ORDER BY number

-- name: idle_blobs
SELECT blob_id FROM {schema}.blob WHERE used_ms <= {now_ms} - $1::bigint ORDER BY used_ms LIMIT $2::integer

-- name: delete_blob
WITH gone AS (
  DELETE FROM {schema}.blob WHERE blob_id = $1::text AND used_ms <= {now_ms} - $2::bigint RETURNING upload
)
DELETE FROM {schema}.piece USING gone WHERE piece.upload = gone.upload

-- name: drop_old_uploads
-- What crashes left behind; an upload that is under way may take a day.
WITH gone AS (
  DELETE FROM {schema}.upload WHERE create_ms <= {now_ms} - 86400000 RETURNING upload
)
DELETE FROM {schema}.piece USING gone WHERE piece.upload = gone.upload

-- Each is one method of the port and one transaction of its own, so that a pooler may send each to another connection.
-- What writes waits for the disk whatever the server's setting: set_config holds until the commit of this statement.
-- LIMIT 1 tells the planner how small that table is; else it takes claims for heavy and compiles them.
-- `era` is the database's history as it is now: a version counts only within it, since a standby that was promoted may
-- have forgotten the latest ones. LIMIT 1 tells the planner what it can't know of a table that is never analyzed: it
-- expected millions of rows, and compiled each claim (jit) for longer than all else takes.

-- name: claim
-- $1 election, $2 candidate, $3 session, $4 value, $5 lease, $6 release delay, $7 wall time, $8 watched version
-- $9 the reason for a term that ran out, $10 how many terms are kept, $11 the channel, $12 the news
WITH durable AS MATERIALIZED ({durable}),
now AS MATERIALIZED (SELECT {era} AS era, id FROM {schema}.leaderelection_meta LIMIT 1),
refusing AS MATERIALIZED (
  SELECT {record} FROM {schema}.leaderelection_election e, now
  WHERE e.election_id = $1::text AND e.session_id NOT IN ('', $3::text)
    AND $8::text IS DISTINCT FROM {version}
),
claimed AS (
  INSERT INTO {schema}.leaderelection_election AS e (
    election_id, domain, epoch, version, first_version, candidate_id, session_id, value, lease_ms, release_delay_ms,
    wait_ms, acquire_ms, step_down)
  SELECT $1::text, {domain},
         1 + coalesce((SELECT max(epoch) FROM {schema}.leaderelection_term WHERE election_id = $1::text), 0),
         1, 1, $2::text, $3::text, $4::bytea, $5::bigint, $6::bigint, 0, $7::bigint, false
  FROM now, durable WHERE NOT EXISTS (SELECT FROM refusing)
  ON CONFLICT (election_id) DO UPDATE SET
    version = e.version + 1,
    lease_ms = excluded.lease_ms,
    domain = CASE WHEN e.session_id = excluded.session_id THEN e.domain ELSE excluded.domain END,
    epoch = CASE WHEN e.session_id = excluded.session_id THEN e.epoch ELSE e.epoch + 1 END,
    first_version = CASE WHEN e.session_id = excluded.session_id THEN e.first_version ELSE e.version + 1 END,
    candidate_id = CASE WHEN e.session_id = excluded.session_id THEN e.candidate_id ELSE excluded.candidate_id END,
    value = CASE WHEN e.session_id = excluded.session_id THEN e.value ELSE excluded.value END,
    release_delay_ms = CASE WHEN e.session_id = excluded.session_id THEN e.release_delay_ms
                       ELSE excluded.release_delay_ms END,
    wait_ms = CASE e.session_id WHEN excluded.session_id THEN e.wait_ms WHEN '' THEN 0 ELSE e.release_delay_ms END,
    acquire_ms = CASE WHEN e.session_id = excluded.session_id THEN e.acquire_ms ELSE excluded.acquire_ms END,
    step_down = e.step_down AND e.session_id = excluded.session_id,
    session_id = excluded.session_id
  WHERE e.session_id IN ('', excluded.session_id) OR $8::text = (SELECT {version} FROM now)
  RETURNING *
),
begun AS (SELECT * FROM claimed WHERE version = first_version),
ended AS (
  UPDATE {schema}.leaderelection_term t SET end_ms = $7::bigint, reason = $9::smallint FROM begun
  WHERE t.election_id = $1::text AND t.epoch = begun.epoch - 1 AND t.end_ms IS NULL
),
noted AS (
  INSERT INTO {schema}.leaderelection_term (election_id, epoch, domain, candidate_id, acquire_ms, reason)
  SELECT election_id, epoch, domain, candidate_id, acquire_ms, 0 FROM begun
),
trimmed AS (
  DELETE FROM {schema}.leaderelection_term t USING begun
  WHERE t.election_id = $1::text AND t.epoch <= begun.epoch - $10::bigint
),
told AS MATERIALIZED (SELECT pg_notify($11::text, $12::text) FROM begun)
SELECT true, e.wait_ms, {record} FROM claimed e CROSS JOIN now LEFT JOIN told ON true
UNION ALL SELECT false, 0, refusing.* FROM refusing

-- name: renew
-- $1 elections, $2 sessions, $3 epochs
WITH durable AS MATERIALIZED ({durable}),
now AS MATERIALIZED (SELECT {era} AS era, id FROM {schema}.leaderelection_meta LIMIT 1)
UPDATE {schema}.leaderelection_election e SET version = e.version + 1
FROM durable, now, unnest($1::text[], $2::text[], $3::bigint[]) AS held (election_id, session_id, epoch)
WHERE e.election_id = held.election_id AND e.session_id = held.session_id AND e.epoch = held.epoch
RETURNING {record}

-- name: release
-- $1 election, $2 session, $3 epoch, $4 reason, $5 wall time, $6 the channel, $7 the news
WITH durable AS MATERIALIZED ({durable}),
freed AS (
  UPDATE {schema}.leaderelection_election e
  SET version = e.version + 1, candidate_id = '', session_id = '', value = '', step_down = false
  FROM durable
  WHERE e.election_id = $1::text AND e.session_id = $2::text AND e.epoch = $3::bigint
  RETURNING e.epoch
),
ended AS (
  UPDATE {schema}.leaderelection_term t SET end_ms = $5::bigint, reason = $4::smallint FROM freed
  WHERE t.election_id = $1::text AND t.epoch = freed.epoch
),
told AS MATERIALIZED (SELECT pg_notify($6::text, $7::text) FROM freed)
SELECT 1 FROM freed LEFT JOIN told ON true

-- name: proclaim
-- $1 election, $2 session, $3 epoch, $4 value, $5 the channel, $6 the news
WITH durable AS MATERIALIZED ({durable}),
now AS MATERIALIZED (SELECT {era} AS era, id FROM {schema}.leaderelection_meta LIMIT 1),
changed AS (
  UPDATE {schema}.leaderelection_election e SET version = e.version + 1, value = $4::bytea FROM durable
  WHERE e.election_id = $1::text AND e.session_id = $2::text AND e.epoch = $3::bigint RETURNING e.*
),
told AS MATERIALIZED (SELECT pg_notify($5::text, $6::text) FROM changed)
SELECT {record} FROM changed e CROSS JOIN now LEFT JOIN told ON true

-- name: ask_step_down
-- $1 election, $2 epoch, $3 the channel, $4 the news
WITH durable AS MATERIALIZED ({durable}),
now AS MATERIALIZED (SELECT {era} AS era, id FROM {schema}.leaderelection_meta LIMIT 1),
changed AS (
  UPDATE {schema}.leaderelection_election e SET version = e.version + 1, step_down = true FROM durable
  WHERE e.election_id = $1::text AND e.epoch = $2::bigint AND e.session_id <> '' RETURNING e.*
),
told AS MATERIALIZED (SELECT pg_notify($3::text, $4::text) FROM changed)
SELECT {record} FROM changed e CROSS JOIN now LEFT JOIN told ON true

-- name: read
-- $1 election
WITH now AS MATERIALIZED (SELECT {era} AS era, id FROM {schema}.leaderelection_meta LIMIT 1)
SELECT {record} FROM {schema}.leaderelection_election e, now WHERE e.election_id = $1::text

-- name: records
-- $1 after, $2 limit
WITH now AS MATERIALIZED (SELECT {era} AS era, id FROM {schema}.leaderelection_meta LIMIT 1)
SELECT {record} FROM {schema}.leaderelection_election e, now
WHERE e.election_id > $1::text ORDER BY e.election_id LIMIT $2::bigint

-- name: terms
-- $1 election, $2 before, $3 limit
SELECT epoch, domain, candidate_id, acquire_ms, end_ms, reason FROM {schema}.leaderelection_term
WHERE election_id = $1::text AND epoch < $2::bigint ORDER BY epoch DESC LIMIT $3::bigint

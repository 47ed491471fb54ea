-- Version 1. One row for each election, for ever: its epoch is the token, and must not begin again.
-- Nothing that changes with a renewal is indexed and pages have room to spare, so that a renewal is a HOT update.
-- Instants named *_ms are milliseconds since 1970, for people; no deadline is stored.

-- `home` is the table for which `id` was made: one that was restored from a dump is another, and gets another id.
CREATE TABLE {schema}.leaderelection_meta (
  id   text NOT NULL,
  home oid NOT NULL
);

CREATE TABLE {schema}.leaderelection_election (
  election_id      text COLLATE "C" PRIMARY KEY,
  domain           text NOT NULL,      -- of the present term
  epoch            bigint NOT NULL,
  version          bigint NOT NULL,    -- rises with every change and never begins again
  first_version    bigint NOT NULL,    -- of the present term
  candidate_id     text NOT NULL,      -- '' = nobody leads
  session_id       text NOT NULL,
  value            bytea NOT NULL,     -- UTF-8; bytes, since it may hold what text cannot
  lease_ms         bigint NOT NULL,
  release_delay_ms bigint NOT NULL,    -- what the next one waits if this term runs out
  wait_ms          bigint NOT NULL,    -- what this one waits
  acquire_ms       bigint NOT NULL,
  step_down        boolean NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000);

CREATE TABLE {schema}.leaderelection_term (
  election_id  text COLLATE "C" NOT NULL,
  epoch        bigint NOT NULL,
  domain       text NOT NULL,
  candidate_id text NOT NULL,
  acquire_ms   bigint NOT NULL,
  end_ms       bigint,
  reason       smallint NOT NULL,
  PRIMARY KEY (election_id, epoch)
);

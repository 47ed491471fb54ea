-- Version 2: enqueueing from inside the user's own transaction. The functions are versioned by their names; a later
-- one stands beside them. What they check is what core/limits.py and core/steps.py check.

-- A number as protobuf writes it: seven bits a byte, the lowest first.
CREATE FUNCTION {schema}.varint(value bigint) RETURNS bytea LANGUAGE plpgsql IMMUTABLE STRICT AS $$
DECLARE
  bytes bytea := '';
BEGIN
  WHILE value >= 128 LOOP
    bytes := bytes || set_byte('\x00'::bytea, 0, (value & 127 | 128)::integer);
    value := value >> 7;
  END LOOP;
  RETURN bytes || set_byte('\x00'::bytea, 0, value::integer);
END
$$;

-- A field of bytes: its tag, their number, they themselves.
CREATE FUNCTION {schema}.field(tag integer, content bytea) RETURNS bytea LANGUAGE sql IMMUTABLE STRICT AS $$
  SELECT set_byte('\x00'::bytea, 0, tag) || {schema}.varint(octet_length(content)) || content
$$;

-- google.protobuf.Value
CREATE FUNCTION {schema}.json_value(value jsonb) RETURNS bytea LANGUAGE plpgsql IMMUTABLE STRICT AS $$
DECLARE
  number bytea;
  inner_bytes bytea;
BEGIN
  CASE jsonb_typeof(value)
    WHEN 'null' THEN RETURN '\x0800'::bytea;
    WHEN 'boolean' THEN RETURN CASE WHEN value::boolean THEN '\x2001'::bytea ELSE '\x2000'::bytea END;
    WHEN 'string' THEN RETURN {schema}.field(26, convert_to(value #>> '{}', 'UTF8'));
    WHEN 'number' THEN
      number := float8send((value #>> '{}')::float8);
      RETURN '\x11'::bytea || (SELECT string_agg(substr(number, 9 - n, 1), NULL ORDER BY n) FROM generate_series(1, 8) n);
    WHEN 'array' THEN
      SELECT string_agg({schema}.field(10, {schema}.json_value(e.item)), NULL ORDER BY e.n) INTO inner_bytes
      FROM jsonb_array_elements(value) WITH ORDINALITY AS e (item, n);
      RETURN {schema}.field(50, coalesce(inner_bytes, ''));
    ELSE
      SELECT string_agg({schema}.field(10, {schema}.field(10, convert_to(e.key, 'UTF8'))
                                           || {schema}.field(18, {schema}.json_value(e.item))),
                        NULL ORDER BY e.key COLLATE "C") INTO inner_bytes
      FROM jsonb_each(value) AS e (key, item);
      RETURN {schema}.field(42, coalesce(inner_bytes, ''));
  END CASE;
END
$$;

-- What all versions of retinue_enqueue do, with the input as a serialised Payload and the size of its content.
CREATE FUNCTION {schema}.enqueue_payload(
  p_queue_id text, p_payload bytea, p_size integer, p_task_id text, p_task_type text, p_priority integer,
  p_schedule_time timestamptz, p_expire_time timestamptz, p_attempt interval, p_idempotency_key text, p_labels jsonb,
  p_traceparent text, p_wake boolean
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  now_ms     bigint := {now_ms};
  start_ms   bigint := floor(extract(epoch FROM p_schedule_time) * 1000);
  expire_ms  bigint := floor(extract(epoch FROM p_expire_time) * 1000);
  attempt_ms bigint := floor(extract(epoch FROM p_attempt) * 1000);
  known      record;
  queue_row  record;
  max_tasks  bigint;
  new_seq    bigint;
BEGIN
  IF p_queue_id !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$' THEN
    RAISE EXCEPTION 'cannot enqueue: queue_id must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit'
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF p_task_id <> '' AND p_task_id !~ '^[A-Za-z0-9._:/-]{1,128}$' THEN
    RAISE EXCEPTION 'cannot enqueue: task_id must be 1 to 128 of A-Z a-z 0-9 . _ : / -'
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF p_priority NOT BETWEEN -1000 AND 1000 OR length(p_task_type) > 128 OR length(p_idempotency_key) > 256
     OR length(p_traceparent) > 64 THEN
    RAISE EXCEPTION 'cannot enqueue: priority must be from -1000 to 1000, task_type at most 128 characters,'
      ' idempotency_key 256, traceparent 64' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF start_ms > now_ms + 3653 * 86400000::bigint OR expire_ms <= greatest(coalesce(start_ms, 0), now_ms)
     OR attempt_ms NOT BETWEEN 100 AND 30 * 86400000::bigint THEN
    RAISE EXCEPTION 'cannot enqueue: schedule_time must be at most 10 years ahead, expire_time later than now and than'
      ' the start, attempt from 0.1 s to 30 days' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF jsonb_typeof(p_labels) <> 'object' OR (SELECT count(*) FROM jsonb_object_keys(p_labels)) > 16 OR EXISTS (
       SELECT FROM jsonb_each(p_labels) AS l (key, value)
       WHERE l.key !~ '^[A-Za-z0-9._/-]{1,64}$' OR jsonb_typeof(l.value) <> 'string' OR length(l.value #>> '{}') > 256)
  THEN
    RAISE EXCEPTION 'cannot enqueue: labels must be an object of at most 16 texts of at most 256 characters, its keys'
      ' 1 to 64 of A-Z a-z 0-9 . _ / -' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF p_size > 262144 THEN
    RAISE EXCEPTION 'cannot enqueue: cannot take an inline payload of % bytes: the limit is 262144', p_size
      USING ERRCODE = 'program_limit_exceeded';
  END IF;

  -- Held until the end of the transaction: the queue can't be deleted meanwhile.
  SELECT q.state, (q.settings::jsonb ->> 'max_tasks')::bigint AS max_tasks INTO queue_row
  FROM {schema}.queue q WHERE q.queue_id = p_queue_id FOR KEY SHARE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'cannot find queue %: create it first', p_queue_id USING ERRCODE = 'no_data_found';
  END IF;
  IF queue_row.state = 3 THEN
    RAISE EXCEPTION 'cannot enqueue: queue % is draining', p_queue_id USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  IF p_idempotency_key <> '' THEN
    SELECT b.task_id, b.input INTO known FROM {schema}.body b
    WHERE b.queue_id = p_queue_id AND b.idempotency_key = p_idempotency_key AND b.idempotency_key <> ''
    UNION ALL
    SELECT h.task_id, h.input FROM {schema}.history h
    WHERE h.queue_id = p_queue_id AND h.idempotency_key = p_idempotency_key AND h.idempotency_key <> '' AND {kept}
    LIMIT 1;
    IF FOUND AND known.input = p_payload THEN
      RETURN known.task_id;
    ELSIF FOUND THEN
      RAISE EXCEPTION 'cannot enqueue under idempotency key %: a task with another input has it', p_idempotency_key
        USING ERRCODE = 'unique_violation';
    END IF;
  END IF;
  IF EXISTS (SELECT FROM {schema}.history h WHERE h.task_id = p_task_id AND p_task_id <> '' AND {kept}) THEN
    RAISE EXCEPTION 'cannot enqueue %: a task of that id exists', p_task_id USING ERRCODE = 'unique_violation';
  END IF;
  max_tasks := queue_row.max_tasks;
  IF max_tasks > 0 THEN
    PERFORM pg_advisory_xact_lock({room_lock}, hashtext(p_queue_id));
    IF (SELECT count(*) FROM (SELECT FROM {schema}.body b WHERE b.queue_id = p_queue_id LIMIT max_tasks) t) >= max_tasks
    THEN
      RAISE EXCEPTION 'cannot enqueue: queue % holds its % unfinished tasks', p_queue_id, max_tasks
        USING ERRCODE = 'configuration_limit_exceeded';
    END IF;
  END IF;

  IF p_task_id = '' THEN
    p_task_id := lpad(to_hex(now_ms), 12, '0') || right(replace(gen_random_uuid()::text, '-', ''), 16);
  END IF;
  new_seq := nextval('{schema}.task_seq');
  INSERT INTO {schema}.task (seq, queue_id, state, priority, ready_ms, expire_ms)
  VALUES (new_seq, p_queue_id, CASE WHEN start_ms > now_ms THEN 1 ELSE 2 END, p_priority,
          greatest(coalesce(start_ms, now_ms), now_ms), expire_ms);
  INSERT INTO {schema}.body (seq, create_ms, attempt_ms, task_id, queue_id, idempotency_key, parent_task_id, task_type,
                             labels, traceparent, input_blob, input)
  VALUES (new_seq, now_ms, attempt_ms, p_task_id, p_queue_id, replace(p_idempotency_key, E'\x1b', E'\x1be'), '',
          replace(p_task_type, E'\x1b', E'\x1be'), p_labels::text, replace(p_traceparent, E'\x1b', E'\x1be'), '',
          p_payload);
  IF p_wake AND start_ms > now_ms IS NOT TRUE THEN
    PERFORM pg_notify('retinue:{schema}', E'\n' || p_queue_id || ' 1');
  END IF;
  RETURN p_task_id;
END
$$;

-- The input as JSON, as text, or as bytes; the rest is the same. Each gives the task's id.
CREATE FUNCTION {schema}.retinue_enqueue_v1(
  queue_id text, input jsonb, task_type text DEFAULT '', task_id text DEFAULT '', priority integer DEFAULT 0,
  schedule_time timestamptz DEFAULT NULL, expire_time timestamptz DEFAULT NULL, attempt interval DEFAULT NULL,
  idempotency_key text DEFAULT '', labels jsonb DEFAULT '{}', traceparent text DEFAULT '', wake boolean DEFAULT true
) RETURNS text LANGUAGE sql AS $$
  SELECT {schema}.enqueue_payload(queue_id, {schema}.field(26, v.bytes), octet_length(v.bytes), task_id, task_type,
    priority, schedule_time, expire_time, attempt, idempotency_key, labels, traceparent, wake)
  FROM (SELECT {schema}.json_value(input) AS bytes) v
$$;

CREATE FUNCTION {schema}.retinue_enqueue_v1(
  queue_id text, input text, task_type text DEFAULT '', task_id text DEFAULT '', priority integer DEFAULT 0,
  schedule_time timestamptz DEFAULT NULL, expire_time timestamptz DEFAULT NULL, attempt interval DEFAULT NULL,
  idempotency_key text DEFAULT '', labels jsonb DEFAULT '{}', traceparent text DEFAULT '', wake boolean DEFAULT true
) RETURNS text LANGUAGE sql AS $$
  SELECT {schema}.enqueue_payload(queue_id, {schema}.field(18, v.bytes), octet_length(v.bytes), task_id, task_type,
    priority, schedule_time, expire_time, attempt, idempotency_key, labels, traceparent, wake)
  FROM (SELECT convert_to(input, 'UTF8') AS bytes) v
$$;

CREATE FUNCTION {schema}.retinue_enqueue_v1(
  queue_id text, input bytea, task_type text DEFAULT '', task_id text DEFAULT '', priority integer DEFAULT 0,
  schedule_time timestamptz DEFAULT NULL, expire_time timestamptz DEFAULT NULL, attempt interval DEFAULT NULL,
  idempotency_key text DEFAULT '', labels jsonb DEFAULT '{}', traceparent text DEFAULT '', wake boolean DEFAULT true
) RETURNS text LANGUAGE sql AS $$
  SELECT {schema}.enqueue_payload(queue_id, {schema}.field(10, input), octet_length(input), task_id, task_type,
    priority, schedule_time, expire_time, attempt, idempotency_key, labels, traceparent, wake)
$$;

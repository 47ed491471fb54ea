-- Version 3. History is looked up by few of its columns, and grows by a tenth often while it is young: what ANALYZE then
-- gathers is of those columns and from 3,000 rows, not of all of them from 30,000.
ALTER TABLE {schema}.history
  ALTER drop_day SET STATISTICS 10, ALTER seq SET STATISTICS 10, ALTER task_id SET STATISTICS 10,
  ALTER queue_id SET STATISTICS 10, ALTER idempotency_key SET STATISTICS 10, ALTER parent_task_id SET STATISTICS 10,
  ALTER task_type SET STATISTICS 10, ALTER state SET STATISTICS 10, ALTER create_ms SET STATISTICS 10,
  ALTER delete_ms SET STATISTICS 10, ALTER input_blob SET STATISTICS 10, ALTER result_blob SET STATISTICS 10,
  ALTER ready_ms SET STATISTICS 0, ALTER expire_ms SET STATISTICS 0, ALTER lease_epoch SET STATISTICS 0,
  ALTER lease_nonce SET STATISTICS 0, ALTER lease_until SET STATISTICS 0, ALTER attempt_until SET STATISTICS 0,
  ALTER start_ms SET STATISTICS 0, ALTER end_ms SET STATISTICS 0, ALTER attempt_ms SET STATISTICS 0,
  ALTER priority SET STATISTICS 0, ALTER attempt SET STATISTICS 0, ALTER lease_expirations SET STATISTICS 0,
  ALTER lease_ms SET STATISTICS 0, ALTER outcome SET STATISTICS 0, ALTER cancel_requested SET STATISTICS 0,
  ALTER worker_id SET STATISTICS 0, ALTER lease_request_id SET STATISTICS 0, ALTER labels SET STATISTICS 0,
  ALTER retry SET STATISTICS 0, ALTER traceparent SET STATISTICS 0, ALTER failure SET STATISTICS 0,
  ALTER input SET STATISTICS 0, ALTER result SET STATISTICS 0;

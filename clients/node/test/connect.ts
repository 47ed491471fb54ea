// The stock Connect client over HTTP/1.1 and JSON: what a browser or curl gets. RETINUE_HTTP_ADDRESS is HOST:PORT.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { BadRequestSchema, ErrorInfoSchema } from "../src/google/rpc/error_details_pb.js";
import { Durability, TaskEventType } from "../src/retinue/workqueue/v1/workqueue_admin_service_pb.js";
import { WorkQueueAdminService } from "../src/retinue/workqueue/v1/workqueue_admin_service_pb.js";
import { WorkQueueService } from "../src/retinue/workqueue/v1/workqueue_service_pb.js";

const address = process.env["RETINUE_HTTP_ADDRESS"] ?? assert.fail("cannot test: set RETINUE_HTTP_ADDRESS");
const transport = createConnectTransport({ baseUrl: `http://${address}`, httpVersion: "1.1", useBinaryFormat: false });
const tasks = createClient(WorkQueueService, transport);
const admin = createClient(WorkQueueAdminService, transport);
const queueId = `connect-${process.pid}-${process.hrtime.bigint()}`;
const brief = { timeout: 120_000 };

test("a task goes from enqueue to completion, bytes and 64-bit numbers intact", brief, async () => {
  const data = Uint8Array.from({ length: 256 }, (_, byte) => byte);
  const input = { content: { case: "data" as const, value: data } };
  const { results } = await tasks.enqueueTasks({ tasks: [{ queueId, input }] });
  const { leases } = await tasks.leaseTasks({ queueId, workerId: "connect", waitDuration: { seconds: 5n } });
  assert.equal(leases[0]?.taskId, results[0]?.taskId);
  assert.deepEqual(leases[0]?.input?.content.value, data);
  assert.equal(leases[0]?.leaseEpoch, 1n);
  const done = await tasks.completeTasks({ completions: [{ leaseToken: leases[0]!.leaseToken }] });
  assert.equal(done.results[0]?.status?.code ?? 0, 0);
  const { stats } = await admin.getQueueStats({ queueIds: [queueId] });
  assert.equal(stats[0]?.succeeded, 1n);
});

test("an error has its code, its reason and every field that is wrong", brief, async () => {
  const nonsense = [{ queueId, priority: 9999 }, { queueId: "no spaces, please" }];
  const error = await tasks.enqueueTasks({ tasks: nonsense }).then(() => undefined, ConnectError.from);
  assert.equal(error?.code, Code.InvalidArgument);
  const info = error.findDetails(ErrorInfoSchema)[0];
  assert.deepEqual([info?.domain, info?.reason], ["retinue", "INVALID_FIELD"]);
  const fields = error.findDetails(BadRequestSchema).flatMap((request) => request.fieldViolations);
  assert.deepEqual(fields.map(({ field }) => field).sort(), ["tasks[0].priority", "tasks[1].queue_id"]);
});

test("another code is another HTTP status and comes with its metadata", brief, async () => {
  const error = await tasks.getTask({ taskId: "nobody-knows" }).then(() => undefined, ConnectError.from);
  assert.equal(error?.code, Code.NotFound);
  const info = error.findDetails(ErrorInfoSchema)[0];
  assert.deepEqual([info?.reason, info?.metadata["task_id"]], ["TASK_NOT_FOUND", "nobody-knows"]);
});

test("an error of a stream has its details, too", brief, async () => {
  const watch = async () => {
    for await (const _ of admin.watchEvents({ resumeToken: "of another process" })) assert.fail("it was not refused");
  };
  const error = await watch().then(() => undefined, ConnectError.from);
  assert.ok(error?.code === Code.OutOfRange || error?.code === Code.InvalidArgument, String(error));
  assert.equal(error.findDetails(ErrorInfoSchema)[0]?.domain, "retinue");
});

test("a watch opens, tells what happens, and ends when the client leaves", brief, async () => {
  const leave = new AbortController();
  const watched = `${queueId}-watched`;
  const seen: TaskEventType[] = [];
  const watch = async () => {
    for await (const { event, resumeToken } of admin.watchEvents({ queueId: watched }, { signal: leave.signal })) {
      if (event.case === "opened") await tasks.enqueueTasks({ tasks: [{ queueId: watched }] });
      if (event.case === "taskEvent") seen.push(event.value.type);
      if (event.case === "taskEvent" && event.value.type === TaskEventType.ENQUEUED) {
        assert.notEqual(resumeToken, "");
        leave.abort();
      }
    }
  };
  const error = await watch().then(() => undefined, ConnectError.from);
  assert.equal(error?.code, Code.Canceled);
  assert.deepEqual(seen, [TaskEventType.ENQUEUED]);
});

test("what needs an operator is refused", brief, async () => {
  const error = await admin.pauseQueue({ queueId }).then(() => undefined, ConnectError.from);
  assert.equal(error?.code, Code.PermissionDenied);
  assert.equal(error.findDetails(ErrorInfoSchema)[0]?.reason, "ROLE_REQUIRED");
});

test("a deadline of the client ends a long poll in time, with an empty answer", brief, async () => {
  const request = { queueId: `${queueId}-empty`, workerId: "connect", waitDuration: { seconds: 30n } };
  const poll = () => tasks.leaseTasks(request, { timeoutMs: 1000 });
  let answer = await poll().catch(ConnectError.from);
  for (let tries = 1; tries < 10 && answer instanceof ConnectError; tries++) {
    assert.equal(answer.code, Code.DeadlineExceeded); // of a machine that stood still for the 200 ms that are left
    answer = await poll().catch(ConnectError.from);
  }
  assert.ok(!(answer instanceof ConnectError));
  assert.equal(answer.leases.length, 0);
});

test("the capabilities are readable", brief, async () => {
  const { durability, engine, maxPayloadBytes } = await admin.getCapabilities({});
  assert.notEqual(engine, "");
  assert.equal(maxPayloadBytes, 262144n);
  assert.notEqual(durability, Durability.UNSPECIFIED);
});

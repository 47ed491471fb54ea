// The worker against a real server: RETINUE_ADDRESS is where apps dial it, RETINUE_CONTROL_ADDRESS where operators do.
import assert from "node:assert/strict";
import { once } from "node:events";
import * as net from "node:net";
import { after, test, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { address, connect, createClient, Failure, LeaseLost, Release, RetinueError, Stopping } from "retinue/client";
import { TaskCancelled, text, Worker, type Handler, type Result } from "retinue/client";
import { TaskState } from "retinue/workqueue/v1/task_pb";
import { WorkQueueAdminService } from "retinue/workqueue/v1/workqueue_admin_service_pb";
import { WorkQueueService } from "retinue/workqueue/v1/workqueue_service_pb";

process.env["RETINUE_CONTROL_ADDRESS"] ?? assert.fail("cannot test: set RETINUE_ADDRESS and RETINUE_CONTROL_ADDRESS");
const control = connect("control"); // RETINUE_CONTROL_ADDRESS
const [tasks, admin] = [createClient(WorkQueueService, control), createClient(WorkQueueAdminService, control)];
const links = new Set<net.Socket>();
const relay = net.createServer(link);
await once(relay.listen(0, "127.0.0.1"), "listening");
after(() => (cut(), relay.close()));
const { port } = relay.address() as net.AddressInfo;
const cuttable = createClient(WorkQueueService, createGrpcTransport({ baseUrl: `http://127.0.0.1:${port}` }));

function link(near: net.Socket): void {
  const [host, port] = address("workqueue").split(":");
  const far = net.connect(Number(port), host);
  for (const [from, to] of [
    [near, far],
    [far, near],
  ] as const) {
    links.add(from);
    from.on("error", () => to.destroy());
    from.on("close", () => links.delete(from) && to.destroy());
    from.pipe(to);
  }
}

function cut(): void {
  for (const socket of links) socket.destroy();
}

async function enqueue(queueId: string): Promise<string> {
  return (await tasks.enqueueTasks({ tasks: [{ queueId }] })).results[0]!.taskId;
}

async function ended(taskId: string) {
  return (await tasks.waitTask({ taskId, waitDuration: { seconds: 60n } })).task!;
}

/** Starts a worker with short leases; the returned function stops it. */
function start(queueId: string, handle: Handler, log = (_: string) => {}): () => Promise<void> {
  const stop = new AbortController();
  const options = { client: cuttable, queueId, handle, leaseDurationMs: 3000, graceMs: 3000, log };
  const running = new Worker(options).run(stop.signal);
  return () => (stop.abort(), running);
}

/** A handler that works until it is told to stop, with promises of its beginning and of why it ended. */
function endless() {
  let begin = () => {};
  let end = (_: unknown) => {};
  const begun = new Promise<void>((resolve) => (begin = resolve));
  const cause = new Promise<unknown>((resolve) => (end = resolve));
  const handle: Handler = async (_, signal) => {
    begin();
    await once(signal, "abort");
    end(signal.reason);
    throw signal.reason;
  };
  return { begun, cause, handle };
}

function claim(name: string, body: (queueId: string, t: TestContext) => Promise<void>): void {
  test(name, { timeout: 120_000 }, (t) => body(`node-${name.replaceAll(" ", "-")}-${process.hrtime.bigint()}`, t));
}

claim("a task that outlives its lease is renewed", async (queueId) => {
  const taskId = await enqueue(queueId);
  const complaints: string[] = [];
  const late = async () => {
    await sleep(7000);
    return { payload: text("late") };
  };
  const stop = start(queueId, late, (message) => complaints.push(message));
  const task = await ended(taskId);
  assert.equal(task.state, TaskState.SUCCEEDED);
  assert.equal(task.leaseExpirations, 0);
  assert.equal(task.leaseEpoch, 1n);
  await stop();
  assert.deepEqual(complaints, []); // the stream did not break, either
});

claim("a cancelled task stops its handler", async (queueId) => {
  const taskId = await enqueue(queueId);
  const { begun, cause, handle } = endless();
  const stop = start(queueId, handle);
  await begun;
  await tasks.cancelTasks({ taskIds: [taskId] });
  assert.ok((await cause) instanceof TaskCancelled);
  assert.equal((await ended(taskId)).state, TaskState.CANCELLED);
  await stop();
});

claim("a lost lease stops its handler", async (queueId) => {
  await enqueue(queueId);
  const { begun, cause, handle } = endless();
  const stop = start(queueId, handle);
  await begun;
  await admin.deleteQueue({ queueId, force: true });
  assert.ok((await cause) instanceof LeaseLost);
  await stop();
});

claim("an outcome survives its stream", async (queueId) => {
  const taskId = await enqueue(queueId);
  const stop = start(queueId, async () => {
    await sleep(200); // a lease whose delivery the cut interrupts goes back at once
    cut();
    await sleep(4500); // longer than the lease: it is renewed without its stream
    return { payload: text("after the cut") };
  });
  const task = await ended(taskId);
  assert.equal(task.state, TaskState.SUCCEEDED);
  assert.equal(task.leaseEpoch, 1n);
  assert.equal((await ended(await enqueue(queueId))).state, TaskState.SUCCEEDED);
  await stop();
});

claim("a stopping worker lets its handler finish", async (queueId) => {
  const taskId = await enqueue(queueId);
  const { begun, handle } = endless();
  const stop = start(queueId, async (lease, signal) => {
    await Promise.race([handle(lease, signal), sleep(300)]);
  });
  await begun;
  await stop();
  assert.equal((await ended(taskId)).state, TaskState.SUCCEEDED);
});

claim("after the grace the task goes back", async (queueId) => {
  const taskId = await enqueue(queueId);
  const { begun, cause, handle } = endless();
  const stop = start(queueId, handle);
  await begun;
  await stop();
  assert.ok((await cause) instanceof Stopping);
  const { task } = await tasks.getTask({ taskId });
  assert.equal(task?.state, TaskState.READY);
  assert.equal(task?.attempt, 0);
});

const refused: [reason: string, result: Result][] = [
  ["PAYLOAD_TOO_LARGE", { payload: text("x".repeat(300 << 10)) }],
  ["INVALID_FIELD", { followUps: [{ queueId: "no spaces, please" }] }],
];
for (const [reason, result] of refused) {
  claim(`a result that is refused for ${reason} fails the task`, async (queueId) => {
    const taskId = await enqueue(queueId);
    const stop = start(queueId, async () => result);
    const task = await ended(taskId);
    assert.equal(task.state, TaskState.DEAD);
    assert.equal(task.lastFailure?.reason, reason);
    await stop();
  });
}

claim("a final failure ends the task and a release does not count", async (queueId) => {
  const taskId = await enqueue(queueId);
  const attempts: number[] = [];
  const stop = start(queueId, async ({ attempt }) => {
    if (attempts.push(attempt) === 1) throw new Release("not mine");
    throw new Failure("BROKEN", "é".repeat(5000), true);
  });
  const task = await ended(taskId);
  assert.deepEqual(attempts, [1, 1]);
  assert.equal(task.state, TaskState.DEAD);
  assert.equal(task.lastFailure?.reason, "BROKEN");
  assert.equal(task.leaseEpoch, 2n);
  await stop();
});

claim("a worker that can never work says so", async () => {
  const worker = new Worker({ client: tasks, queueId: "no spaces, please", handle: async () => {} });
  const error = await worker.run(new AbortController().signal).then(() => undefined, RetinueError.from);
  assert.equal(error?.reason, "INVALID_FIELD");
});

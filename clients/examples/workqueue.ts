// A queue from end to end; prints clients/transcripts/workqueue.txt. Give a queue of your own to run it twice.
// In clients/node: npm ci && npm run build && node dist/examples/workqueue.js
import { bytes, connect, createClient, json, jsonOf, RetinueError, text, Worker, type Client } from "retinue/client";
import { TaskState, type ItemStatus, type Lease, type Payload, type Task } from "retinue/workqueue/v1/task_pb";
import { WorkQueueAdminService } from "retinue/workqueue/v1/workqueue_admin_service_pb";
import { WorkQueueService, type CompleteResult } from "retinue/workqueue/v1/workqueue_service_pb";

type Tasks = Client<typeof WorkQueueService>;
type Admin = Client<typeof WorkQueueAdminService>;

const WORKER = "example-node";

async function main(queueId: string): Promise<void> {
  const channel = connect("workqueue");
  const [tasks, admin] = [createClient(WorkQueueService, channel), createClient(WorkQueueAdminService, channel)];
  await greet(admin);
  await enqueue(tasks, queueId);
  await refuse(tasks, queueId);
  await cancel(tasks, queueId);
  const [invoice, thumbnail, report] = await lease(tasks, queueId, 3);
  const receiptId = await complete(tasks, queueId, invoice!);
  await releaseAndFail(tasks, queueId, thumbnail!);
  console.log(`completed report: ${await completed(tasks, report!)}`);
  await work(tasks, queueId);
  await count(tasks, admin, queueId, receiptId, invoice!.taskId);
}

async function greet(admin: Admin): Promise<void> {
  const limits = await admin.getCapabilities({});
  console.log(`connected: up to ${limits.maxBatchItems} items a batch, ${limits.maxPayloadBytes} bytes a payload`);
}

async function enqueue(tasks: Tasks, queueId: string): Promise<void> {
  const report = { queueId, taskType: "report", input: text("October"), idempotencyKey: "report-10" };
  const image = bytes(Buffer.from("\x89PNG", "latin1"));
  const thumbnail = { queueId, taskType: "thumbnail", input: image, priority: 5 };
  const invoice = { queueId, taskType: "invoice", input: json({ number: 7 }), priority: 10 };
  const first = (await tasks.enqueueTasks({ tasks: [report, thumbnail, invoice] })).results;
  const old = first.filter((result) => result.existing).length;
  console.log(`enqueued: ${first.length - old} new, ${old} existing`);

  const again = (await tasks.enqueueTasks({ tasks: [report] })).results;
  const same = again[0]?.taskId === first[0]?.taskId;
  console.log(`enqueued again: ${again.filter((result) => result.existing).length} existing, the same task: ${same}`);

  const other = (await tasks.enqueueTasks({ tasks: [{ ...report, input: text("November") }] })).results;
  console.log(`enqueued with another input: ${told(other[0]!.status)}`);
}

async function refuse(tasks: Tasks, queueId: string): Promise<void> {
  const nonsense = [{ queueId, priority: 9999 }, { queueId: "no spaces, please" }];
  const refusal = await refused(tasks.enqueueTasks({ tasks: nonsense }));
  console.log(`enqueued nonsense: ${refusal.codeName} ${refusal.reason}`);
  for (const path of refusal.fields.map((field) => field.path).sort()) console.log(`  ${path}`);
  const missing = await refused(tasks.getTask({ taskId: "nobody-knows" }));
  console.log(`asked for a task that nobody knows: ${missing.codeName} ${missing.reason}`);
}

async function cancel(tasks: Tasks, queueId: string): Promise<void> {
  const start = { case: "delayDuration" as const, value: { seconds: 86400n } };
  const taskId = (await tasks.enqueueTasks({ tasks: [{ queueId, start }] })).results[0]!.taskId;
  console.log(`enqueued for tomorrow: ${state((await get(tasks, taskId)).state)}`);
  await tasks.cancelTasks({ taskIds: [taskId] });
  console.log(`cancelled: ${state((await get(tasks, taskId)).state)}`);
}

async function lease(tasks: Tasks, queueId: string, maxTasks: number): Promise<Lease[]> {
  const waitDuration = { seconds: 5n };
  const { leases } = await tasks.leaseTasks({ queueId, workerId: WORKER, maxTasks, waitDuration });
  for (const one of leases) {
    console.log(`leased ${one.taskType}: ${shown(one.input)}, attempt ${one.attempt} of ${one.maxAttempts}`);
  }
  return leases;
}

async function complete(tasks: Tasks, queueId: string, { leaseToken, taskId }: Lease): Promise<string> {
  const receipt = { queueId, taskType: "receipt", input: text("invoice 7 is paid") };
  const paid = { leaseToken, result: text("paid"), followUps: [receipt] };
  const result = (await tasks.completeTasks({ completions: [paid] })).results[0]!;
  console.log(`completed invoice: ${outcome(result)}`);
  console.log(`completed invoice again: ${await completed(tasks, paid)}`);
  const failures = [{ leaseToken, failure: { reason: "TOO_LATE" } }];
  const late = (await tasks.failTasks({ failures })).results[0]!;
  console.log(`failed invoice after that: ${told(late.status)}`);
  const now = await get(tasks, taskId);
  console.log(`invoice is ${state(now.state)}: ${now.result?.content.value}`);
  return result.followUpTaskIds[0]!;
}

async function releaseAndFail(tasks: Tasks, queueId: string, old: Lease): Promise<void> {
  const released = (await tasks.releaseTasks({ releases: [{ leaseToken: old.leaseToken }] })).results[0]!;
  console.log(`released thumbnail: ${told(released.status)}`);
  const [fresh] = await lease(tasks, queueId, 1);
  const { leaseToken, leaseEpoch, taskId } = fresh!;
  console.log(`its epoch grew: ${leaseEpoch > old.leaseEpoch}`);
  console.log(`completed thumbnail with the old lease: ${await completed(tasks, { leaseToken: old.leaseToken })}`);
  const extensions = [{ leaseToken, leaseDuration: { seconds: 60n } }];
  const extended = (await tasks.extendLeases({ extensions })).results[0]!;
  console.log(`extended the new lease: ${told(extended.status)}`);
  const failure = { reason: "CORRUPT_IMAGE", message: "cannot decode it" };
  const failed = (await tasks.failTasks({ failures: [{ leaseToken, failure, final: true }] })).results[0]!;
  console.log(`failed thumbnail for good: ${state(failed.state)}`);
  const dead = await get(tasks, taskId);
  console.log(`thumbnail is ${state(dead.state)}: ${dead.lastFailure?.reason} in attempt ${dead.lastFailure?.attempt}`);
}

/** Does one task by stream; the worker renews leases, reconnects, and stops gracefully. */
async function work(client: Tasks, queueId: string): Promise<void> {
  const stop = new AbortController();
  const handle = async (one: Lease) => {
    console.log(`worked on ${one.taskType}: ${shown(one.input)}`);
    stop.abort();
    return { payload: text("mailed") };
  };
  await new Worker({ client, queueId, workerId: WORKER, handle }).run(stop.signal);
}

async function count(tasks: Tasks, admin: Admin, queueId: string, taskId: string, invoiceId: string): Promise<void> {
  const receipt = (await tasks.waitTask({ taskId, waitDuration: { seconds: 5n } })).task!;
  const followUp = receipt.parentTaskId === invoiceId;
  console.log(`receipt is ${state(receipt.state)}: ${receipt.result?.content.value}, a follow-up of the invoice: ${followUp}`);
  const { ready, leased, succeeded, dead, cancelled } = (await admin.getQueueStats({ queueIds: [queueId] })).stats[0]!;
  console.log(
    `counted: ${ready} ready, ${leased} leased, ${succeeded} succeeded, ${dead} dead, ${cancelled} cancelled`,
  );
}

async function get(tasks: Tasks, taskId: string): Promise<Task> {
  return (await tasks.getTask({ taskId })).task!;
}

async function refused(call: Promise<unknown>): Promise<RetinueError> {
  return call.then(() => Promise.reject(new Error("it was not refused")), RetinueError.from);
}

async function completed(tasks: Tasks, completion: { leaseToken: Uint8Array }): Promise<string> {
  return outcome((await tasks.completeTasks({ completions: [completion] })).results[0]!);
}

function outcome({ status, followUpTaskIds: { length } }: CompleteResult): string {
  return status?.code ? told(status) : `OK, ${length} follow-up${length === 1 ? "" : "s"}`;
}

function told(item: ItemStatus | undefined): string {
  const refusal = RetinueError.fromItem(item);
  return refusal ? `${refusal.codeName} ${refusal.reason}` : "OK";
}

function shown(payload: Payload | undefined): string {
  const content = payload?.content;
  if (content?.case === "data") return `${content.value.length} bytes`;
  if (content?.case === "text") return content.value;
  return `number ${(jsonOf(payload) as { number: number }).number}`;
}

function state(state: TaskState): string {
  return TaskState[state];
}

await main(process.argv[2] ?? "transcript");

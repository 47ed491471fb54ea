// BullMQ, tuned as its guide says: `addBulk` for many jobs, a concurrency of 100 for jobs that don't use the CPU
// ("Concurrency"), finished jobs removed at once ("Auto-removal of jobs"), `maxRetriesPerRequest: null` for workers
// ("Going to production"). Four addBulk calls are in flight, as many as of the others.
import { load, numbers, produce, recorder, say, share, task, timed, whenDue, BULK, WINDOW } from "./protocol.mjs";

const { Queue, Worker } = load("bullmq");
const [role, url, name, count, path] = process.argv.slice(2);
const { hostname: host, port } = new URL(url);
const connection = { host, port: Number(port), maxRetriesPerRequest: null };
const IN_FLIGHT = Number(process.env.BENCH_BULK_CALLS ?? 4);
const WAITING = ["waiting", "active", "delayed", "prioritized", "paused", "failed"];

const queues = new Map();
const queue = (id) => {
  if (!queues.has(id)) {
    queues.set(id, new Queue(id, { connection, defaultJobOptions: { removeOnComplete: true } }));
  }
  return queues.get(id);
};

const enqueue = ({ queue: id, first, count: many, mode }) =>
  timed(async () => {
    const to = queue(id);
    if (mode === "bulk") {
      const jobs = (at, size) => numbers(at, size).map((number) => ({ name: "t", data: task(number) }));
      await share(first, many, BULK, IN_FLIGHT, (at, size) => to.addBulk(jobs(at, size)));
    } else {
      await share(first, many, 1, mode === "one" ? 1 : WINDOW, (number) => to.add("t", task(number)));
    }
  });

const open = ({ queue: id, times }) => whenDue(times, (number) => queue(id).add("t", task(number)));

const left = async ({ queue: id }) => {
  const counts = await queue(id).getJobCounts(...WAITING);
  return { left: Object.values(counts).reduce((sum, some) => sum + some, 0) };
};

if (role === "produce") {
  await produce({ enqueue, open, left });
} else {
  const record = recorder(Number(count), path);
  const worker = new Worker(name, async (job) => record(job.data.id), {
    connection,
    concurrency: Number(process.env.BENCH_CONCURRENCY ?? 100),
    removeOnComplete: { count: 0 },
  });
  await worker.waitUntilReady();
  say({ event: "ready" });
}

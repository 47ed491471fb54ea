// pg-boss on PostgreSQL: `insert` for many jobs, a worker that fetches batches of 100 and completes each with one
// statement ("batchSize"), polling twice a second at the most often that it allows, so that we call fetch ourselves.
import { load, numbers, produce, recorder, say, share, task, timed, whenDue, BULK, WINDOW } from "./protocol.mjs";

const PgBoss = load("pg-boss");
const [role, url, name, count, path] = process.argv.slice(2);
const boss = new PgBoss({ connectionString: url, max: 10, supervise: role === "produce", schedule: false });
boss.on("error", (error) => process.stderr.write(`${error}\n`));
await boss.start();

const made = new Set();
const ensure = async (queue) => {
  if (!made.has(queue)) await boss.createQueue(queue);
  made.add(queue);
};

const enqueue = async ({ queue, first, count: many, mode }) => {
  await ensure(queue);
  return timed(async () => {
    if (mode === "bulk") {
      const jobs = (at, size) => numbers(at, size).map((number) => ({ name: queue, data: task(number) }));
      await share(first, many, BULK, 4, (at, size) => boss.insert(jobs(at, size)));
    } else {
      await share(first, many, 1, mode === "one" ? 1 : WINDOW, (number) => boss.send(queue, task(number)));
    }
  });
};

const open = async ({ queue, times }) => {
  await ensure(queue);
  return whenDue(times, (number) => boss.send(queue, task(number)));
};

const left = async ({ queue }) => ({ left: await boss.getQueueSize(queue, { before: "completed" }) });

async function work(record) {
  for (;;) {
    const jobs = (await boss.fetch(name, { batchSize: BULK })) ?? [];
    for (const job of jobs) record(job.data.id);
    if (jobs.length > 0) await boss.complete(name, jobs.map((job) => job.id));
    else await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

if (role === "produce") {
  await produce({ enqueue, open, left });
} else {
  await ensure(name);
  say({ event: "ready" });
  await work(recorder(Number(count), path));
}

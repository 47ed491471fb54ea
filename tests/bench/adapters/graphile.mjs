// graphile-worker on PostgreSQL, as its page "Performance" says: a local queue (jobs fetched in batches of 500), a
// concurrency of 24, completions in batches. `addJobs` for many jobs.
import { load, numbers, produce, recorder, say, share, task, timed, whenDue, BULK, WINDOW } from "./protocol.mjs";

const { makeWorkerUtils, run, Logger } = load("graphile-worker");
const [role, url, name, count, path] = process.argv.slice(2);
const logger = new Logger(() => () => {});

async function producer() {
  const utils = await makeWorkerUtils({ connectionString: url, logger });
  await utils.migrate();
  const add = (queue, number) => utils.addJob(queue, task(number));
  const addAll = (queue, at, size) => utils.addJobs(numbers(at, size).map((number) => ({ identifier: queue, payload: task(number) })));
  const sql = `select count(*)::int as left from graphile_worker.jobs where task_identifier = $1`;
  await produce({
    enqueue: ({ queue, first, count: many, mode }) =>
      timed(() =>
        mode === "bulk"
          ? share(first, many, BULK, 4, (at, size) => addAll(queue, at, size))
          : share(first, many, 1, mode === "one" ? 1 : WINDOW, (number) => add(queue, number)),
      ),
    open: ({ queue, times }) => whenDue(times, (number) => add(queue, number)),
    left: ({ queue }) => utils.withPgClient(async (client) => (await client.query(sql, [queue])).rows[0]),
  });
}

async function worker() {
  const record = recorder(Number(count), path);
  const preset = {
    worker: {
      connectionString: url,
      concurrentJobs: Number(process.env.BENCH_CONCURRENCY ?? 24),
      maxPoolSize: 10,
      localQueue: { size: 500 },
      completeJobBatchDelay: 0,
      failJobBatchDelay: 0,
      logger,
    },
  };
  await run({ preset, noHandleSignals: true, taskList: { [name]: async (payload) => record(payload.id) } });
  say({ event: "ready" });
}

await (role === "produce" ? producer() : worker());

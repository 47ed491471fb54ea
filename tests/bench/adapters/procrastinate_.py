"""procrastinate on PostgreSQL: `batch_defer_async` for many jobs; a worker with a concurrency, jobs deleted when they
succeeded as its guide "Delete jobs" advises for throughput. The handler is a coroutine.
"""

import asyncio
import os
import sys
import time
from typing import Any

import procrastinate
from bench.adapters.protocol import BULK, WINDOW, Record, produce_async, say, shared, task, when_due_async

CONCURRENCY = int(os.environ.get("BENCH_CONCURRENCY", "20"))

app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(conninfo=sys.argv[2], min_size=4, max_size=CONCURRENCY)
)
record: Record


@app.task(name="handle")  # type: ignore[untyped-decorator] # not installed where this is checked
async def handle(id: int, pad: str) -> None:  # noqa: A002 - the task's own field
    record(id)


async def enqueue(queue: str, first: int, count: int, mode: str) -> dict[str, Any]:
    to, start = handle.configure(queue=queue), time.perf_counter()
    if mode == "bulk":
        await shared(
            range(first, first + count, BULK),
            4,
            lambda at: to.batch_defer_async(*map(task, range(at, min(at + BULK, first + count)))),
        )
    else:
        await shared(
            range(first, first + count), 1 if mode == "one" else WINDOW, lambda number: to.defer_async(**task(number))
        )
    return {"seconds": time.perf_counter() - start}


async def open_loop(queue: str, times: list[float]) -> dict[str, Any]:
    to = handle.configure(queue=queue)
    return await when_due_async(times, lambda number: to.defer_async(**task(number)))


async def left(queue: str) -> dict[str, Any]:
    sql = "select count(*) as left from procrastinate_jobs where queue_name = %(queue)s and status in ('todo', 'doing')"
    return {"left": (await app.connector.execute_query_one_async(sql, queue=queue))["left"]}


async def set_up() -> None:
    await app.open_async()
    if not await app.check_connection_async():
        await app.schema_manager.apply_schema_async()


async def work(queue: str) -> None:
    async with app.open_async():
        say(event="ready")
        await app.run_worker_async(queues=[queue], concurrency=CONCURRENCY, delete_jobs="successful")


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce_async(set_up, {"enqueue": enqueue, "open": open_loop, "left": left})
    else:
        record = Record(int(sys.argv[4]), sys.argv[5])
        asyncio.run(work(sys.argv[3]))

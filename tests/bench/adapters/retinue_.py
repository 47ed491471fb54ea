"""Retinue by its own client: `Queue` and `Worker`, a coroutine as handler.

The handler takes less than a round trip, so the worker leases ahead (`prefetch`), as its documentation says.
JSON travels as text with its media type, which load() parses.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from typing import Any

import grpc.aio
from bench.adapters.protocol import BULK, WINDOW, Record, produce_async, say, shared, task, when_due_async

from retinue.client import Job, Queue, Worker
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as admin
from retinue.workqueue.v1 import workqueue_admin_service_pb2_grpc as admin_rpc
from retinue.workqueue.v1 import workqueue_service_pb2 as api
from retinue.workqueue.v1 import workqueue_service_pb2_grpc as rpc

CONCURRENCY = int(os.environ.get("BENCH_CONCURRENCY", "64"))
PREFETCH = int(os.environ.get("BENCH_PREFETCH", "448"))
IN_FLIGHT = int(os.environ.get("BENCH_BULK_CALLS", "4"))
JSON = "application/json"
queues: dict[str, Queue] = {}


def at(name: str) -> Queue:
    return queues.setdefault(name, queues.get(name) or Queue(name, address=sys.argv[2]))


async def nothing() -> None:
    """The client connects on first use."""


async def send(queue: Queue, number: int) -> None:
    await queue.enqueue(json.dumps(task(number)), content_type=JSON)


async def send_all(queue: Queue, numbers: range) -> None:
    answers = await queue.enqueue_many([await queue.spec(json.dumps(task(n)), content_type=JSON) for n in numbers])
    if failed := [answer for answer in answers if isinstance(answer, Exception)]:
        raise failed[0]


async def enqueue(queue: str, first: int, count: int, mode: str) -> dict[str, Any]:
    to, end, start = at(queue), first + count, time.perf_counter()
    if mode == "bulk":
        blocks = range(first, end, BULK)
        await shared(blocks, IN_FLIGHT, lambda number: send_all(to, range(number, min(number + BULK, end))))
    else:
        await shared(range(first, end), 1 if mode == "one" else WINDOW, lambda number: send(to, number))
    return {"seconds": time.perf_counter() - start}


async def open_loop(queue: str, times: list[float]) -> dict[str, Any]:
    return await when_due_async(times, lambda number: send(at(queue), number))


async def left(queue: str) -> dict[str, Any]:
    connection = at(queue).connection
    stub = admin_rpc.WorkQueueAdminServiceStub(connection.channel)
    request = admin.GetQueueStatsRequest(queue_ids=[queue])
    (found,) = (await connection.call(stub.GetQueueStats, request)).stats
    return {"left": found.scheduled + found.ready + found.leased + found.retrying + found.dead}


async def lease(queue: str, count: int) -> dict[str, Any]:
    """Leases tasks, 100 a call, one call after the other."""
    start, leased = time.perf_counter(), 0
    while leased < count:
        found = len(await at(queue).lease("bench", max_tasks=BULK, lease_duration=3600))
        if not found:
            raise ValueError(f"the queue gave only {leased} tasks")
        leased += found
    return {"seconds": time.perf_counter() - start}


async def idle(address: str, count: int) -> None:
    """Workers that wait: a connection and a stream each, a sign of life every 10 s, as the client's own worker does."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    calls = []
    for number in range(count):
        channel = grpc.aio.insecure_channel(address, options=options)
        call = rpc.WorkQueueServiceStub(channel).StreamTasks()
        opening = api.StreamOpen(queue_id="bench-idle", worker_id=f"idle-{number}")
        await call.write(api.StreamTasksRequest(open=opening, extend_all=True, sequence=1, credit=1))
        await call.read()
        calls.append((channel, call))
    say(event="ready")
    for sequence in itertools.count(2):
        for _, call in calls:
            await call.write(api.StreamTasksRequest(extend_all=True, sequence=sequence))
            await asyncio.sleep(10 / count)  # each renews every 10 s, as workers do
            await call.read()


async def work(address: str, name: str, count: int, path: str) -> None:
    record = Record(count, path)

    async def handle(job: Job) -> None:
        record((await job.load())["id"])

    async with Queue(name, address=address) as queue:
        connected = lambda event: say(event="ready") if event.kind == "connected" else None  # noqa: E731 - one line
        await Worker(queue, handle, concurrency=CONCURRENCY, prefetch=PREFETCH, listener=connected).run()


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce_async(nothing, {"enqueue": enqueue, "open": open_loop, "left": left, "lease": lease})
    elif sys.argv[1] == "idle":
        asyncio.run(idle(sys.argv[2], int(sys.argv[3])))
    else:
        asyncio.run(work(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]))

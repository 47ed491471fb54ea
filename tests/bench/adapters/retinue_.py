"""Retinue by its own client: `Queue` and `Worker`, a coroutine as handler.

The handler takes less than a round trip, so the worker leases ahead (`prefetch`), as its documentation says.
JSON travels as text with its media type, which load() parses.
"""

import asyncio
import json
import os
import sys
import time
from typing import Any

from bench.adapters.protocol import WINDOW, Record, blocks, produce, say, task

from retinue.client import Job, Queue, Worker
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as admin
from retinue.workqueue.v1 import workqueue_admin_service_pb2_grpc as admin_rpc

CONCURRENCY = int(os.environ.get("BENCH_CONCURRENCY", "64"))
PREFETCH = int(os.environ.get("BENCH_PREFETCH", "448"))
IN_FLIGHT = int(os.environ.get("BENCH_BULK_CALLS", "4"))
JSON = "application/json"


async def one(queue: Queue, numbers: range) -> None:
    for number in numbers:
        await queue.enqueue(json.dumps(task(number)), content_type=JSON)


async def bulk(queue: Queue, todo: Any) -> None:
    for block in todo:
        answers = await queue.enqueue_many([await queue.spec(json.dumps(task(n)), content_type=JSON) for n in block])
        if failed := [answer for answer in answers if isinstance(answer, Exception)]:
            raise failed[0]


async def share(queue: Queue, numbers: Any, workers: int) -> None:
    todo = iter(numbers)

    async def run() -> None:
        for number in todo:
            await queue.enqueue(json.dumps(task(number)), content_type=JSON)

    await asyncio.gather(*(run() for _ in range(workers)))


async def enqueue(queue: Queue, first: int, count: int, mode: str) -> dict[str, Any]:
    start = time.perf_counter()
    numbers = range(first, first + count)
    if mode == "one":
        await one(queue, numbers)
    elif mode == "pipelined":
        await share(queue, numbers, WINDOW)
    else:
        todo = blocks(first, count)
        await asyncio.gather(*(bulk(queue, todo) for _ in range(IN_FLIGHT)))
    return {"seconds": time.perf_counter() - start}


async def open_loop(queue: Queue, times: list[float]) -> dict[str, Any]:
    start, loop = time.monotonic_ns(), asyncio.get_running_loop()
    origin, sending = loop.time(), set()
    for number, due in enumerate(times):
        if (wait := origin + due - loop.time()) > 0:
            await asyncio.sleep(wait)
        sent = asyncio.create_task(queue.enqueue(json.dumps(task(number)), content_type=JSON))
        sending.add(sent)
        sent.add_done_callback(sending.discard)
    await asyncio.gather(*sending)
    return {"start_ns": start}


async def left(queue: Queue) -> dict[str, Any]:
    stub = admin_rpc.WorkQueueAdminServiceStub(queue.connection.channel)
    request = admin.GetQueueStatsRequest(queue_ids=[queue.queue_id])
    (found,) = (await queue.connection.call(stub.GetQueueStats, request)).stats
    return {"left": found.scheduled + found.ready + found.leased + found.retrying + found.dead}


def produce_all(address: str) -> None:
    runner = asyncio.Runner()
    queues: dict[str, Queue] = {}

    def command(function: Any) -> Any:
        async def run(queue: str, arguments: dict[str, Any]) -> Any:
            if queue not in queues:
                queues[queue] = Queue(queue, address=address)
            return await function(queues[queue], **arguments)

        return lambda queue, **arguments: runner.run(run(queue, arguments))

    produce({"enqueue": command(enqueue), "open": command(open_loop), "left": command(left)})


async def work(address: str, name: str, count: int, path: str) -> None:
    record = Record(count, path)

    async def handle(job: Job) -> None:
        record((await job.load())["id"])

    async with Queue(name, address=address) as queue:
        connected = lambda event: say(event="ready") if event.kind == "connected" else None  # noqa: E731 - one line
        await Worker(queue, handle, concurrency=CONCURRENCY, prefetch=PREFETCH, listener=connected).run()


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce_all(sys.argv[2])
    else:
        asyncio.run(work(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]))

"""saq on redis: a concurrency of 32 for its asyncio worker, results not kept (`ttl` -1), with hiredis."""

import asyncio
import os
import sys
import time
from typing import Any

from bench.adapters.protocol import WINDOW, Record, produce_async, say, shared, task, when_due_async
from saq import Queue, Worker

CONCURRENCY = int(os.environ.get("BENCH_CONCURRENCY", "32"))
KEEP = {"ttl": -1}
queues: dict[str, Queue] = {}
record: Record


def at(name: str) -> Queue:
    if name not in queues:
        queues[name] = Queue.from_url(sys.argv[2], name=name)
    return queues[name]


async def handle(_: Any, *, id: int, pad: str) -> None:  # noqa: A002 - the task's own field
    record(id)


async def enqueue(queue: str, first: int, count: int, mode: str) -> dict[str, Any]:
    start, loops = time.perf_counter(), 1 if mode == "one" else WINDOW
    await shared(range(first, first + count), loops, lambda n: at(queue).enqueue("handle", **KEEP, **task(n)))
    return {"seconds": time.perf_counter() - start}


async def open_loop(queue: str, times: list[float]) -> dict[str, Any]:
    return await when_due_async(times, lambda number: at(queue).enqueue("handle", **KEEP, **task(number)))


async def left(queue: str) -> dict[str, Any]:
    return {"left": await at(queue).count("incomplete")}


async def nothing() -> None:
    """The client connects on first use."""


async def work(queue: str) -> None:
    worker = Worker(at(queue), functions=[("handle", handle)], concurrency=CONCURRENCY)
    say(event="ready")
    await worker.start()


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce_async(nothing, {"enqueue": enqueue, "open": open_loop, "left": left})
    else:
        record = Record(int(sys.argv[4]), sys.argv[5])
        asyncio.run(work(sys.argv[3]))
